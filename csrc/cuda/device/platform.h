// What every CUDA source of vidkern starts from: one text for two readers. nvcc and NVRTC read the inline PTX of the primitives; a host
// compiler reads their functional models ("executor.h", which the tests provide), so that the same kernels run, thread by thread, on a CPU.
// No CUDA header is needed by either.
#pragma once

namespace vk {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
using i64 = long long;
}  // namespace vk

#ifdef __CUDACC__

#define VK_DEVICE __device__ __forceinline__
#define VK_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// Of warpgroups that pass registers on: how many each thread begins with must be known, and so that one block has the multiprocessor.
#define VK_KERNEL_ALONE(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// Blocks of a cluster, after VK_KERNEL; how a parameter is declared whose address is taken (a tensor map's).
#define VK_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#define VK_PARAMETER __grid_constant__
// A primitive's last parameter: nothing on a device, the caller's file and line in a model.
#define VK_AT
#define VK_AT_ONLY
#define VK_HERE
#define VK_UNROLL _Pragma("unroll")
#define VK_UNROLL_TWICE _Pragma("unroll 2")
#define VK_NO_UNROLL _Pragma("unroll 1")
// A kernel takes one structure; the models call it through a plain pointer.
#define VK_ENTRY(name, Parameters)
#define VK_ENTRY_CLUSTER(name, Parameters, blocks)

namespace vk {
VK_DEVICE u32 thread_index() { return threadIdx.x; }
VK_DEVICE u32 block_index() { return blockIdx.x; }
}  // namespace vk

#else

#include "executor.h"

#define VK_DEVICE inline
#define VK_KERNEL(threads) VK_MODEL_KERNEL
#define VK_KERNEL_ALONE(threads) VK_MODEL_KERNEL
#define VK_CLUSTER(blocks)
#define VK_PARAMETER
#define VK_AT , ::vk::model::Where at = ::vk::model::here()
#define VK_AT_ONLY ::vk::model::Where at = ::vk::model::here()
#define VK_HERE , at
#define VK_UNROLL
#define VK_UNROLL_TWICE
#define VK_NO_UNROLL
#define VK_ENTRY(name, Parameters) \
  extern "C" void name##_thread(const void* given) { name(*static_cast<const Parameters*>(given)); }
#define VK_ENTRY_CLUSTER(name, Parameters, blocks) \
  VK_ENTRY(name, Parameters)                       \
  extern "C" const ::vk::u32 name##_cluster = blocks;

namespace vk {
inline u32 thread_index() { return model::thread_index(); }
inline u32 block_index() { return model::block_index(); }
}  // namespace vk

#endif

namespace vk {
constexpr u32 WARP = 32;
VK_DEVICE u32 lane_index() { return thread_index() % WARP; }
VK_DEVICE u32 warp_index() { return thread_index() / WARP; }
}  // namespace vk
