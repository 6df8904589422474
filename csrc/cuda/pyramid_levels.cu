// A volume taken apart into levels, with noise and target where asked for, in one launch; and the adjoint. Laplacian and Haar.
//
// A block has a tile of a level and writes the next finer level there. It reads the finer level's values (means of blocks of the volume,
// where that is not the finest) once, with a margin for the interpolation, keeps them and their means in shared memory, and passes the
// difference on. The adjoint goes the other way: over a tile of the level before the finest, from the coarsest gradient to the finest.
#include "pyramid_tiles.h"

namespace vk {
namespace pyramid {

struct Analysis {
  Volume x;
  Mixing mixing;
  Shape shape;
  Tiling tiling;
  i32 laplacian, fine;  // fine: levels after the coarsest are written
};

// Means of blocks of 2^L rows and columns (and frames): those that begin at the eight values from column x of the volume on, 8 >> L of
// them, at row y and frame t in blocks. Halved level by level, as the reference does.
template <bool TIME, i32 L>
VK_DEVICE void block_means(float* v, const Volume& from, i64 b, i32 c, i32 t, i32 y, i32 x, i32 width) {
  if constexpr (L == 0) {
    take<RUN>(v, from.at, row_at(from, b, c, t, y) + x, from.type, width - x);
  } else {
    constexpr i32 N = RUN >> (L - 1);
    float total[N];
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) total[i] = 0;
    VK_NO_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      float line[N];
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) line[i] = 0;
      VK_NO_UNROLL
      for (i32 k = 0; k < (TIME ? 2 : 1); ++k) {
        float part[N];
        block_means<TIME, L - 1>(part, from, b, c, TIME ? 2 * t + k : t, 2 * y + j, x, width);
        VK_UNROLL
        for (i32 i = 0; i < N; ++i) line[i] += part[i];
      }
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) total[i] += line[i];
    }
    VK_UNROLL
    for (i32 i = 0; i < N / 2; ++i) v[i] = (TIME ? 0.125f : 0.25f) * (total[2 * i] + total[2 * i + 1]);
  }
}

// The finest values above `fine`'s tile into both windows: a run of them and the four means of it and of its neighbours at a time.
// `coarse` is wider than `fine`.
template <bool TIME>
VK_DEVICE void fill(const Analysis& a, const Tile& at, const Window& coarse, const Window& fine, i32 width) {
  constexpr i32 FRAMES = TIME ? 2 : 1;
  const i32 groups = coarse.columns.count() / 4, rows = coarse.rows.count(), items = coarse.frames.count() * rows * groups;
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < items; i += THREADS) {
    const i32 x = coarse.columns.first + i % groups * 4, y = coarse.rows.first + i / groups % rows;
    const i32 t = coarse.frames.first + i / groups / rows;
    const bool inside = 2 * x >= fine.columns.first && 2 * x < fine.columns.end && 2 * y >= fine.rows.first && 2 * y < fine.rows.end &&
                        FRAMES * t >= fine.frames.first && FRAMES * t < fine.frames.end;
    float total[RUN];
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) total[n] = 0;
    VK_NO_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      float line[RUN];
      VK_UNROLL
      for (i32 n = 0; n < RUN; ++n) line[n] = 0;
      VK_NO_UNROLL
      for (i32 k = 0; k < FRAMES; ++k) {
        float own[RUN];
        block_means<TIME, 0>(own, a.x, at.b, at.c, FRAMES * t + k, 2 * y + j, 2 * x, width);
        if (inside) {
          fine.put4(FRAMES * t + k, 2 * y + j, 2 * x, own);
          fine.put4(FRAMES * t + k, 2 * y + j, 2 * x + 4, own + 4);
        }
        VK_UNROLL
        for (i32 n = 0; n < RUN; ++n) line[n] += own[n];
      }
      VK_UNROLL
      for (i32 n = 0; n < RUN; ++n) total[n] += line[n];
    }
    float mean[4];
    VK_UNROLL
    for (i32 n = 0; n < 4; ++n) mean[n] = (TIME ? 0.125f : 0.25f) * (total[2 * n] + total[2 * n + 1]);
    coarse.put4(t, y, x, mean);
  }
}

// The same where the finer level's values are means of blocks of 2^L themselves: first those, then their means. `fine` is as wide as
// `coarse`.
template <bool TIME, i32 L>
VK_DEVICE void fill_deep(const Analysis& a, const Tile& at, const Window& coarse, const Window& fine, i32 width) {
  constexpr i32 FRAMES = TIME ? 2 : 1, N = RUN >> L;
  const i32 pieces = fine.columns.count() / N, rows = fine.rows.count();
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < fine.frames.count() * rows * pieces; i += THREADS) {
    const i32 x = fine.columns.first + i % pieces * N, y = fine.rows.first + i / pieces % rows, t = fine.frames.first + i / pieces / rows;
    float v[N];
    block_means<TIME, L>(v, a.x, at.b, at.c, t, y, x << L, width);
    VK_UNROLL
    for (i32 n = 0; n < N; ++n) store4(fine.place(t, y, x + n), as_bits(v[n]));
  }
  block_barrier();
  const i32 groups = coarse.columns.count() / 4, lines = coarse.rows.count();
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < coarse.frames.count() * lines * groups; i += THREADS) {
    const i32 x = coarse.columns.first + i % groups * 4, y = coarse.rows.first + i / groups % lines;
    const i32 t = coarse.frames.first + i / groups / lines;
    float total[RUN], v[RUN];
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) total[n] = 0;
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      float line[RUN];
      fine.get4(FRAMES * t, 2 * y + j, 2 * x, line);
      fine.get4(FRAMES * t, 2 * y + j, 2 * x + 4, line + 4);
      if (TIME) {
        fine.get4(FRAMES * t + 1, 2 * y + j, 2 * x, v);
        fine.get4(FRAMES * t + 1, 2 * y + j, 2 * x + 4, v + 4);
        VK_UNROLL
        for (i32 n = 0; n < RUN; ++n) line[n] += v[n];
      }
      VK_UNROLL
      for (i32 n = 0; n < RUN; ++n) total[n] += line[n];
    }
    VK_UNROLL
    for (i32 n = 0; n < 4; ++n) v[n] = (TIME ? 0.125f : 0.25f) * (total[2 * n] + total[2 * n + 1]);
    coarse.put4(t, y, x, v);
  }
}

template <bool TIME>
VK_DEVICE void analysis(const Analysis& a) {
  constexpr i32 FRAMES = TIME ? 2 : 1;
  const Tile at(a.tiling);
  const i32 s = at.group, last = a.shape.levels - 1;
  const Size before = a.shape.level[s], after = a.shape.level[s + 1];
  const Range rows{at.y, least(at.y + a.tiling.rows[s], before.h)}, columns{at.x, least(at.x + a.tiling.columns[s], before.w)};
  const Range frames{at.t, at.t + 1};
  const bool lowest = s == 0 && alive(a.mixing.alive, at.b, 0), part = a.fine && alive(a.mixing.alive, at.b, s + 1);

  const i32 halo = a.laplacian && a.fine ? 1 : 0;
  const Range around = rounded(widened(columns, halo, before.w), 4), across = rounded(columns, 4);
  const Window coarse{shared_at<float>(0), TIME ? widened(frames, halo, before.t) : frames, widened(rows, halo, before.h), around,
                      {around.first, least(around.end, before.w)}, around.count()};
  // Of the finest level the tile alone is kept: what lies around it is needed for its means only.
  const i32 depth = last - s - 1;
  const Range f = depth ? coarse.frames : frames, r = depth ? coarse.rows : rows, kept = depth ? coarse.columns : across;
  const Range twice{2 * kept.first, 2 * kept.end};
  const Window fine{coarse.at + coarse.frames.count() * coarse.rows.count() * coarse.pitch, {FRAMES * f.first, FRAMES * f.end},
                    {2 * r.first, 2 * r.end}, twice, {twice.first, least(twice.end, after.w)}, twice.count()};
  if (lowest || part) {
    const i32 width = a.shape.level[last].w;
    if (depth == 0) fill<TIME>(a, at, coarse, fine, width);
    else if (depth == 1) fill_deep<TIME, 1>(a, at, coarse, fine, width);
    else fill_deep<TIME, 2>(a, at, coarse, fine, width);
  }
  block_barrier();

  const i32 runs = up_to(columns.count(), 4), lines = 2 * rows.count(), differences = a.fine ? FRAMES * lines * runs : 0;
  const i32 wide = up_to(columns.count(), RUN), means = s == 0 ? rows.count() * wide : 0;
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < differences + means; i += THREADS) {
    float v[RUN];
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) v[n] = 0;
    const bool difference = i < differences, takes_part = difference ? part : lowest;
    const i32 j = i - differences, level = difference ? s + 1 : 0;
    const Size z = a.shape.level[level];
    const i32 line = difference ? i / runs : j / wide;
    const i32 x = difference ? 2 * columns.first + i % runs * RUN : columns.first + j % wide * RUN;
    const Spot p = difference ? spot(z, at.c, FRAMES * at.t + line / lines, 2 * rows.first + line % lines, x)
                              : spot(z, at.c, at.t, rows.first + line, x);
    if (difference && part) {
      float own[RUN];
      interpolated<TIME>(coarse, a.laplacian, p.t, p.y, p.x, v);
      fine.get4(p.t, p.y, p.x, own);
      fine.get4(p.t, p.y, p.x + 4, own + 4);
      VK_UNROLL
      for (i32 n = 0; n < RUN; ++n) v[n] = own[n] - v[n];
    } else if (!difference && lowest) {
      coarse.get4(p.t, p.y, p.x, v);
      if (p.x + 4 < coarse.columns.end) coarse.get4(p.t, p.y, p.x + 4, v + 4);
    }
    emit(a.mixing, a.shape, level, at.b, p, v, z.w - p.x, takes_part);
  }
}

struct AnalysisAdjoint {
  Role dx;  // the finest level's entry alone
  Unmixing unmixing;
  Shape shape;
  Tiling tiling;
  i32 laplacian;
  u32 sums_at, sums_bytes;  // of the two windows of sums in shared memory, after the gradient's
};

template <bool TIME>
VK_DEVICE void analysis_adjoint(const AnalysisAdjoint& a) {
  constexpr i32 FRAMES = TIME ? 2 : 1;
  constexpr float SHARE = TIME ? 0.125f : 0.25f;
  const Tile at(a.tiling);
  const i32 last = a.shape.levels - 1;
  const Size before = a.shape.level[last - 1], finest = a.shape.level[last];
  const Range frames{at.t, at.t + 1}, rows{at.y, least(at.y + a.tiling.rows[0], before.h)},
      columns{at.x, least(at.x + a.tiling.columns[0], before.w)};
  Window gradient{}, sums{}, sums_above{};
  VK_NO_UNROLL
  for (i32 s = 0; s < last; ++s) {
    const i32 k = last - 1 - s;
    const Size z = a.shape.level[s], z1 = a.shape.level[s + 1];
    const Range f = TIME ? above(frames, k) : frames, r = above(rows, k), c = above(columns, k);
    const Below w = below<TIME>(f, r, c, a.laplacian, z1);
    const Range runs = rounded(w.columns, RUN), groups = rounded(c, 4);
    gradient = {shared_at<float>(0), w.frames, w.rows, runs, {runs.first, least(runs.end, z1.w)}, runs.count()};
    sums_above = sums;
    sums = {shared_at<float>(a.sums_at + u32(s & 1) * a.sums_bytes), f, r, groups, {groups.first, least(groups.end, z.w)}, groups.count()};

    // What the next level's gradient is here, and then what it sends back from it.
    const Weights weight = weights_of(a.unmixing, at.b, s), weight1 = weights_of(a.unmixing, at.b, s + 1);
    const i32 across = runs.count() / RUN, lines = w.rows.count(), there = w.frames.count() * lines * across;
    VK_NO_UNROLL
    for (i32 i = i32(thread_index()); i < there; i += THREADS) {
      const Spot p = spot(z1, at.c, w.frames.first + i / across / lines, w.rows.first + i / across % lines, runs.first + i % across * RUN);
      float v[RUN];
      take_gradient<RUN>(v, a.unmixing, a.shape, s + 1, at.b, p, z1.w - p.x, weight1);
      gradient.put4(p.t, p.y, p.x, v);
      gradient.put4(p.t, p.y, p.x + 4, v + 4);
    }
    block_barrier();
    const i32 fours = groups.count() / 4, here = r.count() * fours;
    VK_NO_UNROLL
    for (i32 i = i32(thread_index()); i < here; i += THREADS) {
      const Spot p = spot(z, at.c, f.first, r.first + i / fours, groups.first + i % fours * 4);
      float v[4], back[4];
      take_gradient<4>(v, a.unmixing, a.shape, s, at.b, p, z.w - p.x, weight);
      gathered<TIME>(gradient, a.laplacian, p.t, p.y, p.x, back);
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n) v[n] -= back[n];
      if (s > 0) {
        // The adjoint of a mean repeats the sum above.
        VK_UNROLL
        for (i32 n = 0; n < 4; n += 2) {
          const float sum = sums_above.get(TIME ? p.t >> 1 : p.t, p.y >> 1, (p.x + n) >> 1);
          v[n] = fused(SHARE, sum, v[n]), v[n + 1] = fused(SHARE, sum, v[n + 1]);
        }
      }
      sums.put4(p.t, p.y, p.x, v);
    }
    block_barrier();
  }

  const i32 runs = up_to(columns.count(), 4), lines = 2 * rows.count();
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < FRAMES * lines * runs; i += THREADS) {
    const i32 line = i / runs;
    const Spot p = spot(finest, at.c, FRAMES * at.t + line / lines, 2 * rows.first + line % lines, 2 * columns.first + i % runs * RUN);
    float v[RUN], sum[4];
    gradient.get4(p.t, p.y, p.x, v);
    gradient.get4(p.t, p.y, p.x + 4, v + 4);
    sums.get4(at.t, p.y >> 1, p.x >> 1, sum);
    VK_UNROLL
    for (i32 n = 0; n < RUN; ++n) v[n] = fused(SHARE, sum[n / 2], v[n]);
    give_run<RUN>(v, a.dx, a.shape, last, at.b, p, finest.w - p.x);
  }
}

}  // namespace pyramid
}  // namespace vk

using vk::pyramid::Analysis;
using vk::pyramid::AnalysisAdjoint;

VK_KERNEL(VK_FIVE_BLOCKS) pyramid_levels_apart(const Analysis given) { vk::pyramid::analysis<false>(given); }
VK_KERNEL(VK_FOUR_BLOCKS) pyramid_levels_apart_time(const Analysis given) { vk::pyramid::analysis<true>(given); }
VK_KERNEL(VK_FIVE_BLOCKS) pyramid_levels_apart_adjoint(const AnalysisAdjoint given) { vk::pyramid::analysis_adjoint<false>(given); }
VK_KERNEL(VK_FIVE_BLOCKS) pyramid_levels_apart_adjoint_time(const AnalysisAdjoint given) { vk::pyramid::analysis_adjoint<true>(given); }
VK_ENTRY(pyramid_levels_apart, Analysis)
VK_ENTRY(pyramid_levels_apart_time, Analysis)
VK_ENTRY(pyramid_levels_apart_adjoint, AnalysisAdjoint)
VK_ENTRY(pyramid_levels_apart_adjoint_time, AnalysisAdjoint)
