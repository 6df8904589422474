// Products of warpgroups (wgmma.mma_async, compute capability 9.0a): 64 rows by N columns by 16 of depth, float32 sums. Four warps, of which the
// first has an index that is a multiple of 4, make them together. The sums are the accumulators of matrix.h, N / 8 of them: warp w % 4 holds
// rows 16 (w % 4) on, in which value i of accumulator n is row accumulator_row(i), column 8 n + accumulator_column(i). A left operand in
// registers is the FragmentA of a warp's 16 rows.
//
// Products are asynchronous: between products_begin() and products_wait() nothing may touch their sums or the registers of their left operands.
#pragma once
#include "matrix.h"

namespace vk {

// An operand in shared memory (PTX ISA, "Matrix Descriptor"), in panels of 128-byte rows with the swizzle of 128 bytes: 16-byte chunk c of
// row r of a panel lies at chunk c ^ (r % 8), as a copy of a box with that swizzle leaves it. Panels begin on 1024 bytes.
struct Described {
  u64 bits;
};
constexpr u64 SWIZZLE_128 = 1ull << 62;

VK_DEVICE u64 described_bytes(u32 bytes) { return u64((bytes & 0x3ffff) >> 4); }
// Rows of 64 values of depth: the operand's rows are the panel's, from a multiple of 8 on; `at` is where the first row's 16 values begin.
VK_DEVICE Described along(Shared<u8> at) { return {described_bytes(at.at) | 1ull << 16 | described_bytes(1024) << 32 | SWIZZLE_128}; }
// Rows of 64 of the operand's rows: depth goes from panel row to panel row, of which `at` is the first of 16, a multiple of 8. The next 64
// operand rows lie `panel` bytes further on.
VK_DEVICE Described across(Shared<u8> at, u32 panel) {
  return {described_bytes(at.at) | described_bytes(panel) << 16 | described_bytes(1024) << 32 | SWIZZLE_128};
}

#ifdef __CUDACC__

// Comes before the first product of a group, after what wrote its sums and left operands in registers.
VK_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
VK_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups are still under way.
template <int N>
VK_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Gives registers of this warpgroup's threads back, so that they keep N, or takes more, waiting until there are enough. A multiple of 8.
template <int N>
VK_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
VK_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <typename T, i32 N>
struct WarpgroupProduct;  // shared: both operands in shared memory; own: the left one in registers. keep: add to the sums, else begin anew

// One specialisation per type and width. Operands of an asm are numbered, so that a width says what comes behind its sums: A, B and on.
// clang-format off
#define VK_PAIR(n) "+f"(c[n].v[0]), "+f"(c[n].v[1]), "+f"(c[n].v[2]), "+f"(c[n].v[3]), \
    "+f"(c[n + 1].v[0]), "+f"(c[n + 1].v[1]), "+f"(c[n + 1].v[2]), "+f"(c[n + 1].v[3])
#define VK_SUMS_16 VK_PAIR(0)
#define VK_SUMS_32 VK_SUMS_16, VK_PAIR(2)
#define VK_SUMS_48 VK_SUMS_32, VK_PAIR(4)
#define VK_SUMS_64 VK_SUMS_48, VK_PAIR(6)
#define VK_SUMS_80 VK_SUMS_64, VK_PAIR(8)
#define VK_SUMS_96 VK_SUMS_80, VK_PAIR(10)
#define VK_SUMS_112 VK_SUMS_96, VK_PAIR(12)
#define VK_SUMS_128 VK_SUMS_112, VK_PAIR(14)
#define VK_SUMS_144 VK_SUMS_128, VK_PAIR(16)
#define VK_SUMS_160 VK_SUMS_144, VK_PAIR(18)
#define VK_SUMS_176 VK_SUMS_160, VK_PAIR(20)
#define VK_SUMS_192 VK_SUMS_176, VK_PAIR(22)
#define VK_SUMS_208 VK_SUMS_192, VK_PAIR(24)
#define VK_SUMS_224 VK_SUMS_208, VK_PAIR(26)
#define VK_SUMS_240 VK_SUMS_224, VK_PAIR(28)
#define VK_SUMS_256 VK_SUMS_240, VK_PAIR(30)
#define VK_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VK_NAMES_32 VK_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VK_NAMES_48 VK_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VK_NAMES_64 VK_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VK_NAMES_80 VK_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VK_NAMES_96 VK_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VK_NAMES_112 VK_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VK_NAMES_128 VK_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VK_NAMES_144 VK_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VK_NAMES_160 VK_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VK_NAMES_176 VK_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define VK_NAMES_192 VK_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VK_NAMES_208 VK_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VK_NAMES_224 VK_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define VK_NAMES_240 VK_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define VK_NAMES_256 VK_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define VK_WGMMA(T, type, N, A, B, KEEP, W1, W2, W3, KK)                                                                                  \
  template <>                                                                                                                             \
  struct WarpgroupProduct<T, N> {                                                                                                         \
    template <bool A_ACROSS, bool B_ACROSS>                                                                                               \
    static VK_DEVICE void shared(Accumulator (&c)[N / 8], Described a, Described b, bool keep) {                                          \
      asm volatile("{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " KEEP ", 0;\n\t"                                                          \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" VK_NAMES_##N "}, " A ", " B                       \
                   ", keep, 1, 1, " W1 ", " W2 ";\n\t}"                                                                                   \
                   : VK_SUMS_##N : "l"(a.bits), "l"(b.bits), "r"(i32(keep)), "n"(i32(A_ACROSS)), "n"(i32(B_ACROSS)) : "memory");          \
    }                                                                                                                                     \
    template <bool B_ACROSS>                                                                                                              \
    static VK_DEVICE void own(Accumulator (&c)[N / 8], const FragmentA<T>& a, Described b, bool keep) {                                   \
      asm volatile("{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " KK ", 0;\n\t"                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" VK_NAMES_##N "}, {" A ", " B ", " KEEP ", "       \
                   W1 "}, " W2 ", keep, 1, 1, " W3 ";\n\t}"                                                                               \
                   : VK_SUMS_##N                                                                                                          \
                   : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "l"(b.bits), "r"(i32(keep)), "n"(i32(B_ACROSS))                  \
                   : "memory");                                                                                                           \
    }                                                                                                                                     \
  };
VK_WGMMA(bf16, "bf16", 16, "%8", "%9", "%10", "%11", "%12", "%14", "%13")
VK_WGMMA(f16, "f16", 16, "%8", "%9", "%10", "%11", "%12", "%14", "%13")
VK_WGMMA(bf16, "bf16", 32, "%16", "%17", "%18", "%19", "%20", "%22", "%21")
VK_WGMMA(f16, "f16", 32, "%16", "%17", "%18", "%19", "%20", "%22", "%21")
VK_WGMMA(bf16, "bf16", 48, "%24", "%25", "%26", "%27", "%28", "%30", "%29")
VK_WGMMA(f16, "f16", 48, "%24", "%25", "%26", "%27", "%28", "%30", "%29")
VK_WGMMA(bf16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", "%38", "%37")
VK_WGMMA(f16, "f16", 64, "%32", "%33", "%34", "%35", "%36", "%38", "%37")
VK_WGMMA(bf16, "bf16", 80, "%40", "%41", "%42", "%43", "%44", "%46", "%45")
VK_WGMMA(f16, "f16", 80, "%40", "%41", "%42", "%43", "%44", "%46", "%45")
VK_WGMMA(bf16, "bf16", 96, "%48", "%49", "%50", "%51", "%52", "%54", "%53")
VK_WGMMA(f16, "f16", 96, "%48", "%49", "%50", "%51", "%52", "%54", "%53")
VK_WGMMA(bf16, "bf16", 112, "%56", "%57", "%58", "%59", "%60", "%62", "%61")
VK_WGMMA(f16, "f16", 112, "%56", "%57", "%58", "%59", "%60", "%62", "%61")
VK_WGMMA(bf16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", "%70", "%69")
VK_WGMMA(f16, "f16", 128, "%64", "%65", "%66", "%67", "%68", "%70", "%69")
VK_WGMMA(bf16, "bf16", 144, "%72", "%73", "%74", "%75", "%76", "%78", "%77")
VK_WGMMA(f16, "f16", 144, "%72", "%73", "%74", "%75", "%76", "%78", "%77")
VK_WGMMA(bf16, "bf16", 160, "%80", "%81", "%82", "%83", "%84", "%86", "%85")
VK_WGMMA(f16, "f16", 160, "%80", "%81", "%82", "%83", "%84", "%86", "%85")
VK_WGMMA(bf16, "bf16", 176, "%88", "%89", "%90", "%91", "%92", "%94", "%93")
VK_WGMMA(f16, "f16", 176, "%88", "%89", "%90", "%91", "%92", "%94", "%93")
VK_WGMMA(bf16, "bf16", 192, "%96", "%97", "%98", "%99", "%100", "%102", "%101")
VK_WGMMA(f16, "f16", 192, "%96", "%97", "%98", "%99", "%100", "%102", "%101")
VK_WGMMA(bf16, "bf16", 208, "%104", "%105", "%106", "%107", "%108", "%110", "%109")
VK_WGMMA(f16, "f16", 208, "%104", "%105", "%106", "%107", "%108", "%110", "%109")
VK_WGMMA(bf16, "bf16", 224, "%112", "%113", "%114", "%115", "%116", "%118", "%117")
VK_WGMMA(f16, "f16", 224, "%112", "%113", "%114", "%115", "%116", "%118", "%117")
VK_WGMMA(bf16, "bf16", 240, "%120", "%121", "%122", "%123", "%124", "%126", "%125")
VK_WGMMA(f16, "f16", 240, "%120", "%121", "%122", "%123", "%124", "%126", "%125")
VK_WGMMA(bf16, "bf16", 256, "%128", "%129", "%130", "%131", "%132", "%134", "%133")
VK_WGMMA(f16, "f16", 256, "%128", "%129", "%130", "%131", "%132", "%134", "%133")
#undef VK_WGMMA
#undef VK_PAIR
// clang-format on

// c += a b of both operands in shared memory; not keep: c = a b. A_ACROSS, B_ACROSS: made by across(), else by along().
template <typename T, i32 N, bool A_ACROSS = false, bool B_ACROSS = false>
VK_DEVICE void warpgroup_product(Accumulator (&c)[N / 8], Described a, Described b, bool keep) {
  WarpgroupProduct<T, N>::template shared<A_ACROSS, B_ACROSS>(c, a, b, keep);
}
// The same with the left operand in registers.
template <typename T, i32 N, bool B_ACROSS = false>
VK_DEVICE void warpgroup_product(Accumulator (&c)[N / 8], const FragmentA<T>& a, Described b, bool keep) {
  WarpgroupProduct<T, N>::template own<B_ACROSS>(c, a, b, keep);
}

#else

inline void products_begin(VK_AT_ONLY) { model::products_begin(at); }
inline void products_commit(VK_AT_ONLY) { model::products_commit(at); }
template <int N>
inline void products_wait(VK_AT_ONLY) {
  model::products_wait(N, at);
}
template <int N>
inline void registers_down(VK_AT_ONLY) {
  model::registers(N, false, at);
}
template <int N>
inline void registers_up(VK_AT_ONLY) {
  model::registers(N, true, at);
}
template <typename T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// c += a b of both operands in shared memory; not keep: c = a b. A_ACROSS, B_ACROSS: made by across(), else by along().
template <typename T, i32 N, bool A_ACROSS = false, bool B_ACROSS = false>
inline void warpgroup_product(Accumulator (&c)[N / 8], Described a, Described b, bool keep VK_AT) {
  model::warpgroup_product(&c[0].v[0], N, nullptr, a.bits, A_ACROSS, b.bits, B_ACROSS, keep, IS_BF16<T>, at);
}
template <typename T, i32 N, bool B_ACROSS = false>
inline void warpgroup_product(Accumulator (&c)[N / 8], const FragmentA<T>& a, Described b, bool keep VK_AT) {
  model::warpgroup_product(&c[0].v[0], N, a.w, 0, false, b.bits, B_ACROSS, keep, IS_BF16<T>, at);
}

#endif

}  // namespace vk
