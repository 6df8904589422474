// What the kernels of attention motion flow share: sizes, addressing and packing of frames, and the table of coordinates.
//
// The heads of a group lie side by side, each padded to 16 channels, so that the mean of their logits is one product. Keys are packed
// frame by frame: a frame starts a panel of its own, and the lanes beyond its end are masked.
#pragma once

#include "cpu/amf.h"
#include "cpu/grid_attention_tile.h"

namespace vk {
namespace VK_ISA {

VK_INLINE Mask equal(F16 a, F16 b) {
#if VK_TIER == 2
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
#elif VK_TIER == 1
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ));
  return static_cast<Mask>(lo | _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)) << 8);
#else
  Mask m = 0;
  for (int i = 0; i < LANES; ++i) m = static_cast<Mask>(m | (a.v[i] == b.v[i]) << i);
  return m;
#endif
}

VK_INLINE int lowest_bit(Mask m) {
  int i = 0;
  while (!((m >> i) & 1)) ++i;
  return i;
}

template <class T>
struct AmfFrame {
  static constexpr int PAIR = Steps<T>::PAIR;

  const AmfArgs& a;
  int64_t size, tokens, panels;
  int d, dp, row_lanes, cols;  // channels of a head, the same padded, lanes of a packed row, columns of the depth form
  Mask tail;                   // lanes of the last panel of a frame that hold a key
  float scale;
  bool negate, empty;          // a negative scale moves into the queries, and a scale of zero makes them zeros

  explicit AmfFrame(const AmfArgs& args) : a(args) {
    size = a.height * a.width, tokens = a.frames * size, panels = (size + LANES - 1) / LANES;
    d = static_cast<int>(a.dim), dp = padded(d);
    row_lanes = static_cast<int>(a.heads) * dp / PAIR, cols = static_cast<int>(a.heads) * dp;
    const int rest = static_cast<int>(size % LANES);
    tail = rest ? static_cast<Mask>((1u << rest) - 1) : FULL;
    negate = a.scale < 0, empty = a.scale == 0;
    // Of zeros any factor makes zeros, but 0 would make NaN of the lanes beyond a frame, which hold -inf.
    scale = empty ? 1.f : negate ? -a.scale : a.scale;
  }

  static T* at(const AmfView& x, int64_t b, int64_t g, int64_t h, int64_t token) {
    return static_cast<T*>(x.data) + b * x.b + g * x.g + h * x.h + token * x.l;
  }

  int64_t seen(int64_t frame) const { return a.first[frame + 1] - a.first[frame]; }
  int64_t result(int64_t b, int64_t g, int64_t p, int64_t s) const { return ((b * a.groups + g) * a.pairs + p) * size + s; }

  int64_t panel_lanes() const { return static_cast<int64_t>(row_lanes) * LANES; }
  int64_t key_lanes() const { return panels * panel_lanes(); }

  // One panel of the keys of a frame in the transposed form.
  void pack_keys(int64_t b, int64_t g, int64_t frame, int64_t p, float* dst) const {
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* rows[LANES];
      for (int j = 0; j < LANES; ++j) {
        const int64_t s = p * LANES + j;
        rows[j] = s < size ? at(a.k, b, g, h, frame * size + s) : nullptr;
      }
      float* to = dst + h * (dp / PAIR) * LANES;
      if (dp != d) memset(to, 0, sizeof(float) * static_cast<size_t>(dp / PAIR * LANES));
      pack_panel(rows, d, 0, to);
    }
  }

  // One query in the row form; a null `token` is a row of zeros.
  void pack_query(int64_t b, int64_t g, int64_t token, bool zero, float* dst) const {
    for (int64_t h = 0; h < a.heads; ++h)
      pack_row(zero || empty ? nullptr : at(a.q, b, g, h, token), d, negate, dst + h * (dp / PAIR));
  }

  // Coordinates of the keys, 16 x then 16 y for each panel, from the middle of the frame: halves are exact, and sums stay small.
  void coordinates(float* table) const {
    for (int64_t i = 0; i < panels * LANES; ++i) {
      const int64_t s = i < size ? i : 0;
      float* to = table + i / LANES * 2 * LANES + i % LANES;
      to[0] = static_cast<float>(s % a.width) - middle_x();
      to[LANES] = static_cast<float>(s / a.width) - middle_y();
    }
  }
  float middle_x() const { return static_cast<float>(a.width - 1) * 0.5f; }
  float middle_y() const { return static_cast<float>(a.height - 1) * 0.5f; }

  // Waking a second thread costs more than a problem of this size.
  int threads(double groups) const {
    const double work = groups * static_cast<double>(a.pairs) * static_cast<double>(size) * size * cols;
    return work < 1e6 || a.threads < 1 ? 1 : a.threads;
  }
};

constexpr int AMF_ROWS = 128;
constexpr int AMF_PANELS = 32;  // of a block of scores: 128 x 512 fp32 are a quarter of L2, and hold most frames whole
constexpr int AMF_STRIDE = AMF_PANELS * LANES + LANES;

// What one tile of query rows works on: `count` rows from token `token` of sample b, group g (the first of a vote's), whose results
// start at `s0` of row p; and its keys.
struct AmfItem {
  int64_t b, g, token, p, s0;
  int count, rows;  // rows padded for the micro-kernel
  const float* keys;
};

// The order of the forward kernels: the keys of a frame, of `maps` groups together, are packed, as many frames at once as the outer
// cache holds; then tiles of the query frames that see them are dealt to the threads.
template <class T>
struct AmfTiles {
  AmfFrame<T> f;
  int64_t maps, units, at_once, tiles, capacity, most_seen;
  int threads;
  float* keys;
  char* scratch;
  int64_t scratch_stride;

  AmfTiles(const AmfArgs& a, int64_t together) : f(a), maps(together) {
    units = a.batch * (a.groups / maps) * a.frames;
    tiles = (f.size + AMF_ROWS - 1) / AMF_ROWS;
    capacity = ((f.size + tiles - 1) / tiles + MR - 1) / MR * MR;
    most_seen = 0;
    for (int64_t j = 0; j < a.frames; ++j) most_seen = f.seen(j) > most_seen ? f.seen(j) : most_seen;
    threads = f.threads(static_cast<double>(a.batch * a.groups));
    const int64_t work = most_seen * tiles;
    at_once = (8 << 20) / (maps * f.key_lanes() * 4);
    if (at_once * work < 4 * threads) at_once = (4 * threads + work - 1) / work;
    if (at_once < 1) at_once = 1;
    if (at_once > units) at_once = units;
  }

  // Workspace of the keys and of `bytes` for each thread; returns its size.
  int64_t layout(Arena& arena, int64_t bytes) {
    keys = arena.take<float>(at_once * maps * f.key_lanes());
    scratch_stride = bytes;
    scratch = arena.take<char>(bytes * threads);
    return arena.used;
  }

  template <class Tile>
  void run(const Tile& tile) const {
    const AmfArgs& a = f.a;
    const int64_t per = a.groups / maps, all = maps * f.panels;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      for (int64_t u0 = 0; u0 < units; u0 += at_once) {
        const int64_t n = units - u0 < at_once ? units - u0 : at_once;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n * all; ++i) {
          const int64_t u = u0 + i / all, m = i / f.panels % maps, p = i % f.panels, bg = u / a.frames;
          if (f.seen(u % a.frames))
            f.pack_keys(bg / per, bg % per * maps + m, u % a.frames, p, keys_of(u - u0, m) + p * f.panel_lanes());
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n * most_seen * tiles; ++i) {
          const int64_t slot = i / (most_seen * tiles), e = i / tiles % most_seen, u = u0 + slot, j = u % a.frames;
          AmfItem item;
          item.s0 = i % tiles * capacity;
          if (e >= f.seen(j) || item.s0 >= f.size) continue;
          const int32_t* pair = a.seen + 2 * (a.first[j] + e);
          item.b = u / a.frames / per, item.g = u / a.frames % per * maps;
          item.token = pair[0] * f.size + item.s0, item.p = pair[1];
          item.count = static_cast<int>(f.size - item.s0 < capacity ? f.size - item.s0 : capacity);
          item.rows = (item.count + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
          item.keys = keys_of(slot, 0);
          tile(item, scratch + scratch_stride * thread_index());
        }
      }
    }
  }

  float* keys_of(int64_t slot, int64_t m) const { return keys + (slot * maps + m) * f.key_lanes(); }

  void pack_queries(const AmfItem& x, int64_t m, float* q) const {
    for (int r = 0; r < x.rows; ++r) f.pack_query(x.b, x.g + m, x.token + r, r >= x.count, q + r * f.row_lanes);
  }

  // Panels of a block of scores: blocks of one frame are of equal size.
  int64_t block_panels() const {
    const int64_t blocks = (f.panels + AMF_PANELS - 1) / AMF_PANELS;
    return (f.panels + blocks - 1) / blocks;
  }

  // Scores of the queries q against n panels of keys from p0 on.
  VK_INLINE void product(const AmfItem& x, const float* q, const float* frame_keys, int64_t p0, int n, float* scores) const {
    int32_t list[AMF_PANELS];
    for (int i = 0; i < n; ++i) list[i] = static_cast<int32_t>(p0 + i);
    gemm_panels<AmfFrame<T>::PAIR>(x.rows, q, f.row_lanes, frame_keys, f.row_lanes, list, n, scores, AMF_STRIDE);
  }
};

// The largest of n panels of values, of which `tail` says what counts of the last (`last`); what does not becomes `fill`.
VK_INLINE float largest(float* s, int n, bool last, Mask tail, float fill) {
  float* end = s + (n - 1) * LANES;
  if (last) store(end, select(tail, load(end), set1(fill)));
  F16 top = load(s);
  for (int i = 1; i < n; ++i) top = max(top, load(s + i * LANES));
  return max_lane(top);
}

// The first of n panels' values that equals `wanted`; 0 where none does (NaN).
VK_INLINE int32_t place(const float* s, int n, float wanted) {
  for (int i = 0; i < n; ++i)
    if (const Mask m = equal(load(s + i * LANES), set1(wanted))) return i * LANES + lowest_bit(m);
  return 0;
}

}  // namespace VK_ISA
}  // namespace vk
