// Launchers of cross entropy over this rank's columns of the logits; see cross_entropy.cuh for what they compute.
// Each returns 0, or a cudaError_t. dtype: of the logits, a megapt::DType.
#pragma once

#include <cstdint>

extern "C" {

// stats [3, rows] fp32 of logits [rows, columns], whose rows begin `stride` elements apart.
int megapt_cross_entropy_stats(const void* logits, const int64_t* target, float* stats, int64_t rows, int64_t columns,
                               int64_t stride, int64_t start, int64_t length, int64_t ignore_index, float softcap,
                               int dtype, void* stream);

// losses [rows] and tokens [4, rows] of every [ranks, 3, rows].
int megapt_cross_entropy_combine(const float* every, const int64_t* target, float* losses, float* tokens, int64_t ranks,
                                 int64_t rows, int64_t ignore_index, float z_loss, void* stream);

// The gradient in the logits' place. tokens [4, rows], its rows `tokens_stride` apart; slope: that of each row's loss,
// `slope_stride` apart, or null for 1.
int megapt_cross_entropy_gradient(void* logits, const int64_t* target, const float* tokens, int64_t tokens_stride,
                                  const float* slope, int64_t slope_stride, int64_t rows, int64_t columns,
                                  int64_t stride, int64_t start, int64_t length, int64_t ignore_index, float softcap,
                                  int dtype, void* stream);
}
