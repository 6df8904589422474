// Philox4x32-10 and Box-Muller on sixteen counters at a time; common/philox.h defines both.
//
// Against the exact values of the same integers, all 2^24 of each tried: the radius is within 1 ulp, sine and cosine within 1 ulp (1.6
// in the portable tier, which has no fused multiply-add), and a normal within 2.5 ulp (3.2) of its own size.
#pragma once

#include "common/philox.h"
#include "cpu/lanes.h"

namespace vk {
namespace VK_ISA {

constexpr int NORMALS = 4 * LANES;  // made at a time

struct NoiseKey {
  uint32_t key0, key1, level, sample, offset;
};

VK_INLINE void philox16(const NoiseKey& k, uint32_t first, U16 w[4]) {
  U16 c0 = add(uset1(first), iota()), c1 = uset1(k.level), c2 = uset1(k.sample), c3 = uset1(k.offset);
  uint32_t k0 = k.key0, k1 = k.key1;
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    U16 hi0, lo0, hi1, lo1;
    mul_wide(c0, PHILOX_M0, &hi0, &lo0);
    mul_wide(c2, PHILOX_M1, &hi1, &lo1);
    c0 = bxor(bxor(hi1, c1), uset1(k0));
    c2 = bxor(bxor(hi0, c3), uset1(k1));
    c1 = lo1, c3 = lo0;
    k0 += PHILOX_W0, k1 += PHILOX_W1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

// sqrt(-2 ln u) for u = ((word >> 8) + 1) / 2^24.
VK_INLINE F16 radius(U16 word) {
  const U16 bits = as_bits(to_f16(add(shr<8>(word), uset1(1))));
  const U16 above = sub(bits, uset1(SQRT_HALF_BITS));
  const U16 e = sar<23>(above);
  const F16 f = sub(as_float(sub(bits, shl<23>(e))), set1(1.f)), n = sub(to_f16(e), set1(24.f));
  F16 p = set1(LOG_P[7]);
  for (int i = 6; i >= 0; --i) p = fma(p, f, set1(LOG_P[i]));
  const F16 s = mul(f, f);
  p = mul(mul(f, s), p);
  p = fma(n, set1(LN2_LO), p);
  p = fma(set1(-0.5f), s, p);
  const F16 ln = fma(n, set1(LN2_HI), add(f, p));
  return sqrt(mul(set1(-2.f), ln));
}

VK_INLINE void sincos(U16 word, F16* sine, F16* cosine) {
  const U16 a = shr<8>(word), quarter = shr<22>(add(a, uset1(1u << 21)));
  const F16 f = mul(to_f16(sub(a, shl<22>(quarter))), set1(INV_2_24)), s = mul(f, f);
  const F16 ps = fma(fma(set1(SIN_S[2]), s, set1(SIN_S[1])), s, set1(SIN_S[0]));
  const F16 pc = fma(fma(fma(set1(COS_C[3]), s, set1(COS_C[2])), s, set1(COS_C[1])), s, set1(COS_C[0]));
  const F16 sn = fma(f, set1(TWO_PI), mul(f, fma(ps, s, set1(TWO_PI_LO)))), cs = fma(pc, s, set1(1.f));
  const U16 flip_sin = shl<30>(band(quarter, uset1(2))), flip_cos = shl<30>(band(add(quarter, uset1(1)), uset1(2)));
  *sine = as_float(bxor(as_bits(pick(quarter, cs, sn)), flip_sin));
  *cosine = as_float(bxor(as_bits(pick(quarter, sn, cs)), flip_cos));
}

// The normals of the elements 4 * first .. 4 * first + 63.
VK_INLINE void normals64(const NoiseKey& k, uint32_t first, float* out) {
  U16 w[4];
  philox16(k, first, w);
  F16 n[4], even[2], odd[2];
  for (int pair = 0; pair < 2; ++pair) {
    F16 sine, cosine;
    const F16 r = radius(w[2 * pair]);
    sincos(w[2 * pair + 1], &sine, &cosine);
    n[2 * pair] = mul(r, cosine), n[2 * pair + 1] = mul(r, sine);
  }
  zip(n[0], n[2], &even[0], &even[1]);
  zip(n[1], n[3], &odd[0], &odd[1]);
  for (int i = 0; i < 2; ++i) {
    F16 lo, hi;
    zip(even[i], odd[i], &lo, &hi);
    store(out + 32 * i, lo);
    store(out + 32 * i + 16, hi);
  }
}

// The normals of n elements from `element` on, into `buffer` (n + 2 * NORMALS floats); returns where they begin in it.
VK_INLINE const float* normals(const NoiseKey& k, int64_t element, int64_t n, float* buffer) {
  const int64_t first = element / 4, skip = element - 4 * first;
  for (int64_t i = 0; i < skip + n; i += NORMALS) normals64(k, static_cast<uint32_t>(first + i / 4), buffer + i);
  return buffer + skip;
}

}  // namespace VK_ISA
}  // namespace vk
