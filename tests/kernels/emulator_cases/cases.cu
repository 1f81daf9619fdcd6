// Small kernels that the emulator must run as a GPU does, and twins of some with a bug that it must show.
#include "common.cuh"

namespace megapt {

// Sum of each row of x [rows, n] by a tree in shared memory. Planted: no barrier between the levels of the tree.
template <bool planted>
__global__ void tree_sum(const float* x, float* y, int64_t n) {
    __shared__ float tile[256];
    float sum = 0.f;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    tile[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (static_cast<int>(threadIdx.x) < half) tile[threadIdx.x] += tile[threadIdx.x + half];
        if (!planted) __syncthreads();
    }
    if (threadIdx.x == 0) y[blockIdx.x] = tile[0];
}

// Two sums through one scratch array. Planted: the second is written while the first may still be read.
template <bool planted>
__global__ void two_sums(const float* x, float* y) {
    __shared__ float scratch[8];
    for (int pass = 0; pass < 2; ++pass) {
        const float sum = warp_sum(x[pass * 256 + threadIdx.x]);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = sum;
        __syncthreads();
        float total = 0.f;
        for (int warp = 0; warp < 8; ++warp) total += scratch[warp];
        if (!planted) __syncthreads();
        y[pass * 256 + threadIdx.x] = total;
    }
}

// y[i] = x[n - 1 - i] in one block. Planted: only one and a half warps come to the first barrier.
template <bool planted>
__global__ void reverse(const float* x, float* y, int64_t n) {
    MEGAPT_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = x[threadIdx.x];
    if (!planted || threadIdx.x < 48) __syncthreads();
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
    __syncthreads();
}

// y = 2 x. Planted: one element too many.
template <bool planted>
__global__ void twice(const float* x, float* y, int64_t n) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n + planted; i += stride)
        y[i] = 2.f * x[i];
}

// Adds 1 to the first 64 elements of each row of y [rows, n]. Planted: offsets computed in, or cut to, 32 bits.
template <class Index, class Cut>
__global__ void first_of_rows(int8_t* y, int64_t n) {
    const Index row = static_cast<Index>(blockIdx.x) * static_cast<Index>(n);
    y[static_cast<Cut>(row + static_cast<Index>(threadIdx.x))] += 1;
}

// Sums of neighbours. Planted: the last element of the tile is read and was never written.
template <bool planted>
__global__ void neighbours(const float* x, float* y) {
    __shared__ float tile[257];
    tile[threadIdx.x] = x[threadIdx.x];
    if (!planted && threadIdx.x == 0) tile[256] = 0.f;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x] + tile[threadIdx.x + 1];
}

// The lower half of the warp sums its values. Planted: with a mask that names the whole warp.
template <bool planted>
__global__ void half_warp(const float* x, float* y) {
    float v = x[threadIdx.x];
    if (threadIdx.x < 16) {
        for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(planted ? 0xffffffffu : 0xffffu, v, o);
    } else {
        __syncwarp(0xffff0000u);
    }
    __syncwarp();
    y[threadIdx.x] = v;
}

// Each lane reads the next one's value through shared memory. Planted: without waiting for the warp.
template <bool planted>
__global__ void next_lane(const float* x, float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    if (!planted) __syncwarp();
    y[threadIdx.x] = tile[(threadIdx.x + 1) & 31];
}

// Every thread of every block adds 1. Planted: by a plain read and write, which no order of whole threads betrays.
template <bool planted>
__global__ void count(int* y) {
    if (planted)
        *y += 1;
    else
        atomicAdd(y, 1);
}

// Each block writes its number and reads its left neighbour's, which nothing lets it wait for. Planted: it does.
template <bool planted>
__global__ void neighbour_blocks(int* written, int* y) {
    written[blockIdx.x] = static_cast<int>(blockIdx.x);
    if (planted && blockIdx.x > 0) y[blockIdx.x] = written[blockIdx.x - 1];
}

// y [columns, rows] = x [rows, columns] turned, blocks of 32 x 8 threads.
__global__ void transpose(const float* x, float* y, int rows, int columns) {
    __shared__ float tile[32][33];
    const int column = blockIdx.x * 32 + threadIdx.x;
    for (int r = threadIdx.y; r < 32; r += blockDim.y) {
        const int row = blockIdx.y * 32 + r;
        if (row < rows && column < columns) tile[r][threadIdx.x] = x[row * columns + column];
    }
    __syncthreads();
    const int row = blockIdx.y * 32 + threadIdx.x;
    for (int c = threadIdx.y; c < 32; c += blockDim.y) {
        const int out = blockIdx.x * 32 + c;
        if (row < rows && out < columns) y[out * rows + row] = tile[threadIdx.x][c];
    }
}

__global__ void warp_scan(const int* x, int* y) {
    int v = x[threadIdx.x];
    for (unsigned o = 1; o < 32; o <<= 1) {
        const int below = __shfl_up_sync(0xffffffffu, v, o);
        if ((threadIdx.x & 31) >= o) v += below;
    }
    y[threadIdx.x] = v;
}

__global__ void histogram(const int* x, unsigned* counts, int64_t n) {
    __shared__ unsigned local[16];
    if (threadIdx.x < 16) local[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&local[x[i]], 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

// The block that comes last adds up what all have written; threads beyond n leave early.
__global__ void last_block(const float* x, float* partial, unsigned* ticket, float* y, int64_t n) {
    __shared__ float scratch[2];
    __shared__ bool last;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const float sum = block_sum<64>(i < n ? x[i] : 0.f, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    float total = 0.f;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) total += __ldcg(partial + b);
    total = block_sum<64>(total, scratch);
    if (threadIdx.x == 0) *y = total;
}

// Votes, matches and reductions of one warp and a half; a row of 12 results for each thread.
__global__ void votes(const int* x, int* y) {
    const int v = x[threadIdx.x], lane = threadIdx.x & 31;
    const unsigned all = threadIdx.x < 32 ? 0xffffffffu : 0xffffu;
    int* row = y + threadIdx.x * 12;
    int equal = -1;
    row[0] = static_cast<int>(__ballot_sync(all, v & 1));
    row[1] = __any_sync(all, v == 3);
    row[2] = __all_sync(all, v < 100);
    row[3] = static_cast<int>(__match_any_sync(all, v));
    row[4] = static_cast<int>(__match_all_sync(all, v, &equal));
    row[5] = equal;
    row[6] = __reduce_add_sync(all, v);
    row[7] = __reduce_min_sync(all, v - 5);
    row[8] = __shfl_sync(all, v, 3, 8);
    row[9] = __shfl_down_sync(all, v, 2, 8);
    row[10] = static_cast<int>(__shfl_xor_sync(all, static_cast<double>(v), 4));
    row[11] = __syncthreads_count(lane < 4) + 100 * __syncthreads_and(v < 100) + 1000 * __syncthreads_or(v == 3);
}

// Every thread of a 3-D grid of 3-D blocks counts itself.
__global__ void everywhere(int* y) {
    const dim3 size(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y * blockDim.y + threadIdx.y;
    const unsigned k = blockIdx.z * blockDim.z + threadIdx.z;
    y[(k * size.y + j) * size.x + i] += 1;
}

__global__ void halves(const fp16* x, __half2* sum, bf16* y) {
    atomicAdd(sum, __halves2half2(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]));
    const fp16 next = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
    y[threadIdx.x] = from_float<bf16>(to_float(next));
}

__device__ __noinline__ float large_array(int i) {
    volatile float array[192 * 1024];  // more than the 512 KiB that a thread has on any GPU
    array[i] = 1.f;
    return array[i];
}

// What goes wrong beyond the planted bugs, by number.
__global__ void faults(float* y, int which) {
    MEGAPT_DYNAMIC_SHARED(float, tile);
    if (which == 0) tile[4 * blockDim.x] = 1.f;
    if (which == 1 && threadIdx.x < 16) __syncthreads();
    if (which == 1) __syncwarp();
    if (which == 2) __shfl_sync(0xfffffffeu, 1, 1);
    if (which == 3) __shfl_sync(0xffffffffu, 1, 1, 24);
    if (which == 4) y[-1] = 1.f;
    if (which == 6) *reinterpret_cast<float4*>(y + 1) = make_float4(1.f, 1.f, 1.f, 1.f);
    if (which == 7) y[0] = static_cast<float>(which * 400000000);
    __shared__ float fixed[64];
    fixed[threadIdx.x] = 1.f;
    if (which == 8 && threadIdx.x == 63) y[0] = fixed[threadIdx.x + 1];
    if (which == 5) y[0] = large_array(which);
}

// Thread 0 waits for what the last one writes.
__global__ void wait_for_last(int* y) {
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) atomicExch(&flag, 7);
    if (threadIdx.x == 0) {
        while (atomicAdd(&flag, 0) == 0) __nanosleep(20);
        *y = atomicAdd(&flag, 0);
    }
}

}  // namespace megapt

using megapt::launch;

extern "C" {

int tree_sum(const float* x, float* y, int64_t rows, int64_t n, int planted) {
    const auto kernel = planted ? megapt::tree_sum<true> : megapt::tree_sum<false>;
    return launch(kernel, dim3(rows), dim3(256), 0, nullptr, x, y, n);
}
int two_sums(const float* x, float* y, int planted) {
    return launch(planted ? megapt::two_sums<true> : megapt::two_sums<false>, dim3(1), dim3(256), 0, nullptr, x, y);
}
int reverse(const float* x, float* y, int64_t n, int planted) {
    return launch(planted ? megapt::reverse<true> : megapt::reverse<false>, dim3(1), dim3(n), n * 4, nullptr, x, y, n);
}
int twice(const float* x, float* y, int64_t n, int planted) {
    return launch(planted ? megapt::twice<true> : megapt::twice<false>, dim3(3), dim3(64), 0, nullptr, x, y, n);
}
int first_of_rows(int8_t* y, int64_t rows, int64_t n, int planted) {
    const auto kernel = planted == 0   ? megapt::first_of_rows<int64_t, int64_t>
                        : planted == 1 ? megapt::first_of_rows<int32_t, int32_t>
                                       : megapt::first_of_rows<int64_t, int32_t>;
    return launch(kernel, dim3(rows), dim3(64), 0, nullptr, y, n);
}
int neighbours(const float* x, float* y, int planted) {
    return launch(planted ? megapt::neighbours<true> : megapt::neighbours<false>, dim3(1), dim3(256), 0, nullptr, x, y);
}
int half_warp(const float* x, float* y, int planted) {
    return launch(planted ? megapt::half_warp<true> : megapt::half_warp<false>, dim3(1), dim3(32), 0, nullptr, x, y);
}
int next_lane(const float* x, float* y, int planted) {
    return launch(planted ? megapt::next_lane<true> : megapt::next_lane<false>, dim3(1), dim3(32), 0, nullptr, x, y);
}
int count(int* y, int planted) {
    return launch(planted ? megapt::count<true> : megapt::count<false>, dim3(1), dim3(64), 0, nullptr, y);
}
int neighbour_blocks(int* written, int* y, int planted) {
    const auto kernel = planted ? megapt::neighbour_blocks<true> : megapt::neighbour_blocks<false>;
    return launch(kernel, dim3(4), dim3(1), 0, nullptr, written, y);
}
int transpose(const float* x, float* y, int rows, int columns) {
    const dim3 grid((columns + 31) / 32, (rows + 31) / 32);
    return launch(megapt::transpose, grid, dim3(32, 8), 0, nullptr, x, y, rows, columns);
}
int warp_scan(const int* x, int* y, int64_t n) {
    return launch(megapt::warp_scan, dim3(1), dim3(n), 0, nullptr, x, y);
}
int histogram(const int* x, unsigned* counts, int64_t n) {
    return launch(megapt::histogram, dim3(5), dim3(96), 0, nullptr, x, counts, n);
}
int last_block(const float* x, float* partial, unsigned* ticket, float* y, int64_t n) {
    return launch(megapt::last_block, dim3((n + 63) / 64), dim3(64), 0, nullptr, x, partial, ticket, y, n);
}
int votes(const int* x, int* y) { return launch(megapt::votes, dim3(1), dim3(48), 0, nullptr, x, y); }
int everywhere(int* y) { return launch(megapt::everywhere, dim3(3, 2, 4), dim3(4, 3, 2), 0, nullptr, y); }
int halves(const void* x, void* sum, void* y) {
    return launch(megapt::halves, dim3(1), dim3(32), 0, nullptr, static_cast<const megapt::fp16*>(x),
                  static_cast<__half2*>(sum), static_cast<megapt::bf16*>(y));
}
int faults(float* y, int which) {
    if (which == 9) which = 1 << (which + 23);
    return launch(megapt::faults, dim3(1), dim3(64), 1024, nullptr, y, which);
}
int wait_for_last(int* y) { return launch(megapt::wait_for_last, dim3(1), dim3(64), 0, nullptr, y); }
int limits(int64_t grid_x, int64_t grid_y, int64_t block_x, int64_t block_z, int64_t shared) {
    return launch(megapt::wait_for_last, dim3(grid_x, grid_y), dim3(block_x, 1, block_z), shared, nullptr,
                  static_cast<int*>(nullptr));
}
}
