// Grid attention, forward, for compute capability 9.0a, in the manner of FlashAttention-3 (arXiv 2407.08608): one producer warpgroup, and
// consumer warpgroups of 64 rows each that take turns, so that one multiplies while the others exponentiate. Within a warpgroup the logits
// of a main tile are multiplied together with the exponentials of the tile before. Products accumulate in float32; P is rounded to the
// inputs' type for P V and stays in registers.
//
// Main tiles are WIDTH columns wide: the frame length decides which width (vidkern/ops/grid_attention/hopper.py). Edge tiles are NARROW: a
// warpgroup none of whose rows sees one passes it by. Where query heads share a key head, the warpgroups of a block may take a head each of
// the same 64 rows, so that fewer tiles straddle frames.
#pragma once
#include "grid_attention_hopper.h"

namespace vk {
namespace grid {

struct HopperForward {
  TensorMap q_map, k_map, v_map;
  const void *k, *v;
  void* out;
  float* lse;
  const i32 *tiles, *main, *edge;
  const u8* live;  // bit 0: a live key; bit 1: the query runs; null: all do
  Strides k_step, v_step, out_step, lse_step;
  i64 live_step;                             // bytes between samples
  i32 n_tiles, heads, group, together, dim;  // together: query heads of a block, 1 or as many as its consumer warpgroups
  float scale_log2;                          // of the logits in base 2
};

namespace hopper_forward {

constexpr i32 SHARE = 64;       // rows of a warpgroup
constexpr i32 NARROW = 48;      // columns of an edge tile
constexpr u32 MEMORY = 232448;  // bytes of shared memory that a block may have

// Shared memory: barriers, a tile of queries for each consumer warpgroup, stages of keys, stages of values.
template <i32 DIM, i32 WIDTH, i32 GROUPS>
struct Room {
  using Query = Panels<SHARE, DIM>;
  using Column = Panels<WIDTH, DIM>;
  static constexpr i32 FREE = i32(MEMORY - hopper::ALIGN) - GROUPS * Query::BYTES, FIT = FREE / (2 * Column::BYTES);
  static constexpr i32 STAGES = FIT < 4 ? FIT : 4;
  static_assert(STAGES >= 2 && WIDTH >= NARROW, "two stages of keys and of values");
  Ring<STAGES> keys{shared_at<u64>(0)}, values{shared_at<u64>(Ring<STAGES>::BYTES)};
  Shared<u64> queries = shared_at<u64>(2 * Ring<STAGES>::BYTES), turns = queries + 1;
  VK_DEVICE Query query(i32 group) const { return {shared_at<u8>(hopper::ALIGN + group * Query::BYTES)}; }
  VK_DEVICE Column key(i32 i) const { return {shared_at<u8>(hopper::ALIGN + GROUPS * Query::BYTES + i % STAGES * Column::BYTES)}; }
  VK_DEVICE Column value(i32 i) const { return {key(i).base + STAGES * Column::BYTES}; }
  // By one thread.
  VK_DEVICE void make() const {
    keys.make(1, 4 * GROUPS), values.make(1, 4 * GROUPS);
    mbarrier_make(queries, 1);
    for (i32 n = 0; n < GROUPS; ++n) mbarrier_make(turns + n, 4);
    mbarriers_made();
  }
  // Consumer warpgroup `own` asks for its i-th turn, and gives the turn to the next warpgroup.
  VK_DEVICE void take_turn(i32 own, i32 i) const {
    if (own > 0 || i > 0) mbarrier_wait(turns + own, u32(own > 0 ? i : i - 1) & 1);
  }
  VK_DEVICE void pass_turn(i32 own) const {
    warp_barrier();
    if (leads()) mbarrier_arrive(turns + (own + 1) % GROUPS);
  }
};

template <typename T, i32 DIM, i32 WIDTH, i32 GROUPS, bool LIVE>
VK_DEVICE void produce(const HopperForward& g, const Program& at, const Room<DIM, WIDTH, GROUPS>& room) {
  const i32 head = i32(at.head) * g.together, key_head = head / g.group, batch = i32(at.batch);
  if (thread_index() == 0) {
    mbarrier_expect(room.queries, GROUPS * Room<DIM, WIDTH, GROUPS>::Query::BYTES);
    for (i32 n = 0; n < GROUPS; ++n) {
      const i32 other = g.together > 1 ? n : 0;
      ask(room.query(n), g.q_map, at.row_first + (n - other) * SHARE, head + other, batch, room.queries);
    }
  }
  i32 i = LIVE ? 0 : at.main_count;
  if (!LIVE) {
    if (thread_index() == 0) {
      for (i32 n = 0; n < at.main_count; ++n) {
        const i32 first = load(g.main + at.main_first + n);
        room.keys.wait_empty(n);
        mbarrier_expect(room.keys.full(n), Room<DIM, WIDTH, GROUPS>::Column::BYTES);
        ask(room.key(n), g.k_map, first, key_head, batch, room.keys.full(n));
        room.values.wait_empty(n);
        mbarrier_expect(room.values.full(n), Room<DIM, WIDTH, GROUPS>::Column::BYTES);
        ask(room.value(n), g.v_map, first, key_head, batch, room.values.full(n));
      }
    }
    // A thread that waited for a stage now would take a phase long past for the one that it means.
    named_barrier(PRODUCERS, GROUP);
  }
  const i32 count = at.main_count + at.edge_count, begin = i;
  if (i == count) return;
  const T* k = static_cast<const T*>(g.k) + at.batch * g.k_step.batch + key_head * g.k_step.head;
  const T* v = static_cast<const T*>(g.v) + at.batch * g.v_step.batch + key_head * g.v_step.head;
  const u8* live = LIVE ? g.live + at.batch * g.live_step : nullptr;
  const auto bring = [&](const auto& to, const T* from, i64 step, const Columns& c, i32 n) {
    const i32 rows = n < at.main_count ? WIDTH : NARROW;
    if constexpr (LIVE) fill(to, from, step, c.first, c.end, rows, g.dim, Bit{live, 1});
    else fill(to, from, step, c.first, c.end, rows, g.dim, All{});
  };
  // Two groups of copies are under way when a third begins: keys i are full when keys i + 1 are asked for, and until then consumers release
  // values up to i - 3 alone. With masks, where main tiles come like this, two stages would wait for ever.
  static_assert(!LIVE || Room<DIM, WIDTH, GROUPS>::STAGES >= 3, "a stage for what consumers hold back");
  VK_NO_UNROLL
  for (; i < count; ++i) {
    const Columns c = columns_at<WIDTH>(at, g.main, g.edge, i);
    room.keys.wait_empty(i);
    bring(room.key(i), k, g.k_step.token, c, i);
    if (i > begin) filled<2>(room.keys.full(i - 1));
    room.values.wait_empty(i);
    bring(room.value(i), v, g.v_step.token, c, i);
    if (i > begin) filled<2>(room.values.full(i - 1));
  }
  filled<1>(room.keys.full(count - 1));
  filled<0>(room.values.full(count - 1));
}

// What a lane holds of two rows, g and g + 8: the largest logit so far, the sum of exponentials, and the output's columns.
template <i32 DIM>
struct Rows {
  float top[2], total[2];
  Accumulator out[DIM / 8];
};

// S = Q K^T of 64 rows and the first N of a tile; a group of products.
template <typename T, i32 N, i32 DIM, typename Query, typename Column>
VK_DEVICE void compare(Accumulator (&s)[N / 8], const Query& q, const Column& k) {
  VK_UNROLL
  for (i32 d = 0; d < DIM / 16; ++d) warpgroup_product<T, N>(s, q.depth_along(0, d), k.depth_along(0, d), d > 0);
  products_commit();
}

// out += P V, or P V where not `keep`; a group of products.
template <typename T, i32 N, i32 DIM, typename Column>
VK_DEVICE void gather(Accumulator (&out)[DIM / 8], const FragmentA<T> (&p)[N / 16], const Column& v, bool keep) {
  VK_UNROLL
  for (i32 n = 0; n < N / 16; ++n) warpgroup_product<T, DIM, true>(out, p[n], v.depth_across(n), keep || n > 0);
  products_commit();
}

template <typename T, i32 N>
VK_DEVICE void round(FragmentA<T> (&p)[N / 16], const Accumulator (&s)[N / 8]) {
  VK_UNROLL
  for (i32 n = 0; n < N / 16; ++n) p[n] = as_operand<T>(s[2 * n], s[2 * n + 1]);
}

// What is not seen is -inf.
template <i32 N>
VK_DEVICE void hide(Accumulator (&s)[N / 8], const bool (&sees)[2], const Seen<N>& seen) {
  VK_UNROLL
  for (i32 n = 0; n < N / 8; ++n)
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i)
      if (!(sees[i / 2] && seen(n, i))) s[n].v[i] = -infinity();
}

// Logits become exponentials; shrink: what sums so far are to be multiplied by.
template <i32 N, i32 DIM, bool MASKED>
VK_DEVICE void soften(Rows<DIM>& r, Accumulator (&s)[N / 8], float (&shrink)[2], float scale) {
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    float best = max_of(s[0].v[2 * h], s[0].v[2 * h + 1]);
    VK_UNROLL
    for (i32 n = 1; n < N / 8; ++n) best = max_of(best, max_of(s[n].v[2 * h], s[n].v[2 * h + 1]));
    const float top = max_of(r.top[h], quad_max(best) * scale);
    const float base = MASKED && top == -infinity() ? 0.0f : top;
    shrink[h] = exp2_approx(r.top[h] - base);
    r.top[h] = top;
    float sum = 0;
    VK_UNROLL
    for (i32 n = 0; n < N / 8; ++n)
      VK_UNROLL
      for (i32 i = 2 * h; i < 2 * h + 2; ++i) {
        s[n].v[i] = exp2_approx(s[n].v[i] * scale - base);
        sum += s[n].v[i];
      }
    r.total[h] = r.total[h] * shrink[h] + sum;  // of this lane's columns; the quad's are added at the end
  }
}

template <typename T, i32 DIM, i32 WIDTH, i32 GROUPS, bool LIVE>
VK_DEVICE void consume(const HopperForward& g, const Program& at, const Room<DIM, WIDTH, GROUPS>& room) {
  const i32 own = group_index() - 1, warp = i32(warp_index()) % 4 * 16;
  const bool shared_rows = g.together > 1;
  const i32 first = at.row_first + (shared_rows ? 0 : own * SHARE), row = first + warp;
  const i32 head = i32(at.head) * g.together + (shared_rows ? own : 0), count = at.main_count + at.edge_count;
  const auto pass_by = [&](i32 i) {
    room.keys.wait_full(i), room.keys.release(i);
    room.values.wait_full(i), room.values.release(i);
  };
  if (first >= at.row_end) {
    // No rows: only what the others wait for.
    for (i32 i = 0; i < count; ++i) pass_by(i);
    return;
  }
  const bool turns = shared_rows || at.row_first + (GROUPS - 1) * SHARE < at.row_end;
  const auto query = room.query(own);
  const u8* live = LIVE ? g.live + at.batch * g.live_step : nullptr;
  mbarrier_wait(room.queries, 0);
  if (g.scale_log2 < 0) {
    // A negative scale is a positive one of -q: the largest logit is then at the largest product.
    VK_NO_UNROLL
    for (i32 i = i32(thread_index()) % GROUP; i < decltype(query)::BYTES / 16; i += GROUP) {
      Words w = load16(query.base + i * 16);
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n) w.w[n] ^= 0x80008000u;
      store16(query.base + i * 16, w);
    }
    async_fence();
    named_barrier(PRODUCERS + 1 + own, GROUP);
  }
  const float scale = g.scale_log2 < 0 ? -g.scale_log2 : g.scale_log2;

  Rows<DIM> r;
  r.top[0] = r.top[1] = -infinity(), r.total[0] = r.total[1] = 0;
  clear(r.out);
  const bool all[2] = {true, true};
  float shrink[2];
  if (at.main_count > 0) {
    Accumulator s[WIDTH / 8];
    FragmentA<T> p[WIDTH / 16];
    const auto mask = [&](i32 i) {
      if constexpr (LIVE) hide<WIDTH>(s, all, seen_of<WIDTH, true>(columns_at<WIDTH>(at, g.main, g.edge, i), live));
    };
    // Ends the products with the values of main tile i, which have run beside the exponentials of the next one.
    const auto finish = [&](i32 i) {
      products_wait<0>();
      if (i >= 0) room.values.release(i);
    };
    const auto prepare = [&] {
      VK_UNROLL
      for (i32 d = 0; d < DIM / 8; ++d)
        VK_UNROLL
        for (i32 n = 0; n < 4; ++n) r.out[d].v[n] *= shrink[n / 2];
      round<T, WIDTH>(p, s);
    };
    room.keys.wait_full(0);
    if (turns) room.take_turn(own, 0);
    products_begin();
    compare<T, WIDTH, DIM>(s, query, room.key(0));
    if (turns) room.pass_turn(own);
    products_wait<0>();
    room.keys.release(0);
    mask(0);
    soften<WIDTH, DIM, LIVE>(r, s, shrink, scale);
    VK_NO_UNROLL
    for (i32 i = 1; i < at.main_count; ++i) {
      // First the keys: ptxas moves a wait for products up to the branch before it, here that of a loop behind the exponentials.
      room.keys.wait_full(i);
      finish(i - 2);
      prepare();
      if (turns) room.take_turn(own, i);
      products_begin();
      compare<T, WIDTH, DIM>(s, query, room.key(i));
      room.values.wait_full(i - 1);
      products_begin();
      gather<T, WIDTH, DIM>(r.out, p, room.value(i - 1), true);
      if (turns) room.pass_turn(own);
      products_wait<1>();
      room.keys.release(i);
      mask(i);
      soften<WIDTH, DIM, LIVE>(r, s, shrink, scale);
    }
    room.values.wait_full(at.main_count - 1);
    finish(at.main_count - 2);
    prepare();
    products_begin();
    gather<T, WIDTH, DIM>(r.out, p, room.value(at.main_count - 1), true);
    finish(at.main_count - 1);
  }

  VK_NO_UNROLL
  for (i32 i = at.main_count; i < count; ++i) {
    const Columns c = columns_at<WIDTH>(at, g.main, g.edge, i);
    if (c.row_first >= first + SHARE || c.row_end <= first) {
      pass_by(i);
      continue;
    }
    bool sees[2];
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      sees[h] = mine >= c.row_first && mine < c.row_end;
    }
    const Seen<NARROW> seen = seen_of<NARROW, LIVE>(c, live);
    Accumulator s[NARROW / 8], part[DIM / 8];
    FragmentA<T> p[NARROW / 16];
    room.keys.wait_full(i);
    products_begin();
    compare<T, NARROW, DIM>(s, query, room.key(i));
    products_wait<0>();
    room.keys.release(i);
    hide<NARROW>(s, sees, seen);
    soften<NARROW, DIM, true>(r, s, shrink, scale);
    round<T, NARROW>(p, s);
    room.values.wait_full(i);
    products_begin();
    gather<T, NARROW, DIM>(part, p, room.value(i), false);
    products_wait<0>();
    room.values.release(i);
    // Of rows that do not see the tile P is 0, but 0 times a NaN that only others see is NaN.
    VK_UNROLL
    for (i32 d = 0; d < DIM / 8; ++d)
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n) r.out[d].v[n] = r.out[d].v[n] * shrink[n / 2] + (sees[n / 2] ? part[d].v[n] : 0.0f);
  }

  float inverse[2];
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    const i32 mine = row + accumulator_row(2 * h);
    const float total = quad_sum(r.total[h]);
    // Nothing visible: the total is 0. A NaN among what is visible makes it NaN, and it stays one.
    bool empty = total == 0;
    if (LIVE) empty = empty || (mine < at.row_end && !(load(live + mine) & 2));
    inverse[h] = empty ? 0.0f : 1.0f / total;
    if (empty) {
      VK_UNROLL
      for (i32 d = 0; d < DIM / 8; ++d) r.out[d].v[2 * h] = r.out[d].v[2 * h + 1] = 0;
    }
    if (lane_index() % 4 == 0 && mine < at.row_end)
      store(g.lse + at.batch * g.lse_step.batch + head * g.lse_step.head + mine * g.lse_step.token,
            empty ? -infinity() : (r.top[h] + log2_approx(total)) * LN2);
  }
  // The other warps' products have read this warp's queries.
  named_barrier(PRODUCERS + 1 + own, GROUP);
  T* out = static_cast<T*>(g.out) + at.batch * g.out_step.batch + head * g.out_step.head;
  leave<T, SHARE, DIM>(out, g.out_step.token, r.out, inverse, query, warp, row, at.row_end, g.dim);
}

template <typename T, i32 DIM, i32 WIDTH, i32 GROUPS, bool LIVE>
VK_DEVICE void forward(const HopperForward& g) {
  const Room<DIM, WIDTH, GROUPS> room;
  const Program at(g.tiles, g.n_tiles, g.heads / g.together);
  if (thread_index() == 0) room.make();
  block_barrier();
  if (group_index() == 0) {
    registers_down<(GROUPS == 2 ? 40 : 32)>();
    produce<T, DIM, WIDTH, GROUPS, LIVE>(g, at, room);
  } else {
    registers_up<(GROUPS == 2 ? 232 : 160)>();
    consume<T, DIM, WIDTH, GROUPS, LIVE>(g, at, room);
  }
}

}  // namespace hopper_forward
}  // namespace grid
}  // namespace vk

using vk::grid::HopperForward;

// Kernels of what the launcher chooses from, in WIDTHS and LIVE_WIDTHS there: rows of a block by columns of a main tile.
#define VK_FORWARD(name, T, DIM, GROUPS, WIDTH, LIVE)                          \
  VK_KERNEL_ALONE(128 + 128 * GROUPS) name(const VK_PARAMETER HopperForward given) { \
    vk::grid::hopper_forward::forward<vk::T, DIM, WIDTH, GROUPS, LIVE>(given); \
  }                                                                            \
  VK_ENTRY(name, HopperForward)
#define VK_FORWARD_128(T, DIM, WIDTH) VK_FORWARD(grid_attention_hopper_forward_##DIM##_##T##_128x##WIDTH, T, DIM, 2, WIDTH, false)
#define VK_FORWARD_192(T, DIM, WIDTH) VK_FORWARD(grid_attention_hopper_forward_##DIM##_##T##_192x##WIDTH, T, DIM, 3, WIDTH, false)
#define VK_FORWARD_LIVE(T, DIM, WIDTH) VK_FORWARD(grid_attention_hopper_forward_##DIM##_##T##_128x##WIDTH##_live, T, DIM, 2, WIDTH, true)
#define VK_FORWARD_TYPE(T, DIM)                                                                                   \
  VK_FORWARD_128(T, DIM, 64) VK_FORWARD_128(T, DIM, 80) VK_FORWARD_128(T, DIM, 96) VK_FORWARD_128(T, DIM, 112)     \
  VK_FORWARD_128(T, DIM, 128) VK_FORWARD_128(T, DIM, 144) VK_FORWARD_128(T, DIM, 160) VK_FORWARD_128(T, DIM, 176) \
  VK_FORWARD_LIVE(T, DIM, 96) VK_FORWARD_LIVE(T, DIM, 128)
#define VK_FORWARDS(DIM) VK_FORWARD_TYPE(bf16, DIM) VK_FORWARD_TYPE(f16, DIM)
// Three warpgroups have 160 registers a thread each.
#define VK_FORWARDS_OF_THREE(DIM)                                                                                      \
  VK_FORWARD_192(bf16, DIM, 64) VK_FORWARD_192(bf16, DIM, 80) VK_FORWARD_192(bf16, DIM, 96) VK_FORWARD_192(bf16, DIM, 112) \
  VK_FORWARD_192(bf16, DIM, 128) VK_FORWARD_192(f16, DIM, 64) VK_FORWARD_192(f16, DIM, 80) VK_FORWARD_192(f16, DIM, 96)    \
  VK_FORWARD_192(f16, DIM, 112) VK_FORWARD_192(f16, DIM, 128)
