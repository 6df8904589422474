// The product of the pruned layers: operands packed on the way in, results finished on the way out.
//
// B is packed in blocks of B_FLOATS that the threads share. A thread then packs a chunk of rows of A for itself, which stays in its
// second cache while all of the block passes by, NC columns and KC lanes at a time: one panel of B in the first cache, the tile of
// results in the second.
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/pruned_tile.h"

namespace vk {
namespace VK_ISA {
namespace {

constexpr int MC_MAX = 96, MC_MIN = 32, NC = 256, KC = 192;
constexpr int64_t A_FLOATS = 1 << 17, B_FLOATS = 1 << 22;
constexpr int TILE_STRIDE = NC + 16;

VK_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
VK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One register block of `steps` lanes. What the next blocks read is fetched on the way: a line of `next_a` every other lane, of
// `next_b` every sixth.
template <int PAIR, bool ACC>
VK_INLINE void micro(const float* a, const float* b, int steps, const float* next_a, const float* next_b, float* c) {
#if VK_TIER == 2
  F16 acc[MR][NP];
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  const auto lane = [&]() {
    const F16 b0 = load(b), b1 = load(b + LANES);
    for (int r = 0; r < MR; ++r) {
      const F16 s = set1(a[r]);
      acc[r][0] = mac<PAIR>(s, b0, acc[r][0]);
      acc[r][NP - 1] = mac<PAIR>(s, b1, acc[r][NP - 1]);
    }
    a += MR, b += NR;
  };
  int k = 0;
  for (; k + 6 <= steps; k += 6) {
    prefetch(next_b);
    next_b += LANES;
    for (int i = 0; i < 3; ++i) {
      prefetch(next_a);
      next_a += LANES;
      lane();
      lane();
    }
  }
  for (; k < steps; ++k) lane();
  for (int r = 0; r < MR; ++r)
    for (int p = 0; p < NP; ++p) {
      float* at = c + r * TILE_STRIDE + p * LANES;
      store(at, ACC ? add(load(at), acc[r][p]) : acc[r][p]);
    }
#else
  const Run r{0, steps};
  block<PAIR, MR, NP, true, ACC>(a, MR, b, b + LANES, NR, &r, 1, c, TILE_STRIDE);
  (void)next_a, (void)next_b;
#endif
}

template <class T>
struct Product {
  static constexpr int PAIR = Steps<T>::PAIR;
  const PrunedGemm& g;
  const int64_t lanes, kc, chunk_rows, columns_at_a_time, chunks;
  const bool split;  // few rows: threads share the columns of a chunk
  float *a, *b, *own;
  // With a list of output columns, and rows that one thread owns: what each strip of NC columns writes.
  const bool spread;
  Block16* blocks;
  Strip* strips;

  Product(const PrunedGemm& args, int threads)
      : g(args),
        lanes((args.k + PAIR - 1) / PAIR),
        // Short sums are cut in parts too: one long sum would round more than those of a BLAS.
        kc(lanes < 2 * KC ? up((lanes + 3) / 4, 8) : KC),
        chunk_rows(rows_of_chunk()),
        columns_at_a_time(columns_of_block()),
        chunks((args.m + chunk_rows - 1) / chunk_rows),
        split(threads > 1 && chunks < 2 * threads),
        spread(!split && g.out_cols && (g.fill || g.residual)) {}

  int64_t rows_of_chunk() const {
    const int64_t fits = A_FLOATS / lanes / LANES * LANES;
    return fits > MC_MAX ? MC_MAX : fits < MC_MIN ? MC_MIN : fits;
  }
  int64_t columns_of_block() const {
    const int64_t fits = B_FLOATS / (lanes * NC);
    return least((fits < 1 ? 1 : fits) * NC, up(g.n, NC));
  }
  static constexpr int64_t own_floats = MC_MAX * TILE_STRIDE + STAGE_FLOATS;
  int64_t a_chunks(int threads) const { return split ? chunks : threads; }
  int64_t floats(int threads) const {
    return a_chunks(threads) * chunk_rows * lanes + columns_at_a_time * lanes + threads * own_floats;
  }

  int64_t all_strips() const { return (g.n + NC - 1) / NC; }
  int64_t block_count() const { return spread ? g.out_width / LANES + all_strips() : 0; }
  void plan() {
    const int64_t written = g.act == PRUNED_SWIGLU ? g.half : g.n, per = g.act == PRUNED_SWIGLU ? NC / 2 : NC;
    Block16* block = blocks;
    for (int64_t s = 0; spread && s < all_strips(); ++s) {
      int64_t at = s * per, next = (s + 1) * per;
      const int64_t start = at, first = s ? g.out_cols[at] : 0, end = next < written ? g.out_cols[next] : g.out_width;
      strips[s] = Strip{block, first, end - first};
      for (int64_t c = first; c < end; c += LANES, ++block) {
        *block = Block16{0, static_cast<int32_t>(at - start)};
        for (; at < written && at < next && g.out_cols[at] < c + LANES; ++at)
          block->mask = static_cast<Mask>(block->mask | 1u << (g.out_cols[at] - c));
      }
    }
  }

  // Units of packing: sixteen rows, or LANE_RUN lanes of all columns.
  static constexpr int64_t LANE_RUN = 8;
  template <int W>
  int64_t units(const PrunedSource& s, int64_t count) const {
    return s.across ? (lanes + LANE_RUN - 1) / LANE_RUN : up(count, W > LANES ? W : LANES) / LANES;
  }
  // Panels of kc lanes lie together: a thread walks through memory, page after page. `outer` is the padded size of the whole.
  template <class F>
  static F* panels(F* base, int64_t at, int64_t outer) {
    return base + at * outer;
  }
  template <int W>
  void pack(const PrunedSource& s, int64_t unit, int64_t first, int64_t count, float* dst, float* stage_buffer) const {
    const int64_t outer = up(count, W > LANES ? W : LANES);
    if (!s.across) {
      const int64_t at = unit * LANES;
      for (int64_t l = 0; l < lanes; l += kc) {
        const int64_t n = least(kc, lanes - l);
        pack_along<T, W>(s, first + at, count - at, g.k, l, n, stage_buffer, panels(dst, l, outer) + at / W * n * W + at % W);
      }
      return;
    }
    for (int64_t l = unit * LANE_RUN; l < least(lanes, (unit + 1) * LANE_RUN); ++l) {
      const int64_t start = l / kc * kc, n = least(kc, lanes - start);
      float* const to = panels(dst, start, outer) + (l - start) * W;
      pack_across<T, W>(s, l, first, count, g.k, n * W, stage_buffer, to);
      for (int64_t j = up(count, LANES); j < outer; j += LANES) store(to + j / W * n * W + j % W, zero());
    }
  }

  template <bool ACC>
  static void run(const float* pa, const float* pb, int steps, int64_t rows, int64_t columns, float* tile) {
    for (int64_t j = 0; j < columns; j += NR)
      for (int64_t i = 0; i < rows; i += MR) {
        const float* const at = pa + i * steps;
        const float* const next_b = pb + (j + NR) * steps + i / MR * (steps / 6 + 1) * LANES;
        micro<PAIR, ACC>(at, pb + j * steps, steps, i + MR < rows ? at + MR * steps : pa, next_b, tile + i * TILE_STRIDE + j);
      }
  }

  // Packed rows `pa` of the chunk from `row` on, by columns [c0, c0 + columns) of the block of n columns from n0 on.
  void tile(const float* pa, int64_t row, int64_t rows, int64_t n0, int64_t n, int64_t c0, int64_t columns, float* c) const {
    const int64_t outer_a = up(rows, LANES), outer_b = up(n, NR), full_rows = up(rows, MR), full_columns = up(columns, NR);
    for (int64_t at = 0; at < lanes; at += kc) {
      const int steps = static_cast<int>(least(kc, lanes - at));
      const float *x = panels(pa, at, outer_a), *y = panels(b, at, outer_b) + c0 * steps;
      at ? run<true>(x, y, steps, full_rows, full_columns, c) : run<false>(x, y, steps, full_rows, full_columns, c);
    }
    const Strip* const strip = spread ? strips + (n0 + c0) / NC : nullptr;
    for (int64_t r = 0; r < rows; ++r) epilogue_row<T>(g, row + r, n0 + c0, columns, strip, c + r * TILE_STRIDE);
  }

  void pack_chunk(int64_t i, float* to, float* stage_buffer) const {
    const int64_t first = i * chunk_rows, rows = least(chunk_rows, g.m - first);
    for (int64_t u = 0; u < units<MR>(g.a, rows); ++u) pack<MR>(g.a, u, first, rows, to, stage_buffer);
  }

  // A thread's share; the loops are split among those of the region that it is called in.
  void share() {
    float* const c = own + thread_number() * own_floats;
    float* const stage_buffer = c + MC_MAX * TILE_STRIDE;
    if (split) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < chunks; ++i) {
        pack_chunk(i, a + i * chunk_rows * lanes, stage_buffer);
        // Before anybody writes a part of these rows.
        fill_rows(g, i * chunk_rows, least(g.m, (i + 1) * chunk_rows));
      }
    }
    for (int64_t n0 = 0; n0 < g.n; n0 += columns_at_a_time) {
      const int64_t n = least(columns_at_a_time, g.n - n0), strips = (n + NC - 1) / NC;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < units<NR>(g.b, n); ++i) pack<NR>(g.b, i, n0, n, b, stage_buffer);
      const int64_t tasks = split ? chunks * strips : chunks;
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t i = split ? t / strips : t, row = i * chunk_rows, rows = least(chunk_rows, g.m - row);
        float* const packed = a + (split ? i : thread_number()) * chunk_rows * lanes;
        if (!split) pack_chunk(i, packed, stage_buffer);
        if (!split && !spread && n0 == 0) fill_rows(g, row, row + rows);
        for (int64_t s = split ? t % strips : 0; s < (split ? t % strips + 1 : strips); ++s)
          tile(packed, row, rows, n0, n, s * NC, least(NC, n - s * NC), c);
      }
    }
  }

  void go(int threads) {
    // A region of one thread costs as much as a small product.
    if (threads == 1) return share();
#pragma omp parallel num_threads(threads)
    share();
  }
};

template <class T>
int product(PrunedGemm g) {
  // Waking a second thread costs more than a product of this size.
  const int threads = static_cast<double>(g.m) * g.n * g.k < 5e5 ? 1 : g.threads;
  Product<T> p(g, threads);
  const int64_t listed[2] = {g.a.across ? g.m : g.k, g.b.across ? g.n : g.k};
  const int64_t counts[2] = {block_count(g.a.cols, listed[0]), block_count(g.b.cols, listed[1])};
  size_t lists = p.spread ? p.block_count() * sizeof(Block16) + p.all_strips() * sizeof(Strip) : 0;
  lists += static_cast<size_t>(counts[0] + counts[1]) * sizeof(PrunedBlock);
  char* const memory = static_cast<char*>(malloc(static_cast<size_t>(p.floats(threads)) * 4 + lists + 64));
  if (!memory) return 1;
  p.b = reinterpret_cast<float*>(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64);
  p.a = p.b + p.columns_at_a_time * p.lanes;
  p.own = p.a + p.a_chunks(threads) * p.chunk_rows * p.lanes;
  p.strips = reinterpret_cast<Strip*>(p.own + threads * p.own_floats);
  p.blocks = reinterpret_cast<Block16*>(p.strips + (p.spread ? p.all_strips() : 0));
  p.plan();
  PrunedBlock* at = reinterpret_cast<PrunedBlock*>(p.blocks + p.block_count());
  for (int i = 0; i < 2; at += counts[i++]) {
    PrunedSource& s = i ? g.b : g.a;
    s.blocks = fill_blocks(s.cols, listed[i], at, counts[i]) ? at : nullptr;
  }
  p.go(threads);
  free(memory);
  return 0;
}

}  // namespace

int pruned_gemm(const PrunedGemm& g) { return g.bf16 ? product<bf16>(g) : product<float>(g); }

}  // namespace VK_ISA
}  // namespace vk
