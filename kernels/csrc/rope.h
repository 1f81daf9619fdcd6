// Launcher of rotary positions. It returns 0, or what went wrong with the launch.
#pragma once

#include <cstdint>

extern "C" {

// Turns the first `heads` heads of x [tokens, all_heads, width] into `out`, which may be x; strides in elements, 1 in
// the last dimension. cos, sin: fp32 [rows, half], contiguous. positions: of 4 or 8 bytes each; 0: token t has row
// t mod rows. back: by the opposite angle. Out of place all that does not turn is copied.
int megapt_rope(const void* x, void* out, const float* cos, const float* sin, const void* positions,
                int position_bytes, int64_t tokens, int64_t rows, int64_t half, int64_t heads, int64_t all_heads,
                int64_t width, int64_t x_token, int64_t x_head, int64_t out_token, int64_t out_head, int back,
                int dtype, void* stream);
}
