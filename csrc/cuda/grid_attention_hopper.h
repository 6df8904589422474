// What the kernels of grid attention for compute capability 9.0a share: how a producer warpgroup brings tiles of rows into panels, which
// columns of a tile are seen, and how a warp's rows leave through panels.
//
// Warpgroup 0 produces, the others multiply. Tiles that every row sees whole come by boxes, which one thread asks for. All else comes by
// cp.async of the whole warpgroup, zeros for what is hidden: hidden values may be NaN.
#pragma once
#include "grid_attention.h"
#include "hopper.h"

namespace vk {
namespace grid {

using hopper::GROUP;
using hopper::group_index;
using hopper::leads;
using hopper::Panels;
using hopper::Ring;

constexpr u32 PRODUCERS = 1;  // the named barrier of the producer warpgroup; those of warpgroup g: PRODUCERS + g

// Column tile i of a program, WIDTH columns if main: main tiles first, which all rows see whole.
template <i32 WIDTH>
VK_DEVICE Columns columns_at(const Program& p, const i32* main, const i32* edge, i32 i) {
  if (i < p.main_count) {
    const i32 first = load(main + p.main_first + i);
    return {first, first + WIDTH, 0, 0x7fffffff};
  }
  const i32* e = edge + 4 * (p.edge_first + i - p.main_count);
  return {load(e), load(e + 1), load(e + 2), load(e + 3)};
}

// Rows `first` on of a head of a sample, by one thread; their bytes are counted at `full`, which was told to expect Panels::BYTES.
template <i32 ROWS, i32 DIM>
VK_DEVICE void ask(const Panels<ROWS, DIM>& to, const TensorMap& map, i32 first, i32 head, i32 batch, Shared<u64> full) {
  VK_UNROLL
  for (i32 n = 0; n < Panels<ROWS, DIM>::COUNT; ++n) copy_box(to.panel(n), map, n * hopper::PANEL, first, head, batch, full);
}

// Rows `first` on of a head, asynchronously by the producer warpgroup: `rows` of them; zeros from `end` on, past `dim`, and where
// `alive(row)` is false. Ends a group of copies.
template <typename T, i32 ROWS, i32 DIM, typename Alive>
VK_DEVICE void fill(const Panels<ROWS, DIM>& to, const T* from, i64 step, i32 first, i32 end, i32 rows, i32 dim, Alive alive) {
  constexpr i32 CHUNKS = DIM / hopper::CHUNK;
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < rows * CHUNKS; i += GROUP) {
    const i32 row = i / CHUNKS, c = i % CHUNKS;
    const bool there = first + row < end && c * hopper::CHUNK < dim && alive(first + row);
    copy16(to.chunk(row, c), from + (first + row) * step + c * hopper::CHUNK, there ? 16 : 0);
  }
  copies_commit();
}

// The producer warpgroup's copies but for its last LAG groups are there: the stage they filled is full. Its barrier counts one arrival.
template <int LAG>
VK_DEVICE void filled(Shared<u64> full) {
  copies_wait<LAG>();
  async_fence();
  named_barrier(PRODUCERS, GROUP);
  if (thread_index() == 0) mbarrier_arrive(full);
}

// Which of N columns are there and alive: a bit each, of which every lane looks at its own in every 32.
template <i32 N>
struct Seen {
  u32 words[(N + 31) / 32];
  VK_DEVICE bool operator()(i32 n, i32 i) const { return words[n / 4] >> (n % 4 * 8 + accumulator_column(i)) & 1; }
};
template <i32 N, bool LIVE>
VK_DEVICE Seen<N> seen_of(const Columns& at, const u8* live) {
  Seen<N> seen;
  VK_UNROLL
  for (i32 n = 0; n < (N + 31) / 32; ++n) {
    const i32 column = at.first + n * 32 + i32(lane_index());
    seen.words[n] = votes(column < at.end && (!LIVE || (load(live + column) & 1)));
  }
  return seen;
}

// This warp's 16 rows of a head, from row `row` to at most `end`: the accumulators times factor[of the lane's two rows], through rows `own`
// on of a tile that nobody but this warp touches any more, so that they leave 16 bytes at a time.
template <typename T, i32 ROWS, i32 DIM>
VK_DEVICE void leave(T* to, i64 step, const Accumulator (&out)[DIM / 8], const float (&factor)[2], const Panels<ROWS, DIM>& tile, i32 own,
                     i32 row, i32 end, i32 dim) {
  constexpr i32 CHUNKS = DIM / hopper::CHUNK;
  warp_barrier();
  VK_UNROLL
  for (i32 d = 0; d < DIM / 8; ++d)
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h)
      store4(tile.chunk(own + accumulator_row(2 * h), d) + i32(lane_index() % 4) * 4,
             Number<T>::pack(out[d].v[2 * h] * factor[h], out[d].v[2 * h + 1] * factor[h]));
  warp_barrier();
  VK_NO_UNROLL
  for (i32 i = i32(lane_index()); i < 16 * CHUNKS; i += i32(WARP)) {
    const i32 n = i / CHUNKS, c = i % CHUNKS;
    if (row + n < end && c * hopper::CHUNK < dim) store16(to + (row + n) * step + c * hopper::CHUNK, load16(tile.chunk(own + n, c)));
  }
}

}  // namespace grid
}  // namespace vk
