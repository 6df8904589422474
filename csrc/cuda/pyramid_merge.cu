// Levels put together into a volume, after a guided step where asked for, in one launch however many levels there are; and the adjoint.
// Laplacian and Haar.
//
// A block has a tile of the level before the finest. It merges what lies above the tile from the coarsest level on, with a margin of one
// value for the interpolation (which is enough at every level), in two windows of shared memory that take turns, and writes the finest
// values. The adjoint takes one level off a gradient: what is left goes to the next coarser level, in float32.
#include "pyramid_tiles.h"

namespace vk {
namespace pyramid {

struct Synthesis {
  Volume out;
  Stepping stepping;
  Shape shape;
  Tiling tiling;
  i32 laplacian;
  u32 window_bytes;  // of each of the two
};

template <bool TIME>
VK_DEVICE void synthesis(const Synthesis& a) {
  constexpr i32 FRAMES = TIME ? 2 : 1;
  const Tile at(a.tiling);
  const i32 last = a.shape.levels - 1, halo = a.laplacian ? 1 : 0;
  const Size finest = a.shape.level[last];
  // A tile of the level before the finest, or what that would be.
  const Size before{TIME ? up_to(finest.t, 2) : finest.t, up_to(finest.h, 2), up_to(finest.w, 2)};
  const Range frames{at.t, at.t + 1}, rows{at.y, least(at.y + a.tiling.rows[0], before.h)},
      columns{at.x, least(at.x + a.tiling.columns[0], before.w)};
  Window here{}, coarser{};
  VK_NO_UNROLL
  for (i32 s = 0; s <= last; ++s) {
    const i32 k = last - 1 - s;
    const Size z = a.shape.level[s];
    Range f, r, x;
    if (s < last) {
      f = TIME ? widened(above(frames, k), halo, z.t) : frames, r = widened(above(rows, k), halo, z.h);
      x = rounded(widened(above(columns, k), halo, z.w), RUN);
    } else {
      f = {FRAMES * at.t, least(FRAMES * at.t + FRAMES, z.t)}, r = {2 * rows.first, least(2 * rows.end, z.h)};
      x = rounded(Range{2 * columns.first, 2 * columns.end}, RUN);
    }
    coarser = here;
    here = {shared_at<float>(u32(s & 1) * a.window_bytes), f, r, x, {x.first, least(x.end, z.w)}, x.count()};
    const i32 across = x.count() / RUN, lines = r.count(), items = f.count() * lines * across;
    VK_NO_UNROLL
    for (i32 i = i32(thread_index()); i < items; i += THREADS) {
      const Spot p = spot(z, at.c, f.first + i / across / lines, r.first + i / across % lines, x.first + i % across * RUN);
      float v[RUN];
      stepped(v, a.stepping, a.shape, s, at.b, p, z.w - p.x, true);
      if (s > 0) {
        float up[RUN];
        interpolated<TIME>(coarser, a.laplacian, p.t, p.y, p.x, up);
        VK_UNROLL
        for (i32 n = 0; n < RUN; ++n) v[n] += up[n];
      }
      if (s < last) {
        here.put4(p.t, p.y, p.x, v);
        here.put4(p.t, p.y, p.x + 4, v + 4);
      } else {
        give<RUN>(v, a.out.at, row_at(a.out, at.b, p.c, p.t, p.y) + p.x, a.out.type, z.w - p.x);
      }
    }
    if (s < last) block_barrier();
  }
}

struct SynthesisAdjoint {
  Volume gradient;  // of level `level`
  Role rest;        // what goes on to the level before, unscaled; unless that is the coarsest, which is done here too
  Spreading spreading;
  Shape shape;
  Tiling tiling;
  float scale[LEVELS];
  i32 level, laplacian;
};

template <bool TIME>
VK_DEVICE void synthesis_adjoint(const SynthesisAdjoint& a) {
  const Tile at(a.tiling);
  const i32 s = a.level;
  const Size z = a.shape.level[s];
  const Size before{TIME ? up_to(z.t, 2) : z.t, up_to(z.h, 2), up_to(z.w, 2)};
  const Range frames{at.t, at.t + 1}, rows{at.y, least(at.y + a.tiling.rows[0], before.h)},
      columns{at.x, least(at.x + a.tiling.columns[0], before.w)};
  const Below w = below<TIME>(frames, rows, columns, a.laplacian, z);
  const Below own = below<TIME>(frames, rows, rounded(columns, 4), false, Size{z.t, z.h, up_to(z.w, RUN) * RUN});
  const Range runs = rounded(w.columns, RUN);
  const Window gradient{shared_at<float>(0), w.frames, w.rows, runs, {runs.first, least(runs.end, z.w)}, runs.count()};
  const i32 across = runs.count() / RUN, lines = w.rows.count(), items = w.frames.count() * lines * across;
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < items; i += THREADS) {
    const Spot p = spot(z, at.c, w.frames.first + i / across / lines, w.rows.first + i / across % lines, runs.first + i % across * RUN);
    float v[RUN];
    take<RUN>(v, a.gradient.at, row_at(a.gradient, at.b, p.c, p.t, p.y) + p.x, a.gradient.type, z.w - p.x);
    gradient.put4(p.t, p.y, p.x, v);
    gradient.put4(p.t, p.y, p.x + 4, v + 4);
    const bool mine = p.t >= own.frames.first && p.t < own.frames.end && p.y >= own.rows.first && p.y < own.rows.end &&
                      p.x >= own.columns.first && p.x < own.columns.end;
    if (!mine) continue;
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) v[n] *= a.scale[s];
    spread(v, a.spreading, a.shape, s, at.b, p, z.w - p.x, true);
  }
  if (s == 0) return;
  block_barrier();
  const i32 eights = up_to(columns.count(), RUN);
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < rows.count() * eights; i += THREADS) {
    const Spot p = spot(before, at.c, at.t, rows.first + i / eights, columns.first + i % eights * RUN);
    float v[RUN], half[4];
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) v[n] = 0;
    VK_NO_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      if (p.x + 4 * h >= columns.end) break;
      gathered<TIME>(gradient, a.laplacian, p.t, p.y, p.x + 4 * h, half);
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n) v[n] = h ? v[n] : half[n], v[n + 4] = h ? half[n] : 0.0f;
    }
    const i32 n = before.w - p.x;
    if (s > 1) {
      give_run<RUN>(v, a.rest, a.shape, s - 1, at.b, p, n);
      continue;
    }
    VK_UNROLL
    for (i32 j = 0; j < RUN; ++j) v[j] *= a.scale[0];
    spread(v, a.spreading, a.shape, 0, at.b, p, n, true);
  }
}

}  // namespace pyramid
}  // namespace vk

using vk::pyramid::Synthesis;
using vk::pyramid::SynthesisAdjoint;

VK_KERNEL(VK_FIVE_BLOCKS) pyramid_merge_levels(const Synthesis given) { vk::pyramid::synthesis<false>(given); }
VK_KERNEL(VK_FIVE_BLOCKS) pyramid_merge_levels_time(const Synthesis given) { vk::pyramid::synthesis<true>(given); }
VK_KERNEL(VK_FIVE_BLOCKS) pyramid_merge_adjoint(const SynthesisAdjoint given) { vk::pyramid::synthesis_adjoint<false>(given); }
VK_KERNEL(VK_FIVE_BLOCKS) pyramid_merge_adjoint_time(const SynthesisAdjoint given) { vk::pyramid::synthesis_adjoint<true>(given); }
VK_ENTRY(pyramid_merge_levels, Synthesis)
VK_ENTRY(pyramid_merge_levels_time, Synthesis)
VK_ENTRY(pyramid_merge_adjoint, SynthesisAdjoint)
VK_ENTRY(pyramid_merge_adjoint_time, SynthesisAdjoint)
