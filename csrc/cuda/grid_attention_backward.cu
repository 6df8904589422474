// Grid attention, backward, for mma.sync (compute capability 8.0 on), in three launches without atomics: Delta = rowsum(dO O) - dLSE; dQ by
// row tiles of queries; dK and dV by row tiles of keys, which look at the same plan turned round. P is made again from the log-sum-exp, as in
// FlashAttention-2 (arXiv 2307.08691): dS = P (dO V^T - Delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. Deterministic.
#include "grid_attention.h"

namespace vk {
namespace grid {

struct Delta {
  const void *dout, *out;
  const float* dlse;  // null: zero
  float* delta;       // [B, H, L], dense
  Strides dout_step, out_step, dlse_step;
  i32 rows, heads, length, dim;  // rows = B H L
};

struct Backward {
  const void *dout, *q, *k, *v;
  const float *lse, *delta;
  void *dq, *dk, *dv;  // dq, or dk and dv
  const i32 *tiles, *main, *edge;
  const u8* live;  // as in Forward
  Strides dout_step, q_step, k_step, v_step, lse_step, delta_step, dq_step, dk_step, dv_step;
  i64 live_step;
  i32 n_tiles, heads, group, dim;  // heads: of what the tiles' rows are
  float scale;
};

constexpr i32 HALF = 32;  // columns that dQ works on at a time

// One warp a row.
template <typename T>
VK_DEVICE void delta(const Delta& g) {
  const i32 row = i32(block_index()) * WARPS + i32(warp_index());
  if (row >= g.rows) return;
  const i64 batch = row / g.length / g.heads, head = row / g.length % g.heads, token = row % g.length;
  const T* dout = static_cast<const T*>(g.dout) + batch * g.dout_step.batch + head * g.dout_step.head + token * g.dout_step.token;
  const T* out = static_cast<const T*>(g.out) + batch * g.out_step.batch + head * g.out_step.head + token * g.out_step.token;
  float sum = 0;
  for (i32 c = i32(lane_index()) * CHUNK; c < g.dim; c += i32(WARP) * CHUNK) {
    const Words a = load16(dout + c), b = load16(out + c);
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i)
      sum += Number<T>::low(a.w[i]) * Number<T>::low(b.w[i]) + Number<T>::high(a.w[i]) * Number<T>::high(b.w[i]);
  }
  sum = quad_sum(sum);
  VK_UNROLL
  for (u32 mask = 4; mask < WARP; mask *= 2) sum += shuffle_xor(sum, mask);
  if (lane_index() != 0) return;
  if (g.dlse != nullptr) sum -= load(g.dlse + batch * g.dlse_step.batch + head * g.dlse_step.head + token * g.dlse_step.token);
  store(g.delta + row, sum);
}

template <typename T, i32 DIM, bool LIVE>
VK_DEVICE void dq(const Backward& g) {
  const Program at(g.tiles, g.n_tiles, g.heads);
  const i32 own = i32(warp_index()) * 16, row = at.row_first + own, count = at.main_count + at.edge_count;
  const i64 kv = at.head / g.group;
  const T* k = static_cast<const T*>(g.k) + at.batch * g.k_step.batch + kv * g.k_step.head;
  const T* v = static_cast<const T*>(g.v) + at.batch * g.v_step.batch + kv * g.v_step.head;
  const float* lse = g.lse + at.batch * g.lse_step.batch + at.head * g.lse_step.head;
  const float* deltas = g.delta + at.batch * g.delta_step.batch + at.head * g.delta_step.head;

  constexpr i32 OWN = ROWS * DIM * 2, STAGE = MAIN * DIM * 2;
  const Tile<DIM> query{shared_at<u8>(0)}, grad{shared_at<u8>(OWN)};
  const auto stage = [](i32 n) { return Tile<DIM>{shared_at<u8>(u32(2 * OWN + n * STAGE))}; };
  const auto ask = [&](i32 i) {
    const Columns c = columns_of(at, g.main, g.edge, i);
    const i32 rows = i < at.main_count ? MAIN : EDGE;
    const auto take = [&](auto alive) {
      stage(i % 2 * 2).fill(k, g.k_step.token, c.first, c.end, rows, g.dim, alive);
      stage(i % 2 * 2 + 1).fill(v, g.v_step.token, c.first, c.end, rows, g.dim, alive);
    };
    if constexpr (LIVE) take(Bit{g.live + at.batch * g.live_step, 1});
    else take(All{});
  };
  // A row that sees nothing has an lse of -inf; it may hold anything.
  const auto sees_any = [&](i32 n) { return load(lse + n * g.lse_step.token) != -infinity(); };
  query.fill(static_cast<const T*>(g.q) + at.batch * g.q_step.batch + at.head * g.q_step.head, g.q_step.token, at.row_first, at.row_end, ROWS,
             g.dim, sees_any);
  grad.fill(static_cast<const T*>(g.dout) + at.batch * g.dout_step.batch + at.head * g.dout_step.head, g.dout_step.token, at.row_first,
            at.row_end, ROWS, g.dim, sees_any);
  if (count > 0) ask(0);
  copies_commit();

  float top[2], less[2];
  bool alive[2];
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    const i32 mine = row + accumulator_row(2 * h);
    alive[h] = mine < at.row_end && sees_any(mine);
    top[h] = alive[h] ? load(lse + mine * g.lse_step.token) * LOG2E : 0.0f;
    less[h] = alive[h] ? load(deltas + mine * g.delta_step.token) : 0.0f;
  }
  const float scale_log2 = g.scale * LOG2E;
  Accumulator out[DIM / 8];
  clear(out);

  const auto visit = [&](const Tile<DIM>& key, const Tile<DIM>& value, i32 first, const Columns& c, auto edge) {
    constexpr bool EDGE_TILE = decltype(edge)::value;
    Accumulator s[HALF / 8], d[HALF / 8];
    clear(s), clear(d);
    product<T, DIM, HALF>(s, query, own, key, first);
    product<T, DIM, HALF>(d, grad, own, value, first);
    const i32 column = c.first + first + i32(lane_index());
    u32 seen = 0xffffffffu;
    if (EDGE_TILE || LIVE) seen = votes(column < c.end && (!LIVE || (load(g.live + at.batch * g.live_step + column) & 1)));
    bool sees[2];
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      sees[h] = alive[h] && (!EDGE_TILE || (mine >= c.row_first && mine < c.row_end));
    }
    VK_UNROLL
    for (i32 n = 0; n < HALF / 8; ++n)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i) {
        const float p = exp2_approx(s[n].v[i] * scale_log2 - top[i / 2]);
        const bool visible = sees[i / 2] && (seen >> (n * 8 + accumulator_column(i)) & 1);
        s[n].v[i] = visible ? p * (d[n].v[i] - less[i / 2]) : 0.0f;
      }
    gather<T, DIM, HALF, EDGE_TILE, WHOLE<T>>(out, s, key, first, sees);
  };

  for (i32 i = 0; i < count; ++i) {
    copies_wait<0>();
    block_barrier();
    if (i + 1 < count) ask(i + 1);
    copies_commit();
    const Tile<DIM> key = stage(i % 2 * 2), value = stage(i % 2 * 2 + 1);
    const Columns c = columns_of(at, g.main, g.edge, i);
    if (i < at.main_count) {
      VK_NO_UNROLL
      for (i32 first = 0; first < MAIN; first += HALF) visit(key, value, first, c, Flag<false>{});
    } else {
      visit(key, value, 0, c, Flag<true>{});
    }
  }
  copies_wait<0>();
  block_barrier();  // where no tile came: the rows' own copies were asked for by all threads
  const float factor[2] = {g.scale, g.scale};
  leave<T, DIM>(static_cast<T*>(g.dq) + at.batch * g.dq_step.batch + at.head * g.dq_step.head, g.dq_step.token, out, factor, query, row,
                at.row_end, g.dim);
}

// Rows are keys, columns the queries that see them, of every query head of the group.
template <typename T, i32 DIM, bool LIVE>
VK_DEVICE void dkv(const Backward& g) {
  const Program at(g.tiles, g.n_tiles, g.heads);
  const i32 own = i32(warp_index()) * 16, row = at.row_first + own, each = at.main_count + at.edge_count, count = each * g.group;
  const i64 first_head = at.head * g.group;
  const auto lse_of = [&](i32 i) { return g.lse + at.batch * g.lse_step.batch + (first_head + i / each) * g.lse_step.head; };

  constexpr i32 OWN = ROWS * DIM * 2, STAGE = MAIN * DIM * 2;
  constexpr i32 COLUMNS = DIM > 64 ? 16 : 32;  // worked on at a time: dK and dV fill the registers
  const Tile<DIM> key{shared_at<u8>(0)}, value{shared_at<u8>(OWN)};
  const auto stage = [](i32 n) { return Tile<DIM>{shared_at<u8>(u32(2 * OWN + n * STAGE))}; };
  const auto ask = [&](i32 i) {
    const Columns c = columns_of(at, g.main, g.edge, i % each);
    const i32 rows = i % each < at.main_count ? MAIN : EDGE;
    const i64 head = first_head + i / each;
    const float* lse = lse_of(i);
    const auto sees_any = [&](i32 n) { return load(lse + n * g.lse_step.token) != -infinity(); };
    stage(i % 2 * 2).fill(static_cast<const T*>(g.q) + at.batch * g.q_step.batch + head * g.q_step.head, g.q_step.token, c.first, c.end, rows,
                          g.dim, sees_any);
    stage(i % 2 * 2 + 1).fill(static_cast<const T*>(g.dout) + at.batch * g.dout_step.batch + head * g.dout_step.head, g.dout_step.token,
                              c.first, c.end, rows, g.dim, sees_any);
  };
  const auto take = [&](auto alive) {
    key.fill(static_cast<const T*>(g.k) + at.batch * g.k_step.batch + at.head * g.k_step.head, g.k_step.token, at.row_first, at.row_end, ROWS,
             g.dim, alive);
    value.fill(static_cast<const T*>(g.v) + at.batch * g.v_step.batch + at.head * g.v_step.head, g.v_step.token, at.row_first, at.row_end,
               ROWS, g.dim, alive);
  };
  if constexpr (LIVE) take(Bit{g.live + at.batch * g.live_step, 1});
  else take(All{});
  if (count > 0) ask(0);
  copies_commit();

  const float scale_log2 = g.scale * LOG2E;
  Accumulator dk[DIM / 8], dv[DIM / 8];
  clear(dk), clear(dv);

  const auto visit = [&](const Tile<DIM>& query, const Tile<DIM>& grad, i32 first, const Columns& c, const float* lse, const float* deltas,
                         auto edge) {
    constexpr bool EDGE_TILE = decltype(edge)::value;
    bool sees[2];
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      sees[h] = !EDGE_TILE || (mine >= c.row_first && mine < c.row_end);
    }
    Accumulator s[COLUMNS / 8], d[COLUMNS / 8];
    clear(s), clear(d);
    product<T, DIM, COLUMNS>(s, key, own, query, first);
    product<T, DIM, COLUMNS>(d, value, own, grad, first);
    VK_UNROLL
    for (i32 n = 0; n < COLUMNS / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j) {
        const i32 column = c.first + first + n * 8 + accumulator_column(j);
        const bool there = !EDGE_TILE || column < c.end;
        const float top = there ? load(lse + column * g.lse_step.token) : -infinity();
        const float less = there ? load(deltas + column * g.delta_step.token) : 0.0f;
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const bool visible = sees[h] && top != -infinity();
          const float p = exp2_approx(s[n].v[2 * h + j] * scale_log2 - top * LOG2E);
          s[n].v[2 * h + j] = visible ? p : 0.0f;
          d[n].v[2 * h + j] = visible ? p * (d[n].v[2 * h + j] - less) : 0.0f;
        }
      }
    gather<T, DIM, COLUMNS, EDGE_TILE>(dv, s, grad, first, sees);
    gather<T, DIM, COLUMNS, EDGE_TILE>(dk, d, query, first, sees);
  };

  for (i32 i = 0; i < count; ++i) {
    copies_wait<0>();
    block_barrier();
    if (i + 1 < count) ask(i + 1);
    copies_commit();
    const Tile<DIM> query = stage(i % 2 * 2), grad = stage(i % 2 * 2 + 1);
    const Columns c = columns_of(at, g.main, g.edge, i % each);
    const float* lse = lse_of(i);
    const float* deltas = g.delta + at.batch * g.delta_step.batch + (first_head + i / each) * g.delta_step.head;
    if (i % each < at.main_count) {
      VK_NO_UNROLL
      for (i32 first = 0; first < MAIN; first += COLUMNS) visit(query, grad, first, c, lse, deltas, Flag<false>{});
    } else {
      VK_NO_UNROLL
      for (i32 first = 0; first < EDGE; first += COLUMNS) visit(query, grad, first, c, lse, deltas, Flag<true>{});
    }
  }
  copies_wait<0>();
  block_barrier();
  if (LIVE) {
    // Nobody saw a dead key; what was summed for it, from zeros in its place, means nothing.
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      if (mine < at.row_end && !(load(g.live + at.batch * g.live_step + mine) & 1)) {
        VK_UNROLL
        for (i32 d = 0; d < DIM / 8; ++d)
          dk[d].v[2 * h] = dk[d].v[2 * h + 1] = dv[d].v[2 * h] = dv[d].v[2 * h + 1] = 0;
      }
    }
  }
  const float scaled[2] = {g.scale, g.scale}, plain[2] = {1.0f, 1.0f};
  leave<T, DIM>(static_cast<T*>(g.dk) + at.batch * g.dk_step.batch + at.head * g.dk_step.head, g.dk_step.token, dk, scaled, key, row,
                at.row_end, g.dim);
  leave<T, DIM>(static_cast<T*>(g.dv) + at.batch * g.dv_step.batch + at.head * g.dv_step.head, g.dv_step.token, dv, plain, value, row,
                at.row_end, g.dim);
}

}  // namespace grid
}  // namespace vk

using vk::grid::Backward;
using vk::grid::Delta;

#define VK_DELTA(name, T)                                                \
  VK_KERNEL(128) name(const Delta given) { vk::grid::delta<vk::T>(given); } \
  VK_ENTRY(name, Delta)
#define VK_BACKWARD(KERNEL, name, PART, T, DIM, LIVE)                                  \
  KERNEL(128) name(const Backward given) { vk::grid::PART<vk::T, DIM, LIVE>(given); } \
  VK_ENTRY(name, Backward)
// DQ: how dQ's kernel is declared. At 128 shared memory holds two blocks: without a bound of their number the compiler would spare registers,
// and spill, for a third.
#define VK_BOTH_PARTS(DQ, T, DIM, LIVE, suffix)                                         \
  VK_BACKWARD(DQ, grid_attention_dq_##T##_##DIM##suffix, dq, T, DIM, LIVE)              \
  VK_BACKWARD(VK_KERNEL, grid_attention_dkv_##T##_##DIM##suffix, dkv, T, DIM, LIVE)

VK_DELTA(grid_attention_delta_bf16, bf16)
VK_DELTA(grid_attention_delta_f16, f16)
VK_BOTH_PARTS(VK_KERNEL, bf16, 64, false, )
VK_BOTH_PARTS(VK_KERNEL_ALONE, bf16, 128, false, )
VK_BOTH_PARTS(VK_KERNEL, bf16, 64, true, _live)
VK_BOTH_PARTS(VK_KERNEL_ALONE, bf16, 128, true, _live)
VK_BOTH_PARTS(VK_KERNEL, f16, 64, false, )
VK_BOTH_PARTS(VK_KERNEL_ALONE, f16, 128, false, )
VK_BOTH_PARTS(VK_KERNEL, f16, 64, true, _live)
VK_BOTH_PARTS(VK_KERNEL_ALONE, f16, 128, true, _live)
