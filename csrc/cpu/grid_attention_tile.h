// What the forward and the backward of grid attention share: block sizes, addressing of heads, packing of keys and values.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/segments.h"
#include "cpu/gemm.h"
#include "cpu/grid_attention.h"

namespace vk {
namespace VK_ISA {

// A block of scores is BLOCK_ROWS x 16 BLOCK_PANELS in fp32: with the keys and values it meets it stays in L2. The padding keeps
// the rows of a column from falling into the same cache sets.
constexpr int BLOCK_ROWS = 128;
constexpr int BLOCK_PANELS = 16;
constexpr int SCORE_STRIDE = BLOCK_PANELS * PANEL + 16;

// Polynomial degree of the exponential. Where probabilities are rounded to bf16 (2^-9) for the products, less will do: the forward
// keeps enough for its fp32 row sums and lse, the backward uses them for nothing else.
template <class T>
struct ExpDegree {
  static constexpr int forward = Steps<T>::PAIR == 2 ? 5 : 6, backward = Steps<T>::PAIR == 2 ? 4 : 6;
};

VK_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Cuts a workspace into 64-byte aligned arrays; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used;
  explicit Arena(void* memory) : base(static_cast<char*>(memory)), used(0) {
    if (base) used = (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    else used = 64;
  }
  template <class U>
  U* take(int64_t count) {
    U* p = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return p;
  }
};

template <class T>
VK_INLINE T* row_of(const Strided& x, int64_t b, int64_t h, int64_t token) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + token * x.l;
}

VK_INLINE Frames frames_of(const GridArgs& a, int64_t b) {
  Frames f;
  f.n_frames = a.n_frames, f.frame_len = a.frame_len, f.n_text = a.n_text;
  f.text_visible = a.text_visible, f.text_front = a.text_front;
  f.q_ptr = a.q_ptr, f.q_runs = a.q_runs, f.k_ptr = a.k_ptr, f.k_runs = a.k_runs;
  f.valid = a.valid ? a.valid + b * a.valid_stride : nullptr;
  f.kv_len = a.kv_len ? a.kv_len + b * a.kv_stride : nullptr;
  int64_t n = a.text_len ? a.text_len[b * a.text_stride] : a.n_text;
  f.text_keys = n < 0 ? 0 : n < a.n_text ? n : a.n_text;
  return f;
}

// Waking a second thread costs more than a problem of this size.
VK_INLINE int useful_threads(const GridArgs& a) {
  const double dense = static_cast<double>(a.batch) * a.heads * a.length * a.length * a.dim;
  return dense < 1e6 || a.threads < 1 ? 1 : a.threads;
}

// Merges neighbouring panels of a list into runs of k for the depth form; `lanes` is the width of B.
template <int PAIR>
VK_INLINE int make_runs(const int32_t* panel, int n, int64_t lanes, Run* runs) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (i && panel[i] == panel[i - 1] + 1)
      runs[count - 1].steps += PANEL / PAIR;
    else
      runs[count++] = Run{static_cast<ptrdiff_t>(panel[i]) * (PANEL / PAIR) * lanes, PANEL / PAIR};
  }
  return count;
}

// Row pointers of one panel of keys; null beyond its end.
template <class T>
VK_INLINE void panel_rows(const Strided& x, int64_t b, int64_t h, int64_t token, int count, const T** rows) {
  for (int j = 0; j < PANEL; ++j) rows[j] = j < count ? row_of<const T>(x, b, h, token + j) : nullptr;
}

// A key whose value is not finite must poison the queries that see it and no other, but a product over tokens multiplies every
// row by something, and 0 * NaN is NaN. So such values are packed as zeros and the key itself as NaN: the scores of that key are
// then NaN exactly where it is visible and masked away where it is not. The same holds for the key rows of dS K.
template <class T>
VK_INLINE Mask not_finite(const T* const* rows, int d) {
  Mask m = 0;
  for (int j = 0; j < PANEL; ++j)
    if (rows[j] && !finite_row(rows[j], d)) m = static_cast<Mask>(m | 1u << j);
  return m;
}

// One panel (16 tokens) in the depth form, rows in `skip` as zeros.
template <class T>
VK_INLINE void pack_depth_panel(const T* const* rows, int d, Mask skip, float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  for (int j = 0; j < PANEL; j += PAIR) {
    const T* pair[2];
    for (int s = 0; s < PAIR; ++s) pair[s] = (skip >> (j + s)) & 1 ? nullptr : rows[j + s];
    pack_depth(pair, d, dst);
    dst += padded(d);
  }
}

// Adds to {executed, useful} the score elements of one tile against one list: computed, and visible.
inline void count_work(int64_t* work, const Tile& tile, const KeyList& list, int rows, const uint8_t* mask_row) {
  int64_t useful = 0;
  for (int r = 0; r < tile.rows; ++r)
    for (int i = 0; i < list.n; ++i)
      for (unsigned m = list.mask[mask_row[r] * list.span + i]; m; m &= m - 1) ++useful;
  const int64_t executed = static_cast<int64_t>(rows) * list.n * PANEL;
#pragma omp atomic
  work[0] += executed;
#pragma omp atomic
  work[1] += useful;
}

}  // namespace VK_ISA
}  // namespace vk
