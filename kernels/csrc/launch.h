// What launchers (NAME.cu) share. Compiled by nvcc, and by g++ for the emulator.
#pragma once

#include "common.cuh"

namespace megapt {

// Multiprocessors of the current device, for the grids of kernels whose blocks stay until the work is done.
inline int multiprocessors() {
#if defined(MEGAPT_EMULATED)
    return 4;
#else
    static int counts[64] = {};  // by device; two threads at once would write the same number
    int device = 0, count = 0;
    if (cudaGetDevice(&device) == cudaSuccess && device < 64 && counts[device] > 0) return counts[device];
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        cudaGetLastError();  // the launch that follows will say what is wrong
        return 1;
    }
    if (device < 64) counts[device] = count;
    return count;
#endif
}

// What a launcher returns for a dtype that it has no kernel for (cudaErrorInvalidValue).
constexpr int kNoSuchDType = 1;

template <class T>
struct Type {
    using type = T;
};

// Calls f(Type<float>{}), f(Type<bf16>{}) or f(Type<fp16>{}) for a DType, and returns what it returns:
//   return dispatch(dtype, [&](auto type) { using T = typename decltype(type)::type; return launch(kernel<T>, ...); });
template <class F>
int dispatch(int dtype, F&& f) {
    switch (dtype) {
        case kFloat32: return f(Type<float>{});
        case kBFloat16: return f(Type<bf16>{});
        case kFloat16: return f(Type<fp16>{});
        default: return kNoSuchDType;
    }
}

}  // namespace megapt
