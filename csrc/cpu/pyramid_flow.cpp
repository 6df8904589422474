// Pyramids in one pass: a volume becomes levels (with noise, interpolation and target), levels become a volume (after a guided Euler
// step), and the adjoint of each. A tile holds what it needs of every level in cache; memory is read once and written once.
#include "cpu/pyramid_tiles.h"

namespace vk {
namespace VK_ISA {
namespace {

constexpr int64_t PLANE = 32768, VOLUME = 65536;  // fine values of a tile: half of a second cache
VK_INLINE int64_t budget(const PyramidArgs& a) { return a.ft == 2 ? VOLUME : PLANE; }
VK_INLINE int64_t halo_of(const PyramidArgs& a) { return a.kind == LAPLACIAN ? 1 : 0; }
VK_INLINE int64_t pyramid_width(const PyramidArgs& a) { return a.size[a.levels - 1].w; }
VK_INLINE bool in_tokens(const LevelView* views, int levels) {
  for (int s = 0; s < levels; ++s)
    if (views[s].data && views[s].c == views[s].pt * views[s].ph * views[s].pw) return true;
  return false;
}
// Positions of a level that the filter `up` reads to make the positions r of the next one.
VK_INLINE Range read_by_up(const PyramidArgs& a, Range r, int64_t n) {
  if (a.kind == LAPLACIAN) return {most(0, (r.lo + 1) / 2 - 1), least(n, r.hi / 2 + 1)};
  return {r.lo / 2, (r.hi + 1) / 2};
}

// Boxes and filters of one thread, cut from its scratch.
struct Work {
  Apply apply;
  Box box[PYRAMID_LEVELS];
  float *row, *buffer, *block;

  static int64_t floats(const PyramidArgs& a, const Tiling2& tiling, int64_t halo) {
    const int64_t w = pyramid_width(a), pitch = Apply::pitch_for(w);
    int64_t n = Apply::floats(w) + 4 * pitch + tiling.largest(a, a.levels - 1, halo) + SLACK;
    for (int s = 0; s < a.levels; ++s) n += 2 * (tiling.largest(a, s, halo) + SLACK + LANES);
    return n;
  }
  void init(const PyramidArgs& a, const Tiling2& tiling, int64_t halo, Scratch& scratch) {
    const int64_t w = pyramid_width(a), pitch = Apply::pitch_for(w);
    apply.init(a.kind, a.ft, w, scratch.take(Apply::floats(w)));
    row = scratch.take(pitch), buffer = scratch.take(3 * pitch);
    block = scratch.take(tiling.largest(a, a.levels - 1, halo) + SLACK);
  }
  // The volume over these ranges: where it lies if its rows are fp32, else a copy.
  Box volume(const PyramidArgs& a, int64_t b, int64_t c, Range t, Range y, Scratch& scratch) {
    const LevelView& x = a.volume;
    const int64_t w = pyramid_width(a);
    if (!x.bf16) return Box{static_cast<const float*>(x.data) + offset_of(x, b, c, t.lo, y.lo), t, y, x.t, x.y};
    Box box = make_box(t, y, w, scratch.take(t.n() * y.n() * w + SLACK));
    for (int64_t i = t.lo; i < t.hi; ++i)
      for (int64_t j = y.lo; j < y.hi; ++j) load_run(x, offset_of(x, b, c, i, j), 0, w, true, box.own_row(i, j));
    return box;
  }
};

}  // namespace

// volume -> out[0] (z or the level itself), out[1] (target); see mix_level.
int pyramid_analysis(const PyramidArgs& a) {
  const Tiling2 tiling(a, budget(a));
  const int top = a.levels - 1;
  const int64_t halo = halo_of(a);
  return each_tile(a, tiling, Work::floats(a, tiling, halo), in_tokens(a.out[0], a.levels), [&](Scratch& scratch, const Tile& tile) {
    Work w;
    w.init(a, tiling, halo, scratch);
    Range ts[PYRAMID_LEVELS], ys[PYRAMID_LEVELS];
    for (int s = 0; s <= top; ++s) {
      // The margin of one coarsest position, times what it is at this level; the finest is read no further than that.
      const int st = a.ft == 2 ? s : 0;
      ts[s] = a.ft == 2 ? widen(tile.t[s], halo << st, a.size[s].t) : tile.t[s];
      ys[s] = widen(tile.y[s], halo << s, a.size[s].h);
    }
    w.box[top] = w.volume(a, tile.b, tile.c, ts[top], ys[top], scratch);
    for (int s = top - 1; s >= 0; --s) {
      Box& g = w.box[s] = make_box(ts[s], ys[s], a.size[s].w, scratch.take(ts[s].n() * ys[s].n() * a.size[s].w + SLACK));
      for (int64_t t = ts[s].lo; t < ts[s].hi; ++t)
        for (int64_t y = ys[s].lo; y < ys[s].hi; ++y)
          w.apply.operator()<SET>(DOWN, w.box[s + 1], a.size[s + 1], t, y, a.size[s].w, nullptr, g.own_row(t, y));
    }
    for (int s = 0; s < a.levels && a.out[0][s].data; ++s) {
      const int64_t width = a.size[s].w, rows = tile.y[s].n();
      for (int64_t t = tile.t[s].lo; t < tile.t[s].hi; ++t) {
        for (int64_t y = tile.y[s].lo; y < tile.y[s].hi && !is_masked(a, tile.b, s); ++y) {
          float* to = w.block + (y - tile.y[s].lo) * width;
          if (s == 0)
            memcpy(to, w.box[0].row(t, y), static_cast<size_t>(width) * 4);
          else
            w.apply.operator()<SUBTRACT>(UP, w.box[s - 1], a.size[s - 1], t, y, width, w.box[s].row(t, y), to);
        }
        mix_level(a, s, tile.b, tile.c, t, tile.y[s].lo, rows, w.block);
      }
    }
  });
}

// in[0], in[1] (gradients of what pyramid_analysis writes) -> volume.
int pyramid_analysis_adjoint(const PyramidArgs& a) {
  const Tiling2 tiling(a, budget(a));
  const int top = a.levels - 1;
  const int64_t halo = halo_of(a);
  return each_tile(a, tiling, Work::floats(a, tiling, 1), in_tokens(a.in[0], a.levels), [&](Scratch& scratch, const Tile& tile) {
    Work w;
    w.init(a, tiling, 1, scratch);
    Box grad[PYRAMID_LEVELS];
    for (int s = 0; s < a.active; ++s) {
      // One position more on each side than the tile's own: the adjoint of `up` reads it.
      const Range t = s && a.ft == 2 ? widen(tile.t[s], halo, a.size[s].t) : tile.t[s];
      const Range y = s ? widen(tile.y[s], halo, a.size[s].h) : tile.y[s];
      grad[s] = make_box(t, y, a.size[s].w, scratch.take(t.n() * y.n() * a.size[s].w + SLACK));
      for (int64_t i = t.lo; i < t.hi; ++i)
        for (int64_t j = y.lo; j < y.hi; ++j) {
          unmix_row(a, s, tile.b, tile.c, i, j, w.row, w.buffer);
          memcpy(grad[s].own_row(i, j), w.row, static_cast<size_t>(a.size[s].w) * 4);
        }
    }
    for (int s = 0; s <= top; ++s) {
      const LevelSize& size = a.size[s];
      Box& g = w.box[s] = make_box(tile.t[s], tile.y[s], size.w, scratch.take(tile.t[s].n() * tile.y[s].n() * size.w + SLACK));
      for (int64_t t = tile.t[s].lo; t < tile.t[s].hi; ++t)
        for (int64_t y = tile.y[s].lo; y < tile.y[s].hi; ++y) {
          float* to = g.own_row(t, y);
          if (s < a.active && s + 1 < a.active)
            w.apply.operator()<SUBTRACT>(UP_T, grad[s + 1], a.size[s + 1], t, y, size.w, grad[s].row(t, y), to);
          else if (s < a.active)
            memcpy(to, grad[s].row(t, y), static_cast<size_t>(size.w) * 4);
          if (s && s < a.active)
            w.apply.operator()<ADD>(DOWN_T, w.box[s - 1], a.size[s - 1], t, y, size.w, to, to);
          else if (s)
            w.apply.operator()<SET>(DOWN_T, w.box[s - 1], a.size[s - 1], t, y, size.w, nullptr, to);
          if (s == top) store_run(a.volume, offset_of(a.volume, tile.b, tile.c, t, y), 0, size.w, true, to, a.stream);
        }
    }
  });
}

// in[0] (levels; with a table after a step along in[1], in[2]) -> volume; see stepped_row.
int pyramid_synthesis(const PyramidArgs& a) {
  const Tiling2 tiling(a, budget(a));
  const int top = a.levels - 1;
  return each_tile(a, tiling, Work::floats(a, tiling, 2), false, [&](Scratch& scratch, const Tile& tile) {
    Work w;
    w.init(a, tiling, 2, scratch);
    Range ts[PYRAMID_LEVELS], ys[PYRAMID_LEVELS];
    ts[top] = tile.t[top], ys[top] = tile.y[top];
    for (int s = top; s > 0; --s) {
      ts[s - 1] = a.ft == 2 ? read_by_up(a, ts[s], a.size[s - 1].t) : ts[s];
      ys[s - 1] = read_by_up(a, ys[s], a.size[s - 1].h);
    }
    for (int s = 0; s <= top; ++s) {
      const int64_t width = a.size[s].w;
      Box& r = w.box[s];
      if (s < top) r = make_box(ts[s], ys[s], width, scratch.take(ts[s].n() * ys[s].n() * width + SLACK));
      for (int64_t t = ts[s].lo; t < ts[s].hi; ++t)
        for (int64_t y = ys[s].lo; y < ys[s].hi; ++y) {
          stepped_row(a, s, tile.b, tile.c, t, y, w.row, w.buffer);
          if (s) w.apply.operator()<ADD>(UP, w.box[s - 1], a.size[s - 1], t, y, width, w.row, w.row);
          if (s < top)
            memcpy(r.own_row(t, y), w.row, static_cast<size_t>(width) * 4);
          else
            store_run(a.volume, offset_of(a.volume, tile.b, tile.c, t, y), 0, width, true, w.row, a.stream);
        }
    }
  });
}

// volume (a gradient) -> out[0] = scale g_s; with a table also out[1] = w (dt (scale g_s)) and out[2] = (1 - w) (dt (scale g_s)); without
// out[2] there is no guidance, and w = 1.
int pyramid_synthesis_adjoint(const PyramidArgs& a) {
  const Tiling2 tiling(a, budget(a));
  const int top = a.levels - 1;
  const int64_t halo = halo_of(a);
  return each_tile(a, tiling, Work::floats(a, tiling, 2), false, [&](Scratch& scratch, const Tile& tile) {
    Work w;
    w.init(a, tiling, 2, scratch);
    Range ts[PYRAMID_LEVELS], ys[PYRAMID_LEVELS];
    ts[0] = tile.t[0], ys[0] = tile.y[0];
    for (int s = 1; s <= top; ++s) {
      const Range t = ts[s - 1], y = ys[s - 1];
      ts[s] = a.ft == 2 ? widen({2 * t.lo, 2 * t.hi}, halo, a.size[s].t) : t;
      ys[s] = widen({2 * y.lo, 2 * y.hi}, halo, a.size[s].h);
    }
    w.box[top] = w.volume(a, tile.b, tile.c, ts[top], ys[top], scratch);
    for (int s = top; s >= 0; --s) {
      const int64_t width = a.size[s].w;
      if (s < top) {
        Box& g = w.box[s] = make_box(ts[s], ys[s], width, scratch.take(ts[s].n() * ys[s].n() * width + SLACK));
        for (int64_t t = ts[s].lo; t < ts[s].hi; ++t)
          for (int64_t y = ys[s].lo; y < ys[s].hi; ++y)
            w.apply.operator()<SET>(UP_T, w.box[s + 1], a.size[s + 1], t, y, width, nullptr, g.own_row(t, y));
      }
      const float* k = a.table ? coefficients(a, tile.b, s) : nullptr;
      const float weight[3] = {1.f, k && a.out[2][0].data ? k[1] : 1.f, k ? 1.f - k[1] : 1.f};
      for (int p = 0; p < 3; ++p) {
        const LevelView& view = a.out[p][s];
        if (!view.data) continue;
        for (int64_t t = tile.t[s].lo; t < tile.t[s].hi; ++t)
          for (int64_t y = tile.y[s].lo; y < tile.y[s].hi; ++y) {
            const float* g = w.box[s].row(t, y);
            for (int64_t i = 0; i < width; ++i) w.row[i] = weight[p] * ((p ? k[0] : 1.f) * (a.scale[s] * g[i]));
            store_run(view, offset_of(view, tile.b, tile.c, t, y), 0, width, false, w.row, a.stream);
          }
      }
    }
  });
}

}  // namespace VK_ISA
}  // namespace vk
