// Barriers, and what the lanes of a warp do together.
#pragma once

#include "simt_machine.h"

#define MEGAPT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()  // of the call

inline void __syncthreads(MEGAPT_SITE) { megapt::emulator::machine().barrier("__syncthreads", false, {file, line}); }

inline int __syncthreads_count(int predicate, MEGAPT_SITE) {
    megapt::emulator::machine().barrier("__syncthreads_count", predicate != 0, {file, line});
    return megapt::emulator::machine().true_predicates();
}

inline int __syncthreads_and(int predicate, MEGAPT_SITE) {
    megapt::emulator::machine().barrier("__syncthreads_and", predicate != 0, {file, line});
    return megapt::emulator::machine().true_predicates() == megapt::emulator::machine().arrived();
}

inline int __syncthreads_or(int predicate, MEGAPT_SITE) {
    megapt::emulator::machine().barrier("__syncthreads_or", predicate != 0, {file, line});
    return megapt::emulator::machine().true_predicates() > 0;
}

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return value;
}

template <class Function>
void each_lane(uint32_t named, Function function) {
    for (; named; named &= named - 1) function(__builtin_ctz(named));
}

// A lane that is not in the operation gives 0xFF bytes: on a GPU the value is undefined.
inline void take_from_source(Thread* lanes, uint32_t named) {
    each_lane(named, [=](int l) {
        lanes[l].result = named >> lanes[l].source & 1 ? lanes[lanes[l].source].value : ~uint64_t{0};
    });
}

inline void nothing(Thread*, uint32_t) {}

inline void vote(Thread* lanes, uint32_t named) {
    uint32_t votes = 0;
    each_lane(named, [&](int l) { votes |= lanes[l].value ? 1u << l : 0u; });
    each_lane(named, [=](int l) { lanes[l].result = votes; });
}

inline void equals(Thread* lanes, uint32_t named) {
    each_lane(named, [=](int l) {
        uint32_t same = 0;
        each_lane(named, [&](int o) { same |= lanes[o].value == lanes[l].value ? 1u << o : 0u; });
        lanes[l].result = same;
    });
}

// Folds the values of the lanes as numbers of type T by Fold::of.
template <class T, class Fold>
void reduce(Thread* lanes, uint32_t named) {
    T total = from_bits<T>(lanes[__builtin_ctz(named)].value);
    each_lane(named & (named - 1), [&](int l) { total = Fold::of(total, from_bits<T>(lanes[l].value)); });
    each_lane(named, [=](int l) { lanes[l].result = to_bits(total); });
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
    return from_bits<T>(machine().warp_operation(what, mask, to_bits(value), source, take_from_source, site));
}

inline void check_width(int width) {
    if (width < 1 || width > kWarp || (width & (width - 1)))
        machine().fail(kLaunchFailure, text("a shuffle of width %d: it must be a power of two up to 32", width));
}

inline uint32_t votes(const char* what, unsigned mask, int predicate, Site site) {
    return static_cast<uint32_t>(machine().warp_operation(what, mask, predicate != 0, 0, vote, site));
}

}  // namespace emulator
}  // namespace megapt

inline void __syncwarp(unsigned mask = 0xffffffffu, MEGAPT_SITE) {
    megapt::emulator::machine().warp_operation("__syncwarp", mask, 0, 0, megapt::emulator::nothing, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MEGAPT_SITE) {
    megapt::emulator::check_width(width);
    const int lane = megapt::emulator::machine().lane();
    const int from = (lane & ~(width - 1)) | (source & (width - 1));
    return megapt::emulator::shuffle("__shfl_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MEGAPT_SITE) {
    megapt::emulator::check_width(width);
    const int lane = megapt::emulator::machine().lane();
    const int from = (lane & (width - 1)) < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta);
    return megapt::emulator::shuffle("__shfl_up_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MEGAPT_SITE) {
    megapt::emulator::check_width(width);
    const int lane = megapt::emulator::machine().lane();
    const int from = (lane & (width - 1)) + static_cast<int>(delta) >= width ? lane : lane + static_cast<int>(delta);
    return megapt::emulator::shuffle("__shfl_down_sync", mask, value, from, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, MEGAPT_SITE) {
    megapt::emulator::check_width(width);
    const int lane = megapt::emulator::machine().lane();
    const int other = lane ^ bits;  // a later group of `width` lanes may not be read, an earlier one may
    const int from = other > (lane | (width - 1)) ? lane : other & 31;
    return megapt::emulator::shuffle("__shfl_xor_sync", mask, value, from, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MEGAPT_SITE) {
    return megapt::emulator::votes("__ballot_sync", mask, predicate, {file, line});
}

inline int __any_sync(unsigned mask, int predicate, MEGAPT_SITE) {
    return megapt::emulator::votes("__any_sync", mask, predicate, {file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, MEGAPT_SITE) {
    return megapt::emulator::votes("__all_sync", mask, !predicate, {file, line}) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, MEGAPT_SITE) {
    using namespace megapt::emulator;
    return static_cast<unsigned>(
        machine().warp_operation("__match_any_sync", mask, to_bits(value), 0, equals, {file, line}));
}

template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, MEGAPT_SITE) {
    using namespace megapt::emulator;
    const unsigned live = machine().live_lanes() & mask;
    const unsigned same = static_cast<unsigned>(
        machine().warp_operation("__match_all_sync", mask, to_bits(value), 0, equals, {file, line}));
    *all_equal = (live & ~same) == 0;
    return *all_equal ? mask : 0;
}

// The lanes that run together: here, those that have not returned. A kernel may not build on more.
inline unsigned __activemask() { return megapt::emulator::machine().live_lanes(); }

#define MEGAPT_REDUCE(name, type, expression)                                                       \
    inline type name(unsigned mask, type value, MEGAPT_SITE) {                                      \
        using namespace megapt::emulator;                                                           \
        struct Fold {                                                                               \
            static type of(type a, type b) { return expression; }                                   \
        };                                                                                          \
        const auto combine = reduce<type, Fold>;                                                    \
        return from_bits<type>(                                                                     \
            machine().warp_operation(#name, mask, to_bits(value), 0, combine, {file, line}));       \
    }
MEGAPT_REDUCE(__reduce_add_sync, unsigned, a + b)
MEGAPT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
MEGAPT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
MEGAPT_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
MEGAPT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
MEGAPT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
MEGAPT_REDUCE(__reduce_and_sync, unsigned, a & b)
MEGAPT_REDUCE(__reduce_or_sync, unsigned, a | b)
MEGAPT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef MEGAPT_REDUCE
