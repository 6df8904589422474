// The hard flow of averaged probabilities: the largest of sum_h exp(l_h - lse_h), a block of scores of one head after another.
#pragma once

#include "cpu/amf_tile.h"

namespace vk {
namespace VK_ISA {

template <class T>
class AmfVote {
  const AmfArgs& a;
  AmfTiles<T> tiles;
  const AmfFrame<T>& f;

 public:
  explicit AmfVote(const AmfArgs& args) : a(args), tiles(args, args.groups), f(tiles.f) {}

  int64_t layout(void* memory) {
    Arena arena(memory);
    return tiles.layout(arena, 4 * tiles.capacity * (a.groups * f.row_lanes + 2 * AMF_STRIDE));
  }

  void run() {
    tiles.run([this](const AmfItem& x, void* scratch) { tile(x, static_cast<float*>(scratch)); });
  }

 private:
  void tile(const AmfItem& x, float* scratch) const {
    const int64_t q_lanes = tiles.capacity * f.row_lanes;
    float *q = scratch, *scores = q + a.groups * q_lanes, *mass = scores + tiles.capacity * AMF_STRIDE;
    for (int64_t g = 0; g < a.groups; ++g) tiles.pack_queries(x, g, q + g * q_lanes);
    float best[AMF_ROWS];
    int32_t index[AMF_ROWS];
    for (int r = 0; r < x.count; ++r) best[r] = -1.f, index[r] = 0;
    const int64_t each = tiles.block_panels();
    for (int64_t p0 = 0; p0 < f.panels; p0 += each) {
      const int n = static_cast<int>(f.panels - p0 < each ? f.panels - p0 : each);
      for (int64_t g = 0; g < a.groups; ++g) {
        tiles.product(x, q + g * q_lanes, x.keys + g * f.key_lanes(), p0, n, scores);
        const float* lse = a.lse + f.result(x.b, g, x.p, x.s0);
        for (int r = 0; r < x.count; ++r) add_probabilities(scores + r * AMF_STRIDE, n, lse[r], g == 0, mass + r * AMF_STRIDE);
      }
      const bool last = p0 + n == f.panels && f.tail != FULL;
      for (int r = 0; r < x.count; ++r) {
        float* s = mass + r * AMF_STRIDE;
        const float highest = largest(s, n, last, f.tail, -1.f);
        if (highest <= best[r]) continue;
        best[r] = highest, index[r] = static_cast<int32_t>(p0 * LANES) + place(s, n, highest);
      }
    }
    const int64_t at = (x.b * a.pairs + x.p) * f.size + x.s0;
    for (int r = 0; r < x.count; ++r) {
      if (a.index) a.index[at + r] = index[r];
      if (a.top) a.top[at + r] = best[r] / static_cast<float>(a.groups);
    }
  }

  VK_INLINE void add_probabilities(const float* s, int n, float lse, bool first, float* mass) const {
    for (int i = 0; i < n * LANES; i += LANES) {
      // A log-sum-exp of 1e8 is rounded by several units: no probability is above 1 for that.
      const F16 prob = exp<6>(min(zero(), fms(load(s + i), set1(f.scale), set1(lse))));
      store(mass + i, first ? prob : add(load(mass + i), prob));
    }
  }
};

}  // namespace VK_ISA
}  // namespace vk
