// How a pyramid is cut into tiles: a range of rows (and, where time is pooled, of frames) of the coarsest level, over the whole
// width, of one channel of one sample, with everything above it. Results do not depend on the cut.
#pragma once

#include "cpu/pyramid_mix.h"

namespace vk {
namespace VK_ISA {

struct Tile {
  int64_t b, c;
  Range t[PYRAMID_LEVELS], y[PYRAMID_LEVELS];
};

struct Tiling2 {
  int64_t tile_t, tile_y, nt, ny, count;

  Tiling2(const PyramidArgs& a, int64_t fine_values) {
    const int top = a.levels - 1;
    const LevelSize &coarse = a.size[0], &fine = a.size[top];
    const int64_t step = a.kind == DCT && top ? DCT_BLOCK / 2 : 1;
    tile_t = 1, tile_y = coarse.h;
    if (a.ft == 2) {
      tile_t = step;
      const int64_t frames = step << top;
      if (frames * fine.h * fine.w <= fine_values) tile_t = most(1, fine_values / (fine.h * fine.w << top));
      else tile_y = fine_values / (frames * fine.w << top);
    } else if (fine.h * fine.w > fine_values) {
      tile_y = fine_values / (fine.w << top);
    }
    if (a.tile_t) tile_t = a.tile_t;
    if (a.tile_y) tile_y = a.tile_y;
    const int64_t step_t = a.ft == 2 ? step : 1;
    tile_t = least(coarse.t, most(1, tile_t / step_t) * step_t);
    tile_y = least(coarse.h, most(1, tile_y / step) * step);
    nt = (coarse.t + tile_t - 1) / tile_t, ny = (coarse.h + tile_y - 1) / tile_y;
    count = a.batch * a.channels * nt * ny;
  }
  // Token matrices interleave channels, so there the channels of a place come one after the other.
  Tile tile(const PyramidArgs& a, int64_t i, bool channels_last) const {
    Tile r;
    const int64_t places = nt * ny;
    int64_t place;
    if (channels_last)
      r.c = i % a.channels, place = i / a.channels % places, r.b = i / (a.channels * places);
    else
      place = i % places, r.c = i / places % a.channels, r.b = i / (places * a.channels);
    const int64_t t0 = place / ny * tile_t, y0 = place % ny * tile_y;
    for (int s = 0; s < a.levels; ++s) {
      const int st = a.ft == 2 ? s : 0;
      r.t[s] = {t0 << st, least((t0 + tile_t) << st, a.size[s].t)};
      r.y[s] = {y0 << s, least((y0 + tile_y) << s, a.size[s].h)};
    }
    return r;
  }
  // Values of the largest box of level s with a margin of `halo` coarsest positions on every side.
  int64_t largest(const PyramidArgs& a, int s, int64_t halo) const {
    const int st = a.ft == 2 ? s : 0;
    const int64_t frames = least((tile_t + (a.ft == 2 ? 2 * halo : 0)) << st, a.size[s].t);
    return frames * least((tile_y + 2 * halo) << s, a.size[s].h) * a.size[s].w;
  }
};

VK_INLINE Range widen(Range r, int64_t by, int64_t n) { return {most(0, r.lo - by), least(n, r.hi + by)}; }

VK_INLINE Box make_box(Range t, Range y, int64_t w, float* data) { return Box{data, t, y, y.n() * w, w}; }

// Runs body(scratch, tile) for every tile; `floats` is the scratch of a thread.
template <class Body>
int each_tile(const PyramidArgs& a, const Tiling2& tiling, int64_t floats, bool channels_last, const Body& body) {
  const int64_t values = a.batch * a.channels * a.size[a.levels - 1].t * a.size[a.levels - 1].h * a.size[a.levels - 1].w;
  const int threads = values < 16384 || a.threads < 1 ? 1 : a.threads;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
  {
    Scratch scratch;
    if (!scratch.get(floats)) failed = 1;
    float* start = scratch.at;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiling.count; ++i) {
      if (failed) continue;
      scratch.at = start;
      body(scratch, tiling.tile(a, i, channels_last));
    }
    if (a.stream) stream_end();
    scratch.free_all();
  }
  return failed;
}

}  // namespace VK_ISA
}  // namespace vk
