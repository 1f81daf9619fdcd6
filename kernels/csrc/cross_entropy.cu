#include "cross_entropy.h"

#include <type_traits>

#include "cross_entropy.cuh"
#include "launch.h"

namespace {

// A multiprocessor has 2048 threads, for many rows or few. Short rows take fewer each, so that there are more of them,
// which begin and end while others are read; long rows take more, lest a few last ones be left to a few threads.
constexpr int kLong = 512, kShort = 256;
constexpr int64_t kShortColumns = 32768;

// Calls f(type, capped, threads), each a compile-time constant in a type.
template <class F>
int dispatch_row(int dtype, float softcap, int64_t columns, F&& f) {
    return megapt::dispatch(dtype, [&](auto type) {
        const auto by_cap = [&](auto capped) {
            if (columns <= kShortColumns) return f(type, capped, std::integral_constant<int, kShort>{});
            return f(type, capped, std::integral_constant<int, kLong>{});
        };
        return softcap > 0.f ? by_cap(std::true_type{}) : by_cap(std::false_type{});
    });
}

}  // namespace

extern "C" int megapt_cross_entropy_stats(const void* logits, const int64_t* target, float* stats, int64_t rows,
                                          int64_t columns, int64_t stride, int64_t start, int64_t length,
                                          int64_t ignore_index, float softcap, int dtype, void* stream) {
    if (rows == 0) return 0;
    return dispatch_row(dtype, softcap, columns, [&](auto type, auto capped, auto threads) {
        using T = typename decltype(type)::type;
        constexpr int n = decltype(threads)::value;
        return megapt::launch(megapt::cross_entropy_stats_kernel<T, n, decltype(capped)::value>,
                              dim3(static_cast<unsigned>(rows)), dim3(n), 0, stream, static_cast<const T*>(logits),
                              target, stats, rows, stride, start, static_cast<int>(length), ignore_index, softcap);
    });
}

extern "C" int megapt_cross_entropy_combine(const float* every, const int64_t* target, float* losses, float* tokens,
                                            int64_t ranks, int64_t rows, int64_t ignore_index, float z_loss,
                                            void* stream) {
    constexpr int n = 128;
    if (rows == 0) return 0;
    return megapt::launch(megapt::cross_entropy_combine_kernel<n>, dim3(static_cast<unsigned>((rows + n - 1) / n)),
                          dim3(n), 0, stream, every, target, losses, tokens, ranks, rows, ignore_index, z_loss);
}

extern "C" int megapt_cross_entropy_gradient(void* logits, const int64_t* target, const float* tokens,
                                             int64_t tokens_stride, const float* slope, int64_t slope_stride,
                                             int64_t rows, int64_t columns, int64_t stride, int64_t start,
                                             int64_t length, int64_t ignore_index, float softcap, int dtype,
                                             void* stream) {
    if (rows == 0) return 0;
    return dispatch_row(dtype, softcap, columns, [&](auto type, auto capped, auto threads) {
        using T = typename decltype(type)::type;
        constexpr int n = decltype(threads)::value;
        return megapt::launch(megapt::cross_entropy_gradient_kernel<T, n, decltype(capped)::value>,
                              dim3(static_cast<unsigned>(rows)), dim3(n), 0, stream, static_cast<T*>(logits), target,
                              tokens, tokens_stride, slope, slope_stride, static_cast<int>(columns), stride, start,
                              static_cast<int>(length), ignore_index, softcap);
    });
}
