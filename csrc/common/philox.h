// Philox4x32-10, the counter-based generator of every backend (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// Ten rounds of two 32 x 32 -> 64 bit products turn a 128-bit counter and a 64-bit key into four random words. There is no state, so any
// tile, thread or backend makes the words it needs. Noise uses
//   key     = (low, high) words of the seed
//   counter = (element / 4, level, sample, offset)
// where `element` counts the values of one sample of one level in the order channel, time, row, column, and the words of a block belong to
// the elements 4 i .. 4 i + 3. Words (0, 1) and (2, 3) become two normals each by Box-Muller:
//   radius = sqrt(-2 ln u), u = ((word >> 8) + 1) / 2^24 in (0, 1];   angle = (next word >> 8) / 2^24 turns
//   (radius cos(angle), radius sin(angle))
// Every step up to the logarithm and the polynomials of the sine is exact in fp32, so backends differ by their rounding alone:
//   quarter = (a + 2^21) >> 22, turn = (a - quarter 2^22) / 2^24 in [-1/8, 1/8) for a = word >> 8
// reduces the angle in integers. The polynomials below are in the order in which every fp32 backend evaluates them (Horner, with fused
// multiply-adds where there are any).
#pragma once

#ifndef __CUDACC_RTC__
#include <stdint.h>
#endif

#include "common/isa.h"

#ifdef __CUDACC__
#define VK_BOTH __host__ __device__
#else
#define VK_BOTH
#endif

namespace vk {
namespace VK_ISA {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // what each round adds to the key
constexpr int PHILOX_ROUNDS = 10;

struct Words4 {
  uint32_t w[4];
};

VK_BOTH VK_INLINE Words4 philox4x32(Words4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(PHILOX_M0) * c.w[0], p1 = static_cast<uint64_t>(PHILOX_M1) * c.w[2];
    const uint32_t hi0 = static_cast<uint32_t>(p0 >> 32), hi1 = static_cast<uint32_t>(p1 >> 32);
    c = Words4{{hi1 ^ c.w[1] ^ key0, static_cast<uint32_t>(p1), hi0 ^ c.w[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += PHILOX_W0, key1 += PHILOX_W1;
  }
  return c;
}

// ln(1 + f) = f - f^2 / 2 + f^3 P(f) for sqrt(1/2) - 1 <= f < sqrt(2) - 1: P within 0.1 * 2^-24 of the logarithm; coefficients of f^0..f^7.
constexpr float LOG_P[8] = {0.33333331346511841f, -0.25000819563865662f, 0.20001226663589478f, -0.16623356938362122f,
                            0.14201758801937103f, -0.13160182535648346f, 0.12761574983596802f, -0.076344929635524750f};
// ln 2 = LN2_HI + LN2_LO; e * LN2_HI is exact for the exponents that occur.
constexpr float LN2_HI = 0.693359375f, LN2_LO = -2.12194440e-4f;
constexpr uint32_t SQRT_HALF_BITS = 0x3f3504f3u;
// sin(2 pi f) = f TWO_PI + f (TWO_PI_LO + s S(s)), cos(2 pi f) = 1 + s C(s) with s = f^2, |f| <= 1/8: S within 0.07 * 2^-24 of the
// sine, C within 0.002 * 2^-24 of the cosine; 2 pi = TWO_PI + TWO_PI_LO.
constexpr float TWO_PI = 6.28318548202514648f, TWO_PI_LO = -1.74845553146951715e-7f;
constexpr float SIN_S[3] = {-41.341670989990234f, 81.593765258789062f, -75.445602416992188f};
constexpr float COS_C[4] = {-19.739208221435547f, 64.939323425292969f, -85.443237304687500f, 59.229244232177734f};
constexpr float INV_2_24 = 5.9604644775390625e-8f;

}  // namespace VK_ISA
}  // namespace vk
