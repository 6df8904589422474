// What the pyramid kernels share: where the values of a level lie, runs of eight of them in and out of memory, and what happens to them
// there. Tensors come in float32, bfloat16 or float16, each as it is: one text serves every mixture, and the branch on a type is the same
// for all threads. A run moves in 16-byte pieces wherever its address allows.
//
// Levels count from the coarsest, 0. Elements count the values of one sample of one level in the order channel, time, row, column.
#pragma once
#include "device/memory.h"
#include "device/philox.h"
#include "device/warp.h"

// The threads of a kernel of these, and the blocks that a multiprocessor has room for: left to itself, ptxas spills to make room for more.
#define VK_FIVE_BLOCKS 128, 5
#define VK_FOUR_BLOCKS 128, 4

namespace vk {
namespace pyramid {

constexpr i32 LEVELS = 4, THREADS = 128, RUN = 8;
enum Type { F32, BF16, F16 };

struct Size {
  i32 t, h, w;
};
struct Shape {
  Size level[LEVELS];
  i64 count[LEVELS];   // values of a sample
  i32 patch[3];        // of the coarsest level, where levels are columns of a matrix of tokens; they grow with the levels
  i32 halves_time;     // 2 where time is pooled too, 1 where not
  i32 levels;
};
// One argument's levels: dense within a sample, or with `tokens` columns of a matrix from `column` on, `row` between its rows.
struct Role {
  void* at[LEVELS];
  i64 batch[LEVELS], row;
  i32 column[LEVELS], type[LEVELS], tokens;
};
// One argument's volume [B, C, T, H, W]; the last stride is 1.
struct Volume {
  void* at;
  i64 batch, channel, frame, row;
  i32 type;
};
// Rows of float32 per sample and level, and which levels of a sample take part (a byte each; null: all).
struct Table {
  const float* at;
  i64 batch, level;
};
struct Alive {
  const u8* mask;
  i64 batch;
  i32 active;
};
struct Random {
  u32 key0, key1, offset, first_sample;
};
// A place in a sample of a level.
struct Spot {
  i32 c, t, y, x;
  i64 e;  // the element there
};

VK_DEVICE i32 least(i32 a, i32 b) { return a < b ? a : b; }
VK_DEVICE i32 most(i32 a, i32 b) { return a > b ? a : b; }
VK_DEVICE i32 up_to(i32 n, i32 part) { return (n + part - 1) / part; }
// 3/4 near + 1/4 far; the product is exact.
VK_DEVICE float quarter_way(float near, float far) { return fused(0.25f, far - near, near); }
VK_DEVICE bool on_16_bytes(const void* p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

VK_DEVICE Spot spot(const Size& z, i32 c, i32 t, i32 y, i32 x) { return {c, t, y, x, ((i64(c) * z.t + t) * z.h + y) * z.w + x}; }

VK_DEVICE bool alive(const Alive& a, i64 b, i32 s) { return s < a.active && (!a.mask || load(a.mask + b * a.batch + s)); }
VK_DEVICE const float* row_of(const Table& t, i64 b, i32 s) { return t.at + b * t.batch + s * t.level; }

// ---- runs in memory -----------------------------------------------------------------------------------------------------------
VK_DEVICE float widened(u32 half, i32 type) { return type == BF16 ? Number<bf16>::low(half) : Number<f16>::low(half); }
VK_DEVICE u32 narrowed(float low, float high, i32 type) {
  return type == BF16 ? Number<bf16>::pack(low, high) : Number<f16>::pack(low, high);
}

// N values from index `at` on, of which the first n are there; zeros for the others, which are not read.
template <i32 N>
VK_DEVICE void take(float* v, const void* from, i64 at, i32 type, i32 n) {
  if (type == F32) {
    const float* p = static_cast<const float*>(from) + at;
    VK_UNROLL
    for (i32 h = 0; h < N; h += 4) {
      if (N >= 4 && n >= h + 4 && on_16_bytes(p + h)) {
        const Words w = load16(p + h);
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i)
          if (h + i < N) v[h + i] = as_float(w.w[i]);
      } else {
        VK_UNROLL
        for (i32 i = h; i < h + 4 && i < N; ++i) v[i] = i < n ? load(p + i) : 0.0f;
      }
    }
  } else {
    const u16* p = static_cast<const u16*>(from) + at;
    if (N == 8 && n >= 8 && on_16_bytes(p)) {
      const Words w = load16(p);
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) v[i] = widened(w.w[i / 2] >> (i % 2 * 16), type);
    } else {
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) v[i] = i < n ? widened(load(p + i), type) : 0.0f;
    }
  }
}

// The first n of N values to index `at` on.
template <i32 N>
VK_DEVICE void give(const float* v, void* to, i64 at, i32 type, i32 n) {
  if (type == F32) {
    float* p = static_cast<float*>(to) + at;
    VK_UNROLL
    for (i32 h = 0; h < N; h += 4) {
      if (N >= 4 && n >= h + 4 && on_16_bytes(p + h)) {
        Words w;
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i) w.w[i] = h + i < N ? as_bits(v[h + i]) : 0u;
        store16(p + h, w);
      } else {
        VK_UNROLL
        for (i32 i = h; i < h + 4 && i < N; ++i)
          if (i < n) store(p + i, v[i]);
      }
    }
  } else {
    u16* p = static_cast<u16*>(to) + at;
    if (N == 8 && n >= 8 && on_16_bytes(p)) {
      Words w;
      VK_UNROLL
      for (i32 i = 0; i < N / 2; ++i) w.w[i % 4] = narrowed(v[2 * i], v[2 * i + 1], type);
      store16(p, w);
    } else {
      VK_UNROLL
      for (i32 i = 0; i < N; ++i)
        if (i < n) store(p + i, u16(narrowed(v[i], 0.0f, type)));
    }
  }
}

// ---- runs of a level ----------------------------------------------------------------------------------------------------------
struct Patch {
  i32 t, h, w;
};
VK_DEVICE Patch patch_of(const Shape& g, i32 s) {
  return {g.halves_time == 2 ? g.patch[0] << s : g.patch[0], g.patch[1] << s, g.patch[2] << s};
}

// Index of one value in a matrix of tokens, without the sample's.
VK_DEVICE i64 in_tokens(const Role& r, const Size& z, const Patch& q, i32 s, const Spot& p) {
  const i32 token = (p.t / q.t * (z.h / q.h) + p.y / q.h) * (z.w / q.w) + p.x / q.w;
  return token * r.row + r.column[s] + ((i64(p.c) * q.t + p.t % q.t) * q.h + p.y % q.h) * q.w + p.x % q.w;
}

// Calls whole(at) for a run of N values at `p` that lie side by side from index `at` on, and otherwise four(i, at) or one(i, at) for pieces
// of it from value i on, of the first n. A run of tokens stays in its row.
template <i32 N, typename Whole, typename Four, typename One>
VK_DEVICE void pieces(const Role& r, const Shape& g, i32 s, i64 b, const Spot& p, i32 n, Whole whole, Four four, One one) {
  i64 at = b * r.batch[s];
  if (!r.tokens) return whole(at + p.e);
  const Patch q = patch_of(g, s);
  i32 inside = p.x % q.w;
  at += in_tokens(r, g.level[s], q, s, p);
  if (inside + N <= q.w) return whole(at);
  const auto go_on = [&](i32 by) {
    at += by, inside += by;
    if (inside < q.w) return;
    inside = 0, at += r.row - q.w;
  };
  VK_UNROLL
  for (i32 h = 0; h < N; h += 4) {
    if (inside + 4 <= q.w && n >= h + 4) {
      four(h, at);
      go_on(4);
    } else {
      VK_UNROLL
      for (i32 i = h; i < h + 4; ++i) {
        if (i < n) one(i, at);
        go_on(1);
      }
    }
  }
}

// A run of N values (8 or 4) of level s of sample b from spot p on, of which n are there. A run of a dense level may go on in the next row.
template <i32 N>
VK_DEVICE void take_run(float* v, const Role& r, const Shape& g, i32 s, i64 b, const Spot& p, i32 n) {
  VK_UNROLL
  for (i32 i = 0; i < N; ++i) v[i] = 0;
  pieces<N>(
      r, g, s, b, p, n, [&](i64 at) { take<N>(v, r.at[s], at, r.type[s], n); },
      [&](i32 i, i64 at) { take<4>(v + i, r.at[s], at, r.type[s], 4); }, [&](i32 i, i64 at) { take<1>(v + i, r.at[s], at, r.type[s], 1); });
}
template <i32 N>
VK_DEVICE void give_run(const float* v, const Role& r, const Shape& g, i32 s, i64 b, const Spot& p, i32 n) {
  pieces<N>(
      r, g, s, b, p, n, [&](i64 at) { give<N>(v, r.at[s], at, r.type[s], n); },
      [&](i32 i, i64 at) { give<4>(v + i, r.at[s], at, r.type[s], 4); }, [&](i32 i, i64 at) { give<1>(v + i, r.at[s], at, r.type[s], 1); });
}

// Index of a volume's row.
VK_DEVICE i64 row_at(const Volume& v, i64 b, i32 c, i32 t, i32 y) { return b * v.batch + c * v.channel + t * v.frame + y * v.row; }

// ---- what happens to runs -----------------------------------------------------------------------------------------------------
// Levels on their way out: scale x, or with a table alpha x + sigma eps into z and d_alpha x + d_sigma eps into v. eps comes from the
// generator or, with `given`, from memory.
struct Mixing {
  Role z, v, eps;
  Table table;
  Alive alive;
  Random random;
  float scale[LEVELS];
  i32 mix, has_v, given;
};

VK_DEVICE Draw draw_of(const Random& r, i64 b, i32 s) { return {r.key0, r.key1, u32(s), r.first_sample + u32(b), r.offset}; }

// A run of level s. What does not take part is zeros, whatever x holds.
VK_DEVICE void emit(const Mixing& m, const Shape& g, i32 s, i64 b, const Spot& p, float (&x)[RUN], i32 n, bool takes_part) {
  float v[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) x[i] = takes_part ? m.scale[s] * x[i] : 0.0f, v[i] = 0;
  if (m.mix && takes_part) {
    float eps[RUN];
    if (m.given) take_run<RUN>(eps, m.eps, g, s, b, p, n);
    else normals8(eps, p.e, draw_of(m.random, b, s));
    const float* row = row_of(m.table, b, s);
    const float alpha = load(row), sigma = load(row + 1), d_alpha = load(row + 2), d_sigma = load(row + 3);
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) {
      v[i] = fused(d_alpha, x[i], times(d_sigma, eps[i]));
      x[i] = fused(alpha, x[i], times(sigma, eps[i]));
    }
  }
  give_run<RUN>(x, m.z, g, s, b, p, n);
  if (m.has_v) give_run<RUN>(v, m.v, g, s, b, p, n);
}

// The gradients of such levels, and what each is multiplied by: scale alpha dz + scale d_alpha dv; either may be absent, and plain levels
// have no table.
struct Unmixing {
  Role dz, dv;
  Table table;
  Alive alive;
  float scale[LEVELS];
  i32 has_z, has_v, has_table;
};
struct Weights {
  float z, v;
  bool takes_part;
};
VK_DEVICE Weights weights_of(const Unmixing& m, i64 b, i32 s) {
  Weights w{0, 0, alive(m.alive, b, s)};
  if (!w.takes_part) return w;
  w.z = m.scale[s];
  if (m.has_table) {
    const float* row = row_of(m.table, b, s);
    w.z = m.scale[s] * load(row), w.v = m.scale[s] * load(row + 2);
  }
  return w;
}
template <i32 N>
VK_DEVICE void take_gradient(float* v, const Unmixing& m, const Shape& g, i32 s, i64 b, const Spot& p, i32 n, const Weights& w) {
  VK_UNROLL
  for (i32 i = 0; i < N; ++i) v[i] = 0;
  if (!w.takes_part) return;
  if (m.has_z) {
    take_run<N>(v, m.dz, g, s, b, p, n);
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) v[i] *= w.z;
  }
  if (m.has_v) {
    float more[N];
    take_run<N>(more, m.dv, g, s, b, p, n);
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) v[i] = fused(w.v, more[i], v[i]);
  }
}

// A state after a guided Euler step, scale (z + dt (u + w (c - u))); plain dt c without u, and without a step scale z.
struct Stepping {
  Role z, c, u;
  Table table;  // (dt, w)
  float scale[LEVELS];
  i32 step, guided;
};
VK_DEVICE void stepped(float (&v)[RUN], const Stepping& m, const Shape& g, i32 s, i64 b, const Spot& p, i32 n, bool moves) {
  take_run<RUN>(v, m.z, g, s, b, p, n);
  if (m.step && moves) {
    const float* row = row_of(m.table, b, s);
    const float dt = load(row);
    float c[RUN];
    take_run<RUN>(c, m.c, g, s, b, p, n);
    if (m.guided) {
      const float w = load(row + 1);
      float u[RUN];
      take_run<RUN>(u, m.u, g, s, b, p, n);
      VK_UNROLL
      for (i32 i = 0; i < RUN; ++i) c[i] = fused(w, c[i] - u[i], u[i]);
    }
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) v[i] = fused(dt, c[i], v[i]);
  }
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) v[i] *= m.scale[s];
}

// g, w (dt g) and (1 - w) (dt g): the gradients of a state and of its two velocities.
struct Spreading {
  Role dz, dc, du;
  Table table;
  i32 step, guided;
};
VK_DEVICE void spread(float (&v)[RUN], const Spreading& m, const Shape& g, i32 s, i64 b, const Spot& p, i32 n, bool moved) {
  give_run<RUN>(v, m.dz, g, s, b, p, n);
  if (!m.step || !moved) return;
  const float* row = row_of(m.table, b, s);
  const float dt = load(row), w = m.guided ? load(row + 1) : 1.0f;
  float other[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) {
    const float step = times(dt, v[i]);
    v[i] = m.guided ? w * step : step, other[i] = (1.0f - w) * step;
  }
  give_run<RUN>(v, m.dc, g, s, b, p, n);
  if (m.guided) give_run<RUN>(other, m.du, g, s, b, p, n);
}

}  // namespace pyramid
}  // namespace vk
