// Forward of attention motion flow: one product of queries and keys with an online softmax that keeps, instead of values, the sums of
// the coordinates, and with the place of the largest logit.
#pragma once

#include "cpu/amf_tile.h"

namespace vk {
namespace VK_ISA {

template <class T>
class AmfForward {
  const AmfArgs& a;
  AmfTiles<T> tiles;
  const AmfFrame<T>& f;
  float* table;

  // Running state of one row; the sums are by lane, and there are four of them (mass, x, y, mass times logit).
  struct Row {
    float* sums;
    float top, raw;  // largest logit so far that the sums are relative to, and that was found; both before scaling
    int32_t index;
  };

 public:
  explicit AmfForward(const AmfArgs& args) : a(args), tiles(args, 1), f(tiles.f) {}

  int64_t layout(void* memory) {
    Arena arena(memory);
    table = arena.take<float>(f.panels * 2 * LANES);
    return tiles.layout(arena, 4 * (tiles.capacity * (f.row_lanes + AMF_STRIDE + 4 * LANES)));
  }

  void run() {
    f.coordinates(table);
    tiles.run([this](const AmfItem& x, void* scratch) { tile(x, static_cast<float*>(scratch)); });
  }

 private:
  void tile(const AmfItem& x, float* scratch) const {
    float *q = scratch, *scores = q + tiles.capacity * f.row_lanes, *sums = scores + tiles.capacity * AMF_STRIDE;
    tiles.pack_queries(x, 0, q);
    for (int i = 0; i < x.count * 4 * LANES; i += LANES) store(sums + i, zero());
    Row row[AMF_ROWS];
    for (int r = 0; r < x.count; ++r) row[r] = Row{sums + r * 4 * LANES, -INFINITY, -INFINITY, 0};

    const bool soft = a.mean || a.lse || a.top || a.entropy;
    const int64_t each = tiles.block_panels();
    for (int64_t p0 = 0; p0 < f.panels; p0 += each) {
      const int n = static_cast<int>(f.panels - p0 < each ? f.panels - p0 : each);
      tiles.product(x, q, x.keys, p0, n, scores);
      const bool last = p0 + n == f.panels && f.tail != FULL;
      const float* xy = table + p0 * 2 * LANES;
      for (int r = 0; r < x.count; ++r) {
        float* s = scores + r * AMF_STRIDE;
        const float highest = largest(s, n, last, f.tail, -INFINITY);
        if (highest > row[r].raw) {
          row[r].raw = highest;
          if (a.index) row[r].index = static_cast<int32_t>(p0 * LANES) + place(s, n, highest);
        }
        if (!soft) continue;
        if (a.entropy)
          softmax<true>(s, n, xy, highest, &row[r]);
        else
          softmax<false>(s, n, xy, highest, &row[r]);
      }
    }
    for (int r = 0; r < x.count; ++r) write(f.result(x.b, x.g, x.p, x.s0 + r), row[r], soft);
  }

  template <bool ENTROPY>
  VK_INLINE void softmax(const float* s, int n, const float* xy, float reached, Row* row) const {
    F16 mass = load(row->sums), x = load(row->sums + LANES), y = load(row->sums + 2 * LANES);
    F16 heat = ENTROPY ? load(row->sums + 3 * LANES) : zero();
    if (!(reached <= row->top)) {
      if (row->top != -INFINITY) {
        const F16 fall = set1((row->top - reached) * f.scale), shrink = exp<6>(fall);
        mass = mul(mass, shrink), x = mul(x, shrink), y = mul(y, shrink);
        if (ENTROPY) heat = fma(mass, fall, mul(heat, shrink));
      }
      row->top = reached;
    }
    const F16 by = set1(f.scale), base = set1(row->top);
    for (int i = 0; i < n; ++i) {
      // The difference first: the largest logit is then exactly 0 below itself, however large it is.
      const F16 l = mul(sub(load(s + i * LANES), base), by);
      const F16 e = exp<ExpDegree<T>::forward>(l);
      mass = add(mass, e);
      x = fma(e, load(xy + i * 2 * LANES), x);
      y = fma(e, load(xy + i * 2 * LANES + LANES), y);
      // 0 log 0 = 0: a logit this low has no mass.
      if (ENTROPY) heat = fma(e, max(set1(-1e4f), l), heat);
    }
    store(row->sums, mass), store(row->sums + LANES, x), store(row->sums + 2 * LANES, y);
    if (ENTROPY) store(row->sums + 3 * LANES, heat);
  }

  void write(int64_t at, const Row& row, bool soft) const {
    if (a.index) a.index[at] = row.index;
    if (!soft) return;
    const float mass = sum(load(row.sums));
    if (a.mean) {
      a.mean[2 * at] = f.middle_x() + sum(load(row.sums + LANES)) / mass;
      a.mean[2 * at + 1] = f.middle_y() + sum(load(row.sums + 2 * LANES)) / mass;
    }
    if (a.top) a.top[at] = 1.f / mass;
    if (!a.lse && !a.entropy) return;
    const double log_mass = log(static_cast<double>(mass));
    if (a.lse) a.lse[at] = static_cast<float>(static_cast<double>(row.top) * f.scale + log_mass);
    if (a.entropy) a.entropy[at] = static_cast<float>(log_mass - sum(load(row.sums + 3 * LANES)) / mass);
  }
};

}  // namespace VK_ISA
}  // namespace vk
