// Interface between bindings.cpp and the tiers of attention motion flow. Plain data only: this header is seen by every tier.
#pragma once

#include <stdint.h>

namespace vk {

// A [B, G, Hg, N, d] tensor: strides in elements, the last dimension contiguous.
struct AmfView {
  void* data;
  int64_t b, g, h, l;
};

struct AmfArgs {
  int bf16;  // element type of q, k and their gradients: 0 fp32, 1 bf16
  int threads;
  int64_t batch, groups, heads, dim;  // `heads` of a group lie side by side in one logit
  int64_t frames, height, width, pairs;
  // Query frames by key frame j: entries seen[2 e] = query frame, seen[2 e + 1] = row of the result, first[j] <= e < first[j + 1].
  const int32_t *first, *seen;
  float scale;
  void* workspace;
  int64_t workspace_bytes;
  AmfView q, k, dq, dk;
  // [B, G, P, S], mean and dmean [B, G, P, S, 2]; contiguous; null where not wanted. A vote's index and top are [B, P, S].
  float *mean, *lse, *top, *entropy;
  int32_t* index;
  const float *dmean, *dlse;
};

enum AmfKind { AMF_FORWARD, AMF_VOTE, AMF_BACKWARD };

#define VK_AMF_TIER(tier)                         \
  namespace tier {                                \
  void amf_run(const AmfArgs&, int kind);         \
  int64_t amf_workspace(const AmfArgs&, int kind); \
  }
VK_AMF_TIER(portable)
VK_AMF_TIER(avx2)
VK_AMF_TIER(avx512)

}  // namespace vk
