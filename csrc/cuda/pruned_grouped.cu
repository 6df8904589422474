// Several layers of different sizes in one launch: a block finds its layer, and its tile of it, by its number. All that says where they are
// is in the parameters, so that nothing is copied to the device and the launch can be captured.
#include "pruned_product.h"

namespace vk {
namespace pruned {

constexpr i32 LAYERS = 32;  // of a launch: parameters hold 4 KB

struct Layer {  // rows of x and weight lie on 16 bytes
  const void *x, *weight;
  const float* bias;  // null: none
  i64 start;          // where the result [m, n] starts
  i64 x_step, weight_step;
  i32 m, n, k, first;  // first: number of its first block
};
struct Grouped {
  Layer layers[LAYERS];  // the deepest first, so that none is left alone at the end
  void *out, *u;         // one layer's [m, n] after the other's; u: null, or the sums before the activation
  i32 count, act;
};

template <typename T, typename S>
VK_DEVICE void grouped(const Grouped& g) {
  const i32 block = i32(block_index());
  i32 i = 0;
  while (i + 1 < g.count && g.layers[i + 1].first <= block) ++i;
  const Layer& layer = g.layers[i];
  Product p{};
  p.a = {layer.x, nullptr, nullptr, layer.x_step};
  p.b = {layer.weight, nullptr, nullptr, layer.weight_step};
  p.bias = layer.bias;
  p.out = static_cast<T*>(g.out) + layer.start;
  p.u = g.u == nullptr ? nullptr : static_cast<T*>(g.u) + layer.start;
  p.out_step = p.u_step = layer.n;
  p.m = layer.m, p.n = layer.n, p.k = layer.k, p.act = g.act;
  const i32 rows = (p.m + S::ROWS - 1) / S::ROWS, at = block - layer.first;
  tile<T, S, false, false, false>(p, at % rows, at / rows);
}

}  // namespace pruned
}  // namespace vk

#define VK_GROUPED(name, T, S)                                                                                                           \
  VK_KERNEL(vk::pruned::S::THREADS) name(const vk::pruned::Grouped given) { vk::pruned::grouped<vk::T, vk::pruned::S>(given); } \
  VK_ENTRY(name, vk::pruned::Grouped)

VK_GROUPED(pruned_grouped_bf16_128, bf16, Large)
VK_GROUPED(pruned_grouped_bf16_64, bf16, Small)
VK_GROUPED(pruned_grouped_f16_128, f16, Large)
VK_GROUPED(pruned_grouped_f16_64, f16, Small)
