#include "cpu/peak.h"

// The loop is written for GCC and Clang; elsewhere both rates are 0 and the bench falls back on matmul rates.
#if defined(_OPENMP) && defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))
#define VK_PEAK_FP32
#if defined(__AVX512BF16__)
#define VK_PEAK_BF16
#endif
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define VK_VECTOR_REGISTER "+v"
#else
#define VK_VECTOR_REGISTER "+w"
#endif
#endif

namespace vk {
namespace VK_ISA {

#if defined(VK_PEAK_FP32)
namespace {

constexpr int kSteps = 4096;  // about 10 us between two looks at the clock

#if defined(__AVX512F__)
using Vec = __m512;
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vec = __m256;
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vec __attribute__((vector_size(16)));
inline Vec fill(float x) { return Vec{x, x, x, x}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

struct Fp32 {
    using Acc = Vec;
    static constexpr double flops = 2.0 * sizeof(Vec) / sizeof(float);
    Vec a = fill(0.999f), b = fill(1e-3f);
    static Acc zero() { return fill(0.f); }
    // x -> 0.999 x + 0.001 stays near 1: neither infinities nor denormals change the speed.
    Acc step(Acc x) const { return multiply_add(x, a, b); }
};

#if defined(VK_PEAK_BF16)
struct Bf16 {
    using Acc = __m512;
    static constexpr double flops = 4.0 * sizeof(__m512) / sizeof(float);  // each lane takes two products
    __m512bh a = _mm512_cvtne2ps_pbh(fill(1e-3f), fill(1e-3f));
    static Acc zero() { return fill(0.f); }
    Acc step(Acc x) const { return _mm512_dpbf16_ps(x, a, a); }
};
#endif

// Twelve independent chains cover the latency of two multiply-add units (4 cycles each, 8 in flight) and, with the two
// factors, still fit the sixteen vector registers of the smaller tiers. They are named variables because an array is
// left in memory; the empty asm makes each result count as used.
#define VK_EACH_CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define VK_DECLARE(i) typename Unit::Acc x##i = Unit::zero();
#define VK_STEP(i) x##i = unit.step(x##i); asm volatile("" : VK_VECTOR_REGISTER(x##i));
#define VK_COUNT(i) +1

template <class Unit>
double rate(int threads, double seconds) {
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const Unit unit;
        VK_EACH_CHAIN(VK_DECLARE)
        double done = 0, elapsed = 0;
#pragma omp barrier
        const double start = omp_get_wtime();
        do {
            for (int i = 0; i < kSteps; ++i) {
                VK_EACH_CHAIN(VK_STEP)
            }
            done += double(kSteps) * (0 VK_EACH_CHAIN(VK_COUNT)) * Unit::flops;
            elapsed = omp_get_wtime() - start;
        } while (elapsed < seconds);
        total += done / elapsed;
    }
    return total;
}

}  // namespace

double peak_fp32(int threads, double seconds) { return rate<Fp32>(threads, seconds); }
#else
double peak_fp32(int, double) { return 0; }
#endif

#if defined(VK_PEAK_BF16)
double peak_bf16(int threads, double seconds) { return rate<Bf16>(threads, seconds); }
#else
double peak_bf16(int, double) { return 0; }
#endif

}  // namespace VK_ISA
}  // namespace vk
