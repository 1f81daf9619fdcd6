#include "flash.cuh"

#include <climits>

#include "flash.h"
#include "launch.h"

namespace megapt {
namespace {

constexpr int kInvalid = 1;  // cudaErrorInvalidValue

// Calls f(Type<T>{}, constant of the width) for what there are kernels for.
template <class F>
int with_kernels(int dtype, int64_t width, F&& f) {
    using Narrow = std::integral_constant<int, 64>;
    using Wide = std::integral_constant<int, 128>;
    if (width != 64 && width != 128) return kInvalid;
    switch (dtype) {
        case kBFloat16: return width == 64 ? f(Type<bf16>{}, Narrow{}) : f(Type<bf16>{}, Wide{});
        case kFloat16: return width == 64 ? f(Type<fp16>{}, Narrow{}) : f(Type<fp16>{}, Wide{});
        default: return kNoSuchDType;
    }
}

FlashArguments arguments(Heads q, Heads k, Heads v, const void* starts, const void* ends, int64_t tokens,
                         int64_t heads, int64_t kv_heads, int causal, int64_t window, double scale, double softcap) {
    constexpr double log2e = 1.4426950408889634;
    FlashArguments f{q, k, v, static_cast<const int*>(starts), static_cast<const int*>(ends)};
    f.tokens = static_cast<int>(tokens);
    f.heads = static_cast<int>(heads);
    f.group = static_cast<int>(heads / kv_heads);
    f.window = window > 0 && window < INT_MAX ? static_cast<int>(window) : INT_MAX;
    f.causal = causal != 0;
    f.scale = static_cast<float>(scale);
    f.inner = static_cast<float>(softcap > 0 ? scale / softcap : scale * log2e);
    f.outer = static_cast<float>(softcap > 0 ? softcap * log2e : 0.0);
    return f;
}

dim3 blocks(int64_t tokens, int rows, int64_t heads) {
    return dim3(static_cast<unsigned>((tokens + rows - 1) / rows), static_cast<unsigned>(heads));
}

}  // namespace
}  // namespace megapt

using namespace megapt;

int megapt_flash(const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
                 const void* v, int64_t v_token, int64_t v_head, const void* starts, const void* ends, void* out,
                 void* lse, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int causal, int64_t window,
                 double scale, double softcap, int dtype, void* stream) {
    if (tokens == 0) return 0;
    const FlashArguments f =
        arguments({q, q_token, q_head}, {k, k_token, k_head}, {v, v_token, v_head}, starts, ends, tokens, heads,
                  kv_heads, causal, window, scale, softcap);
    return with_kernels(dtype, width, [&](auto type, auto constant) {
        using T = typename decltype(type)::type;
        constexpr int D = decltype(constant)::value;
        return launch(flash_forward<T, D>, blocks(tokens, kQueries<D>, heads), dim3(kForwardThreads<D>),
                      4 * kKeys * D * sizeof(T), stream, f, static_cast<T*>(out), static_cast<float*>(lse));
    });
}

int megapt_flash_backward(const void* dy, int64_t dy_token, int64_t dy_head, const void* q, int64_t q_token,
                          int64_t q_head, const void* k, int64_t k_token, int64_t k_head, const void* v,
                          int64_t v_token, int64_t v_head, const void* starts, const void* ends, const void* out,
                          const void* lse, void* along, void* dq, void* dk, void* dv, int64_t tokens, int64_t heads,
                          int64_t kv_heads, int64_t width, int causal, int64_t window, double scale, double softcap,
                          int dtype, void* stream) {
    if (tokens == 0) return 0;
    const FlashArguments f =
        arguments({q, q_token, q_head}, {k, k_token, k_head}, {v, v_token, v_head}, starts, ends, tokens, heads,
                  kv_heads, causal, window, scale, softcap);
    return with_kernels(dtype, width, [&](auto type, auto constant) {
        using T = typename decltype(type)::type;
        constexpr int D = decltype(constant)::value;
        const Heads slopes{dy, dy_token, dy_head};
        const int64_t rows = tokens * heads, at_once = kAlongThreads / (D / 8);
        if ((rows + at_once - 1) / at_once > INT_MAX) return kInvalid;
        int code = launch(flash_along<T, D>, dim3(static_cast<unsigned>((rows + at_once - 1) / at_once)),
                          dim3(kAlongThreads), 0, stream, static_cast<const T*>(out), slopes,
                          static_cast<float*>(along), f.tokens, f.heads);
        if (code != 0) return code;
        FlashGradients g{slopes, static_cast<const float*>(lse), static_cast<const float*>(along), dk, dv};
        constexpr int tiles = (2 * kOwn + 4 * kMet) * D * sizeof(T);
        code = launch(flash_backward<T, D, true>, blocks(tokens, kOwn, kv_heads), dim3(kBackwardThreads),
                      tiles + 2 * sizeof(QueryNumbers<kMet>), stream, f, g);
        if (code != 0) return code;
        g.first = dq, g.second = nullptr;
        return launch(flash_backward<T, D, false>, blocks(tokens, kOwn, heads), dim3(kBackwardThreads),
                      tiles + sizeof(QueryNumbers<kOwn>), stream, f, g);
    });
}
