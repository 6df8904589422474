// Attention motion flow, backward where channels are many, for compute capability 9.0a: amf_slab.cu's slope by wgmma. A block makes 128
// rows by up to 256 keys of a slab; the two of a cluster lie below each other, and each brings half of the keys to both. Frames are a
// dimension of the maps: what is past a frame's end, or past a head's channels, comes as zeros. Deterministic.
#include "amf_hopper_wide.h"

namespace vk {
namespace amf {

struct SlabSlope {
  TensorMap q, k;       // of this sample and group, as are all others, [F, heads, S, d]: boxes of 64 channels by BLOCK and by SHARE tokens
  const Slope* slopes;  // [P, S]
  const i32* flags;     // [P, blocks]
  void* slab;           // [S, n_slots, padded]
  const i32* slots;     // [*, 2]: target, pair; this frame's are slot to slot + n_slots - 1
  Frame frame;
  i32 slot, n_slots, query, heads, dim, blocks, padded;  // query: the frame; padded: keys of a slab's row
  float centre_x, centre_y, scale;
};

constexpr i32 KEYS = 2 * COLUMNS, HALVES = ROWS / BLOCK;

// A block's tile of the slab. live: which 64 of its rows have a gradient, bit by bit; cluster_live: the same of both blocks.
template <typename T>
struct SlabTile {
  const SlabSlope& g;
  i32 row_first, first, which, target, pair;
  u32 cluster_live, live;
  // Blocks are numbered by tiles of rows first: those that run together share keys.
  VK_DEVICE explicit SlabTile(const SlabSlope& g) : g(g), cluster_live(0) {
    const i32 pid = i32(block_index()), down = (g.frame.size + i32(CLUSTER) * ROWS - 1) / (i32(CLUSTER) * ROWS) * i32(CLUSTER);
    const i32 across = (g.frame.size + KEYS - 1) / KEYS, rank = i32(cluster_rank());
    row_first = pid % down * ROWS, first = pid / down % across * KEYS, which = pid / down / across;
    target = load(g.slots + (g.slot + which) * 2), pair = load(g.slots + (g.slot + which) * 2 + 1);
    VK_UNROLL
    for (i32 n = 0; n < i32(CLUSTER) * HALVES; ++n) {
      const i32 row = row_first - rank * ROWS + n * BLOCK;
      cluster_live |= u32(row < g.frame.size && load(g.flags + i64(pair) * g.blocks + row / BLOCK) != 0) << n;
    }
    live = cluster_live >> rank * HALVES & ((1u << HALVES) - 1);
  }

  // By a warpgroup with a gradient: products with TILES times 128 keys, and what becomes of them, which leaves through the warp's own place
  // behind the stages, 16 bytes at a time.
  template <i32 TILES>
  VK_DEVICE void make(Chunks<T, KEYS>& chunks) const {
    const i32 row = row_first + (i32(warp_index()) - 4) * PIECE;
    Slope of[2];
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 mine = row + accumulator_row(2 * h);
      of[h] = mine < g.frame.size ? load(g.slopes + i64(pair) * g.frame.size + mine) : no_slope();
    }
    Accumulator s[TILES][COLUMNS / 8];
    chunks.multiply(s);
    // Warps are counted from the producer's on, whose rows would lie before.
    const Tile<COLUMNS> place{shared_at<u8>(chunks.END - 4 * PIECE * COLUMNS * 2)};
    VK_UNROLL
    for (i32 t = 0; t < TILES; ++t) {
      const i32 begin = first + t * COLUMNS, own = begin + accumulator_column(0);
      Place at[2] = {Place(own, g.frame), Place(own + 1, g.frame)};
      VK_UNROLL
      for (i32 n = 0; n < COLUMNS / 8; ++n)
        VK_UNROLL
        for (i32 j = 0; j < 2; ++j) {
          VK_UNROLL
          for (i32 h = 0; h < 2; ++h) {
            float& v = s[t][n].v[2 * h + j];
            v = own + n * 8 + j < g.frame.size ? of[h].at(v, at[j], g.centre_x, g.centre_y, g.scale * LOG2E) : 0.0f;
          }
          at[j].eight_on(g.frame);
        }
      T* to = static_cast<T*>(g.slab) + i64(which) * g.padded + begin;
      hand_over<T, COLUMNS>(s[t], 1.0f, place, [&](i32 n, i32 c) {
        const bool there = row + n < g.frame.size && begin + c * CHUNK < g.padded;
        return there ? to + i64(row + n) * g.n_slots * g.padded + c * CHUNK : nullptr;
      });
    }
  }
};

template <typename T>
VK_DEVICE void slope(const SlabSlope& g) {
  const SlabTile<T> tile(g);
  if (tile.cluster_live == 0) return;  // both blocks alike
  Chunks<T, KEYS> chunks(g.heads, g.dim);
  const bool both = tile.first + COLUMNS < g.frame.size;
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() == 0) {
      prefetch(g.q), prefetch(g.k);
      const auto rows = [&](Shared<u8> to, i32 channel, i32 head, Shared<u64> done) {
        VK_UNROLL
        for (i32 n = 0; n < HALVES; ++n)
          if (tile.live >> n & 1) copy_box(to + n * BLOCK * STEP * 2, g.q, channel, tile.row_first + n * BLOCK, head, g.query, done);
      };
      const u32 halves = (tile.live & 1) + (tile.live >> 1);
      chunks.bring(halves * (BLOCK * STEP * 2), rows, g.k, tile.first, both ? KEYS : COLUMNS, 0, tile.target);
      chunks.leave();
    }
  } else {
    registers_up<MANY>();
    if ((tile.live >> (group_index() - 1) & 1) == 0) chunks.pass();
    else if (both) tile.template make<2>(chunks);
    else tile.template make<1>(chunks);
  }
}

}  // namespace amf
}  // namespace vk

using vk::amf::SlabSlope;

#define VK_AMF_SLOPE(T)                                                                         \
  VK_KERNEL_ALONE(384) VK_CLUSTER(2) amf_hopper_slope_##T(const VK_PARAMETER SlabSlope given) { \
    vk::amf::slope<vk::T>(given);                                                               \
  }                                                                                             \
  VK_ENTRY_CLUSTER(amf_hopper_slope_##T, SlabSlope, 2)

VK_AMF_SLOPE(bf16)
VK_AMF_SLOPE(f16)
