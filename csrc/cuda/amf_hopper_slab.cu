// Attention motion flow, backward where channels are many, for compute capability 9.0a: the two products of amf_slab.cu by wgmma. Of one
// query frame of one sample and group they read the slab, the gradients of its logits: dQ of that frame, and its share of dK, added up
// over query frames in float32, in their order, and rounded once. A block has 128 rows by 256 channels, four panels of 64 that lie in one
// head each; a producer warpgroup brings 64 of depth at a time, two warpgroups of 64 rows multiply. Of the slab only blocks of rows with
// gradient are read: of the others nothing was written. Deterministic.
#include "amf_hopper.h"

namespace vk {
namespace amf {

struct Products {
  // The slab, as [targets, S, padded]: boxes of 64 keys by HALF rows. k for dQ and q for dK, of this sample and group, as are all others,
  // as [heads, F, S, d]: boxes of 64 channels by DEPTH keys, or by PIECE rows.
  TensorMap slab, tokens;
  const void* q;        // for dK
  const Slope* slopes;  // [P, S]
  const i32* flags;     // [P, blocks]
  const float* unity;
  void* out;           // dq or dk
  float* sum;          // [N, channels]: dK so far
  const i32 *slots;    // [*, 2]: target, pair; this frame's are slot to slot + n_slots - 1
  const i32* shares;   // [*, 2]: whether it is the first and whether it is the last share of its target's dK
  i64 q_head, q_token, out_head, out_token;
  i32 size, slot, n_slots, query, heads, dim, blocks;  // size: tokens of a frame; query: the frame
  float scale;
  VK_DEVICE i32 target(i32 which) const { return load(slots + (slot + which) * 2); }
  VK_DEVICE i64 pair(i32 which) const { return load(slots + (slot + which) * 2 + 1); }
  VK_DEVICE i64 first_token(i32 frame) const { return i64(frame) * size; }
};

constexpr i32 HALF = BLOCK;  // rows of a warpgroup; of the slab's, those that have a flag
constexpr i32 DEPTH = 64;    // keys or rows of a stage
constexpr i32 WIDTH = 256, PANELS = WIDTH / STEP;  // channels of a block
// Stages that a thread's copies are under way for before it says that the first has come; their consumers ask for two more.
constexpr i32 AHEAD = 2;
static_assert(STAGES >= AHEAD + 2, "a stage is released when the next one's products are under way");

// Channels of a panel: of one head. Those past its last channel come as zeros, and so do all of a head that there is not.
struct Span {
  i32 head, channel;
  VK_DEVICE Span(const Products& g, i32 panel) : head(panel / tiles_of(g.dim, STEP)), channel(panel % tiles_of(g.dim, STEP) * STEP) {}
  VK_DEVICE bool holds(const Products& g, i32 c) const { return head < g.heads && channel + c < g.dim; }
};
// Those of a block's panels: found once, since a stage's boxes should not wait for divisions.
struct Spans {
  Span of[PANELS];
  VK_DEVICE Spans(const Products& g, i32 first) : of{{g, first}, {g, first + 1}, {g, first + 2}, {g, first + 3}} {}
};

// Shared memory: barriers and, of dQ, notes; the stages; a place for each warp through which results leave.
struct Stages {
  using Right = Panels<DEPTH, WIDTH>;
  static constexpr u32 LEFT = ROWS * DEPTH * 2, STAGE = LEFT + Right::BYTES, NOTES = Ring<STAGES>::BYTES;
  static_assert(NOTES + 16 * STAGES <= ALIGN, "panels begin on 1024 bytes");
  i32 first;  // panel of the tile
  VK_DEVICE Ring<STAGES> ring() const { return {shared_at<u64>(0)}; }
  VK_DEVICE Shared<u8> note(i32 i) const { return shared_at<u8>(NOTES + u32(i % STAGES) * 16); }
  VK_DEVICE Shared<u8> left(i32 i) const { return shared_at<u8>(ALIGN + u32(i % STAGES) * STAGE); }
  VK_DEVICE Right right(i32 i) const { return {shared_at<u8>(ALIGN + u32(i % STAGES) * STAGE + LEFT)}; }

  // This warp's 16 rows times `factor`, a panel at a time: chunk c of row n of panel p to `to(n, p, c)`, or nowhere where that is null.
  template <typename T, typename To>
  VK_DEVICE void leave(const Accumulator (&out)[WIDTH / 8], float factor, To to) const {
    const Panels<PIECE, STEP> place{shared_at<u8>(ALIGN + STAGES * STAGE + (warp_index() - 4) * (PIECE * STEP * 2))};
    VK_UNROLL
    for (i32 p = 0; p < PANELS; ++p) {
      VK_UNROLL
      for (i32 d = 0; d < STEP / 8; ++d)
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h)
          store4(place.chunk(accumulator_row(2 * h), d) + i32(lane_index() % 4) * 4,
                 Number<T>::pack(out[p * 8 + d].v[2 * h] * factor, out[p * 8 + d].v[2 * h + 1] * factor));
      warp_barrier();  // the warp has written them
      VK_UNROLL
      for (i32 i = i32(lane_index()); i < PIECE * STEP / CHUNK; i += i32(WARP)) {
        const i32 n = i / (STEP / CHUNK), c = i % (STEP / CHUNK);
        T* at = to(n, p, c);
        if (at != nullptr) store16(at, load16(place.chunk(n, c)));
      }
      warp_barrier();  // and has read them
    }
  }
};

// One tile of dQ of the query frame: 128 rows by 256 channels, summed over the keys of its targets. The producer's note on a stage says
// which rows have a gradient for the stage's target, bit by bit, two words for each half; no row at all: no stage follows.
template <typename T>
VK_DEVICE void slab_dq(const Products& g) {
  const i32 down = tiles_of(g.size, ROWS), row_first = i32(block_index()) % down * ROWS, steps = tiles_of(g.size, DEPTH);
  const Stages at{i32(block_index()) / down * PANELS};
  const Ring<STAGES> ring = at.ring();
  if (thread_index() == 0) ring.make(1, READERS);
  block_barrier();
  if (group_index() == 0) {
    registers_down<FEW>();
    if (warp_index() != 0) return;
    if (leads()) prefetch(g.slab), prefetch(g.tokens);
    const Spans spans(g, at.first);
    i32 i = 0;
    for (i32 which = 0; which < g.n_slots; ++which) {
      const Slope* slopes = g.slopes + g.pair(which) * g.size;
      Words rows;
      u32 past[4];
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n) {
        const i32 row = row_first + n * i32(WARP) + i32(lane_index());
        rows.w[n] = votes(row < g.size && load(&slopes[row].lse) != infinity()), past[n] = votes(row >= g.size);
      }
      const bool live[2] = {(rows.w[0] | rows.w[1]) != 0, (rows.w[2] | rows.w[3]) != 0};
      if (!live[0] && !live[1]) continue;
      // Of rows past the frame's end zeros come, and nothing is written.
      VK_UNROLL
      for (i32 n = 0; n < 4; ++n)
        if (live[n / 2]) rows.w[n] |= past[n];
      if (!leads()) {
        i += steps;
        continue;
      }
      const i32 target = g.target(which);
      for (i32 key = 0; key < g.size; key += DEPTH, ++i) {
        ring.wait_empty(i);
        store16(at.note(i), rows);
        mbarrier_expect(ring.full(i), u32(Stages::Right::BYTES + (i32(live[0]) + i32(live[1])) * HALF * DEPTH * 2));
        VK_UNROLL
        for (i32 n = 0; n < 2; ++n)
          if (live[n]) copy_box(at.left(i) + n * HALF * DEPTH * 2, g.slab, key, row_first + n * HALF, which, 0, ring.full(i));
        VK_UNROLL
        for (i32 p = 0; p < PANELS; ++p)
          copy_box(at.right(i).panel(p), g.tokens, spans.of[p].channel, key, target, spans.of[p].head, ring.full(i));
      }
    }
    if (!leads()) return;
    ring.wait_empty(i);
    store16(at.note(i), Words{});
    mbarrier_arrive(ring.full(i));
    return;
  }
  registers_up<MANY>();
  const i32 half = group_index() - 1, own = i32(warp_index()) % 4 * PIECE;
  const auto left = [&](i32 i, i32 k) { return Panels<ROWS, DEPTH>{at.left(i)}.depth_along(half * HALF, k); };
  Accumulator out[WIDTH / 8];
  clear(out);
  const auto multiply = [&](i32 i) {
    ring.wait_full(i);
    products_begin();
    VK_UNROLL
    for (i32 k = 0; k < DEPTH / 16; ++k) warpgroup_product<T, WIDTH, false, true>(out, left(i, k), at.right(i).depth_across(k), true);
    products_commit();
  };
  for (i32 i = 0;;) {
    ring.wait_full(i);
    const Words note = load16(at.note(i));
    if ((note.w[0] | note.w[1] | note.w[2] | note.w[3]) == 0) break;
    const u32 low = half == 0 ? note.w[0] : note.w[2], high = half == 0 ? note.w[1] : note.w[3];
    const i32 end = i + steps;
    if ((low & high) == 0xffffffffu) {
      // The first stage by itself: in one loop with the others, whose products overlap, ptxas would wait for each product.
      multiply(i);
      VK_NO_UNROLL
      for (++i; i < end; ++i) {
        multiply(i);
        products_wait<1>();
        ring.release(i - 1);
      }
      products_wait<0>();
      ring.release(i - 1);
      continue;
    }
    // Only to rows with a gradient: a key may be NaN for those who see it. Half of the channels at a time, for want of registers.
    const u32 mine = (own < 32 ? low : high) >> (own % 32 + accumulator_row(0));
    const bool alive[2] = {(mine & 1) != 0, (mine >> 8 & 1) != 0}, any = (low | high) != 0;
    VK_NO_UNROLL
    for (; i < end; ++i) {
      ring.wait_full(i);
      VK_UNROLL
      for (i32 n = 0; n < (any ? 2 : 0); ++n) {
        Accumulator part[WIDTH / 16];
        products_begin();
        VK_UNROLL
        for (i32 k = 0; k < DEPTH / 16; ++k)
          warpgroup_product<T, WIDTH / 2, false, true>(part, left(i, k), at.right(i).depth_across(k, n * (PANELS / 2)), k > 0);
        products_commit(), products_wait<0>();
        VK_UNROLL
        for (i32 d = 0; d < WIDTH / 16; ++d)
          VK_UNROLL
          for (i32 v = 0; v < 4; ++v) add_where(alive[v / 2], out[n * (WIDTH / 16) + d].v[v], part[d].v[v]);
      }
      ring.release(i);
    }
  }
  const i32 row = row_first + half * HALF + own;
  T* to = static_cast<T*>(g.out) + (g.first_token(g.query) + row) * g.out_token;
  at.leave<T>(out, g.unity == nullptr ? g.scale : g.scale * load(g.unity), [&](i32 n, i32 p, i32 c) {
    const Span span(g, at.first + p);
    const bool there = row + n < g.size && span.holds(g, c * CHUNK);
    return there ? to + n * g.out_token + span.head * g.out_head + span.channel + c * CHUNK : nullptr;
  });
}

// One tile of the share of dK that the query frame has: 128 keys of a target by 256 channels, summed over the rows with gradient. Blocks
// of a launch go over keys and channels first: those that run together read one target's part of the slab, and q.
template <typename T>
VK_DEVICE void slab_dk(const Products& g) {
  const i32 down = tiles_of(g.size, ROWS), across = tiles_of(g.heads * tiles_of(g.dim, STEP), PANELS), pid = i32(block_index());
  const i32 key_first = pid % down * ROWS, which = pid / down / across;
  const Stages at{pid / down % across * PANELS};
  const Ring<STAGES> ring = at.ring();
  const i32* flags = g.flags + g.pair(which) * g.blocks;
  const auto live = [&](i32 row) { return load(flags + row / HALF) != 0; };
  if (thread_index() == 0) ring.make(1 + 4, READERS);  // the slab, and rows from each of the producer's warps
  block_barrier();
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() == 0) prefetch(g.slab), prefetch(g.tokens);
    const i32 lane = i32(lane_index()), own = i32(warp_index()) * PIECE;
    const Slope* slopes = g.slopes + g.pair(which) * g.size;
    const auto next = [&](i32 row) {
      while (row < g.size && !live(row)) row += HALF;
      return row;
    };
    const auto lse_of = [&](i32 first) {
      const i32 row = first + own + lane % PIECE;
      return row < g.size ? load(&slopes[row].lse) : infinity();
    };
    // Where a thread copies, it copies its 8 channels of every row of the piece.
    static_assert(WIDTH == i32(WARP) * CHUNK, "a lane's channels");
    const Spans spans(g, at.first);
    const Span span(g, at.first + lane / 8);
    const bool holds = span.holds(g, lane % 8 * CHUNK);
    const T* q = static_cast<const T*>(g.q);
    const T* mine = q + g.first_token(g.query) * g.q_token + span.head * g.q_head + span.channel + lane % 8 * CHUNK;
    if (load(g.shares + (g.slot + which) * 2) == 0 && key_first + i32(thread_index()) < g.size) {
      // What this tile's sums are added to is wanted all at once, when they are there.
      const i64 row = g.first_token(g.target(which)) + key_first + i32(thread_index());
      VK_UNROLL
      for (i32 p = 0; p < PANELS; ++p) {
        const Span s = spans.of[p];
        if (s.head < g.heads) prefetch(g.sum + (row * g.heads + s.head) * g.dim + s.channel, u32(g.dim - s.channel < STEP ? g.dim - s.channel : STEP) * 4);
      }
    }
    u32 filled = 0;  // bit n: this warp's threads copied for use i - 1 - n, and it has not said that they are done
    const auto say = [&](i32 i) {
      async_fence();
      warp_barrier();
      if (leads()) mbarrier_arrive(ring.full(i));
    };
    i32 i = 0, first = next(0);
    float lse = lse_of(first);
    for (; first < g.size; ++i) {
      const i32 here = first, token = here + own;
      const u32 alive = votes(lse != infinity()), past = votes(token + lane % PIECE >= g.size);
      const bool whole = (alive | past) == 0xffffffffu;
      first = next(here + DEPTH), lse = lse_of(first);  // asked for before the wait
      ring.wait_empty(i);
      if (thread_index() == 0) {
        mbarrier_expect(ring.full(i), Stages::LEFT);
        VK_UNROLL
        for (i32 n = 0; n < ROWS / STEP; ++n)
          copy_box(at.left(i) + n * DEPTH * STEP * 2, g.slab, key_first + n * STEP, here, which, 0, ring.full(i));
      }
      if (whole) {
        if (leads()) {
          mbarrier_expect(ring.full(i), PIECE * WIDTH * 2);
          VK_UNROLL
          for (i32 p = 0; p < PANELS; ++p)
            copy_box(at.right(i).panel(p) + own * STEP * 2, g.tokens, spans.of[p].channel, token, g.query, spans.of[p].head, ring.full(i));
        }
      } else {
        // A row without gradient may hold anything.
        VK_NO_UNROLL
        for (i32 n = 0; n < PIECE; ++n) {
          const bool there = (alive >> n & 1) != 0 && holds;
          copy16(at.right(i).chunk(own + n, lane), there ? mine + (token + n) * g.q_token : q, there ? 16 : 0);
        }
      }
      copies_commit();
      filled = filled << 1 | u32(!whole);
      copies_wait<AHEAD>();
      if (filled >> AHEAD & 1) say(i - AHEAD);
    }
    copies_wait<0>();
    VK_UNROLL
    for (i32 n = AHEAD - 1; n >= 0; --n)
      if (filled >> n & 1) say(i - 1 - n);
    return;
  }
  registers_up<MANY>();
  const i32 half = group_index() - 1, channels = g.heads * g.dim;
  i32 count = 0;
  for (i32 row = 0; row < g.size; row += HALF) count += i32(live(row));
  Accumulator out[WIDTH / 8];
  clear(out);
  const auto multiply = [&](i32 i) {
    ring.wait_full(i);
    const Panels<DEPTH, ROWS> left{at.left(i)};
    products_begin();
    VK_UNROLL
    for (i32 k = 0; k < DEPTH / 16; ++k)
      warpgroup_product<T, WIDTH, true, true>(out, left.depth_across(k, half), at.right(i).depth_across(k), true);
    products_commit();
  };
  if (count > 0) {
    multiply(0);
    VK_NO_UNROLL
    for (i32 i = 1; i < count; ++i) {
      multiply(i);
      products_wait<1>();
      ring.release(i - 1);
    }
    products_wait<0>();
  }
  const bool first_share = load(g.shares + (g.slot + which) * 2) != 0, last_share = load(g.shares + (g.slot + which) * 2 + 1) != 0;
  const i32 key = key_first + half * HALF + i32(warp_index()) % 4 * PIECE;
  const i64 token = g.first_token(g.target(which)) + key;
  // Calls visit(at, there, value, value) for all sums of a panel, which a lane has in twos: where two are, and whether they exist.
  const auto sums = [&](i32 p, auto visit) {
    const Span span(g, at.first + p);
    VK_UNROLL
    for (i32 h = 0; h < 2; ++h) {
      const i32 row = accumulator_row(2 * h), columns = key + row < g.size && span.head < g.heads ? g.dim - span.channel : 0;
      Two* first = reinterpret_cast<Two*>(g.sum + (token + row) * channels + span.head * g.dim + span.channel + accumulator_column(0));
      VK_UNROLL
      for (i32 d = 0; d < STEP / 8; ++d) visit(first + d * 4, d * 8 < columns, out[p * 8 + d].v[2 * h], out[p * 8 + d].v[2 * h + 1]);
    }
  };
  VK_UNROLL
  for (i32 p = 0; p < PANELS; ++p) {
    if (!first_share) {
      // All of a panel's are asked for before the first is added; those of the next one as well would spill.
      Two before[STEP / 4];
      i32 n = 0;
      sums(p, [&](const Two* from, bool there, float, float) { before[n++] = there ? load(from) : Two{0, 0}; });
      n = 0;
      sums(p, [&](const Two*, bool, float& a, float& b) { a = before[n].a + a, b = before[n++].b + b; });
    }
    warp_barrier();  // keeps these panels apart
    if (!last_share)
      sums(p, [](Two* to, bool there, float a, float b) {
        if (there) store(to, Two{a, b});
      });
  }
  if (!last_share) return;
  T* to = static_cast<T*>(g.out) + token * g.out_token;
  at.leave<T>(out, g.unity == nullptr ? g.scale : g.scale * load(g.unity), [&](i32 n, i32 p, i32 c) {
    const Span span(g, at.first + p);
    const bool there = key + n < g.size && span.holds(g, c * CHUNK);
    return there ? to + n * g.out_token + span.head * g.out_head + span.channel + c * CHUNK : nullptr;
  });
}

}  // namespace amf
}  // namespace vk

using vk::amf::Products;

#define VK_AMF(name, ...)                                                                       \
  VK_KERNEL_ALONE(384) name(const VK_PARAMETER Products given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Products)
#define VK_AMF_SLAB(T)                                    \
  VK_AMF(amf_hopper_slab_dq_##T, slab_dq<vk::T>)          \
  VK_AMF(amf_hopper_slab_dk_##T, slab_dk<vk::T>)

VK_AMF_SLAB(bf16)
VK_AMF_SLAB(f16)
