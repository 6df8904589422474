// What the forward and the backward of grid attention share: the parameters' pieces, and how the tables of a plan
// (vidkern/ops/grid_attention/plan.py) are read.
#pragma once
#include "tiles.h"

namespace vk {
namespace grid {

struct Strides {  // elements between samples, heads and tokens; the last stride is 1
  i64 batch, head, token;
};

constexpr i32 MAIN = 64, EDGE = 32;  // columns of a main and of an edge tile
constexpr i32 ROWS = 16 * WARPS;     // of a block; 16 rows per warp

// Which program this is: a row tile of a head of a sample, sample and head major, so that neighbours share keys in the L2 cache.
struct Program {
  i64 batch, head;
  i32 row_first, row_end, main_first, main_count, edge_first, edge_count;
  VK_DEVICE Program(const i32* tiles, i32 n_tiles, i32 heads) {
    const i32 pid = i32(block_index());
    const i32* tile = tiles + pid % n_tiles * 6;
    batch = pid / n_tiles / heads, head = pid / n_tiles % heads;
    row_first = load(tile), row_end = load(tile + 1), main_first = load(tile + 2), main_count = load(tile + 3);
    edge_first = load(tile + 4), edge_count = load(tile + 5);
  }
};

struct Columns {
  i32 first, end, row_first, row_end;  // rows [row_first, row_end) see columns [first, end)
};

// Column tile i of a program: main tiles first, which all rows see whole.
VK_DEVICE Columns columns_of(const Program& p, const i32* main, const i32* edge, i32 i) {
  if (i < p.main_count) {
    const i32 first = load(main + p.main_first + i);
    return {first, first + MAIN, 0, 0x7fffffff};
  }
  const i32* e = edge + 4 * (p.edge_first + i - p.main_count);
  return {load(e), load(e + 1), load(e + 2), load(e + 3)};
}

// Whether dQ takes dS with what its rounding drops, in two products. A row of dQ often hangs on one large dS; where that lies near the middle
// of two values, its half step can more than double the error of a kernel that rounds it the other way. Only float16, taken for its precision,
// is worth the price; dK and dV sum over many rows and do without.
template <typename T>
constexpr bool WHOLE = false;
template <>
constexpr bool WHOLE<f16> = true;

// Rows whose byte has a bit set.
struct Bit {
  const u8* bytes;
  u32 mask;
  VK_DEVICE bool operator()(i32 row) const { return load(bytes + row) & mask; }
};

// This warp's 16 rows of a head, from row `row` to at most `end`: the accumulators times factor[of the lane's two rows], through the warp's
// own rows of a tile that it alone still reads, so that they leave 16 bytes at a time.
template <typename T, i32 DIM>
VK_DEVICE void leave(T* to, i64 step, const Accumulator (&out)[DIM / 8], const float (&factor)[2], const Tile<DIM>& tile, i32 row, i32 end,
                     i32 dim) {
  const i32 own = i32(warp_index()) * 16;
  warp_barrier();
  VK_UNROLL
  for (i32 d = 0; d < DIM / 8; ++d)
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h)
      store4(tile.chunk(own + accumulator_row(2 * h), d) + i32(lane_index() % 4) * 4,
             Number<T>::pack(out[d].v[2 * h] * factor[h], out[d].v[2 * h + 1] * factor[h]));
  warp_barrier();
  for (i32 i = i32(lane_index()); i < 16 * (DIM / CHUNK); i += i32(WARP)) {
    const i32 n = i / (DIM / CHUNK), c = i % (DIM / CHUNK);
    if (row + n < end && c * CHUNK < dim) store16(to + (row + n) * step + c * CHUNK, load16(tile.chunk(own + n, c)));
  }
}

}  // namespace grid
}  // namespace vk
