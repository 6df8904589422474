// Backward of grid attention: five products per pair of query tile and key block, no atomics.
//
//   S = Q K^T      P = exp(scale S - lse)      dP = dO V^T      dS = P (dP - Delta),  Delta = rowsum(dO O) - dlse
//   dV += P^T dO   dK += scale dS^T Q          dQ += scale dS K
//
// A block of keys is taken by one thread, which visits every query tile that sees it (of all query heads of the group), so dK and
// dV are complete when it is done. dQ is summed over key blocks in fp32: the blocks of a head are dealt to a fixed number of
// splits, each with its own sum, added up in order at the end. The number depends on the shapes alone: the result is the same bits
// from run to run and for any number of threads.
#pragma once

#include "cpu/grid_attention_tile.h"

namespace vk {
namespace VK_ISA {

template <class T>
class Backward {
  static constexpr int PAIR = Steps<T>::PAIR;
  // bf16 keeps P and dS as pairs of rows, in the memory of the even row of S and of dP; dS also by rows, in an array of its own.
  static constexpr int PAIR_STRIDE = PAIR * SCORE_STRIDE;
  static constexpr int DS_STRIDE = PAIR == 2 ? SCORE_STRIDE / 2 + 8 : SCORE_STRIDE;

  const GridArgs& a;
  int64_t group, panels, block_panels, blocks, splits, heads_at_once;
  int64_t panel_lanes, depth_lanes, tile_rows_lanes, tile_depth_lanes, sum_lanes;
  Tiling tiling;
  int d, dp, threads;
  float scale;
  bool negate;

  // Per head of the batch being worked on. fp32 has one copy of the query rows: their depth form is the row form.
  float *keys_t, *values_t, *keys_d;      // panels of K and of V, depth form of K
  float *q_rows, *dout_rows;              // per tile: rows of Q and of dO
  float *q_depth, *dout_depth;            // per tile: the same in the depth form
  float *lse, *delta;                     // per row of each tile
  uint8_t* mask_row;
  float* dq_sum;                          // [split][tile][row][dp]

  struct Scratch {
    float *s, *dp, *ds_rows, *dk, *dv;
    uint8_t* seen;
    char* list;
  };
  Scratch first;
  int64_t scratch_stride;

  Scratch take_scratch(Arena& arena) const {
    Scratch x;
    x.s = arena.take<float>(BLOCK_ROWS * SCORE_STRIDE);
    x.dp = arena.take<float>(BLOCK_ROWS * SCORE_STRIDE);
    x.ds_rows = PAIR == 2 ? arena.take<float>(BLOCK_ROWS * DS_STRIDE) : x.dp;
    x.dk = arena.take<float>(block_panels * PANEL * dp);
    x.dv = arena.take<float>(block_panels * PANEL * dp);
    x.seen = arena.take<uint8_t>(a.n_frames);
    x.list = arena.take<char>(KeyList::bytes(block_panels, tiling.frames_per_tile));
    return x;
  }

  static int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

 public:
  explicit Backward(const GridArgs& args) : a(args), d(static_cast<int>(args.dim)), dp(padded(static_cast<int>(args.dim))) {
    group = a.heads / a.kv_heads;
    const Frames f = frames_of(a, 0);
    panels = f.panels();
    tiling.init(f, group, BLOCK_ROWS, MR > ROW_STEP ? MR : ROW_STEP);
    // Keys, values, their sums and two blocks of scores share L2: wider heads take fewer keys.
    block_panels = d <= 64 ? 16 : d <= 128 ? 8 : 4;
    blocks = ceil_div(panels, block_panels);
    const int64_t total = a.batch * a.kv_heads;
    splits = ceil_div(32, total);
    if (splits > 16) splits = 16;
    if (splits > blocks) splits = blocks;
    panel_lanes = panels * PANEL * (d / PAIR);
    depth_lanes = panels * PANEL / PAIR * dp;
    tile_rows_lanes = tiling.capacity * (dp / PAIR);
    tile_depth_lanes = tiling.capacity / PAIR * dp;
    sum_lanes = tiling.tiles * tiling.capacity * dp;
    threads = useful_threads(a);
    const int64_t head = 2 * panel_lanes + depth_lanes + tiling.tiles * 4 * tile_rows_lanes + splits * sum_lanes;
    heads_at_once = (8 << 20) / (head * 4);
    if (heads_at_once * splits < 2 * threads) heads_at_once = ceil_div(2 * threads, splits);
    if (heads_at_once > total) heads_at_once = total;
    negate = a.scale < 0;
    scale = negate ? -a.scale : a.scale;
  }

  int64_t layout(void* memory) {
    Arena arena(memory);
    const int64_t n = heads_at_once, tiles = n * tiling.tiles;
    keys_t = arena.take<float>(n * panel_lanes);
    values_t = arena.take<float>(n * panel_lanes);
    keys_d = arena.take<float>(n * depth_lanes);
    q_rows = arena.take<float>(tiles * tile_rows_lanes);
    dout_rows = arena.take<float>(tiles * tile_rows_lanes);
    q_depth = PAIR == 2 ? arena.take<float>(tiles * tile_depth_lanes) : q_rows;
    dout_depth = PAIR == 2 ? arena.take<float>(tiles * tile_depth_lanes) : dout_rows;
    lse = arena.take<float>(tiles * tiling.capacity);
    delta = arena.take<float>(tiles * tiling.capacity);
    mask_row = arena.take<uint8_t>(tiles * tiling.capacity);
    dq_sum = arena.take<float>(n * splits * sum_lanes);
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
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n * panels; ++i) pack_keys(h0 + i / panels, i / panels, i % panels);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * tiling.tiles; ++i) pack_queries(h0 + i / tiling.tiles, i / tiling.tiles, i % tiling.tiles);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n * splits; ++i)
          for (int64_t block = i % splits; block < blocks; block += splits)
            key_block(h0 + i / splits, i / splits, i % splits, block);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * tiling.tiles; ++i) write_dq(h0 + i / tiling.tiles, i / tiling.tiles, i % tiling.tiles);
      }
    }
  }

 private:
  void pack_keys(int64_t head, int64_t slot, int64_t p) const {
    const int64_t b = head / a.kv_heads, h = head % a.kv_heads;
    int count;
    const int64_t token = frames_of(a, b).panel_token(p, &count), at = p * (d / PAIR) * PANEL;
    const T* rows[PANEL];
    panel_rows(a.v, b, h, token, count, rows);
    pack_panel(rows, d, 0, values_t + slot * panel_lanes + at);
    panel_rows(a.k, b, h, token, count, rows);
    pack_panel(rows, d, 0, keys_t + slot * panel_lanes + at);
    pack_depth_panel(rows, d, not_finite(rows, d), keys_d + slot * depth_lanes + p * (PANEL / PAIR) * dp);
  }

  void pack_queries(int64_t head, int64_t slot, int64_t index) const {
    const int64_t b = head / a.kv_heads, h0 = head % a.kv_heads * group, at = slot * tiling.tiles + index;
    const Frames f = frames_of(a, b);
    Tile tile;
    tile.init(f, tiling, group, index);
    const int rows = (tile.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    const T *q[BLOCK_ROWS], *g[BLOCK_ROWS];
    float *row_lse = lse + at * tiling.capacity, *row_delta = delta + at * tiling.capacity;
    uint8_t* row_mask = mask_row + at * tiling.capacity;
    for (int r = 0; r < rows; ++r) {
      // Rows that see nothing, padding among them: exp(s - inf) = 0.
      q[r] = g[r] = nullptr, row_lse[r] = INFINITY, row_delta[r] = 0.f, row_mask[r] = 0;
      if (r >= tile.rows) continue;
      int64_t in_group, token;
      int mask;
      tile.row(f, r, &in_group, &token, &mask);
      const int64_t h = h0 + in_group;
      row_mask[r] = static_cast<uint8_t>(mask);
      const float x = *row_of<const float>(a.lse, b, h, token);
      if (x == -INFINITY) continue;
      q[r] = row_of<const T>(a.q, b, h, token), row_lse[r] = x;
      if (a.dlse.data) row_delta[r] = -*row_of<const float>(a.dlse, b, h, token);
      if (a.dout.data) {
        g[r] = row_of<const T>(a.dout, b, h, token);
        const T* o = row_of<const T>(a.out, b, h, token);
        F16 s = zero();
        for (int c = 0; c < d; c += LANES) s = fma(load_cols(g[r] + c, d - c), load_cols(o + c, d - c), s);
        row_delta[r] += sum(s);
      }
      // P^T dO and dS^T Q multiply every row into every key. A row that is not finite goes in as zeros with a NaN lse: its
      // probabilities, and so all gradients of the keys it sees, become NaN; keys it does not see stay untouched.
      if (!finite_row(q[r], d)) q[r] = nullptr, row_lse[r] = NAN;
      if (g[r] && !finite_row(g[r], d)) g[r] = nullptr, row_lse[r] = NAN;
    }
    for (int r = 0; r < rows; ++r) {
      pack_row(q[r], d, negate, q_rows + at * tile_rows_lanes + r * (dp / PAIR));
      pack_row(g[r], d, false, dout_rows + at * tile_rows_lanes + r * (dp / PAIR));
      if (PAIR == 2 && r % 2 == 0) {
        pack_depth(q + r, d, q_depth + at * tile_depth_lanes + r / 2 * dp);
        pack_depth(g + r, d, dout_depth + at * tile_depth_lanes + r / 2 * dp);
      }
    }
    for (int64_t s = 0; s < splits; ++s) {
      float* sum = dq_sum + (slot * splits + s) * sum_lanes + index * tiling.capacity * dp;
      for (int i = 0; i < rows * dp; i += LANES) store(sum + i, zero());
    }
  }

  void key_block(int64_t head, int64_t slot, int64_t split, int64_t block) const {
    const int64_t b = head / a.kv_heads, h = head % a.kv_heads;
    const int64_t p0 = block * block_panels, np = panels - p0 < block_panels ? panels - p0 : block_panels;
    const Frames f = frames_of(a, b);
    const ptrdiff_t shift = scratch_stride * thread_index();
    Scratch x = first;
    x.s += shift / 4, x.dp += shift / 4, x.ds_rows += shift / 4, x.dk += shift / 4, x.dv += shift / 4;
    x.seen += shift;
    KeyList list;
    list.place(x.list + shift, block_panels);

    for (int i = 0; i < np * PANEL * dp; i += LANES) store(x.dk + i, zero()), store(x.dv + i, zero());
    mark_seen(f, p0, np, x.seen);
    for (int64_t index = 0; index < tiling.tiles; ++index) {
      Tile tile;
      tile.init(f, tiling, group, index);
      if (tile.rows == 0 || !any_seen(tile, x.seen)) continue;
      list.build(f, tile, p0, np);
      if (list.n) pair(tile, list, slot, index, x, dq_sum + (slot * splits + split) * sum_lanes + index * tiling.capacity * dp);
    }

    const float dk_scale = PAIR == 2 ? a.scale : scale;  // the row form, which fp32 multiplies dS^T with, carries the sign
    for (int64_t p = p0; p < p0 + np; ++p) {
      int count;
      const int64_t token = f.panel_token(p, &count);
      for (int j = 0; j < count; ++j) {
        const int64_t at = ((p - p0) * PANEL + j) * dp;
        T *dk = row_of<T>(a.dk, b, h, token + j), *dv = row_of<T>(a.dv, b, h, token + j);
        for (int c = 0; c < d; c += LANES) {
          store_cols(dk + c, mul(load(x.dk + at + c), set1(dk_scale)), d - c);
          store_cols(dv + c, load(x.dv + at + c), d - c);
        }
      }
    }
  }

  // Which query frames see a key frame of this block: the rest need no look at their list.
  void mark_seen(const Frames& f, int64_t p0, int64_t np, uint8_t* seen) const {
    const int64_t tp = f.text_panels();
    memset(seen, p0 < tp && f.text_visible, static_cast<size_t>(f.n_frames));
    const int64_t v0 = p0 > tp ? p0 - tp : 0, v1 = p0 + np - tp;
    if (v1 <= 0) return;
    const int64_t last = (v1 * PANEL < f.video() ? v1 * PANEL : f.video()) - 1;
    for (int64_t k = v0 * PANEL / f.frame_len; k <= last / f.frame_len; ++k)
      for (int32_t i = f.k_ptr[k]; i < f.k_ptr[k + 1]; ++i)
        memset(seen + f.k_runs[2 * i], 1, static_cast<size_t>(f.k_runs[2 * i + 1]));
  }

  static bool any_seen(const Tile& tile, const uint8_t* seen) {
    if (tile.text) return true;
    for (int m = 0; m < tile.n_frames; ++m)
      if (seen[tile.frame0 + m]) return true;
    return false;
  }

  // One query tile against the panels of the block that it sees.
  void pair(const Tile& tile, const KeyList& list, int64_t slot, int64_t index, const Scratch& x, float* dq) const {
    const int64_t at = slot * tiling.tiles + index;
    const int rows = (tile.rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP, n = list.n;
    const float* row_lse = lse + at * tiling.capacity;
    const float* row_delta = delta + at * tiling.capacity;
    const uint8_t* row_mask = mask_row + at * tiling.capacity;

    gemm_panels<PAIR>(rows, q_rows + at * tile_rows_lanes, dp / PAIR, keys_t + slot * panel_lanes, d / PAIR, list.panel, n, x.s,
                      SCORE_STRIDE);
    gemm_panels<PAIR>(rows, dout_rows + at * tile_rows_lanes, dp / PAIR, values_t + slot * panel_lanes, d / PAIR, list.panel, n,
                      x.dp, SCORE_STRIDE);
    for (int r = 0; r < rows; r += PAIR) {
      const Mask* mask[2];
      for (int s = 0; s < PAIR; ++s) mask[s] = list.mask + row_mask[r + s] * list.span;
      if (list.full)
        gradient_rows<false>(r, n, mask, row_lse + r, row_delta + r, x);
      else
        gradient_rows<true>(r, n, mask, row_lse + r, row_delta + r, x);
    }

    // Neighbouring panels of the list are neighbours in the accumulators too: one product for each stretch.
    const Run whole{0, rows / PAIR};
    for (int i = 0, j; i < n; i = j) {
      for (j = i + 1; j < n && list.panel[j] == list.panel[j - 1] + 1;) ++j;
      const int64_t key = (list.panel[i] - list.first) * PANEL;
      gemm_depth<PAIR, true>((j - i) * PANEL, x.s + i * PANEL, PAIR_STRIDE, dout_depth + at * tile_depth_lanes, dp, &whole, 1,
                             x.dv + key * dp, dp);
      gemm_depth<PAIR, true>((j - i) * PANEL, x.dp + i * PANEL, PAIR_STRIDE, q_depth + at * tile_depth_lanes, dp, &whole, 1,
                             x.dk + key * dp, dp);
    }
    Run runs[BLOCK_PANELS];
    const int n_runs = make_runs<PAIR>(list.panel, n, dp, runs);
    gemm_depth<PAIR, false>(rows, x.ds_rows, DS_STRIDE, keys_d + slot * depth_lanes, dp, runs, n_runs, dq, dp);
    if (a.work) count_work(a.work, tile, list, rows, row_mask);
  }

  // S and dP of PAIR rows become P and dS.
  template <bool MASKED>
  VK_INLINE void gradient_rows(int r, int n, const Mask* const* mask, const float* row_lse, const float* row_delta,
                               const Scratch& x) const {
    const F16 by = set1(scale);
    for (int i = 0; i < n; ++i) {
      F16 p[2], ds[2];
      for (int s = 0; s < PAIR; ++s) {
        const ptrdiff_t at = (r + s) * SCORE_STRIDE + i * LANES;
        p[s] = exp<ExpDegree<T>::backward>(fms(load(x.s + at), by, set1(row_lse[s])));
        if (MASKED) p[s] = keep(mask[s][i], p[s]);
        ds[s] = mul(p[s], sub(load(x.dp + at), set1(row_delta[s])));
        if (MASKED) ds[s] = keep(mask[s][i], ds[s]);
      }
      const ptrdiff_t at = r * SCORE_STRIDE + i * LANES;
#if VK_TIER == 2
      if (PAIR == 2) {
        store_pairs(x.s + at, p[0], p[1]);
        store_pairs(x.dp + at, ds[0], ds[1]);
        for (int s = 0; s < 2; ++s) store(reinterpret_cast<bf16*>(x.ds_rows + (r + s) * DS_STRIDE) + i * LANES, ds[s]);
        continue;
      }
#endif
      store(x.s + at, p[0]);
      store(x.dp + at, ds[0]);
    }
  }

  void write_dq(int64_t head, int64_t slot, int64_t index) const {
    const int64_t b = head / a.kv_heads, h0 = head % a.kv_heads * group;
    const Frames f = frames_of(a, b);
    Tile tile;
    tile.init(f, tiling, group, index);
    const float* sums = dq_sum + slot * splits * sum_lanes + index * tiling.capacity * dp;
    for (int r = 0; r < tile.rows; ++r) {
      int64_t in_group, token;
      int mask;
      tile.row(f, r, &in_group, &token, &mask);
      T* dq = row_of<T>(a.dq, b, h0 + in_group, token);
      for (int c = 0; c < d; c += LANES) {
        F16 s = load(sums + r * dp + c);
        for (int64_t i = 1; i < splits; ++i) s = add(s, load(sums + i * sum_lanes + r * dp + c));
        store_cols(dq + c, mul(s, set1(a.scale)), d - c);
      }
    }
  }
};

}  // namespace VK_ISA
}  // namespace vk
