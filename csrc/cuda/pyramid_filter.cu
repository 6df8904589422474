// One filter of a block-DCT pyramid from a level to the next, and its adjoint: a thread makes all eight fine or four coarse values of a
// block's row from as many rows as the filter has taps.
#include "pyramid.h"

namespace vk {
namespace pyramid {

enum Mode { SET, SUBTRACT, ADD };

struct Filtering {
  Volume in, base, out;  // base may be out
  Size to;
  i32 channels, batch;
  i32 mode, time;
  float up[8][4];  // DCT_UP of common/pyramid.h
  float half;      // 1/2 for DOWN and its adjoint, per axis; 1 for UP
};

// Where the taps of output i of an axis begin, and the weight of tap k.
template <bool WIDENS>
VK_DEVICE i32 first_tap(i32 i) {
  return WIDENS ? i / 8 * 4 : i / 4 * 8;
}
template <bool WIDENS>
VK_DEVICE float weight(const Filtering& g, i32 i, i32 k) {
  return g.half * (WIDENS ? g.up[i % 8][k] : g.up[k][i % 4]);
}

template <bool WIDENS>
VK_DEVICE void filter(const Filtering& g) {
  constexpr i32 IN = WIDENS ? 4 : 8, OUT = 12 - IN;
  const i32 blocks = g.to.w / OUT;
  i64 i = i64(block_index()) * THREADS + thread_index();
  const i32 x = i32(i % blocks);
  i /= blocks;
  const i32 y = i32(i % g.to.h);
  i /= g.to.h;
  const i32 t = i32(i % g.to.t);
  i /= g.to.t;
  const i32 c = i32(i % g.channels);
  const i64 b = i / g.channels;
  if (b >= g.batch) return;
  const i32 from_t = g.time ? first_tap<WIDENS>(t) : t, from_y = first_tap<WIDENS>(y);
  float total[IN], v[OUT];
  VK_UNROLL
  for (i32 n = 0; n < IN; ++n) total[n] = 0;
  VK_NO_UNROLL
  for (i32 j = 0; j < IN; ++j) {
    float line[IN];
    VK_UNROLL
    for (i32 n = 0; n < IN; ++n) line[n] = 0;
    VK_NO_UNROLL
    for (i32 k = 0; k < (g.time ? IN : 1); ++k) {
      float one[IN];
      take<IN>(one, g.in.at, row_at(g.in, b, c, from_t + k, from_y + j) + x * IN, g.in.type, IN);
      const float w = g.time ? weight<WIDENS>(g, t, k) : 1.0f;
      VK_UNROLL
      for (i32 n = 0; n < IN; ++n) line[n] = fused(w, one[n], line[n]);
    }
    const float w = weight<WIDENS>(g, y, j);
    VK_UNROLL
    for (i32 n = 0; n < IN; ++n) total[n] = fused(w, line[n], total[n]);
  }
  VK_UNROLL
  for (i32 n = 0; n < OUT; ++n) {
    v[n] = 0;
    VK_UNROLL
    for (i32 k = 0; k < IN; ++k) v[n] = fused(g.half * (WIDENS ? g.up[n][k % 4] : g.up[k][n % 4]), total[k], v[n]);
  }
  if (g.mode != SET) {
    float own[OUT];
    take<OUT>(own, g.base.at, row_at(g.base, b, c, t, y) + x * OUT, g.base.type, OUT);
    VK_UNROLL
    for (i32 n = 0; n < OUT; ++n) v[n] = g.mode == SUBTRACT ? own[n] - v[n] : own[n] + v[n];
  }
  give<OUT>(v, g.out.at, row_at(g.out, b, c, t, y) + x * OUT, g.out.type, OUT);
}

}  // namespace pyramid
}  // namespace vk

using vk::pyramid::Filtering;

VK_KERNEL(128) pyramid_filter_finer(const Filtering given) { vk::pyramid::filter<true>(given); }
VK_KERNEL(128) pyramid_filter_coarser(const Filtering given) { vk::pyramid::filter<false>(given); }
VK_ENTRY(pyramid_filter_finer, Filtering)
VK_ENTRY(pyramid_filter_coarser, Filtering)
