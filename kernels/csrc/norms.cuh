// RMSNorm and LayerNorm of rows, alone or of a sum with a residual, and their gradients.
//
// A row belongs to a group of threads: a part of a warp, or a whole block. Up to 2 or 3 vectors of 16 bytes a thread it
// stays in registers, so that memory is read once and written once. Wider rows, and rows that vectors cannot read, are
// read again for the second pass, by then mostly from the caches.
#pragma once

#include "common.cuh"

namespace megapt {

// Rows begin `*_stride` elements apart. weight, bias: fp32 if `wide`, else of the rows' type. residual, sum, and with
// RMSNorm bias and mean, may be null.
struct NormArguments {
    const void *x, *residual, *weight, *bias;
    void *y, *sum;
    float *mean, *rstd;
    int64_t rows, width, x_stride, residual_stride;
    float eps, offset;
    bool wide;
};

// partial: what each block sums of the weight's gradient, [blocks, width], and behind it of the bias's with LayerNorm.
// ds, the gradient of the sum for itself, may be null.
struct NormGradArguments {
    const void *dy, *ds, *s, *weight;
    const float *mean, *rstd;
    void* dx;
    float* partial;
    int64_t rows, width, dy_stride, ds_stride, s_stride;
    float offset;
    bool wide;
};

constexpr int kNormThreads = 256;  // of a block for rows that are not kept
template <int group>
constexpr int kGroupThreads = group < 128 ? 128 : group;  // of a block

// Blocks of a backward that stay on a multiprocessor: with the next row on its way, 512 threads have enough in flight.
template <int threads>
constexpr int kResident = threads < 512 ? 512 / threads : 1;

// What a thread has of a row: `each` vectors.
template <class T, int V, int each>
struct Row {
    Packed<T, V> part[each];
};

template <class T, int V>
__device__ __forceinline__ Packed<T, V> load(const void* from, int64_t vector) {
    return read(static_cast<const Packed<T, V>*>(from) + vector);
}

template <class T, int V>
__device__ __forceinline__ void load(const void* from, int64_t vector, float (&x)[V]) {
    unpack(load<T, V>(from, vector), x);
}

template <class T, int V>
__device__ __forceinline__ void store(void* to, int64_t vector, const float (&x)[V]) {
    static_cast<Packed<T, V>*>(to)[vector] = pack<T>(x);
}

// V elements of weight or bias.
template <class T, int V>
__device__ __forceinline__ void load_weight(const void* from, int64_t vector, bool wide, float (&w)[V]) {
    if (!wide) return load<T>(from, vector, w);
    constexpr int four = V < 4 ? V : 4;  // 16 bytes
#pragma unroll
    for (int i = 0; i < V / four; ++i) {
        float part[four];
        load<float>(from, vector * (V / four) + i, part);
#pragma unroll
        for (int k = 0; k < four; ++k) w[i * four + k] = part[k];
    }
}

// x + residual as T rounds it.
template <class T, int V>
__device__ __forceinline__ Packed<T, V> add(const Packed<T, V>& x, const Packed<T, V>& residual) {
    float sum[V], other[V];
    unpack(x, sum);
    unpack(residual, other);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += other[k];
    return pack<T>(sum);
}

// Sums over the threads of a group, to all of them, in an order that depends on nothing but the number of threads.
template <int group>
class GroupSum {
public:
    static constexpr int kScratch = group > 32 ? 4 * 32 : 1;  // floats of shared memory

    __device__ __forceinline__ explicit GroupSum(float* scratch) : scratch_(scratch) {}

    template <int n>
    __device__ __forceinline__ void operator()(float (&x)[n]) {
        static_assert(n <= 2, "scratch holds two sums, twice");
#pragma unroll
        for (int k = 0; k < n; ++k) x[k] = lanes_sum<(group < 32 ? group : 32)>(x[k]);
        if constexpr (group > 32) {
            // Two halves in turn: nobody writes one before all have read it, for they met in between at the other.
            float* mine = scratch_ + turn_ * 64;
            turn_ ^= 1;
            const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
            if (lane == 0) {
#pragma unroll
                for (int k = 0; k < n; ++k) mine[k * 32 + warp] = x[k];
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < n; ++k) x[k] = lanes_sum<group / 32>(mine[k * 32 + (lane & (group / 32 - 1))]);
        }
    }

private:
    template <int lanes>
    static __device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
        for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
        return x;
    }

    float* scratch_;
    int turn_ = 0;
};

// y and, with a residual, the sum. mean: LayerNorm rather than RMSNorm.
template <class T, int group, int each, bool mean>
__global__ void __launch_bounds__(kGroupThreads<group>) norm_rows(NormArguments a) {
    constexpr int V = 16 / sizeof(T), groups = kGroupThreads<group> / group;
    __shared__ float scratch[GroupSum<group>::kScratch];
    GroupSum<group> sum_up(scratch);
    const int lane = threadIdx.x % group;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / group, vectors = a.width / V;
    // Groups without a row go along, for the others of the warp to shuffle with.
    const int64_t mine = row < a.rows ? vectors : 0;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;

    Row<T, V, each> s = {};
#pragma unroll
    for (int p = 0; p < each; ++p)
        if (lane + p * group < mine) s.part[p] = load<T, V>(x, lane + p * group);
    if (a.residual) {
        const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
        Packed<T, V>* sum = reinterpret_cast<Packed<T, V>*>(static_cast<T*>(a.sum) + row * a.width);
        Row<T, V, each> other = {};  // all of it before the first result is written, which might be what is read next
#pragma unroll
        for (int p = 0; p < each; ++p)
            if (lane + p * group < mine) other.part[p] = load<T, V>(residual, lane + p * group);
#pragma unroll
        for (int p = 0; p < each; ++p) {
            if (lane + p * group >= mine) continue;
            s.part[p] = add(s.part[p], other.part[p]);
            sum[lane + p * group] = s.part[p];
        }
    }

    float middle = 0.f;
    if constexpr (mean) {
        float total[1] = {};
#pragma unroll
        for (int p = 0; p < each; ++p) {
            float e[V];
            unpack(s.part[p], e);
#pragma unroll
            for (int k = 0; k < V; ++k) total[0] += e[k];
        }
        sum_up(total);
        middle = total[0] / a.width;
    }
    float squares[1] = {};
#pragma unroll
    for (int p = 0; p < each; ++p) {
        if (lane + p * group >= mine) continue;
        float e[V];
        unpack(s.part[p], e);
#pragma unroll
        for (int k = 0; k < V; ++k) squares[0] += (e[k] - middle) * (e[k] - middle);
    }
    sum_up(squares);
    const float r = rsqrtf(squares[0] / a.width + a.eps);
    if (lane == 0 && row < a.rows) {
        a.rstd[row] = r;
        if constexpr (mean) a.mean[row] = middle;
    }

    T* y = static_cast<T*>(a.y) + row * a.width;
#pragma unroll
    for (int p = 0; p < each; ++p) {
        if (lane + p * group >= mine) continue;
        float e[V], w[V], b[V] = {};
        unpack(s.part[p], e);
        load_weight<T>(a.weight, lane + p * group, a.wide, w);
        if constexpr (mean) load_weight<T>(a.bias, lane + p * group, a.wide, b);
#pragma unroll
        for (int k = 0; k < V; ++k) e[k] = (e[k] - middle) * r * (w[k] + a.offset) + b[k];
        store<T>(y, lane + p * group, e);
    }
}

// As norm_rows, a block for each row of any width; vectors of V elements.
template <class T, int V, bool mean>
__global__ void __launch_bounds__(kNormThreads) norm_wide_rows(NormArguments a) {
    __shared__ float scratch[GroupSum<kNormThreads>::kScratch];
    GroupSum<kNormThreads> sum_up(scratch);
    const int64_t row = blockIdx.x, vectors = a.width / V;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = static_cast<const T*>(a.residual) + (a.residual ? row * a.residual_stride : 0);
    // The sum is read again by the threads that wrote it.
    T* sum = static_cast<T*>(a.sum) + (a.residual ? row * a.width : 0);
    const T* s = a.residual ? sum : x;

    float total[1] = {};
    for (int64_t i = threadIdx.x; i < vectors; i += kNormThreads) {
        Packed<T, V> part = load<T, V>(x, i);
        if (a.residual) {
            part = add(part, load<T, V>(residual, i));
            reinterpret_cast<Packed<T, V>*>(sum)[i] = part;
        }
        float e[V];
        unpack(part, e);
#pragma unroll
        for (int k = 0; k < V; ++k) total[0] += mean ? e[k] : e[k] * e[k];
    }
    sum_up(total);
    float middle = 0.f;
    if constexpr (mean) {
        middle = total[0] / a.width;
        total[0] = 0.f;
        for (int64_t i = threadIdx.x; i < vectors; i += kNormThreads) {
            float e[V];
            load<T>(s, i, e);
#pragma unroll
            for (int k = 0; k < V; ++k) total[0] += (e[k] - middle) * (e[k] - middle);
        }
        sum_up(total);
    }
    const float r = rsqrtf(total[0] / a.width + a.eps);
    if (threadIdx.x == 0) {
        a.rstd[row] = r;
        if constexpr (mean) a.mean[row] = middle;
    }

    T* y = static_cast<T*>(a.y) + row * a.width;
    for (int64_t i = threadIdx.x; i < vectors; i += kNormThreads) {
        float e[V], w[V], b[V] = {};
        load<T>(s, i, e);
        load_weight<T>(a.weight, i, a.wide, w);
        if constexpr (mean) load_weight<T>(a.bias, i, a.wide, b);
#pragma unroll
        for (int k = 0; k < V; ++k) e[k] = (e[k] - middle) * r * (w[k] + a.offset) + b[k];
        store<T>(y, i, e);
    }
}

// With n = (s - mean) rstd: dx = rstd (dy w - n mean(dy w n) - mean(dy w)) + ds, the last mean with LayerNorm only;
// the weight's gradient is the sum of dy n over rows, the bias's of dy. Blocks stay and take rows in turn; the gradient
// sums stay in registers.
template <class T, int group, int each, bool mean>
__global__ void __launch_bounds__(kGroupThreads<group>, kResident<kGroupThreads<group>>)
    norm_rows_backward(NormGradArguments a) {
    constexpr int V = 16 / sizeof(T), threads = kGroupThreads<group>, groups = threads / group;
    constexpr int held = each * V;  // elements of a row that a thread has
    // Where there are registers for it, this row stays in them, and the next is on its way while it is summed up; else
    // the second pass reads from the caches.
    constexpr bool kept = group < 1024;
    __shared__ float scratch[GroupSum<group>::kScratch];
    GroupSum<group> sum_up(scratch);
    const int lane = threadIdx.x % group, number = threadIdx.x / group;
    const int64_t vectors = a.width / V, step = static_cast<int64_t>(gridDim.x) * groups;
    const float inverse = 1.f / a.width;

    float dw[each][V] = {}, db[mean ? each : 1][V] = {};
    // So does a thread's part of the weight, which is every row's, where there are registers for that too.
    constexpr bool weight_kept = kept && !mean && each == 2;
    float weight[weight_kept ? each : 1][V];
    const auto read_weight = [&](int p, float (&w)[V]) {
        load_weight<T>(a.weight, lane + p * group, a.wide, w);
#pragma unroll
        for (int k = 0; k < V; ++k) w[k] += a.offset;
    };
    const auto weigh = [&](int p, float (&w)[V]) {
        if constexpr (weight_kept) {
#pragma unroll
            for (int k = 0; k < V; ++k) w[k] = weight[p][k];
        } else {
            read_weight(p, w);
        }
    };
    const auto part = [&](const void* rows, int64_t stride, int64_t row, int p) {
        return load<T, V>(static_cast<const T*>(rows) + row * stride, lane + p * group);
    };
    Row<T, V, each> s, dy, ds = {}, next_s = {}, next_dy = {};
    float next_r = 0.f, next_middle = 0.f;
    const auto fetch_next = [&](int64_t row) {
        if (row < a.rows) {
            next_r = a.rstd[row];
            if constexpr (mean) next_middle = a.mean[row];
        }
#pragma unroll
        for (int p = 0; p < each; ++p) {
            if (row >= a.rows || lane + p * group >= vectors) continue;
            next_s.part[p] = part(a.s, a.s_stride, row, p);
            next_dy.part[p] = part(a.dy, a.dy_stride, row, p);
        }
    };

    int64_t first = static_cast<int64_t>(blockIdx.x) * groups;  // of the block's rows of this round
    if constexpr (kept) fetch_next(first + number);
    if constexpr (weight_kept) {
#pragma unroll
        for (int p = 0; p < each; ++p)
            if (lane + p * group < vectors) read_weight(p, weight[p]);
    }
    for (; first < a.rows; first += step) {
        const int64_t row = first + number, mine = row < a.rows ? vectors : 0;
        float r = 0.f, middle = 0.f;
        if constexpr (kept) {
            s = next_s, dy = next_dy, r = next_r, middle = next_middle;
#pragma unroll
            for (int p = 0; p < each; ++p)
                if (a.ds && lane + p * group < mine) ds.part[p] = part(a.ds, a.ds_stride, row, p);
            fetch_next(row + step);
        } else if (mine) {
            r = a.rstd[row];
            if constexpr (mean) middle = a.mean[row];
        }
        float along[mean ? 2 : 1] = {};
#pragma unroll
        for (int p = 0; p < each; ++p) {
            if (lane + p * group >= mine) continue;
            float e[V], g[V], w[V];
            unpack(kept ? s.part[p] : part(a.s, a.s_stride, row, p), e);
            unpack(kept ? dy.part[p] : part(a.dy, a.dy_stride, row, p), g);
            weigh(p, w);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float n = (e[k] - middle) * r;
                dw[p][k] += g[k] * n;
                if constexpr (mean) db[p][k] += g[k];
                along[0] += g[k] * w[k] * n;
                if constexpr (mean) along[1] += g[k] * w[k];
            }
        }
        sum_up(along);
        const float slope = along[0] * inverse * r;
        T* dx = static_cast<T*>(a.dx) + row * a.width;
#pragma unroll
        for (int p = 0; p < each; ++p) {
            if (lane + p * group >= mine) continue;
            float e[V], g[V], w[V], more[V];
            unpack(kept ? s.part[p] : part(a.s, a.s_stride, row, p), e);
            unpack(kept ? dy.part[p] : part(a.dy, a.dy_stride, row, p), g);
            unpack(kept || !a.ds ? ds.part[p] : part(a.ds, a.ds_stride, row, p), more);
            weigh(p, w);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float d = g[k] * w[k] - (e[k] - middle) * slope;
                if constexpr (mean) d -= along[1] * inverse;
                e[k] = d * r + more[k];
            }
            store<T>(dx, lane + p * group, e);
        }
    }

    // The groups of the block in turn: a fixed order.
    __shared__ float parts[groups > 1 ? groups : 1][groups > 1 ? group * held : 1];
    const auto hand_over = [&](const float(*mine)[V], float* to) {
        if constexpr (groups == 1) {
#pragma unroll
            for (int p = 0; p < each; ++p)
                if (lane + p * group < vectors) store<float>(to, lane + p * group, mine[p]);
        } else {
            __syncthreads();
#pragma unroll
            for (int p = 0; p < each; ++p)
#pragma unroll
                for (int k = 0; k < V; ++k) parts[number][(lane + p * group) * V + k] = mine[p][k];
            __syncthreads();
            for (int i = threadIdx.x; i < a.width; i += threads) {
                float total = 0.f;
                for (int q = 0; q < groups; ++q) total += parts[q][i];
                to[i] = total;
            }
        }
    };
    float* partial = a.partial + blockIdx.x * a.width;
    hand_over(dw, partial);
    if constexpr (mean) hand_over(db, partial + gridDim.x * a.width);
}

// As norm_rows_backward, for rows of any width; the gradient sums are in memory, where each belongs to one thread.
template <class T, int V, bool mean>
__global__ void __launch_bounds__(kNormThreads, kResident<kNormThreads>) norm_wide_rows_backward(NormGradArguments a) {
    __shared__ float scratch[GroupSum<kNormThreads>::kScratch];
    GroupSum<kNormThreads> sum_up(scratch);
    const int64_t vectors = a.width / V;
    const float inverse = 1.f / a.width;
    float* dw = a.partial + blockIdx.x * a.width;
    float* db = dw + gridDim.x * a.width;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const T* s = static_cast<const T*>(a.s) + row * a.s_stride;
        const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
        const T* ds = static_cast<const T*>(a.ds) + (a.ds ? row * a.ds_stride : 0);
        const float r = a.rstd[row], middle = mean ? a.mean[row] : 0.f;
        const bool begins = row == blockIdx.x;
        float along[mean ? 2 : 1] = {};
        for (int64_t i = threadIdx.x; i < vectors; i += kNormThreads) {
            float e[V], g[V], w[V];
            load<T>(s, i, e);
            load<T>(dy, i, g);
            load_weight<T>(a.weight, i, a.wide, w);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float n = (e[k] - middle) * r;
                dw[i * V + k] = (begins ? 0.f : dw[i * V + k]) + g[k] * n;
                if constexpr (mean) db[i * V + k] = (begins ? 0.f : db[i * V + k]) + g[k];
                along[0] += g[k] * (w[k] + a.offset) * n;
                if constexpr (mean) along[1] += g[k] * (w[k] + a.offset);
            }
        }
        sum_up(along);
        T* dx = static_cast<T*>(a.dx) + row * a.width;
        for (int64_t i = threadIdx.x; i < vectors; i += kNormThreads) {
            float e[V], g[V], w[V], more[V] = {};
            load<T>(s, i, e);
            load<T>(dy, i, g);
            if (a.ds) load<T>(ds, i, more);
            load_weight<T>(a.weight, i, a.wide, w);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float d = g[k] * (w[k] + a.offset) - (e[k] - middle) * r * (along[0] * inverse);
                if constexpr (mean) d -= along[1] * inverse;
                e[k] = d * r + more[k];
            }
            store<T>(dx, i, e);
        }
    }
}

constexpr int kPartsAtOnce = 16;

// Sums over the blocks: blockIdx.y 0 of the weight's gradient, 1 of the bias's. 32 columns a block, in a fixed order.
template <class W>
__global__ void __launch_bounds__(32 * kPartsAtOnce)
    norm_weight_gradient(const float* partial, int64_t blocks, int64_t width, W* dw, W* db) {
    __shared__ float parts[kPartsAtOnce][32];
    const int lane = threadIdx.x & 31, number = threadIdx.x >> 5;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
    const float* from = partial + blockIdx.y * blocks * width;
    float total = 0.f;
    if (column < width) {
#pragma unroll 8
        for (int64_t b = number; b < blocks; b += kPartsAtOnce) total += from[b * width + column];
    }
    parts[number][lane] = total;
    __syncthreads();
    if (number || column >= width) return;
    for (int q = 1; q < kPartsAtOnce; ++q) total += parts[q][lane];
    (blockIdx.y ? db : dw)[column] = from_float<W>(total);
}

}  // namespace megapt
