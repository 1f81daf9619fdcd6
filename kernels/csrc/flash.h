// Launchers of flash.cuh: bfloat16 and float16, heads of 64 and 128. NAME_token, NAME_head: elements from one token or
// head to the next of q, dy [tokens, heads, width] and k, v [tokens, kv_heads, width], multiples of 8, addresses of 16
// bytes; results are contiguous. starts, ends: int32 [tokens], the bounds of each token's document. window: 0 for all;
// softcap: 0 for none. lse, along: fp32 [heads, tokens]; along is scratch. 0: launched.
#pragma once

#include <cstdint>

extern "C" {
int megapt_flash(const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
                 const void* v, int64_t v_token, int64_t v_head, const void* starts, const void* ends, void* out,
                 void* lse, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int causal, int64_t window,
                 double scale, double softcap, int dtype, void* stream);

int megapt_flash_backward(const void* dy, int64_t dy_token, int64_t dy_head, const void* q, int64_t q_token,
                          int64_t q_head, const void* k, int64_t k_token, int64_t k_head, const void* v,
                          int64_t v_token, int64_t v_head, const void* starts, const void* ends, const void* out,
                          const void* lse, void* along, void* dq, void* dk, void* dv, int64_t tokens, int64_t heads,
                          int64_t kv_heads, int64_t width, int causal, int64_t window, double scale, double softcap,
                          int dtype, void* stream);
}
