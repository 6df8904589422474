// Tiles of levels in shared memory, and the filters of common/pyramid.h on them: interpolation to the next finer level and its adjoint,
// eight and four values at a time. Laplacian and Haar; in the order of operations of the reference: time, rows, columns.
#pragma once
#include "pyramid.h"

namespace vk {
namespace pyramid {

// Which tile of which level a block has. Groups of tiles follow each other: group g has `across` x `down` tiles of `rows` x `columns`
// values over every frame and channel of its level.
struct Tiling {
  i32 first[LEVELS], rows[LEVELS], columns[LEVELS], across[LEVELS], down[LEVELS], frames[LEVELS];
  i32 groups, per_sample;
};
struct Tile {
  i64 b;
  i32 group, c, t, y, x;  // its first value
  VK_DEVICE explicit Tile(const Tiling& g) {
    const i32 pid = i32(block_index());
    b = pid / g.per_sample;
    i32 i = pid % g.per_sample;
    group = 0;
    while (group + 1 < g.groups && i >= g.first[group + 1]) ++group;
    i -= g.first[group];
    x = i % g.across[group] * g.columns[group], i /= g.across[group];
    y = i % g.down[group] * g.rows[group], i /= g.down[group];
    t = i % g.frames[group], c = i / g.frames[group];
  }
};

// first <= i < end
struct Range {
  i32 first, end;
  VK_DEVICE i32 count() const { return end - first; }
  VK_DEVICE i32 clamped(i32 i) const { return most(first, least(i, end - 1)); }
};
// With `halo` more on both sides, inside 0 .. n - 1.
VK_DEVICE Range widened(const Range& r, i32 halo, i32 n) { return {most(r.first - halo, 0), least(r.end + halo, n)}; }
// What of a level 2^k times coarser lies above the range.
VK_DEVICE Range above(const Range& r, i32 k) { return {r.first >> k, ((r.end - 1) >> k) + 1}; }
// Multiples of `part` around it.
VK_DEVICE Range rounded(const Range& r, i32 part) { return {r.first / part * part, up_to(r.end, part) * part}; }

// Float32 values of a level in shared memory: frames, rows and columns of ranges, `pitch` values from row to row. Columns come in whole
// groups that begin at a multiple of four, `kept` says which of them hold values of the level.
struct Window {
  Shared<float> at;
  Range frames, rows, columns, kept;
  i32 pitch;

  VK_DEVICE Shared<u8> place(i32 t, i32 y, i32 x) const {
    return bytes_of(at + (((t - frames.first) * rows.count() + (y - rows.first)) * pitch + (x - columns.first)));
  }
  // Four values from a multiple of four on.
  VK_DEVICE void put4(i32 t, i32 y, i32 x, const float* v) const {
    Words w;
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) w.w[i] = as_bits(v[i]);
    store16(place(t, y, x), w);
  }
  VK_DEVICE void get4(i32 t, i32 y, i32 x, float* v) const {
    const Words w = load16(place(t, y, x));
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) v[i] = as_float(w.w[i]);
  }
  VK_DEVICE float get(i32 t, i32 y, i32 x) const { return as_float(load4(place(t, y, kept.clamped(x)))); }
};

// The N values from x on (a multiple of four), and one more on each side, edges repeated: m[0] is the one before.
template <i32 N>
VK_DEVICE void get_around(const Window& w, i32 t, i32 y, i32 x, float (&m)[N + 2]) {
  m[0] = w.get(t, y, x - 1);
  VK_UNROLL
  for (i32 i = 0; i < N; i += 4) w.get4(t, y, x + i, m + 1 + i);
  m[N + 1] = w.get(t, y, x + N);
  VK_UNROLL
  for (i32 i = 1; i <= N; ++i)
    if (x + i >= w.kept.end) m[i + 1] = m[i];
}

// Values x .. x + 7 (x a multiple of eight) of row y and frame t of the level that is twice as fine as `w`'s, interpolated from it.
template <bool TIME>
VK_DEVICE void interpolated(const Window& w, bool laplacian, i32 t, i32 y, i32 x, float (&v)[RUN]) {
  const i32 tn = TIME ? t >> 1 : t, yn = y >> 1, xn = x >> 1;
  if (!laplacian) {
    float m[4];
    w.get4(tn, yn, xn, m);
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) v[i] = m[i / 2];
    return;
  }
  const i32 tf = TIME ? w.frames.clamped(tn + 2 * (t & 1) - 1) : t, yf = w.rows.clamped(yn + 2 * (y & 1) - 1);
  float near[6], far[6];
  get_around<4>(w, tn, yn, xn, near);
  get_around<4>(w, tn, yf, xn, far);
  if (TIME) {
    float later[6];
    get_around<4>(w, tf, yn, xn, later);
    VK_UNROLL
    for (i32 i = 0; i < 6; ++i) near[i] = quarter_way(near[i], later[i]);
    get_around<4>(w, tf, yf, xn, later);
    VK_UNROLL
    for (i32 i = 0; i < 6; ++i) far[i] = quarter_way(far[i], later[i]);
  }
  VK_UNROLL
  for (i32 i = 0; i < 6; ++i) near[i] = quarter_way(near[i], far[i]);
  VK_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    v[2 * i] = quarter_way(near[i + 1], near[i]);
    v[2 * i + 1] = quarter_way(near[i + 1], near[i + 2]);
  }
}

// The adjoint: values x .. x + 3 (x a multiple of four) of row y and frame t of the level above `w`'s.
template <bool TIME>
VK_DEVICE void gathered(const Window& w, bool laplacian, i32 t, i32 y, i32 x, float (&v)[4]) {
  float m[10];
  VK_UNROLL
  for (i32 i = 0; i < 10; ++i) m[i] = 0;
  const i32 taps = laplacian ? 4 : 2, before = laplacian ? 1 : 0;
  VK_NO_UNROLL
  for (i32 j = 0; j < taps; ++j) {
    float line[10];
    VK_UNROLL
    for (i32 i = 0; i < 10; ++i) line[i] = 0;
    VK_NO_UNROLL
    for (i32 k = 0; k < (TIME ? taps : 1); ++k) {
      float one[10];
      get_around<8>(w, TIME ? w.frames.clamped(2 * t + k - before) : t, w.rows.clamped(2 * y + j - before), 2 * x, one);
      const float weight = !TIME || !laplacian ? 1.0f : k == 1 || k == 2 ? 0.75f : 0.25f;
      VK_UNROLL
      for (i32 i = 0; i < 10; ++i) line[i] = fused(weight, one[i], line[i]);
    }
    const float weight = !laplacian ? 1.0f : j == 1 || j == 2 ? 0.75f : 0.25f;
    VK_UNROLL
    for (i32 i = 0; i < 10; ++i) m[i] = fused(weight, line[i], m[i]);
  }
  VK_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    const float near = m[2 * i + 1] + m[2 * i + 2], far = m[2 * i] + m[2 * i + 3];
    v[i] = laplacian ? fused(0.75f, near, 0.25f * far) : near;
  }
}

// What of the next finer level lies below ranges of a level, with the margin that the adjoint reads where there is one.
struct Below {
  Range frames, rows, columns;
};
template <bool TIME>
VK_DEVICE Below below(const Range& frames, const Range& rows, const Range& columns, bool laplacian, const Size& z) {
  const i32 halo = laplacian ? 1 : 0;
  return {TIME ? widened(Range{2 * frames.first, 2 * frames.end}, halo, z.t) : frames,
          widened(Range{2 * rows.first, 2 * rows.end}, halo, z.h), widened(Range{2 * columns.first, 2 * columns.end}, halo, z.w)};
}

}  // namespace pyramid
}  // namespace vk
