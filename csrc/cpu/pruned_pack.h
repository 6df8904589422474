// Packing for the pruned layers: an operand becomes panels [outer / W][k lanes][W], zero beyond its edges.
//
// Whatever a pruned layer does to its operands (gathered channels, normalised tokens, picked slabs of a weight) happens here, on the
// way into the panels, so that the product itself sees none of it.
#pragma once

#include "cpu/gemm.h"
#include "cpu/pruned.h"

namespace vk {
namespace VK_ISA {

constexpr int NR = NP * LANES;
constexpr int STAGE = 1024;  // lanes of a row that are staged at a time

VK_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}
VK_INLINE int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

VK_INLINE F16 load_some(const float* p, int64_t left) {
  if (left >= LANES) return load(p);
  float lanes[LANES] = {};
  memcpy(lanes, p, static_cast<size_t>(left) * 4);
  return load(lanes);
}
template <class U>
VK_INLINE void store_some(U* p, F16 v, int64_t left) {
  if (left >= LANES) {
    store(p, v);
    return;
  }
  U lanes[LANES];
  store(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(left) * sizeof(U));
}

// 16 x 16 lanes: dst[i] holds lane i of every source row.
VK_INLINE void transpose(const float* const* src, ptrdiff_t at, F16* dst) {
#if VK_TIER == 2
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src[i] + at);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  // r[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 lo = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), hi = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 lo2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88), hi2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    dst[c].v = _mm512_shuffle_f32x4(lo, lo2, 0x88);
    dst[c + 8].v = _mm512_shuffle_f32x4(lo, lo2, 0xdd);
    dst[c + 4].v = _mm512_shuffle_f32x4(hi, hi2, 0x88);
    dst[c + 12].v = _mm512_shuffle_f32x4(hi, hi2, 0xdd);
  }
#else
  float block[LANES][LANES];
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) memcpy(&block[j][i], src[i] + at + j, 4);
  for (int i = 0; i < LANES; ++i) dst[i] = load(block[i]);
#endif
}

// Sixteen neighbours of the outer dimension at one lane of k, into panels of W whose starts are `step` apart.
template <int W>
VK_INLINE void put(float* dst, ptrdiff_t step, F16 v) {
  if (W >= LANES) {
    store(dst, v);
    return;
  }
#if VK_TIER == 2
  if (W == 8) {
    _mm256_storeu_ps(dst, _mm512_castps512_ps256(v.v));
    _mm256_storeu_ps(dst + step, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.v), 1)));
    return;
  }
#endif
  float lanes[LANES];
  store(lanes, v);
  for (int i = 0; i < LANES; i += W) memcpy(dst + i / W * step, lanes + i, W * 4);
}

// How a row is held while it is staged: pairs of bf16 as they are, everything else as floats.
template <class T>
struct Staged {
  using type = float;
};
#if VK_TIER == 2
template <>
struct Staged<bf16> {
  using type = bf16;
};
#endif

VK_INLINE void stage_one(float from, float* to) { *to = from; }
VK_INLINE void stage_one(bf16 from, float* to) { *to = to_float(from); }
VK_INLINE void stage_one(bf16 from, bf16* to) { *to = from; }

// The picked ones of sixteen values, packed; what follows them up to the sixteenth is overwritten.
#if VK_TIER == 2
VK_INLINE void compress(__mmask16 picked, const float* row, float* dst) {
  _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(picked, _mm512_maskz_loadu_ps(picked, row)));
}
VK_INLINE __m512i compressed(__mmask16 picked, const bf16* row) {
  return _mm512_maskz_compress_epi32(picked, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(picked, row)));
}
VK_INLINE void compress(__mmask16 picked, const bf16* row, float* dst) {
  _mm512_storeu_si512(dst, _mm512_slli_epi32(compressed(picked, row), 16));
}
VK_INLINE void compress(__mmask16 picked, const bf16* row, bf16* dst) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(compressed(picked, row)));
}
#endif

// The blocks of an ascending list of `count` columns into `blocks`, which has one more than the list's last column needs; false for any
// other list, and where nothing reads them.
VK_INLINE int64_t block_count(const int32_t* cols, int64_t count) { return cols && VK_TIER == 2 ? cols[count - 1] / LANES + 2 : 0; }
VK_INLINE bool fill_blocks(const int32_t* cols, int64_t count, PrunedBlock* blocks, int64_t n) {
  for (int64_t j = 1; n && j < count; ++j)
    if (cols[j] <= cols[j - 1]) return false;
  int64_t j = 0;
  for (int64_t b = 0; b < n; ++b) {
    blocks[b] = PrunedBlock{0, static_cast<int32_t>(j)};
    for (; j < count && cols[j] < (b + 1) * LANES; ++j) blocks[b].mask |= 1 << (cols[j] - b * LANES);
  }
  return n > 0;
}

// Picked columns [first, first + count) of a row; up to fifteen values after them are overwritten.
template <class T, class S>
VK_INLINE void gather(const T* row, const PrunedSource& s, int64_t first, int64_t count, S* dst) {
  if (!s.cols) {
    for (int64_t j = 0; j < count; ++j) stage_one(row[first + j], dst + j);
    return;
  }
  const int32_t* cols = s.cols + first;
#if VK_TIER == 2
  if (s.blocks) {
    const PrunedBlock* block = s.blocks + cols[0] / LANES;
    row += cols[0] / LANES * LANES;
    compress(static_cast<__mmask16>(block->mask & -(1 << cols[0] % LANES)), row, dst);
    for (int64_t j = (++block)->from - first; j < count; j = (++block)->from - first) {
      row = row + LANES;
      compress(static_cast<__mmask16>(block->mask), row, dst + j);
    }
    return;
  }
#endif
  int64_t j = 0;
  if (s.run >= 8 && first % 8 == 0)
    for (; j + 8 <= count; j += 8)
      for (int i = 0; i < 8; ++i) stage_one(row[cols[j] + i], dst + j + i);
  for (; j < count; ++j) stage_one(row[cols[j]], dst + j);
}

// Columns [first, first + count) of a memory row, gathered and normalised; zeros up to `padded` elements.
template <class T>
VK_INLINE void stage(const PrunedSource& s, int64_t row, int64_t first, int64_t count, int64_t padded_count, float* scratch,
                     typename Staged<T>::type* dst) {
  using S = typename Staged<T>::type;
  const int64_t at = s.rows ? s.rows[row] : row;
  if (at < 0) {
    memset(dst, 0, static_cast<size_t>(padded_count) * sizeof(S));
    return;
  }
  const T* source = static_cast<const T*>(s.data) + at * s.ld;
  if (!s.stat && !s.scale && !s.shift) {
    gather(source, s, first, count, dst);
  } else {
    gather(source, s, first, count, scratch);
    const F16 stat = set1(s.stat ? s.stat[at] : 1.f);
    const ptrdiff_t own = s.group ? at / s.group * s.width + first : 0;
    for (int64_t j = 0; j < count; j += LANES) {
      const int64_t left = count - j;
      F16 v = mul(load_some(scratch + j, left), stat);
      if (s.scale) v = mul(v, load_some(s.scale + own + j, left));
      if (s.shift) v = add(v, load_some(s.shift + own + j, left));
      store_some(dst + j, v, left);
    }
  }
  memset(dst + count, 0, static_cast<size_t>(padded_count - count) * sizeof(S));
}

// What one thread needs for staging: a row being normalised, and sixteen rows of STAGE lanes (or two of 8 STAGE), and what gathering
// overwrites after the last.
constexpr int64_t STAGE_FLOATS = 2 * STAGE + 16 * STAGE + LANES;

template <class T>
VK_INLINE bool as_it_lies(const PrunedSource& s) {
  return !s.cols && !s.stat && !s.scale && !s.shift && sizeof(typename Staged<T>::type) == sizeof(T);
}
template <class T>
VK_INLINE const T* memory_row(const PrunedSource& s, int64_t row) {
  const int64_t at = s.rows ? s.rows[row] : row;
  return at < 0 ? nullptr : static_cast<const T*>(s.data) + at * s.ld;
}

// Lanes [start, start + lanes) of sixteen rows of the outer dimension from `row` on, of which `count` exist, k contiguous in memory;
// `dst` is where the first of them starts in its panel of `lanes`.
template <class T, int W>
VK_INLINE void pack_along(const PrunedSource& s, int64_t row, int64_t count, int64_t k, int64_t start, int64_t lanes, float* buffer,
                          float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  using S = typename Staged<T>::type;
  const bool direct = as_it_lies<T>(s);
  float* const staged = buffer + 2 * STAGE;
  for (int64_t at = 0; at < lanes;) {
    const int64_t full = k / PAIR - start < lanes ? k / PAIR - start : lanes;
    int64_t n = full - at < STAGE / PAIR ? full - at : STAGE / PAIR;
    const bool whole = n >= LANES;
    n = whole ? n / LANES * LANES : lanes - at;
    const int64_t first = (start + at) * PAIR, width = up(n, LANES) * PAIR;
    const float* src[LANES];
    for (int i = 0; i < LANES; ++i) {
      float* const own = staged + i * STAGE;
      src[i] = own;
      const T* source = i < count ? memory_row<T>(s, row + i) : nullptr;
      if (!source)
        memset(own, 0, static_cast<size_t>(width) * sizeof(S));
      else if (direct && whole)
        src[i] = reinterpret_cast<const float*>(source + first);
      else
        stage<T>(s, row + i, first, k - first < width ? k - first : width, width, buffer, reinterpret_cast<S*>(own));
    }
    for (int64_t b = 0; b < n; b += LANES) {
      F16 t[LANES];
      transpose(src, b, t);
      const int last = static_cast<int>(n - b < LANES ? n - b : LANES);
      for (int j = 0; j < last; ++j) put<W>(dst + (at + b + j) * W, lanes * W, t[j]);
    }
    at += n;
  }
}

VK_INLINE F16 lane_of(const float* a, const float*) { return load(a); }
template <int PAIR>
VK_INLINE F16 lane_of_bf16(const bf16* a, const bf16* b) {
#if VK_TIER == 2
  if (PAIR == 2) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    return {_mm512_castsi512_ps(_mm512_or_si512(x, _mm512_slli_epi32(y, 16)))};
  }
#endif
  (void)b;
  return load(a);
}
VK_INLINE F16 lane_of(const bf16* a, const bf16* b) { return lane_of_bf16<Steps<bf16>::PAIR>(a, b); }

// One lane of k of a source whose memory rows are k: columns [first, first + count) into panels of W, `dst` the first one's.
template <class U, int W>
VK_INLINE void spread_lane(const U* a, const U* b, int64_t count, int64_t step, float* dst) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) put<W>(dst + j / W * step + j % W, step, lane_of(a + j, b + j));
  if (j == count) return;
  U x[2][LANES] = {};
  memcpy(x[0], a + j, static_cast<size_t>(count - j) * sizeof(U));
  memcpy(x[1], b + j, static_cast<size_t>(count - j) * sizeof(U));
  put<W>(dst + j / W * step + j % W, step, lane_of(x[0], x[1]));
}

// Lane `lane` of k for outer columns [first, first + count): `first` a multiple of the panel width, `dst` its place in the first panel
// and `step` from there to the next.
template <class T, int W>
VK_INLINE void pack_across(const PrunedSource& s, int64_t lane, int64_t first, int64_t count, int64_t k, int64_t step, float* buffer,
                           float* dst) {
  constexpr int PAIR = Steps<T>::PAIR;
  using S = typename Staged<T>::type;
  constexpr int64_t PART = 4 * STAGE;  // columns staged at a time
  float* const scratch = buffer;
  S* const staged = reinterpret_cast<S*>(buffer + 8 * STAGE);
  const bool direct = !s.cols && !s.stat && !s.scale && !s.shift;
  for (int64_t at = 0; at < count; at += PART) {
    const int64_t n = count - at < PART ? count - at : PART;
    float* const to = dst + at / W * step;
    if (direct) {
      const T* rows[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t row = lane * PAIR + (PAIR == 2 ? i : 0);
        rows[i] = row < k ? memory_row<T>(s, row) : nullptr;
        if (!rows[i]) {
          T* const none = reinterpret_cast<T*>(scratch);
          memset(none, 0, static_cast<size_t>(n) * sizeof(T));
          rows[i] = none;
        } else {
          rows[i] += first + at;
          // Rows lie pages apart, which the hardware does not foresee.
          const T* const ahead = rows[i] + 8 * PAIR * s.ld;
          for (int64_t j = 0; !s.rows && row + 8 * PAIR < k && j < n; j += 64 / static_cast<int64_t>(sizeof(T))) prefetch(ahead + j);
        }
      }
      spread_lane<T, W>(rows[0], rows[1], n, step, to);
      continue;
    }
    S* rows[2] = {staged, staged};
    for (int i = 0; i < PAIR; ++i) {
      rows[i] = staged + i * PART;
      if (lane * PAIR + i < k)
        stage<T>(s, lane * PAIR + i, first + at, n, n, scratch, rows[i]);
      else
        memset(rows[i], 0, static_cast<size_t>(n) * sizeof(S));
    }
    spread_lane<S, W>(rows[0], rows[1], n, step, to);
  }
}

}  // namespace VK_ISA
}  // namespace vk
