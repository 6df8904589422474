// What happens to the values of one level, run by run: noise, interpolation and target, and their adjoint.
#pragma once

#include "cpu/pyramid_rows.h"

namespace vk {
namespace VK_ISA {

VK_INLINE bool is_masked(const PyramidArgs& a, int64_t b, int s) {
  return s >= a.active || (a.mask && !a.mask[b * a.mask_b + s]);
}
VK_INLINE const float* coefficients(const PyramidArgs& a, int64_t b, int s) { return a.table + b * a.table_b + s * a.table_s; }
VK_INLINE NoiseKey noise_key(const PyramidArgs& a, int64_t b, int s) {
  return NoiseKey{a.key0, a.key1, static_cast<uint32_t>(s), a.first_sample + static_cast<uint32_t>(b), a.offset};
}
VK_INLINE int64_t element_of(const LevelSize& z, int64_t c, int64_t t, int64_t y) { return ((c * z.t + t) * z.h + y) * z.w; }

// `rows` rows from (c, t, y) on of level s, whose values follow each other at `x` (readable SLACK past the end):
//   x' = scale x,  out[0] = alpha x' + sigma eps,  out[1] = d_alpha x' + d_sigma eps     with a table, else out[0] = x'.
// eps comes from the generator (philox) or from in[1]. A masked level gets zeros, and nothing of it is read.
VK_INLINE void mix_level(const PyramidArgs& a, int s, int64_t b, int64_t c, int64_t t, int64_t y, int64_t rows, const float* x) {
  const LevelSize& size = a.size[s];
  const LevelView &z = a.out[0][s], &v = a.out[1][s], &given = a.in[1][s];
  const bool flat = is_flat(z, size, 1, false) && is_flat(v, size, 1, false) && is_flat(given, size, 1, false);
  const int64_t runs = flat ? 1 : rows, length = flat ? rows * size.w : size.w;
  const bool masked = is_masked(a, b, s);
  const NoiseKey key = noise_key(a, b, s);
  const float* k = a.table ? coefficients(a, b, s) : nullptr;
  const F16 scale = set1(a.scale[s]), alpha = set1(k ? k[0] : 1.f), sigma = set1(k ? k[1] : 0.f), da = set1(k ? k[2] : 0.f),
            ds = set1(k ? k[3] : 0.f);
  alignas(64) float eps_buffer[CHUNK + SLACK], z_buffer[CHUNK + SLACK], v_buffer[CHUNK + SLACK];
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t at_z = offset_of(z, b, c, t, y + r), at_v = v.data ? offset_of(v, b, c, t, y + r) : 0;
    const int64_t at_given = given.data ? offset_of(given, b, c, t, y + r) : 0, element = element_of(size, c, t, y + r);
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = least(CHUNK, length - i);
      if (masked) {
        for (int64_t j = 0; j < n; j += LANES) store(z_buffer + j, zero()), store(v_buffer + j, zero());
      } else {
        const float* from = x + r * length + i;
        if (!k) {
          for (int64_t j = 0; j < n; j += LANES) store(z_buffer + j, mul(scale, load(from + j)));
        } else {
          const float* eps = a.philox ? normals(key, element + i, n, eps_buffer) : load_own(given, at_given, i, n, flat, eps_buffer);
          for (int64_t j = 0; j < n; j += LANES) {
            const F16 value = mul(scale, load(from + j)), e = load(eps + j);
            store(z_buffer + j, fma(alpha, value, mul(sigma, e)));
            store(v_buffer + j, fma(da, value, mul(ds, e)));
          }
        }
      }
      store_run(z, at_z, i, n, flat, z_buffer, a.stream);
      if (v.data) store_run(v, at_v, i, n, flat, v_buffer, a.stream);
    }
  }
}

// Row (c, t, y) of scale (alpha dz + d_alpha dv), the gradient of level s: in[0] and in[1], either may be absent. Plain levels
// have no table.
VK_INLINE void unmix_row(const PyramidArgs& a, int s, int64_t b, int64_t c, int64_t t, int64_t y, float* out, float* buffer) {
  const int64_t w = a.size[s].w;
  const float* k = a.table ? coefficients(a, b, s) : nullptr;
  const float weight[2] = {a.scale[s] * (k ? k[0] : 1.f), a.scale[s] * (k ? k[2] : 0.f)};
  bool first = true;
  for (int p = 0; p < 2; ++p) {
    const LevelView& g = a.in[p][s];
    if (!g.data || is_masked(a, b, s)) continue;
    const float* from = load_own(g, offset_of(g, b, c, t, y), 0, w, false, buffer);
    const F16 factor = set1(weight[p]);
    for (int64_t i = 0; i < w; i += LANES) store(out + i, first ? mul(factor, load(from + i)) : fma(factor, load(from + i), load(out + i)));
    first = false;
  }
  for (int64_t i = 0; i < w && first; i += LANES) store(out + i, zero());
}

// Row (c, t, y) of scale * z, or, with a table, of scale * (z + dt (u + w (c - u))): in[0], in[1], in[2] (absent: plain dt c).
VK_INLINE void stepped_row(const PyramidArgs& a, int s, int64_t b, int64_t c, int64_t t, int64_t y, float* out, float* buffer) {
  const int64_t w = a.size[s].w, pitch = Apply::pitch_for(w);
  const LevelView &z = a.in[0][s], &cond = a.in[1][s], &uncond = a.in[2][s];
  const float* from = load_own(z, offset_of(z, b, c, t, y), 0, w, false, buffer);
  const F16 scale = set1(a.scale[s]);
  if (!a.table || !cond.data) {
    for (int64_t i = 0; i < w; i += LANES) store(out + i, mul(scale, load(from + i)));
    return;
  }
  const float* k = coefficients(a, b, s);
  const F16 dt = set1(k[0]), guidance = set1(k[1]);
  const float* vc = load_own(cond, offset_of(cond, b, c, t, y), 0, w, false, buffer + pitch);
  const float* vu = uncond.data ? load_own(uncond, offset_of(uncond, b, c, t, y), 0, w, false, buffer + 2 * pitch) : nullptr;
  for (int64_t i = 0; i < w; i += LANES) {
    F16 v = load(vc + i);
    if (vu) {
      const F16 u = load(vu + i);
      v = fma(guidance, sub(v, u), u);
    }
    store(out + i, mul(scale, fma(dt, v, load(from + i))));
  }
}

}  // namespace VK_ISA
}  // namespace vk
