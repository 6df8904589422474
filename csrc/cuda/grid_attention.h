// What the forward and the backward of grid attention share: the parameters' pieces, the swizzled tiles in shared memory, and how the
// tables of a plan (vidkern/ops/grid_attention/plan.py) are read.
#pragma once
#include "device/async.h"
#include "device/matrix.h"
#include "device/warp.h"

namespace vk {
namespace grid {

struct Strides {  // elements between samples, heads and tokens; the last stride is 1
  i64 batch, head, token;
};

constexpr i32 MAIN = 64, EDGE = 32;  // columns of a main and of an edge tile
constexpr i32 CHUNK = 8;             // 16-bit values of 16 bytes

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

// A tile of rows of DIM 16-bit values. 16-byte chunk c of row r lies at chunk c ^ (r % 8): eight rows of one chunk column are in eight
// different bank groups.
template <i32 DIM>
struct Tile {
  static constexpr i32 CHUNKS = DIM / CHUNK;
  Shared<u8> base;
  VK_DEVICE Shared<u8> chunk(i32 row, i32 c) const { return base + (row * CHUNKS + (c ^ (row & 7))) * 16; }

  // Rows `first` on of a head, asynchronously: `rows` of them; zeros from `end` on, past `dim`, and where a key is dead.
  template <i32 THREADS, typename T, bool LIVE>
  VK_DEVICE void fill(const T* from, i64 step, i32 first, i32 end, i32 rows, i32 dim, const u8* live) const {
    // Unrolled further, its addresses would spill.
    VK_UNROLL_TWICE
    for (i32 i = i32(thread_index()); i < rows * CHUNKS; i += THREADS) {
      const i32 row = i / CHUNKS, c = i % CHUNKS;
      bool there = first + row < end && c * CHUNK < dim;
      if (LIVE) there = there && (load(live + first + row) & 1);
      copy16(chunk(row, c), from + (first + row) * step + c * CHUNK, there ? 16 : 0);
    }
  }
  // Rows row .. row + 15, values 16 k .. 16 k + 15 as the left operand of a product.
  template <typename T>
  VK_DEVICE FragmentA<T> left(i32 row, i32 k) const {
    const i32 l = i32(lane_index()), m = l / 8;
    FragmentA<T> a;
    load_matrices(a.w, chunk(row + (m & 1) * 8 + l % 8, 2 * k + (m >> 1)));
    return a;
  }
  // The same rows and values as right operands of X M^T: of rows row .. row + 7, and of the eight after.
  template <typename T>
  VK_DEVICE void right(FragmentB<T> (&b)[2], i32 row, i32 k) const {
    const i32 l = i32(lane_index()), m = l / 8;
    u32 w[4];
    load_matrices(w, chunk(row + (m >> 1) * 8 + l % 8, 2 * k + (m & 1)));
    b[0] = {{w[0], w[1]}}, b[1] = {{w[2], w[3]}};
  }
  // Rows row .. row + 15 as right operands of X M: of value chunk c, and of the chunk after.
  template <typename T>
  VK_DEVICE void right_transposed(FragmentB<T> (&b)[2], i32 row, i32 c) const {
    const i32 l = i32(lane_index()), m = l / 8;
    u32 w[4];
    load_matrices_transposed(w, chunk(row + (m & 1) * 8 + l % 8, c + (m >> 1)));
    b[0] = {{w[0], w[1]}}, b[1] = {{w[2], w[3]}};
  }
};

}  // namespace grid
}  // namespace vk
