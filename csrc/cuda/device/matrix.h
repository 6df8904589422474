// Matrix fragments of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type") and ldmatrix. Fragments are
// opaque but for the accumulator, whose value i of a lane is row accumulator_row(i), column accumulator_column(i) of the 16 x 8 tile.
#pragma once
#include "memory.h"
#include "numbers.h"

namespace vk {

template <typename T>
struct FragmentA {  // 16 x 16, row major
  u32 w[4];
};
template <typename T>
struct FragmentB {  // 16 x 8: k x n
  u32 w[2];
};
struct Accumulator {  // 16 x 8, float32
  float v[4];
};

VK_DEVICE i32 accumulator_row(i32 i) { return i32(lane_index() / 4) + (i >= 2 ? 8 : 0); }
VK_DEVICE i32 accumulator_column(i32 i) { return i32(lane_index() % 4) * 2 + (i & 1); }

#ifdef __CUDACC__

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8. Lane l receives of each matrix the values
// (l / 4, 2 (l % 4)) and the next one; transposed: those of the transposed matrix.
VK_DEVICE void load_matrices(u32 (&w)[4], Shared<u8> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(row.at)
               : "memory");
}
VK_DEVICE void load_matrices_transposed(u32 (&w)[4], Shared<u8> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(row.at)
               : "memory");
}
// c += a b
VK_DEVICE void multiply_add(Accumulator& c, const FragmentA<bf16>& a, const FragmentB<bf16>& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b.w[0]), "r"(b.w[1]));
}
VK_DEVICE void multiply_add(Accumulator& c, const FragmentA<f16>& a, const FragmentB<f16>& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b.w[0]), "r"(b.w[1]));
}

#else

inline void load_matrices(u32 (&w)[4], Shared<u8> row VK_AT) { model::load_matrices(w, row.at, false, at); }
inline void load_matrices_transposed(u32 (&w)[4], Shared<u8> row VK_AT) { model::load_matrices(w, row.at, true, at); }
inline void multiply_add(Accumulator& c, const FragmentA<bf16>& a, const FragmentB<bf16>& b VK_AT) {
  model::multiply_add(c.v, a.w, b.w, true, at);
}
inline void multiply_add(Accumulator& c, const FragmentA<f16>& a, const FragmentB<f16>& b VK_AT) {
  model::multiply_add(c.v, a.w, b.w, false, at);
}

#endif

// The A fragment that two neighbouring accumulators (columns 0-7 and 8-15) make when they are rounded to T: what a product feeds to the
// next one without leaving its registers.
template <typename T>
VK_DEVICE FragmentA<T> as_operand(const Accumulator& left, const Accumulator& right) {
  using N = Number<T>;
  return {{N::pack(left.v[0], left.v[1]), N::pack(left.v[2], left.v[3]), N::pack(right.v[0], right.v[1]), N::pack(right.v[2], right.v[3])}};
}

}  // namespace vk
