// Two warpgroups, of which one lays operands down and the other multiplies: what tests/executor/test_hopper_products.py breaks rule by rule.
#include "device/async.h"
#include "hopper.h"

using namespace vk;
using namespace vk::hopper;

struct Given {
  const u8 *x, *y, *z;  // [64, 128], [80, 128], [64, 128]; bf16
  float *first, *second, *third, *fourth;  // [64, 80], [64, 128], [64, 80], [64, 64]
};
using X = Panels<64, 128>;
using Y = Panels<80, 128>;

// All rows of a tile, by the threads of one warpgroup.
template <typename Tile, i32 ROWS>
VK_DEVICE void lay(Tile tile, const u8* from) {
  for (i32 i = i32(thread_index() % GROUP); i < ROWS * 16; i += GROUP) copy16(tile.chunk(i / 16, i % 16), from + i * 16, 16);
  copies_commit();
}
template <i32 N>
VK_DEVICE void keep(float* to, const Accumulator (&c)[N / 8]) {
  for (i32 n = 0; n < N / 8; ++n)
    for (i32 i = 0; i < 4; ++i)
      store(to + (i32(warp_index() % 4) * 16 + accumulator_row(i)) * N + n * 8 + accumulator_column(i), c[n].v[i]);
}

// first = x y^T, second = (rounded first) y, third = z y^T + first, fourth = x^T x over 64 columns
VK_KERNEL(256) rules(const Given p) {
  const X x{shared_at<u8>(0)};
  const Y y{shared_at<u8>(X::BYTES)};
  if (group_index() == 0) {
    lay<X, 64>(x, p.x);
    lay<Y, 80>(y, p.y);
    copies_wait<0>();
    async_fence();
    block_barrier();  // the tiles are there
    block_barrier();  // x is no longer read
    lay<X, 64>(x, p.z);
    copies_wait<0>();
    async_fence();
    block_barrier();  // z is there
    return;
  }
  Accumulator c[10], d[16], e[8];
  block_barrier();
  products_begin();
  for (i32 k = 0; k < 8; ++k) warpgroup_product<bf16, 80>(c, x.depth_along(0, k), y.depth_along(0, k), k > 0);
  products_commit();
  products_begin();
  for (i32 k = 0; k < 4; ++k) warpgroup_product<bf16, 64, true, true>(e, x.depth_across(k, 1), x.depth_across(k), k > 0);
  products_commit();
  products_wait<1>();
  keep<80>(p.first, c);
  products_wait<0>();
  keep<64>(p.fourth, e);
  block_barrier();
  FragmentA<bf16> own[5];
  for (i32 k = 0; k < 5; ++k) own[k] = as_operand<bf16>(c[2 * k], c[2 * k + 1]);
  block_barrier();
  products_begin();
  for (i32 k = 0; k < 5; ++k) warpgroup_product<bf16, 128, true>(d, own[k], y.depth_across(k), k > 0);
  for (i32 k = 0; k < 4; ++k) warpgroup_product<bf16, 80>(c, x.depth_along(0, k), y.depth_along(0, k), true);
  products_commit();
  products_begin();
  for (i32 k = 4; k < 8; ++k) warpgroup_product<bf16, 80>(c, x.depth_along(0, k), y.depth_along(0, k), true);
  products_commit();
  products_wait<0>();
  keep<128>(p.second, d);
  keep<80>(p.third, c);
}
VK_ENTRY(rules, Given)

struct Piped {
  TensorMap a, b;  // [64, 64 steps], [64 steps, 128]; bf16
  float* to;       // [64, 128]
  i32 steps;
};
constexpr u32 STAGES_AT = 1024, STAGE = Panels<64, 64>::BYTES + Panels<64, 128>::BYTES;
// a b through a ring of two stages, of which one is read while products on the other are under way
VK_KERNEL(256) piped(const VK_PARAMETER Piped p) {
  const Ring<2> ring{shared_at<u64>(0)};
  const auto left = [](i32 i) { return Panels<64, 64>{shared_at<u8>(STAGES_AT + u32(i % 2) * STAGE)}; };
  const auto right = [](i32 i) { return Panels<64, 128>{shared_at<u8>(STAGES_AT + u32(i % 2) * STAGE + Panels<64, 64>::BYTES)}; };
  if (thread_index() == 0) ring.make(1, 4);
  block_barrier();
  if (group_index() == 0) {
    if (thread_index() != 0) return;
    for (i32 i = 0; i < p.steps; ++i) {
      ring.wait_empty(i);
      mbarrier_expect(ring.full(i), STAGE);
      copy_box(left(i).base, p.a, 64 * i, 0, ring.full(i));
      for (i32 n = 0; n < 2; ++n) copy_box(right(i).panel(n), p.b, 64 * n, 64 * i, ring.full(i));
    }
    return;
  }
  Accumulator c[16];
  for (i32 i = 0; i < p.steps; ++i) {
    ring.wait_full(i);
    products_begin();
    for (i32 k = 0; k < 4; ++k) warpgroup_product<bf16, 128, false, true>(c, left(i).depth_along(0, k), right(i).depth_across(k), i + k > 0);
    products_commit();
    products_wait<1>();
    if (i > 0) ring.release(i - 1);
  }
  products_wait<0>();
  keep<128>(p.to, c);
}
VK_ENTRY(piped, Piped)
