// Products over any number of channels for compute capability 9.0a: a ring of chunks of 64 channels, of 128 rows and of the keys that two
// blocks of a cluster share.
#pragma once
#include "amf_hopper.h"

namespace vk {
namespace amf {

// A stage holds 64 channels, of the rows and of up to KEYS keys. Two blocks of one target make a cluster: each brings half of every tile of
// keys to both.
constexpr u32 CLUSTER = 2;
constexpr i32 SHARE = 64;  // keys of a box

template <typename T, i32 KEYS>
struct Chunks {
  using Left = Panels<ROWS, STEP>;
  using Right = Panels<KEYS, STEP>;
  static constexpr u32 STAGE = Left::BYTES + Right::BYTES, END = ALIGN + STAGES * STAGE;
  Ring<STAGES> ring;
  i32 each, count, i = 0;  // chunks of a head, and of a product; uses of the ring so far
  VK_DEVICE Chunks(i32 heads, i32 dim) : ring{shared_at<u64>(0)}, each((dim + STEP - 1) / STEP), count(each * heads) {
    if (thread_index() == 0) ring.make(1, READERS * CLUSTER);
    cluster_barrier();
  }
  static VK_DEVICE Left left(i32 i) { return {shared_at<u8>(ALIGN + u32(i % STAGES) * STAGE)}; }
  static VK_DEVICE Right right(i32 i) { return {shared_at<u8>(ALIGN + u32(i % STAGES) * STAGE + Left::BYTES)}; }

  // By one thread: the chunks of a product with `keys` keys, a multiple of 128, from token `key` on; heads from `group` on and `batch` say
  // where in the map. bring_rows(to, channel, z, done) asks for `row_bytes` of rows.
  template <typename BringRows>
  VK_DEVICE void bring(u32 row_bytes, BringRows bring_rows, const TensorMap& map, i32 key, i32 keys, i32 group, i32 batch) {
    const i32 rank = i32(cluster_rank());
    for (i32 c = 0; c < count; ++c, ++i) {
      const i32 z = group + c / each, channel = c % each * STEP;
      ring.wait_empty(i);
      mbarrier_expect(ring.full(i), row_bytes + u32(keys * STEP * 2));
      bring_rows(left(i).base, channel, z, ring.full(i));
      VK_NO_UNROLL
      for (i32 n = rank * SHARE; n < keys; n += i32(CLUSTER) * SHARE)
        copy_box_to(u16((1 << CLUSTER) - 1), right(i).base + n * STEP * 2, map, channel, key + n, z, batch, ring.full(i));
    }
  }
  // This warp no longer reads a use, which both blocks fill.
  VK_DEVICE void release(i32 use) const {
    warp_barrier();
    if (lane_index() < CLUSTER) mbarrier_arrive_at(ring.empty(use), lane_index());
  }
  // A warpgroup's next product, with TILES times 128 keys.
  template <i32 TILES>
  VK_DEVICE void multiply(Accumulator (&s)[TILES][COLUMNS / 8]) {
    const i32 row = (group_index() - 1) * 64;
    for (i32 c = 0; c < count; ++c, ++i) {
      ring.wait_full(i);
      products_begin();
      // Of all tiles at once: each product reads the rows anew.
      auto& sums = reinterpret_cast<Accumulator(&)[TILES * COLUMNS / 8]>(s);
      VK_UNROLL
      for (i32 k = 0; k < STEP / 16; ++k)
        warpgroup_product<T, TILES * COLUMNS>(sums, left(i).depth_along(row, k), right(i).depth_along(0, k), c + k > 0);
      products_commit();
      if (c == 0) continue;
      products_wait<1>();
      release(i - 1);
    }
    products_wait<0>();
    release(i - 1);
  }
  // A product that this warpgroup does not need: both blocks wait for it to be released.
  VK_DEVICE void pass() {
    for (i32 c = 0; c < count; ++c, ++i) {
      ring.wait_full(i);
      release(i);
    }
  }
  // At the end, by the thread that brings: until the other block has copied what it copies to this one, and will not arrive here any more.
  VK_DEVICE void leave() const {
    VK_UNROLL
    for (i32 n = 0; n < STAGES; ++n) ring.wait_empty(i + n);
  }
};

}  // namespace amf
}  // namespace vk
