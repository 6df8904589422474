// Forward of grid attention: online softmax over the panels each query tile sees.
#pragma once

#include "cpu/grid_attention_tile.h"

namespace vk {
namespace VK_ISA {

template <class T>
class Forward {
  static constexpr int PAIR = Steps<T>::PAIR;

  const GridArgs& a;
  int64_t group, panels, key_lanes, value_lanes, heads_at_once;
  Tiling tiling;
  int threads;
  float scale;
  bool negate;

  // Per head of the batch being worked on: keys in the transposed form, values in the depth form.
  float *keys, *values;

  // What one thread needs for a tile.
  struct Scratch {
    float *q, *scores, *o, *m, *l;
    char* list;
  };
  Scratch first;
  int64_t scratch_stride;

  Scratch take_scratch(Arena& arena) const {
    Scratch s;
    s.q = arena.take<float>(BLOCK_ROWS * padded(a.dim));
    s.scores = arena.take<float>(BLOCK_ROWS * SCORE_STRIDE);
    s.o = arena.take<float>(BLOCK_ROWS * padded(a.dim));
    s.m = arena.take<float>(BLOCK_ROWS);
    s.l = arena.take<float>(BLOCK_ROWS);
    s.list = arena.take<char>(KeyList::bytes(panels, tiling.frames_per_tile));
    return s;
  }

 public:
  explicit Forward(const GridArgs& args) : a(args) {
    group = a.heads / a.kv_heads;
    const Frames f = frames_of(a, 0);
    panels = f.panels();
    tiling.init(f, group, BLOCK_ROWS, MR > ROW_STEP ? MR : ROW_STEP);
    key_lanes = panels * PANEL * (a.dim / PAIR);
    value_lanes = panels * PANEL / PAIR * padded(a.dim);
    threads = useful_threads(a);
    // Keys and values are packed once and then read by every tile of every head of the group. A few heads at a time bound the
    // memory; at least four tiles per thread keep the threads busy.
    const int64_t total = a.batch * a.kv_heads, budget = 8 << 20;
    heads_at_once = budget / ((key_lanes + value_lanes) * 4 + 1);
    if (heads_at_once * tiling.tiles < 4 * threads) heads_at_once = (4 * threads + tiling.tiles - 1) / tiling.tiles;
    if (heads_at_once < 1) heads_at_once = 1;
    if (heads_at_once > total) heads_at_once = total;
    // A negative scale moves into the queries: the row maximum below assumes scale >= 0.
    negate = a.scale < 0;
    scale = negate ? -a.scale : a.scale;
  }

  int64_t layout(void* memory) {
    Arena arena(memory);
    keys = arena.take<float>(heads_at_once * key_lanes);
    values = arena.take<float>(heads_at_once * value_lanes);
    const int64_t before = arena.used;
    first = take_scratch(arena);
    scratch_stride = arena.used - before;
    return before + scratch_stride * threads;
  }

  void run() {
    const int64_t total = a.batch * a.kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      for (int64_t h0 = 0; h0 < total; h0 += heads_at_once) {
        const int64_t n = total - h0 < heads_at_once ? total - h0 : heads_at_once;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * panels; ++i) pack(h0 + i / panels, i / panels, i % panels);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n * tiling.tiles; ++i) {
          // All text tiles first, then head after head so that threads share one head's keys in the outer cache.
          const int64_t texts = n * tiling.text_chunks, videos = tiling.tiles - tiling.text_chunks;
          const int64_t slot = i < texts ? i / tiling.text_chunks : (i - texts) / videos;
          const int64_t index = i < texts ? i % tiling.text_chunks : tiling.text_chunks + (i - texts) % videos;
          attend(h0 + slot, slot, index);
        }
      }
    }
  }

 private:
  void pack(int64_t head, int64_t slot, int64_t p) const {
    const int64_t b = head / a.kv_heads, h = head % a.kv_heads;
    const int d = static_cast<int>(a.dim);
    int count;
    const int64_t token = frames_of(a, b).panel_token(p, &count);
    const T* rows[PANEL];
    panel_rows(a.v, b, h, token, count, rows);
    const Mask bad = not_finite(rows, d);
    pack_depth_panel(rows, d, bad, values + slot * value_lanes + p * (PANEL / PAIR) * padded(d));
    panel_rows(a.k, b, h, token, count, rows);
    pack_panel(rows, d, bad, keys + slot * key_lanes + p * (d / PAIR) * PANEL);
  }

  void attend(int64_t head, int64_t slot, int64_t index) const {
    const int64_t b = head / a.kv_heads, h0 = head % a.kv_heads * group;
    const Frames f = frames_of(a, b);
    Tile tile;
    tile.init(f, tiling, group, index);
    if (tile.rows == 0) return;

    const ptrdiff_t shift = scratch_stride / 4 * thread_index();
    float *q = first.q + shift, *scores = first.scores + shift, *o = first.o + shift, *m = first.m + shift, *l = first.l + shift;
    KeyList list;
    list.place(first.list + shift * 4, panels);
    list.build(f, tile, 0, panels);

    const int d = static_cast<int>(a.dim), dp = padded(d), rows = (tile.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    uint8_t mask_row[BLOCK_ROWS];
    for (int r = 0; r < rows; ++r) {
      const T* row = nullptr;
      if (r < tile.rows) {
        int64_t head_in_group, token;
        int mask;
        tile.row(f, r, &head_in_group, &token, &mask);
        row = row_of<const T>(a.q, b, h0 + head_in_group, token);
        mask_row[r] = static_cast<uint8_t>(mask);
      }
      pack_row(row, d, negate, q + r * (dp / PAIR));
      m[r] = -INFINITY, l[r] = 0.f;
    }
    for (int i = 0; i < rows * dp; i += LANES) store(o + i, zero());
    if (a.work) count_work(a.work, tile, list, rows, mask_row);

    for (int i = 0; i < list.n; i += BLOCK_PANELS) {
      const int n = list.n - i < BLOCK_PANELS ? list.n - i : BLOCK_PANELS;
      gemm_panels<PAIR>(rows, q, dp / PAIR, keys + slot * key_lanes, d / PAIR, list.panel + i, n, scores, SCORE_STRIDE);
      for (int r = 0; r < tile.rows; ++r) {
        const Mask* mask = list.mask + mask_row[r] * list.span + i;
        if (list.full)
          softmax<false>(scores + r * SCORE_STRIDE, n, mask, m + r, l + r, o + r * dp, dp);
        else
          softmax<true>(scores + r * SCORE_STRIDE, n, mask, m + r, l + r, o + r * dp, dp);
      }
      Run runs[BLOCK_PANELS];
      const int n_runs = make_runs<PAIR>(list.panel + i, n, dp, runs);
      gemm_depth<PAIR, false>(rows, scores, SCORE_STRIDE, values + slot * value_lanes, dp, runs, n_runs, o, dp);
    }

    for (int r = 0; r < tile.rows; ++r) {
      int64_t head_in_group, token;
      int mask;
      tile.row(f, r, &head_in_group, &token, &mask);
      T* out = row_of<T>(a.out, b, h0 + head_in_group, token);
      const F16 inverse = set1(l[r] == 0.f ? 0.f : 1.f / l[r]);
      for (int c = 0; c < d; c += LANES) store_cols(out + c, mul(load(o + r * dp + c), inverse), d - c);
      const double lse = m[r] + log(static_cast<double>(l[r]));
      *row_of<float>(a.lse, b, h0 + head_in_group, token) = l[r] == 0.f ? -INFINITY : static_cast<float>(lse);
    }
  }

  // One row of scores becomes unnormalised probabilities (bf16 where the product with V is): m and l are the running maximum and
  // sum, o the running output, rescaled only when the maximum moves.
  template <bool MASKED>
  VK_INLINE void softmax(float* s, int n, const Mask* mask, float* m, float* l, float* o, int dp) const {
    F16 top = set1(-INFINITY);
    for (int i = 0; i < n; ++i) {
      const F16 x = load(s + i * LANES);
      top = max(top, MASKED ? select(mask[i], x, set1(-INFINITY)) : x);
    }
    const float highest = max_lane(top), reached = highest == -INFINITY ? highest : highest * scale;
    const float old = *m, now = reached > old ? reached : old;
    // No visible key yet: exponents are taken against 0, since -inf - -inf would be NaN.
    const float base = now == -INFINITY ? 0.f : now;
    if (now != old) {
      const float shrink = expf(old - base);
      *m = now, *l *= shrink;
      for (int c = 0; c < dp; c += LANES) store(o + c, mul(load(o + c), set1(shrink)));
    }
    F16 total = zero();
    const F16 by = set1(scale), offset = set1(base);
    for (int i = 0; i < n; ++i) {
      F16 p = exp<ExpDegree<T>::forward>(fms(load(s + i * LANES), by, offset));
      if (MASKED) p = keep(mask[i], p);
      total = add(total, p);
      if (PAIR == 2)
        store(reinterpret_cast<bf16*>(s) + i * LANES, p);
      else
        store(s + i * LANES, p);
    }
    *l += sum(total);
  }
};

}  // namespace VK_ISA
}  // namespace vk
