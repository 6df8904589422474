// Elementwise parts of the pruned layers: the gradient of the pre-activation with its sums over tokens, and RMSNorm both ways.
#include <math.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/pruned_tile.h"

namespace vk {
namespace VK_ISA {
namespace {

constexpr int64_t COLUMNS = 128;  // per task of what sums over tokens: two lines of bf16, so that a row costs no more than it must

// Threads to use for `elements` of work.
VK_INLINE int useful(int threads, int64_t elements) { return elements < 50000 ? 1 : threads; }

template <class U>
VK_INLINE F16 pick(const U* row, const int32_t* cols, int64_t first, int64_t left) {
  if (!cols) return load_any(row + first, left);
  float lanes[LANES] = {};
  for (int64_t j = 0; j < (left < LANES ? left : LANES); ++j) lanes[j] = to_float(row[cols[first + j]]);
  return load(lanes);
}

// Sums over thousands of tokens: each carries what its last addition rounded away.
struct Sums {
  float total[COLUMNS], lost[COLUMNS];
  void clear() { memset(this, 0, sizeof *this); }
  VK_INLINE void add_at(int64_t j, F16 v) {
    const F16 s = load(total + j), y = sub(v, load(lost + j)), t = add(s, y);
    store(lost + j, sub(sub(t, s), y));
    store(total + j, t);
  }
};

// du = dz act'(u), dz = gate dout; dbias sums du, dgate sums dout act(u): for sixteen output channels of all rows.
template <class T, class D>
VK_INLINE void slope_columns(const PrunedSlope& s, int64_t first, int64_t last) {
  const bool pairs = s.act == PRUNED_SWIGLU;
  const int64_t written = pairs ? s.n / 2 : s.n;
  Sums dbias, values, dgate;
  dbias.clear(), values.clear(), dgate.clear();
  for (int64_t m0 = 0; m0 < s.m;) {
    const int64_t rows = s.gate ? s.gate_group : s.m;
    const int64_t group = s.gate ? m0 / s.gate_group * written : 0;
    for (int64_t r = m0; r < m0 + rows; ++r) {
      const D* dout = static_cast<const D*>(s.dout) + r * s.dout_ld;
      const T* u = s.u ? static_cast<const T*>(s.u) + r * s.u_ld : nullptr;
      T* du = s.du ? static_cast<T*>(s.du) + r * s.du_ld : nullptr;
      for (int64_t j = first; j < last; j += LANES) {
        const int64_t left = last - j;
        F16 g = pick(dout, s.cols, j, left);
        const F16 a = u ? load_any(u + j, left) : zero();
        const F16 b = pairs ? load_any(u + written + j, left) : zero();
        if (s.dgate) {
          const F16 z = pairs ? mul(activate(PRUNED_SILU, a), b) : activate(s.act, a);
          dgate.add_at(j - first, mul(g, z));
        }
        if (s.gate) g = mul(g, load_some(s.gate + group + j, left));
        F16 d = g;
        if (pairs) {
          const F16 second = mul(g, activate(PRUNED_SILU, a));
          d = mul(mul(g, b), slope(PRUNED_SILU, a));
          if (du) store_some(du + written + j, second, left);
          values.add_at(j - first, second);
        } else if (s.act != PRUNED_NONE) {
          d = mul(g, slope(s.act, a));
        }
        if (du) store_some(du + j, d, left);
        dbias.add_at(j - first, d);
      }
    }
    for (int64_t j = first; j < last; j += LANES) {
      const int64_t left = last - j;
      if (s.dgate) store_some(s.dgate + group + j, load(dgate.total + (j - first)), left);
      if (m0 + rows < s.m) continue;
      if (s.dbias) store_some(s.dbias + j, load(dbias.total + (j - first)), left);
      if (s.dbias && pairs) store_some(s.dbias + written + j, load(values.total + (j - first)), left);
    }
    dgate.clear();
    m0 += rows;
  }
}

template <class T, class D>
int slope_all(const PrunedSlope& s) {
  const int64_t written = s.act == PRUNED_SWIGLU ? s.n / 2 : s.n, parts = (written + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(useful(s.threads, s.m * s.n)) if (useful(s.threads, s.m * s.n) > 1)
  for (int64_t p = 0; p < parts; ++p)
    slope_columns<T, D>(s, p * COLUMNS, (p + 1) * COLUMNS < written ? (p + 1) * COLUMNS : written);
  return 0;
}

template <class T>
int stat_all(const PrunedNorm& p, double eps) {
#pragma omp parallel for schedule(static) num_threads(useful(p.threads, p.m * p.width)) if (useful(p.threads, p.m * p.width) > 1)
  for (int64_t r = 0; r < p.m; ++r) {
    const T* x = static_cast<const T*>(p.x) + r * p.x_ld;
    F16 s[2] = {zero(), zero()};
    for (int64_t j = 0; j < p.width; j += LANES) {
      const F16 v = load_any(x + j, p.width - j);
      s[j / LANES % 2] = fma(v, v, s[j / LANES % 2]);
    }
    p.stat[r] = static_cast<float>(1.0 / ::sqrt(static_cast<double>(sum(add(s[0], s[1]))) / static_cast<double>(p.width) + eps));
  }
  return 0;
}

// dx = r (dh' - x r^2 mean(dh' x)) with dh' = dh (1 + scale), zero outside the picked columns.
template <class T>
VK_INLINE void norm_row(const PrunedNorm& p, int64_t r, float* full) {
  const T* x = static_cast<const T*>(p.x) + r * p.x_ld;
  const T* dh = static_cast<const T*>(p.dh) + r * p.dh_ld;
  const float* scale = p.scale ? p.scale + r / p.group * p.k : nullptr;
  T* dx = static_cast<T*>(p.dx) + r * p.dx_ld;
  if (p.cols) memset(full, 0, static_cast<size_t>(p.width) * 4);
  F16 dot = zero();
  for (int64_t j = 0; j < p.k; j += LANES) {
    const int64_t left = p.k - j;
    F16 d = load_any(dh + j, left);
    if (scale) d = mul(d, load_some(scale + j, left));
    dot = fma(d, pick(x, p.cols, j, left), dot);
    if (!p.cols) {
      store_some(full + j, d, left);
      continue;
    }
    float lanes[LANES];
    store(lanes, d);
    for (int64_t i = 0; i < (left < LANES ? left : LANES); ++i) full[p.cols[j + i]] = lanes[i];
  }
  const float stat = p.stat ? p.stat[r] : 1.f;
  const float mean = p.stat ? sum(dot) * stat * stat / static_cast<float>(p.width) : 0.f;
  for (int64_t j = 0; j < p.width; j += LANES) {
    const int64_t left = p.width - j;
    const F16 d = sub(load_some(full + j, left), mul(load_any(x + j, left), set1(mean)));
    store_some(dx + j, mul(d, set1(stat)), left);
  }
}

// dshift sums dh, dscale dh x r, over the rows of a group.
template <class T>
VK_INLINE void modulation_columns(const PrunedNorm& p, int64_t first, int64_t last) {
  Sums shift, scale;
  for (int64_t m0 = 0; m0 < p.m;) {
    shift.clear(), scale.clear();
    for (int64_t r = m0; r < m0 + p.group; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.x_ld;
      const T* dh = static_cast<const T*>(p.dh) + r * p.dh_ld;
      const F16 stat = set1(p.stat ? p.stat[r] : 1.f);
      for (int64_t j = first; j < last; j += LANES) {
        const F16 d = load_any(dh + j, last - j);
        shift.add_at(j - first, d);
        if (p.dscale) scale.add_at(j - first, mul(d, mul(pick(x, p.cols, j, last - j), stat)));
      }
    }
    const int64_t at = m0 / p.group * p.k;
    for (int64_t j = first; j < last; j += LANES) {
      if (p.dshift) store_some(p.dshift + at + j, load(shift.total + (j - first)), last - j);
      if (p.dscale) store_some(p.dscale + at + j, load(scale.total + (j - first)), last - j);
    }
    m0 += p.group;
  }
}

template <class T>
int norm_all(const PrunedNorm& p) {
  const int threads = useful(p.threads, p.m * p.width);
  float* const memory = static_cast<float*>(malloc(static_cast<size_t>(threads) * p.width * 4));
  if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    float* const full = memory + omp_get_thread_num() * p.width;
#else
    float* const full = memory;
#endif
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.m; ++r) norm_row<T>(p, r, full);
    if (p.dscale || p.dshift) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t j = 0; j < p.k; j += COLUMNS) modulation_columns<T>(p, j, j + COLUMNS < p.k ? j + COLUMNS : p.k);
    }
  }
  free(memory);
  return 0;
}

}  // namespace

int pruned_slope(const PrunedSlope& s) {
  if (s.bf16) return s.dout_bf16 ? slope_all<bf16, bf16>(s) : slope_all<bf16, float>(s);
  return s.dout_bf16 ? slope_all<float, bf16>(s) : slope_all<float, float>(s);
}
int pruned_stat(const PrunedNorm& p, double eps) { return p.bf16 ? stat_all<bf16>(p, eps) : stat_all<float>(p, eps); }
int pruned_norm_backward(const PrunedNorm& p) { return p.bf16 ? norm_all<bf16>(p) : norm_all<float>(p); }

}  // namespace VK_ISA
}  // namespace vk
