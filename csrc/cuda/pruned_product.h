// The product of the pruned layers for mma.sync (compute capability 8.0 on): out[:, out_cols] = residual + gate act(A B^T + partial + bias)
// with one rounding at the end. Operands arrive by cp.async in three stages of 64 values of depth, one barrier per stage; sums are float32.
// Sizes, strides and what is fused are run-time arguments. Every value is summed in a fixed order.
#pragma once
#include "pruned.h"

namespace vk {
namespace pruned {

struct Operand {
  const void* at;
  const i32 *rows, *cols;  // which memory rows and columns; null: all
  i64 step;                // elements between memory rows
};

struct Product {
  Operand a, b;  // [m, k] and [n, k]; across: [k, m] and [k, n] in memory
  void *out, *u;  // u: the sum before the activation, in the operands' type
  const void* residual;
  const float *bias, *gate, *partial;
  const i32 *out_rows, *out_cols;
  i64 out_step, u_step, residual_step, partial_step;
  // Of pairs n counts, gate_group: rows that share a row of the gate; half: rows of B from a pair's gate to its value.
  i32 m, n, k, half, gate_group, act;
  i32 wide;    // out and residual are float32
  i32 listed;  // operands have lists of columns, or rows that do not lie on 16 bytes
};

constexpr i32 DEPTH = 64, STAGES = 3;

// A block's tile of the result and its warps' parts; A and B: how the operands lie.
template <i32 ROWS_, i32 COLUMNS_, i32 WARP_ROWS_, i32 WARP_COLUMNS_>
struct Shape {
  static constexpr i32 ROWS = ROWS_, COLUMNS = COLUMNS_, WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_;
  static constexpr i32 ACROSS = COLUMNS / WARP_COLUMNS, THREADS = ROWS / WARP_ROWS * ACROSS * i32(WARP);
};
using Large = Shape<128, 128, 64, 32>;
using Small = Shape<64, 64, 32, 32>;

// Eight values where they lie one by one.
VK_DEVICE Words collect(const u16* row, const Place& at) {
  Words w;
  VK_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    const u32 low = 2 * i < at.count ? load(row + at.of(2 * i)) : 0;
    const u32 high = 2 * i + 1 < at.count ? load(row + at.of(2 * i + 1)) : 0;
    w.w[i] = low | high << 16;
  }
  return w;
}

// A stage of an operand as it lies in memory: COUNT lines, of which line r holds values `first` on (to at most `end`) of the operand's row
// number(r); zeros beyond, and where number(r) < 0. Not LISTED: rows are 16-byte aligned and without a list of columns.
template <typename T, i32 COUNT, i32 THREADS, bool LISTED, i32 WIDTH, typename Numbers>
VK_DEVICE void fill(const Tile<WIDTH>& tile, const Operand& o, i32 first, i32 end, Numbers number) {
  constexpr i32 CHUNKS = WIDTH / CHUNK;
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < COUNT * CHUNKS; i += THREADS) {
    const i32 line = i / CHUNKS, c = i % CHUNKS, n = number(line), column = first + c * CHUNK;
    const Shared<u8> to = tile.chunk(line, c);
    const T* row = static_cast<const T*>(o.at);
    if (n < 0 || column >= end) {
      copy16(to, row, 0);
      continue;
    }
    row += i64(o.rows == nullptr ? n : load(o.rows + n)) * o.step;
    if constexpr (LISTED) {
      const Place at(o.cols, column, end);
      if (at.run && on_16_bytes(row + at.first)) copy16(to, row + at.first, u32(at.count * 2));
      else store16(to, collect(reinterpret_cast<const u16*>(row), at));
    } else {
      copy16(to, row + column, u32(least(end - column, CHUNK) * 2));
    }
  }
}

// Of a stage that holds 64 values of depth, or ACROSS 64 lines of depth: rows `row` to row + 15 of the operand at depth 16 k to 16 k + 15.
template <typename T, bool ACROSS, i32 WIDTH>
VK_DEVICE FragmentA<T> left(const Tile<WIDTH>& tile, i32 row, i32 k) {
  if constexpr (ACROSS) return tile.template left_transposed<T>(k * 16, row / CHUNK);
  else return tile.template left<T>(row, k);
}
template <typename T, bool ACROSS, i32 WIDTH>
VK_DEVICE void right(FragmentB<T> (&b)[2], const Tile<WIDTH>& tile, i32 row, i32 k) {
  if constexpr (ACROSS) tile.template right_transposed<T>(b, k * 16, row / CHUNK);
  else tile.template right<T>(b, row, k);
}

// The block's sums on their way out: float32, chunk c of four of row r at c ^ (r % 8).
template <i32 WIDTH>
struct Sums {
  VK_DEVICE static Shared<u8> chunk(i32 row, i32 c) { return shared_at<u8>(0) + (row * (WIDTH / 4) + (c ^ (row & 7))) * 16; }
  VK_DEVICE static void put(i32 row, i32 column, float v) { store4(chunk(row, column / 4) + column % 4 * 4, bits_of(v)); }
  VK_DEVICE static Eight eight(i32 row, i32 column) {
    Eight x;
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const Words w = load16(chunk(row, column / 4 + h));
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i) x.v[4 * h + i] = float_of(w.w[i]);
    }
    return x;
  }
};

// To out, whose values are E, as the residual's are.
template <typename E>
VK_DEVICE void write(const Product& p, i32 row, i32 column, Eight& z) {
  const Place at(p.out_cols, column, p.n);
  if (p.residual != nullptr) add(z, take(static_cast<const E*>(p.residual) + row * p.residual_step, at));
  const i64 to = p.out_rows == nullptr ? row : load(p.out_rows + row);
  leave(static_cast<E*>(p.out) + to * p.out_step, at, z);
}

// Eight sums of a row, and of pairs those of their values: all that is fused into the end.
template <typename T, bool PAIRS>
VK_DEVICE void finish(const Product& p, i32 row, i32 column, Eight& z, Eight& second) {
  const Place at(nullptr, column, p.n);
  if (p.partial != nullptr) add(z, take(p.partial + row * p.partial_step, at));
  if (p.bias != nullptr) {
    add(z, take(p.bias, at));
    if (PAIRS) add(second, take(p.bias + p.half, at));
  }
  if (p.u != nullptr) {
    T* u = static_cast<T*>(p.u) + row * p.u_step;
    leave(u, at, z);
    if (PAIRS) leave(u + p.half, at, second);
  }
  if (PAIRS || p.act != NONE) {
    VK_UNROLL
    for (i32 i = 0; i < CHUNK; ++i) z.v[i] = PAIRS ? activate(z.v[i], SILU) * second.v[i] : activate(z.v[i], p.act);
  }
  if (p.gate != nullptr) multiply(z, take(p.gate + i64(row / p.gate_group) * p.n, at));
  if (p.wide) write<float>(p, row, column, z);
  else write<T>(p, row, column, z);
}

// Tile (tile_row, tile_column) of the result. PAIRS: its columns are pairs, half as many; the operand's lines are eight gates, their eight
// values, and so on. Shared memory: STAGES (ROWS + COLUMNS) DEPTH values.
template <typename T, typename S, bool A_ACROSS, bool B_ACROSS, bool PAIRS>
VK_DEVICE void tile(const Product& p, i32 tile_row, i32 tile_column) {
  using A = Tile<A_ACROSS ? S::ROWS : DEPTH>;
  using B = Tile<B_ACROSS ? S::COLUMNS : DEPTH>;
  constexpr i32 WRITTEN = PAIRS ? S::COLUMNS / 2 : S::COLUMNS, A_BYTES = S::ROWS * DEPTH * 2, BYTES = A_BYTES + S::COLUMNS * DEPTH * 2;
  const i32 row0 = tile_row * S::ROWS, column0 = tile_column * WRITTEN, count = (p.k + DEPTH - 1) / DEPTH;
  const auto stage_a = [](i32 i) { return A{shared_at<u8>(u32(i % STAGES * BYTES))}; };
  const auto stage_b = [](i32 i) { return B{shared_at<u8>(u32(i % STAGES * BYTES + A_BYTES))}; };
  const auto ask_as = [&](i32 i, auto form) {
    constexpr bool LISTED = decltype(form)::value;
    const i32 k0 = i * DEPTH;
    const auto depth = [&](i32 line) { return k0 + line < p.k ? k0 + line : -1; };
    if constexpr (A_ACROSS) {
      fill<T, DEPTH, S::THREADS, LISTED>(stage_a(i), p.a, row0, p.m, depth);
    } else {
      fill<T, S::ROWS, S::THREADS, LISTED>(stage_a(i), p.a, k0, p.k, [&](i32 line) { return row0 + line < p.m ? row0 + line : -1; });
    }
    if constexpr (B_ACROSS) {
      fill<T, DEPTH, S::THREADS, LISTED>(stage_b(i), p.b, column0, p.n, depth);
    } else {
      fill<T, S::COLUMNS, S::THREADS, LISTED>(stage_b(i), p.b, k0, p.k, [&](i32 line) {
        const i32 column = column0 + (PAIRS ? line / 16 * 8 + line % 8 : line);
        return column >= p.n ? -1 : PAIRS && line & 8 ? column + p.half : column;
      });
    }
  };
  const auto ask = [&](i32 i) {
    if (p.listed) ask_as(i, Flag<true>{});
    else ask_as(i, Flag<false>{});
  };

  constexpr i32 M = S::WARP_ROWS / 16, N = S::WARP_COLUMNS / 8;
  const i32 own_row = i32(warp_index()) / S::ACROSS * S::WARP_ROWS, own_column = i32(warp_index()) % S::ACROSS * S::WARP_COLUMNS;
  Accumulator sums[M][N];
  VK_UNROLL
  for (i32 m = 0; m < M; ++m) clear(sums[m]);

  VK_UNROLL
  for (i32 i = 0; i < STAGES - 1; ++i) {
    if (i < count) ask(i);
    copies_commit();
  }
  VK_NO_UNROLL
  for (i32 i = 0; i < count; ++i) {
    // Stage i is there, and nobody reads stage i - 1 any more, whose place the next one asked for takes.
    copies_wait<STAGES - 2>();
    block_barrier();
    if (i + STAGES - 1 < count) ask(i + STAGES - 1);
    copies_commit();
    const A a = stage_a(i);
    const B b = stage_b(i);
    VK_UNROLL
    for (i32 k = 0; k < DEPTH / 16; ++k) {
      FragmentA<T> own[M];
      VK_UNROLL
      for (i32 m = 0; m < M; ++m) own[m] = left<T, A_ACROSS>(a, own_row + m * 16, k);
      VK_UNROLL
      for (i32 n = 0; n < N; n += 2) {
        FragmentB<T> other[2];
        right<T, B_ACROSS>(other, b, own_column + n * 8, k);
        VK_UNROLL
        for (i32 m = 0; m < M; ++m) {
          multiply_add(sums[m][n], own[m], other[0]);
          multiply_add(sums[m][n + 1], own[m], other[1]);
        }
      }
    }
  }
  copies_wait<0>();
  block_barrier();  // the sums take the stages' place
  VK_UNROLL
  for (i32 m = 0; m < M; ++m)
    VK_UNROLL
    for (i32 n = 0; n < N; ++n)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i)
        Sums<S::COLUMNS>::put(own_row + m * 16 + accumulator_row(i), own_column + n * 8 + accumulator_column(i), sums[m][n].v[i]);
  block_barrier();
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < S::ROWS * (WRITTEN / CHUNK); i += S::THREADS) {
    const i32 row = i / (WRITTEN / CHUNK), c = i % (WRITTEN / CHUNK) * CHUNK;
    if (row0 + row >= p.m || column0 + c >= p.n) continue;
    Eight z = Sums<S::COLUMNS>::eight(row, PAIRS ? 2 * c : c), second{};
    if (PAIRS) second = Sums<S::COLUMNS>::eight(row, 2 * c + CHUNK);
    finish<T, PAIRS>(p, row0 + row, column0 + c, z, second);
  }
}

// The whole product, a tile per block: eight rows of tiles at a time, column after column, so that what is read stays in the L2 cache.
template <typename T, typename S, bool A_ACROSS, bool B_ACROSS, bool PAIRS>
VK_DEVICE void product(const Product& p) {
  constexpr i32 WRITTEN = PAIRS ? S::COLUMNS / 2 : S::COLUMNS;
  const i32 rows = (p.m + S::ROWS - 1) / S::ROWS, columns = (p.n + WRITTEN - 1) / WRITTEN, pid = i32(block_index());
  const i32 band = pid / (8 * columns), here = least(rows - band * 8, 8), within = pid % (8 * columns);
  tile<T, S, A_ACROSS, B_ACROSS, PAIRS>(p, band * 8 + within % here, within / here);
}

}  // namespace pruned
}  // namespace vk

#define VK_PRUNED(name, T, S, ...)                                          \
  VK_KERNEL(vk::pruned::S::THREADS) name(const vk::pruned::Product given) { \
    vk::pruned::product<vk::T, vk::pruned::S, __VA_ARGS__>(given);          \
  }                                                                         \
  VK_ENTRY(name, vk::pruned::Product)
#define VK_PRUNED_FORMS(form, ...)                     \
  VK_PRUNED(form##_f16_128, f16, Large, __VA_ARGS__)   \
  VK_PRUNED(form##_f16_64, f16, Small, __VA_ARGS__)    \
  VK_PRUNED(form##_bf16_128, bf16, Large, __VA_ARGS__) \
  VK_PRUNED(form##_bf16_64, bf16, Small, __VA_ARGS__)
