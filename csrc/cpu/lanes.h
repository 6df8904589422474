// What the pyramid kernels need beside vec.h: shuffles, square roots and sixteen 32-bit integers, in every tier.
#pragma once

#include "cpu/vec.h"

namespace vk {
namespace VK_ISA {

// ------------------------------------------------------------------------------------------------ AVX-512
#if VK_TIER == 2

struct U16 {
  __m512i v;
};
VK_INLINE U16 uset1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
VK_INLINE U16 iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
VK_INLINE U16 add(U16 a, U16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
VK_INLINE U16 sub(U16 a, U16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
VK_INLINE U16 bxor(U16 a, U16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
VK_INLINE U16 band(U16 a, U16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N>
VK_INLINE U16 shl(U16 a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
VK_INLINE U16 shr(U16 a) {
  return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
VK_INLINE U16 sar(U16 a) {
  return {_mm512_srai_epi32(a.v, N)};
}
VK_INLINE void mul_wide(U16 a, uint32_t m, U16* hi, U16* lo) {
  const __m512i k = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(a.v, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), k);
  lo->v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  hi->v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
VK_INLINE F16 to_f16(U16 a) { return {_mm512_cvtepi32_ps(a.v)}; }  // of signed integers
VK_INLINE F16 as_float(U16 a) { return {_mm512_castsi512_ps(a.v)}; }
VK_INLINE U16 as_bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
VK_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
VK_INLINE F16 pick(U16 odd, F16 a, F16 b) {  // a where bit 0 of `odd` is set
  return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(odd.v, _mm512_set1_epi32(1)), b.v, a.v)};
}
// (a0 b0 a1 b1 ...) of two vectors, and back.
VK_INLINE void zip(F16 a, F16 b, F16* lo, F16* hi) {
  const __m512i l = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i h = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  lo->v = _mm512_permutex2var_ps(a.v, l, b.v);
  hi->v = _mm512_permutex2var_ps(a.v, h, b.v);
}
VK_INLINE void unzip(F16 lo, F16 hi, F16* a, F16* b) {
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i o = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  a->v = _mm512_permutex2var_ps(lo.v, e, hi.v);
  b->v = _mm512_permutex2var_ps(lo.v, o, hi.v);
}
// (before[15], a[0], ..., a[14]), (a[1], ..., a[15], after[0]), and one lane in all.
VK_INLINE F16 from_left(F16 before, F16 a) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(before.v), 15))};
}
VK_INLINE F16 from_right(F16 a, F16 after) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(after.v), _mm512_castps_si512(a.v), 1))};
}
VK_INLINE F16 first_lane(F16 a) { return {_mm512_broadcastss_ps(_mm512_castps512_ps128(a.v))}; }
VK_INLINE F16 last_lane(F16 a) { return {_mm512_permutexvar_ps(_mm512_set1_epi32(15), a.v)}; }
// Stores past the caches; p is aligned to 64 bytes (32 for bf16). `stream_end` orders them before what follows.
VK_INLINE void stream(float* p, F16 a) { _mm512_stream_ps(p, a.v); }
VK_INLINE void stream(bf16* p, F16 a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v)); }
VK_INLINE void stream_end() { _mm_sfence(); }

// ------------------------------------------------------------------------------------------------ AVX2
#elif VK_TIER == 1

struct U16 {
  __m256i lo, hi;
};
VK_INLINE U16 uset1(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
VK_INLINE U16 iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }
VK_INLINE U16 add(U16 a, U16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
VK_INLINE U16 sub(U16 a, U16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
VK_INLINE U16 bxor(U16 a, U16 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
VK_INLINE U16 band(U16 a, U16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
template <int N>
VK_INLINE U16 shl(U16 a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
VK_INLINE U16 shr(U16 a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
template <int N>
VK_INLINE U16 sar(U16 a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}
VK_INLINE void mul_wide8(__m256i a, __m256i k, __m256i* hi, __m256i* lo) {
  const __m256i even = _mm256_mul_epu32(a, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), k);
  *lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
VK_INLINE void mul_wide(U16 a, uint32_t m, U16* hi, U16* lo) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(m));
  mul_wide8(a.lo, k, &hi->lo, &lo->lo);
  mul_wide8(a.hi, k, &hi->hi, &lo->hi);
}
VK_INLINE F16 to_f16(U16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
VK_INLINE F16 as_float(U16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
VK_INLINE U16 as_bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
VK_INLINE F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
VK_INLINE F16 pick(U16 odd, F16 a, F16 b) {
  const U16 top = shl<31>(odd);
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(top.lo)), _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(top.hi))};
}
VK_INLINE F16 zip8(__m256 a, __m256 b) {
  const __m256 l = _mm256_unpacklo_ps(a, b), h = _mm256_unpackhi_ps(a, b);
  return {_mm256_permute2f128_ps(l, h, 0x20), _mm256_permute2f128_ps(l, h, 0x31)};
}
VK_INLINE void zip(F16 a, F16 b, F16* lo, F16* hi) {
  *lo = zip8(a.lo, b.lo);
  *hi = zip8(a.hi, b.hi);
}
VK_INLINE void unzip8(F16 x, __m256* a, __m256* b) {
  const __m256 e = _mm256_shuffle_ps(x.lo, x.hi, 0x88), o = _mm256_shuffle_ps(x.lo, x.hi, 0xdd);
  *a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  *b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
}
VK_INLINE void unzip(F16 lo, F16 hi, F16* a, F16* b) {
  unzip8(lo, &a->lo, &b->lo);
  unzip8(hi, &a->hi, &b->hi);
}
VK_INLINE __m256 join8(__m256 a, __m256 b) {  // (a[7], b[0], ..., b[6])
  const __m256 m = _mm256_permute2f128_ps(a, b, 0x21);
  return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(b), _mm256_castps_si256(m), 12));
}
VK_INLINE __m256 next8(__m256 a, __m256 b) {  // (a[1], ..., a[7], b[0])
  const __m256 m = _mm256_permute2f128_ps(a, b, 0x21);
  return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(m), _mm256_castps_si256(a), 4));
}
VK_INLINE F16 from_left(F16 before, F16 a) { return {join8(before.hi, a.lo), join8(a.lo, a.hi)}; }
VK_INLINE F16 from_right(F16 a, F16 after) { return {next8(a.lo, a.hi), next8(a.hi, after.lo)}; }
VK_INLINE F16 first_lane(F16 a) { return set1(_mm256_cvtss_f32(a.lo)); }
VK_INLINE F16 last_lane(F16 a) {
  const __m256 v = _mm256_permutevar8x32_ps(a.hi, _mm256_set1_epi32(7));
  return {v, v};
}
VK_INLINE void stream(float* p, F16 a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
VK_INLINE void stream(bf16* p, F16 a) { store(p, a); }
VK_INLINE void stream_end() { _mm_sfence(); }

// ------------------------------------------------------------------------------------------------ portable
#else

struct U16 {
  uint32_t v[LANES];
};
#if defined(_OPENMP) && !defined(_MSC_VER)
#define VK_EACH _Pragma("omp simd") for (int i = 0; i < LANES; ++i)
#else
#define VK_EACH for (int i = 0; i < LANES; ++i)
#endif
VK_INLINE U16 uset1(uint32_t x) {
  U16 r;
  VK_EACH r.v[i] = x;
  return r;
}
VK_INLINE U16 iota() {
  U16 r;
  VK_EACH r.v[i] = static_cast<uint32_t>(i);
  return r;
}
VK_INLINE U16 add(U16 a, U16 b) {
  VK_EACH a.v[i] += b.v[i];
  return a;
}
VK_INLINE U16 sub(U16 a, U16 b) {
  VK_EACH a.v[i] -= b.v[i];
  return a;
}
VK_INLINE U16 bxor(U16 a, U16 b) {
  VK_EACH a.v[i] ^= b.v[i];
  return a;
}
VK_INLINE U16 band(U16 a, U16 b) {
  VK_EACH a.v[i] &= b.v[i];
  return a;
}
template <int N>
VK_INLINE U16 shl(U16 a) {
  VK_EACH a.v[i] <<= N;
  return a;
}
template <int N>
VK_INLINE U16 shr(U16 a) {
  VK_EACH a.v[i] >>= N;
  return a;
}
template <int N>
VK_INLINE U16 sar(U16 a) {
  VK_EACH a.v[i] = static_cast<uint32_t>(static_cast<int32_t>(a.v[i]) >> N);
  return a;
}
VK_INLINE void mul_wide(U16 a, uint32_t m, U16* hi, U16* lo) {
  VK_EACH {
    const uint64_t p = static_cast<uint64_t>(a.v[i]) * m;
    hi->v[i] = static_cast<uint32_t>(p >> 32);
    lo->v[i] = static_cast<uint32_t>(p);
  }
}
VK_INLINE F16 to_f16(U16 a) {
  F16 r;
  VK_EACH r.v[i] = static_cast<float>(static_cast<int32_t>(a.v[i]));
  return r;
}
VK_INLINE F16 as_float(U16 a) {
  F16 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
VK_INLINE U16 as_bits(F16 a) {
  U16 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
VK_INLINE F16 sqrt(F16 a) {
  for (int i = 0; i < LANES; ++i) a.v[i] = sqrtf(a.v[i]);
  return a;
}
VK_INLINE F16 pick(U16 odd, F16 a, F16 b) {
  VK_EACH a.v[i] = odd.v[i] & 1 ? a.v[i] : b.v[i];
  return a;
}
VK_INLINE void zip(F16 a, F16 b, F16* lo, F16* hi) {
  for (int i = 0; i < LANES / 2; ++i) {
    lo->v[2 * i] = a.v[i], lo->v[2 * i + 1] = b.v[i];
    hi->v[2 * i] = a.v[i + LANES / 2], hi->v[2 * i + 1] = b.v[i + LANES / 2];
  }
}
VK_INLINE void unzip(F16 lo, F16 hi, F16* a, F16* b) {
  for (int i = 0; i < LANES / 2; ++i) {
    a->v[i] = lo.v[2 * i], b->v[i] = lo.v[2 * i + 1];
    a->v[i + LANES / 2] = hi.v[2 * i], b->v[i + LANES / 2] = hi.v[2 * i + 1];
  }
}
VK_INLINE F16 from_left(F16 before, F16 a) {
  F16 r;
  r.v[0] = before.v[LANES - 1];
  for (int i = 1; i < LANES; ++i) r.v[i] = a.v[i - 1];
  return r;
}
VK_INLINE F16 from_right(F16 a, F16 after) {
  F16 r;
  for (int i = 1; i < LANES; ++i) r.v[i - 1] = a.v[i];
  r.v[LANES - 1] = after.v[0];
  return r;
}
VK_INLINE F16 first_lane(F16 a) { return set1(a.v[0]); }
VK_INLINE F16 last_lane(F16 a) { return set1(a.v[LANES - 1]); }
template <class T>
VK_INLINE void stream(T* p, F16 a) {
  store(p, a);
}
VK_INLINE void stream_end() {}
#undef VK_EACH
#endif

}  // namespace VK_ISA
}  // namespace vk
