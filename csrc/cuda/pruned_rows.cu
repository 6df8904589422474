// Around the products of the pruned layers: RMSNorm, modulation and gathering of what they read; the gradient of the pre-activation with
// its sums over tokens; RMSNorm backward. Bound by memory: rows move 16 bytes at a time wherever they lie on 16 bytes. Sums over tokens
// leave in parts, each added in one order; the launcher adds the parts.
#include "pruned.h"

namespace vk {
namespace pruned {

struct Gather {
  const void* x;
  void* out;                   // [count, k]; null: only stat
  float* stat;                 // 1 / rms of each row's `width` values; null: no norm
  const float *scale, *shift;  // 1 + scale, and shift: [groups, k] of `group` rows each; null: none
  const i32 *rows, *cols;
  i64 x_step, out_step;
  i32 count, width, k, group;
  float eps;
};
struct Slope {
  const void *dout, *u;  // u: null where the activation is none and nobody wants its sums
  const i32* cols;       // of dout
  const float* gate;     // [groups, written]
  void* du;
  float *dbias, *dgate;  // [parts, n], [parts, written]
  i64 dout_step, u_step, du_step;
  i32 m, n, written, group, rows, act;  // rows: of a part, which never lies in two groups; group: rows of one
  i32 pairs, wide, tiles;               // wide: dout is float32; tiles: of columns
};
struct NormBackward {
  const void *x, *dh;
  const float *stat, *scale;  // as in Gather, scale [groups, width]
  void* dx;
  i64 x_step, dh_step, dx_step;
  i32 count, width, group;
};
struct Modulation {
  const void *x, *dh;
  const float* stat;
  float *dscale, *dshift;  // [parts, width]; null: not wanted
  i64 x_step, dh_step;
  i32 width, group, rows, tiles;
};

constexpr i32 COLUMNS = 64, ACROSS = COLUMNS / CHUNK, ROWS = THREADS / ACROSS;  // of the kernels that sum over tokens

VK_DEVICE float warp_sum(float v) {
  v = quad_sum(v);
  VK_UNROLL
  for (u32 mask = 4; mask < WARP; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}
// 1 / sqrt(x): infinity for 0.
VK_DEVICE float inverse_root(float x) { return exp2_approx(-0.5f * log2_approx(x)); }

// One warp a row: P(x)[rows, cols].
template <typename T>
VK_DEVICE void gather(const Gather& g) {
  const i32 row = i32(block_index()) * WARPS + i32(warp_index()), first = i32(lane_index()) * CHUNK, step = i32(WARP) * CHUNK;
  if (row >= g.count) return;
  const T* x = static_cast<const T*>(g.x) + i64(g.rows == nullptr ? row : load(g.rows + row)) * g.x_step;
  float stat = 1;
  if (g.stat != nullptr) {
    float total = 0;
    for (i32 c = first; c < g.width; c += step) {
      const Eight v = take(x, Place(nullptr, c, g.width));
      VK_UNROLL
      for (i32 i = 0; i < CHUNK; ++i) total += v.v[i] * v.v[i];
    }
    stat = inverse_root(warp_sum(total) / float(g.width) + g.eps);
    if (lane_index() == 0) store(g.stat + row, stat);
  }
  if (g.out == nullptr) return;
  const i64 own = i64(row / g.group) * g.k;
  for (i32 c = first; c < g.k; c += step) {
    const Place at(nullptr, c, g.k);
    Eight v = take(x, Place(g.cols, c, g.k));
    if (g.stat != nullptr) {
      VK_UNROLL
      for (i32 i = 0; i < CHUNK; ++i) v.v[i] *= stat;
    }
    if (g.scale != nullptr) multiply(v, take(g.scale + own, at));
    if (g.shift != nullptr) add(v, take(g.shift + own, at));
    leave(static_cast<T*>(g.out) + row * g.out_step, at, v);
  }
}

// Which rows and columns a thread of the kernels that sum over tokens looks at: eight columns of every ROWS-th row of a part.
struct Part {
  i32 part, group, first, last, column;
  VK_DEVICE Part(i32 tiles, i32 rows_of_group, i32 rows) {
    const i32 pid = i32(block_index()), parts = (rows_of_group + rows - 1) / rows;
    part = pid / tiles, group = part / parts;
    first = group * rows_of_group + part % parts * rows;
    last = least(first + rows, (group + 1) * rows_of_group);
    column = pid % tiles * COLUMNS + i32(thread_index()) % ACROSS * CHUNK;
    first += i32(thread_index()) / ACROSS;
  }
};

// The threads' sums of one kind, number `which`, in shared memory: ROWS rows of COLUMNS.
VK_DEVICE Shared<u8> sums_at(i32 which) { return shared_at<u8>(u32(which * ROWS * COLUMNS * 4)); }
VK_DEVICE void put_sums(i32 which, const Eight& x) {
  Words a, b;
  VK_UNROLL
  for (i32 i = 0; i < 4; ++i) a.w[i] = bits_of(x.v[i]), b.w[i] = bits_of(x.v[4 + i]);
  const Shared<u8> to = sums_at(which) + i32(thread_index()) * CHUNK * 4;
  store16(to, a), store16(to + 16, b);
}
// After a barrier: the sums over the rows, of the block's columns up to `end`, to `to`.
VK_DEVICE void leave_sums(i32 which, float* to, i32 column0, i32 end) {
  const i32 t = i32(thread_index());
  if (t >= COLUMNS || column0 + t >= end) return;
  float total = 0;
  VK_UNROLL
  for (i32 r = 0; r < ROWS; ++r) total += float_of(load4(sums_at(which) + (r * COLUMNS + t) * 4));
  store(to + column0 + t, total);
}

// du = gate dout act'(u), and per part the sums over rows of du and of dout act(u).
template <typename T>
VK_DEVICE void pre_activation(const Slope& g) {
  const Part at(g.tiles, g.group, g.rows);
  const Place own(nullptr, at.column, g.written), from(g.cols, at.column, g.written);
  Eight bias{}, bias2{}, gates{}, gate{};
  if (g.gate != nullptr && own.count > 0) gate = take(g.gate + i64(at.group) * g.written, own);
  for (i32 row = at.first; own.count > 0 && row < at.last; row += ROWS) {
    const i64 d_at = row * g.dout_step;
    Eight d = g.wide ? take(static_cast<const float*>(g.dout) + d_at, from) : take(static_cast<const T*>(g.dout) + d_at, from);
    Eight a{}, b{};
    if (g.u != nullptr) {
      const T* u = static_cast<const T*>(g.u) + row * g.u_step;
      a = take(u, own);
      if (g.pairs) b = take(u + g.written, own);
    }
    VK_UNROLL
    for (i32 i = 0; i < CHUNK; ++i) {
      const float z = g.u == nullptr ? 0.0f : activate(a.v[i], g.act);
      gates.v[i] += d.v[i] * (g.pairs ? z * b.v[i] : z);
      if (g.gate != nullptr) d.v[i] *= gate.v[i];
      const float value = d.v[i] * z;
      if (g.pairs) d.v[i] *= b.v[i];
      d.v[i] *= slope(a.v[i], g.act);
      b.v[i] = value;
      bias.v[i] += d.v[i];
      bias2.v[i] += value;
    }
    if (g.du == nullptr) continue;
    T* du = static_cast<T*>(g.du) + row * g.du_step;
    leave(du, own, d);
    if (g.pairs) leave(du + g.written, own, b);
  }
  if (g.dbias == nullptr && g.dgate == nullptr) return;
  put_sums(0, bias), put_sums(1, bias2), put_sums(2, gates);
  block_barrier();
  const i32 column0 = at.column - i32(thread_index()) % ACROSS * CHUNK;
  if (g.dbias != nullptr) {
    float* to = g.dbias + i64(at.part) * g.n;
    leave_sums(0, to, column0, g.written);
    if (g.pairs) leave_sums(1, to + g.written, column0, g.written);
  }
  if (g.dgate != nullptr) leave_sums(2, g.dgate + i64(at.part) * g.written, column0, g.written);
}

// One warp a row: dx = r (dh' - x r^2 mean(dh' x)), dh' = dh (1 + scale), in all channels.
template <typename T>
VK_DEVICE void norm_backward(const NormBackward& g) {
  const i32 row = i32(block_index()) * WARPS + i32(warp_index()), first = i32(lane_index()) * CHUNK, step = i32(WARP) * CHUNK;
  if (row >= g.count) return;
  const T *x = static_cast<const T*>(g.x) + row * g.x_step, *dh = static_cast<const T*>(g.dh) + row * g.dh_step;
  const float* scale = g.scale == nullptr ? nullptr : g.scale + i64(row / g.group) * g.width;
  const auto scaled = [&](const Place& at) {
    Eight d = take(dh, at);
    if (scale != nullptr) multiply(d, take(scale, at));
    return d;
  };
  float stat = 1, mean = 0;
  if (g.stat != nullptr) {
    stat = load(g.stat + row);
    for (i32 c = first; c < g.width; c += step) {
      const Place at(nullptr, c, g.width);
      const Eight d = scaled(at), v = take(x, at);
      VK_UNROLL
      for (i32 i = 0; i < CHUNK; ++i) mean += d.v[i] * v.v[i];
    }
    mean = warp_sum(mean) * stat * stat / float(g.width);
  }
  for (i32 c = first; c < g.width; c += step) {
    const Place at(nullptr, c, g.width);
    Eight d = scaled(at);
    if (g.stat != nullptr) {
      const Eight v = take(x, at);
      VK_UNROLL
      for (i32 i = 0; i < CHUNK; ++i) d.v[i] = (d.v[i] - v.v[i] * mean) * stat;
    }
    leave(static_cast<T*>(g.dx) + row * g.dx_step, at, d);
  }
}

// Per part the sums over rows of dh, and of dh x / rms.
template <typename T>
VK_DEVICE void modulation(const Modulation& g) {
  const Part at(g.tiles, g.group, g.rows);
  const Place own(nullptr, at.column, g.width);
  Eight shift{}, scale{};
  for (i32 row = at.first; own.count > 0 && row < at.last; row += ROWS) {
    const Eight d = take(static_cast<const T*>(g.dh) + row * g.dh_step, own);
    add(shift, d);
    if (g.dscale == nullptr) continue;
    const Eight x = take(static_cast<const T*>(g.x) + row * g.x_step, own);
    const float stat = g.stat == nullptr ? 1.0f : load(g.stat + row);
    VK_UNROLL
    for (i32 i = 0; i < CHUNK; ++i) scale.v[i] += d.v[i] * (x.v[i] * stat);
  }
  put_sums(0, shift), put_sums(1, scale);
  block_barrier();
  const i32 column0 = at.column - i32(thread_index()) % ACROSS * CHUNK;
  if (g.dshift != nullptr) leave_sums(0, g.dshift + i64(at.part) * g.width, column0, g.width);
  if (g.dscale != nullptr) leave_sums(1, g.dscale + i64(at.part) * g.width, column0, g.width);
}

}  // namespace pruned
}  // namespace vk

using namespace vk::pruned;

#define VK_ROWS(name, PART, T, Parameters)                                               \
  VK_KERNEL(128) name(const Parameters given) { vk::pruned::PART<vk::T>(given); } \
  VK_ENTRY(name, Parameters)

VK_ROWS(pruned_gather_bf16, gather, bf16, Gather)
VK_ROWS(pruned_gather_f16, gather, f16, Gather)
VK_ROWS(pruned_slope_bf16, pre_activation, bf16, Slope)
VK_ROWS(pruned_slope_f16, pre_activation, f16, Slope)
VK_ROWS(pruned_norm_backward_bf16, norm_backward, bf16, NormBackward)
VK_ROWS(pruned_norm_backward_f16, norm_backward, f16, NormBackward)
VK_ROWS(pruned_modulation_bf16, modulation, bf16, Modulation)
VK_ROWS(pruned_modulation_f16, modulation, f16, Modulation)
