// Launchers of glu.cuh. xy: rows of 2 x width elements, gate and up, `stride` apart; dy: rows of width, `dy_stride`
// apart; results contiguous. activation: 0 silu, 1 gelu by tanh, 2 gelu by the error function. 0: launched.
#pragma once

#include <cstdint>

extern "C" {
int megapt_glu(const void* xy, int64_t stride, void* y, int64_t rows, int64_t width, int activation, int dtype,
               void* stream);

int megapt_glu_backward(const void* dy, int64_t dy_stride, const void* xy, int64_t stride, void* dxy, int64_t rows,
                        int64_t width, int activation, int dtype, void* stream);
}
