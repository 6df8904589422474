// F16: sixteen fp32 lanes, the one vector type of the CPU kernels.
//
// Sixteen lanes are one AVX-512 register, two AVX2 registers or a plain array that the compiler vectorises; with the same width in
// every tier, packing, softmax and merging are written once. `Mask` holds one bit per lane (bit 0 = lane 0).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/isa.h"
#if VK_TIER > 0
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header starts "undefined" registers from themselves and then warns of it wherever they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace vk {
namespace VK_ISA {

constexpr int LANES = 16;
using Mask = uint16_t;
constexpr Mask FULL = 0xffff;

struct bf16 {
  uint16_t bits;
};

VK_INLINE float to_float(float x) { return x; }
VK_INLINE float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
VK_INLINE bf16 to_bf16(float f) {  // round to nearest even; a NaN stays a (quiet) NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
VK_INLINE void from_float(float x, float* out) { *out = x; }
VK_INLINE void from_float(float x, bf16* out) { *out = to_bf16(x); }

// ------------------------------------------------------------------------------------------------ AVX-512
#if VK_TIER == 2

struct F16 {
  __m512 v;
};
VK_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
VK_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
VK_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
VK_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
VK_INLINE F16 load(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
VK_INLINE void store(bf16* p, F16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
VK_INLINE void store_pairs(float* p, F16 a, F16 b) {  // lane i = (bf16 of a[i], bf16 of b[i])
  alignas(64) static constexpr uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(zip), both));
}
VK_INLINE void store_pairs(float* p, const bf16* a, const bf16* b) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(p, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
}
VK_INLINE F16 load_half(const float* p) { return {_mm512_maskz_loadu_ps(0xff, p)}; }
VK_INLINE void store_half(float* p, F16 a) { _mm512_mask_storeu_ps(p, 0xff, a.v); }
VK_INLINE F16 load_half(const bf16* p) {
  __m256i h = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_maskz_mov_ps(0xff, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)))};
}
VK_INLINE void store_half(bf16* p, F16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128((__m256i)_mm512_cvtneps_pbh(a.v)));
}
VK_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
VK_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
VK_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
VK_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VK_INLINE F16 fms(F16 a, F16 b, F16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
VK_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // NaN in either: b, as the hardware does
VK_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
VK_INLINE F16 select(Mask m, F16 a, F16 b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
VK_INLINE F16 keep(Mask m, F16 a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
VK_INLINE float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
VK_INLINE float max_lane(F16 a) { return _mm512_reduce_max_ps(a.v); }
VK_INLINE F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VK_INLINE F16 ldexp(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// ------------------------------------------------------------------------------------------------ AVX2
#elif VK_TIER == 1

struct F16 {
  __m256 lo, hi;
};
VK_INLINE F16 set1(float x) {
  __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
VK_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VK_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VK_INLINE void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
VK_INLINE __m256 widen(const bf16* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
VK_INLINE void narrow(bf16* p, __m256 x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan), 16);
  __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}
VK_INLINE F16 load(const bf16* p) { return {widen(p), widen(p + 8)}; }
VK_INLINE void store(bf16* p, F16 a) {
  narrow(p, a.lo);
  narrow(p + 8, a.hi);
}
VK_INLINE F16 load_half(const float* p) { return {_mm256_loadu_ps(p), _mm256_setzero_ps()}; }
VK_INLINE void store_half(float* p, F16 a) { _mm256_storeu_ps(p, a.lo); }
VK_INLINE F16 load_half(const bf16* p) { return {widen(p), _mm256_setzero_ps()}; }
VK_INLINE void store_half(bf16* p, F16 a) { narrow(p, a.lo); }
VK_INLINE F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
VK_INLINE F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
VK_INLINE F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
VK_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
VK_INLINE F16 fms(F16 a, F16 b, F16 c) { return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)}; }
VK_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
VK_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
VK_INLINE __m256 spread(int m) {  // bit i of m -> all bits of lane i
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(m), bit), bit));
}
VK_INLINE F16 select(Mask m, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, spread(m)), _mm256_blendv_ps(b.hi, a.hi, spread(m >> 8))};
}
VK_INLINE F16 keep(Mask m, F16 a) { return {_mm256_and_ps(a.lo, spread(m)), _mm256_and_ps(a.hi, spread(m >> 8))}; }
VK_INLINE float sum(F16 a) {
  __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
VK_INLINE float max_lane(F16 a) {
  __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
VK_INLINE F16 round(F16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
VK_INLINE __m256 ldexp8(__m256 a, __m256 n) {  // in two steps, so that subnormal results and 2^128 need no special case
  __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
  __m256i e1 = _mm256_slli_epi32(_mm256_add_epi32(h, bias), 23);
  __m256i e2 = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(e1)), _mm256_castsi256_ps(e2));
}
VK_INLINE F16 ldexp(F16 a, F16 n) { return {ldexp8(a.lo, n.lo), ldexp8(a.hi, n.hi)}; }

// ------------------------------------------------------------------------------------------------ portable
#else

struct F16 {
  float v[LANES];
};
// Without the pragma GCC unrolls these loops into scalar code before its vectoriser sees them.
#if defined(_OPENMP) && !defined(_MSC_VER)
#define VK_EACH _Pragma("omp simd") for (int i = 0; i < LANES; ++i)
#else
#define VK_EACH for (int i = 0; i < LANES; ++i)
#endif
VK_INLINE F16 set1(float x) {
  F16 r;
  VK_EACH r.v[i] = x;
  return r;
}
VK_INLINE F16 zero() { return set1(0.f); }
template <class T>
VK_INLINE F16 load(const T* p) {
  F16 r;
  VK_EACH r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
VK_INLINE void store(T* p, F16 a) {
  VK_EACH from_float(a.v[i], p + i);
}
template <class T>
VK_INLINE F16 load_half(const T* p) {
  F16 r = zero();
  for (int i = 0; i < 8; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
VK_INLINE void store_half(T* p, F16 a) {
  for (int i = 0; i < 8; ++i) from_float(a.v[i], p + i);
}
VK_INLINE F16 add(F16 a, F16 b) {
  VK_EACH a.v[i] += b.v[i];
  return a;
}
VK_INLINE F16 sub(F16 a, F16 b) {
  VK_EACH a.v[i] -= b.v[i];
  return a;
}
VK_INLINE F16 mul(F16 a, F16 b) {
  VK_EACH a.v[i] *= b.v[i];
  return a;
}
VK_INLINE F16 fma(F16 a, F16 b, F16 c) {
  VK_EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
// y += s * x on sixteen floats: the step of the micro-kernel, which compilers vectorise only when no F16 is passed by value.
VK_INLINE void add_scaled(float s, const float* x, float* y) {
  VK_EACH y[i] += s * x[i];
}
VK_INLINE F16 fms(F16 a, F16 b, F16 c) {
  VK_EACH c.v[i] = a.v[i] * b.v[i] - c.v[i];
  return c;
}
VK_INLINE F16 max(F16 a, F16 b) {
  VK_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
VK_INLINE F16 min(F16 a, F16 b) {
  VK_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
VK_INLINE F16 select(Mask m, F16 a, F16 b) {
  VK_EACH a.v[i] = (m >> i) & 1 ? a.v[i] : b.v[i];
  return a;
}
VK_INLINE F16 keep(Mask m, F16 a) { return select(m, a, zero()); }
VK_INLINE float sum(F16 a) {  // pairwise, in the order of the vector tiers
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
  return a.v[0];
}
VK_INLINE float max_lane(F16 a) {
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
  return a.v[0];
}
VK_INLINE F16 round(F16 a) {  // to nearest even for |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits (needs no fast-math)
  VK_EACH {
    a.v[i] = (a.v[i] + 12582912.f) - 12582912.f;
  }
  return a;
}
VK_INLINE F16 ldexp(F16 a, F16 n) {
  VK_EACH {
    // A NaN exponent has a NaN mantissa beside it, so any finite power will do; converting it to int would be undefined.
    int e = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0, h = e >> 1;
    uint32_t u1 = static_cast<uint32_t>(h + 127) << 23, u2 = static_cast<uint32_t>(e - h + 127) << 23;
    float f1, f2;
    memcpy(&f1, &u1, 4);
    memcpy(&f2, &u2, 4);
    a.v[i] = a.v[i] * f1 * f2;
  }
  return a;
}
#undef VK_EACH
#endif

// e^x = 2^n e^r with x = n ln2 + r, |r| <= ln2/2, and e^r = 1 + r + r^2 q(r), q minimax of degree DEGREE - 2: relative error 2^-28
// for degree 6 (the result is then good to about 1 ulp), 2^-23 for 5, 2^-17 for 4. e^0 is exactly 1.
// -inf (and all below -104, half the smallest subnormal) gives exactly 0, NaN gives NaN, above 88.8 gives +inf.
template <int DEGREE>
VK_INLINE F16 exp(F16 x) {
  // max returns its second operand when one is NaN: the order of the arguments keeps NaNs alive.
  x = max(set1(-104.f), x);
#if VK_TIER < 2
  x = sub(zero(), max(set1(-89.f), sub(zero(), x)));  // min(x, 89): the exponent field must not wrap
#endif
  F16 n = round(mul(x, set1(1.44269504f)));
  F16 r = fma(n, set1(-0.693147182f), x);  // ln2 rounded to fp32 is 2e-9 off: n * 2e-9 is far below an ulp of the result
  F16 p;
  if (DEGREE == 6) {
    p = fma(set1(1.3814467e-3f), r, set1(8.368781e-3f));
    p = fma(p, r, set1(4.1668393e-2f));
    p = fma(p, r, set1(0.1666652f));
    p = fma(p, r, set1(0.49999994f));
  } else if (DEGREE == 5) {
    p = fma(set1(8.312478e-3f), r, set1(4.189055e-2f));
    p = fma(p, r, set1(0.16667116f));
    p = fma(p, r, set1(0.49999228f));
  } else {
    p = fma(set1(4.1276988e-2f), r, set1(0.16753687f));
    p = fma(p, r, set1(0.5000514f));
  }
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return ldexp(p, n);
}

// Columns [0, width) of a row, width 16 or 8: head dims are multiples of 8 and padded to 16 in packed memory.
template <class T>
VK_INLINE F16 load_cols(const T* p, int width) {
  return width >= LANES ? load(p) : load_half(p);
}
template <class T>
VK_INLINE void store_cols(T* p, F16 a, int width) {
  if (width >= LANES)
    store(p, a);
  else
    store_half(p, a);
}

}  // namespace VK_ISA
}  // namespace vk
