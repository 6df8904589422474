// What happens to levels without a filter: noise on given ones, the guided Euler step, the loss, and the adjoint of each. A thread has
// eight values of a level; blocks follow each other level by level, sample by sample.
#include "pyramid.h"

namespace vk {
namespace pyramid {

struct Blocks {
  i32 first[LEVELS];  // of a sample: where each level's blocks begin
  i32 levels, per_sample, tokens;  // tokens: a level is columns of a matrix, and a run stays in its row
};
struct Block {
  i64 b;
  i32 s, index;  // of the level's blocks
  VK_DEVICE explicit Block(const Blocks& g) {
    const i32 pid = i32(block_index()), i = pid % g.per_sample;
    b = pid / g.per_sample, s = 0;
    while (s + 1 < g.levels && i >= g.first[s + 1]) ++s;
    index = i - g.first[s];
  }
};
// A thread's run, at the `turn`th time that a block's threads go over `turns` times as many, and how many of its values are there.
struct Values {
  Spot p;
  i32 n;
  VK_DEVICE Values(const Block& at, const Blocks& g, const Shape& shape, i32 turns, i32 turn) {
    const u32 run = (u32(at.index) * u32(turns) + u32(turn)) * THREADS + thread_index();
    const i64 count = shape.count[at.s];
    if (!g.tokens) {
      p = {0, 0, 0, 0, i64(run) * RUN};
      n = count - p.e < RUN ? i32(count - p.e) : RUN;
      return;
    }
    const Size z = shape.level[at.s];
    const u32 runs = u32(up_to(z.w, RUN)), x = run % runs * RUN, line = run / runs, frame = line / u32(z.h);
    p = {i32(frame / u32(z.t)), i32(frame % u32(z.t)), i32(line % u32(z.h)), i32(x), i64(line) * z.w + x};
    n = p.e < count ? least(z.w - i32(x), RUN) : 0;
  }
};

struct Mix {
  Role x;
  Mixing mixing;
  Shape shape;
  Blocks blocks;
};
VK_DEVICE void mix(const Mix& g) {
  const Block at(g.blocks);
  const Values run(at, g.blocks, g.shape, 1, 0);
  if (run.n <= 0) return;
  const bool part = alive(g.mixing.alive, at.b, at.s);
  float v[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) v[i] = 0;
  if (part) take_run<RUN>(v, g.x, g.shape, at.s, at.b, run.p, run.n);
  emit(g.mixing, g.shape, at.s, at.b, run.p, v, run.n, part);
}

struct MixAdjoint {
  Role dx;
  Unmixing unmixing;
  Shape shape;
  Blocks blocks;
};
VK_DEVICE void mix_adjoint(const MixAdjoint& g) {
  const Block at(g.blocks);
  const Values run(at, g.blocks, g.shape, 1, 0);
  if (run.n <= 0) return;
  float v[RUN];
  take_gradient<RUN>(v, g.unmixing, g.shape, at.s, at.b, run.p, run.n, weights_of(g.unmixing, at.b, at.s));
  give_run<RUN>(v, g.dx, g.shape, at.s, at.b, run.p, run.n);
}

// The first `kept` levels of the state after a step of the first `active`; the first `given` of the next input, which has the new state of
// the first `upcoming` and zeros of the others. The state may be z.
struct Step {
  Role state, input;
  Stepping stepping;
  Shape shape;
  Blocks blocks;
  i32 active, upcoming, kept, given;
};
VK_DEVICE void step(const Step& g) {
  const Block at(g.blocks);
  const Values run(at, g.blocks, g.shape, 1, 0);
  if (run.n <= 0) return;
  float v[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) v[i] = 0;
  if (at.s < g.kept || at.s < g.upcoming) stepped(v, g.stepping, g.shape, at.s, at.b, run.p, run.n, at.s < g.active);
  if (at.s < g.kept) give_run<RUN>(v, g.state, g.shape, at.s, at.b, run.p, run.n);
  if (at.s >= g.given) return;
  if (at.s >= g.upcoming) {
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) v[i] = 0;
  }
  give_run<RUN>(v, g.input, g.shape, at.s, at.b, run.p, run.n);
}

struct StepAdjoint {
  Role state, input;
  Spreading spreading;
  Shape shape;
  Blocks blocks;
  float scale[LEVELS];  // of the levels, where the state was merged
  i32 active, upcoming, has_state, has_input;
};
VK_DEVICE void step_adjoint(const StepAdjoint& g) {
  const Block at(g.blocks);
  const Values run(at, g.blocks, g.shape, 1, 0);
  if (run.n <= 0) return;
  float v[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) v[i] = 0;
  if (g.has_state && at.s < g.active) take_run<RUN>(v, g.state, g.shape, at.s, at.b, run.p, run.n);
  if (g.has_input && at.s < g.upcoming) {
    float more[RUN];
    take_run<RUN>(more, g.input, g.shape, at.s, at.b, run.p, run.n);
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) v[i] += more[i];
  }
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) v[i] *= g.scale[at.s];
  spread(v, g.spreading, g.shape, at.s, at.b, run.p, run.n, at.s < g.active);
}

// ---- loss ---------------------------------------------------------------------------------------------------------------------
constexpr i32 LOSS_TURNS = 8;

struct Loss {
  Role pred, target;
  Alive alive;
  Shape shape;
  Blocks blocks;
  float* sums;  // [block of the level, sample, level]
  i32 batch;
};
// The sum of squared differences of a block's values: of a thread's turns, of a warp's lanes, of the warps, in this order.
VK_DEVICE void loss(const Loss& g) {
  const Block at(g.blocks);
  const bool part = alive(g.alive, at.b, at.s);
  float total = 0;
  VK_NO_UNROLL
  for (i32 j = 0; part && j < LOSS_TURNS; ++j) {
    const Values run(at, g.blocks, g.shape, LOSS_TURNS, j);
    if (run.n <= 0) break;
    float a[RUN], b[RUN];
    take_run<RUN>(a, g.pred, g.shape, at.s, at.b, run.p, run.n);
    take_run<RUN>(b, g.target, g.shape, at.s, at.b, run.p, run.n);
    float sum = 0;
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) sum = fused(a[i] - b[i], a[i] - b[i], sum);
    total += sum;
  }
  VK_UNROLL
  for (u32 mask = 1; mask < WARP; mask *= 2) total += shuffle_xor(total, mask);
  const Shared<u8> warps = shared_at<u8>(0);
  if (lane_index() == 0) store4(warps + i32(warp_index()) * 4, as_bits(total));
  block_barrier();
  if (thread_index() != 0) return;
  float sum = 0;
  VK_UNROLL
  for (i32 w = 0; w < THREADS / i32(WARP); ++w) sum += as_float(load4(warps + w * 4));
  store(g.sums + (i64(at.index) * g.batch + at.b) * g.shape.levels + at.s, sum);
}

struct LossSum {
  const float* sums;
  float *loss, *means;
  double per_value[LEVELS], per_sample;  // 1 / values of a sample's level, 1 / samples
  i32 runs[LEVELS];
  i32 batch, levels;
};
// A double as two floats, which hold 48 of its bits, from another lane.
VK_DEVICE double exchanged(double v, u32 mask) {
  const float high = float(v), low = float(v - double(high));
  return double(shuffle_xor(high, mask)) + double(shuffle_xor(low, mask));
}
// One block: the blocks' sums -> the mean of every sample and level, a warp for each, and the loss. In double precision, in a fixed order.
VK_DEVICE void loss_sum(const LossSum& g) {
  constexpr i32 WARPS = THREADS / i32(WARP);
  const i32 pairs = g.batch * g.levels;
  double all = 0;
  VK_UNROLL
  for (i32 s = 0; s < LEVELS; ++s) {
    if (s >= g.levels) break;
    VK_NO_UNROLL
    for (i32 pair = i32(warp_index()) * g.levels + s; pair < pairs; pair += WARPS * g.levels) {
      double total = 0;
      VK_NO_UNROLL
      for (i32 run = i32(lane_index()); run < g.runs[s]; run += i32(WARP)) total += double(load(g.sums + i64(run) * pairs + pair));
      VK_UNROLL
      for (u32 mask = 1; mask < WARP; mask *= 2) total += exchanged(total, mask);
      const float mean = float(total * g.per_value[s]);
      if (lane_index() == 0) store(g.means + pair, mean);
      all += double(mean);
    }
  }
  const Shared<u8> warps = shared_at<u8>(0);
  const float high = float(all), low = float(all - double(high));
  if (lane_index() == 0) {
    store4(warps + i32(warp_index()) * 8, as_bits(high));
    store4(warps + i32(warp_index()) * 8 + 4, as_bits(low));
  }
  block_barrier();
  if (thread_index() != 0) return;
  double sum = 0;
  VK_UNROLL
  for (i32 w = 0; w < WARPS; ++w) sum += double(as_float(load4(warps + w * 8))) + double(as_float(load4(warps + w * 8 + 4)));
  store(g.loss, float(sum * g.per_sample));
}

struct LossAdjoint {
  Role pred, target, dpred;
  Alive alive;
  Shape shape;
  Blocks blocks;
  const float *dloss, *dmeans;  // either may be null
  i32 batch;
};
// 2 (dloss / B + dmeans) / n times the difference.
VK_DEVICE void loss_adjoint(const LossAdjoint& g) {
  const Block at(g.blocks);
  const Values run(at, g.blocks, g.shape, 1, 0);
  if (run.n <= 0) return;
  float a[RUN];
  VK_UNROLL
  for (i32 i = 0; i < RUN; ++i) a[i] = 0;
  if (alive(g.alive, at.b, at.s)) {
    float b[RUN], weight = 0;
    if (g.dloss) weight += load(g.dloss) / float(g.batch);
    if (g.dmeans) weight += load(g.dmeans + at.b * g.shape.levels + at.s);
    weight = 2.0f * weight / float(g.shape.count[at.s]);
    take_run<RUN>(a, g.pred, g.shape, at.s, at.b, run.p, run.n);
    take_run<RUN>(b, g.target, g.shape, at.s, at.b, run.p, run.n);
    VK_UNROLL
    for (i32 i = 0; i < RUN; ++i) a[i] = weight * (a[i] - b[i]);
  }
  give_run<RUN>(a, g.dpred, g.shape, at.s, at.b, run.p, run.n);
}

}  // namespace pyramid
}  // namespace vk

#define VK_FLOW(name, Parameters, function)                                                      \
  VK_KERNEL(128) name(const vk::pyramid::Parameters given) { vk::pyramid::function(given); } \
  VK_ENTRY(name, vk::pyramid::Parameters)

VK_FLOW(pyramid_flow_mix, Mix, mix)
VK_FLOW(pyramid_flow_mix_adjoint, MixAdjoint, mix_adjoint)
VK_FLOW(pyramid_flow_step, Step, step)
VK_FLOW(pyramid_flow_step_adjoint, StepAdjoint, step_adjoint)
VK_FLOW(pyramid_flow_loss, Loss, loss)
VK_FLOW(pyramid_flow_loss_sum, LossSum, loss_sum)
VK_FLOW(pyramid_flow_loss_adjoint, LossAdjoint, loss_adjoint)
