// Operands of wgmma in shared memory: what a matrix descriptor says (PTX ISA, "Shared Memory Matrix Layout", "Strides", "Matrix Descriptor
// Format"), and the arithmetic of one warp's part of a product. Pure: no state of a launch.
//
// The canonical layouts, in chunks of 16 bytes, of which a swizzled row has W = 8, 4, 2 for 128, 64, 32 bytes (1: none). An operand has N rows
// (of A: 64) and a depth of 16; chunks stand along the depth (K-major, `along`) or along the rows (MN-major, `across`):
//   along:  row r, depth 8 h:  8 rows of a group W chunks apart, groups `stride` apart, h = 1 next to h = 0; without a swizzle `leading` apart.
//   across: rows 8 j, depth k: W chunks next to each other, then `leading` to the next W; 8 depths W chunks apart, groups of them `stride`
//           apart. Without a swizzle chunks along the rows are `stride` apart, groups of 8 depths `leading`.
// The swizzle exchanges bits 4 on of the address with their exclusive or with bits 7 on: 3, 2, 1 bits of them. It is one of absolute
// addresses, counted from where the pattern begins ("base offset").
#pragma once
#include <cstdint>
#include <string>

#include "executor_state.h"

namespace vk {
namespace model {

constexpr uint32_t DEPTH = 16, CHUNK = 8;  // values of depth of one product; of a chunk
constexpr uint32_t MOST_COLUMNS = 256, WARP_ROWS = 16, GROUP_ROWS = 64;

struct Operand {
  uint32_t start, leading, stride, base;  // bytes; base: lines of 128 bytes
  uint32_t width;                         // chunks of a swizzled row: 8, 4, 2, or 1 without a swizzle
  bool across;

  uint32_t swizzled(uint32_t byte) const { return byte ^ ((((byte >> 7) - base) & (width - 1)) << 4); }
  // Where chunk i lies: along, depth 8 (i % 2) on of row i / 2; across, rows 8 (i / 16) on at depth i % 16. Two for each row in both.
  uint32_t chunk(uint32_t i) const {
    uint32_t line;
    if (across) {
      const uint32_t j = i / DEPTH, k = i % DEPTH;
      line = width == 1 ? j * stride + k % 8 * 16 + k / 8 * leading : j % width * 16 + j / width * leading + k % 8 * width * 16 + k / 8 * stride;
    } else {
      const uint32_t row = i / 2, h = i % 2;
      line = row / 8 * stride + row % 8 * width * 16 + h * (width == 1 ? leading : 16);
    }
    return swizzled(start + line);
  }
};
inline uint32_t chunks_of(uint32_t rows) { return 2 * rows; }

// Why a descriptor of an operand of `rows` rows cannot be read, or nothing.
inline std::string decode(Operand& o, uint64_t bits, bool across, uint32_t rows) {
  const auto field = [bits](uint32_t from) { return uint32_t(bits >> from & 0x3fff) << 4; };
  o = {field(0), field(16), field(32), uint32_t(bits >> 49 & 7), bits >> 62 ? 16u >> (bits >> 62) : 1u, across};
  if (bits & (3ull << 14 | 3ull << 30 | 7ull << 46 | 1023ull << 52)) return "has bits set that mean nothing";
  if (o.width == 1) return o.base ? "has a base offset and no swizzle" : "";
  const uint32_t in_pattern = (o.start - o.base * 128) % (8 * o.width * 16), chunk = in_pattern / 16;
  const uint32_t most = across ? (rows / CHUNK < o.width ? rows / CHUNK : o.width) : DEPTH / CHUNK;
  if (chunk >= o.width) return "begins in row " + std::to_string(chunk / o.width) + " of the pattern of its swizzle, expected 0";
  if (chunk + most > o.width) return "begins at chunk " + std::to_string(chunk) + " of a swizzled row and reaches beyond its end";
  return "";
}

inline void widen(float* to, const uint16_t* from, uint32_t count, bool bfloat) {
  const float* table = widened_halves().data();
  if (bfloat)
    for (uint32_t i = 0; i < count; ++i) to[i] = float_of(uint32_t(from[i]) << 16);
  else
    for (uint32_t i = 0; i < count; ++i) to[i] = table[from[i]];
}
// `rows` rows from row `first` on, both multiples of 8, as [DEPTH, rows] values.
inline void gather(float* to, const Operand& o, const uint8_t* shared, uint32_t first, uint32_t rows, bool bfloat) {
  uint16_t raw[CHUNK];
  float values[CHUNK];
  const uint32_t chunks = chunks_of(rows);
  for (uint32_t i = 0; i < chunks; ++i) {
    std::memcpy(raw, shared + o.chunk(chunks_of(first) + i), sizeof raw);
    if (o.across) {
      widen(to + i % DEPTH * rows + i / DEPTH * CHUNK, raw, CHUNK, bfloat);
    } else {
      widen(values, raw, CHUNK, bfloat);
      for (uint32_t k = 0; k < CHUNK; ++k) to[(i % 2 * CHUNK + k) * rows + i / 2] = values[k];
    }
  }
}

// sums [16, n] += a^T b for a [DEPTH, 16], b [DEPTH, n]: products are exact in float32, their sum is rounded once. Tensor cores round in a way
// of their own, which nobody states.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("arch=haswell", "default")))
#endif
inline void
accumulate(float* sums, const float* a, const float* b, uint32_t n) {
  double right[DEPTH][MOST_COLUMNS], row[MOST_COLUMNS];
  for (uint32_t k = 0; k < DEPTH; ++k)
    for (uint32_t c = 0; c < n; ++c) right[k][c] = b[k * n + c];
  for (uint32_t r = 0; r < WARP_ROWS; ++r) {
    for (uint32_t c = 0; c < n; ++c) row[c] = 0;
    for (uint32_t k = 0; k < DEPTH; k += 4) {  // four depths for one load and store of the row
      const double w = a[k * WARP_ROWS + r], x = a[(k + 1) * WARP_ROWS + r], y = a[(k + 2) * WARP_ROWS + r], z = a[(k + 3) * WARP_ROWS + r];
      for (uint32_t c = 0; c < n; ++c) row[c] += w * right[k][c] + x * right[k + 1][c] + y * right[k + 2][c] + z * right[k + 3][c];
    }
    for (uint32_t c = 0; c < n; ++c) sums[r * n + c] = float(double(sums[r * n + c]) + row[c]);
  }
}

}  // namespace model
}  // namespace vk
