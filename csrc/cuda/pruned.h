// What the kernels of the pruned layers share: rows of values read and written eight at a time, through lists of channels where there are
// such, and the activations. The lists are sorted and hold no number twice, so that eight numbers are consecutive if the last is the first
// plus seven: such a run moves as 16 bytes where its address allows, everything else value by value.
#pragma once
#include "tiles.h"

namespace vk {
namespace pruned {

// (1 + tanh(y)) / 2 = sigmoid(2 y)
constexpr float GELU_1 = 2 * 0.7978845608028654f, GELU_3 = 2 * 0.7978845608028654f * 0.044715f;

enum Act : i32 { NONE = 0, GELU = 1, SILU = 2 };  // of a pair's gate it is SILU

VK_DEVICE i32 least(i32 a, i32 b) { return a < b ? a : b; }
VK_DEVICE float float_of(u32 bits) {
  union {
    u32 u;
    float f;
  } both = {bits};
  return both.f;
}
VK_DEVICE u32 bits_of(float value) {
  union {
    float f;
    u32 u;
  } both = {value};
  return both.u;
}
VK_DEVICE bool on_16_bytes(const void* p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

struct Eight {
  float v[CHUNK];
};
VK_DEVICE void add(Eight& x, const Eight& y) {
  VK_UNROLL
  for (i32 i = 0; i < CHUNK; ++i) x.v[i] += y.v[i];
}
VK_DEVICE void multiply(Eight& x, const Eight& y) {
  VK_UNROLL
  for (i32 i = 0; i < CHUNK; ++i) x.v[i] *= y.v[i];
}

// Values of a type in global memory as float32: of eight at p, 16-byte aligned, and of one.
template <typename E>
struct Values {
  static VK_DEVICE void take(Eight& x, const E* p) {
    const Words w = load16(p);
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) x.v[2 * i] = Number<E>::low(w.w[i]), x.v[2 * i + 1] = Number<E>::high(w.w[i]);
  }
  static VK_DEVICE void leave(E* p, const Eight& x) {
    Words w;
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) w.w[i] = Number<E>::pack(x.v[2 * i], x.v[2 * i + 1]);
    store16(p, w);
  }
  static VK_DEVICE float take_one(const E* p) { return Number<E>::low(load(reinterpret_cast<const u16*>(p))); }
  static VK_DEVICE void leave_one(E* p, float x) { store(reinterpret_cast<u16*>(p), u16(Number<E>::pack(x, 0.0f))); }
};
template <>
struct Values<float> {
  static VK_DEVICE void take(Eight& x, const float* p) {
    const Words a = load16(p), b = load16(p + 4);
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) x.v[i] = float_of(a.w[i]), x.v[4 + i] = float_of(b.w[i]);
  }
  static VK_DEVICE void leave(float* p, const Eight& x) {
    Words a, b;
    VK_UNROLL
    for (i32 i = 0; i < 4; ++i) a.w[i] = bits_of(x.v[i]), b.w[i] = bits_of(x.v[4 + i]);
    store16(p, a), store16(p + 4, b);
  }
  static VK_DEVICE float take_one(const float* p) { return load(p); }
  static VK_DEVICE void leave_one(float* p, float x) { store(p, x); }
};

// Where eight values of a row from number `column` on lie: consecutive from `first` on, or each where the list says.
struct Place {
  const i32* list;  // null: no list
  i32 column, count, first;
  bool run;
  VK_DEVICE Place(const i32* cols, i32 at, i32 end) : list(cols), column(at), count(least(end - at, CHUNK)), first(at), run(true) {
    if (cols == nullptr || count <= 0) return;
    first = load(cols + at);
    run = count == CHUNK && load(cols + at + CHUNK - 1) - first == CHUNK - 1;
  }
  VK_DEVICE i32 of(i32 i) const { return run ? first + i : load(list + column + i); }
};

// Zeros where the row has ended.
template <typename E>
VK_DEVICE Eight take(const E* row, const Place& at) {
  Eight x;
  if (at.run && at.count == CHUNK && on_16_bytes(row + at.first)) {
    Values<E>::take(x, row + at.first);
    return x;
  }
  VK_UNROLL
  for (i32 i = 0; i < CHUNK; ++i) x.v[i] = i < at.count ? Values<E>::take_one(row + at.of(i)) : 0.0f;
  return x;
}
template <typename E>
VK_DEVICE void leave(E* row, const Place& at, const Eight& x) {
  if (at.run && at.count == CHUNK && on_16_bytes(row + at.first)) return Values<E>::leave(row + at.first, x);
  VK_UNROLL
  for (i32 i = 0; i < CHUNK; ++i)
    if (i < at.count) Values<E>::leave_one(row + at.of(i), x.v[i]);
}

// sigmoid(x) and sigmoid(-x), the second without cancellation.
struct Sigmoids {
  float s, other;
  VK_DEVICE explicit Sigmoids(float x) {
    const float e = exp2_approx(-max_of(x, -87.0f) * LOG2E);
    s = 1.0f / (1.0f + e), other = e * s;
  }
};
VK_DEVICE float activate(float u, i32 act) {
  if (act == GELU) return u * Sigmoids(u * (GELU_1 + GELU_3 * u * u)).s;
  return act == SILU ? u * Sigmoids(u).s : u;
}
// d act(u) / du
VK_DEVICE float slope(float u, i32 act) {
  if (act == NONE) return 1.0f;
  const bool gelu = act == GELU;
  const Sigmoids at(gelu ? u * (GELU_1 + GELU_3 * u * u) : u);
  return at.s * (1.0f + u * (gelu ? GELU_1 + 3 * GELU_3 * u * u : 1.0f) * at.other);
}

}  // namespace pruned
}  // namespace vk
