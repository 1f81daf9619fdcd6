// Gated activations: activation(gate) x up of rows [gate, up], and their gradients with the activation computed again.
#pragma once

#include "common.cuh"

namespace megapt {

enum Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

constexpr int kGluThreads = 256;

// Where a thread works: the vectors of a row are cut into chunks of 2^shift threads, the threads of a block go to rows.
struct GluTiles {
    int64_t rows, vectors;
    unsigned chunks;
    int shift;

    __device__ __forceinline__ bool mine(int64_t& row, int64_t& vector) const {
        const unsigned line = blockIdx.x / chunks, chunk = blockIdx.x - line * chunks;
        row = static_cast<int64_t>(line) * (kGluThreads >> shift) + (threadIdx.x >> shift);
        vector = (static_cast<int64_t>(chunk) << shift) + (threadIdx.x & ((1 << shift) - 1));
        return row < rows && vector < vectors;
    }
};

// The activation and its derivative. Written by logistic and erfc functions, which lose nothing for negative gates.
template <int activation>
__device__ __forceinline__ float activated(float g, float& slope) {
    if constexpr (activation == kGelu) {
        const float p = 0.5f * erfcf(g * -0.707106781f);
        slope = p + g * (0.398942280f * expf(-0.5f * g * g));
        return g * p;
    } else {
        // y = g / (1 + exp(-u)): 0.5 (1 + tanh(u / 2)) is the logistic function of u.
        float u = g, u_slope = 1.f;
        if constexpr (activation == kGeluTanh) {
            constexpr float k = 1.595769122f, cubic = 0.044715f;  // sqrt(8 / pi)
            u = k * (g + cubic * g * g * g);
            u_slope = k * (1.f + 3.f * cubic * g * g);
        }
        const float e = expf(-u), p = __fdividef(1.f, 1.f + e), y = __fdividef(g, 1.f + e);
        const float rest = e < 1.f ? e * p : 1.f - p;  // 1 - p, with all its digits
        slope = p + y * rest * u_slope;
        return y;
    }
}

// stride: elements from a row of xy to the next; `vectors` of V elements are gate, as many up. y is contiguous.
template <class T, int V, int activation>
__global__ void __launch_bounds__(kGluThreads) glu_rows(const T* xy, int64_t stride, T* y, GluTiles tiles) {
    using Part = Packed<T, V>;
    int64_t row, i;
    if (!tiles.mine(row, i)) return;
    const Part* in = reinterpret_cast<const Part*>(xy + row * stride);
    float gate[V], up[V];
    unpack(read(in + i), gate);
    unpack(read(in + tiles.vectors + i), up);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        float slope;
        up[k] *= activated<activation>(gate[k], slope);
    }
    reinterpret_cast<Part*>(y)[row * tiles.vectors + i] = pack<T>(up);
}

// dxy is contiguous.
template <class T, int V, int activation>
__global__ void __launch_bounds__(kGluThreads)
    glu_rows_backward(const T* dy, int64_t dy_stride, const T* xy, int64_t stride, T* dxy, GluTiles tiles) {
    using Part = Packed<T, V>;
    int64_t row, i;
    if (!tiles.mine(row, i)) return;
    const Part* in = reinterpret_cast<const Part*>(xy + row * stride);
    float gate[V], up[V], d[V];
    unpack(read(in + i), gate);
    unpack(read(in + tiles.vectors + i), up);
    unpack(read(reinterpret_cast<const Part*>(dy + row * dy_stride) + i), d);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        float slope;
        const float y = activated<activation>(gate[k], slope);
        gate[k] = d[k] * up[k] * slope;
        up[k] = d[k] * y;
    }
    Part* out = reinterpret_cast<Part*>(dxy) + row * 2 * tiles.vectors;
    out[i] = pack<T>(gate);
    out[tiles.vectors + i] = pack<T>(up);
}

}  // namespace megapt
