// Rows to experts and back. A counting sort by expert that keeps the order of slots (a slot is a token and which of its
// experts): counts per tile of slots, sums of these over tiles before, then every slot finds its place. Warps go
// through their slots in order, so that nothing depends on which thread comes first.
#pragma once

#include "common.cuh"

namespace megapt {

// Where a slot's row lies: its number, or that it has none.
constexpr int kDropped = -1;  // the expert was -1
constexpr int kInvalid = -2;  // there is no such expert; in `order`, -2 - slot

template <class Id>
__device__ __forceinline__ int moe_bin(Id expert, int experts) {
    return expert >= 0 && expert < experts ? static_cast<int>(expert) : experts;  // the last: slots without a row
}

constexpr int kMoeAhead = 8;  // rounds of a warp whose experts are read before the first is needed

// Calls f(slot, its expert) for the slots of a tile, a lane for each, and for those up to a multiple of 32.
template <class Id, class F>
__device__ __forceinline__ void moe_each_slot(const Id* expert_of, int begin, int end, F&& f) {
    for (int base = begin; base < end; base += 32 * kMoeAhead) {
        Id experts[kMoeAhead];
#pragma unroll
        for (int k = 0; k < kMoeAhead; ++k) {
            const int slot = base + 32 * k + threadIdx.x;
            experts[k] = slot < end ? expert_of[slot] : -1;
        }
#pragma unroll
        for (int k = 0; k < kMoeAhead; ++k) {
            if (base + 32 * k < end) f(base + 32 * k + static_cast<int>(threadIdx.x), experts[k]);
        }
    }
}

// A warp for each tile. counts: [experts + 1, tiles].
template <class Id>
__global__ void __launch_bounds__(32) moe_count(const Id* expert_of, int slots, int experts, int tile, int* counts) {
    MEGAPT_DYNAMIC_SHARED(int, found);
    for (int bin = threadIdx.x; bin <= experts; bin += 32) found[bin] = 0;
    __syncwarp();
    const int begin = blockIdx.x * tile, end = min(begin + tile, slots);
    moe_each_slot(expert_of, begin, end, [&](int slot, Id expert) {
        const int bin = slot < end ? moe_bin(expert, experts) : -1;
        const unsigned alike = __match_any_sync(0xffffffffu, bin);
        if (bin >= 0 && __ffs(alike) - 1 == static_cast<int>(threadIdx.x)) found[bin] += __popc(alike);
        __syncwarp();
    });
    for (int bin = threadIdx.x; bin <= experts; bin += 32) {
        counts[static_cast<int64_t>(bin) * gridDim.x + blockIdx.x] = found[bin];
    }
}

// Sum over the lanes up to this one.
__device__ __forceinline__ int warp_running_sum(int x) {
    for (int o = 1; o < 32; o *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, x, o);
        if (static_cast<int>(threadIdx.x) >= o) x += before;
    }
    return x;
}

// A warp for each bin: its counts become the sums of those of the tiles before. totals: [experts + 1].
static __global__ void __launch_bounds__(32) moe_scan(int* counts, int tiles, int* totals, int64_t* expert_rows,
                                                      int experts) {
    int* mine = counts + static_cast<int64_t>(blockIdx.x) * tiles;
    int before = 0;
    for (int base = 0; base < tiles; base += 32) {
        const int tile = base + threadIdx.x;
        const int count = tile < tiles ? mine[tile] : 0;
        const int running = warp_running_sum(count);
        if (tile < tiles) mine[tile] = before + running - count;
        before += __shfl_sync(0xffffffffu, running, 31);
    }
    if (threadIdx.x != 0) return;
    totals[blockIdx.x] = before;
    if (static_cast<int>(blockIdx.x) < experts) expert_rows[blockIdx.x] = before;
}

// A warp for each tile. order: slot of each row. place: row of each slot.
template <class Id>
__global__ void __launch_bounds__(32) moe_place(const Id* expert_of, int slots, int experts, int tile,
                                                const int* before, const int* totals, int64_t* order, int* place) {
    MEGAPT_DYNAMIC_SHARED(int, next);  // the row of each bin's next slot
    int rows = 0;
    for (int base = 0; base <= experts; base += 32) {
        const int bin = base + threadIdx.x;
        const int total = bin <= experts ? totals[bin] : 0;
        const int running = warp_running_sum(total);
        if (bin <= experts) {
            next[bin] = rows + running - total + before[static_cast<int64_t>(bin) * gridDim.x + blockIdx.x];
        }
        rows += __shfl_sync(0xffffffffu, running, 31);
    }
    __syncwarp();
    const int begin = blockIdx.x * tile, end = min(begin + tile, slots);
    moe_each_slot(expert_of, begin, end, [&](int slot, Id expert) {
        const int bin = slot < end ? moe_bin(expert, experts) : -1;
        const unsigned alike = __match_any_sync(0xffffffffu, bin);
        const int rank = __popc(alike & ((1u << threadIdx.x) - 1));
        const int row = bin >= 0 ? next[bin] + rank : 0;
        __syncwarp();
        if (bin >= 0) {
            if (rank == 0) next[bin] += __popc(alike);
            const bool dropped = bin == experts, meant = expert == -1;
            order[row] = !dropped ? slot : meant ? kDropped : kInvalid - static_cast<int64_t>(slot);
            place[slot] = !dropped ? row : meant ? kDropped : kInvalid;
        }
        __syncwarp();
    });
}

// The inverse of `order`, for slots that have a row; the others were set to kDropped before.
static __global__ void moe_invert(const int64_t* order, int slots, int* place) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= slots) return;
    const int64_t slot = order[row];
    if (slot >= 0 && slot < slots) place[slot] = row;
    if (slot <= kInvalid && kInvalid - slot < slots) place[kInvalid - slot] = kInvalid;
}

// Rows of `vectors` x V elements; `lanes` threads of a block (a power of two) for each token.
struct MoeRows {
    int64_t tokens, vectors;
    int choices, shift;  // lanes = 1 << shift
};

__device__ __forceinline__ int64_t moe_token(const MoeRows& r) {
    return ((static_cast<int64_t>(blockIdx.x) * blockDim.x) >> r.shift) + (threadIdx.x >> r.shift);
}

// Rows without a slot come last: zero, or NaN if their expert was none.
template <class T, int V>
__device__ __forceinline__ void moe_fill(T* rows, const int64_t* order, const MoeRows& r, int64_t token) {
    const int64_t groups = (static_cast<int64_t>(gridDim.x) * blockDim.x) >> r.shift;
    for (int64_t row = r.tokens * r.choices - 1 - token; row >= 0 && order[row] < 0; row -= groups) {
        const T fill = from_float<T>(order[row] == kDropped ? 0.f : NAN);
        for (int64_t i = threadIdx.x & ((1 << r.shift) - 1); i < r.vectors; i += int64_t{1} << r.shift) {
            for (int j = 0; j < V; ++j) rows[(row * r.vectors + i) * V + j] = fill;
        }
    }
}

template <class T, int V>
struct alignas(sizeof(T) * V) MoeElements {
    T v[V];
};

// x: [tokens, H]. Each is read once and written once for each of its experts.
template <class T, int V>
__global__ void __launch_bounds__(256) moe_spread(const T* x, const int* place, const int64_t* order, T* rows,
                                                  MoeRows r) {
    using Elements = MoeElements<T, V>;
    const int64_t token = moe_token(r);
    if (token < r.tokens) {
        const Elements* from = reinterpret_cast<const Elements*>(x) + token * r.vectors;
        const int* places = place + token * r.choices;
        for (int64_t i = threadIdx.x & ((1 << r.shift) - 1); i < r.vectors; i += int64_t{1} << r.shift) {
            const Elements elements = from[i];
            for (int j = 0; j < r.choices; ++j) {
                const int row = places[j];
                if (row >= 0) reinterpret_cast<Elements*>(rows)[row * r.vectors + i] = elements;
            }
        }
    }
    moe_fill<T, V>(rows, order, r, token);
}

// out: [tokens, H], each the sum of its rows times weights [tokens, choices], or of its rows where these are null.
template <class T, int V>
__global__ void __launch_bounds__(256) moe_gather(const T* rows, const int* place, const float* weights, T* out,
                                                  MoeRows r) {
    using Elements = MoeElements<T, V>;
    const int64_t token = moe_token(r);
    if (token >= r.tokens) return;
    const int* places = place + token * r.choices;
    for (int64_t i = threadIdx.x & ((1 << r.shift) - 1); i < r.vectors; i += int64_t{1} << r.shift) {
        float sums[V] = {};
        for (int j = 0; j < r.choices; ++j) {
            const int row = places[j];
            if (row == kDropped) continue;
            const float weight = row == kInvalid ? NAN : weights ? weights[token * r.choices + j] : 1.f;
            const Elements e = row >= 0 ? reinterpret_cast<const Elements*>(rows)[row * r.vectors + i] : Elements{};
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v] = fmaf(weight, to_float(e.v[v]), sums[v]);
        }
        Elements sum;
#pragma unroll
        for (int v = 0; v < V; ++v) sum.v[v] = from_float<T>(sums[v]);
        reinterpret_cast<Elements*>(out)[token * r.vectors + i] = sum;
    }
}

// A warp for each token: gradients of its rows, and of its weights, the products of its gradient and its rows.
template <class T, int V>
__global__ void __launch_bounds__(256) moe_gather_backward(const T* dy, const T* rows, const int64_t* order,
                                                           const int* place, const float* weights, T* drows,
                                                           float* dweights, MoeRows r) {
    using Elements = MoeElements<T, V>;
    const int64_t token = moe_token(r);
    if (token < r.tokens) {
        const Elements* slope = reinterpret_cast<const Elements*>(dy) + token * r.vectors;
        for (int j = 0; j < r.choices; ++j) {
            const int row = place[token * r.choices + j];
            float product = row == kInvalid ? NAN : 0.f;
            if (row >= 0) {
                const float weight = weights[token * r.choices + j];
                for (int64_t i = threadIdx.x & 31; i < r.vectors; i += 32) {
                    const Elements d = slope[i];
                    const Elements e = reinterpret_cast<const Elements*>(rows)[row * r.vectors + i];
                    Elements made;
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        made.v[v] = from_float<T>(weight * to_float(d.v[v]));
                        product = fmaf(to_float(d.v[v]), to_float(e.v[v]), product);
                    }
                    reinterpret_cast<Elements*>(drows)[row * r.vectors + i] = made;
                }
            }
            product = warp_sum(product);
            if ((threadIdx.x & 31) == 0) dweights[token * r.choices + j] = product;
        }
    }
    moe_fill<T, V>(drows, order, r, token);
}

}  // namespace megapt
