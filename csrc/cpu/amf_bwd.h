// Backward of attention motion flow: three products per pair of frames, no atomics, no value tensor.
//
//   S = Q K^T      P = softmax(scale S)      dl = P (<dmean, c - mean> + dlse)
//   dQ += scale dl K      dK += scale dl^T Q
//
// One key frame after the other. Rows whose gradient is zero are left out: the others of all query frames that see the frame are
// listed and cut into tiles. First each thread takes tiles: scores, dl (kept for all tiles of a band) and the tile's share of dQ.
// Then each takes blocks of keys and sums dl^T Q over the tiles in order. What is summed in which order depends on the shapes and
// on which rows count: the result is the same bits from run to run and for any number of threads.
//
// The softmax is computed again with its mean: the saved lse and mean are rounded, and rows of P would not sum to one.
#pragma once

#include "cpu/amf_tile.h"

namespace vk {
namespace VK_ISA {

constexpr int AMF_KEYS = 4;  // panels of a block of keys

template <class T>
class AmfBackward {
  static constexpr int PAIR = Steps<T>::PAIR;

  const AmfArgs& a;
  AmfFrame<T> f;
  int64_t at_once, capacity, band_tiles, stride, key_blocks;
  int64_t slab_lanes, query_lanes, depth_lanes;  // of a tile's dl and queries, of the depth form of a frame's keys
  int threads;

  // Per logit map of those worked on together.
  float *keys_t, *keys_d;  // a frame's keys: panels, and the depth form
  float *slab, *queries;   // a band: dl (bf16: pairs of rows) and queries in the depth form
  float *dq_sum, *dk_sum;  // [N][cols], and [S][cols] of the key frame
  int32_t *list, *listed;  // rows that count as (token, row of the result), and how many
  float* table;

  struct Scratch {
    float *q, *scores, *dl, *dq;
  };
  Scratch first;
  int64_t scratch_stride;

  static int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

 public:
  explicit AmfBackward(const AmfArgs& args) : a(args), f(args) {
    const int64_t groups = a.batch * a.groups;
    threads = f.threads(3.0 * static_cast<double>(groups));
    stride = f.panels * LANES + LANES;
    // A tile of scores takes a quarter of L2.
    capacity = clamp((256 << 10) / (stride * 4) / MR * MR, MR > 16 ? MR : 16, AMF_ROWS);
    depth_lanes = f.panels * LANES / PAIR * f.cols;
    slab_lanes = capacity * stride / PAIR;
    query_lanes = capacity / PAIR * f.cols;
    key_blocks = ceil_div(f.panels, AMF_KEYS);
    // Two steps share a band; it is never more than one frame of keys against all tokens.
    band_tiles = clamp((8 << 20) / ((slab_lanes + query_lanes) * 4), threads, ceil_div(f.tokens, capacity));
    at_once = clamp((4 << 20) / (band_tiles * slab_lanes * 4), 1, groups);
    if (at_once * key_blocks < 2 * threads) at_once = clamp(ceil_div(2 * threads, key_blocks), 1, groups);
  }

  int64_t layout(void* memory) {
    Arena arena(memory);
    const int64_t n = at_once;
    keys_t = arena.take<float>(n * f.key_lanes());
    keys_d = arena.take<float>(n * depth_lanes);
    slab = arena.take<float>(n * band_tiles * slab_lanes);
    queries = arena.take<float>(n * band_tiles * query_lanes);
    dq_sum = arena.take<float>(n * f.tokens * f.cols);
    dk_sum = arena.take<float>(n * f.panels * LANES * f.cols);
    list = arena.take<int32_t>(n * 2 * f.tokens);
    listed = arena.take<int32_t>(n);
    table = arena.take<float>(f.panels * 2 * LANES);
    const int64_t before = arena.used;
    first.q = arena.take<float>(PAIR == 2 ? capacity * f.row_lanes : 0);
    first.scores = arena.take<float>(PAIR == 2 ? capacity * stride : 0);
    first.dl = arena.take<float>(PAIR == 2 ? capacity * stride / 2 : 0);
    first.dq = arena.take<float>(capacity * f.cols);
    scratch_stride = arena.used - before;
    return before + scratch_stride * threads;
  }

  void run() {
    const int64_t groups = a.batch * a.groups, tiles = ceil_div(f.tokens, capacity);
    f.coordinates(table);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
        const int64_t n = groups - g0 < at_once ? groups - g0 : at_once;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n * f.tokens; ++i)
          for (int c = 0; c < f.cols; c += LANES) store(dq_sum + i * f.cols + c, zero());
        for (int64_t j = 0; j < a.frames; ++j) {
#pragma omp for schedule(static) nowait
          for (int64_t i = 0; i < n; ++i) find_rows(g0 + i, i, j);
#pragma omp for schedule(static)
          for (int64_t i = 0; i < n * f.panels; ++i) pack(g0 + i / f.panels, i / f.panels, j, i % f.panels);
          for (int64_t t0 = 0; t0 < tiles; t0 += band_tiles) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n * band_tiles; ++i) query_tile(g0 + i / band_tiles, i / band_tiles, j, t0, i % band_tiles);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n * key_blocks; ++i) key_block(g0 + i / key_blocks, i / key_blocks, j, t0, i % key_blocks);
          }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * f.tokens; ++i) write(a.dq, g0 + i / f.tokens, i % f.tokens, dq_sum + i * f.cols, a.scale);
      }
    }
  }

 private:
  void find_rows(int64_t bg, int64_t slot, int64_t j) const {
    int32_t *to = list + slot * 2 * f.tokens, n = 0;
    for (int64_t e = a.first[j]; e < a.first[j + 1]; ++e) {
      const int64_t at = (bg * a.pairs + a.seen[2 * e + 1]) * f.size;
      for (int64_t s = 0; s < f.size; ++s) {
        const bool moves = a.dmean && (a.dmean[2 * (at + s)] != 0 || a.dmean[2 * (at + s) + 1] != 0);
        if (!moves && !(a.dlse && a.dlse[at + s] != 0)) continue;
        to[2 * n] = static_cast<int32_t>(a.seen[2 * e] * f.size + s), to[2 * n + 1] = a.seen[2 * e + 1];
        ++n;
      }
    }
    listed[slot] = n;
  }

  // One panel of the key frame in both forms. A key that is not finite makes every P of the rows that see it NaN; in the product with
  // dl it goes as zeros, so that rows that do not count stay clean.
  void pack(int64_t bg, int64_t slot, int64_t j, int64_t p) const {
    const int64_t b = bg / a.groups, g = bg % a.groups;
    f.pack_keys(b, g, j, p, keys_t + slot * f.key_lanes() + p * f.panel_lanes());
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* rows[LANES];
      for (int i = 0; i < LANES; ++i) {
        const int64_t s = p * LANES + i;
        rows[i] = s < f.size ? f.at(a.k, b, g, h, j * f.size + s) : nullptr;
      }
      const Mask bad = not_finite(rows, f.d);
      for (int i = 0; i < LANES; i += PAIR) {
        const T* pair[2];
        for (int s = 0; s < PAIR; ++s) pair[s] = (bad >> (i + s)) & 1 ? nullptr : rows[i + s];
        pack_depth(pair, f.d, keys_d + slot * depth_lanes + (p * LANES + i) / PAIR * f.cols + h * f.dp);
      }
    }
    for (int64_t i = p * LANES; i < (p + 1) * LANES; ++i)
      for (int c = 0; c < f.cols; c += LANES) store(dk_sum + (slot * f.panels * LANES + i) * f.cols + c, zero());
  }

  int tile_rows(int64_t slot, int64_t t) const {
    const int64_t left = listed[slot] - t * capacity;
    return static_cast<int>(left < 0 ? 0 : left < capacity ? left : capacity);
  }

  void query_tile(int64_t bg, int64_t slot, int64_t j, int64_t t0, int64_t t) const {
    const int count = tile_rows(slot, t0 + t), rows = (count + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    if (count == 0) return;
    const int64_t b = bg / a.groups, g = bg % a.groups;
    const ptrdiff_t shift = scratch_stride / 4 * thread_index();
    float* const dl = slab + (slot * band_tiles + t) * slab_lanes;
    float* const q_depth = queries + (slot * band_tiles + t) * query_lanes;
    float* const q = PAIR == 2 ? first.q + shift : q_depth;  // in fp32 the row form is the depth form
    float* const scores = PAIR == 2 ? first.scores + shift : dl;
    float* const dl_rows = PAIR == 2 ? first.dl + shift : dl;
    const int32_t* rows_at = list + slot * 2 * f.tokens + 2 * (t0 + t) * capacity;
    bool bad[AMF_ROWS];
    for (int r = 0; r < rows; ++r) {
      const int64_t token = r < count ? rows_at[2 * r] : 0;
      bad[r] = false;
      for (int64_t h = 0; h < a.heads && r < count; ++h) bad[r] = bad[r] || !finite_row(f.at(a.q, b, g, h, token), f.d);
      f.pack_query(b, g, token, r >= count || bad[r], q + r * f.row_lanes);
    }
    if (PAIR == 2) pair_queries(q, rows, q_depth);
    for (int64_t p0 = 0; p0 < f.panels; p0 += AMF_PANELS) {
      const int n = static_cast<int>(f.panels - p0 < AMF_PANELS ? f.panels - p0 : AMF_PANELS);
      int32_t panels[AMF_PANELS];
      for (int i = 0; i < n; ++i) panels[i] = static_cast<int32_t>(p0 + i);
      gemm_panels<PAIR>(rows, q, f.row_lanes, keys_t + slot * f.key_lanes(), f.row_lanes, panels, n, scores + p0 * LANES, stride);
    }
    for (int r = 0; r < rows; r += PAIR) {
      float slope[2][4];
      for (int s = 0; s < PAIR; ++s) {
        if (r + s < count)
          probabilities(scores + (r + s) * stride, (bg * a.pairs + rows_at[2 * (r + s) + 1]) * f.size + rows_at[2 * (r + s)] % f.size,
                        bad[r + s], slope[s]);
        else
          slope[s][0] = slope[s][1] = slope[s][2] = slope[s][3] = 0.f;
      }
      gradient(scores + r * stride, r, slope, dl, dl_rows);
    }

    const Run whole{0, static_cast<int>(f.panels * LANES / PAIR)};
    const float* depth = keys_d + slot * depth_lanes;
    float* const sums = dq_sum + slot * f.tokens * f.cols;
    if (rows == count && rows_at[2 * (count - 1)] - rows_at[0] == count - 1) {
      gemm_depth<PAIR, false>(rows, dl_rows, stride / PAIR, depth, f.cols, &whole, 1, sums + rows_at[0] * static_cast<int64_t>(f.cols),
                              f.cols);
      return;
    }
    float* const part = first.dq + shift;
    for (int i = 0; i < rows * f.cols; i += LANES) store(part + i, zero());
    gemm_depth<PAIR, false>(rows, dl_rows, stride / PAIR, depth, f.cols, &whole, 1, part, f.cols);
    for (int r = 0; r < count; ++r) {
      float* to = sums + rows_at[2 * r] * static_cast<int64_t>(f.cols);
      for (int c = 0; c < f.cols; c += LANES) store(to + c, add(load(to + c), load(part + r * f.cols + c)));
    }
  }

  // Pairs of packed rows in the depth form.
  void pair_queries(const float* q, int rows, float* dst) const {
    for (int r = 0; r < rows; r += 2) {
      const T* pair[2] = {reinterpret_cast<const T*>(q + r * f.row_lanes), reinterpret_cast<const T*>(q + (r + 1) * f.row_lanes)};
      pack_depth(pair, f.cols, dst + r / 2 * f.cols);
    }
  }

  // A row of scores becomes unnormalised probabilities; `slope` what makes of them dl: factors of x and y, the middle of the row in
  // coordinates (negated), and the rest. A row that is not finite gets NaN.
  void probabilities(float* s, int64_t at, bool bad, float* slope) const {
    float* end = s + (f.panels - 1) * LANES;
    if (f.tail != FULL) store(end, select(f.tail, load(end), set1(-INFINITY)));
    F16 mass = zero(), x = zero(), y = zero();
    const F16 by = set1(f.scale), base = set1(a.lse[at]);
    for (int64_t i = 0; i < f.panels; ++i) {
      // Never above 1 but by the rounding of the log-sum-exp, which is large where logits are.
      const F16 e = exp<ExpDegree<T>::forward>(min(zero(), fms(load(s + i * LANES), by, base)));
      mass = add(mass, e);
      x = fma(e, load(table + i * 2 * LANES), x);
      y = fma(e, load(table + i * 2 * LANES + LANES), y);
      store(s + i * LANES, e);
    }
    const float total = bad ? NAN : sum(mass), mx = sum(x) / total, my = sum(y) / total;
    slope[0] = a.dmean ? a.dmean[2 * at] / total : 0.f, slope[1] = a.dmean ? a.dmean[2 * at + 1] / total : 0.f;
    slope[2] = -(slope[0] * mx + slope[1] * my);
    slope[3] = a.dlse ? a.dlse[at] / total : 0.f;
  }

  // PAIR rows of probabilities become dl, in the forms that the two products read.
  void gradient(float* s, int r, const float (*slope)[4], float* dl, float* dl_rows) const {
    for (int64_t i = 0; i < f.panels; ++i) {
      F16 value[2];
      const F16 x = load(table + i * 2 * LANES), y = load(table + i * 2 * LANES + LANES);
      for (int k = 0; k < PAIR; ++k) {
        const F16 rest = set1(slope[k][2] + slope[k][3]);
        value[k] = mul(load(s + k * stride + i * LANES), fma(x, set1(slope[k][0]), fma(y, set1(slope[k][1]), rest)));
      }
#if VK_TIER == 2
      if (PAIR == 2) {
        store_pairs(dl + r / 2 * stride + i * LANES, value[0], value[1]);
        for (int k = 0; k < 2; ++k) store(reinterpret_cast<bf16*>(dl_rows + (r + k) * (stride / 2)) + i * LANES, value[k]);
        continue;
      }
#endif
      store(s + i * LANES, value[0]);
    }
  }

  void key_block(int64_t bg, int64_t slot, int64_t j, int64_t t0, int64_t block) const {
    const int64_t p0 = block * AMF_KEYS, n = f.panels - p0 < AMF_KEYS ? f.panels - p0 : AMF_KEYS;
    float* const sums = dk_sum + (slot * f.panels + p0) * LANES * f.cols;
    for (int64_t t = 0; t < band_tiles; ++t) {
      const int count = tile_rows(slot, t0 + t);
      if (count == 0) break;
      const Run run{0, (count + ROW_STEP - 1) / ROW_STEP * ROW_STEP / PAIR};
      gemm_depth<PAIR, true>(static_cast<int>(n) * LANES, slab + (slot * band_tiles + t) * slab_lanes + p0 * LANES, stride,
                             queries + (slot * band_tiles + t) * query_lanes, f.cols, &run, 1, sums, f.cols);
    }
    if (t0 + band_tiles < ceil_div(f.tokens, capacity)) return;
    // The packed queries carry the sign of a negative scale.
    for (int64_t s = p0 * LANES; s < f.size && s < (p0 + n) * LANES; ++s)
      write(a.dk, bg, j * f.size + s, dk_sum + (slot * f.panels * LANES + s) * f.cols, f.scale);
  }

  void write(const AmfView& to, int64_t bg, int64_t token, const float* sums, float by) const {
    for (int64_t h = 0; h < a.heads; ++h) {
      T* row = f.at(to, bg / a.groups, bg % a.groups, h, token);
      for (int c = 0; c < f.d; c += LANES) store_cols(row + c, mul(load(sums + h * f.dp + c), set1(by)), f.d - c);
    }
  }
};

}  // namespace VK_ISA
}  // namespace vk
