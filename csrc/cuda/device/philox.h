// Normals from Philox4x32-10, four at a time: common/philox.h defines the words, the polynomials and their order; here they are evaluated
// with fused multiply-adds, so that every backend that has them makes the same bits. And the arithmetic that this needs.
#pragma once
#include "numbers.h"

#ifdef __CUDACC_RTC__
using uint32_t = vk::u32;
using uint64_t = unsigned long long;
using int64_t = long long;
#endif
#define VK_ISA portable
#include "common/philox.h"

namespace vk {

#ifdef __CUDACC__

VK_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
VK_DEVICE u32 as_bits(float v) { return __float_as_uint(v); }
// a b + c, rounded once.
VK_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Rounded to nearest.
VK_DEVICE float square_root(float v) { return __fsqrt_rn(v); }
// A product that the compiler may not fuse with a sum.
VK_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }

#else

inline float as_float(u32 bits) { return model::float_of(bits); }
inline u32 as_bits(float v) { return model::bits_of(v); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float square_root(float v) { return std::sqrt(v); }
inline float times(float a, float b) { return a * b; }

#endif

// Device code may use a host's constants, but not the elements of its arrays.
template <i32 I>
constexpr float LOG_P = portable::LOG_P[I];
template <i32 I>
constexpr float SIN_S = portable::SIN_S[I];
template <i32 I>
constexpr float COS_C = portable::COS_C[I];

// sqrt(-2 ln u), u = ((word >> 8) + 1) / 2^24.
VK_DEVICE float normal_radius(u32 word) {
  const u32 bits = as_bits(float((word >> 8) + 1));
  const i32 e = i32(bits - portable::SQRT_HALF_BITS) >> 23;
  const float f = as_float(bits - (u32(e) << 23)) - 1.0f, n = float(e) - 24.0f, s = times(f, f);
  float p = fused(LOG_P<7>, f, LOG_P<6>);
  p = fused(p, f, LOG_P<5>);
  p = fused(p, f, LOG_P<4>);
  p = fused(p, f, LOG_P<3>);
  p = fused(p, f, LOG_P<2>);
  p = fused(p, f, LOG_P<1>);
  p = fused(p, f, LOG_P<0>);
  p = times(times(f, s), p);
  p = fused(n, portable::LN2_LO, p);
  p = fused(s, -0.5f, p);
  return square_root(times(-2.0f, fused(n, portable::LN2_HI, f + p)));
}

// Two normals of two words: the radius of the first times the cosine and the sine of the second's angle.
VK_DEVICE void normal_pair(u32 first, u32 second, float& one, float& two) {
  const i32 a = i32(second >> 8), quarter = (a + (1 << 21)) >> 22;
  const float f = times(float(a - (quarter << 22)), portable::INV_2_24), s = times(f, f);
  float ps = fused(s, SIN_S<2>, SIN_S<1>);
  ps = fused(ps, s, SIN_S<0>);
  float pc = fused(s, COS_C<3>, COS_C<2>);
  pc = fused(pc, s, COS_C<1>);
  pc = fused(pc, s, COS_C<0>);
  const float sn = fused(f, portable::TWO_PI, times(f, fused(ps, s, portable::TWO_PI_LO))), cs = fused(pc, s, 1.0f);
  const bool odd = quarter & 1;
  const float sine = odd ? cs : sn, cosine = odd ? sn : cs, radius = normal_radius(first);
  one = times(radius, (quarter + 1) & 2 ? -cosine : cosine);
  two = times(radius, quarter & 2 ? -sine : sine);
}

// Which numbers are drawn: the key, and of the counter all but the block.
struct Draw {
  u32 key0, key1, level, sample, offset;
};

// Normals of the elements 4 block .. 4 block + 3.
VK_DEVICE void normals4(float* v, u32 block, const Draw& d) {
  const portable::Words4 w = portable::philox4x32(portable::Words4{{block, d.level, d.sample, d.offset}}, d.key0, d.key1);
  normal_pair(w.w[0], w.w[1], v[0], v[1]);
  normal_pair(w.w[2], w.w[3], v[2], v[3]);
}

// Normals of eight elements from `first` on, which need not be where a block begins.
VK_DEVICE void normals8(float (&v)[8], i64 first, const Draw& d) {
  const u32 block = u32(first >> 2), skip = u32(first) & 3;
  float all[12];
  normals4(all, block, d);
  normals4(all + 4, block + 1, d);
  VK_UNROLL
  for (i32 i = 8; i < 12; ++i) all[i] = 0;
  if (skip) normals4(all + 8, block + 2, d);
  VK_UNROLL
  for (i32 i = 0; i < 8; ++i) {
    const float even = skip & 2 ? all[i + 2] : all[i], odd = skip & 2 ? all[i + 3] : all[i + 1];
    v[i] = skip & 1 ? odd : even;
  }
}

}  // namespace vk
