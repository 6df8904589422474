// Barriers in shared memory (mbarrier, compute capability 9.0 on): a phase ends when as many threads as it was made for have arrived and all
// bytes that it was told to expect have come. Phases are told apart by their parity, 0 for the first.
#pragma once
#include "memory.h"

namespace vk {

#ifdef __CUDACC__

// By one thread; others may use it after mbarriers_made() and a barrier of the block, or of the cluster where it has one.
VK_DEVICE void mbarrier_make(Shared<u64> b, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.at), "r"(arrivals) : "memory");
}
// Makes this thread's new barriers known to the other blocks of the cluster and to what copies asynchronously.
VK_DEVICE void mbarriers_made() { asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory"); }
// One arrival; what this thread did before it comes before what waiting threads do after.
VK_DEVICE void mbarrier_arrive(Shared<u64> b) { asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(b.at) : "memory"); }
// One arrival, and the phase waits for `bytes` more.
VK_DEVICE void mbarrier_expect(Shared<u64> b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(b.at), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity: the current one, or the one before, which has ended.
VK_DEVICE void mbarrier_wait(Shared<u64> b, u32 parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "vk_again:\n\t"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra vk_over;\n\t"
      "bra vk_again;\n"
      "vk_over:\n\t}" ::"r"(b.at),
      "r"(parity)
      : "memory");
}
// What this thread has written to shared memory, and what it knows of, is seen by asynchronous copies and products that come after it, and
// after a barrier also by those of other threads.
VK_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

inline void mbarrier_make(Shared<u64> b, u32 arrivals VK_AT) { model::mbarrier_make(b.at, arrivals, at); }
inline void mbarriers_made(VK_AT_ONLY) { model::mbarriers_made(at); }
inline void mbarrier_arrive(Shared<u64> b VK_AT) { model::mbarrier_arrive(b.at, model::cluster_rank(), 0, at); }
inline void mbarrier_expect(Shared<u64> b, u32 bytes VK_AT) { model::mbarrier_arrive(b.at, model::cluster_rank(), bytes, at); }
inline void mbarrier_wait(Shared<u64> b, u32 parity VK_AT) { model::mbarrier_wait(b.at, parity, at); }
inline void async_fence(VK_AT_ONLY) { model::async_fence(at); }

#endif

}  // namespace vk
