// Threads of a warp and of a block among each other.
#pragma once
#include "numbers.h"

namespace vk {

#ifdef __CUDACC__

// The value of the lane whose index differs in the bits of `mask`; the whole warp takes part.
VK_DEVICE float shuffle_xor(float v, u32 mask) {
  asm volatile("shfl.sync.bfly.b32 %0, %0, %1, 0x1f, 0xffffffff;" : "+f"(v) : "r"(mask));
  return v;
}
// Bit l is what lane l says; the whole warp takes part.
VK_DEVICE u32 votes(bool v) {
  u32 bits;
  asm volatile("{.reg .pred p;\n\tsetp.ne.b32 p, %1, 0;\n\tvote.sync.ballot.b32 %0, p, 0xffffffff;}" : "=r"(bits) : "r"(u32(v)));
  return bits;
}
// A value that all lanes have the same of, which the compiler then knows: addresses that follow from it cost no registers of each lane. The
// whole warp takes part.
VK_DEVICE i32 uniform(i32 v) {
  asm volatile("shfl.sync.idx.b32 %0, %0, 0, 0x1f, 0xffffffff;" : "+r"(v));
  return v;
}
// Memory accesses of the warp before it come before those after it.
VK_DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
// All threads of the block.
VK_DEVICE void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }
// `threads` threads (a multiple of 32) that name the same barrier, 1 to 15.
VK_DEVICE void named_barrier(u32 barrier, u32 threads) { asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

#else

inline float shuffle_xor(float v, u32 mask VK_AT) { return model::shuffle_xor(v, mask, at); }
inline i32 uniform(i32 v) { return v; }
inline u32 votes(bool v VK_AT) { return model::ballot(v, at); }
inline void warp_barrier(VK_AT_ONLY) { model::warp_barrier(at); }
inline void block_barrier(VK_AT_ONLY) { model::barrier(0, model::thread_count(), at); }
inline void named_barrier(u32 barrier, u32 threads VK_AT) { model::barrier(barrier, threads, at); }

#endif

// Largest value, and sum, of the four lanes that hold one row of a matrix fragment.
VK_DEVICE float quad_max(float v) {
  v = max_of(v, shuffle_xor(v, 1));
  return max_of(v, shuffle_xor(v, 2));
}
VK_DEVICE float quad_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

}  // namespace vk
