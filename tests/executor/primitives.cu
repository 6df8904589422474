// Small kernels around single primitives: what tests/executor/test_primitives.py pins to the tables of the PTX manual.
#include "device/async.h"
#include "device/matrix.h"
#include "device/philox.h"
#include "device/warp.h"

using namespace vk;

struct Fragments {
  const u32 *a, *b;
  const float* c;
  float* d;
};
// One warp: fragments as they lie in the lanes' registers, [32, 4], [32, 2] and [32, 4] words.
template <typename T>
VK_DEVICE void product(const Fragments& p) {
  const u32 lane = lane_index();
  FragmentA<T> a;
  FragmentB<T> b;
  Accumulator c;
  for (u32 i = 0; i < 4; ++i) a.w[i] = load(p.a + lane * 4 + i), c.v[i] = load(p.c + lane * 4 + i);
  for (u32 i = 0; i < 2; ++i) b.w[i] = load(p.b + lane * 2 + i);
  multiply_add(c, a, b);
  for (u32 i = 0; i < 4; ++i) store(p.d + lane * 4 + i, c.v[i]);
}
VK_KERNEL(32) product_bf16(const Fragments p) { product<bf16>(p); }
VK_KERNEL(32) product_f16(const Fragments p) { product<f16>(p); }
VK_ENTRY(product_bf16, Fragments)
VK_ENTRY(product_f16, Fragments)

struct Moved {
  const void* from;
  u32* to;
  i32 kind;
};
// One warp: 512 bytes into shared memory by 16-byte stores, then four matrices of them by ldmatrix; words [32, 4].
VK_KERNEL(32) matrices(const Moved p) {
  const u32 lane = lane_index();
  const Shared<u8> all = shared_at<u8>(0);
  store16(all + i32(lane * 16), load16(static_cast<const u8*>(p.from) + lane * 16));
  warp_barrier();
  u32 w[4];
  if (p.kind) load_matrices_transposed(w, all + i32(lane * 16));
  else load_matrices(w, all + i32(lane * 16));
  for (u32 i = 0; i < 4; ++i) store(p.to + lane * 4 + i, w[i]);
}
VK_ENTRY(matrices, Moved)

// 64 threads: 1024 bytes by asynchronous copies, of which thread t copies the first p.kind bytes of its 16, read back by the mirrored thread.
VK_KERNEL(64) copies(const Moved p) {
  const u32 t = thread_index(), other = 63 - t;
  const Shared<u8> all = shared_at<u8>(0);
  copy16(all + i32(t * 16), static_cast<const u8*>(p.from) + t * 16, u32(p.kind));
  copies_commit();
  copies_wait<0>();
  block_barrier();
  const Words w = load16(all + i32(other * 16));
  store16(p.to + other * 4, w);
}
VK_ENTRY(copies, Moved)

struct Values {
  const float* from;
  float* to;
};
// One warp: sums and maxima over quads, and each lane's value rounded to both 16-bit types and back; [32, 4]. Then who is positive, [1].
VK_KERNEL(32) quads(const Values p) {
  const u32 lane = lane_index();
  const float v = load(p.from + lane);
  store(p.to + lane * 4, quad_sum(v));
  store(p.to + lane * 4 + 1, quad_max(v));
  store(p.to + lane * 4 + 2, Number<bf16>::high(Number<bf16>::pack(0.0f, v)));
  store(p.to + lane * 4 + 3, Number<f16>::low(Number<f16>::pack(v, 0.0f)));
  const u32 positive = votes(v > 0);
  if (lane == 31) store(reinterpret_cast<u32*>(p.to + 128), positive);
}
VK_ENTRY(quads, Values)

// 128 threads: warps 0 and 1 hand a value to each other through a named barrier, and so do warps 2 and 3 through another.
VK_KERNEL(128) pairs(const Values p) {
  const u32 t = thread_index(), pair = t / 64, other = pair * 64 + (t + 32) % 64;
  const Shared<u8> all = shared_at<u8>(0);
  store4(all + i32(t * 4), t);
  named_barrier(1 + pair, 64);
  const u32 seen = load4(all + i32(other * 4));
  store(p.to + t, load(p.from + seen));
}
VK_ENTRY(pairs, Values)

struct Numbers {
  const float *a, *b, *c;
  float* to;
};
// One warp: a b + c rounded once, a b and then + c, the root of a, and the bits of a there and back; [32, 4].
VK_KERNEL(32) numbers(const Numbers p) {
  const u32 lane = lane_index();
  const float a = load(p.a + lane), b = load(p.b + lane), c = load(p.c + lane);
  store(p.to + lane * 4, fused(a, b, c));
  store(p.to + lane * 4 + 1, times(a, b) + c);
  store(p.to + lane * 4 + 2, square_root(a));
  store(p.to + lane * 4 + 3, as_float(as_bits(a) ^ 0x80000000u));
}
VK_ENTRY(numbers, Numbers)

struct Drawn {
  float* to;
  i64 first;
  Draw draw;
};
// One warp: normals of the elements from `first` + 9 lane on, 8 for each lane; [32, 8].
VK_KERNEL(32) drawn(const Drawn p) {
  const u32 lane = lane_index();
  float v[8];
  normals8(v, p.first + 9 * lane, p.draw);
  for (u32 i = 0; i < 8; ++i) store(p.to + lane * 8 + i, v[i]);
}
VK_ENTRY(drawn, Drawn)
