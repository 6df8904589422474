// What the lanes of a warp do together, the matrix instructions of compute capability 8.0 on, and the 16-bit types.
#include "executor_state.h"

namespace vk {
namespace model {

float shuffle_xor(float value, uint32_t mask, Where at) {
  struct Lane {
    float in, out;
    uint32_t mask;
  } mine{value, 0, mask};
  meet("shfl.sync.bfly", at, &mine, [](void** lanes) {
    for (uint32_t l = 0; l < LANES; ++l) {
      Lane& lane = *static_cast<Lane*>(lanes[l]);
      lane.out = static_cast<Lane*>(lanes[(l ^ lane.mask) % LANES])->in;
    }
  });
  return mine.out;
}

uint32_t ballot(bool value, Where at) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{value, 0};
  meet("vote.sync.ballot", at, &mine, [](void** lanes) {
    uint32_t bits = 0;
    for (uint32_t l = 0; l < LANES; ++l) bits |= uint32_t(static_cast<Lane*>(lanes[l])->in) << l;
    for (uint32_t l = 0; l < LANES; ++l) static_cast<Lane*>(lanes[l])->out = bits;
  });
  return mine.out;
}

void warp_barrier(Where at) {
  meet("bar.warp.sync", at, nullptr, [](void**) {
    std::vector<uint32_t> lanes;
    for (uint32_t l = 0; l < LANES; ++l) lanes.push_back(self->agent / LANES * LANES + l);
    join(lanes);
  });
}

void load_matrices(uint32_t (&w)[4], uint32_t row, bool transposed, Where at) {
  check_shared(row, 16, at);
  struct Lane {
    uint32_t* w;
    uint32_t row;
    bool transposed;
  } mine{w, row, transposed};
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", at, &mine, [at](void** lanes) {
    for (uint32_t m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (uint32_t r = 0; r < 8; ++r) {
        const uint32_t from = static_cast<Lane*>(lanes[8 * m + r])->row;
        record_read(cluster->fibers[self->agent / LANES * LANES + 8 * m + r], from, 16, at);
        std::memcpy(matrix[r], self->block->bytes.data() + from, 16);
      }
      for (uint32_t l = 0; l < LANES; ++l) {
        const uint32_t r = l / 4, c = l % 4 * 2;
        const Lane& lane = *static_cast<Lane*>(lanes[l]);
        // The manual does not say who reads, whoever gives an address or whoever receives: what is read must have been written before
        // either, and, kept for the former, has to be read before it is written anew.
        const Fiber& who = cluster->fibers[self->agent / LANES * LANES + l];
        const auto address = [&](uint32_t row) { return static_cast<Lane*>(lanes[8 * m + row])->row; };
        if (lane.transposed) {
          check_read(who, address(c) + 2 * r, at), check_read(who, address(c + 1) + 2 * r, at);
        } else {
          check_read(who, address(r) + 2 * c, at), check_read(who, address(r) + 2 * c + 2, at);
        }
        const uint16_t low = lane.transposed ? matrix[c][r] : matrix[r][c], high = lane.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        lane.w[m] = low | uint32_t(high) << 16;
      }
    }
    ++counts.matrix_loads;
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat, Where at) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
    bool bfloat;
  } mine{c, a, b, bfloat};
  meet("mma.sync", at, &mine, [](void** lanes) {
    const bool bf = static_cast<Lane*>(lanes[0])->bfloat;
    const std::vector<float>& halves = widened_halves();
    const auto widen = [bf, &halves](uint32_t half) { return bf ? float_of(half << 16) : halves[half]; };
    float A[16][16], B[16][8];
    double D[16][8] = {};
    for (uint32_t l = 0; l < LANES; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      const uint32_t g = l / 4, t = l % 4;
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t h = 0; h < 2; ++h) A[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = widen(lane.a[i] >> (16 * h) & 0xffff);
      for (uint32_t i = 0; i < 2; ++i)
        for (uint32_t h = 0; h < 2; ++h) B[2 * t + h + i * 8][g] = widen(lane.b[i] >> (16 * h) & 0xffff);
    }
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t k = 0; k < 16; ++k)
        for (uint32_t column = 0; column < 8; ++column) D[row][column] += double(A[row][k]) * double(B[k][column]);
    for (uint32_t l = 0; l < LANES; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = l / 4 + (i >> 1) * 8, column = l % 4 * 2 + (i & 1);
        lane.c[i] = float(lane.c[i] + D[row][column]);
      }
    }
    ++counts.products;
  });
}

const std::vector<float>& widened_halves() {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (uint32_t h = 0; h < 65536; ++h) all[h] = widen_f16(uint16_t(h));
    return all;
  }();
  return table;
}

uint16_t round_bf16(float f) {
  const uint32_t u = bits_of(f);
  if (f != f) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

uint16_t round_f16(float f) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x33000001) return uint16_t(sign);            // rounds to zero
  const int exponent = int(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const int shift = exponent < -14 ? 13 + (-14 - exponent) : 13;
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  const uint32_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
  // Normal numbers: the hidden bit adds one to the exponent field; a carry does the right thing in both cases.
  return uint16_t(sign | (exponent < -14 ? rounded : rounded + (uint32_t(exponent + 14) << 10)));
}

float widen_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
}

}  // namespace model
}  // namespace vk
