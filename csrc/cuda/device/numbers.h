// 16-bit floating-point types of our own, their conversions, and the exponentials of the softmax.
#pragma once
#include "platform.h"

namespace vk {

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

template <typename T>
struct Number;  // pack(low, high): two values rounded to nearest even, low in the lower half; low(word), high(word): back to float

#ifdef __CUDACC__

template <>
struct Number<bf16> {
  static VK_DEVICE u32 pack(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static VK_DEVICE float low(u32 w) { return __uint_as_float(w << 16); }
  static VK_DEVICE float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }
};

template <>
struct Number<f16> {
  static VK_DEVICE u32 pack(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
  static VK_DEVICE float low(u32 w) {
    float f;
    asm("{.reg .b16 l, h;\n\tmov.b32 {l, h}, %1;\n\tcvt.f32.f16 %0, l;}" : "=f"(f) : "r"(w));
    return f;
  }
  static VK_DEVICE float high(u32 w) {
    float f;
    asm("{.reg .b16 l, h;\n\tmov.b32 {l, h}, %1;\n\tcvt.f32.f16 %0, h;}" : "=f"(f) : "r"(w));
    return f;
  }
};

// 2^x with x = -inf giving 0; log2. Both approximate, about 2 ulp.
VK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_DEVICE float infinity() { return __int_as_float(0x7f800000); }
VK_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
// sum += v where `taken`: one instruction, of which no compiler keeps both outcomes.
VK_DEVICE void add_where(bool taken, float& sum, float v) {
  asm volatile("{.reg .pred p;\n\tsetp.ne.b32 p, %2, 0;\n\t@p add.f32 %0, %0, %1;}" : "+f"(sum) : "f"(v), "r"(u32(taken)));
}

#else

template <>
struct Number<bf16> {
  static u32 pack(float low, float high) { return model::round_bf16(low) | u32(model::round_bf16(high)) << 16; }
  static float low(u32 w) { return model::float_of(w << 16); }
  static float high(u32 w) { return model::float_of(w & 0xffff0000u); }
};

template <>
struct Number<f16> {
  static u32 pack(float low, float high) { return model::round_f16(low) | u32(model::round_f16(high)) << 16; }
  static float low(u32 w) { return model::widen_f16(u16(w)); }
  static float high(u32 w) { return model::widen_f16(u16(w >> 16)); }
};

inline float exp2_approx(float x) { return model::exp2_of(x); }
inline float log2_approx(float x) { return model::log2_of(x); }
inline float infinity() { return model::float_of(0x7f800000u); }
inline float max_of(float a, float b) { return model::max_of(a, b); }
inline void add_where(bool taken, float& sum, float v) {
  if (taken) sum += v;
}

#endif

}  // namespace vk
