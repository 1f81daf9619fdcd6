#include "norms.cuh"

#include <algorithm>
#include <initializer_list>

#include "launch.h"
#include "norms.h"

namespace megapt {
namespace {

template <int n, int of_each>
struct Group {
    static constexpr int threads = n, each = of_each;
};

// Calls f with the group of threads that holds a row of so many vectors and how many each of them has, or with no
// threads if none does. Three for each where two would leave many of the threads without work, as at 768 and 5120
// elements of 16 bits.
template <class F>
int with_group(int64_t vectors, F&& f) {
    if (vectors <= 16) return f(Group<8, 2>{});
    if (vectors <= 64) return f(Group<32, 2>{});
    if (vectors <= 96) return f(Group<32, 3>{});
    if (vectors <= 256) return f(Group<128, 2>{});
    if (vectors <= 512) return f(Group<256, 2>{});
    if (vectors <= 768) return f(Group<256, 3>{});
    if (vectors <= 1024) return f(Group<512, 2>{});
    if (vectors <= 2048) return f(Group<1024, 2>{});
    return f(Group<0, 0>{});
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
            return launch(norm_rows<T, n, decltype(group)::each, mean>, dim3((rows + groups - 1) / groups),
                          dim3(threads), 0, stream, a);
        }
    });
}

// blocks: at most so many; lowered to those that stay on the device together.
template <class T, bool mean>
int backward(const NormGradArguments& a, int64_t& blocks, void* stream) {
    constexpr int V = 16 / sizeof(T);
    const auto run = [&](auto kernel, auto threads) {
        constexpr int n = decltype(threads)::value;
        blocks = std::min(blocks, static_cast<int64_t>(multiprocessors()) * kResident<n>);
        return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(n), 0, stream, a);
    };
    constexpr std::integral_constant<int, kNormThreads> any_width{};
    if (!by_vectors(sizeof(T), a.width, {a.dy, a.ds, a.s, a.weight, a.dx, a.partial},
                    {a.dy_stride, a.ds_stride, a.s_stride}))
        return run(norm_wide_rows_backward<T, 1, mean>, any_width);
    return with_group(a.width / V, [&](auto group) {
        using G = decltype(group);
        // Two gradient sums leave no registers for three vectors, nor for rows of 1024 threads.
        constexpr bool more = mean && G::each == 3;
        constexpr int n = !more ? G::threads : G::threads == 32 ? 128 : 512;
        if constexpr (n == 0 || (n == 1024 && mean && V == 8))
            return run(norm_wide_rows_backward<T, V, mean>, any_width);
        else
            return run(norm_rows_backward<T, n, more ? 2 : G::each, mean>,
                       std::integral_constant<int, kGroupThreads<n>>{});
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
        // Rows of 1024 threads may go to the blocks of kNormThreads, of which more stay.
        constexpr int stay = n == 1024 ? kResident<kNormThreads> : kResident<threads>, groups = n ? threads / n : 1;
        blocks = std::min((rows + groups - 1) / groups, static_cast<int64_t>(multiprocessors()) * stay);
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
            const auto run = db ? backward<T, true> : backward<T, false>;
            return run(a, blocks, stream);
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
