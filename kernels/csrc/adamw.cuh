// AdamW on many flat shards at once, and the sum of the squares of many flat tensors.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace megapt {

// Shards and tensors of one launch: what says where they lie must fit into 4 KB of kernel parameters.
constexpr int kAdamWShards = 48;
constexpr int kNormTensors = 128;

constexpr int kAdamWBlocks = 5;    // that stay on a multiprocessor
constexpr int kAdamWChunk = 4096;  // elements that a block takes at a time
constexpr int kNormChunk = 32768;  // elements of one partial sum, whatever the device: so the sum is the same on all

struct NoWeights {};  // no 16-bit copy is written

struct AdamWShard {
    float* master;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* weights;
    int64_t size, first_chunk;
    float rate, kept;  // learning rate; what weight decay leaves of a master, 1 - rate x decay
    bool aligned;      // all pointers to what a thread reads or writes as one
};

struct AdamWShards {
    AdamWShard shard[kAdamWShards];
    int64_t chunks;
    int count;
};

struct AdamWOptions {
    double log_beta1, log_beta2;
    float take1, beta2, take2, eps;  // take: 1 - beta
    const float *step, *scale, *skip;
};

// What a block keeps for its threads of the scalars on the device.
struct AdamWScalars {
    float correction1, correction2, scale;
};

// Four elements: neighbours if they can be read as one, else `threads` apart, so that a warp's lie side by side.
template <class W, int threads, bool aligned>
__device__ __forceinline__ void adamw_chunk(const AdamWShard& shard, int64_t begin, int count, const AdamWOptions& o,
                                            const AdamWScalars& scalars) {
    constexpr int apart = aligned ? 1 : threads;
    float* master = shard.master + begin;
    const float* grad = shard.grad + begin;
    float* exp_avg = shard.exp_avg + begin;
    float* exp_avg_sq = shard.exp_avg_sq + begin;
    const float size = shard.rate / scalars.correction1;
    for (int base = 0; base < count; base += 4 * threads) {
        const int first = base + threadIdx.x * (aligned ? 4 : 1);
        const bool together = aligned && first + 4 <= count;
        Pack<float> p = {}, g = {}, m = {}, v = {};
        if (together) {
            p = *reinterpret_cast<const Pack<float>*>(master + first);
            g = *reinterpret_cast<const Pack<float>*>(grad + first);
            m = *reinterpret_cast<const Pack<float>*>(exp_avg + first);
            v = *reinterpret_cast<const Pack<float>*>(exp_avg_sq + first);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = first + j * apart;
                if (i >= count) continue;
                p.v[j] = master[i], g.v[j] = grad[i], m.v[j] = exp_avg[i], v.v[j] = exp_avg_sq[i];
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float gradient = g.v[j] / scalars.scale;
            const float change = gradient - m.v[j];
            // The two halves of a lerp: the end nearer by keeps its bits.
            m.v[j] = o.take1 < 0.5f ? fmaf(o.take1, change, m.v[j]) : fmaf(o.take1 - 1.f, change, gradient);
            v.v[j] = fmaf(o.take2 * gradient, gradient, o.beta2 * v.v[j]);
            const float denominator = sqrtf(v.v[j]) / scalars.correction2 + o.eps;
            p.v[j] = shard.kept * p.v[j] - size * m.v[j] / denominator;
        }
        if (together) {
            *reinterpret_cast<Pack<float>*>(master + first) = p;
            *reinterpret_cast<Pack<float>*>(exp_avg + first) = m;
            *reinterpret_cast<Pack<float>*>(exp_avg_sq + first) = v;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = first + j * apart;
                if (i >= count) continue;
                master[i] = p.v[j], exp_avg[i] = m.v[j], exp_avg_sq[i] = v.v[j];
            }
        }
        if constexpr (!std::is_same_v<W, NoWeights>) {
            struct alignas(8) Four {
                W v[4];
            } rounded;
#pragma unroll
            for (int j = 0; j < 4; ++j) rounded.v[j] = from_float<W>(p.v[j]);
            W* weights = static_cast<W*>(shard.weights) + begin;
            if (together) {
                *reinterpret_cast<Four*>(weights + first) = rounded;
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int i = first + j * apart;
                    if (i < count) weights[i] = rounded.v[j];
                }
            }
        }
    }
}

// Blocks stay, each for every gridDim-th chunk: the bias corrections are computed once a block, in fp64, for in fp32
// 1 - 0.999 is wrong in its fifth digit.
template <class W, int threads>
__global__ void __launch_bounds__(threads, kAdamWBlocks) adamw_kernel(const __grid_constant__ AdamWShards shards,
                                                                      const __grid_constant__ AdamWOptions options) {
    if (*options.skip == 1.f) return;
    __shared__ AdamWScalars scalars;
    if (threadIdx.x == 0) {
        const double step = *options.step;
        scalars.correction1 = static_cast<float>(-expm1(step * options.log_beta1));
        scalars.correction2 = static_cast<float>(sqrt(-expm1(step * options.log_beta2)));
        scalars.scale = *options.scale;
    }
    __syncthreads();
    int number = 0;
    for (int64_t chunk = blockIdx.x; chunk < shards.chunks; chunk += gridDim.x) {
        while (number + 1 < shards.count && chunk >= shards.shard[number + 1].first_chunk) ++number;
        const AdamWShard& shard = shards.shard[number];
        const int64_t begin = (chunk - shard.first_chunk) * kAdamWChunk;
        const int64_t left = shard.size - begin;
        const int count = left < kAdamWChunk ? static_cast<int>(left) : kAdamWChunk;
        if (shard.aligned) {
            adamw_chunk<W, threads, true>(shard, begin, count, options, scalars);
        } else {
            adamw_chunk<W, threads, false>(shard, begin, count, options, scalars);
        }
    }
}

struct NormTensors {
    const float* tensor[kNormTensors];
    int64_t size[kNormTensors], first_chunk[kNormTensors];
    int count;
};

// Sum over a block of `threads` threads, to the first: lanes by halves, then warps in order.
template <int threads>
__device__ __forceinline__ double block_sum_fp64(double x) {
    __shared__ double warps[threads / 32];
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    double total = 0.;
    if (threadIdx.x == 0) {
        for (int w = 0; w < threads / 32; ++w) total += warps[w];
    }
    return total;
}

// One partial sum for each block: a square of fp32 is exact in fp64, and neither overflows nor vanishes.
template <int threads>
__global__ void __launch_bounds__(threads) squares_kernel(const __grid_constant__ NormTensors tensors,
                                                          double* partials) {
    const int64_t chunk = blockIdx.x;
    int low = 0, high = tensors.count - 1;  // the last tensor whose first chunk is not beyond this one
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (tensors.first_chunk[middle] <= chunk) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int64_t begin = (chunk - tensors.first_chunk[low]) * kNormChunk;
    const int64_t left = tensors.size[low] - begin;
    const int count = left < kNormChunk ? static_cast<int>(left) : kNormChunk;
    const float* x = tensors.tensor[low] + begin;
    double sums[4] = {};
    const int whole = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? count / 4 * 4 : 0;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < whole; i += 4 * threads) {
        const Pack<float> four = *reinterpret_cast<const Pack<float>*>(x + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const double e = four.v[j];
            sums[j] = fma(e, e, sums[j]);
        }
    }
#pragma unroll 4
    for (int i = whole + threadIdx.x; i < count; i += threads) {
        const double e = x[i];
        sums[0] = fma(e, e, sums[0]);
    }
    const double total = block_sum_fp64<threads>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) partials[chunk] = total;
}

template <int threads>
__global__ void __launch_bounds__(threads) total_kernel(const double* partials, int64_t count, double* out) {
    double sum = 0.;
    for (int64_t i = threadIdx.x; i < count; i += threads) sum += partials[i];
    const double total = block_sum_fp64<threads>(sum);
    if (threadIdx.x == 0) *out = total;
}

}  // namespace megapt
