// Attention motion flow, forward and vote, for compute capability 9.0a: amf.cu's results by wgmma. A block of 128 rows, which lie in one or
// several frames that look at one target, goes over all keys of that target. A producer warp brings boxes by the tensor memory accelerator
// through a ring of stages; two warpgroups of 64 rows multiply, and carry an online softmax with the keys' places. Keys past a frame's end
// are those of the next frame, or zeros: their products are overwritten.
#include "amf_hopper_wide.h"

namespace vk {
namespace amf {

struct Forward {
  TensorMap q, k;      // [B, groups or heads, N, d]: boxes of 64 channels by 16 and by COLUMNS or SHARE tokens
  const float* given;  // of the vote: the log-sum-exp, [B, G, P, S]
  float* mean;         // [B, G, P, S, 2]; this and the others null where they are not wanted
  i32* index;          // [B, G, P, S]; of a vote [B, P, S], as is top
  float *lse, *top, *entropy;
  const i32* pieces;  // [n_tiles, PIECES, 4]: as Piece
  Frame frame;
  i32 n_tiles, n_pairs, groups, heads, dim;  // groups or heads are 1
  float scale_log2, sign;                    // of the logits in base 2: its size, which is positive, and 1, -1 or 0; of a vote, itself
  u32 keep, flip;                            // the same in words of q: (w & keep) ^ flip
};

// Where a block is: its sample and group, and its pieces.
struct Task {
  i32 map, batch, group;
  const i32* pieces;
  VK_DEVICE Task(const Forward& g) : Task(g, g.groups) {}
  VK_DEVICE Task(const Forward& g, i32 groups) {  // each in a block of its own
    map = i32(block_index()) / g.n_tiles, batch = map / groups, group = map % groups;
    pieces = g.pieces + i32(block_index()) % g.n_tiles * PIECES * 4;
  }
  VK_DEVICE Piece piece(i32 n) const { return Piece(pieces + n * 4); }
};

// Boxes of the block's rows: 64 channels from `channel` on of all pieces.
struct BlockRows {
  static constexpr u32 BYTES = ROWS * STEP * 2;
  const TensorMap& map;
  i32 tokens[PIECES], batch;
  VK_DEVICE BlockRows(const Forward& g, const Task& task) : map(g.q), batch(task.batch) {
    VK_UNROLL
    for (i32 n = 0; n < PIECES; ++n) tokens[n] = task.piece(n).token;
  }
  VK_DEVICE void operator()(Shared<u8> panel, i32 channel, i32 z, Shared<u64> done) const {
    VK_UNROLL
    for (i32 n = 0; n < PIECES; ++n) copy_box(panel + n * PIECE * STEP * 2, map, channel, tokens[n], z, batch, done);
  }
};

template <bool FULL>
VK_DEVICE void finish(Rows<FULL>& r, const Piece& own, i64 map, const Forward& g) {
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    const float mine = r.top(h, g.scale_log2), top = quad_max(mine), shrink = exp2_approx(mine - top);
    const float total = quad_sum(r.total[h] * shrink), x = quad_sum(r.x[h] * shrink), y = quad_sum(r.y[h] * shrink);
    float tilt = 0;
    if (FULL) {
      tilt = quad_sum(shrink * (r.tilt[FULL ? h : 0] + r.total[h] * (mine - top)));
      best_of_quad(r.best[h], r.where[FULL ? h : 0]);
    }
    const i32 row = accumulator_row(2 * h);
    if (lane_index() % 4 != 0 || row >= own.rows) continue;
    const i64 at = map * g.n_pairs * g.frame.size + own.entry + row;
    if (g.mean != nullptr) store(g.mean + at * 2, x / total), store(g.mean + at * 2 + 1, y / total);
    if (g.lse != nullptr) store(g.lse + at, (top + log2_approx(total)) * LN2);
    if (!FULL) continue;
    if (g.index != nullptr) store(g.index + at, r.where[FULL ? h : 0]);
    if (g.top != nullptr) store(g.top + at, 1.0f / total);
    if (g.entropy != nullptr) store(g.entropy + at, (log2_approx(total) - tilt / total) * LN2);
  }
}

// Makes -q of this warpgroup's rows, or 0, as keep and flip say.
template <i32 DIM>
VK_DEVICE void turn(const Panels<ROWS, DIM>& rows, i32 row, u32 keep, u32 flip) {
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()) % GROUP; i < 64 * Panels<ROWS, DIM>::COUNT * 8; i += GROUP) {
    const Shared<u8> at = rows.chunk(row + i % 64, i / 64);
    Words v = load16(at);
    VK_UNROLL
    for (i32 w = 0; w < 4; ++w) v.w[w] = (v.w[w] & keep) ^ flip;
    store16(at, v);
  }
  async_fence();
  named_barrier(u32(group_index()), GROUP);
}

// One head per group and up to DIM channels: the rows stay in shared memory, a stage is a tile of keys, and while a warpgroup folds the
// products of one tile those of the next are being made.
template <typename T, i32 DIM, bool FULL>
VK_DEVICE void forward_held(const Forward& g) {
  using Left = Panels<ROWS, DIM>;
  using Right = Panels<COLUMNS, DIM>;
  const Ring<STAGES> ring{shared_at<u64>(0)};
  const Shared<u64> there = shared_at<u64>(Ring<STAGES>::BYTES);  // the rows are
  const Left left{shared_at<u8>(ALIGN)};
  const auto right = [](i32 i) { return Right{shared_at<u8>(ALIGN + Left::BYTES + u32(i % STAGES) * Right::BYTES)}; };
  const Task task(g);
  const i32 tiles = (g.frame.size + COLUMNS - 1) / COLUMNS;
  if (thread_index() == 0) mbarrier_make(there, 1), ring.make(1, READERS);
  block_barrier();
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() != 0) return;
    prefetch(g.q), prefetch(g.k);
    const BlockRows rows(g, task);
    mbarrier_expect(there, Left::BYTES);
    VK_UNROLL
    for (i32 n = 0; n < Left::COUNT; ++n) rows(left.panel(n), n * STEP, task.group, there);
    const i32 first = task.piece(0).target * g.frame.size;
    for (i32 i = 0; i < tiles; ++i) {
      ring.wait_empty(i);
      mbarrier_expect(ring.full(i), Right::BYTES);
      VK_UNROLL
      for (i32 n = 0; n < Right::COUNT; ++n)
        copy_box(right(i).panel(n), g.k, n * STEP, first + i * COLUMNS, task.group, task.batch, ring.full(i));
    }
    return;
  }
  registers_up<MANY>();
  const i32 row = (group_index() - 1) * 64;
  const auto multiply = [&](Accumulator(&s)[COLUMNS / 8], i32 i) {
    ring.wait_full(i);
    products_begin();
    VK_UNROLL
    for (i32 k = 0; k < DIM / 16; ++k) warpgroup_product<T, COLUMNS>(s, left.depth_along(row, k), right(i).depth_along(0, k), k > 0);
    products_commit();
  };
  Rows<FULL> r;
  Accumulator s[2][COLUMNS / 8];
  mbarrier_wait(there, 0);
  if (g.keep != 0xffffffffu || g.flip != 0) turn(left, row, g.keep, g.flip);
  multiply(s[0], 0);
  i32 i = 0;
  for (; i + 2 < tiles; i += 2) {
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      multiply(s[j ^ 1], i + j + 1);
      products_wait<1>();
      ring.release(i + j);
      r.fold_whole(s[j], (i + j) * COLUMNS, g.frame, g.scale_log2);
    }
  }
  if (i + 1 < tiles) {
    multiply(s[1], i + 1);
    products_wait<1>();
    r.fold_whole(s[0], i * COLUMNS, g.frame, g.scale_log2);
    products_wait<0>();
    r.fold(s[1], (i + 1) * COLUMNS, g.frame, g.scale_log2, 1.0f);
  } else {
    products_wait<0>();
    r.fold(s[0], i * COLUMNS, g.frame, g.scale_log2, 1.0f);
  }
  finish(r, task.piece(i32(warp_index()) - 4), task.map, g);
}

// Heads side by side, or more channels than stay in shared memory.
template <typename T, bool FULL>
VK_DEVICE void forward_wide(const Forward& g) {
  constexpr i32 KEYS = 2 * COLUMNS;
  Chunks<T, KEYS> p(g.heads, g.dim);
  const Task task(g);
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() == 0) {
      prefetch(g.q), prefetch(g.k);
      const BlockRows rows(g, task);
      const i32 first = task.piece(0).target * g.frame.size;
      for (i32 key = 0; key < g.frame.size; key += KEYS)
        p.bring(rows.BYTES, rows, g.k, first + key, key + COLUMNS < g.frame.size ? KEYS : COLUMNS, task.group, task.batch);
      p.leave();
    }
  } else {
    registers_up<MANY>();
    Rows<FULL> r;
    for (i32 key = 0; key < g.frame.size; key += KEYS) {
      if (key + COLUMNS < g.frame.size) {
        Accumulator s[2][COLUMNS / 8];
        p.multiply(s);
        r.fold(s[0], key, g.frame, g.scale_log2, g.sign);
        r.fold(s[1], key + COLUMNS, g.frame, g.scale_log2, g.sign);
      } else {
        Accumulator s[1][COLUMNS / 8];
        p.multiply(s);
        r.fold(s[0], key, g.frame, g.scale_log2, g.sign);
      }
    }
    finish(r, task.piece(i32(warp_index()) - 4), task.map, g);
  }
}

// Where the probabilities of all groups together are largest, and that mean probability: the products of a tile of keys group after group.
template <typename T>
VK_DEVICE void vote(const Forward& g) {
  Chunks<T, COLUMNS> p(g.heads, g.dim);
  const Task task(g, 1);
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() == 0) {
      prefetch(g.q), prefetch(g.k);
      const BlockRows rows(g, task);
      const i32 first = task.piece(0).target * g.frame.size;
      for (i32 key = 0; key < g.frame.size; key += COLUMNS)
        for (i32 group = 0; group < g.groups; ++group) p.bring(rows.BYTES, rows, g.k, first + key, COLUMNS, group, task.batch);
      p.leave();
    }
  } else {
    registers_up<MANY>();
    const Piece own = task.piece(i32(warp_index()) - 4);
    const i64 plane = i64(g.n_pairs) * g.frame.size;
    float best[2] = {-infinity(), -infinity()};
    i32 where[2] = {0, 0};
    for (i32 first = 0; first < g.frame.size; first += COLUMNS) {
      Accumulator votes[COLUMNS / 8];
      clear(votes);
      for (i32 group = 0; group < g.groups; ++group) {
        float lse[2];
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const i32 row = accumulator_row(2 * h);
          lse[h] = row < own.rows ? load(g.given + (i64(task.batch) * g.groups + group) * plane + own.entry + row) * LOG2E : 0.0f;
        }
        Accumulator s[1][COLUMNS / 8];
        p.multiply(s);
        VK_UNROLL
        for (i32 n = 0; n < COLUMNS / 8; ++n)
          VK_UNROLL
          for (i32 i = 0; i < 4; ++i) {
            // A log-sum-exp of 1e8 is rounded by several units: no probability is above 1 for that.
            const float below = s[0][n].v[i] * g.scale_log2 - lse[i / 2];
            votes[n].v[i] += exp2_approx(below > 0 ? 0.0f : below);
          }
      }
      VK_UNROLL
      for (i32 n = 0; n < COLUMNS / 8; ++n)
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i) {
          const i32 key = first + n * 8 + accumulator_column(i);
          if (key < g.frame.size && votes[n].v[i] > best[i / 2]) best[i / 2] = votes[n].v[i], where[i / 2] = key;
        }
    }
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      best_of_quad(best[h], where[h]);
      const i32 row = accumulator_row(2 * h);
      if (lane_index() % 4 != 0 || row >= own.rows) continue;
      const i64 at = task.batch * plane + own.entry + row;
      if (g.index != nullptr) store(g.index + at, where[h]);
      if (g.top != nullptr) store(g.top + at, best[h] / float(g.groups));
    }
  }
}

}  // namespace amf
}  // namespace vk

using vk::amf::Forward;

#define VK_AMF(name, ...)                                                                      \
  VK_KERNEL_ALONE(384) name(const VK_PARAMETER Forward given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Forward)
#define VK_AMF_PAIRED(name, ...)                                                                             \
  VK_KERNEL_ALONE(384) VK_CLUSTER(2) name(const VK_PARAMETER Forward given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY_CLUSTER(name, Forward, 2)
#define VK_AMF_HELD(T, DIM)                                                \
  VK_AMF(amf_hopper_forward_##T##_##DIM, forward_held<vk::T, DIM, false>)  \
  VK_AMF(amf_hopper_forward_##T##_##DIM##_full, forward_held<vk::T, DIM, true>)
#define VK_AMF_WIDE(T)                                                       \
  VK_AMF_PAIRED(amf_hopper_forward_##T##_wide, forward_wide<vk::T, false>)   \
  VK_AMF_PAIRED(amf_hopper_forward_##T##_wide_full, forward_wide<vk::T, true>)
#define VK_AMF_VOTE(T) VK_AMF_PAIRED(amf_hopper_vote_##T, vote<vk::T>)

VK_AMF_HELD(bf16, 64)
VK_AMF_HELD(bf16, 128)
VK_AMF_WIDE(bf16)
VK_AMF_VOTE(bf16)
VK_AMF_HELD(f16, 64)
VK_AMF_HELD(f16, 128)
VK_AMF_WIDE(f16)
VK_AMF_VOTE(f16)
