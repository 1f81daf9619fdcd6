// The CUDA language for g++: an unmodified __global__ function runs on the CPU, a fiber for every thread.
//
// Included by csrc/common.cuh where MEGAPT_EMULATED is defined. docs/kernels-emulator.md tells what is caught, what is
// not. g++ or clang, C++17, Linux; flags: -fno-strict-aliasing -fno-gnu-unique (two libraries hold the same kernels).
#pragma once

#include <math.h>  // isnan and its like without std::, as kernels write them
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The CUDA headers' own definitions are for a host that never runs device code.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __managed__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // simt_memory.h says why
#define __constant__ static
#define __managed__
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

#include "simt_launch.h"
#include "simt_checks.h"

#define threadIdx megapt::emulator::thread_index
#define blockIdx megapt::emulator::block_index
#define blockDim megapt::emulator::block_size
#define gridDim megapt::emulator::grid_size
#define MEGAPT_DYNAMIC_SHARED(type, name) \
    type* name = reinterpret_cast<type*>(megapt::emulator::machine().dynamic_shared())

constexpr int warpSize = 32;

#include "simt_warp.h"
#include "simt_intrinsics.h"
