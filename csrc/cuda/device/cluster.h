// Blocks of a cluster among each other (compute capability 9.0 on). A kernel says how many blocks its clusters have: VK_CLUSTER.
#pragma once
#include "mbarrier.h"

namespace vk {

#ifdef __CUDACC__

// Which block of its cluster this is.
VK_DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster.
VK_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// An arrival at the barrier that lies at b in block `rank` of the cluster. It orders what this thread has read from shared memory, as a
// release at the block's scope does; one at the cluster's would wait for all of its accesses to global memory.
VK_DEVICE void mbarrier_arrive_at(Shared<u64> b, u32 rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(b.at),
      "r"(rank)
      : "memory");
}

#else

inline u32 cluster_rank() { return model::cluster_rank(); }
inline void cluster_barrier(VK_AT_ONLY) { model::cluster_barrier(at); }
inline void mbarrier_arrive_at(Shared<u64> b, u32 rank VK_AT) { model::mbarrier_arrive(b.at, rank, 0, at); }

#endif

}  // namespace vk
