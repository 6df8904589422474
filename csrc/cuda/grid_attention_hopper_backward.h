// Grid attention, backward, for compute capability 9.0a: dQ by row tiles of queries, dK and dV by row tiles of keys over the plan turned
// round, as in grid_attention_backward.cu, whose Delta kernel runs before. One producer warpgroup, two consumer warpgroups of 64 rows. A
// block's own two tiles, Q and dO or K and V, come once; the columns' two, K and V or Q and dO, come stage after stage. Logits and dP are
// products of shared memory, P and dS stay in registers as left operands. No atomics: deterministic.
//
// Main and edge tiles have the same WIDTH, by the frame length (vidkern/ops/grid_attention/hopper_backward.py). Beside them a stage has
// notes: what each column's exponentials and gradients are taken against, +inf where it is hidden, and which rows see the tile.
#pragma once
#include "device/philox.h"
#include "grid_attention_hopper.h"

namespace vk {
namespace grid {

struct HopperBackward {
  TensorMap first_own, second_own, first_column, second_column;  // dQ: Q, dO, K, V; dK and dV: K, V, Q, dO
  const void *first, *second;                                     // what the columns' maps map
  const float *lse, *delta;
  void *one, *two;  // dQ; dK, dV
  const i32 *tiles, *main, *edge;
  const u8* live;  // bit 0: a live key; null: all are
  Strides first_step, second_step, lse_step, delta_step, one_step, two_step;
  i64 live_step;                    // bytes between samples
  i32 n_tiles, heads, group, dim;  // heads: of what the tiles' rows are
  float scale;
};

namespace hopper_backward {

constexpr i32 SHARE = 64, GROUPS = 2;  // rows of a consumer warpgroup, and how many of them
constexpr u32 MEMORY = 232448;         // bytes of shared memory that a block may have
enum Part { DQ, DKV };

// What a stage knows beside its tiles: 8 bytes a column, the log-sum-exp in base 2 and Delta, +inf and 0 where it is hidden; for dQ, which
// has its rows' own, 0 and 0 where it is not. Then the rows that see the tile, first and end.
template <i32 WIDTH>
struct Notes {
  static constexpr i32 ROWS_AT = WIDTH * 8, BYTES = ROWS_AT + 16;
  Shared<u8> base;
  VK_DEVICE void write(i32 column, float top, float less) const {
    store4(base + column * 8, as_bits(top));
    store4(base + column * 8 + 4, as_bits(less));
  }
  VK_DEVICE void write_rows(i32 first, i32 end) const { store16(base + ROWS_AT, {{u32(first), u32(end), 0, 0}}); }
  VK_DEVICE float top(i32 column) const { return as_float(load4(base + column * 8)); }
  // Of the two columns that this lane has of accumulator n.
  VK_DEVICE void read(float (&top)[2], float (&less)[2], i32 n) const {
    const Words w = load16(base + (n * 8 + accumulator_column(0)) * 8);
    top[0] = as_float(w.w[0]), less[0] = as_float(w.w[1]), top[1] = as_float(w.w[2]), less[1] = as_float(w.w[3]);
  }
  VK_DEVICE Words rows() const { return load16(base + ROWS_AT); }
};

// Shared memory: barriers, the rows' own two tiles, stages of the columns' two, stages of notes.
template <i32 DIM, i32 WIDTH>
struct Room {
  using Own = Panels<SHARE * GROUPS, DIM>;
  using Column = Panels<WIDTH, DIM>;
  static constexpr i32 FREE = i32(MEMORY - hopper::ALIGN) - 2 * Own::BYTES, FIT = FREE / (2 * Column::BYTES + Notes<WIDTH>::BYTES);
  static constexpr i32 STAGES = FIT < 4 ? FIT : 4, COLUMNS_AT = i32(hopper::ALIGN) + 2 * Own::BYTES;
  static_assert(STAGES >= 2, "one stage is filled while another is read");
  Ring<STAGES> ring{shared_at<u64>(0)};
  Shared<u64> rows = shared_at<u64>(Ring<STAGES>::BYTES);
  Own first_own{shared_at<u8>(hopper::ALIGN)}, second_own{shared_at<u8>(hopper::ALIGN + Own::BYTES)};
  VK_DEVICE Column first(i32 i) const { return {shared_at<u8>(u32(COLUMNS_AT + i % STAGES * 2 * Column::BYTES))}; }
  VK_DEVICE Column second(i32 i) const { return {first(i).base + Column::BYTES}; }
  VK_DEVICE Notes<WIDTH> notes(i32 i) const {
    return {shared_at<u8>(u32(COLUMNS_AT + STAGES * 2 * Column::BYTES + i % STAGES * Notes<WIDTH>::BYTES))};
  }
  // By one thread.
  VK_DEVICE void make() const {
    ring.make(4, 4 * GROUPS);
    mbarrier_make(rows, 1);
    mbarriers_made();
  }
};

// The producer warpgroup. A tile all of whose columns the rows that it names see comes by boxes; all else by cp.async, zeros for what is
// hidden, and its stage is called full one tile later. A stage is full when each warp has arrived.
template <typename T, Part PART, i32 DIM, i32 WIDTH>
VK_DEVICE void produce(const HopperBackward& g, const Program& at, const Room<DIM, WIDTH>& room) {
  using Column = typename Room<DIM, WIDTH>::Column;
  const i32 batch = i32(at.batch), head = i32(at.head), each = at.main_count + at.edge_count, lane = i32(thread_index());
  if (lane == 0) {
    mbarrier_expect(room.rows, 2 * Room<DIM, WIDTH>::Own::BYTES);
    ask(room.first_own, g.first_own, at.row_first, head, batch, room.rows);
    ask(room.second_own, g.second_own, at.row_first, head, batch, room.rows);
  }
  const u8* live = g.live == nullptr ? nullptr : g.live + at.batch * g.live_step;
  const i32 heads = PART == DKV ? g.group : 1;
  const auto arrive = [&](i32 i) {
    async_fence();
    warp_barrier();
    if (leads()) mbarrier_arrive(room.ring.full(i));
  };
  i32 i = 0;
  bool copying = false;  // the tile before
  VK_NO_UNROLL
  for (i32 n = 0; n < heads; ++n) {
    const i32 other = PART == DKV ? head * g.group + n : head / g.group;
    const float* lse = g.lse + at.batch * g.lse_step.batch + other * g.lse_step.head;
    const float* delta = g.delta + at.batch * g.delta_step.batch + other * g.delta_step.head;
    VK_NO_UNROLL
    for (i32 tile = 0; tile < each; ++tile, ++i) {
      const Columns c = columns_at<WIDTH>(at, g.main, g.edge, tile);
      float top = infinity(), less = 0;
      if (lane < WIDTH && c.first + lane < c.end) {
        const i32 column = c.first + lane;
        if (PART == DKV) {
          const float mine = load(lse + column * g.lse_step.token);
          // A query that sees nothing may hold anything.
          if (mine != -infinity()) top = mine * LOG2E, less = load(delta + column * g.delta_step.token);
        } else if (live == nullptr || (load(live + column) & 1)) {
          top = 0;
        }
      }
      const bool boxes = live == nullptr && c.end - c.first == WIDTH;
      const auto notes = room.notes(i);
      room.ring.wait_empty(i);
      if (lane < WIDTH) notes.write(lane, top, less);
      if (lane == 0) notes.write_rows(c.row_first, c.row_end);
      if (boxes) {
        if (copying) copies_wait<0>(), arrive(i - 1);
        warp_barrier();
        if (lane == 0) {
          mbarrier_expect(room.ring.full(i), 2 * Column::BYTES);
          ask(room.first(i), g.first_column, c.first, other, batch, room.ring.full(i));
          ask(room.second(i), g.second_column, c.first, other, batch, room.ring.full(i));
        } else if (leads()) {
          mbarrier_arrive(room.ring.full(i));
        }
      } else {
        named_barrier(PRODUCERS, GROUP);
        const auto seen = [&](i32 row) { return notes.top(row - c.first) != infinity(); };
        fill(room.first(i), static_cast<const T*>(g.first) + at.batch * g.first_step.batch + other * g.first_step.head, g.first_step.token,
             c.first, c.end, WIDTH, g.dim, seen);
        fill(room.second(i), static_cast<const T*>(g.second) + at.batch * g.second_step.batch + other * g.second_step.head,
             g.second_step.token, c.first, c.end, WIDTH, g.dim, seen);
        if (copying) copies_wait<2>(), arrive(i - 1);
      }
      copying = !boxes;
    }
  }
  if (copying) copies_wait<0>(), arrive(i - 1);
}

// s = A B^T of this warpgroup's rows of A, from `row` on, and of N rows of B from `first` on; a group of products.
template <typename T, i32 N, i32 DIM, typename Own, typename Column>
VK_DEVICE void compare(Accumulator (&s)[N / 8], const Own& a, i32 row, const Column& b, i32 first) {
  products_begin();
  VK_UNROLL
  for (i32 d = 0; d < DIM / 16; ++d) warpgroup_product<T, N>(s, a.depth_along(row, d), b.depth_along(first, d), d > 0);
  products_commit();
}

// A left operand of N of depth: accumulators rounded to T, and with WHOLE what that takes from them.
template <typename T, i32 N, bool WHOLE>
struct Left {
  FragmentA<T> kept[N / 16], rest[WHOLE ? N / 16 : 1];
  VK_DEVICE void take(const Accumulator (&s)[N / 8]) {
    VK_UNROLL
    for (i32 n = 0; n < N / 16; ++n) {
      kept[n] = as_operand<T>(s[2 * n], s[2 * n + 1]);
      if constexpr (WHOLE) rest[n] = remainder(kept[n], s[2 * n], s[2 * n + 1]);
    }
  }
};

// out += P B, a group of products.
template <typename T, i32 WIDTH, i32 DIM, bool WHOLE, typename Column>
VK_DEVICE void gather(Accumulator (&out)[DIM / 8], const Left<T, WIDTH, WHOLE>& p, const Column& b) {
  products_begin();
  VK_UNROLL
  for (i32 n = 0; n < WIDTH / 16; ++n) {
    if constexpr (WHOLE) warpgroup_product<T, DIM, true>(out, p.rest[n], b.depth_across(n), true);
    warpgroup_product<T, DIM, true>(out, p.kept[n], b.depth_across(n), true);
  }
  products_commit();
}

// out += P B of the rows of B from 16 `first` on, in the rows that see the tile, 64 values at a time: P is 0 for the others, but 0 times a
// NaN that only others see is NaN.
template <typename T, i32 N, i32 DIM, bool WHOLE, typename Column>
VK_DEVICE void gather_part(Accumulator (&out)[DIM / 8], const Left<T, N, WHOLE>& p, const Column& b, i32 first, const bool (&sees)[2]) {
  const auto panel = [&](auto& part, i32 from) {
    constexpr i32 COUNT = i32(sizeof(part) / sizeof(part[0]));
    products_begin();
    VK_UNROLL
    for (i32 n = 0; n < N / 16; ++n) {
      if constexpr (WHOLE) warpgroup_product<T, COUNT * 8, true>(part, p.rest[n], b.depth_across(first + n, from), n > 0);
      warpgroup_product<T, COUNT * 8, true>(part, p.kept[n], b.depth_across(first + n, from), WHOLE || n > 0);
    }
    products_commit();
    products_wait<0>();
    VK_UNROLL
    for (i32 d = 0; d < COUNT; ++d)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i) add_where(sees[i / 2], out[from * 8 + d].v[i], part[d].v[i]);
  };
  Accumulator part[8];
  panel(part, 0);
  if constexpr (DIM == 128) panel(part, 1);  // in the same registers
  if constexpr (DIM == 96) {
    Accumulator half[4];
    panel(half, 1);
  }
}

// What a consumer warpgroup's tiles have in common.
template <i32 DIM, i32 WIDTH>
struct Consumer {
  const Room<DIM, WIDTH>& room;
  i32 share, first, row, end;  // its rows in the block's tiles; its first token; this warp's; past the last
  VK_DEVICE Consumer(const Program& at, const Room<DIM, WIDTH>& in) : room(in) {
    share = uniform((group_index() - 1) * SHARE), first = at.row_first + share, row = first + i32(warp_index()) % 4 * 16, end = at.row_end;
  }
  VK_DEVICE i32 token(i32 h) const { return row + accumulator_row(2 * h); }
  // Whether any of the warpgroup's rows sees the i-th tile, and which of this lane's do.
  VK_DEVICE bool visits(bool (&sees)[2], i32 i) const {
    const Words w = room.notes(i).rows();
    const i32 from = i32(w.w[0]), to = i32(w.w[1]) < end ? i32(w.w[1]) : end;
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) sees[h] = token(h) >= from && token(h) < to;
    return first < to && first + SHARE > from;
  }
  // Whether the warpgroup has no rows; then it has only let go of the tiles.
  VK_DEVICE bool passes(i32 count) const {
    if (first < end) return false;
    for (i32 i = 0; i < count; ++i) room.ring.wait_full(i), room.ring.release(i);
    return true;
  }
  template <typename T>
  VK_DEVICE void leave_to(void* to, const Strides& step, const Program& at, const Accumulator (&out)[DIM / 8], float factor,
                          const typename Room<DIM, WIDTH>::Own& through, i32 dim) const {
    const float both[2] = {factor, factor};
    leave<T, SHARE * GROUPS, DIM>(static_cast<T*>(to) + at.batch * step.batch + at.head * step.head, step.token, out, both, through,
                                  share + row - first, row, end, dim);
  }
};

template <typename T, i32 DIM, i32 WIDTH>
VK_DEVICE void consume_dq(const HopperBackward& g, const Program& at, const Room<DIM, WIDTH>& room) {
  const Consumer<DIM, WIDTH> c(at, room);
  const i32 whole = g.live == nullptr ? at.main_count : 0, count = at.main_count + at.edge_count;
  if (c.passes(count)) return;
  const float* lse = g.lse + at.batch * g.lse_step.batch + at.head * g.lse_step.head;
  const float* delta = g.delta + at.batch * g.delta_step.batch + at.head * g.delta_step.head;
  float top[2], less[2];
  bool alive[2];
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    const i32 mine = c.token(h);
    const float sum = mine < c.end ? load(lse + mine * g.lse_step.token) : -infinity();
    // A row that sees nothing has an lse of -inf; it may hold anything.
    alive[h] = sum != -infinity();
    top[h] = alive[h] ? sum * LOG2E : 0.0f;
    less[h] = alive[h] ? load(delta + mine * g.delta_step.token) : 0.0f;
  }
  const float scale = g.scale * LOG2E;
  Accumulator out[DIM / 8], s[WIDTH / 8], d[WIDTH / 8];
  Left<T, WIDTH, WHOLE<T>> left;
  clear(out);
  mbarrier_wait(room.rows, 0);

  const auto exponentials = [&] {
    VK_UNROLL
    for (i32 n = 0; n < WIDTH / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 4; ++j) s[n].v[j] = exp2_approx(s[n].v[j] * scale - top[j / 2]);
  };
  VK_NO_UNROLL
  for (i32 i = 0; i < whole; ++i) {
    room.ring.wait_full(i);
    compare<T, WIDTH, DIM>(s, room.first_own, c.share, room.first(i), 0);
    compare<T, WIDTH, DIM>(d, room.second_own, c.share, room.second(i), 0);
    products_wait<1>();
    exponentials();
    // A branch, which keeps the wait for dP behind the exponentials.
    if (i > 0) room.ring.release(i - 1);
    products_wait<0>();
    VK_UNROLL
    for (i32 n = 0; n < WIDTH / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 4; ++j) s[n].v[j] *= d[n].v[j] - less[j / 2];
    left.take(s);
    gather<T, WIDTH, DIM>(out, left, room.first(i));
  }
  products_wait<0>();
  if (whole > 0) room.ring.release(whole - 1);

  VK_NO_UNROLL
  for (i32 i = whole; i < count; ++i) {
    room.ring.wait_full(i);
    bool sees[2];
    if (c.visits(sees, i)) {
      compare<T, WIDTH, DIM>(s, room.first_own, c.share, room.first(i), 0);
      compare<T, WIDTH, DIM>(d, room.second_own, c.share, room.second(i), 0);
      products_wait<0>();
      exponentials();
      sees[0] = sees[0] && alive[0], sees[1] = sees[1] && alive[1];
      VK_UNROLL
      for (i32 n = 0; n < WIDTH / 8; ++n) {
        float hidden[2], unused[2];
        room.notes(i).read(hidden, unused, n);
        VK_UNROLL
        for (i32 j = 0; j < 4; ++j)
          s[n].v[j] = sees[j / 2] && hidden[j % 2] == 0 ? s[n].v[j] * (d[n].v[j] - less[j / 2]) : 0.0f;
      }
      left.take(s);
      gather_part<T, WIDTH, DIM>(out, left, room.first(i), 0, sees);
    }
    room.ring.release(i);
  }
  // The other warps' products have read this warp's rows.
  named_barrier(PRODUCERS + group_index(), GROUP);
  c.template leave_to<T>(g.one, g.one_step, at, out, g.scale, room.first_own, g.dim);
}

// Rows are keys, columns the queries that see them, of every query head of the group.
template <typename T, i32 DIM, i32 WIDTH>
VK_DEVICE void consume_dkv(const HopperBackward& g, const Program& at, const Room<DIM, WIDTH>& room) {
  const Consumer<DIM, WIDTH> c(at, room);
  const float scale = g.scale * LOG2E;
  const i32 whole = g.live == nullptr ? at.main_count : 0, each = at.main_count + at.edge_count;
  if (c.passes(each * g.group)) return;
  // Columns of a tile with hidden pairs that are worked on at a time: two sums of its own come on top there.
  constexpr i32 PIECE = DIM > 64 && WIDTH > 48 ? WIDTH / 2 : WIDTH;
  Accumulator dk[DIM / 8], dv[DIM / 8];
  clear(dk), clear(dv);
  mbarrier_wait(room.rows, 0);

  i32 i = 0;
  VK_NO_UNROLL
  for (i32 head = 0; head < g.group; ++head) {
    VK_NO_UNROLL
    for (i32 tile = 0; tile < whole; ++tile, ++i) {
      Accumulator s[WIDTH / 8], d[WIDTH / 8];
      Left<T, WIDTH, false> p, ds;
      room.ring.wait_full(i);
      compare<T, WIDTH, DIM>(s, room.first_own, c.share, room.first(i), 0);
      compare<T, WIDTH, DIM>(d, room.second_own, c.share, room.second(i), 0);
      products_wait<1>();
      VK_UNROLL
      for (i32 n = 0; n < WIDTH / 8; ++n) {
        float top[2], less[2];
        room.notes(i).read(top, less, n);
        VK_UNROLL
        for (i32 j = 0; j < 4; ++j) s[n].v[j] = exp2_approx(s[n].v[j] * scale - top[j % 2]);
      }
      p.take(s);
      gather<T, WIDTH, DIM>(dv, p, room.second(i));
      products_wait<0>();
      VK_UNROLL
      for (i32 n = 0; n < WIDTH / 8; ++n) {
        float top[2], less[2];
        room.notes(i).read(top, less, n);
        VK_UNROLL
        for (i32 j = 0; j < 4; ++j) s[n].v[j] *= d[n].v[j] - less[j % 2];
      }
      ds.take(s);
      gather<T, WIDTH, DIM>(dk, ds, room.first(i));
      products_wait<0>();
      room.ring.release(i);
    }
    VK_NO_UNROLL
    for (i32 tile = whole; tile < each; ++tile, ++i) {
      room.ring.wait_full(i);
      bool sees[2];
      if (c.visits(sees, i)) {
        VK_NO_UNROLL
        for (i32 first = 0; first < WIDTH; first += PIECE) {
          Accumulator s[PIECE / 8], d[PIECE / 8];
          Left<T, PIECE, false> p, ds;
          compare<T, PIECE, DIM>(s, room.first_own, c.share, room.first(i), first);
          compare<T, PIECE, DIM>(d, room.second_own, c.share, room.second(i), first);
          products_wait<0>();
          VK_UNROLL
          for (i32 n = 0; n < PIECE / 8; ++n) {
            float top[2], less[2];
            room.notes(i).read(top, less, first / 8 + n);
            VK_UNROLL
            for (i32 j = 0; j < 4; ++j) {
              const bool visible = sees[j / 2] && top[j % 2] != infinity();
              s[n].v[j] = visible ? exp2_approx(s[n].v[j] * scale - top[j % 2]) : 0.0f;
              d[n].v[j] = visible ? s[n].v[j] * (d[n].v[j] - less[j % 2]) : 0.0f;
            }
          }
          p.take(s);
          ds.take(d);
          gather_part<T, PIECE, DIM>(dv, p, room.second(i), first / 16, sees);
          gather_part<T, PIECE, DIM>(dk, ds, room.first(i), first / 16, sees);
        }
      }
      room.ring.release(i);
    }
  }
  if (g.live != nullptr) {
    // Nobody saw a dead key; what was summed for it, from whatever it holds, means nothing.
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      if (c.token(h) < c.end && !(load(g.live + at.batch * g.live_step + c.token(h)) & 1)) {
        VK_UNROLL
        for (i32 n = 0; n < DIM / 8; ++n) dk[n].v[2 * h] = dk[n].v[2 * h + 1] = dv[n].v[2 * h] = dv[n].v[2 * h + 1] = 0;
      }
    }
  }
  named_barrier(PRODUCERS + group_index(), GROUP);
  c.template leave_to<T>(g.one, g.one_step, at, dk, g.scale, room.first_own, g.dim);
  c.template leave_to<T>(g.two, g.two_step, at, dv, 1.0f, room.second_own, g.dim);
}

template <typename T, Part PART, i32 DIM, i32 WIDTH>
VK_DEVICE void backward(const HopperBackward& g) {
  const Room<DIM, WIDTH> room;
  const Program at(g.tiles, g.n_tiles, g.heads);
  if (thread_index() == 0) room.make();
  block_barrier();
  if (group_index() == 0) {
    registers_down<24>();
    produce<T, PART, DIM, WIDTH>(g, at, room);
  } else {
    registers_up<240>();
    if constexpr (PART == DQ) consume_dq<T, DIM, WIDTH>(g, at, room);
    else consume_dkv<T, DIM, WIDTH>(g, at, room);
  }
}

}  // namespace hopper_backward
}  // namespace grid
}  // namespace vk

using vk::grid::HopperBackward;

#define VK_HOPPER_BACKWARD(part, PART, DIM, T, WIDTH)                                                              \
  VK_KERNEL_ALONE(384)                                                                                             \
  grid_attention_hopper_##part##_##DIM##_##T##_##WIDTH(const VK_PARAMETER HopperBackward given) {                 \
    vk::grid::hopper_backward::backward<vk::T, vk::grid::hopper_backward::PART, DIM, WIDTH>(given);               \
  }                                                                                                                \
  VK_ENTRY(grid_attention_hopper_##part##_##DIM##_##T##_##WIDTH, HopperBackward)
// WIDE_DQ, WIDE_DKV: the widest that the registers hold; 48 divides many frame lengths.
#define VK_HOPPER_BACKWARDS(DIM, T, WIDE_DQ, WIDE_DKV) \
  VK_HOPPER_BACKWARD(dq, DQ, DIM, T, 48)               \
  VK_HOPPER_BACKWARD(dq, DQ, DIM, T, WIDE_DQ)          \
  VK_HOPPER_BACKWARD(dkv, DKV, DIM, T, 48)             \
  VK_HOPPER_BACKWARD(dkv, DKV, DIM, T, WIDE_DKV)
