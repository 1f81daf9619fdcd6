#include "norms.cuh"

#include <initializer_list>

#include "launch.h"
#include "norms.h"

namespace megapt {
namespace {

template <int n>
struct Group {
    static constexpr int threads = n;
};

// Calls f with the group of threads that holds a row of so many vectors, or with Group<0> if none does.
template <class F>
int with_group(int64_t vectors, F&& f) {
    if (vectors <= 8 * kVectors) return f(Group<8>{});
    if (vectors <= 32 * kVectors) return f(Group<32>{});
    if (vectors <= 128 * kVectors) return f(Group<128>{});
    if (vectors <= 256 * kVectors) return f(Group<256>{});
    if (vectors <= 512 * kVectors) return f(Group<512>{});
    if (vectors <= 1024 * kVectors) return f(Group<1024>{});
    return f(Group<0>{});
}

// Whether rows can be read and written by vectors of 16 bytes.
bool by_vectors(size_t size, int64_t width, std::initializer_list<const void*> pointers,
                std::initializer_list<int64_t> strides) {
    const int64_t V = static_cast<int64_t>(16 / size);
    bool fits = width % V == 0;
    for (const void* p : pointers) fits = fits && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    for (const int64_t s : strides) fits = fits && s % V == 0;
    return fits;
}

template <class T, bool mean>
int forward(const NormArguments& a, void* stream) {
    constexpr int V = 16 / sizeof(T);
    const unsigned rows = static_cast<unsigned>(a.rows);
    if (!by_vectors(sizeof(T), a.width, {a.x, a.residual, a.weight, a.bias, a.y, a.sum},
                    {a.x_stride, a.residual_stride}))
        return launch(norm_wide_rows<T, 1, mean>, dim3(rows), dim3(kNormThreads), 0, stream, a);
    return with_group(a.width / V, [&](auto group) {
        constexpr int n = decltype(group)::threads;
        if constexpr (n == 0) {
            return launch(norm_wide_rows<T, V, mean>, dim3(rows), dim3(kNormThreads), 0, stream, a);
        } else {
            constexpr int threads = kGroupThreads<n>, groups = threads / n;
            return launch(norm_rows<T, n, mean>, dim3((rows + groups - 1) / groups), dim3(threads), 0, stream, a);
        }
    });
}

template <class T, bool mean>
int backward(const NormGradArguments& a, unsigned blocks, void* stream) {
    constexpr int V = 16 / sizeof(T);
    if (!by_vectors(sizeof(T), a.width, {a.dy, a.ds, a.s, a.weight, a.dx, a.partial},
                    {a.dy_stride, a.ds_stride, a.s_stride}))
        return launch(norm_wide_rows_backward<T, 1, mean>, dim3(blocks), dim3(kNormThreads), 0, stream, a);
    return with_group(a.width / V, [&](auto group) {
        constexpr int n = decltype(group)::threads;
        if constexpr (n == 0 || (n == 1024 && mean && V == 8))  // two gradient sums leave such rows no registers
            return launch(norm_wide_rows_backward<T, V, mean>, dim3(blocks), dim3(kNormThreads), 0, stream, a);
        else
            return launch(norm_rows_backward<T, n, mean>, dim3(blocks), dim3(kGroupThreads<n>), 0, stream, a);
    });
}

}  // namespace
}  // namespace megapt

using namespace megapt;

int64_t megapt_norm_backward_blocks(int64_t rows, int64_t width, int dtype) {
    const int64_t V = dtype == kFloat32 ? 4 : 8;
    int64_t blocks = 0;
    with_group((width + V - 1) / V, [&](auto group) {
        constexpr int n = decltype(group)::threads, threads = n ? kGroupThreads<n> : kNormThreads;
        constexpr int groups = n ? threads / n : 1;
        const int64_t resident = static_cast<int64_t>(multiprocessors()) * kResident<threads>;
        const int64_t needed = (rows + groups - 1) / groups;
        blocks = needed < resident ? needed : resident;
        return 0;
    });
    return blocks;
}

int megapt_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, const void* weight,
                const void* bias, float offset, float eps, void* y, void* sum, float* mean, float* rstd, int64_t rows,
                int64_t width, int dtype, int weight_dtype, void* stream) {
    if (rows == 0) return 0;
    const bool wide = weight_dtype == kFloat32;
    const NormArguments a{x,    residual, weight, bias,     y,               sum, mean,
                          rstd, rows,     width,  x_stride, residual_stride, eps, offset, wide};
    return dispatch(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return bias ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
    });
}

int megapt_norm_backward(const void* dy, int64_t dy_stride, const void* ds, int64_t ds_stride, const void* s,
                         int64_t s_stride, const void* weight, float offset, const float* mean, const float* rstd,
                         void* dx, void* dw, void* db, float* partial, int64_t blocks, int64_t rows, int64_t width,
                         int dtype, int weight_dtype, void* stream) {
    const NormGradArguments a{dy,   ds,   s,     weight,    mean,      rstd,     dx, partial,
                              rows, width, dy_stride, ds_stride, s_stride, offset, weight_dtype == kFloat32};
    if (rows > 0) {
        const int code = dispatch(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const unsigned grid = static_cast<unsigned>(blocks);
            return db ? backward<T, true>(a, grid, stream) : backward<T, false>(a, grid, stream);
        });
        if (code) return code;
    }
    return dispatch(weight_dtype, [&](auto type) {
        using W = typename decltype(type)::type;
        const dim3 grid(static_cast<unsigned>((width + 31) / 32), db ? 2 : 1);
        return launch(norm_weight_gradient<W>, grid, dim3(32 * kPartsAtOnce), 0, stream, partial, blocks, width,
                      static_cast<W*>(dw), static_cast<W*>(db));
    });
}
