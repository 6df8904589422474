// Small kernels around single primitives of compute capability 9.0: what tests/executor/test_hopper_primitives.py pins to the PTX manual, and
// breaks. Copies of boxes of 64 values by ROWS rows.
#include "device/async.h"
#include "device/tensor_map.h"
#include "device/warp.h"
#include "device/warpgroup.h"

using namespace vk;

constexpr i32 ROWS = 16, STEPS = 6;
constexpr u32 BYTES = ROWS * 128;

// `bytes` of shared memory from `at` on as they lie, by `threads` threads of which this is number t.
VK_DEVICE void show(u8* to, u32 at, u32 bytes, u32 t, u32 threads) {
  for (u32 b = t * 16; b < bytes; b += threads * 16) store16(to + b, load16(shared_at<u8>(at + b)));
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
  show(p.to, p.at, p.bytes, thread_index(), 64);
}
VK_KERNEL(64) box2(const VK_PARAMETER Box p) { box<2>(p); }
VK_KERNEL(64) box4(const VK_PARAMETER Box p) { box<4>(p); }
VK_ENTRY(box2, Box)
VK_ENTRY(box4, Box)

struct Values {
  const u32* from;
  u32* to;
};
// 64 threads: a warp hands STEPS words a lane to another one, a phase for each and a phase back, [STEPS, 32].
VK_KERNEL(64) phases(const Values p) {
  const u32 lane = lane_index();
  const Shared<u64> there = shared_at<u64>(0), back = there + 1;
  const Shared<u8> word = shared_at<u8>(64 + lane * 4);
  if (thread_index() == 0) {
    mbarrier_make(there, 32);
    mbarrier_make(back, 32);
    mbarriers_made();
  }
  block_barrier();
  for (u32 i = 0; i < STEPS; ++i) {
    if (warp_index() == 0) {
      mbarrier_wait(back, (i + 1) & 1);  // the first time for the phase before the first
      store4(word, load(p.from + i * 32 + lane));
      mbarrier_arrive(there);
    } else {
      mbarrier_wait(there, i & 1);
      store(p.to + i * 32 + lane, load4(word));
      mbarrier_arrive(back);
    }
  }
}
VK_ENTRY(phases, Values)

// 64 threads: two lanes, one of which did something before, read a word, [2], that another warp overwrites when one of them says so.
VK_KERNEL(64) readers(const Values p) {
  const u32 lane = lane_index();
  const Shared<u64> were_read = shared_at<u64>(0);
  const Shared<u8> word = shared_at<u8>(64);
  if (thread_index() == 0) {
    mbarrier_make(were_read, 1);
    mbarriers_made();
    store4(word, load(p.from));
  }
  block_barrier();
  if (warp_index() == 0) {
    if (lane == 0) async_fence();
    if (lane < 2) store(p.to + lane, load4(word));
    warp_barrier();  // read
    if (lane == 0) mbarrier_arrive(were_read);
  } else if (lane == 0) {
    mbarrier_wait(were_read, 0);
    store4(word, 0);
  }
}
VK_ENTRY(readers, Values)

struct Refill {
  TensorMap map;
  u8* to;
  i32 kind;
};
// 64 threads fill a box's place, and one fetches a box there. kind: who fences, the writers (0) or the one that asks (1).
VK_KERNEL(64) refill(const VK_PARAMETER Refill p) {
  const u32 t = thread_index();
  const Shared<u64> done = shared_at<u64>(0);
  if (t == 0) {
    mbarrier_make(done, 1);
    mbarriers_made();
  }
  for (u32 b = t * 16; b < BYTES; b += 64 * 16) store16(shared_at<u8>(1024 + b), Words{});
  if (p.kind == 0) async_fence();
  block_barrier();
  if (t == 0) {
    if (p.kind == 1) async_fence();  // after
    mbarrier_expect(done, BYTES);
    copy_box(shared_at<u8>(1024), p.map, 0, 0, done);
  }
  mbarrier_wait(done, 0);
  show(p.to, 1024, BYTES, t, 64);
}
VK_ENTRY(refill, Refill)

struct Boxes {
  TensorMap map;
  u8* to;
};
// 96 threads: warp 0 fetches STEPS boxes below each other through two places, the two others show what comes, [STEPS, BYTES].
VK_KERNEL(96) pipeline(const VK_PARAMETER Boxes p) {
  const Shared<u64> full = shared_at<u64>(0), empty = full + 2;
  if (thread_index() == 0) {
    for (i32 s = 0; s < 2; ++s) mbarrier_make(full + s, 1), mbarrier_make(empty + s, 2);
    mbarriers_made();
  }
  block_barrier();  // made
  for (i32 i = 0; i < STEPS; ++i) {
    const i32 s = i % 2;
    const u32 at = 1024 + u32(s) * BYTES, parity = u32(i / 2) & 1;
    if (warp_index() == 0) {
      if (lane_index() == 0) {
        if (i >= 2) mbarrier_wait(empty + s, parity ^ 1);
        mbarrier_expect(full + s, BYTES);
        copy_box(shared_at<u8>(at), p.map, 0, i * ROWS, full + s);
      }
    } else {
      mbarrier_wait(full + s, parity);
      show(p.to + u32(i) * BYTES, at, BYTES, thread_index() - 32, 64);
      warp_barrier();
      if (lane_index() == 0) mbarrier_arrive(empty + s);
    }
  }
}
VK_ENTRY(pipeline, Boxes)

struct Handed {
  const u32* from;
  u32* to;
};
// Clusters of two blocks of 32 threads: each says its rank and waits for as many arrivals from the other as that one has lanes; [blocks].
VK_KERNEL(32) VK_CLUSTER(2) remote(const Handed p) {
  const u32 rank = cluster_rank();
  const Shared<u64> come = shared_at<u64>(0);
  if (thread_index() == 0) {
    mbarrier_make(come, 32);
    mbarriers_made();
  }
  cluster_barrier();  // made
  mbarrier_arrive_at(come, rank ^ 1);
  mbarrier_wait(come, 0);
  if (thread_index() == 0) store(p.to + block_index(), rank);
}
VK_ENTRY_CLUSTER(remote, Handed, 2)

// Clusters of two blocks of 64 threads: each fetches a half of STEPS boxes of 2 ROWS rows for both blocks, which show them whole, [blocks, STEPS,
// 2 BYTES]. Warp 0 asks, warp 1 shows.
VK_KERNEL(64) VK_CLUSTER(2) halves(const VK_PARAMETER Boxes p) {
  const u32 rank = cluster_rank();
  const Shared<u64> full = shared_at<u64>(0), empty = full + 1;
  if (thread_index() == 0) {
    mbarrier_make(full, 1);
    mbarrier_make(empty, 2);
    mbarriers_made();
  }
  cluster_barrier();  // made
  for (i32 i = 0; i < STEPS; ++i) {
    if (warp_index() == 0) {
      if (lane_index() == 0) {
        if (i) mbarrier_wait(empty, u32(i + 1) & 1);
        mbarrier_expect(full, 2 * BYTES);
        copy_box_to(3, shared_at<u8>(1024 + rank * BYTES), p.map, 0, (2 * i + i32(rank)) * ROWS, full);
      }
    } else {
      mbarrier_wait(full, u32(i) & 1);
      show(p.to + (block_index() * STEPS + u32(i)) * 2 * BYTES, 1024, 2 * BYTES, lane_index(), 32);
      warp_barrier();
      if (lane_index() == 0)
        for (u32 b = 0; b < 2; ++b) mbarrier_arrive_at(empty, b);
    }
  }
  cluster_barrier();  // over
}
VK_ENTRY_CLUSTER(halves, Boxes, 2)

// 384 threads: one warpgroup gives registers back, and two take them. What is read is fetched into the L2 cache, 16 bytes at a time.
VK_KERNEL_ALONE(384) shares(const Values p) {
  if (thread_index() < 128) {
    registers_down<24>();
  } else {
    registers_up<240>();
  }
  if (thread_index() % 4 == 0) prefetch(p.from + thread_index(), 16);
  store(p.to + thread_index(), load(p.from + thread_index()));
}
VK_ENTRY(shares, Values)
