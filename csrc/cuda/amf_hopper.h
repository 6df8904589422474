// What the kernels of attention motion flow for compute capability 9.0a share: a block's rows in pieces of 16, one for each warp that
// multiplies, and the softmax that these rows carry from tile to tile of keys.
#pragma once
#include "amf.h"
#include "hopper.h"

namespace vk {
namespace amf {

using hopper::ALIGN;
using hopper::GROUP;
using hopper::group_index;
using hopper::leads;
using hopper::Panels;
using hopper::Ring;

constexpr i32 ROWS = 128;     // of a block; 64 of each of its two warpgroups that multiply
constexpr i32 COLUMNS = 128;  // keys of a product
constexpr i32 PIECE = 16;     // rows of a warp: those of one frame, so that a box holds them
constexpr i32 PIECES = ROWS / PIECE;
constexpr i32 STAGES = 4;
constexpr u32 READERS = 8;           // warps that multiply
constexpr i32 FEW = 40, MANY = 232;  // registers of a producer's threads and of the others, of 168 each at the start

// Rows of one query frame that look at one target.
struct Piece {
  i32 token, entry, rows, target;  // first token of q, past the last where there are no rows; first entry of [P, S]
  VK_DEVICE Piece(const i32* at) { token = load(at), entry = load(at + 1), rows = load(at + 2), target = load(at + 3); }
};

// What a lane holds of its two rows: the largest product, and, relative to it, sums of e = 2^(logit - largest), e x, e y and, FULL,
// e (logit - largest); and the lowest key that has the largest.
template <bool FULL>
struct Rows {
  float best[2], total[2], x[2], y[2], tilt[FULL ? 2 : 1];
  i32 where[FULL ? 2 : 1];
  VK_DEVICE Rows() {
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) best[h] = -infinity(), total[h] = x[h] = y[h] = 0;
    VK_UNROLL
    for (i32 h = 0; h < (FULL ? 2 : 1); ++h) tilt[h] = 0, where[h] = 0;
  }
  VK_DEVICE float top(i32 h, float scale_log2) const { return max_of(best[h] * scale_log2, LEAST); }

  // Products with the keys from `first` on, times `sign`; those past the frame's end, with another frame's keys, are not seen.
  VK_DEVICE void fold(Accumulator (&s)[COLUMNS / 8], i32 first, const Frame& f, float scale_log2, float sign) {
    if (sign != 1.0f) {
      VK_UNROLL
      for (i32 n = 0; n < COLUMNS / 8; ++n)
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i) s[n].v[i] = sign == 0 ? 0.0f : s[n].v[i] * sign;  // 0 of a product that overflows, too
    }
    if (first + COLUMNS > f.size) {
      VK_UNROLL
      for (i32 n = 0; n < COLUMNS / 8; ++n)
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i)
          if (first + accumulator_column(i) + n * 8 >= f.size) s[n].v[i] = -infinity();
    }
    fold_whole(s, first, f, scale_log2);
  }
  // The same where the frame has them all. Products are only read: their registers may be those of a product to come.
  VK_DEVICE void fold_whole(const Accumulator (&s)[COLUMNS / 8], i32 first, const Frame& f, float scale_log2) {
    const i32 own = first + accumulator_column(0);
    float now[2];
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const float before = top(h, scale_log2);
      VK_UNROLL
      for (i32 n = 0; n < COLUMNS / 8; ++n)
        VK_UNROLL
        for (i32 j = 0; j < 2; ++j) {
          const float v = s[n].v[2 * h + j];
          if (FULL && v > best[h]) where[FULL ? h : 0] = own + n * 8 + j;  // keys ascend: the lowest of equals stays
          best[h] = max_of(best[h], v);
        }
      now[h] = top(h, scale_log2);
      const float shrink = exp2_approx(before - now[h]);
      if (FULL) tilt[FULL ? h : 0] = shrink * (tilt[FULL ? h : 0] + total[h] * (before - now[h]));
      total[h] *= shrink, x[h] *= shrink, y[h] *= shrink;
    }
    Place at[2] = {Place(own, f), Place(own + 1, f)};
    VK_UNROLL
    for (i32 n = 0; n < COLUMNS / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j) {
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const float below = s[n].v[2 * h + j] * scale_log2 - now[h], e = exp2_approx(below);
          total[h] += e, x[h] += e * at[j].x, y[h] += e * at[j].y;
          if (FULL) tilt[FULL ? h : 0] += e * max_of(below, LEAST);
        }
        at[j].eight_on(f);
      }
  }
};

// The larger of two values and its key among the four lanes of a row, the lowest key of equals. Keys are exact in float32.
VK_DEVICE void best_of_quad(float& best, i32& where) {
  VK_UNROLL
  for (u32 mask = 1; mask < 4; mask *= 2) {
    const float other = shuffle_xor(best, mask);
    const i32 there = i32(shuffle_xor(float(where), mask));
    if (other > best || (other == best && there < where)) best = other, where = there;
  }
}

}  // namespace amf
}  // namespace vk
