// Products of a warpgroup as descriptors describe their operands: what tests/executor/test_hopper_products.py pins to the layouts of the manual.
#include "device/async.h"
#include "hopper.h"

using namespace vk;

struct Described2 {
  const u8* image;  // what shared memory holds, `bytes` of it
  const u32* own;   // [128, 4], the left operand in registers, or null
  float* sums;      // [128, n / 2] as the lanes hold them, in and out
  u64 a, b;         // descriptors
  i32 bytes, n, a_across, b_across, keep;
};
template <typename T, i32 N, bool A_ACROSS, bool B_ACROSS>
VK_DEVICE void of_form(const Described2& p) {
  const u32 t = thread_index();
  float* mine = p.sums + i32(t) * (N / 2);
  Accumulator c[N / 8];
  for (i32 i = 0; i < N / 2; ++i) c[i / 4].v[i % 4] = load(mine + i);
  FragmentA<T> a = {};
  if (p.own)
    for (i32 i = 0; i < 4; ++i) a.w[i] = load(p.own + t * 4 + i);
  products_begin();
  if (p.own) warpgroup_product<T, N, B_ACROSS>(c, a, {p.b}, p.keep != 0);
  else warpgroup_product<T, N, A_ACROSS, B_ACROSS>(c, {p.a}, {p.b}, p.keep != 0);
  products_commit();
  products_wait<0>();
  for (i32 i = 0; i < N / 2; ++i) store(mine + i, c[i / 4].v[i % 4]);
}
template <typename T, i32 N = 16>
VK_DEVICE void of_columns(const Described2& p) {
  if constexpr (N > 256) {
    return;
  } else {
    if (p.n != N) return of_columns<T, N + 16>(p);
    if (p.a_across) return p.b_across ? of_form<T, N, true, true>(p) : of_form<T, N, true, false>(p);
    return p.b_across ? of_form<T, N, false, true>(p) : of_form<T, N, false, false>(p);
  }
}
template <typename T>
VK_DEVICE void described(const Described2& p) {
  for (i32 i = i32(thread_index()) * 16; i < p.bytes; i += 128 * 16) store16(shared_at<u8>(u32(i)), load16(p.image + i));
  async_fence();
  block_barrier();
  of_columns<T>(p);
}
VK_KERNEL(128) described_bf16(const Described2 p) { described<bf16>(p); }
VK_KERNEL(128) described_f16(const Described2 p) { described<f16>(p); }
VK_ENTRY(described_bf16, Described2)
VK_ENTRY(described_f16, Described2)
