// The instruction-set tier of a translation unit.
//
// Every hot source is compiled once per tier with -DVK_ISA=portable|avx2|avx512, and everything it defines lives in namespace
// vk::VK_ISA. Nothing inline and no std template may be instantiated outside that namespace: the linker keeps one copy of such a
// function for the whole library, and if it kept the AVX-512 one, an older processor would stop at an illegal instruction.
#pragma once

#ifndef VK_ISA
#error "compile with -DVK_ISA=portable, avx2 or avx512"
#endif

#define VK_TIER_portable 0
#define VK_TIER_avx2 1
#define VK_TIER_avx512 2
#define VK_PASTE_(a, b) a##b
#define VK_PASTE(a, b) VK_PASTE_(a, b)
#define VK_TIER VK_PASTE(VK_TIER_, VK_ISA)

#if defined(_MSC_VER) && !defined(__clang__)
#define VK_INLINE __forceinline
#elif VK_TIER > 0
// Micro-kernels must be inlined into their loops whatever the compiler's size estimate says.
#define VK_INLINE inline __attribute__((always_inline))
#else
#define VK_INLINE inline
#endif
