// Several layers of different sizes in one launch: a block finds its layer, and its tile of it, in a list.
#include "pruned_product.h"

namespace vk {
namespace pruned {

struct Layer {  // rows of x and weight lie on 16 bytes
  const void *x, *weight;
  const float* bias;      // null: none
  i64 start, m, n, k;     // where the result [m, n] starts
  i64 x_step, weight_step;
};
struct Grouped {
  const Layer* layers;
  const i32* tiles;  // [blocks, 3]: layer, tile row, tile column
  void *out, *u;     // one layer's [m, n] after the other's; u: null, or the sums before the activation
  i32 act;
};

template <typename T, typename S>
VK_DEVICE void grouped(const Grouped& g) {
  const i32* at = g.tiles + 3 * i64(block_index());
  const Layer* layer = g.layers + load(at);
  Product p{};
  const i64 start = load(&layer->start), n = load(&layer->n);
  p.a = {load(&layer->x), nullptr, nullptr, load(&layer->x_step)};
  p.b = {load(&layer->weight), nullptr, nullptr, load(&layer->weight_step)};
  p.bias = load(&layer->bias);
  p.out = static_cast<T*>(g.out) + start;
  p.u = g.u == nullptr ? nullptr : static_cast<T*>(g.u) + start;
  p.out_step = p.u_step = n;
  p.m = i32(load(&layer->m)), p.n = i32(n), p.k = i32(load(&layer->k)), p.act = g.act;
  tile<T, S, false, false, false>(p, load(at + 1), load(at + 2));
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
