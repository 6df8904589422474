// Small kernels around single primitives of compute capability 9.0: what tests/executor/test_hopper_primitives.py pins to the PTX manual.
#include "device/async.h"
#include "device/tensor_map.h"
#include "device/warp.h"
#include "device/warpgroup.h"

using namespace vk;

constexpr u32 BOX_AT = 1024;
// The bytes of shared memory from `at` on as they lie, by all threads.
VK_DEVICE void show(u8* to, u32 at, u32 bytes, u32 threads) {
  for (u32 b = thread_index() * 16; b < bytes; b += threads * 16) store16(to + b, load16(shared_at<u8>(at + b)));
}

struct Box {
  TensorMap map;
  u8* to;
  i32 first[4];
  u32 at, bytes;
};
// 64 threads: one asks for a box, all wait for it and show it.
template <i32 DIMENSIONS>
VK_DEVICE void box(const Box& p) {
  const Shared<u64> done = shared_at<u64>(16);
  if (thread_index() == 0) {
    mbarrier_make(done, 1);
    mbarriers_made();
  }
  block_barrier();
  if (thread_index() == 0) {
    mbarrier_expect(done, p.bytes);
    if (DIMENSIONS == 2) copy_box(shared_at<u8>(p.at), p.map, p.first[0], p.first[1], done);
    else copy_box(shared_at<u8>(p.at), p.map, p.first[0], p.first[1], p.first[2], p.first[3], done);
  }
  mbarrier_wait(done, 0);
  show(p.to, p.at, p.bytes, 64);
}
VK_KERNEL(64) box2(const VK_PARAMETER Box p) { box<2>(p); }
VK_KERNEL(64) box4(const VK_PARAMETER Box p) { box<4>(p); }
VK_ENTRY(box2, Box)
VK_ENTRY(box4, Box)
