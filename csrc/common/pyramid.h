// The filters of the multi-scale pyramids, one axis at a time: down halves an axis, up doubles it, and their adjoints.
//
//   laplacian  down = mean of aligned pairs; up[2i] = g[i] + (g[i-1] - g[i]) / 4, up[2i+1] = g[i] + (g[i+1] - g[i]) / 4, edges clamped
//   haar       down = mean of aligned pairs; up = nearest
//   dct        blocks of 8: down keeps the 4 lowest DCT-II coefficients and returns to 4 samples, up pads them with zeros
//
// A tap list says which input positions make one output. Axes follow each other in the order time, row, column; means are sums scaled
// once, after the last axis. Every product above is exact or followed by one addition alone, so fused and separate multiply-adds give
// laplacian and haar pyramids the same bits.
#pragma once

#ifndef __CUDACC_RTC__
#include <stdint.h>
#endif

#include "common/philox.h"

namespace vk {
namespace VK_ISA {

enum Kind { LAPLACIAN, HAAR, DCT };
enum Filter { DOWN, UP, DOWN_T, UP_T };
// How the taps combine: w[0] a + w[1] b + ...;  a + b;  a + (b - a) / 4;  3/4 (b + c) + 1/4 (a + d).
enum Mix { WEIGHTED, PAIR, LERP, FOUR };

constexpr int DCT_BLOCK = 8, MAX_TAPS = 8;
// up = DCT_UP, down = its transpose / 2 (per axis): sqrt(2) C8^T P^T C4 with orthonormal DCT-II matrices C.
constexpr float DCT_UP[8][4] = {
    {1.18879926f, -0.273064494f, 0.119782999f, -0.0355178043f},
    {0.732059002f, 0.363915771f, -0.134513825f, 0.0385390632f},
    {0.183675826f, 0.944666505f, -0.174068466f, 0.0457261316f},
    {-0.0928245261f, 0.870609641f, 0.282671839f, -0.0604569577f},
    {-0.0604569577f, 0.282671839f, 0.870609641f, -0.0928245261f},
    {0.0457261316f, -0.174068466f, 0.944666505f, 0.183675826f},
    {0.0385390632f, -0.134513825f, 0.363915771f, 0.732059002f},
    {-0.0355178043f, 0.119782999f, -0.273064494f, 1.18879926f}};

struct Taps {
  int n, mix;
  int64_t i[MAX_TAPS];
  float w[MAX_TAPS];
};

// Output position i of an axis whose input has n positions; `pooled` is false for an axis that keeps its size.
VK_BOTH VK_INLINE Taps taps(int filter, int kind, bool pooled, int64_t i, int64_t n) {
  Taps t;
  t.n = 1, t.mix = WEIGHTED, t.i[0] = i, t.w[0] = 1.f;
  if (!pooled) return t;
  const bool widens = filter == UP || filter == DOWN_T;
  if (kind == DCT) {
    t.n = widens ? DCT_BLOCK / 2 : DCT_BLOCK;
    for (int k = 0; k < t.n; ++k) {
      t.i[k] = (widens ? i / 8 * 4 : i / 4 * 8) + k;
      t.w[k] = (widens ? DCT_UP[i % 8][k] : DCT_UP[k][i % 4]) * (filter == DOWN || filter == DOWN_T ? 0.5f : 1.f);
    }
    return t;
  }
  if (filter == UP && kind == LAPLACIAN) {
    const int64_t m = i / 2, o = i % 2 ? m + 1 : m - 1;
    t.n = 2, t.mix = LERP, t.i[0] = m, t.i[1] = o < 0 ? 0 : o < n ? o : n - 1;
  } else if (widens) {
    t.i[0] = i / 2;
  } else if (filter == UP_T && kind == LAPLACIAN) {
    t.n = 4, t.mix = FOUR;
    t.i[0] = i ? 2 * i - 1 : 0, t.i[1] = 2 * i, t.i[2] = 2 * i + 1, t.i[3] = 2 * i + 2 < n ? 2 * i + 2 : n - 1;
  } else {
    t.n = 2, t.mix = PAIR, t.i[0] = 2 * i, t.i[1] = 2 * i + 1;
  }
  return t;
}

}  // namespace VK_ISA
}  // namespace vk
