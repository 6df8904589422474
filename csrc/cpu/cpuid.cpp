#include "cpu/cpuid.h"

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#define VK_X86
#endif

namespace vk {

const char* const isa_names[ISA_COUNT] = {"portable", "avx2", "avx512"};

#ifdef VK_X86
namespace {

struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r{0, 0, 0, 0};
#ifdef _MSC_VER
  int v[4];
  __cpuid(v, 0);
  if (static_cast<uint32_t>(v[0]) < leaf) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(sub));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]), static_cast<uint32_t>(v[3])};
#else
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The register state the operating system saves: without it the instructions fault whatever cpuid says of the processor.
uint64_t saved_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;  // OSXSAVE
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

bool has(uint32_t reg, uint32_t bits) { return (reg & bits) == bits; }

}  // namespace
#endif

bool isa_supported(Isa isa) {
  if (isa == PORTABLE) return true;
#ifdef VK_X86
  const uint64_t state = saved_state();
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  // FMA (12), AVX (28), F16C (29); AVX2 (5).
  const bool avx2 = (state & 0x6) == 0x6 && has(one.c, 1u << 12 | 1u << 28 | 1u << 29) && has(seven.b, 1u << 5);
#ifdef VK_HAVE_AVX2
  if (isa == AVX2) return avx2;
#endif
#ifdef VK_HAVE_AVX512
  // AVX-512 F (16), DQ (17), BW (30), VL (31), and BF16 (leaf 7.1 EAX 5).
  if (isa == AVX512)
    return avx2 && (state & 0xe6) == 0xe6 && has(seven.b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && has(cpuid(7, 1).a, 1u << 5);
#endif
  (void)avx2;
#endif
  return false;
}

}  // namespace vk
