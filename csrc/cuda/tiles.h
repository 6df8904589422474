// Tiles of 16-bit values in swizzled shared memory for blocks of four warps: how they are filled, read as operands, multiplied, and
// written.
#pragma once
#include "device/async.h"
#include "device/matrix.h"
#include "device/warp.h"

namespace vk {

constexpr i32 WARPS = 4, THREADS = 128;  // of a block
constexpr i32 CHUNK = 8;                 // 16-bit values of 16 bytes
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

// A tile of rows of DIM 16-bit values. 16-byte chunk c of row r lies at chunk c ^ (r % 8): eight rows of one chunk column are in eight
// different bank groups.
template <i32 DIM>
struct Tile {
  static constexpr i32 CHUNKS = DIM / CHUNK;
  Shared<u8> base;
  VK_DEVICE Shared<u8> chunk(i32 row, i32 c) const { return base + (row * CHUNKS + (c ^ (row & 7))) * 16; }

  // Rows `first` on of a head, asynchronously: `rows` of them; zeros from `end` on, past `dim`, and where `alive(row)` is false: what is
  // hidden may hold anything, and 0 times NaN is NaN.
  template <typename T, typename Alive>
  VK_DEVICE void fill(const T* from, i64 step, i32 first, i32 end, i32 rows, i32 dim, Alive alive) const {
    // Unrolled, its addresses would spill.
    VK_NO_UNROLL
    for (i32 i = i32(thread_index()); i < rows * CHUNKS; i += THREADS) {
      const i32 row = i / CHUNKS, c = i % CHUNKS;
      const bool there = first + row < end && c * CHUNK < dim && alive(first + row);
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
  // The transpose of rows row .. row + 15, value chunks c and c + 1: the left operand of M^T X, of 16 values by 16 rows.
  template <typename T>
  VK_DEVICE FragmentA<T> left_transposed(i32 row, i32 c) const {
    const i32 l = i32(lane_index()), m = l / 8;
    FragmentA<T> a;
    load_matrices_transposed(a.w, chunk(row + (m >> 1) * 8 + l % 8, c + (m & 1)));
    return a;
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

// A compile-time yes or no that a lambda takes as an argument.
template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

// Every row, for Tile::fill.
struct All {
  VK_DEVICE bool operator()(i32) const { return true; }
};
template <i32 N>
VK_DEVICE void clear(Accumulator (&a)[N]) {
  VK_UNROLL
  for (i32 n = 0; n < N; ++n) a[n] = {{0, 0, 0, 0}};
}

// s += A B^T of this warp's 16 rows of A (a tile, from row `row`) and of N rows of B from row `first`.
template <typename T, i32 DIM, i32 N>
VK_DEVICE void product(Accumulator (&s)[N / 8], const Tile<DIM>& a, i32 row, const Tile<DIM>& b, i32 first) {
  // Unrolled whole, the fragments loaded ahead would spill.
  VK_UNROLL_TWICE
  for (i32 d = 0; d < DIM / 16; ++d) {
    const FragmentA<T> left = a.template left<T>(row, d);
    VK_UNROLL
    for (i32 n = 0; n < N / 8; n += 2) {
      FragmentB<T> right[2];
      b.template right<T>(right, first + n * 8, d);
      multiply_add(s[n], left, right[0]);
      multiply_add(s[n + 1], left, right[1]);
    }
  }
}

// What the rounding of two neighbouring accumulators to the operand `kept` took from them, as an operand of its own.
template <typename T>
VK_DEVICE FragmentA<T> remainder(const FragmentA<T>& kept, const Accumulator& left, const Accumulator& right) {
  using N = Number<T>;
  FragmentA<T> r;
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    r.w[h] = N::pack(left.v[2 * h] - N::low(kept.w[h]), left.v[2 * h + 1] - N::high(kept.w[h]));
    r.w[h + 2] = N::pack(right.v[2 * h] - N::low(kept.w[h + 2]), right.v[2 * h + 1] - N::high(kept.w[h + 2]));
  }
  return r;
}

// out += P B of the N rows of B from row `first`. With PART, only in the rows that see them: P is 0 for the others, but 0 times a NaN that
// only others see is NaN. With WHOLE, P enters with what its rounding to T takes away, by a second product.
template <typename T, i32 DIM, i32 N, bool PART, bool WHOLE = false>
VK_DEVICE void gather(Accumulator (&out)[DIM / 8], const Accumulator (&p)[N / 8], const Tile<DIM>& b, i32 first, const bool (&sees)[2]) {
  FragmentA<T> left[N / 16], rest[WHOLE ? N / 16 : 1];
  VK_UNROLL
  for (i32 n = 0; n < N / 16; ++n) {
    left[n] = as_operand<T>(p[2 * n], p[2 * n + 1]);
    if constexpr (WHOLE) rest[n] = remainder(left[n], p[2 * n], p[2 * n + 1]);
  }
  VK_UNROLL
  for (i32 d = 0; d < DIM / 8; d += 2) {
    Accumulator part[2];
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i) part[j].v[i] = PART ? 0.0f : out[d + j].v[i];
    VK_UNROLL
    for (i32 n = 0; n < N / 16; ++n) {
      FragmentB<T> right[2];
      b.template right_transposed<T>(right, first + n * 16, d);
      if constexpr (WHOLE) {
        multiply_add(part[0], rest[n], right[0]);
        multiply_add(part[1], rest[n], right[1]);
      }
      multiply_add(part[0], left[n], right[0]);
      multiply_add(part[1], left[n], right[1]);
    }
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j)
      VK_UNROLL
      for (i32 i = 0; i < 4; ++i) {
        if (!PART) out[d + j].v[i] = part[j].v[i];
        else if (sees[i / 2]) out[d + j].v[i] += part[j].v[i];
      }
  }
}

}  // namespace vk
