// What every kernel shares. Compiled by nvcc for a GPU, and by g++ for the emulator (emu/simt.h), unmodified.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(MEGAPT_EMULATED)
#include "simt.h"  // defines the CUDA language, and megapt::launch
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Memory of a block whose size the launch gives: MEGAPT_DYNAMIC_SHARED(float, rows) declares `float* rows`.
#if !defined(MEGAPT_EMULATED)
#define MEGAPT_DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(16) unsigned char megapt_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(megapt_dynamic_shared)

namespace megapt {

// Launch on a stream; returns a cudaError_t, 0 if the launch was accepted. The error is this launch's own: one that
// somebody else left behind is neither taken for it nor cleared, and this one is not left for the next who asks.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void* stream, A... arguments) {
    if (shared > 48 * 1024) {  // more than every GPU has, which a kernel must ask for
        const cudaError_t refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                         static_cast<int>(shared));
        if (refused != cudaSuccess) {
            cudaGetLastError();
            return static_cast<int>(refused);
        }
    }
    cudaLaunchConfig_t how = {};
    how.gridDim = grid, how.blockDim = block, how.dynamicSmemBytes = shared;
    how.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t code = cudaLaunchKernelEx(&how, kernel, static_cast<P>(arguments)...);
    if (code != cudaSuccess) cudaGetLastError();
    return static_cast<int>(code);
}

}  // namespace megapt
#endif

namespace megapt {

using bf16 = __nv_bfloat16;
using fp16 = __half;

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // as the bindings name them to launchers

// 16 bytes that are read and written as one.
template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half(x); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// Sum over a block of `threads` threads, to all of them. scratch: shared, one float per warp; free again on return.
template <int threads>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.f;
    for (int w = 0; w < threads / 32; ++w) total += scratch[w];
    __syncthreads();
    return total;
}

// V elements that are read and written as one, held as 32-bit words: two elements of 16 bits share a register.
template <class T, int V>
struct alignas(V * sizeof(T)) Packed {
    uint32_t words[V * sizeof(T) / 4];
};
template <class T>
struct Packed<T, 1> {
    T value;
};

// By one access: a Packed that is copied where its words are used can become a load for each word.
template <class T, int V>
__device__ __forceinline__ Packed<T, V> read(const Packed<T, V>* from) {
    if constexpr (sizeof(Packed<T, V>) == 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        return {{words.x, words.y, words.z, words.w}};
    } else {
        return *from;
    }
}

template <class T, int V>
__device__ __forceinline__ void unpack(const Packed<T, V>& from, float (&x)[V]) {
    if constexpr (V == 1) {
        x[0] = to_float(from.value);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const uint32_t word = from.words[i * sizeof(T) / 4];
            if constexpr (std::is_same_v<T, float>) {
                x[i] = __uint_as_float(word);
            } else if constexpr (std::is_same_v<T, bf16>) {
                x[i] = __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
            } else {
                x[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu)));
            }
        }
    }
}

template <class T, int V>
__device__ __forceinline__ Packed<T, V> pack(const float (&x)[V]) {
    Packed<T, V> to;
    if constexpr (V == 1) {
        to.value = from_float<T>(x[0]);
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < V; ++i) to.words[i] = __float_as_uint(x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            if constexpr (std::is_same_v<T, bf16>) {
                const __nv_bfloat162 two = __floats2bfloat162_rn(x[i], x[i + 1]);
                memcpy(&to.words[i / 2], &two, 4);
            } else {
                const __half2 two = __floats2half2_rn(x[i], x[i + 1]);
                memcpy(&to.words[i / 2], &two, 4);
            }
        }
    }
    return to;
}

}  // namespace megapt
