// Flash attention forward and backward after FlashAttention-2 (arXiv 2307.08691), on the tensor cores from sm_80 on.
//
// All tokens are one sequence of documents; two numbers for each say where its document begins and ends. From those of
// its first and last token a block knows the tokens that it meets, and which of those without a mask: documents, rows
// and windows are one path.
//
// A warp has 16 rows of a block's products, and one leads to the next in registers: the words in which a lane holds
// sums of one are those in which it hands in the left side of the next. The backward pass
// is two kernels, each of which sums what is its own: no atomic sums, the same bits on every run.
#pragma once

#include "mma.cuh"

namespace megapt {

// [tokens, heads, width], contiguous in width.
struct Heads {
    const void* data;
    int64_t token, head;  // elements from one to the next
};

// Products of queries and keys become scores in units of log 2: `inner` x product, or with a soft cap (`outer` > 0)
// `outer` x tanh(inner x product).
struct FlashArguments {
    Heads q, k, v;
    const int *starts, *ends;  // [tokens]: of each token's document
    int tokens, heads, group;  // group: query heads for each key/value head
    int window;                // tokens that a token sees, itself included
    bool causal;
    float scale, inner, outer;
};

// Queries of a block of the forward pass, 16 for each warp; narrow heads leave registers for two blocks.
template <int D>
constexpr int kQueries = D > 64 ? 128 : 96;
constexpr int kKeys = 64;  // that they meet in a step
constexpr int kOwn = 64;   // rows of a block of the backward pass, 16 for each warp
constexpr int kMet = 32;   // rows that they meet in a step
template <int D>
constexpr int kForwardThreads = 2 * kQueries<D>;
constexpr int kBackwardThreads = 2 * kOwn, kAlongThreads = 128;

// Tokens [from, to).
struct Span {
    int from, to;
};

// The keys that a query sees. Behind the last token start and end are 0, and it sees none.
__device__ __forceinline__ Span seen_by(const FlashArguments& f, int query, int start, int end) {
    return {max(start, query + 1 - f.window), f.causal ? min(query + 1, end) : end};
}

// What a block of rows meets: all of it in `all`, of which `clear` needs no mask. all.from is a multiple of step.
struct Meeting {
    Span all, clear;
};

__device__ __forceinline__ Meeting keys_met(const FlashArguments& f, int first, int queries, int step) {
    const int last = min(first + queries, f.tokens) - 1;
    const Span low = seen_by(f, first, f.starts[first], f.ends[first]);
    const Span high = seen_by(f, last, f.starts[last], f.ends[last]);
    return {{low.from / step * step, high.to}, {high.from, low.to}};
}

__device__ __forceinline__ Meeting queries_met(const FlashArguments& f, int first, int keys, int step) {
    const int last = min(first + keys, f.tokens) - 1;
    Meeting met = {{f.starts[first], f.ends[last]}, {f.starts[last], f.ends[first]}};
    if (f.causal) met.all.from = first, met.clear.from = last;
    // A window may be as wide as numbers go.
    met.all.to = min(met.all.to - last, f.window) + last;
    met.clear.to = min(met.clear.to - first, f.window) + first;
    met.all.from = met.all.from / step * step;
    return met;
}

// Tiles lie in shared memory row by row. The 16-byte parts of 8 neighbouring rows are exchanged so that a part of all
// of them, which ldmatrix reads at once, lies in different banks.
template <int D, class T>
__device__ __forceinline__ T* part_of(T* tile, int row, int part) {
    return tile + row * D + (part ^ (row & 7)) * 8;
}

// Asks for tokens [first, first + rows) of a head; zeros behind the last token.
template <int threads, int rows, int D, class T>
__device__ __forceinline__ void ask_for(AsyncCopies& copies, T* tile, const Heads& from, int head, int first,
                                        int tokens) {
    constexpr int parts = D / 8;
    const T* data = static_cast<const T*>(from.data) + head * from.head;
#pragma unroll 1  // saves registers; copies need not wait for each other
    for (int i = threadIdx.x; i < rows * parts; i += threads) {
        const int row = i / parts, part = i % parts;
        const bool inside = row < tokens - first;
        const int64_t token = inside ? first + row : 0;
        copies.copy16(part_of<D>(tile, row, part), data + token * from.token + part * 8, inside);
    }
}

// 16 rows and columns of a tile: as the left side of a product, or as the right sides of two, whose columns are rows
// of the tile: those of words 0 and 2, and of words 1 and 3.
template <int D, class T>
__device__ __forceinline__ void load_rows(uint32_t (&words)[4], T* tile, int row, int column) {
    const int lane = threadIdx.x & 31;
    load_matrices(words, part_of<D>(tile, row + (lane & 15), column / 8 + (lane >> 4)));
}

// 16 rows and columns of a tile as the right sides of two products, whose rows are rows of the tile: of words 0 and 1,
// and of words 2 and 3.
template <int D, class T>
__device__ __forceinline__ void load_columns(uint32_t (&words)[4], T* tile, int row, int column) {
    const int lane = threadIdx.x & 31;
    load_matrices_turned(words, part_of<D>(tile, row + (lane & 15), column / 8 + (lane >> 4)));
}

// c += a b^T for b [8 N, D] of shared memory. a(k, words) gives 16 columns from 16 k on.
template <class T, int D, int N, class A>
__device__ __forceinline__ void multiply_turned(Sum (&c)[N], A&& a, T* b) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        Left left;
        a(k, left);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            load_rows<D>(right, b, n * 8, k * 16);
            mma<T>(c[n], left, right[0], right[2]);
            mma<T>(c[n + 1], left, right[1], right[3]);
        }
    }
}

// c += a b for sums a of an earlier product, rounded to T, and b [8 N, D] of shared memory.
template <class T, int D, int N>
__device__ __forceinline__ void multiply(Sum (&c)[D / 8], const Sum (&a)[N], T* b) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
        Left left;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* two = &a[2 * k + i / 2][i % 2 * 2];
            left[i] = pack<T>({two[0], two[1]}).words[0];
        }
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t right[4];
            load_columns<D>(right, b, k * 16, d * 8);
            mma<T>(c[d], left, right[0], right[1]);
            mma<T>(c[d + 1], left, right[2], right[3]);
        }
    }
}

// Exact at both ends; the error is that of numbers near 1.
__device__ __forceinline__ float bounded(float x) {
    return 1.f - __fdividef(2.f, power_of_two(x * 2.8853900817779268f) + 1.f);
}

template <int N>
__device__ __forceinline__ void make_scores(const FlashArguments& f, Sum (&s)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= f.inner;
    if (f.outer == 0.f) return;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = bounded(s[n][i]) * f.outer;
}

// -inf for the keys from `key` on that queries, a warp's from `first` on, do not see.
template <int N>
__device__ __forceinline__ void hide_unseen(const FlashArguments& f, Sum (&s)[N], int first, int key) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int query = first + 8 * h + lane / 4;
        const bool inside = query < f.tokens;
        const Span seen = seen_by(f, query, inside ? f.starts[query] : 0, inside ? f.ends[query] : 0);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int number = key + 8 * n + lane % 4 * 2 + i;
                if (number < seen.from || number >= seen.to) s[n][2 * h + i] = -INFINITY;
            }
        }
    }
}

// The four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// A warp's rows, `factors` times the sums, to [tokens, heads, D]; the first is token `first`.
template <class T, int D>
__device__ __forceinline__ void store_rows(T* to, const Sum (&sums)[D / 8], const float (&factors)[2], int first,
                                           int tokens, int heads, int head) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int64_t row = first + 8 * h + lane / 4;
        if (row >= tokens) continue;
        Packed<T, 2>* words = reinterpret_cast<Packed<T, 2>*>(to + (row * heads + head) * D);
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
            words[d * 4 + lane % 4] = pack<T>({sums[d][2 * h] * factors[h], sums[d][2 * h + 1] * factors[h]});
    }
}

// Sums of two rows' exponentials and of values weighted by them, as far as their keys have been met.
template <int D>
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {};  // total: of this lane's columns
    Sum values[D / 8] = {};

    // Scores become exponentials; what was summed before fades if a row's maximum grows.
    template <int N>
    __device__ __forceinline__ void add(Sum (&s)[N]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float highest = top[h];
#pragma unroll
            for (int n = 0; n < N; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            highest = row_max(highest);
            // A row that has seen nothing yet has a maximum of -inf, which must not meet itself.
            const float shift = highest == -INFINITY ? 0.f : highest;
            const float fade = power_of_two(top[h] - shift);
            top[h] = highest;
            total[h] *= fade;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    s[n][i] = power_of_two(s[n][i] - shift);
                    total[h] += s[n][i];
                }
            }
#pragma unroll
            for (int d = 0; d < D / 8; ++d) values[d][2 * h] *= fade, values[d][2 * h + 1] *= fade;
        }
    }
};

// A block of queries of a head: out [tokens, heads, D], and lse [heads, tokens], the logs (base 2) of the softmax's
// denominators. Keys and values are on their way while the step before them is computed.
template <class T, int D>
__global__ void __launch_bounds__(kForwardThreads<D>, D > 64 ? 1 : 2)
    flash_forward(FlashArguments f, T* out, float* lse) {
    constexpr int queries = kQueries<D>, threads = 2 * queries, tile = kKeys * D, N = kKeys / 8;
    static_assert(queries <= 2 * kKeys, "queries pass through the place of the second step's keys and values");
    MEGAPT_DYNAMIC_SHARED(T, shared);  // keys and values of two steps
    const int first = (gridDim.x - 1 - blockIdx.x) * queries;  // where causal, those with most to do come first
    const int head = blockIdx.y, kv_head = head / f.group, lane = threadIdx.x & 31, own = threadIdx.x / 32 * 16;
    const Meeting met = keys_met(f, first, queries, kKeys);

    AsyncCopies copies;
    const auto ask_for_step = [&](int n, T* keys) {
        ask_for<threads, kKeys, D>(copies, keys, f.k, kv_head, n, f.tokens);
        ask_for<threads, kKeys, D>(copies, keys + tile, f.v, kv_head, n, f.tokens);
        copies.commit();
    };
    ask_for<threads, queries, D>(copies, shared + 2 * tile, f.q, head, first, f.tokens);
    copies.commit();
    ask_for_step(met.all.from, shared);
    copies.wait<1>();
    __syncthreads();
    Left query[D / 16];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_rows<D>(query[k], shared + 2 * tile, own, 16 * k);
    __syncthreads();

    Softmax<D> softmax;
    T *keys = shared, *others = shared + 2 * tile;
    for (int n = met.all.from; n < met.all.to; n += kKeys) {
        if (met.all.to - n > kKeys) {
            ask_for_step(n + kKeys, others);
            copies.wait<1>();
        } else {
            copies.wait<0>();
        }
        __syncthreads();
        Sum s[N] = {};
        multiply_turned<T, D>(
            s,
            [&](int k, Left& words) {
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = query[k][i];
            },
            keys);
        make_scores(f, s);
        if (n < met.clear.from || met.clear.to - n < kKeys) hide_unseen(f, s, first + own, n);
        softmax.add(s);
        multiply<T, D>(softmax.values, s, keys + tile);
        __syncthreads();
        T* const next = others;
        others = keys, keys = next;
    }

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float total = row_sum(softmax.total[h]);
        const int row = first + own + 8 * h + lane / 4;
        inverse[h] = 1.f / total;
        if (lane % 4 == 0 && row < f.tokens)
            lse[static_cast<int64_t>(head) * f.tokens + row] = softmax.top[h] + log2f(total);
    }
    store_rows<T, D>(out, softmax.values, inverse, first + own, f.tokens, f.heads, head);
}

// along [heads, tokens]: the sum of the products of a row's result and its gradient, D / 8 lanes a row.
template <class T, int D>
__global__ void __launch_bounds__(kAlongThreads)
    flash_along(const T* out, Heads dy, float* along, int tokens, int heads) {
    constexpr int lanes = D / 8;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kAlongThreads / lanes) + threadIdx.x / lanes;
    const int64_t token = row / heads, head = row % heads;
    const int part = threadIdx.x % lanes;
    float sum = 0.f;
    if (token < tokens) {
        float a[8], b[8];
        unpack(read(reinterpret_cast<const Packed<T, 8>*>(out + row * D) + part), a);
        const T* other = static_cast<const T*>(dy.data) + token * dy.token + head * dy.head;
        unpack(read(reinterpret_cast<const Packed<T, 8>*>(other) + part), b);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
    }
#pragma unroll
    for (int o = lanes / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (part == 0 && token < tokens) along[head * tokens + token] = sum;
}

// What rows of queries bring besides themselves.
template <int rows>
struct QueryNumbers {
    float lse[rows], along[rows];
    int starts[rows], ends[rows];
};

// Where element i of a warp's product n is: its row among the block's own, its column among the rows that they meet.
struct Place {
    int own, met;
};

__device__ __forceinline__ Place place_of(int own, int n, int i) {
    const int lane = threadIdx.x & 31;
    return {own + lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2};
}

// Scores p become probabilities, and ds, gradients of the probabilities, become those of the scores.
template <bool of_keys, int N, int rows>
__device__ __forceinline__ void make_slopes(const FlashArguments& f, const QueryNumbers<rows>& queries, Sum (&p)[N],
                                            Sum (&ds)[N], int own) {
    if (f.outer != 0.f) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Place at = place_of(own, n, i);
                const float bent = __fdividef(p[n][i], f.outer);
                ds[n][i] = (ds[n][i] - queries.along[of_keys ? at.met : at.own]) * (1.f - bent * bent);
            }
        }
    } else {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Place at = place_of(own, n, i);
                ds[n][i] -= queries.along[of_keys ? at.met : at.own];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Place at = place_of(own, n, i);
            p[n][i] = power_of_two(p[n][i] - queries.lse[of_keys ? at.met : at.own]);
            ds[n][i] *= p[n][i];
        }
    }
}

// Zeros where query and key do not meet; the block's rows are tokens from `first` on, those it meets from `from` on.
template <bool of_keys, int N, int rows>
__device__ __forceinline__ void hide_unseen(const FlashArguments& f, const QueryNumbers<rows>& queries, Sum (&p)[N],
                                            Sum (&ds)[N], int own, int first, int from) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Place at = place_of(own, n, i);
            const int row = of_keys ? at.met : at.own;
            const int query = of_keys ? from + at.met : first + at.own, key = of_keys ? first + at.own : from + at.met;
            const Span seen = seen_by(f, query, queries.starts[row], queries.ends[row]);
            if (key < seen.from || key >= seen.to) p[n][i] = ds[n][i] = 0.f;
        }
    }
}

struct FlashGradients {
    Heads dy;
    const float *lse, *along;  // [heads, tokens]
    void *first, *second;      // dk and dv, or dq alone
};

// Asks for the numbers of a head's queries from token `from` on; zeros behind the last token.
template <int rows>
__device__ __forceinline__ void ask_for_numbers(AsyncCopies& copies, QueryNumbers<rows>& to, const FlashArguments& f,
                                                const FlashGradients& g, int head, int from) {
    const int64_t row = static_cast<int64_t>(head) * f.tokens;
    float* const target = reinterpret_cast<float*>(&to);
    for (int i = threadIdx.x; i < 4 * rows; i += kBackwardThreads) {
        const int which = i / rows;
        const bool inside = i % rows < f.tokens - from;
        const int64_t token = inside ? from + i % rows : 0;
        const void* source = which < 2 ? static_cast<const void*>((which == 0 ? g.lse : g.along) + row + token)
                                       : static_cast<const void*>((which == 2 ? f.starts : f.ends) + token);
        copies.copy4(target + i, source, inside);
    }
}

// of_keys: a block of keys and values meets the queries of its group of heads and the gradients of their results, for
// dk and dv; products are then [keys, queries]. Else a block of queries meets keys and values, for dq.
template <class T, int D, bool of_keys>
__global__ void __launch_bounds__(kBackwardThreads) flash_backward(FlashArguments f, FlashGradients g) {
    constexpr int N = kMet / 8, own_tile = kOwn * D, met_tile = kMet * D;
    using Numbers = QueryNumbers<of_keys ? kMet : kOwn>;
    MEGAPT_DYNAMIC_SHARED(T, shared);
    T *own_left = shared, *own_right = shared + own_tile, *met_tiles = shared + 2 * own_tile;
    Numbers* numbers = reinterpret_cast<Numbers*>(met_tiles + 4 * met_tile);  // of two steps of queries, or of the own
    const int block = of_keys ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int first = block * kOwn, head = blockIdx.y, lane = threadIdx.x & 31, own = threadIdx.x / 32 * 16;
    const Meeting met = of_keys ? queries_met(f, first, kOwn, kMet) : keys_met(f, first, kOwn, kMet);
    const Heads &left_own = of_keys ? f.k : f.q, &right_own = of_keys ? f.v : g.dy;
    const Heads &left_met = of_keys ? f.q : f.k, &right_met = of_keys ? g.dy : f.v;

    AsyncCopies copies;
    const int steps = (met.all.to - met.all.from + kMet - 1) / kMet, all_steps = of_keys ? steps * f.group : steps;
    const auto ask_for_step = [&](int step) {
        const int stage = step & 1, from = met.all.from + step % steps * kMet;
        const int met_head = of_keys ? head * f.group + step / steps : head / f.group;
        T* const left = met_tiles + stage * 2 * met_tile;
        ask_for<kBackwardThreads, kMet, D>(copies, left, left_met, met_head, from, f.tokens);
        ask_for<kBackwardThreads, kMet, D>(copies, left + met_tile, right_met, met_head, from, f.tokens);
        if constexpr (of_keys) ask_for_numbers(copies, numbers[stage], f, g, met_head, from);
    };
    ask_for<kBackwardThreads, kOwn, D>(copies, own_left, left_own, head, first, f.tokens);
    ask_for<kBackwardThreads, kOwn, D>(copies, own_right, right_own, head, first, f.tokens);
    if constexpr (!of_keys) ask_for_numbers(copies, *numbers, f, g, head, first);
    ask_for_step(0);
    copies.commit();

    Sum made[D / 8] = {}, second[of_keys ? D / 8 : 1] = {};
    for (int step = 0; step < all_steps; ++step) {
        if (step + 1 < all_steps) ask_for_step(step + 1);
        copies.commit();
        copies.wait<1>();
        __syncthreads();
        const int stage = step & 1, from = met.all.from + step % steps * kMet;
        T *left = met_tiles + stage * 2 * met_tile, *right = left + met_tile;

        Sum p[N] = {}, ds[N] = {};
        multiply_turned<T, D>(p, [&](int k, Left& w) { load_rows<D>(w, own_left, own, 16 * k); }, left);
        multiply_turned<T, D>(ds, [&](int k, Left& w) { load_rows<D>(w, own_right, own, 16 * k); }, right);
        make_scores(f, p);
        make_slopes<of_keys>(f, numbers[of_keys ? stage : 0], p, ds, own);
        if (from < met.clear.from || met.clear.to - from < kMet)
            hide_unseen<of_keys>(f, numbers[of_keys ? stage : 0], p, ds, own, first, from);
        if constexpr (of_keys) multiply<T, D>(second, p, right);
        multiply<T, D>(made, ds, left);
        __syncthreads();
    }

    const int heads = of_keys ? f.heads / f.group : f.heads;
    const float factors[2] = {f.scale, f.scale};
    store_rows<T, D>(static_cast<T*>(g.first), made, factors, first + own, f.tokens, heads, head);
    if constexpr (of_keys) {
        const float ones[2] = {1.f, 1.f};
        store_rows<T, D>(static_cast<T*>(g.second), second, ones, first + own, f.tokens, heads, head);
    }
}

}  // namespace megapt
