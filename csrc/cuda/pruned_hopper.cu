// The layers' own products, X W^T, for compute capability 9.0: A [m, k] and B [n, k] as they lie in memory; of pairs B has 2 n rows. In
// clusters of two blocks each block brings half of B for both.
#include "pruned_hopper.h"

#define VK_BOXED_CLUSTER(name, T)                                                                               \
  VK_KERNEL_ALONE(vk::pruned::HOPPER_THREADS) VK_CLUSTER(2) name(const VK_PARAMETER vk::pruned::Boxed given) {  \
    vk::pruned::boxed<vk::pruned::Form<vk::T, 128, false, false, false, 2>>(given);                             \
  }                                                                                                             \
  VK_ENTRY_CLUSTER(name, vk::pruned::Boxed, 2)

VK_BOXED_FORMS(pruned_hopper_nt, false, false, false)
VK_BOXED_FORMS(pruned_hopper_pairs, false, false, true)
VK_BOXED_CLUSTER(pruned_hopper_cluster_f16_128, f16)
VK_BOXED_CLUSTER(pruned_hopper_cluster_bf16_128, bf16)
