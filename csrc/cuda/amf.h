// What the kernels of attention motion flow share: where keys lie in their frame, products of chunks of channels, and rows that leave.
#pragma once
#include "tiles.h"

namespace vk {
namespace amf {

struct Strides {  // elements between samples, groups, heads and tokens; the last stride is 1
  i64 batch, group, head, token;
};

template <typename T>
VK_DEVICE const T* group_of(const void* base, const Strides& by, i64 batch, i64 group) {
  return static_cast<const T*>(base) + batch * by.batch + group * by.group;
}

constexpr i32 STEP = 64;         // channels of a chunk
constexpr i32 BLOCK = 64;        // rows whose gradients are looked for together; 16 per warp
constexpr float LEAST = -3e38f;  // stands for -inf where a difference of two of them must not be NaN

VK_DEVICE i32 tiles_of(i32 n, i32 each) { return (n + each - 1) / each; }

struct alignas(8) Two {
  float a, b;
};

// A frame's tokens; its columns, and 1 / columns; how far the eighth key after another lies: 8 % columns and 8 / columns.
struct Frame {
  i32 size;
  float width, inverse, eight_x, eight_y;
};

// Column and row of a key in its frame: exact below 2^22 keys, since (key + 0.5) / width is half a key from any integer.
struct Place {
  float x, y;
  VK_DEVICE Place(i32 key, const Frame& f) {
    const float at = float(key);
    y = float(i32((at + 0.5f) * f.inverse));
    x = at - y * f.width;
  }
  VK_DEVICE void eight_on(const Frame& f) {
    x += f.eight_x, y += f.eight_y;
    if (x >= f.width) x -= f.width, y += 1.0f;
  }
};

// What a row's gradient says of its logits: dl = p (x X + y Y + rest) with (X, Y) a key's place relative to the frame's centre, and the
// row's log-sum-exp in base 2, infinite where it has no gradient.
struct alignas(16) Slope {
  float x, y, rest, lse;
  VK_DEVICE bool alive() const { return lse != infinity(); }
  VK_DEVICE float at(float product, const Place& key, float centre_x, float centre_y, float scale_log2) const {
    const float slope = x * (key.x - centre_x) + (y * (key.y - centre_y) + rest);
    return alive() ? exp2_approx(product * scale_log2 - lse) * slope : 0.0f;
  }
};
VK_DEVICE Slope no_slope() { return {0, 0, 0, infinity()}; }

// `rows` rows of a tile, asynchronously: chunk c of row r from `from(r, c)`; zeros where that is null, and `base` stands in.
template <i32 DIM, typename T, typename From>
VK_DEVICE void put(const Tile<DIM>& tile, i32 rows, const T* base, From from) {
  VK_NO_UNROLL
  for (i32 i = i32(thread_index()); i < rows * Tile<DIM>::CHUNKS; i += THREADS) {
    const i32 r = i / Tile<DIM>::CHUNKS, c = i % Tile<DIM>::CHUNKS;
    const T* there = from(r, c);
    copy16(tile.chunk(r, c), there == nullptr ? base : there, there == nullptr ? 0 : 16);
  }
}

// s[m] += A B^T of rows 64 m + 16 warp on of A and N rows of B from row `first`, A as fragments.
template <typename T, i32 DIM, i32 M, i32 N>
VK_DEVICE void multiply(Accumulator (&s)[M][N / 8], const FragmentA<T> (&a)[M][DIM / 16], const Tile<DIM>& b, i32 first) {
  VK_UNROLL
  for (i32 d = 0; d < DIM / 16; ++d)
    VK_UNROLL
    for (i32 n = 0; n < N / 8; n += 2) {
      FragmentB<T> right[2];
      b.template right<T>(right, first + n * 8, d);
      VK_UNROLL
      for (i32 m = 0; m < M; ++m) {
        multiply_add(s[m][n], a[m][d], right[0]);
        multiply_add(s[m][n + 1], a[m][d], right[1]);
      }
    }
}

// Products of 64 M rows with N keys, over `chunks` chunks of STEP channels each: `ask(i, c, a, b)` has chunk c of the operands of product
// i copied, `done(s, i)` takes what came of it. Two stages from shared byte `stages` on, one barrier a chunk. Words of A are (w & keep) ^
// flip.
template <typename T, i32 M, i32 N, typename Ask, typename Done>
VK_DEVICE void sweep(i32 products, i32 chunks, u32 stages, u32 keep, u32 flip, Ask ask, Done done) {
  constexpr u32 LEFT = M * BLOCK * STEP * 2, BOTH = LEFT + N * STEP * 2;
  const auto left_of = [&](u32 n) { return Tile<STEP>{shared_at<u8>(stages + n * BOTH)}; };
  const auto right_of = [&](u32 n) { return Tile<STEP>{shared_at<u8>(stages + n * BOTH + LEFT)}; };
  u32 stage = 0;
  ask(0, 0, left_of(0), right_of(0));
  copies_commit();
  for (i32 i = 0; i < products; ++i) {
    Accumulator s[M][N / 8];
    VK_UNROLL
    for (i32 m = 0; m < M; ++m) clear(s[m]);
    for (i32 c = 0; c < chunks; ++c) {
      // Chunk c is there, and nobody reads the one before any more, whose place the next one takes.
      copies_wait<0>(), block_barrier();
      if (c + 1 < chunks) ask(i, c + 1, left_of(stage ^ 1), right_of(stage ^ 1));
      else if (i + 1 < products) ask(i + 1, 0, left_of(stage ^ 1), right_of(stage ^ 1));
      copies_commit();
      const Tile<STEP> left = left_of(stage), right = right_of(stage);
      VK_UNROLL_TWICE
      for (i32 d = 0; d < STEP / 16; ++d) {
        FragmentA<T> a[M];
        VK_UNROLL
        for (i32 m = 0; m < M; ++m) {
          a[m] = left.template left<T>(m * BLOCK + i32(warp_index()) * 16, d);
          VK_UNROLL
          for (i32 w = 0; w < 4; ++w) a[m].w[w] = (a[m].w[w] & keep) ^ flip;
        }
        VK_UNROLL
        for (i32 n = 0; n < N / 8; n += 2) {
          FragmentB<T> b[2];
          right.template right<T>(b, n * 8, d);
          VK_UNROLL
          for (i32 m = 0; m < M; ++m) multiply_add(s[m][n], a[m], b[0]), multiply_add(s[m][n + 1], a[m], b[1]);
        }
      }
      stage ^= 1;
    }
    done(s, i);
  }
}

// This warp's 16 rows: accumulators times `factor`, through the warp's own rows of a tile that it alone still reads, so that they leave 16
// bytes at a time: chunk c of row n to `to(n, c)`, or nowhere where that is null.
template <typename T, i32 DIM, typename To>
VK_DEVICE void hand_over(const Accumulator (&out)[DIM / 8], float factor, const Tile<DIM>& tile, To to) {
  const i32 own = i32(warp_index()) * 16;
  warp_barrier();  // the warp has read what these rows held
  VK_UNROLL
  for (i32 d = 0; d < DIM / 8; ++d)
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h)
      store4(tile.chunk(own + accumulator_row(2 * h), d) + i32(lane_index() % 4) * 4,
             Number<T>::pack(out[d].v[2 * h] * factor, out[d].v[2 * h + 1] * factor));
  warp_barrier();  // and has written them
  VK_UNROLL_TWICE
  for (i32 i = i32(lane_index()); i < 16 * Tile<DIM>::CHUNKS; i += i32(WARP)) {
    const i32 n = i / Tile<DIM>::CHUNKS, c = i % Tile<DIM>::CHUNKS;
    T* at = to(n, c);
    if (at != nullptr) store16(at, load16(tile.chunk(own + n, c)));
  }
}

}  // namespace amf
}  // namespace vk
