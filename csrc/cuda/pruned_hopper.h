// The product of the pruned layers for compute capability 9.0: out[:, out_cols] = residual + gate act(A B^T + partial + bias), as in
// pruned_product.h, whose end it shares. A producer warpgroup keeps a ring of stages of 64 values of depth filled, by copies of boxes
// where an operand lies plain in memory and by its own threads where lists pick from it; two warpgroups multiply 64 rows each. Blocks stay
// for several tiles: the ring goes on through a tile's end, so that the next one's stages arrive while a result is written. Every value is
// summed in a fixed order.
#pragma once
#include "hopper.h"
#include "pruned_product.h"

namespace vk {
namespace pruned {

// How an operand comes: in boxes; line by line, each on 16 bytes; or through lists of columns, or from lines that do not lie on 16 bytes.
enum Way : i32 { BOXES = 0, LINES = 1, LISTED = 2 };

constexpr i32 WORKERS = 2, HOPPER_THREADS = (1 + WORKERS) * hopper::GROUP, HOPPER_ROWS = 64 * WORKERS;
// Of a warp's 16 rows of results this many columns at a time become float32 sums in shared memory, in a place of the warp's own.
constexpr i32 PART = 64;
constexpr u32 BARRIERS_AT = HOPPER_ROWS * PART * 4, PANELS_AT = BARRIERS_AT + hopper::ALIGN, MOST_SHARED = 227 << 10;
// Stages that a thread's copies are under way for before it says that the first has come; their consumers ask for two more.
constexpr i32 AHEAD = 2;
// Of the 168 registers that 65536 leave to each of 384 threads: what the lists of a producer take, and what that leaves the others.
constexpr i32 PRODUCER_REGISTERS = 72, WORKER_REGISTERS = 216;

// A tile of 128 by COLUMNS results. PAIRS: its columns are pairs, half as many; the operand's lines are the gates, then their values.
// BLOCKS: of a cluster, whose tiles lie below each other and share B, of which each block copies its part to all.
template <typename T_, i32 COLUMNS_, bool A_ACROSS_, bool B_ACROSS_, bool PAIRS_, i32 BLOCKS_ = 1>
struct Form {
  using T = T_;
  static constexpr i32 ROWS = HOPPER_ROWS, COLUMNS = COLUMNS_, WRITTEN = PAIRS_ ? COLUMNS / 2 : COLUMNS, BLOCKS = BLOCKS_;
  static constexpr bool A_ACROSS = A_ACROSS_, B_ACROSS = B_ACROSS_, PAIRS = PAIRS_;
  using A = hopper::Panels<A_ACROSS ? DEPTH : ROWS, A_ACROSS ? ROWS : DEPTH>;
  using B = hopper::Panels<B_ACROSS ? DEPTH : COLUMNS, B_ACROSS ? COLUMNS : DEPTH>;
  static constexpr i32 BYTES = A::BYTES + B::BYTES, STAGES = i32(MOST_SHARED - PANELS_AT) / BYTES;
  static_assert(STAGES >= AHEAD + 2, "a stage is released when the next one's products are under way");
  static_assert(BLOCKS == 1 || !(PAIRS || A_ACROSS || B_ACROSS), "clusters are for the plain form");
  using Ring = hopper::Ring<STAGES>;
  static VK_DEVICE Ring ring() { return {shared_at<u64>(BARRIERS_AT)}; }
  static VK_DEVICE A a(i32 use) { return {shared_at<u8>(PANELS_AT + u32(use % STAGES * BYTES))}; }
  static VK_DEVICE B b(i32 use) { return {shared_at<u8>(PANELS_AT + u32(use % STAGES * BYTES + A::BYTES))}; }
  // By one thread, before a barrier of all blocks of the cluster. fills: arrivals that fill a stage. It is empty when it is in every block.
  static VK_DEVICE void make(u32 fills) { ring().make(fills, BLOCKS * WORKERS * (hopper::GROUP / WARP)); }
  // This warp no longer reads it: Ring::release, to every block that may copy into it.
  static VK_DEVICE void release(i32 use) {
    if constexpr (BLOCKS == 1) {
      ring().release(use);
    } else {
      warp_barrier();
      if (lane_index() < u32(BLOCKS)) mbarrier_arrive_at(ring().empty(use), lane_index());
    }
  }
};

// A stage of the job's operands from depth k0 on, as boxes.
template <typename F, typename Job>
VK_DEVICE void ask_a(const Job& job, i32 k0, i32 use) {
  const Shared<u64> full = F::ring().full(use);
  const typename F::A to = F::a(use);
  if constexpr (F::A_ACROSS) {
    VK_UNROLL
    for (i32 n = 0; n < F::A::COUNT; ++n) copy_box(to.panel(n), job.a, job.row + n * hopper::PANEL, k0, full);
  } else {
    copy_box(to.base, job.a, k0, job.row, full);
  }
}
template <typename F, typename Job>
VK_DEVICE void ask_b(const Job& job, i32 k0, i32 use) {
  const Shared<u64> full = F::ring().full(use);
  const typename F::B to = F::b(use);
  if constexpr (F::B_ACROSS) {
    VK_UNROLL
    for (i32 n = 0; n < F::B::COUNT; ++n) copy_box(to.panel(n), job.b, job.column + n * hopper::PANEL, k0, full);
  } else if constexpr (F::PAIRS) {
    copy_box(to.base, job.b, k0, job.column, full);
    copy_box(to.chunk(F::WRITTEN, 0), job.b, k0, job.column + job.p.half, full);
  } else if constexpr (F::BLOCKS > 1) {
    const i32 line = i32(cluster_rank()) * (F::COLUMNS / F::BLOCKS);
    copy_box_to((1 << F::BLOCKS) - 1, to.chunk(line, 0), job.b, k0, job.column + line, full);
  } else {
    copy_box(to.base, job.b, k0, job.column, full);
  }
}

// The same by the threads of the producer.
template <typename F, bool LISTED, typename Job>
VK_DEVICE void fill_a(const Job& job, i32 k0, i32 use) {
  using T = typename F::T;
  const Product& p = job.p;
  const typename F::A to = F::a(use);
  if constexpr (F::A_ACROSS) {
    for (i32 n = 0; n < F::A::COUNT; ++n)
      fill<T, DEPTH, hopper::GROUP, LISTED>(Tile<DEPTH>{to.panel(n)}, p.a, job.row + n * hopper::PANEL, p.m,
                                            [&](i32 line) { return k0 + line < p.k ? k0 + line : -1; });
  } else {
    fill<T, F::ROWS, hopper::GROUP, LISTED>(Tile<DEPTH>{to.base}, p.a, k0, p.k,
                                            [&](i32 line) { return job.row + line < p.m ? job.row + line : -1; });
  }
}
template <typename F, bool LISTED, typename Job>
VK_DEVICE void fill_b(const Job& job, i32 k0, i32 use) {
  using T = typename F::T;
  const Product& p = job.p;
  const typename F::B to = F::b(use);
  if constexpr (F::B_ACROSS) {
    for (i32 n = 0; n < F::B::COUNT; ++n)
      fill<T, DEPTH, hopper::GROUP, LISTED>(Tile<DEPTH>{to.panel(n)}, p.b, job.column + n * hopper::PANEL, p.n,
                                            [&](i32 line) { return k0 + line < p.k ? k0 + line : -1; });
  } else {
    fill<T, F::COLUMNS, hopper::GROUP, LISTED>(Tile<DEPTH>{to.base}, p.b, k0, p.k, [&](i32 line) {
      const i32 column = job.column + line % F::WRITTEN;
      return column >= p.n ? -1 : line < F::WRITTEN ? column : column + p.half;
    });
  }
}

// The stage's copies of this thread have come: its warp says so when all have.
template <typename F>
VK_DEVICE void filled(i32 use) {
  async_fence();
  warp_barrier();
  if (hopper::leads()) mbarrier_arrive(F::ring().full(use));
}

// The producer warpgroup. Jobs: a_way(), b_way() (alike for all jobs); first, step and count of this block's tiles; and at(tile), with the
// product p, its maps a and b, and the tile's first row and column.
template <typename F, typename Jobs>
VK_DEVICE void produce(const Jobs& jobs) {
  const typename F::Ring ring = F::ring();
  const bool boxes_a = jobs.a_way() == BOXES, boxes_b = jobs.b_way() == BOXES, boxes = boxes_a || boxes_b, fills = !boxes_a || !boxes_b;
  const bool asks = boxes && warp_index() == 0 && hopper::leads();
  if (!asks && !fills) return;
  const u32 bytes = u32((boxes_a ? F::A::BYTES : 0) + (boxes_b ? F::B::BYTES : 0));
  i32 use = 0;
  VK_NO_UNROLL
  for (i32 t = jobs.first; t < jobs.count; t += jobs.step) {
    const auto job = jobs.at(t);
    VK_NO_UNROLL
    for (i32 k0 = 0; k0 < job.p.k; k0 += DEPTH, ++use) {
      ring.wait_empty(use);
      if (asks) {
        mbarrier_expect(ring.full(use), bytes);
        if (boxes_a) ask_a<F>(job, k0, use);
        if (boxes_b) ask_b<F>(job, k0, use);
      }
      if (!fills) continue;
      if (jobs.a_way() == LINES) fill_a<F, false>(job, k0, use);
      if (jobs.a_way() == LISTED) fill_a<F, true>(job, k0, use);
      if (jobs.b_way() == LINES) fill_b<F, false>(job, k0, use);
      if (jobs.b_way() == LISTED) fill_b<F, true>(job, k0, use);
      copies_commit();
      if (use < AHEAD) continue;
      copies_wait<AHEAD>();
      filled<F>(use - AHEAD);
    }
  }
  if (!fills) return;
  copies_wait<0>();
  for (i32 i = use < AHEAD ? 0 : use - AHEAD; i < use; ++i) filled<F>(i);
}

// This warp's 16 rows of sums, from row `row` of the tile on, to where they go.
template <typename F, typename Job>
VK_DEVICE void write_out(const Job& job, const Accumulator (&sums)[F::COLUMNS / 8], i32 row) {
  constexpr i32 WIDE = F::PAIRS ? PART / 2 : PART, CHUNKS = WIDE / CHUNK, N = PART / 8;
  const Product& p = job.p;
  VK_NO_UNROLL
  for (i32 part = 0; part < F::COLUMNS / PART; ++part) {
    // Which registers these are is known when compiled, and what follows is there once.
    VK_UNROLL
    for (i32 q = 0; q < F::COLUMNS / PART; ++q) {
      if (q != part) continue;
      VK_UNROLL
      for (i32 n = 0; n < N; ++n) {
        const Accumulator& s = sums[!F::PAIRS ? q * N + n : n < N / 2 ? q * (N / 2) + n : F::COLUMNS / 16 + q * (N / 2) + n - N / 2];
        VK_UNROLL
        for (i32 i = 0; i < 4; ++i) Sums<PART>::put(row + accumulator_row(i), n * 8 + accumulator_column(i), s.v[i]);
      }
    }
    warp_barrier();
    VK_NO_UNROLL
    for (i32 i = i32(lane_index()); i < 16 * CHUNKS; i += i32(WARP)) {
      const i32 own = row + i / CHUNKS, c = i % CHUNKS * CHUNK, column = job.column + part * WIDE + c;
      if (job.row + own >= p.m || column >= p.n) continue;
      Eight z = Sums<PART>::eight(own, c), second{};
      if (F::PAIRS) second = Sums<PART>::eight(own, WIDE + c);
      finish<typename F::T, F::PAIRS>(p, job.row + own, column, z, second);
    }
    warp_barrier();
  }
}

template <typename F, typename Jobs>
VK_DEVICE void consume(const Jobs& jobs) {
  const i32 worker = hopper::group_index() - 1, row = worker * 64 + i32(warp_index()) % 4 * 16;
  Accumulator sums[F::COLUMNS / 8];
  const auto multiply_stage = [&](i32 use) {
    F::ring().wait_full(use);
    const typename F::A a = F::a(use);
    const typename F::B b = F::b(use);
    products_begin();
    VK_UNROLL
    for (i32 k = 0; k < DEPTH / 16; ++k) {
      const Described left = F::A_ACROSS ? a.depth_across(k, worker) : a.depth_along(worker * 64, k);
      const Described right = F::B_ACROSS ? b.depth_across(k) : b.depth_along(0, k);
      warpgroup_product<typename F::T, F::COLUMNS, F::A_ACROSS, F::B_ACROSS>(sums, left, right, true);
    }
    products_commit();
  };
  i32 use = 0;
  VK_NO_UNROLL
  for (i32 t = jobs.first; t < jobs.count; t += jobs.step) {
    const auto job = jobs.at(t);
    const i32 end = use + (job.p.k + DEPTH - 1) / DEPTH;
    clear(sums);
    // The first stage by itself: in one loop with the others, whose products overlap, ptxas would wait for each product.
    multiply_stage(use);
    VK_NO_UNROLL
    for (++use; use < end; ++use) {
      multiply_stage(use);
      products_wait<1>();
      F::release(use - 1);
    }
    products_wait<0>();
    F::release(use - 1);
    write_out<F>(job, sums, row);
  }
}

// What a kernel does; jobs: of this block.
template <typename F, typename Jobs>
VK_DEVICE void run(const Jobs& jobs) {
  if (thread_index() == 0) {
    const bool boxes = jobs.a_way() == BOXES || jobs.b_way() == BOXES, fills = jobs.a_way() != BOXES || jobs.b_way() != BOXES;
    F::make((boxes ? 1 : 0) + (fills ? hopper::GROUP / WARP : 0));
  }
  if constexpr (F::BLOCKS > 1) cluster_barrier();
  else block_barrier();
  if (hopper::group_index() == 0) {
    registers_down<PRODUCER_REGISTERS>();
    produce<F>(jobs);
  } else {
    registers_up<WORKER_REGISTERS>();
    consume<F>(jobs);
  }
  if constexpr (F::BLOCKS > 1) {
    // Only the others wait for this block's copies to them: it stays until they have.
    warp_barrier();
    cluster_barrier();
  }
}

// ---- one product -----------------------------------------------------------------------------------------------------------
struct Boxed {
  TensorMap a, b;  // of operands that come in boxes
  Product p;       // not used of it: listed
  i32 a_way, b_way;
  i32 blocks;  // of the launch: a multiple of a cluster's
};

template <typename F>
struct Tiles {
  const Boxed& given;
  i32 first, step, count, rows, columns;
  struct Job {
    const Product& p;
    const TensorMap &a, &b;
    i32 row, column;
  };
  VK_DEVICE explicit Tiles(const Boxed& g)
      : given(g), first(i32(block_index()) / F::BLOCKS), step(g.blocks / F::BLOCKS),
        rows((g.p.m + F::ROWS * F::BLOCKS - 1) / (F::ROWS * F::BLOCKS)), columns((g.p.n + F::WRITTEN - 1) / F::WRITTEN) {
    count = rows * columns;
  }
  VK_DEVICE i32 a_way() const { return F::BLOCKS > 1 ? BOXES : given.a_way; }
  VK_DEVICE i32 b_way() const { return F::BLOCKS > 1 ? BOXES : given.b_way; }
  // Eight rows of tiles at a time, column after column, so that what is read stays in the L2 cache.
  VK_DEVICE Job at(i32 t) const {
    const i32 band = t / (8 * columns), here = least(rows - band * 8, 8), within = t % (8 * columns);
    const i32 rank = F::BLOCKS > 1 ? i32(cluster_rank()) : 0;
    return {given.p, given.a, given.b, ((band * 8 + within % here) * F::BLOCKS + rank) * F::ROWS, within / here * F::WRITTEN};
  }
};

template <typename F>
VK_DEVICE void boxed(const Boxed& g) {
  run<F>(Tiles<F>(g));
}

}  // namespace pruned
}  // namespace vk

#define VK_BOXED(name, T, ...)                                                                    \
  VK_KERNEL_ALONE(vk::pruned::HOPPER_THREADS) name(const VK_PARAMETER vk::pruned::Boxed given) {  \
    vk::pruned::boxed<vk::pruned::Form<vk::T, __VA_ARGS__>>(given);                               \
  }                                                                                               \
  VK_ENTRY(name, vk::pruned::Boxed)
#define VK_BOXED_FORMS(form, ...)                   \
  VK_BOXED(form##_f16_256, f16, 256, __VA_ARGS__)   \
  VK_BOXED(form##_f16_128, f16, 128, __VA_ARGS__)   \
  VK_BOXED(form##_f16_64, f16, 64, __VA_ARGS__)     \
  VK_BOXED(form##_bf16_256, bf16, 256, __VA_ARGS__) \
  VK_BOXED(form##_bf16_128, bf16, 128, __VA_ARGS__) \
  VK_BOXED(form##_bf16_64, bf16, 64, __VA_ARGS__)
