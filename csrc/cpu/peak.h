// The arithmetic ceilings of this machine, measured: what `vidkern bench` states every result against.
#pragma once

// peak_fp32: FLOP/s of multiply-adds on registers alone, summed over `threads` threads that run for `seconds` each; 0 if unknown.
// peak_bf16: the same for the bf16 dot product with fp32 accumulators; 0 where the tier has no such instruction.
#define VK_PEAK_TIER(tier)                         \
  namespace vk {                                   \
  namespace tier {                                 \
  double peak_fp32(int threads, double seconds);   \
  double peak_bf16(int threads, double seconds);   \
  }                                                \
  }
VK_PEAK_TIER(portable)
VK_PEAK_TIER(avx2)
VK_PEAK_TIER(avx512)
