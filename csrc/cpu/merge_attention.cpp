// Merging partial attention results by their log-sum-exps:
//   lse = log sum_i s_i exp(lse_i),  a_i = s_i exp(lse_i - lse),  O = sum_i a_i O_i           (s_i = +1 or -1)
// and backward
//   dO_i = a_i dO,  dlse_i = a_i (dO . O_i - sum_j a_j dO . O_j + dlse).
// A part with lse_i = -inf saw no key: its weight is 0 and its O_i is not read.
#include "cpu/merge_attention.h"

#include "cpu/vec.h"

namespace vk {
namespace VK_ISA {
namespace {

template <class T>
VK_INLINE T* at(const Strided& x, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + l * x.l;
}

template <class T>
VK_INLINE float dot(const T* x, const T* y, int d) {
  F16 s = zero();
  for (int c = 0; c < d; c += LANES) s = fma(load_cols(x + c, d - c), load_cols(y + c, d - c), s);
  return sum(s);
}

// Largest lse of a row and the signed sum of exp(lse_i - largest); the sum is 0 when no key is left: no part saw any, or
// everything that was added is subtracted again.
VK_INLINE double signed_total(const MergeArgs& a, int64_t b, int64_t h, int64_t l, float* largest) {
  float top = -INFINITY;
  for (int i = 0; i < a.n_parts; ++i) {
    const float x = *at<const float>(a.parts[i].lse, b, h, l);
    top = x > top || x != x ? x : top;
  }
  *largest = top;
  if (top == -INFINITY) return 0.f;
  double total = 0;
  for (int i = 0; i < a.n_parts; ++i) {
    const double weight = expf(*at<const float>(a.parts[i].lse, b, h, l) - top);
    total += a.parts[i].sign * weight;
  }
  return total <= 0 ? 0 : total;
}

template <class T>
VK_INLINE void merge_row(const MergeArgs& a, int64_t b, int64_t h, int64_t l) {
  const int d = static_cast<int>(a.dim);
  float top;
  const double total = signed_total(a, b, h, l, &top);
  *at<float>(a.lse, b, h, l) = total == 0 ? -INFINITY : static_cast<float>(top + log(total));
  T* out = at<T>(a.out, b, h, l);
  // Blocks of columns that fit the registers, so that one weight serves many columns.
  constexpr int BLOCK = 8;
  for (int c0 = 0; c0 < d; c0 += BLOCK * LANES) {
    const int n = (d - c0 + LANES - 1) / LANES < BLOCK ? (d - c0 + LANES - 1) / LANES : BLOCK;
    F16 sum[BLOCK];
    for (int c = 0; c < BLOCK; ++c) sum[c] = zero();
    for (int i = 0; i < a.n_parts && total != 0; ++i) {
      const float x = *at<const float>(a.parts[i].lse, b, h, l);
      if (x == -INFINITY) continue;
      const F16 weight = set1(static_cast<float>(a.parts[i].sign * (expf(x - top) / total)));
      const T* part = at<const T>(a.parts[i].out, b, h, l) + c0;
      for (int c = 0; c < n; ++c) sum[c] = fma(weight, load_cols(part + c * LANES, d - c0 - c * LANES), sum[c]);
    }
    for (int c = 0; c < n; ++c) store_cols(out + c0 + c * LANES, sum[c], d - c0 - c * LANES);
  }
}

template <class T>
VK_INLINE void unmerge_row(const MergeArgs& a, int64_t b, int64_t h, int64_t l) {
  const int d = static_cast<int>(a.dim);
  float top;
  const double total = signed_total(a, b, h, l, &top);
  const T* dout = a.dout.data ? at<const T>(a.dout, b, h, l) : nullptr;
  // dO . O from the parts and in double: the stored O may be rounded to bf16, and the difference dO . O_i - dO . O cancels.
  double mean = 0;
  for (int i = 0; i < a.n_parts && dout && total != 0; ++i) {
    const float x = *at<const float>(a.parts[i].lse, b, h, l);
    if (x != -INFINITY)
      mean += a.parts[i].sign * (expf(x - top) / total) * dot(dout, at<const T>(a.parts[i].out, b, h, l), d);
  }
  const float incoming = a.dlse.data ? *at<const float>(a.dlse, b, h, l) : 0.f;
  for (int i = 0; i < a.n_parts; ++i) {
    const MergePart& part = a.parts[i];
    const float x = *at<const float>(part.lse, b, h, l);
    const bool used = x != -INFINITY && total != 0;
    const double weight = used ? part.sign * (expf(x - top) / total) : 0;
    T* grad = at<T>(part.dout, b, h, l);
    for (int c = 0; c < d; c += LANES)
      store_cols(grad + c, used && dout ? mul(set1(static_cast<float>(weight)), load_cols(dout + c, d - c)) : zero(), d - c);
    const double inner = used && dout ? dot(dout, at<const T>(part.out, b, h, l), d) : 0.f;
    *at<float>(part.dlse, b, h, l) = used ? static_cast<float>(weight * (inner - mean + incoming)) : 0.f;
  }
}

template <class T, bool BACKWARD>
void each_row(const MergeArgs& a) {
  const int64_t rows = a.batch * a.heads * a.length;
  const int threads = rows * a.dim < 65536 || a.threads < 1 ? 1 : a.threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t l = i % a.length, bh = i / a.length;
    if (BACKWARD)
      unmerge_row<T>(a, bh / a.heads, bh % a.heads, l);
    else
      merge_row<T>(a, bh / a.heads, bh % a.heads, l);
  }
}

}  // namespace

void merge_attention_forward(const MergeArgs& a) { a.bf16 ? each_row<bf16, false>(a) : each_row<float, false>(a); }
void merge_attention_backward(const MergeArgs& a) { a.bf16 ? each_row<bf16, true>(a) : each_row<float, true>(a); }

}  // namespace VK_ISA
}  // namespace vk
