// The stages of Pyramidal Flow: block means down, repetition up, rows and columns only. A thread has eight fine columns of as many rows as
// make two rows of the stage, whose values are blocks of 2^L x 2^L.
#include "pyramid.h"

namespace vk {
namespace pyramid {

// Which run of a volume of `runs` runs a row, `rows` rows and so on a thread has.
struct Runs {
  i32 channels, frames, rows, runs, batch;
};
struct Thread {
  i64 b;
  i32 c, t, y, run;
  VK_DEVICE explicit Thread(const Runs& g) {
    u32 i = block_index() * u32(THREADS) + thread_index();  // of 16 values and more each
    run = i32(i % u32(g.runs)), i /= u32(g.runs);
    y = i32(i % u32(g.rows)), i /= u32(g.rows);
    t = i32(i % u32(g.frames)), i /= u32(g.frames);
    c = i32(i % u32(g.channels)), b = i / u32(g.channels);
  }
};

// Sums of blocks of 2^L x 2^L of what `from(row, v)` gives, eight values of a fine row: 8 >> L of them in row y of blocks.
template <i32 L, typename From>
VK_DEVICE void block_sums(float* v, const From& from, i32 y) {
  if constexpr (L == 0) {
    from(y, v);
  } else {
    constexpr i32 N = RUN >> (L - 1);
    float total[N];
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) total[i] = 0;
    VK_NO_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      float part[N];
      block_sums<L - 1>(part, from, 2 * y + j);
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) total[i] += part[i];
    }
    VK_UNROLL
    for (i32 i = 0; i < N / 2; ++i) v[i] = total[2 * i] + total[2 * i + 1];
  }
}

struct Stage {
  Volume x, eps, z, v;
  Table table;  // (s, end sigma, r)
  Random random;
  Runs runs;
  i32 height, width;  // of the stage
  i32 level, first, given;
};
template <i32 L>
VK_DEVICE void stage(const Stage& g) {
  constexpr i32 N = RUN >> L;
  const Thread at(g.runs);
  if (at.b >= g.runs.batch) return;
  const i32 fine_width = g.width << L, x = at.run * RUN, n = least(N, g.width - at.run * N);
  const float* row = row_of(g.table, at.b, 0);
  const float s = load(row), end_sigma = load(row + 1), r = load(row + 2);
  const auto clean = [&](i32 y, float* v) { take<RUN>(v, g.x.at, row_at(g.x, at.b, at.c, at.t, y) + x, g.x.type, fine_width - x); };
  const auto noise = [&](i32 y, float* v) {
    if (g.given) return take<RUN>(v, g.eps.at, row_at(g.eps, at.b, at.c, at.t, y) + x, g.eps.type, fine_width - x);
    float drawn[RUN];
    normals8(drawn, ((i64(at.c) * g.runs.frames + at.t) * (i64(g.height) << L) + y) * fine_width + x, Draw{g.random.key0, g.random.key1,
             u32(g.level), g.random.first_sample + u32(at.b), g.random.offset});
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) v[i] = drawn[i];
  };
  const i32 rows = least(2, g.height - 2 * at.y);
  float own[2][N], before[N];
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) {
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) own[j][i] = 0;
    if (j < rows) block_sums<L>(own[j], clean, 2 * at.y + j);
  }
  VK_UNROLL
  for (i32 i = 0; i < N; ++i) before[i] = 0;
  if (N > 1 && !g.first) {
    VK_UNROLL
    for (i32 i = 0; i + 1 < N; i += 2) {
      before[i] = (0.25f / (1 << 2 * L)) * ((own[0][i] + own[1][i]) + (own[0][i + 1] + own[1][i + 1]));
      before[i + 1] = before[i];
    }
  }
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) {
    if (j >= rows) break;
    const i32 y = 2 * at.y + j;
    float eps[N], z[N], v[N];
    block_sums<L>(eps, noise, y);
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) {
      const float e = eps[i] * (1.0f / (1 << L)), mean = own[j][i] * (1.0f / (1 << 2 * L));
      float begin = times(s, e);
      if (!g.first) begin = fused(1.0f - s, before[i], begin);
      const float end = fused(end_sigma, e, times(1.0f - end_sigma, mean));
      z[i] = fused(r, begin, times(1.0f - r, end)), v[i] = begin - end;
    }
    give<N>(z, g.z.at, row_at(g.z, at.b, at.c, at.t, y) + at.run * N, g.z.type, n);
    give<N>(v, g.v.at, row_at(g.v, at.b, at.c, at.t, y) + at.run * N, g.v.type, n);
  }
}

struct StageAdjoint {
  Volume dx, dz, dv;
  Table table;
  Runs runs;
  i32 height, width;  // of the stage
  i32 first, has_z, has_v;
};
template <i32 L>
VK_DEVICE void stage_adjoint(const StageAdjoint& g) {
  constexpr i32 N = RUN >> L;
  const Thread at(g.runs);
  if (at.b >= g.runs.batch) return;
  const i32 fine_width = g.width << L, x = at.run * N, n = g.width - x;
  const float* row = row_of(g.table, at.b, 0);
  const float s = load(row), end_sigma = load(row + 1), r = load(row + 2);
  const i32 rows = least(2, g.height - 2 * at.y);
  float begin[2][N], end[2][N];
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) {
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) begin[j][i] = end[j][i] = 0;
    if (j >= rows) break;
    float d[N];
    if (g.has_z) {
      take<N>(d, g.dz.at, row_at(g.dz, at.b, at.c, at.t, 2 * at.y + j) + x, g.dz.type, n);
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) begin[j][i] = r * d[i], end[j][i] = (1.0f - r) * d[i];
    }
    if (g.has_v) {
      take<N>(d, g.dv.at, row_at(g.dv, at.b, at.c, at.t, 2 * at.y + j) + x, g.dv.type, n);
      VK_UNROLL
      for (i32 i = 0; i < N; ++i) begin[j][i] += d[i], end[j][i] -= d[i];
    }
  }
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) {
    if (j >= rows) break;
    float v[RUN];
    VK_UNROLL
    for (i32 i = 0; i < N; ++i) {
      float total = (1.0f - end_sigma) * end[j][i];
      if (N > 1 && !g.first) {
        const i32 o = i ^ 1;
        total = fused(0.25f * (1.0f - s), (begin[0][i] + begin[1][i]) + (begin[0][o % N] + begin[1][o % N]), total);
      }
      total *= 1.0f / (1 << 2 * L);
      VK_UNROLL
      for (i32 k = 0; k < 1 << L; ++k) v[(i << L) + k] = total;
    }
    VK_NO_UNROLL
    for (i32 k = 0; k < 1 << L; ++k) {
      const i32 y = ((2 * at.y + j) << L) + k;
      give<RUN>(v, g.dx.at, row_at(g.dx, at.b, at.c, at.t, y) + at.run * RUN, g.dx.type, fine_width - at.run * RUN);
    }
  }
}

struct Transition {
  Volume z, eps, out;
  Table table;  // (scale, spread)
  Random random;
  Runs runs;
  i32 height, width;  // of z
  i32 level, given;
};
// scale up(z) + spread sqrt(4/3) (g - its 2 x 2 mean).
VK_DEVICE void transition(const Transition& g) {
  constexpr float SQRT_4_3 = 1.15470053837925152902f;
  const Thread at(g.runs);
  if (at.b >= g.runs.batch) return;
  const i32 x = at.run * RUN, n = 2 * g.width - x;
  const float* row = row_of(g.table, at.b, 0);
  const float scale = load(row), spread = times(load(row + 1), SQRT_4_3);
  float z[4], noise[2][RUN];
  take<4>(z, g.z.at, row_at(g.z, at.b, at.c, at.t, at.y) + x / 2, g.z.type, g.width - x / 2);
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) {
    const i32 y = 2 * at.y + j;
    if (g.given) take<RUN>(noise[j], g.eps.at, row_at(g.eps, at.b, at.c, at.t, y) + x, g.eps.type, n);
    else
      normals8(noise[j], ((i64(at.c) * g.runs.frames + at.t) * (2 * i64(g.height)) + y) * (2 * i64(g.width)) + x,
               Draw{g.random.key0, g.random.key1, u32(g.level), g.random.first_sample + u32(at.b), g.random.offset});
  }
  VK_UNROLL
  for (i32 i = 0; i < RUN; i += 2) {
    const float mean = 0.25f * ((noise[0][i] + noise[1][i]) + (noise[0][i + 1] + noise[1][i + 1]));
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      VK_UNROLL
      for (i32 k = i; k < i + 2; ++k) noise[j][k] = fused(spread, noise[j][k] - mean, times(scale, z[i / 2]));
    }
  }
  VK_UNROLL
  for (i32 j = 0; j < 2; ++j) give<RUN>(noise[j], g.out.at, row_at(g.out, at.b, at.c, at.t, 2 * at.y + j) + x, g.out.type, n);
}

struct TransitionAdjoint {
  Volume dz, gradient;
  Table table;
  Runs runs;
  i32 width;  // of z
};
// scale times the sum of every 2 x 2 block.
VK_DEVICE void transition_adjoint(const TransitionAdjoint& g) {
  const Thread at(g.runs);
  if (at.b >= g.runs.batch) return;
  const i32 x = at.run * RUN;
  const auto from = [&](i32 y, float* v) {
    take<RUN>(v, g.gradient.at, row_at(g.gradient, at.b, at.c, at.t, y) + x, g.gradient.type, 2 * g.width - x);
  };
  float v[4];
  block_sums<1>(v, from, at.y);
  const float scale = load(row_of(g.table, at.b, 0));
  VK_UNROLL
  for (i32 i = 0; i < 4; ++i) v[i] *= scale;
  give<4>(v, g.dz.at, row_at(g.dz, at.b, at.c, at.t, at.y) + x / 2, g.dz.type, g.width - x / 2);
}

}  // namespace pyramid
}  // namespace vk

#define VK_STAGE(name, Parameters, ...)                                                                \
  VK_KERNEL(VK_FIVE_BLOCKS) name(const vk::pyramid::Parameters given) { vk::pyramid::__VA_ARGS__(given); } \
  VK_ENTRY(name, vk::pyramid::Parameters)

VK_STAGE(pyramid_stage_inputs_1, Stage, stage<0>)
VK_STAGE(pyramid_stage_inputs_2, Stage, stage<1>)
VK_STAGE(pyramid_stage_inputs_4, Stage, stage<2>)
VK_STAGE(pyramid_stage_inputs_8, Stage, stage<3>)
VK_STAGE(pyramid_stage_adjoint_1, StageAdjoint, stage_adjoint<0>)
VK_STAGE(pyramid_stage_adjoint_2, StageAdjoint, stage_adjoint<1>)
VK_STAGE(pyramid_stage_adjoint_4, StageAdjoint, stage_adjoint<2>)
VK_STAGE(pyramid_stage_adjoint_8, StageAdjoint, stage_adjoint<3>)
VK_STAGE(pyramid_stage_transition, Transition, transition)
VK_STAGE(pyramid_stage_transition_adjoint, TransitionAdjoint, transition_adjoint)
