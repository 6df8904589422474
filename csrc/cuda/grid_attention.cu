// Grid attention, forward, for mma.sync (compute capability 8.0 on): one block per row tile of a head, 16 rows per warp, the online softmax
// of FlashAttention-2 (arXiv 2307.08691) over the column tiles of a plan. Keys and values arrive by cp.async in two stages; one barrier
// per tile. Products accumulate in float32; P is rounded to the inputs' type for P V.
#include "grid_attention.h"

namespace vk {
namespace grid {

struct Forward {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const i32 *tiles, *main, *edge;
  const u8* live;  // bit 0: a live key; bit 1: the query runs; null: all do
  Strides q_step, k_step, v_step, out_step, lse_step;
  i64 live_step;  // bytes between samples
  i32 n_tiles, heads, group, dim;
  float scale_log2;  // of the logits in base 2
};

// What a lane holds of two rows, g and g + 8: the largest logit so far, the sum of exponentials, and the output's columns.
template <i32 DIM>
struct Rows {
  float top[2], total[2];
  Accumulator out[DIM / 8];
};

// One column tile of N columns. EDGE_TILE: columns may end, and rows not see them; LIVE: keys may be dead.
template <typename T, i32 DIM, i32 N, bool EDGE_TILE, bool LIVE>
VK_DEVICE void visit(Rows<DIM>& r, const FragmentA<T> (&q)[DIM / 16], const Tile<DIM>& k, const Tile<DIM>& v, const Columns& at, i32 row,
                     const u8* live, float scale_log2) {
  Accumulator s[N / 8];
  clear(s);
  VK_UNROLL
  for (i32 d = 0; d < DIM / 16; ++d) {
    VK_UNROLL
    for (i32 n = 0; n < N / 8; n += 2) {
      FragmentB<T> b[2];
      k.template right<T>(b, n * 8, d);
      multiply_add(s[n], q[d], b[0]);
      multiply_add(s[n + 1], q[d], b[1]);
    }
  }
  constexpr bool MASKED = EDGE_TILE || LIVE;
  bool sees[2] = {true, true};
  if (EDGE_TILE) {
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      sees[h] = mine >= at.row_first && mine < at.row_end;
    }
  }
  if (MASKED) {
    // A bit per column, of which each lane looks at its own in every 32.
    u32 seen[N / 32];
    VK_UNROLL
    for (i32 n = 0; n < N / 32; ++n) {
      const i32 column = at.first + n * 32 + i32(lane_index());
      seen[n] = votes(column < at.end && (!LIVE || (load(live + column) & 1)));
    }
    VK_UNROLL
    for (i32 n = 0; n < N / 8; ++n)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i)
        if (!(sees[i / 2] && (seen[n / 4] >> (n % 4 * 8 + accumulator_column(i)) & 1))) s[n].v[i] = -infinity();
  }
  float base[2], shrink[2];
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    float best = max_of(s[0].v[2 * h], s[0].v[2 * h + 1]);
    VK_UNROLL
    for (i32 n = 1; n < N / 8; ++n) best = max_of(best, max_of(s[n].v[2 * h], s[n].v[2 * h + 1]));
    const float top = max_of(r.top[h], quad_max(best) * scale_log2);
    base[h] = MASKED && top == -infinity() ? 0.0f : top;
    shrink[h] = exp2_approx(r.top[h] - base[h]);
    r.top[h] = top;
    float sum = 0;
    VK_UNROLL
    for (i32 n = 0; n < N / 8; ++n)
      VK_UNROLL
      for (i32 i = 2 * h; i < 2 * h + 2; ++i) {
        s[n].v[i] = exp2_approx(s[n].v[i] * scale_log2 - base[h]);
        sum += s[n].v[i];
      }
    r.total[h] = r.total[h] * shrink[h] + sum;  // of this lane's columns; the quad's are added at the end
  }
  VK_UNROLL
  for (i32 d = 0; d < DIM / 8; ++d)
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) r.out[d].v[i] *= shrink[i / 2];
  gather<T, DIM, N, EDGE_TILE>(r.out, s, v, 0, sees);
}

template <typename T, i32 DIM, bool LIVE>
VK_DEVICE void forward(const Forward& g) {
  const Program at(g.tiles, g.n_tiles, g.heads);
  const i32 row = at.row_first + i32(warp_index()) * 16, count = at.main_count + at.edge_count;
  const T* q = static_cast<const T*>(g.q) + at.batch * g.q_step.batch + at.head * g.q_step.head;
  const T* k = static_cast<const T*>(g.k) + at.batch * g.k_step.batch + at.head / g.group * g.k_step.head;
  const T* v = static_cast<const T*>(g.v) + at.batch * g.v_step.batch + at.head / g.group * g.v_step.head;
  const u8* live = LIVE ? g.live + at.batch * g.live_step : nullptr;
  // A negative scale is a positive one of -q: the largest logit is then at the largest product.
  const float scale = g.scale_log2 < 0 ? -g.scale_log2 : g.scale_log2;
  const u32 flip = g.scale_log2 < 0 ? 0x80008000u : 0u;

  constexpr i32 STAGE = MAIN * DIM * 2;
  const Tile<DIM> own{shared_at<u8>(0)};
  const auto stage = [](i32 n) { return Tile<DIM>{shared_at<u8>(u32(ROWS * DIM * 2 + n * STAGE))}; };
  const auto ask = [&](i32 i) {
    const Columns c = columns_of(at, g.main, g.edge, i);
    const i32 rows = i < at.main_count ? MAIN : EDGE;
    const auto take = [&](auto alive) {
      stage(i % 2 * 2).fill(k, g.k_step.token, c.first, c.end, rows, g.dim, alive);
      stage(i % 2 * 2 + 1).fill(v, g.v_step.token, c.first, c.end, rows, g.dim, alive);
    };
    if constexpr (LIVE) take(Bit{live, 1});
    else take(All{});
  };

  own.fill(q, g.q_step.token, at.row_first, at.row_end, ROWS, g.dim, All{});
  if (count > 0) ask(0);
  copies_commit();

  FragmentA<T> query[DIM / 16];
  Rows<DIM> r;
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) r.top[h] = -infinity(), r.total[h] = 0;
  clear(r.out);

  for (i32 i = 0; i < count || i == 0; ++i) {
    // Tile i is there, and nobody reads tile i - 1 any more, whose place the next one takes.
    copies_wait<0>();
    block_barrier();
    if (i + 1 < count) ask(i + 1);
    copies_commit();
    if (i == 0) {
      VK_UNROLL
      for (i32 d = 0; d < DIM / 16; ++d) {
        query[d] = own.template left<T>(i32(warp_index()) * 16, d);
        VK_UNROLL
        for (i32 n = 0; n < 4; ++n) query[d].w[n] ^= flip;
      }
    }
    if (i >= count) break;
    const Tile<DIM> key = stage(i % 2 * 2), value = stage(i % 2 * 2 + 1);
    const Columns c = columns_of(at, g.main, g.edge, i);
    if (i < at.main_count) visit<T, DIM, MAIN, false, LIVE>(r, query, key, value, c, row, live, scale);
    else visit<T, DIM, EDGE, true, LIVE>(r, query, key, value, c, row, live, scale);
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
      store(g.lse + at.batch * g.lse_step.batch + at.head * g.lse_step.head + mine * g.lse_step.token,
            empty ? -infinity() : (r.top[h] + log2_approx(total)) * LN2);
  }
  T* out = static_cast<T*>(g.out) + at.batch * g.out_step.batch + at.head * g.out_step.head;
  leave<T, DIM>(out, g.out_step.token, r.out, inverse, own, row, at.row_end, g.dim);
}

}  // namespace grid
}  // namespace vk

using vk::grid::Forward;

#define VK_FORWARD(name, T, DIM, LIVE)                                                        \
  VK_KERNEL(128) name(const Forward given) { vk::grid::forward<vk::T, DIM, LIVE>(given); } \
  VK_ENTRY(name, Forward)

VK_FORWARD(grid_attention_forward_bf16_64, bf16, 64, false)
VK_FORWARD(grid_attention_forward_bf16_128, bf16, 128, false)
VK_FORWARD(grid_attention_forward_bf16_64_live, bf16, 64, true)
VK_FORWARD(grid_attention_forward_bf16_128_live, bf16, 128, true)
VK_FORWARD(grid_attention_forward_f16_64, f16, 64, false)
VK_FORWARD(grid_attention_forward_f16_128, f16, 128, false)
VK_FORWARD(grid_attention_forward_f16_64_live, f16, 64, true)
VK_FORWARD(grid_attention_forward_f16_128_live, f16, 128, true)
