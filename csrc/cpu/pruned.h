// Interface between pruned_bindings.cpp and the tiers of the pruned layers. Plain data only: this header is seen by every tier.
#pragma once

#include <stdint.h>

namespace vk {

// Sixteen neighbouring memory columns: which of them are picked, and how many are before.
struct PrunedBlock {
  int32_t mask, from;
};

// An operand of a product, S[r][k] with k contracted. `across`: memory rows are k and memory columns r, else the reverse. `rows` and
// `cols` pick memory rows and columns (null: in order; a row of -1 is all zeros). On the way in a memory row may be normalised: times
// stat[row], times scale, plus shift, whose rows serve `group` memory rows each and whose columns are already picked.
struct PrunedSource {
  const void* data;
  int64_t ld;
  int across;
  const int32_t *rows, *cols;
  int run;  // `cols` is made of aligned runs of at least this many (1 or 8)
  const PrunedBlock* blocks;  // the same as `cols`, or null
  const float *stat, *scale, *shift;  // scale holds 1 + scale
  int64_t group, width;  // memory rows that share a row of scale and shift; its length
};

enum PrunedAct { PRUNED_NONE = 0, PRUNED_GELU = 1, PRUNED_SILU = 2, PRUNED_SWIGLU = 3 };

// out[:, out_cols] = residual + gate * act(A B + partial + bias), in this order, fp32 until the store. With PRUNED_SWIGLU, B's rows come
// as 16 gates, 16 values, and so on, and `half` is the number of pairs.
struct PrunedGemm {
  int bf16, threads;
  int64_t m, n, k;
  PrunedSource a, b;
  const float *partial, *bias, *gate;
  int64_t partial_ld, gate_group;
  int act;
  int64_t half;
  void* u;  // pre-activation, element type of the operands, or null
  int64_t u_ld;
  const void* residual;
  void* out;
  int64_t residual_ld, out_ld, out_width;
  int out_bf16;  // of residual and out
  const int32_t *out_rows, *out_cols;
  int fill;  // columns outside out_cols: 0 leave, 1 copy from residual, 2 zero
};

// Gradient of the pre-activation, and its sums.
struct PrunedSlope {
  int bf16, dout_bf16, threads;
  int64_t m, n;  // n: columns of u
  const void *dout, *u;
  int64_t dout_ld, u_ld;
  const int32_t* cols;  // of dout, or null
  const float* gate;
  int64_t gate_group;
  int act;
  void* du;
  int64_t du_ld;
  float *dbias, *dgate;
};

// Through modulation and RMSNorm: dx over all `width` channels from dh over the k picked ones.
struct PrunedNorm {
  int bf16, threads;
  int64_t m, k, width;
  const void *x, *dh;
  int64_t x_ld, dh_ld;
  const int32_t* cols;
  float* stat;  // [m]: 1 / rms, or null
  const float* scale;
  int64_t group;
  void* dx;
  int64_t dx_ld;
  float *dscale, *dshift;  // [m / group, k]
};

#define VK_PRUNED_TIER(tier)                          \
  namespace tier {                                    \
  int pruned_gemm(const PrunedGemm&);                 \
  int pruned_slope(const PrunedSlope&);               \
  int pruned_stat(const PrunedNorm&, double eps);     \
  int pruned_norm_backward(const PrunedNorm&);        \
  }
VK_PRUNED_TIER(portable)
VK_PRUNED_TIER(avx2)
VK_PRUNED_TIER(avx512)

}  // namespace vk
