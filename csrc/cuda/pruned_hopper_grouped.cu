// Several layers of different sizes in one launch for compute capability 9.0: the layers' tiles in one row, of which each block takes every
// so many-th. All that says where the layers are is in the parameters, tensor maps too, so that nothing is copied to the device and the
// launch can be captured.
#include "pruned_hopper.h"

namespace vk {
namespace pruned {

constexpr i32 BOXED_LAYERS = 13;  // of a launch: parameters and what aligns them hold 4 KB on every driver, a layer's maps 256 bytes

struct BoxedLayer {
  const float* bias;  // null: none
  i64 start;          // where the result [m, n] starts
  i32 m, n, k, first; // first: number of its first tile
};
struct BoxedGroup {
  TensorMap x[BOXED_LAYERS], weight[BOXED_LAYERS];
  BoxedLayer layers[BOXED_LAYERS];  // the deepest first, so that none is left alone at the end
  void *out, *u;                    // one layer's [m, n] after the other's; u: null, or the sums before the activation
  i32 count, act, tiles, blocks;
};
static_assert(sizeof(BoxedGroup) <= 4096, "parameters of a launch");

template <typename F>
struct LayerTiles {
  const BoxedGroup& given;
  i32 first, step, count;
  struct Job {
    Product p;
    const TensorMap &a, &b;
    i32 row, column;
  };
  VK_DEVICE explicit LayerTiles(const BoxedGroup& g) : given(g), first(i32(block_index())), step(g.blocks), count(g.tiles) {}
  VK_DEVICE i32 a_way() const { return BOXES; }
  VK_DEVICE i32 b_way() const { return BOXES; }
  VK_DEVICE Job at(i32 t) const {
    using T = typename F::T;
    i32 i = 0;
    while (i + 1 < given.count && given.layers[i + 1].first <= t) ++i;
    const BoxedLayer& layer = given.layers[i];
    Product p{};
    p.bias = layer.bias;
    p.out = static_cast<T*>(given.out) + layer.start;
    p.u = given.u == nullptr ? nullptr : static_cast<T*>(given.u) + layer.start;
    p.out_step = p.u_step = layer.n;
    p.m = layer.m, p.n = layer.n, p.k = layer.k, p.act = given.act;
    const i32 rows = (p.m + F::ROWS - 1) / F::ROWS, within = t - layer.first;
    return {p, given.x[i], given.weight[i], within % rows * F::ROWS, within / rows * F::COLUMNS};
  }
};

}  // namespace pruned
}  // namespace vk

#define VK_BOXED_GROUP(name, T, COLUMNS)                                                              \
  VK_KERNEL_ALONE(vk::pruned::HOPPER_THREADS) name(const VK_PARAMETER vk::pruned::BoxedGroup given) { \
    using F = vk::pruned::Form<vk::T, COLUMNS, false, false, false>;                                  \
    vk::pruned::run<F>(vk::pruned::LayerTiles<F>(given));                                             \
  }                                                                                                   \
  VK_ENTRY(name, vk::pruned::BoxedGroup)

VK_BOXED_GROUP(pruned_hopper_grouped_f16_256, f16, 256)
VK_BOXED_GROUP(pruned_hopper_grouped_f16_128, f16, 128)
VK_BOXED_GROUP(pruned_hopper_grouped_f16_64, f16, 64)
VK_BOXED_GROUP(pruned_hopper_grouped_bf16_256, bf16, 256)
VK_BOXED_GROUP(pruned_hopper_grouped_bf16_128, bf16, 128)
VK_BOXED_GROUP(pruned_hopper_grouped_bf16_64, bf16, 64)
