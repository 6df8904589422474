// What happens to a tile of a pruned layer's product on its way out: bias, activation, gate, residual, scattered store.
#pragma once

#include "cpu/pruned_pack.h"

namespace vk {
namespace VK_ISA {

#if VK_TIER == 2
VK_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
#elif VK_TIER == 1
VK_INLINE F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
#else
VK_INLINE F16 div(F16 a, F16 b) {
  for (int i = 0; i < LANES; ++i) a.v[i] /= b.v[i];
  return a;
}
#endif

// sigmoid(x), and sigmoid(-x) without the cancellation of 1 - sigmoid(x).
VK_INLINE F16 sigmoid(F16 x, F16* other) {
  const F16 e = exp<6>(sub(zero(), max(set1(-87.f), x))), s = div(set1(1.f), add(set1(1.f), e));
  *other = mul(e, s);
  return s;
}
VK_INLINE F16 sigmoid(F16 x) {
  F16 other;
  return sigmoid(x, &other);
}

constexpr float GELU_1 = 2.f * 0.7978845608f, GELU_3 = GELU_1 * 0.044715f;  // (1 + tanh(y)) / 2 = sigmoid(2 y)

VK_INLINE F16 gelu_argument(F16 u) { return mul(u, fma(mul(u, u), set1(GELU_3), set1(GELU_1))); }

VK_INLINE F16 activate(int act, F16 u) {
  if (act == PRUNED_GELU) return mul(u, sigmoid(gelu_argument(u)));
  return act == PRUNED_SILU ? mul(u, sigmoid(u)) : u;
}
// d act(u) / du
VK_INLINE F16 slope(int act, F16 u) {
  if (act == PRUNED_NONE) return set1(1.f);
  const bool gelu = act == PRUNED_GELU;
  F16 other;
  const F16 s = sigmoid(gelu ? gelu_argument(u) : u, &other);
  const F16 inner = gelu ? fma(mul(u, u), set1(3.f * GELU_3), set1(GELU_1)) : set1(1.f);
  return mul(s, fma(mul(u, inner), other, set1(1.f)));
}

template <class U>
VK_INLINE F16 load_any(const U* p, int64_t left) {
  if (left >= LANES) return load(p);
  U lanes[LANES] = {};
  memcpy(lanes, p, static_cast<size_t>(left) * sizeof(U));
  return load(lanes);
}

// Sixteen neighbouring columns of the result: those that a tile writes, and where in the tile's row their values start.
struct Block16 {
  Mask mask;
  int32_t from;
};
// What one strip of columns becomes in the full row: columns [first, first + width), which no other strip touches.
struct Strip {
  const Block16* blocks;
  int64_t first, width;
};

// Lane i of the result is the next value of z wherever bit i is set, and 0 elsewhere.
VK_INLINE F16 expand(Mask mask, const float* z) {
#if VK_TIER == 2
  return {_mm512_maskz_expand_ps(mask, _mm512_loadu_ps(z))};
#else
  float lanes[LANES] = {};
  for (int i = 0; i < LANES; ++i)
    if (mask >> i & 1) lanes[i] = *z++;
  return load(lanes);
#endif
}

// A row of a strip with everything between its columns: the residual (or zero) and the values spread over it, in one pass.
template <class U>
VK_INLINE void spread_row(const PrunedGemm& g, int64_t row, const Strip& strip, const float* z) {
  U* out = static_cast<U*>(g.out) + row * g.out_ld + strip.first;
  const U* residual = g.residual ? static_cast<const U*>(g.residual) + row * g.residual_ld + strip.first : nullptr;
  const Block16* block = strip.blocks;
  for (int64_t j = 0; j < strip.width; j += LANES, ++block) {
    F16 v = expand(block->mask, z + block->from);
    if (residual) v = add(load_any(residual + j, strip.width - j), v);
    store_some(out + j, v, strip.width - j);
  }
}

// One row of results: z[0, n) into `out` at `first`, or at out_cols[first ..].
template <class U>
VK_INLINE void finish_row(const PrunedGemm& g, int64_t row, int64_t first, int64_t n, const float* z) {
  const int64_t to = g.out_rows ? g.out_rows[row] : row;
  U* out = static_cast<U*>(g.out) + to * g.out_ld;
  const U* residual = g.residual ? static_cast<const U*>(g.residual) + row * g.residual_ld : nullptr;
  if (g.out_cols) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t c = g.out_cols[first + j];
      from_float(residual ? to_float(residual[c]) + z[j] : z[j], out + c);
    }
    return;
  }
  for (int64_t j = 0; j < n; j += LANES) {
    F16 v = load(z + j);
    if (residual) v = add(load_any(residual + first + j, n - j), v);
    store_some(out + first + j, v, n - j);
  }
}

// Row `row` of a tile whose columns start at `first` of the packed ones: `c` holds n products and is overwritten; it may be written up
// to the next multiple of 16 (pairs: 32).
template <class T>
VK_INLINE void epilogue_row(const PrunedGemm& g, int64_t row, int64_t first, int64_t n, const Strip* strip, float* c) {
  const int step = g.act == PRUNED_SWIGLU ? 2 * LANES : LANES;
  const int64_t written = g.act == PRUNED_SWIGLU ? g.half : g.n, start = g.act == PRUNED_SWIGLU ? first / 2 : first;
  const float* gate = g.gate ? g.gate + row / g.gate_group * written : nullptr;
  T* const u = g.u ? static_cast<T*>(g.u) + row * g.u_ld : nullptr;
  const bool plain = !g.partial && !g.bias && !u && !gate && g.act == PRUNED_NONE;
  for (int64_t j = 0, z = 0; !plain && j < n; j += step, z += LANES) {
    const int64_t at = start + z, left = written - at;
    F16 v = load(c + j);
    if (g.partial) v = add(v, load_any(g.partial + row * g.partial_ld + at, left));
    if (g.bias) v = add(v, load_any(g.bias + at, left));
    if (u) store_some(u + at, v, left);
    if (g.act == PRUNED_SWIGLU) {
      F16 w = load(c + j + LANES);
      if (g.bias) w = add(w, load_any(g.bias + g.half + at, left));
      if (u) store_some(u + g.half + at, w, left);
      v = mul(activate(PRUNED_SILU, v), w);
    } else {
      v = activate(g.act, v);
    }
    if (gate) v = mul(v, load_any(gate + at, left));
    store(c + z, v);
  }
  const int64_t count = g.act == PRUNED_SWIGLU ? n / 2 : n;
  const int64_t left = written - start < count ? written - start : count;
  if (left <= 0) return;
  if (strip) {
    g.out_bf16 ? spread_row<bf16>(g, row, *strip, c) : spread_row<float>(g, row, *strip, c);
    return;
  }
  if (g.out_bf16)
    finish_row<bf16>(g, row, start, left, c);
  else
    finish_row<float>(g, row, start, left, c);
}

// The columns that no tile writes.
template <class U>
VK_INLINE void fill_row(const PrunedGemm& g, int64_t row) {
  U* out = static_cast<U*>(g.out) + row * g.out_ld;
  const size_t bytes = static_cast<size_t>(g.out_width) * sizeof(U);
  if (g.fill == 2)
    memset(out, 0, bytes);
  else if (g.fill == 1)
    memcpy(out, static_cast<const U*>(g.residual) + row * g.residual_ld, bytes);
}
VK_INLINE void fill_rows(const PrunedGemm& g, int64_t first, int64_t last) {
  for (int64_t r = first; g.fill && r < last; ++r) g.out_bf16 ? fill_row<bf16>(g, r) : fill_row<float>(g, r);
}

}  // namespace VK_ISA
}  // namespace vk
