#include "glu.cuh"

#include <initializer_list>

#include "glu.h"
#include "launch.h"

namespace megapt {
namespace {

constexpr int kTooLarge = 1;  // cudaErrorInvalidValue

template <int n>
struct Number {
    static constexpr int value = n;
};

bool aligned(int64_t V, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> distances) {
    bool fits = true;
    for (const void* p : pointers) fits = fits && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    for (const int64_t d : distances) fits = fits && d % V == 0;
    return fits;
}

// Calls f(Number<elements of a vector>, Number<activation>, grid, tiles).
template <class F>
int with_tiles(int64_t rows, int64_t width, int vector, int activation, F&& f) {
    GluTiles tiles{rows, width / vector, 0, 0};
    while ((1 << tiles.shift) < kGluThreads && (1 << tiles.shift) < tiles.vectors) ++tiles.shift;
    const int64_t chunks = (tiles.vectors + (1 << tiles.shift) - 1) >> tiles.shift;
    const int64_t at_once = kGluThreads >> tiles.shift, blocks = (rows + at_once - 1) / at_once * chunks;
    if (blocks > INT32_MAX) return kTooLarge;
    tiles.chunks = static_cast<unsigned>(chunks);
    const dim3 grid(static_cast<unsigned>(blocks));
    switch (activation) {
        case kSilu: return f(Number<kSilu>{}, grid, tiles);
        case kGeluTanh: return f(Number<kGeluTanh>{}, grid, tiles);
        default: return f(Number<kGelu>{}, grid, tiles);
    }
}

}  // namespace
}  // namespace megapt

using namespace megapt;

int megapt_glu(const void* xy, int64_t stride, void* y, int64_t rows, int64_t width, int activation, int dtype,
               void* stream) {
    if (rows == 0) return 0;
    return dispatch(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        const bool vectors = aligned(V, {xy, y}, {stride, width});
        return with_tiles(rows, width, vectors ? V : 1, activation, [&](auto a, dim3 grid, GluTiles tiles) {
            constexpr int act = decltype(a)::value;
            return launch(vectors ? glu_rows<T, V, act> : glu_rows<T, 1, act>, grid, dim3(kGluThreads), 0, stream,
                          static_cast<const T*>(xy), stride, static_cast<T*>(y), tiles);
        });
    });
}

int megapt_glu_backward(const void* dy, int64_t dy_stride, const void* xy, int64_t stride, void* dxy, int64_t rows,
                        int64_t width, int activation, int dtype, void* stream) {
    if (rows == 0) return 0;
    return dispatch(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int V = 16 / sizeof(T);
        const bool vectors = aligned(V, {dy, xy, dxy}, {dy_stride, stride, width});
        return with_tiles(rows, width, vectors ? V : 1, activation, [&](auto a, dim3 grid, GluTiles tiles) {
            constexpr int act = decltype(a)::value;
            return launch(vectors ? glu_rows_backward<T, V, act> : glu_rows_backward<T, 1, act>, grid,
                          dim3(kGluThreads), 0, stream, static_cast<const T*>(dy), dy_stride,
                          static_cast<const T*>(xy), stride, static_cast<T*>(dxy), tiles);
        });
    });
}
