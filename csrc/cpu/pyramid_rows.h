// Rows of pyramid levels: reading and writing them in any layout, and the filters of common/pyramid.h applied to them.
#pragma once

#include <stdlib.h>

#include "common/pyramid.h"
#include "cpu/normals.h"
#include "cpu/pyramid.h"

namespace vk {
namespace VK_ISA {

constexpr int64_t CHUNK = 256;          // values mixed at a time, in buffers that stay in the first cache
constexpr int64_t SLACK = 2 * NORMALS;  // vector code may run past the end of a buffer of ours by this much

VK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- views ------------------------------------------------------------------------------------------------------------------
VK_INLINE int64_t offset_of(const LevelView& v, int64_t b, int64_t c, int64_t t, int64_t y) {
  if (v.pt == 1 && v.ph == 1) return b * v.b + c * v.c + t * v.t + y * v.y;
  return b * v.b + c * v.c + t / v.pt * v.t + t % v.pt * v.ti + y / v.ph * v.y + y % v.ph * v.yi;
}
// Whether consecutive rows follow each other without a gap; `whole` asks it of all values of a sample.
VK_INLINE bool is_flat(const LevelView& v, const LevelSize& s, int64_t channels, bool whole) {
  if (!v.data) return true;
  if (v.pt != 1 || v.ph != 1 || v.pw < s.w) return false;
  if (s.h > 1 && v.y != s.w) return false;
  return !whole || ((s.t == 1 || v.t == s.h * s.w) && (channels == 1 || v.c == s.t * s.h * s.w));
}

// n values from position x on of the row (or flat run) that begins at `at`, as fp32 in `buffer`, or where they lie.
VK_INLINE const float* load_run(const LevelView& v, int64_t at, int64_t x, int64_t n, bool flat, float* buffer) {
  if (flat || v.pw >= x + n) {
    if (!v.bf16) return static_cast<const float*>(v.data) + at + x;
    const bf16* p = static_cast<const bf16*>(v.data) + at + x;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(buffer + i, load(p + i));
    for (; i < n; ++i) buffer[i] = to_float(p[i]);
    return buffer;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t o = at + (x + i) / v.pw * v.x + (x + i) % v.pw;
    buffer[i] = v.bf16 ? to_float(static_cast<const bf16*>(v.data)[o]) : static_cast<const float*>(v.data)[o];
  }
  return buffer;
}
// The same, always a buffer that vector code may read past.
VK_INLINE const float* load_own(const LevelView& v, int64_t at, int64_t x, int64_t n, bool flat, float* buffer) {
  const float* p = load_run(v, at, x, n, flat, buffer);
  if (p != buffer && n % LANES) {
    memcpy(buffer, p, static_cast<size_t>(n) * 4);
    return buffer;
  }
  return p;
}

template <class T>
VK_INLINE void put(T* p, const float* from, int64_t n, int streaming) {
  int64_t i = 0;
  if (streaming && reinterpret_cast<uintptr_t>(p) % (LANES * sizeof(T)) == 0) {
    for (; i + LANES <= n; i += LANES) stream(p + i, load(from + i));
  } else {
    for (; i + LANES <= n; i += LANES) store(p + i, load(from + i));
  }
  for (; i < n; ++i) from_float(from[i], p + i);
}

VK_INLINE void store_run(const LevelView& v, int64_t at, int64_t x, int64_t n, bool flat, const float* from, int streaming) {
  if (flat || v.pw >= x + n) {
    if (v.bf16)
      put(static_cast<bf16*>(v.data) + at + x, from, n, streaming);
    else
      put(static_cast<float*>(v.data) + at + x, from, n, streaming);
    return;
  }
  int64_t o = at + x / v.pw * v.x, in = x % v.pw;
  for (int64_t i = 0; i < n; ++i) {
    if (v.bf16)
      static_cast<bf16*>(v.data)[o + in] = to_bf16(from[i]);
    else
      static_cast<float*>(v.data)[o + in] = from[i];
    if (++in == v.pw) in = 0, o += v.x;
  }
}

// ---- filters ----------------------------------------------------------------------------------------------------------------
enum Mode { SET, SUBTRACT, ADD };  // out = result, base - result, base + result

template <int MODE>
VK_INLINE F16 join(F16 base, F16 x) {
  return MODE == SUBTRACT ? sub(base, x) : MODE == ADD ? add(base, x) : x;
}
template <int MODE>
VK_INLINE float join(float base, float x) {
  return MODE == SUBTRACT ? base - x : MODE == ADD ? base + x : x;
}

VK_INLINE void mix_rows(const Taps& t, const float* const* r, int64_t w, float* out) {
  int64_t i = 0;
  if (t.n == 1) {
    memcpy(out, r[0], static_cast<size_t>(w) * 4);
  } else if (t.mix == PAIR) {
    for (; i + LANES <= w; i += LANES) store(out + i, add(load(r[0] + i), load(r[1] + i)));
    for (; i < w; ++i) out[i] = r[0][i] + r[1][i];
  } else if (t.mix == LERP) {
    const F16 quarter = set1(0.25f);
    for (; i + LANES <= w; i += LANES) {
      const F16 a = load(r[0] + i);
      store(out + i, fma(quarter, sub(load(r[1] + i), a), a));
    }
    for (; i < w; ++i) out[i] = r[0][i] + 0.25f * (r[1][i] - r[0][i]);
  } else if (t.mix == FOUR) {
    const F16 quarter = set1(0.25f), most_ = set1(0.75f);
    for (; i + LANES <= w; i += LANES)
      store(out + i, fma(quarter, add(load(r[0] + i), load(r[3] + i)), mul(most_, add(load(r[1] + i), load(r[2] + i)))));
    for (; i < w; ++i) out[i] = 0.75f * (r[1][i] + r[2][i]) + 0.25f * (r[0][i] + r[3][i]);
  } else {
    for (; i + LANES <= w; i += LANES) {
      F16 s = mul(set1(t.w[0]), load(r[0] + i));
      for (int k = 1; k < t.n; ++k) s = fma(set1(t.w[k]), load(r[k] + i), s);
      store(out + i, s);
    }
    for (; i < w; ++i) {
      float s = t.w[0] * r[0][i];
      for (int k = 1; k < t.n; ++k) s += t.w[k] * r[k][i];
      out[i] = s;
    }
  }
}

// Columns: `in` may be read and written one value to the left and SLACK values to the right.
template <int MODE>
VK_INLINE void columns(int filter, int kind, float* in, int64_t wi, int64_t wo, float scale, const float* base, float* out) {
  int64_t i = 0;
  const F16 zeros = zero();
  if (kind == DCT) {
    const bool widens = filter == UP || filter == DOWN_T;
    for (int64_t j = 0; j < wo; ++j) {
      const Taps t = taps(filter, kind, true, j, wi);
      float s = t.w[0] * in[t.i[0]];
      for (int k = 1; k < (widens ? DCT_BLOCK / 2 : DCT_BLOCK); ++k) s += t.w[k] * in[t.i[k]];
      out[j] = join<MODE>(MODE == SET ? 0.f : base[j], s);
    }
  } else if (filter == UP && kind == LAPLACIAN) {
    in[-1] = in[0], in[wi] = in[wi - 1];
    const F16 quarter = set1(0.25f);
    for (; i + LANES <= wi; i += LANES) {
      const F16 c = load(in + i);
      F16 lo, hi;
      zip(fma(quarter, sub(load(in + i - 1), c), c), fma(quarter, sub(load(in + i + 1), c), c), &lo, &hi);
      store(out + 2 * i, join<MODE>(MODE == SET ? zeros : load(base + 2 * i), lo));
      store(out + 2 * i + LANES, join<MODE>(MODE == SET ? zeros : load(base + 2 * i + LANES), hi));
    }
    for (; i < wi; ++i)
      for (int k = 0; k < 2; ++k)
        out[2 * i + k] = join<MODE>(MODE == SET ? 0.f : base[2 * i + k], in[i] + 0.25f * (in[i + 2 * k - 1] - in[i]));
  } else if (filter == UP || filter == DOWN_T) {
    const F16 factor = set1(scale);
    for (; i + LANES <= wi; i += LANES) {
      const F16 c = mul(load(in + i), factor);
      F16 lo, hi;
      zip(c, c, &lo, &hi);
      store(out + 2 * i, join<MODE>(MODE == SET ? zeros : load(base + 2 * i), lo));
      store(out + 2 * i + LANES, join<MODE>(MODE == SET ? zeros : load(base + 2 * i + LANES), hi));
    }
    for (; i < wi; ++i)
      for (int k = 0; k < 2; ++k) out[2 * i + k] = join<MODE>(MODE == SET ? 0.f : base[2 * i + k], in[i] * scale);
  } else {
    // DOWN, and UP_T: every output from pairs of inputs, with one more on each side for the laplacian's.
    const bool four = filter == UP_T && kind == LAPLACIAN;
    in[-1] = in[0], in[wi] = in[wi - 1];
    const F16 factor = set1(four ? 0.75f : scale), quarter = set1(0.25f);
    for (; i + LANES <= wo; i += LANES) {
      F16 a, b, m, p, other;
      unzip(load(in + 2 * i), load(in + 2 * i + LANES), &a, &b);
      F16 s = mul(factor, add(a, b));
      if (four) {
        unzip(load(in + 2 * i - 1), load(in + 2 * i + LANES - 1), &m, &other);
        unzip(load(in + 2 * i + 2), load(in + 2 * i + LANES + 2), &p, &other);
        s = fma(quarter, add(m, p), s);
      }
      store(out + i, join<MODE>(MODE == SET ? zeros : load(base + i), s));
    }
    for (; i < wo; ++i) {
      const float pair = in[2 * i] + in[2 * i + 1];
      const float s = four ? 0.75f * pair + 0.25f * (in[2 * i - 1] + in[2 * i + 2]) : pair * scale;
      out[i] = join<MODE>(MODE == SET ? 0.f : base[i], s);
    }
  }
}

// Rows a, b (the nearer and the farther) to one row of twice the width, laplacian: both axes without leaving the registers. Reading
// just-written memory one value off, as `columns` has to, stalls. w is a multiple of LANES; the arithmetic is that of `columns`.
template <int MODE>
VK_INLINE void up_rows(const float* a, const float* b, int64_t w, const float* base, float* out) {
  const F16 quarter = set1(0.25f);
  const auto mixed = [&](int64_t i) {
    const F16 near = load(a + i);
    return fma(quarter, sub(load(b + i), near), near);
  };
  F16 c = mixed(0), before = first_lane(c);
  for (int64_t i = 0; i < w; i += LANES) {
    const F16 after = i + LANES < w ? mixed(i + LANES) : last_lane(c);
    F16 lo, hi;
    zip(fma(quarter, sub(from_left(before, c), c), c), fma(quarter, sub(from_right(c, after), c), c), &lo, &hi);
    store(out + 2 * i, join<MODE>(MODE == SET ? lo : load(base + 2 * i), lo));
    store(out + 2 * i + LANES, join<MODE>(MODE == SET ? hi : load(base + 2 * i + LANES), hi));
    before = c, c = after;
  }
}
// Rows a, b to one row of half the width: the sum of 2 x 2 blocks times `scale`. w, the new width, is a multiple of LANES.
VK_INLINE void down_rows(const float* a, const float* b, int64_t w, float scale, float* out) {
  const F16 factor = set1(scale);
  for (int64_t i = 0; i < w; i += LANES) {
    F16 even, odd;
    unzip(add(load(a + 2 * i), load(b + 2 * i)), add(load(a + 2 * i + LANES), load(b + 2 * i + LANES)), &even, &odd);
    store(out + i, mul(factor, add(even, odd)));
  }
}

// Rows [y.lo, y.hi) of frames [t.lo, t.hi) of one level of one sample and channel.
struct Range {
  int64_t lo, hi;
  int64_t n() const { return hi - lo; }
};
struct Box {
  const float* data;
  Range t, y;
  int64_t st, sy;
  const float* row(int64_t ti, int64_t yi) const { return data + (ti - t.lo) * st + (yi - y.lo) * sy; }
  float* own_row(int64_t ti, int64_t yi) { return const_cast<float*>(row(ti, yi)); }
};

// Memory of one thread, handed out in pieces.
struct Scratch {
  float *memory = nullptr, *at = nullptr;
  bool get(int64_t floats) {
    memory = static_cast<float*>(malloc(static_cast<size_t>(floats) * 4 + 64));
    at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    return memory != nullptr;
  }
  float* take(int64_t floats) {
    float* p = at;
    at += (floats + LANES - 1) / LANES * LANES;
    return p;
  }
  void free_all() { free(memory); }
};

// Row (t, y) of an output level made from `from`, a level of size `size`, by a filter.
struct Apply {
  int kind, ft;
  float* rows;  // MAX_TAPS + 1 rows
  int64_t pitch;
  float gain = 1.f;  // of DOWN and DOWN_T

  static int64_t pitch_for(int64_t width) { return (width + 2 * LANES + SLACK) / LANES * LANES + LANES; }
  static int64_t floats(int64_t width) { return (MAX_TAPS + 1) * pitch_for(width); }
  void init(int kind_, int ft_, int64_t width, float* memory) { kind = kind_, ft = ft_, rows = memory, pitch = pitch_for(width); }

  template <int MODE>
  void operator()(int filter, const Box& from, const LevelSize& size, int64_t t, int64_t y, int64_t width, const float* base,
                  float* out) const {
    const Taps tt = taps(filter, kind, ft == 2, t, size.t), ty = taps(filter, kind, true, y, size.h);
    const float* row[MAX_TAPS];
    for (int k = 0; k < ty.n; ++k) {
      if (tt.n == 1) {
        row[k] = from.row(tt.i[0], ty.i[k]);
        continue;
      }
      const float* frame[MAX_TAPS];
      for (int m = 0; m < tt.n; ++m) frame[m] = from.row(tt.i[m], ty.i[k]);
      float* mixed = rows + k * pitch + LANES;
      mix_rows(tt, frame, size.w, mixed);
      row[k] = mixed;
    }
    const bool mean = kind != DCT && (filter == DOWN || filter == DOWN_T);
    const float scale = mean ? gain * (ft == 2 ? 0.125f : 0.25f) : 1.f;
    if (filter == UP && kind == LAPLACIAN && size.w % LANES == 0) return up_rows<MODE>(row[0], row[1], size.w, base, out);
    if (filter == DOWN && kind != DCT && MODE == SET && width % LANES == 0) return down_rows(row[0], row[1], width, scale, out);
    float* mixed = rows + MAX_TAPS * pitch + LANES;
    mix_rows(ty, row, size.w, mixed);
    columns<MODE>(filter, kind, mixed, size.w, width, scale, base, out);
  }
};

}  // namespace VK_ISA
}  // namespace vk
