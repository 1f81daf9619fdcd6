#include "moe.h"

#include <algorithm>
#include <initializer_list>

#include "launch.h"
#include "moe.cuh"

namespace {

using namespace megapt;

constexpr int kThreads = 256;
constexpr int kTooLarge = 1;  // cudaErrorInvalidValue
constexpr int64_t kSlots = 1 << 30, kExperts = 1024;

// Slots of a warp: many warps, but no more than a warp soon sums up the counts of.
int64_t tile_of(int64_t slots) { return std::max<int64_t>(256, ((slots + 511) / 512 + 31) / 32 * 32); }

int64_t tiles_of(int64_t slots) { return (slots + tile_of(slots) - 1) / tile_of(slots); }

template <class Id>
int sort(const Id* expert_of, int slots, int experts, int* scratch, int64_t* order, int* place, int64_t* counts,
         void* stream) {
    const int tile = static_cast<int>(tile_of(slots)), tiles = static_cast<int>(tiles_of(slots)), bins = experts + 1;
    int *before = scratch, *totals = scratch + static_cast<int64_t>(bins) * tiles;
    const size_t shared = bins * sizeof(int);
    if (tiles > 0) {
        const int code =
            launch(moe_count<Id>, dim3(tiles), dim3(32), shared, stream, expert_of, slots, experts, tile, before);
        if (code) return code;
    }
    const int code = launch(moe_scan, dim3(bins), dim3(32), 0, stream, before, tiles, totals, counts, experts);
    if (code || tiles == 0) return code;
    return launch(moe_place<Id>, dim3(tiles), dim3(32), shared, stream, expert_of, slots, experts, tile, before, totals,
                  order, place);
}

struct Sizes {
    int64_t tokens, choices, width;
};

// Calls f(type, whether elements go by 16 bytes, rows, grid). lanes: a block's threads for each token, powers of two.
template <class F>
int with_rows(std::initializer_list<const void*> pointers, Sizes n, int dtype, int least_lanes, int most_lanes, F&& f) {
    if (n.tokens == 0 || n.width == 0) return 0;
    if (n.tokens * n.choices >= kSlots) return kTooLarge;
    return dispatch(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        bool wide = n.width % V == 0;
        for (const void* p : pointers) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
        MoeRows rows = {n.tokens, wide ? n.width / V : n.width, static_cast<int>(n.choices), 0};
        // Four vectors for a thread, if there are as many.
        int lanes = least_lanes;
        while (lanes < most_lanes && 4 * lanes < rows.vectors) lanes *= 2;
        while ((1 << rows.shift) < lanes) ++rows.shift;
        const int64_t at_once = kThreads >> rows.shift, blocks = (n.tokens + at_once - 1) / at_once;
        return f(type, wide, rows, dim3(static_cast<unsigned>(blocks)));
    });
}

}  // namespace

int64_t megapt_moe_scratch(int64_t slots, int64_t experts) { return (experts + 1) * (tiles_of(slots) + 1); }

int megapt_moe_sort(const void* expert_of, int id_bytes, int64_t slots, int64_t experts, int* scratch, int64_t* order,
                    int* place, int64_t* counts, void* stream) {
    if (slots >= kSlots || experts > kExperts) return kTooLarge;
    const int n = static_cast<int>(slots), bins = static_cast<int>(experts);
    if (id_bytes == 4) {
        return sort(static_cast<const int*>(expert_of), n, bins, scratch, order, place, counts, stream);
    }
    return sort(static_cast<const int64_t*>(expert_of), n, bins, scratch, order, place, counts, stream);
}

int megapt_moe_invert(const int64_t* order, int64_t slots, int* place, void* stream) {
    if (slots >= kSlots) return kTooLarge;
    if (slots == 0) return 0;
    const int64_t blocks = (slots + kThreads - 1) / kThreads;
    return launch(moe_invert, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, order,
                  static_cast<int>(slots), place);
}

int megapt_moe_spread(const void* x, const int* place, const int64_t* order, void* rows, int64_t tokens,
                      int64_t choices, int64_t width, int dtype, void* stream) {
    const Sizes sizes = {tokens, choices, width};
    return with_rows({x, rows}, sizes, dtype, 4, kThreads, [&](auto type, bool wide, auto r, auto grid) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        return launch(wide ? moe_spread<T, V> : moe_spread<T, 1>, grid, dim3(kThreads), 0, stream,
                      static_cast<const T*>(x), place, order, static_cast<T*>(rows), r);
    });
}

int megapt_moe_gather(const void* rows, const int* place, const float* weights, void* out, int64_t tokens,
                      int64_t choices, int64_t width, int dtype, void* stream) {
    const Sizes sizes = {tokens, choices, width};
    return with_rows({rows, out}, sizes, dtype, 4, kThreads, [&](auto type, bool wide, auto r, auto grid) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        return launch(wide ? moe_gather<T, V> : moe_gather<T, 1>, grid, dim3(kThreads), 0, stream,
                      static_cast<const T*>(rows), place, weights, static_cast<T*>(out), r);
    });
}

int megapt_moe_gather_backward(const void* dy, const void* rows, const int64_t* order, const int* place,
                               const float* weights, void* drows, float* dweights, int64_t tokens, int64_t choices,
                               int64_t width, int dtype, void* stream) {
    const Sizes sizes = {tokens, choices, width};
    return with_rows({dy, rows, drows}, sizes, dtype, 32, 32, [&](auto type, bool wide, auto r, auto grid) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        return launch(wide ? moe_gather_backward<T, V> : moe_gather_backward<T, 1>, grid, dim3(kThreads), 0, stream,
                      static_cast<const T*>(dy), static_cast<const T*>(rows), order, place, weights,
                      static_cast<T*>(drows), dweights, r);
    });
}
