// Rotary positions: elements i and i + R / 2 of a head are turned by the angle of its token's position.
#pragma once

#include "common.cuh"

namespace megapt {

constexpr int kRopeThreads = 256;
constexpr int kRopeItems = 4;  // of a thread

// x, out: elements [tokens, all_heads, width] with unit stride in the last; the same memory in place.
struct RopeArguments {
    const void* x;
    void* out;
    const float *cos, *sin;  // [rows, half]
    const void* positions;   // of `position_bytes` each; null: token t has row t mod rows
    int64_t tokens, x_token, x_head, out_token, out_head;  // strides in elements
    int rows, half, heads, all_heads, width, position_bytes;
    bool back, in_place;
};

// As many elements as are read and written at a time.
template <class T, int V>
struct alignas(sizeof(T) * V) Few {
    T v[V];
};

template <class T, int V>
__device__ __forceinline__ void rope_turn(const T* x, T* out, const RopeArguments& a, int row, int i) {
    using Elements = Few<T, V>;
    using Angles = Few<float, V * sizeof(float) < 16 ? V : 4>;
    constexpr int parts = sizeof(Few<float, V>) / sizeof(Angles), part = V / parts;
    const Elements left = *reinterpret_cast<const Elements*>(x + i);
    const Elements right = *reinterpret_cast<const Elements*>(x + i + a.half);
    Elements new_left, new_right;
    const bool inside = row >= 0 && row < a.rows;
    const int64_t at = inside ? static_cast<int64_t>(row) * a.half + i : i;
#pragma unroll
    for (int k = 0; k < parts; ++k) {
        const Angles cosines = *reinterpret_cast<const Angles*>(a.cos + at + k * part);
        const Angles sines = *reinterpret_cast<const Angles*>(a.sin + at + k * part);
#pragma unroll
        for (int j = 0; j < part; ++j) {
            // Nobody waits for the device to say that a position is wrong: its results say so.
            const float c = inside ? cosines.v[j] : NAN;
            const float s = a.back ? -sines.v[j] : sines.v[j];
            const float l = to_float(left.v[k * part + j]), r = to_float(right.v[k * part + j]);
            new_left.v[k * part + j] = from_float<T>(l * c - r * s);
            new_right.v[k * part + j] = from_float<T>(r * c + l * s);
        }
    }
    *reinterpret_cast<Elements*>(out + i) = new_left;
    *reinterpret_cast<Elements*>(out + i + a.half) = new_right;
}

__device__ __forceinline__ int rope_row(const RopeArguments& a, int64_t token) {
    if (a.position_bytes == 4) return static_cast<const int*>(a.positions)[token];
    if (a.position_bytes == 0) {  // 64-bit divisions take several times as long
        return static_cast<int>(a.tokens <= UINT32_MAX ? static_cast<unsigned>(token) % static_cast<unsigned>(a.rows)
                                                       : token % a.rows);
    }
    const int64_t row = static_cast<const int64_t*>(a.positions)[token];
    return row >= 0 && row < a.rows ? static_cast<int>(row) : -1;
}

// An item is V pairs of a token's head that turns, or, out of place, V elements that stay: beyond the angles in heads
// that turn, and whole other heads.
template <class T, int V>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const __grid_constant__ RopeArguments a) {
    const int pairs = a.half / V, turned = a.heads * pairs, beyond = (a.width - 2 * a.half) / V;
    const int stay = a.in_place ? 0 : a.heads * beyond + (a.all_heads - a.heads) * (a.width / V);
    const int items = turned + stay;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kRopeThreads * kRopeItems);
    const int64_t first_token = begin / items;
    const unsigned first_item = static_cast<unsigned>(begin - first_token * items);
    for (int k = 0; k < kRopeItems; ++k) {
        const unsigned ahead = first_item + threadIdx.x + k * kRopeThreads, tokens = ahead / items;
        const int64_t token = first_token + tokens;
        if (token >= a.tokens) return;
        int item = static_cast<int>(ahead - tokens * items);
        const T* x = static_cast<const T*>(a.x) + token * a.x_token;
        T* out = static_cast<T*>(a.out) + token * a.out_token;
        if (item < turned) {
            const int head = item / pairs;
            rope_turn<T, V>(x + head * a.x_head, out + head * a.out_head, a, rope_row(a, token),
                            (item - head * pairs) * V);
            continue;
        }
        item -= turned;
        int head, at;
        if (item < a.heads * beyond) {
            head = item / beyond, at = 2 * a.half + (item - head * beyond) * V;
        } else {
            item -= a.heads * beyond;
            const int whole = a.width / V;
            head = item / whole, at = (item - head * whole) * V, head += a.heads;
        }
        *reinterpret_cast<Few<T, V>*>(out + head * a.out_head + at) =
            *reinterpret_cast<const Few<T, V>*>(x + head * a.x_head + at);
    }
}

}  // namespace megapt
