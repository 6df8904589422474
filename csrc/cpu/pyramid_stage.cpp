// The companions for Pyramidal Flow (arXiv 2410.05954): the two end points of a stage and what lies between them, and the jump
// from one stage to the next. Both pool rows and columns by 2 x 2 means and go back by repetition.
#include "cpu/pyramid_tiles.h"

namespace vk {
namespace VK_ISA {
namespace {

// Levels of a stage are size[0] = the resolution before it (absent for the first: active = 0), size[active] = its own, up to the finest.
constexpr int64_t PLANE = 16384;
constexpr float SQRT_4_3 = 1.15470053837925152902f;

// Halve `from` (level `fine`) down to the tile's range of every coarser level; gain 2 keeps the variance of noise.
VK_INLINE void halve(const PyramidArgs& a, const Tile& tile, Apply& apply, float gain, Box* box, Scratch& scratch) {
  apply.gain = gain;
  for (int s = a.levels - 2; s >= 0; --s) {
    box[s] = make_box(tile.t[s], tile.y[s], a.size[s].w, scratch.take(tile.t[s].n() * tile.y[s].n() * a.size[s].w + SLACK));
    for (int64_t t = tile.t[s].lo; t < tile.t[s].hi; ++t)
      for (int64_t y = tile.y[s].lo; y < tile.y[s].hi; ++y)
        apply.operator()<SET>(DOWN, box[s + 1], a.size[s + 1], t, y, a.size[s].w, nullptr, box[s].own_row(t, y));
  }
  apply.gain = 1.f;
}

VK_INLINE int64_t stage_floats(const PyramidArgs& a, const Tiling2& tiling) {
  const int64_t w = a.size[a.levels - 1].w;
  int64_t n = Apply::floats(w) + 8 * Apply::pitch_for(w);
  for (int s = 0; s < a.levels; ++s) n += 3 * (tiling.largest(a, s, 0) + SLACK + LANES);
  return n;
}

VK_INLINE Box copied(const PyramidArgs& a, const LevelView& x, const Tile& tile, Scratch& scratch) {
  const int top = a.levels - 1;
  const int64_t w = a.size[top].w;
  Box box = make_box(tile.t[top], tile.y[top], w, scratch.take(tile.t[top].n() * tile.y[top].n() * w + SLACK));
  for (int64_t t = tile.t[top].lo; t < tile.t[top].hi; ++t)
    for (int64_t y = tile.y[top].lo; y < tile.y[top].hi; ++y) {
      float* to = box.own_row(t, y);
      const float* from = load_run(x, offset_of(x, tile.b, tile.c, t, y), 0, w, true, to);
      if (from != to) memcpy(to, from, static_cast<size_t>(w) * 4);
    }
  return box;
}

}  // namespace

// volume = clean finest latent, in[0][0] = finest noise (or philox, level table_s): with (ss, se, r) of the sample
//   start = ss eps + (1 - ss) up(x before), end = se eps + (1 - se) x,  out[0] = r start + (1 - r) end, out[1] = start - end.
int pyramid_stage(const PyramidArgs& a) {
  const Tiling2 tiling(a, PLANE);
  const int top = a.levels - 1, own = a.active;
  return each_tile(a, tiling, stage_floats(a, tiling), false, [&](Scratch& scratch, const Tile& tile) {
    const int64_t pitch = Apply::pitch_for(a.size[top].w), w = a.size[own].w;
    Apply apply;
    apply.init(a.kind, a.ft, a.size[top].w, scratch.take(Apply::floats(a.size[top].w)));
    float *up = scratch.take(pitch), *z = scratch.take(pitch), *v = scratch.take(pitch);
    Box x[PYRAMID_LEVELS], eps[PYRAMID_LEVELS];
    x[top] = copied(a, a.volume, tile, scratch);
    if (a.philox) {
      const Range t = tile.t[top], y = tile.y[top];
      eps[top] = make_box(t, y, a.size[top].w, scratch.take(t.n() * y.n() * a.size[top].w + SLACK));
      float* buffer = scratch.take(pitch + SLACK);
      const NoiseKey key = noise_key(a, tile.b, static_cast<int>(a.table_s));
      for (int64_t i = t.lo; i < t.hi; ++i)
        for (int64_t j = y.lo; j < y.hi; ++j)
          memcpy(eps[top].own_row(i, j), normals(key, element_of(a.size[top], tile.c, i, j), a.size[top].w, buffer),
                 static_cast<size_t>(a.size[top].w) * 4);
    } else {
      eps[top] = copied(a, a.in[0][0], tile, scratch);
    }
    halve(a, tile, apply, 1.f, x, scratch);
    halve(a, tile, apply, 2.f, eps, scratch);
    const float* k = a.table + tile.b * a.table_b;
    const F16 ss = set1(k[0]), se = set1(k[1]), r = set1(k[2]), one = set1(1.f);
    for (int64_t t = tile.t[own].lo; t < tile.t[own].hi; ++t)
      for (int64_t y = tile.y[own].lo; y < tile.y[own].hi; ++y) {
        if (own) apply.operator()<SET>(UP, x[0], a.size[0], t, y, w, nullptr, up);
        const float *e = eps[own].row(t, y), *clean = x[own].row(t, y);
        for (int64_t i = 0; i < w; i += LANES) {
          F16 start = mul(ss, load(e + i));
          if (own) start = fma(sub(one, ss), load(up + i), start);
          const F16 end = fma(sub(one, se), load(clean + i), mul(se, load(e + i)));
          store(z + i, fma(r, start, mul(sub(one, r), end)));
          store(v + i, sub(start, end));
        }
        store_run(a.out[0][0], offset_of(a.out[0][0], tile.b, tile.c, t, y), 0, w, false, z, a.stream);
        store_run(a.out[1][0], offset_of(a.out[1][0], tile.b, tile.c, t, y), 0, w, false, v, a.stream);
      }
  });
}

// in[0][0], in[1][0] (gradients of z and target, either absent) -> volume.
int pyramid_stage_adjoint(const PyramidArgs& a) {
  const Tiling2 tiling(a, PLANE);
  const int top = a.levels - 1, own = a.active;
  return each_tile(a, tiling, stage_floats(a, tiling), false, [&](Scratch& scratch, const Tile& tile) {
    const int64_t pitch = Apply::pitch_for(a.size[top].w);
    Apply apply;
    apply.init(a.kind, a.ft, a.size[top].w, scratch.take(Apply::floats(a.size[top].w)));
    float* buffer = scratch.take(pitch);
    const float* k = a.table + tile.b * a.table_b;
    Box g[PYRAMID_LEVELS];
    for (int s = 0; s <= top; ++s)
      g[s] = make_box(tile.t[s], tile.y[s], a.size[s].w, scratch.take(tile.t[s].n() * tile.y[s].n() * a.size[s].w + SLACK));
    const int64_t w = a.size[own].w;
    Box late = make_box(tile.t[own], tile.y[own], w, scratch.take(tile.t[own].n() * tile.y[own].n() * w + SLACK));
    for (int64_t t = tile.t[own].lo; t < tile.t[own].hi; ++t)
      for (int64_t y = tile.y[own].lo; y < tile.y[own].hi; ++y) {
        float *clean = g[own].own_row(t, y), *before = late.own_row(t, y);
        memset(clean, 0, static_cast<size_t>(w) * 4), memset(before, 0, static_cast<size_t>(w) * 4);
        for (int p = 0; p < 2; ++p) {
          const LevelView& view = a.in[p][0];
          if (!view.data) continue;
          const float* from = load_run(view, offset_of(view, tile.b, tile.c, t, y), 0, w, false, buffer);
          const float to_start = (1.f - k[0]) * (p ? 1.f : k[2]), to_end = (1.f - k[1]) * (p ? -1.f : 1.f - k[2]);
          for (int64_t i = 0; i < w; ++i) clean[i] += to_end * from[i], before[i] += to_start * from[i];
        }
      }
    if (own) {
      for (int64_t t = tile.t[0].lo; t < tile.t[0].hi; ++t)
        for (int64_t y = tile.y[0].lo; y < tile.y[0].hi; ++y)
          apply.operator()<SET>(UP_T, late, a.size[own], t, y, a.size[0].w, nullptr, g[0].own_row(t, y));
    }
    for (int s = own ? 1 : 0; s <= top; ++s)
      for (int64_t t = tile.t[s].lo; t < tile.t[s].hi; ++t)
        for (int64_t y = tile.y[s].lo; y < tile.y[s].hi; ++y) {
          float* to = g[s].own_row(t, y);
          if (s && s == own)
            apply.operator()<ADD>(DOWN_T, g[s - 1], a.size[s - 1], t, y, a.size[s].w, to, to);
          else if (s > own)
            apply.operator()<SET>(DOWN_T, g[s - 1], a.size[s - 1], t, y, a.size[s].w, nullptr, to);
          if (s == top) store_run(a.volume, offset_of(a.volume, tile.b, tile.c, t, y), 0, a.size[s].w, true, to, a.stream);
        }
  });
}

// in[0][0] (coarse, size[0]) -> volume (size[1]): a up(z) + b sqrt(4/3) (g - mean of g over its 2 x 2 block), with (a, b) of the
// sample and g from the generator (level table_s) or in[1][0].
int pyramid_transition(const PyramidArgs& a) {
  const Tiling2 tiling(a, PLANE);
  const LevelSize& fine = a.size[1];
  return each_tile(a, tiling, stage_floats(a, tiling), false, [&](Scratch& scratch, const Tile& tile) {
    const int64_t pitch = Apply::pitch_for(fine.w);
    Apply apply;
    apply.init(a.kind, a.ft, fine.w, scratch.take(Apply::floats(fine.w)));
    float *row[2], *mean = scratch.take(pitch), *buffer = scratch.take(2 * pitch + SLACK);
    float *out = scratch.take(pitch), *up = scratch.take(pitch);
    row[0] = scratch.take(pitch), row[1] = scratch.take(pitch);
    const float* k = a.table + tile.b * a.table_b;
    const F16 weight = set1(k[0]), spread = set1(k[1] * SQRT_4_3);
    const NoiseKey key = noise_key(a, tile.b, static_cast<int>(a.table_s));
    const LevelView &z = a.in[0][0], &given = a.in[1][0];
    for (int64_t t = tile.t[0].lo; t < tile.t[0].hi; ++t)
      for (int64_t y = tile.y[0].lo; y < tile.y[0].hi; ++y) {
        for (int i = 0; i < 2; ++i) {
          const float* g = given.data ? load_run(given, offset_of(given, tile.b, tile.c, t, 2 * y + i), 0, fine.w, false, buffer)
                                      : normals(key, element_of(fine, tile.c, t, 2 * y + i), fine.w, buffer);
          memcpy(row[i], g, static_cast<size_t>(fine.w) * 4);
        }
        const Box pair{row[0], {t, t + 1}, {2 * y, 2 * y + 2}, 0, row[1] - row[0]};
        apply.operator()<SET>(DOWN, pair, fine, t, y, a.size[0].w, nullptr, mean);
        const Box means{mean, {t, t + 1}, {y, y + 1}, 0, 0};
        const float* from = load_run(z, offset_of(z, tile.b, tile.c, t, y), 0, a.size[0].w, false, buffer);
        const Box coarse{from, {t, t + 1}, {y, y + 1}, 0, 0};
        apply.operator()<SET>(UP, coarse, a.size[0], t, 2 * y, fine.w, nullptr, up);
        for (int i = 0; i < 2; ++i) {
          apply.operator()<SUBTRACT>(UP, means, a.size[0], t, 2 * y + i, fine.w, row[i], out);
          for (int64_t j = 0; j < fine.w; j += LANES) store(out + j, fma(weight, load(up + j), mul(spread, load(out + j))));
          store_run(a.volume, offset_of(a.volume, tile.b, tile.c, t, 2 * y + i), 0, fine.w, true, out, a.stream);
        }
      }
  });
}

// volume (a gradient) -> out[0][0] = a * (sum of each 2 x 2 block).
int pyramid_transition_adjoint(const PyramidArgs& a) {
  const Tiling2 tiling(a, PLANE);
  const LevelSize& fine = a.size[1];
  return each_tile(a, tiling, stage_floats(a, tiling), false, [&](Scratch& scratch, const Tile& tile) {
    const int64_t pitch = Apply::pitch_for(fine.w);
    Apply apply;
    apply.init(a.kind, a.ft, fine.w, scratch.take(Apply::floats(fine.w)));
    float *rows = scratch.take(2 * pitch), *sum = scratch.take(pitch);
    const float weight = a.table[tile.b * a.table_b];
    for (int64_t t = tile.t[0].lo; t < tile.t[0].hi; ++t)
      for (int64_t y = tile.y[0].lo; y < tile.y[0].hi; ++y) {
        for (int i = 0; i < 2; ++i) {
          const float* g = load_run(a.volume, offset_of(a.volume, tile.b, tile.c, t, 2 * y + i), 0, fine.w, true, rows + i * pitch);
          if (g != rows + i * pitch) memcpy(rows + i * pitch, g, static_cast<size_t>(fine.w) * 4);
        }
        const Box pair{rows, {t, t + 1}, {2 * y, 2 * y + 2}, 0, pitch};
        apply.operator()<SET>(UP_T, pair, fine, t, y, a.size[0].w, nullptr, sum);
        for (int64_t i = 0; i < a.size[0].w; ++i) sum[i] *= weight;
        store_run(a.out[0][0], offset_of(a.out[0][0], tile.b, tile.c, t, y), 0, a.size[0].w, false, sum, a.stream);
      }
  });
}

}  // namespace VK_ISA
}  // namespace vk
