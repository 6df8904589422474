// The packed matrix micro-kernel of the CPU tiers: C[rows x 16*NP] (+)= A . B, fp32 accumulators.
//
// Everything is counted in 32-bit *lanes*. In fp32 a lane is one element and a step of k is one element. With the AVX-512 bf16
// dot product a lane is a pair of bf16 that are neighbours in k, and a step of k takes both: the same loops, half the steps
// (Steps<T>::PAIR). The other tiers widen bf16 to fp32 when packing. Three packed forms:
//
//   rows    A  row-major, [row][k lanes]                     read by broadcasting one lane at a time
//   panels  B  transposed, [panel of 16 columns][k][16]      for products that contract over the channels (Q K^T, dO V^T)
//   depth   B  [k][columns padded to 16]                     for products that contract over tokens (P V, dS K, P^T dO, dS^T Q)
//
// A may also be read transposed (TA), which turns the P of P V into the P^T of P^T dO without moving it.
#pragma once

#include "cpu/vec.h"

namespace vk {
namespace VK_ISA {

#if VK_TIER == 2
constexpr int MR = 8;  // 8 x 32: 16 accumulators, 10 loads for 16 multiply-adds, and 8 divides the usual frame lengths
constexpr int NP = 2;
#elif VK_TIER == 1
constexpr int MR = 4;  // 4 x 16: 8 accumulators of 16 registers cover 2 multiply-add units of 4 cycles
constexpr int NP = 1;
#else
constexpr int MR = 4;  // the accumulators live in L1 here: what matters is that the loop over lanes is vectorised
constexpr int NP = 1;
#endif
constexpr int ROW_STEP = 4;  // row counts handed to gemm() are multiples of this

// How elements of type T enter a product: PAIR elements of k per lane.
template <class T>
struct Steps {
  static constexpr int PAIR = 1;
};
#if VK_TIER == 2
template <>
struct Steps<bf16> {
  static constexpr int PAIR = 2;
};
#endif

template <int PAIR>
VK_INLINE F16 mac(F16 a, F16 b, F16 c) {
#if VK_TIER == 2
  if (PAIR == 2)
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
#endif
  return fma(a, b, c);
}

// A stretch of k: `steps` consecutive lanes of A against B starting at lane offset `b`.
struct Run {
  ptrdiff_t b;
  int steps;
};

// One register block. `sa` is the distance in lanes between rows of A (TA: between steps of k), `sb` between steps of B.
// b0 and b1 are the two column panels (b1 unused for one).
template <int PAIR, int M, int P, bool TA, bool ACC>
VK_INLINE void block(const float* a, ptrdiff_t sa, const float* b0, const float* b1, ptrdiff_t sb, const Run* runs, int n_runs,
                     float* c, ptrdiff_t sc) {
  F16 acc[M][P];
  for (int r = 0; r < M; ++r)
    for (int p = 0; p < P; ++p) acc[r][p] = zero();
  const ptrdiff_t row = TA ? 1 : sa, step = TA ? sa : 1;
  for (int i = 0; i < n_runs; ++i) {
    const float* x0 = b0 + runs[i].b;
    const float* x1 = P > 1 ? b1 + runs[i].b : nullptr;
    for (int k = runs[i].steps; k > 0; --k) {
#if VK_TIER == 0
      for (int r = 0; r < M; ++r) add_scaled(a[r * row], x0, acc[r][0].v);
#else
      F16 b[P];
      b[0] = load(x0);
      if (P > 1) b[P - 1] = load(x1);
      for (int r = 0; r < M; ++r) {
        F16 s = set1(a[r * row]);
        for (int p = 0; p < P; ++p) acc[r][p] = mac<PAIR>(s, b[p], acc[r][p]);
      }
#endif
      a += step;
      x0 += sb;
      if (P > 1) x1 += sb;
    }
  }
  // C joins at the end, not as the start value: sums of sums of a few hundred terms round less than one long sum.
  for (int r = 0; r < M; ++r)
    for (int p = 0; p < P; ++p) {
      float* at = c + r * sc + p * LANES;
      store(at, ACC ? add(load(at), acc[r][p]) : acc[r][p]);
    }
}

// `rows` (a multiple of ROW_STEP) by P panels. The strides of the score tile are compile-time constants at the call sites, so that
// the rows of A become displacements of one pointer.
template <int PAIR, int P, bool TA, bool ACC>
VK_INLINE void strip(int rows, const float* a, ptrdiff_t sa, const float* b0, const float* b1, ptrdiff_t sb, const Run* runs,
                     int n_runs, float* c, ptrdiff_t sc) {
  int r = 0;
  for (; r + MR <= rows; r += MR)
    block<PAIR, MR, P, TA, ACC>(a + r * (TA ? 1 : sa), sa, b0, b1, sb, runs, n_runs, c + r * sc, sc);
  if (MR > ROW_STEP && r < rows)
    block<PAIR, ROW_STEP, P, TA, ACC>(a + r * (TA ? 1 : sa), sa, b0, b1, sb, runs, n_runs, c + r * sc, sc);
}

// Longest sum of products kept in one accumulator when contracting over channels: beyond it fp32 sums would round more than those
// of a BLAS, which also sums by parts. Without fused multiply-add each product is rounded too, so sums must be shorter.
constexpr int MAX_CHANNELS = VK_TIER == 0 ? 32 : 128;

template <int PAIR, bool ACC>
VK_INLINE void gemm_panels_part(int rows, const float* a, ptrdiff_t sa, const float* panels, ptrdiff_t size, int k,
                                const int32_t* list, int n, float* c, ptrdiff_t sc) {
  const Run run{0, k};
  int i = 0;
  for (; NP > 1 && i + 1 < n; i += 2)
    strip<PAIR, NP, false, ACC>(rows, a, sa, panels + list[i] * size, panels + list[i + 1] * size, LANES, &run, 1, c + i * LANES,
                                sc);
  for (; i < n; ++i) strip<PAIR, 1, false, ACC>(rows, a, sa, panels + list[i] * size, nullptr, LANES, &run, 1, c + i * LANES, sc);
}

// C[rows, 16 i ..] = A . panel[list[i]] for i in [0, n): `panels` in the transposed form, k lanes deep.
template <int PAIR>
VK_INLINE void gemm_panels(int rows, const float* a, ptrdiff_t sa, const float* panels, int k, const int32_t* list, int n, float* c,
                           ptrdiff_t sc) {
  const ptrdiff_t size = static_cast<ptrdiff_t>(k) * LANES;
  const int parts = (k * PAIR + MAX_CHANNELS - 1) / MAX_CHANNELS, part = (k + parts - 1) / parts;
  gemm_panels_part<PAIR, false>(rows, a, sa, panels, size, part, list, n, c, sc);
  for (int at = part; at < k; at += part)
    gemm_panels_part<PAIR, true>(rows, a + at, sa, panels + at * LANES, size, k - at < part ? k - at : part, list, n, c, sc);
}

// C[rows, cols] += A (or A^T) . B over the given runs of k: B in the depth form with `cols` lanes (a multiple of 16) per step.
template <int PAIR, bool TA>
VK_INLINE void gemm_depth(int rows, const float* a, ptrdiff_t sa, const float* b, int cols, const Run* runs, int n_runs, float* c,
                          ptrdiff_t sc) {
  int j = 0;
  for (; NP > 1 && j + 2 * LANES <= cols; j += 2 * LANES)
    strip<PAIR, NP, TA, true>(rows, a, sa, b + j, b + j + LANES, cols, runs, n_runs, c + j, sc);
  for (; j < cols; j += LANES) strip<PAIR, 1, TA, true>(rows, a, sa, b + j, nullptr, cols, runs, n_runs, c + j, sc);
}

// ------------------------------------------------------------------------------------------------ packing
// Sources are rows of D elements (D a multiple of 8) given by one pointer each; a null pointer is a row of zeros.

constexpr int padded(int d) { return (d + LANES - 1) / LANES * LANES; }

// A row's elements are all finite: x * 0 is 0 for finite x and NaN otherwise, so no comparison per element is needed.
template <class T>
VK_INLINE bool finite_row(const T* p, int d) {
  F16 s = zero();
  for (int i = 0; i < d; i += LANES) s = fma(load_cols(p + i, d - i), zero(), s);
  return sum(s) == 0.f;
}

// One panel of the transposed form: up to 16 rows, dst [k lanes][16]. Rows whose bit in `poison` is set become NaN.
template <class T>
VK_INLINE void pack_panel(const T* const* rows, int d, Mask poison, float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  for (int j = 0; j < LANES; ++j) {
    const T* p = rows[j];
    if (PAIR == 2) {
      uint32_t lane = (poison >> j) & 1 ? 0x7fc07fc0u : 0u;
      for (int k = 0; k < d / 2; ++k) {
        if (p && !((poison >> j) & 1)) memcpy(&lane, p + 2 * k, 4);
        memcpy(dst + k * LANES + j, &lane, 4);
      }
    } else if (p && !((poison >> j) & 1)) {
      for (int k = 0; k < d; ++k) dst[k * LANES + j] = to_float(p[k]);
    } else {
      const float fill = p ? NAN : 0.f;
      for (int k = 0; k < d; ++k) dst[k * LANES + j] = fill;
    }
  }
}

// PAIR rows of the depth form: dst [padded(d)] lanes. In pairs the two rows are interleaved element by element.
template <class T>
VK_INLINE void pack_depth(const T* const* rows, int d, float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  const int dp = padded(d);
  int i = 0;
  if (PAIR == 1) {
    for (; i < dp; i += LANES) store(dst + i, rows[0] ? load_cols(rows[0] + i, d - i) : zero());
    return;
  }
#if VK_TIER == 2
  if (PAIR == 2 && rows[0] && rows[1])
    for (; i + LANES <= d; i += LANES)
      store_pairs(dst + i, reinterpret_cast<const bf16*>(rows[0] + i), reinterpret_cast<const bf16*>(rows[1] + i));
#endif
  for (; i < dp; ++i) {
    uint16_t lane[2] = {0, 0};
    for (int s = 0; s < 2; ++s)
      if (rows[s] && i < d) memcpy(lane + s, rows[s] + i, 2);
    memcpy(dst + i, lane, 4);
  }
}

// One row of the row-major form, padded(d) / PAIR lanes; `negate` flips the sign (exact in every format).
template <class T>
VK_INLINE void pack_row(const T* row, int d, bool negate, float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  const int lanes = padded(d) / PAIR;
  if (PAIR == 1) {
    const F16 sign = set1(negate ? -1.f : 1.f);
    for (int i = 0; i < lanes; i += LANES) store(dst + i, row ? mul(load_cols(row + i, d - i), sign) : zero());
    return;
  }
  memset(dst, 0, static_cast<size_t>(lanes) * 4);
  if (row) memcpy(dst, row, static_cast<size_t>(d) * 2);
  for (int i = 0; negate && i < lanes; ++i) {
    uint32_t lane;
    memcpy(&lane, dst + i, 4);
    lane ^= 0x80008000u;
    memcpy(dst + i, &lane, 4);
  }
}

}  // namespace VK_ISA
}  // namespace vk
