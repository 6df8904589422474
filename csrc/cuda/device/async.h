// Copies from global to shared memory that run beside the thread that asks for them: cp.async of compute capability 8.0 on.
#pragma once
#include "memory.h"

namespace vk {

#ifdef __CUDACC__

// 16 bytes, the first `bytes` (0 to 16) of them from `from` and the rest zeros; through L2 alone. `from` is not read where bytes is 0.
VK_DEVICE void copy16(Shared<u8> to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.at), "l"(from), "r"(bytes) : "memory");
}
// Ends a group of this thread's copies.
VK_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are still under way. Others see the copies after a barrier that follows.
template <int N>
VK_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

inline void copy16(Shared<u8> to, const void* from, u32 bytes VK_AT) { model::copy_async(to.at, from, bytes, at); }
inline void copies_commit() { model::copies_commit(); }
template <int N>
inline void copies_wait() {
  model::copies_wait(N);
}

#endif

}  // namespace vk
