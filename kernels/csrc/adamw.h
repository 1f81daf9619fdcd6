// Launchers of AdamW and the squared norm. They return 0, or what went wrong with a launch.
#pragma once

#include <cstdint>

extern "C" {

// One update of `shards` flat fp32 shards. weights: bf16 or fp16 copies by `dtype`; a null array: none are written.
// rates: learning rates. decays: decoupled weight decay, in units of these. step, scale, skip: fp32 on the device.
int megapt_adamw_step(int64_t shards, float* const* masters, const float* const* grads, float* const* exp_avgs,
                      float* const* exp_avg_sqs, void* const* weights, const int64_t* sizes, const double* rates,
                      const double* decays, double beta1, double beta2, double eps, const float* step,
                      const float* scale, const float* skip, int dtype, void* stream);

// Of `megapt_squared_norm`: how many fp64 numbers its `partials` hold.
int64_t megapt_squared_norm_partials(int64_t tensors, const int64_t* sizes);

// out: fp64, the sum of the squares of all elements of flat fp32 tensors.
int megapt_squared_norm(int64_t tensors, const float* const* data, const int64_t* sizes, double* partials, double* out,
                        void* stream);
}
