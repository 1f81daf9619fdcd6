#include "rope.h"

#include <initializer_list>

#include "launch.h"
#include "rope.cuh"

namespace {

using namespace megapt;

constexpr int kTooLarge = 1;  // cudaErrorInvalidValue
constexpr int64_t kLimit = 1 << 30;

// Whether groups of V elements of `size` bytes lie on their boundaries in both tensors and in the table.
bool fits(const RopeArguments& a, int V, int size) {
    const auto addresses = {reinterpret_cast<uintptr_t>(a.x), reinterpret_cast<uintptr_t>(a.out)};
    for (const uintptr_t p : addresses) {
        if (p % (static_cast<uintptr_t>(V) * size) != 0) return false;
    }
    for (const float* table : {a.cos, a.sin}) {
        if (reinterpret_cast<uintptr_t>(table) % 16 != 0) return false;
    }
    for (const int64_t n : {a.x_token, a.x_head, a.out_token, a.out_head, int64_t{a.half}}) {
        if (n % V != 0) return false;
    }
    return a.in_place || a.width % V == 0;
}

template <class T, int V>
int launch_rope(const RopeArguments& a, void* stream) {
    const int64_t turned = static_cast<int64_t>(a.heads) * a.half;
    const int64_t all = static_cast<int64_t>(a.all_heads) * a.width;
    const int64_t items = (a.in_place ? turned : all - turned) / V;
    if (items == 0 || a.tokens == 0) return 0;
    constexpr int64_t tile = kRopeThreads * kRopeItems;
    const int64_t blocks = (a.tokens * items + tile - 1) / tile;
    if (blocks > INT32_MAX) return kTooLarge;
    return launch(rope_kernel<T, V>, dim3(static_cast<unsigned>(blocks)), dim3(kRopeThreads), 0, stream, a);
}

}  // namespace

int megapt_rope(const void* x, void* out, const float* cos, const float* sin, const void* positions,
                int position_bytes, int64_t tokens, int64_t rows, int64_t half, int64_t heads, int64_t all_heads,
                int64_t width, int64_t x_token, int64_t x_head, int64_t out_token, int64_t out_head, int back,
                int dtype, void* stream) {
    if (rows >= kLimit || all_heads * width >= kLimit) return kTooLarge;
    RopeArguments a = {};
    a.x = x, a.out = out, a.cos = cos, a.sin = sin, a.positions = positions, a.tokens = tokens;
    a.x_token = x_token, a.x_head = x_head, a.out_token = out_token, a.out_head = out_head;
    a.rows = static_cast<int>(rows), a.half = static_cast<int>(half), a.heads = static_cast<int>(heads);
    a.all_heads = static_cast<int>(all_heads), a.width = static_cast<int>(width);
    a.position_bytes = position_bytes, a.back = back != 0, a.in_place = x == out;
    return dispatch(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int widest = 16 / sizeof(T);
        if (fits(a, widest, sizeof(T))) return launch_rope<T, widest>(a, stream);
        if (widest > 4 && fits(a, 4, sizeof(T))) return launch_rope<T, 4>(a, stream);
        return launch_rope<T, 1>(a, stream);
    });
}
