// Launchers of the experts' permutation. They return 0, or what went wrong with a launch. Slots are tokens x choices,
// fewer than 2^30; experts at most 1024; rows contiguous.
#pragma once

#include <cstdint>

extern "C" {

// int32 numbers that `megapt_moe_sort` works in.
int64_t megapt_moe_scratch(int64_t slots, int64_t experts);

// experts_of: [slots], `id_bytes` each. order [slots], place [slots] and counts [experts] are written.
int megapt_moe_sort(const void* expert_of, int id_bytes, int64_t slots, int64_t experts, int* scratch, int64_t* order,
                    int* place, int64_t* counts, void* stream);

// place of an order.
int megapt_moe_invert(const int64_t* order, int64_t slots, int* place, void* stream);

// rows [tokens x choices, width] of x [tokens, width].
int megapt_moe_spread(const void* x, const int* place, const int64_t* order, void* rows, int64_t tokens,
                      int64_t choices, int64_t width, int dtype, void* stream);

// out [tokens, width]: sums of rows times weights [tokens, choices], or of rows if these are null.
int megapt_moe_gather(const void* rows, const int* place, const float* weights, void* out, int64_t tokens,
                      int64_t choices, int64_t width, int dtype, void* stream);

// Its gradients.
int megapt_moe_gather_backward(const void* dy, const void* rows, const int64_t* order, const int* place,
                               const float* weights, void* drows, float* dweights, int64_t tokens, int64_t choices,
                               int64_t width, int dtype, void* stream);
}
