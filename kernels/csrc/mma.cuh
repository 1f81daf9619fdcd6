// Tensor cores and asynchronous copies of sm_80 and later, as functions; under the emulator, what PTX says they do.
#pragma once

#include "common.cuh"

namespace megapt {

// A warp multiplies 16 x 16 by 16 x 8. Lane l has, with g = l / 4 and t = l % 4, two numbers of 16 bits in a word:
//   a[0], a[1]: rows g, g + 8, columns 2t and 2t + 1; a[2], a[3]: the same rows, columns 2t + 8 and 2t + 9;
//   b0, b1: column g, rows 2t and 2t + 1; rows 2t + 8 and 2t + 9;
//   c[0], c[1]: row g, columns 2t and 2t + 1; c[2], c[3]: row g + 8.
using Left = uint32_t[4];
using Sum = float[4];

#if !defined(MEGAPT_EMULATED)

// c += a b.
template <class T>
__device__ __forceinline__ void mma(Sum& c, const Left& a, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four matrices of 8 x 8 numbers of 16 bits: lane l names row l % 8 of matrix l / 8, 16 bytes of shared memory, and
// gets of matrix i, in words[i], columns 2t and 2t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the matrices turned: column g of rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies of a thread from global to shared memory that happen at any time before `wait`, in groups.
class AsyncCopies {
public:
    // 16 bytes, or zeros if not `inside`: then nothing is read.
    __device__ __forceinline__ void copy16(void* to, const void* from, bool inside) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(inside ? 16 : 0)
                     : "memory");
    }
    __device__ __forceinline__ void copy4(void* to, const void* from, bool inside) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(inside ? 4 : 0)
                     : "memory");
    }
    // What has been asked for since the last call is a group.
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Until all groups but the latest `left` are there, for this thread; the others need a barrier.
    template <int left>
    __device__ __forceinline__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
    }
};

// 2^x, to 2 units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

struct MmaOperands {
    const uint32_t *a, *b;
    float* c;
};

template <class T>
T half_of(uint32_t word, int number) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * number);
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return value;
}

// All lanes wait in it, so that one of them may do the work on what the others have.
template <class T>
void multiply(emulator::Thread* lanes, uint32_t named) {
    float a[16][16], b[8][16];
    const auto of = [&](int lane) { return emulator::from_bits<const MmaOperands*>(lanes[lane].value); };
    if (named != 0xffffffffu) emulator::machine().fail(emulator::kLaunchFailure, "mma without all lanes of the warp");
    for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 8; ++i)
            a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = to_float(half_of<T>(of(l)->a[i / 2], i % 2));
        for (int i = 0; i < 4; ++i) b[g][2 * t + i % 2 + i / 2 * 8] = to_float(half_of<T>(of(l)->b[i / 2], i % 2));
    }
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
            const float *row = a[l / 4 + i / 2 * 8], *column = b[2 * (l % 4) + i % 2];
            float sum = of(l)->c[i];
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            of(l)->c[i] = sum;
        }
    }
}

template <class T>
void mma(Sum& c, const Left& a, uint32_t b0, uint32_t b1, MEGAPT_SITE) {
    const uint32_t b[2] = {b0, b1};
    const MmaOperands own = {a, b, c};
    emulator::machine().warp_operation("mma", 0xffffffffu, emulator::to_bits(&own), 0, multiply<T>, {file, line});
}

struct Addresses {
    const void *own, *of[32];
};

inline void exchange_addresses(emulator::Thread* lanes, uint32_t named) {
    const auto of = [&](int lane) { return emulator::from_bits<Addresses*>(lanes[lane].value); };
    if (named != 0xffffffffu) emulator::machine().fail(emulator::kLaunchFailure, "ldmatrix without all lanes");
    for (int l = 0; l < 32; ++l)
        for (int from = 0; from < 32; ++from) of(l)->of[from] = of(from)->own;
}

// Each lane reads its own words, so that the race detector sees who reads what.
inline Addresses addresses(const char* what, const void* row, emulator::Site site) {
    Addresses all{row, {}};
    if (reinterpret_cast<uintptr_t>(row) % 16)
        emulator::machine().fail(emulator::kMisalignedAddress, "ldmatrix of a row that is no multiple of 16 bytes");
    emulator::machine().warp_operation(what, 0xffffffffu, emulator::to_bits(&all), 0, exchange_addresses, site);
    return all;
}

inline void load_matrices(uint32_t (&words)[4], const void* row, MEGAPT_SITE) {
    const Addresses all = addresses("ldmatrix", row, {file, line});
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(all.of[8 * i + g])[t];
}

inline void load_matrices_turned(uint32_t (&words)[4], const void* row, MEGAPT_SITE) {
    const Addresses all = addresses("ldmatrix.trans", row, {file, line});
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const uint16_t low = static_cast<const uint16_t*>(all.of[8 * i + 2 * t])[g];
        words[i] = low | static_cast<uint32_t>(static_cast<const uint16_t*>(all.of[8 * i + 2 * t + 1])[g]) << 16;
    }
}

// A copy destroys what was there when it is asked for and arrives in `wait`: who reads too early, or still reads what
// was there before, gets NaN.
class AsyncCopies {
public:
    void copy16(void* to, const void* from, bool inside) { ask<uint4>(to, from, inside); }
    void copy4(void* to, const void* from, bool inside) { ask<uint32_t>(to, from, inside); }
    void commit() { ends_[groups_++] = count_; }
    template <int left>
    void wait() {
        if (groups_ <= left) return;
        const int done = groups_ - left, end = ends_[done - 1];
        for (int i = 0; i < end; ++i) arrive(asked_[i]);
        for (int i = end; i < count_; ++i) asked_[i - end] = asked_[i];
        for (int i = 0; i < left; ++i) ends_[i] = ends_[done + i] - end;
        count_ -= end, groups_ = left;
    }

private:
    struct Copy {
        void* to;
        const void* from;
        bool inside, wide;
    };

    template <class Word>
    void ask(void* to, const void* from, bool inside) {
        if (reinterpret_cast<uintptr_t>(to) % sizeof(Word) || reinterpret_cast<uintptr_t>(from) % sizeof(Word))
            emulator::machine().fail(emulator::kMisalignedAddress, "cp.async of a misaligned address");
        if (count_ == kMost) emulator::machine().fail(emulator::kLaunchFailure, "too many copies that nobody awaits");
        Word nan;
        memset(&nan, 0xFF, sizeof nan);
        *static_cast<Word*>(to) = nan;
        asked_[count_++] = {to, from, inside, sizeof(Word) == 16};
    }

    static void arrive(const Copy& copy) {
        if (copy.wide)
            *static_cast<uint4*>(copy.to) = copy.inside ? *static_cast<const uint4*>(copy.from) : uint4{};
        else
            *static_cast<uint32_t*>(copy.to) = copy.inside ? *static_cast<const uint32_t*>(copy.from) : 0;
    }

    static constexpr int kMost = 128;
    Copy asked_[kMost];
    int ends_[8], count_ = 0, groups_ = 0;
};

inline float power_of_two(float x) { return exp2f(x); }

#endif

}  // namespace megapt
