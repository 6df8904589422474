// Interface between bindings.cpp and the tiers of merge_attention. Plain data only.
#pragma once

#include "cpu/grid_attention.h"

namespace vk {

struct MergePart {
  Strided out, lse;    // one partial result
  Strided dout, dlse;  // backward: its gradients
  int sign;
};

struct MergeArgs {
  int bf16, threads, n_parts;
  int64_t batch, heads, length, dim;
  const MergePart* parts;
  Strided out, lse;    // forward: the merged result
  Strided dout, dlse;  // backward: its incoming gradients, data may be null
};

#define VK_MERGE_ATTENTION_TIER(tier)              \
  namespace tier {                                 \
  void merge_attention_forward(const MergeArgs&);  \
  void merge_attention_backward(const MergeArgs&); \
  }
VK_MERGE_ATTENTION_TIER(portable)
VK_MERGE_ATTENTION_TIER(avx2)
VK_MERGE_ATTENTION_TIER(avx512)

}  // namespace vk
