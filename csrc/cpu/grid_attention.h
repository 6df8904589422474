// Interface between bindings.cpp and the tiers of grid attention. Plain data only: this header is seen by every tier.
#pragma once

#include <stdint.h>

namespace vk {

// A [B, H, L, ...] tensor: strides in elements, the last dimension contiguous.
struct Strided {
  void* data;
  int64_t b, h, l;
};

struct GridArgs {
  int bf16;  // element type of q, k, v, out and their gradients: 0 fp32, 1 bf16
  int threads;
  int64_t batch, heads, kv_heads, length, dim;
  int64_t n_frames, frame_len, n_text;
  int text_front, text_visible;
  const int32_t *q_ptr, *q_runs, *k_ptr, *k_runs;
  const uint8_t* valid;
  const int32_t *kv_len, *text_len;
  int64_t valid_stride, kv_stride, text_stride;  // per batch item; 0 = shared
  float scale;
  void* workspace;
  int64_t workspace_bytes;
  int64_t* work;  // null, or {executed, useful} score elements, added to
  Strided q, k, v, out, lse;                // lse fp32
  Strided dout, dlse, dq, dk, dv;           // backward only; dout.data and dlse.data may be null
};

#define VK_GRID_ATTENTION_TIER(tier)                                 \
  namespace tier {                                                   \
  void grid_attention_forward(const GridArgs&);                      \
  void grid_attention_backward(const GridArgs&);                     \
  int64_t grid_attention_workspace(const GridArgs&, bool backward);  \
  }
VK_GRID_ATTENTION_TIER(portable)
VK_GRID_ATTENTION_TIER(avx2)
VK_GRID_ATTENTION_TIER(avx512)

}  // namespace vk
