// Cross entropy over this rank's columns of the logits: one read of them for what the ranks exchange, then one read and
// one write that puts the gradient in their place. A block of threads takes one row.
//
// Rows are read 16 bytes at a time wherever they begin: up to 15 bytes before the first such place, and what is left
// after the last, are single elements. Columns from `length` on are padding.
#pragma once

#include <cfloat>

#include "common.cuh"

namespace megapt {

// x with the soft cap (0: none), cap x tanh(x / cap), and the derivative of that.
struct Capped {
    float value, bend;
};

// 2^x in one instruction, 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(MEGAPT_EMULATED)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// exp and tanh: of 16-bit numbers with absolute errors of some 1e-7, which their rounding hides; of fp32 the best.
template <class T>
struct Numerics {
    static __device__ __forceinline__ float exp(float x) { return fast_exp2(x * 1.4426950408889634f); }
    static __device__ __forceinline__ float tanh(float x) {
        return 1.f - __fdividef(2.f, 1.f + fast_exp2(x * 2.8853900817779268f));
    }
};
template <>
struct Numerics<float> {
    static __device__ __forceinline__ float exp(float x) { return expf(x); }
    static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
};

template <class T, bool capped>
__device__ __forceinline__ Capped cap_logit(float x, float cap, float inverse_cap) {
    if (!capped) return {x, 1.f};
    const float t = Numerics<T>::tanh(x * inverse_cap);
    return {cap * t, 1.f - t * t};
}

// The maximum of numbers and the sum of their exponentials relative to it, one pass. The maximum begins at the lowest
// finite number, so that differences with it are never those of infinities.
struct OnlineSum {
    float top = -FLT_MAX, sum = 0.f;

    template <class T, int n>
    __device__ __forceinline__ void add(const float (&x)[n]) {
        float highest = x[0];
#pragma unroll
        for (int i = 1; i < n; ++i) highest = fmaxf(highest, x[i]);
        if (highest > top) {
            sum *= Numerics<T>::exp(top - highest);
            top = highest;
        }
        float part = 0.f;
#pragma unroll
        for (int i = 0; i < n; ++i) part += Numerics<T>::exp(x[i] - top);
        sum += part;
    }

    __device__ __forceinline__ void merge(float other_top, float other_sum) {
        const float highest = fmaxf(top, other_top);
        sum = sum * expf(top - highest) + other_sum * expf(other_top - highest);
        top = highest;
    }
};

// The single elements before the 16-byte places of a row of `length`, and how many packs begin there.
template <class T>
struct Cut {
    int head, packs;

    __device__ __forceinline__ Cut(const T* row, int length) {
        const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) & 15) / static_cast<int>(sizeof(T));
        head = min(past ? Pack<T>::size - past : 0, length);
        packs = (length - head) / Pack<T>::size;
    }

    // The single element of a thread, `length` if it has none: there are fewer than two packs of them, one for each of
    // the first threads.
    __device__ __forceinline__ int single(int thread, int length) const {
        return min(thread < head ? thread : thread + packs * Pack<T>::size, length);
    }
};

// Calls f(pack, its number) for each of a row's packs; a thread has `batch` reads under way before it needs the first,
// also in the last round, which is the only one of a short row.
template <int threads, int batch, class T, class F>
__device__ __forceinline__ void each_pack(const Pack<T>* packs, int count, F&& f) {
    int p = threadIdx.x;
    for (; p + (batch - 1) * threads < count; p += batch * threads) {
        Pack<T> parts[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) parts[b] = packs[p + b * threads];
#pragma unroll
        for (int b = 0; b < batch; ++b) f(parts[b], p + b * threads);
    }
    uint4 rest[batch - 1] = {};  // as words, for compilers keep 16-bit elements that may be unread in a register each
#pragma unroll
    for (int b = 0; b < batch - 1; ++b)
        if (p + b * threads < count) rest[b] = reinterpret_cast<const uint4*>(packs)[p + b * threads];
#pragma unroll
    for (int b = 0; b < batch - 1; ++b) {
        if (p + b * threads >= count) break;
        Pack<T> pack;
        memcpy(&pack, &rest[b], sizeof pack);
        f(pack, p + b * threads);
    }
}

// stats [3, rows]: maximum, sum of exponentials relative to it, target logit (NaN if another rank has it). An ignored
// row is not read: 0, 1, NaN.
template <class T, int threads, bool capped>
__global__ void __launch_bounds__(threads)
    cross_entropy_stats_kernel(const T* logits, const int64_t* target, float* stats, int64_t rows, int64_t stride,
                               int64_t start, int length, int64_t ignore_index, float cap) {
    constexpr int kWarps = threads / 32;
    __shared__ float tops[kWarps], sums[kWarps];
    const int64_t r = blockIdx.x;
    const int64_t id = target[r];
    if (id == ignore_index) {  // the same for the whole block
        if (threadIdx.x == 0) stats[r] = 0.f, stats[rows + r] = 1.f, stats[2 * rows + r] = NAN;
        return;
    }
    const T* row = logits + r * stride;
    const int64_t column = id - start;
    // Read at once, so that nobody waits for it in the end.
    const float picked = threadIdx.x == 0 && column >= 0 && column < length ? to_float(row[column]) : NAN;
    const Cut<T> cut(row, length);
    const float inverse_cap = capped ? 1.f / cap : 0.f;
    OnlineSum online;
    auto add_one = [&](int i) {
        const float x[1] = {cap_logit<T, capped>(to_float(row[i]), cap, inverse_cap).value};
        online.template add<T>(x);
    };
    const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(row + cut.head);
    each_pack<threads, 4>(packs, cut.packs, [&](const Pack<T>& pack, int) {
        float x[Pack<T>::size];
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i)
            x[i] = cap_logit<T, capped>(to_float(pack.v[i]), cap, inverse_cap).value;
        online.template add<T>(x);
    });
    const int single = cut.single(threadIdx.x, length);
    if (single < length) add_one(single);

    for (int o = 16; o > 0; o >>= 1)
        online.merge(__shfl_xor_sync(0xffffffffu, online.top, o), __shfl_xor_sync(0xffffffffu, online.sum, o));
    if ((threadIdx.x & 31) == 0) tops[threadIdx.x >> 5] = online.top, sums[threadIdx.x >> 5] = online.sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kWarps; ++w) online.merge(tops[w], sums[w]);
    stats[r] = online.top;
    stats[rows + r] = online.sum;
    stats[2 * rows + r] = cap_logit<T, capped>(picked, cap, inverse_cap).value;
}

// Of every rank's stats [ranks, 3, rows]: losses [rows], and tokens [4, rows]: highest logit, denominator relative to
// it, weight of the softmax in the gradient, gradient at the target. A thread takes a row.
template <int threads>
__global__ void __launch_bounds__(threads)
    cross_entropy_combine_kernel(const float* every, const int64_t* target, float* losses, float* tokens, int64_t ranks,
                                 int64_t rows, int64_t ignore_index, float z_loss) {
    const int64_t r = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (r >= rows) return;
    float loss = 0.f, highest = 0.f, denominator = 1.f, weight = 0.f, at_target = 0.f;
    if (target[r] != ignore_index) {
        const float* stats = every + r;
        highest = stats[0];
        for (int64_t k = 1; k < ranks; ++k) highest = fmaxf(highest, stats[3 * k * rows]);
        denominator = 0.f;
        float picked = NAN;  // and stays so where no rank has the target
        for (int64_t k = 0; k < ranks; ++k) {
            denominator += stats[(3 * k + 1) * rows] * expf(stats[3 * k * rows] - highest);
            const float own = stats[(3 * k + 2) * rows];
            if (!isnan(own)) picked = own;
        }
        const float log_denominator = logf(denominator);
        loss = (highest - picked) + log_denominator;
        // The gradient of loss + z_loss log(Z)^2 is softmax x (1 + 2 z_loss log Z), less one at the target: there
        // without the cancellation of two numbers close to each other.
        const float extra = 2.f * z_loss * (highest + log_denominator);
        weight = isnan(picked) ? NAN : 1.f + extra;
        at_target = expm1f(-loss) + extra * expf(-loss);
    }
    losses[r] = loss;
    tokens[r] = highest, tokens[rows + r] = denominator, tokens[2 * rows + r] = weight, tokens[3 * rows + r] = at_target;
}

// logits = their gradient. An ignored row is not read; columns from `length` to `columns` become 0.
template <class T, int threads, bool capped>
__global__ void __launch_bounds__(threads)
    cross_entropy_gradient_kernel(T* logits, const int64_t* target, const float* tokens, int64_t tokens_stride,
                                  const float* slope, int64_t slope_stride, int columns, int64_t stride, int64_t start,
                                  int length, int64_t ignore_index, float cap) {
    const int64_t r = gridDim.x - 1 - blockIdx.x;  // first the rows that the stats read last: caches may have them
    T* row = logits + r * stride;
    const Cut<T> cut(row, columns);
    const int single = cut.single(threadIdx.x, columns);
    Pack<T>* packs = reinterpret_cast<Pack<T>*>(row + cut.head);
    const int64_t id = target[r];
    const float scale = slope ? slope[r * slope_stride] : 1.f;
    const float highest = tokens[r], factor = tokens[2 * tokens_stride + r] / tokens[tokens_stride + r] * scale;
    const float at_target = tokens[3 * tokens_stride + r] * scale;
    if (id == ignore_index) {
        Pack<T> zero;
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i) zero.v[i] = from_float<T>(0.f);
        for (int p = threadIdx.x; p < cut.packs; p += threads) packs[p] = zero;
        if (single < columns) row[single] = zero.v[0];
        return;
    }
    const int64_t column = id - start;
    const int mine = column >= 0 && column < length ? static_cast<int>(column) : -1;
    const float inverse_cap = capped ? 1.f / cap : 0.f;
    auto gradient = [&](T logit, int i) {
        const Capped c = cap_logit<T, capped>(to_float(logit), cap, inverse_cap);
        float g = i == mine ? at_target : Numerics<T>::exp(c.value - highest) * factor;
        if (capped) g *= c.bend;
        return from_float<T>(i < length ? g : 0.f);
    };
    each_pack<threads, 2>(packs, cut.packs, [&](Pack<T>& pack, int p) {
        const int first = cut.head + p * Pack<T>::size;
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i) pack.v[i] = gradient(pack.v[i], first + i);
        packs[p] = pack;
    });
    if (single < columns) row[single] = gradient(row[single], single);
}

}  // namespace megapt
