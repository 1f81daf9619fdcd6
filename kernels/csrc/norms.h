// Launchers of norms.cuh. Pointers to rows, which are contiguous, `*_stride` elements apart; dtypes as common.cuh
// numbers them; results contiguous. bias null: RMSNorm, without mean. residual and sum, ds: null or not. 0: launched.
#pragma once

#include <cstdint>

extern "C" {
// How many partial sums of the weight's (and bias's) gradient the backward makes at most: [blocks, width] floats each.
int64_t megapt_norm_backward_blocks(int64_t rows, int64_t width, int dtype);

int megapt_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, const void* weight,
                const void* bias, float offset, float eps, void* y, void* sum, float* mean, float* rstd, int64_t rows,
                int64_t width, int dtype, int weight_dtype, void* stream);

// db null: RMSNorm, without mean. partial: room for the partial sums, twice with LayerNorm.
int megapt_norm_backward(const void* dy, int64_t dy_stride, const void* ds, int64_t ds_stride, const void* s,
                         int64_t s_stride, const void* weight, float offset, const float* mean, const float* rstd,
                         void* dx, void* dw, void* db, float* partial, int64_t blocks, int64_t rows, int64_t width,
                         int dtype, int weight_dtype, void* stream);
}
