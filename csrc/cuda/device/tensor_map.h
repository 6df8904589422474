// Copies of boxes of a tensor to shared memory by the tensor memory accelerator (cp.async.bulk.tensor, compute capability 9.0 on): one
// thread asks, and the bytes are counted at a barrier. What lies outside the tensor comes as zeros.
#pragma once
#include "cluster.h"

namespace vk {

// Describes a tensor of up to five dimensions and the box that a copy takes of it (CUtensorMap: encoded by the host, opaque here). A kernel
// holds it in its parameters, at the beginning.
#ifdef __CUDACC__
struct alignas(64) TensorMap {
  u64 words[16];
};
#else
struct TensorMap {  // what lies in parameters need not be aligned on a host
  u64 words[16];
};
#endif

#ifdef __CUDACC__

VK_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Has the L2 cache fetch `bytes`, a multiple of 16, from `from` on, which lies on 16 bytes.
VK_DEVICE void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// The box whose first element is (x, y), or (x, y, z, w), x along the dimension that lies dense; to: on 128 bytes, on 1024 where swizzled.
VK_DEVICE void copy_box(Shared<u8> to, const TensorMap& map, i32 x, i32 y, Shared<u64> done) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to.at),
               "l"(&map), "r"(x), "r"(y), "r"(done.at)
               : "memory");
}
VK_DEVICE void copy_box(Shared<u8> to, const TensorMap& map, i32 x, i32 y, i32 z, i32 w, Shared<u64> done) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to.at),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(done.at)
      : "memory");
}
// The same box to the same place of every block of the cluster whose bit is set; counted at the barrier of each at the same place.
VK_DEVICE void copy_box_to(u16 blocks, Shared<u8> to, const TensorMap& map, i32 x, i32 y, Shared<u64> done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], "
      "%5;" ::"r"(to.at),
      "l"(&map), "r"(x), "r"(y), "r"(done.at), "h"(blocks)
      : "memory");
}
VK_DEVICE void copy_box_to(u16 blocks, Shared<u8> to, const TensorMap& map, i32 x, i32 y, i32 z, i32 w, Shared<u64> done) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4, %5}], "
      "[%6], %7;" ::"r"(to.at),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(done.at), "h"(blocks)
      : "memory");
}

#else

inline void prefetch(const TensorMap&) {}
inline void prefetch(const void* from, u32 bytes VK_AT) { model::prefetch(from, bytes, at); }
inline void copy_box(Shared<u8> to, const TensorMap& map, i32 x, i32 y, Shared<u64> done VK_AT) {
  model::copy_box(0, to.at, map.words, {x, y}, done.at, at);
}
inline void copy_box(Shared<u8> to, const TensorMap& map, i32 x, i32 y, i32 z, i32 w, Shared<u64> done VK_AT) {
  model::copy_box(0, to.at, map.words, {x, y, z, w}, done.at, at);
}
inline void copy_box_to(u16 blocks, Shared<u8> to, const TensorMap& map, i32 x, i32 y, Shared<u64> done VK_AT) {
  model::copy_box(blocks, to.at, map.words, {x, y}, done.at, at);
}
inline void copy_box_to(u16 blocks, Shared<u8> to, const TensorMap& map, i32 x, i32 y, i32 z, i32 w, Shared<u64> done VK_AT) {
  model::copy_box(blocks, to.at, map.words, {x, y, z, w}, done.at, at);
}

#endif

}  // namespace vk
