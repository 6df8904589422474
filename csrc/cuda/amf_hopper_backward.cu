// Attention motion flow, backward of one head per group and up to 128 channels, for compute capability 9.0a: what amf_backward.cu does by
// mma.sync after its prepare kernel. A block has 128 rows, of queries for dQ and of keys for dK, and goes over tokens of the other frames.
// A producer warpgroup brings them and says in a note what a stage holds; two warpgroups of 64 rows make P again, and, with the gradients of
// the logits in registers, the second product. Tokens past a frame's end come as zeros, and so do queries without gradient: they may hold
// anything. Deterministic.
#include "amf_hopper.h"
#include "device/philox.h"

namespace vk {
namespace amf {

struct Backward {
  // Of a sample, as all others are: q and k for dQ, k and q for dK, [G, F, S, d]; boxes of 64 channels by HALF rows, and by KEYS keys or
  // PIECE queries.
  TensorMap rows, tokens;
  const void* q;               // for dK
  const Slope* slopes;         // [G, P, S]
  const i32* flags;            // [G, P, blocks]
  const float* unity;
  void* out;                   // dq or dk
  const i32 *tiles, *members;  // [n, 4]: frame, first row in it, its members from, to; [P, 2]: the other frame, pair
  i64 q_group, q_token, out_group, out_token;
  Frame frame;
  i32 n_tiles, n_pairs, blocks, dim;
  float centre_x, centre_y, scale;
};

constexpr i32 HALF = BLOCK;  // rows of a warpgroup: those that have a flag

// The producer's note on a stage: for which warpgroups it is (bit by bit; none: no stage follows), the pair, the first token in its frame.
struct Note {
  u32 readers;
  i32 pair, first;
};

// A block of rows, and what dQ and dK share. Shared memory: barriers and notes, the rows, the stages with TOKENS tokens each and, of
// queries, what their gradients say.
template <typename T, i32 DIM, i32 TOKENS, bool QUERIES>
struct Program {
  using Left = Panels<ROWS, DIM>;
  using Right = Panels<TOKENS, DIM>;
  static constexpr bool PART = !QUERIES;
  static constexpr u32 SLOPE_BYTES = QUERIES ? TOKENS * 16 : 0, STAGE = Right::BYTES + SLOPE_BYTES, NOTES = Ring<STAGES>::BYTES + 16;
  static_assert(SLOPE_BYTES % ALIGN == 0 && NOTES + 16 * STAGES <= ALIGN, "panels begin on 1024 bytes");
  const Backward& g;
  i32 group, frame, first, member, end;
  Ring<STAGES> ring;
  VK_DEVICE Program(const Backward& g) : g(g), ring{shared_at<u64>(0)} {
    const i32* tile = g.tiles + i32(block_index()) % g.n_tiles * 4;
    group = i32(block_index()) / g.n_tiles;
    frame = load(tile), first = load(tile + 1), member = load(tile + 2), end = load(tile + 3);
  }
  static VK_DEVICE Shared<u64> there() { return shared_at<u64>(Ring<STAGES>::BYTES); }  // the rows are
  static VK_DEVICE Left left() { return {shared_at<u8>(ALIGN)}; }
  static VK_DEVICE Right right(i32 i) { return {shared_at<u8>(ALIGN + Left::BYTES + u32(i % STAGES) * STAGE)}; }
  static VK_DEVICE Shared<u8> slope(i32 i, i32 token) { return right(i).base + i32(Right::BYTES) + token * 16; }
  static VK_DEVICE Shared<u8> note(i32 i) { return shared_at<u8>(NOTES + u32(i % STAGES) * 16); }
  VK_DEVICE i32 other(i32 of) const { return load(g.members + of * 2); }
  VK_DEVICE i32 pair(i32 of) const { return load(g.members + of * 2 + 1); }
  VK_DEVICE const Slope* slopes(i32 pair) const { return g.slopes + (i64(group) * g.n_pairs + pair) * g.frame.size; }
  // Whether a block of 64 rows of a pair has a gradient.
  VK_DEVICE bool live(i32 pair, i32 row) const {
    return row < g.frame.size && load(g.flags + (i64(group) * g.n_pairs + pair) * g.blocks + row / BLOCK) != 0;
  }

  // By one thread: the rows, and zeros past their frame.
  VK_DEVICE void bring_rows() const {
    mbarrier_expect(there(), Left::BYTES);
    VK_UNROLL
    for (i32 n = 0; n < Left::COUNT; ++n)
      VK_UNROLL
      for (i32 row = 0; row < ROWS; row += HALF)
        copy_box(left().panel(n) + row * STEP * 2, g.rows, n * STEP, first + row, frame, group, there());
  }
  VK_DEVICE void leave_note(i32 i, u32 readers, i32 pair, i32 token) const { store16(note(i), Words{{readers, u32(pair), u32(token), 0}}); }

  // A warpgroup's work: `turn_to(note, sees)` says which of a lane's rows have a gradient, `gradient(s, note, i)` makes gradients of the
  // logits of products s with the tokens of stage i.
  template <typename Turn, typename Gradient>
  VK_DEVICE void work(Turn turn_to, Gradient gradient) {
    const i32 half = group_index() - 1, row = half * HALF;
    // PART: what a stage adds is kept apart until it is known, and goes to the rows that have a gradient; else it is added by the product.
    Accumulator out[DIM / 8], part[PART ? DIM / 8 : 1];
    bool seen[2] = {false, false};
    clear(out), clear(part);
    const auto add = [&] {
      VK_UNROLL
      for (i32 d = 0; d < (PART ? DIM / 8 : 0); ++d)
        VK_UNROLL
        for (i32 v = 0; v < 4; ++v)
          if (seen[v / 2]) out[d].v[v] += part[PART ? d : 0].v[v];
    };
    mbarrier_wait(there(), 0);
    i32 i = 0;
    Note now;
    // Whether a stage is left for this warpgroup: it is there.
    const auto next = [&] {
      for (;; ++i) {
        ring.wait_full(i);
        const Words w = load16(note(i));
        now = {w.w[0], i32(w.w[1]), i32(w.w[2])};
        if (now.readers == 0) return false;
        if (now.readers >> half & 1) return true;
        ring.release(i);
      }
    };
    for (i32 before = -1; next(); before = i++) {
      bool sees[2] = {true, true};
      turn_to(now, sees);
      // Behind the second product of the stage before, which is still under way.
      Accumulator s[TOKENS / 8];
      products_begin();
      VK_UNROLL
      for (i32 k = 0; k < DIM / 16; ++k) warpgroup_product<T, TOKENS>(s, left().depth_along(row, k), right(i).depth_along(0, k), k > 0);
      products_commit();
      products_wait<0>();
      if (before >= 0) ring.release(before);
      add();
      seen[0] = sees[0], seen[1] = sees[1];
      gradient(s, now, i);
      FragmentA<T> slope[TOKENS / 16];
      VK_UNROLL
      for (i32 n = 0; n < TOKENS / 16; ++n) slope[n] = as_operand<T>(s[2 * n], s[2 * n + 1]);
      products_begin();
      VK_UNROLL
      for (i32 n = 0; n < TOKENS / 16; ++n) {
        if constexpr (PART) warpgroup_product<T, DIM, true>(part, slope[n], right(i).depth_across(n), n > 0);
        else warpgroup_product<T, DIM, true>(out, slope[n], right(i).depth_across(n), true);
      }
      products_commit();
    }
    products_wait<0>();
    add();
    // The rows leave through their own place, 16 bytes at a time.
    named_barrier(u32(half) + 1, GROUP);  // the warpgroup no longer reads it
    const float factor = g.unity == nullptr ? g.scale : g.scale * load(g.unity);
    const i32 own = row + i32(warp_index()) % 4 * PIECE;
    VK_UNROLL
    for (i32 d = 0; d < DIM / 8; ++d)
      VK_UNROLL
      for (i32 h = 0; h < 2; ++h)
        store4(left().chunk(own + accumulator_row(2 * h), d) + i32(lane_index() % 4) * 4,
               Number<T>::pack(out[d].v[2 * h] * factor, out[d].v[2 * h + 1] * factor));
    warp_barrier();
    T* to = static_cast<T*>(g.out) + group * g.out_group + (i64(frame) * g.frame.size + first + own) * g.out_token;
    VK_UNROLL_TWICE
    for (i32 n = i32(lane_index()); n < PIECE * DIM / CHUNK; n += i32(WARP)) {
      const i32 at = n / (DIM / CHUNK), c = n % (DIM / CHUNK);
      if (first + own + at < g.frame.size && c * CHUNK < g.dim)
        store16(to + at * g.out_token + c * CHUNK, load16(left().chunk(own + at, c)));
    }
  }
};

// Rows are queries of one frame, tokens the keys of its targets.
template <typename T, i32 DIM>
VK_DEVICE void dq(const Backward& g) {
  constexpr i32 KEYS = DIM == 64 ? 128 : 64;  // more would spill
  using Work = Program<T, DIM, KEYS, false>;
  Work p(g);
  if (thread_index() == 0) mbarrier_make(p.there(), 1), p.ring.make(1, READERS);
  block_barrier();
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() != 0) return;
    prefetch(g.rows), prefetch(g.tokens);
    p.bring_rows();
    i32 i = 0;
    for (i32 m = p.member; m < p.end; ++m) {
      const i32 pair = p.pair(m), other = p.other(m);
      const u32 readers = u32(p.live(pair, p.first)) | u32(p.live(pair, p.first + HALF)) << 1;
      if (readers == 0) continue;
      for (i32 key = 0; key < g.frame.size; key += KEYS, ++i) {
        p.ring.wait_empty(i);
        p.leave_note(i, readers, pair, key);
        mbarrier_expect(p.ring.full(i), Work::Right::BYTES);
        VK_UNROLL
        for (i32 n = 0; n < Work::Right::COUNT; ++n) copy_box(p.right(i).panel(n), g.tokens, n * STEP, key, other, p.group, p.ring.full(i));
      }
    }
    p.ring.wait_empty(i);
    p.leave_note(i, 0, 0, 0);
    mbarrier_arrive(p.ring.full(i));
    return;
  }
  registers_up<MANY>();
  const i32 row = p.first + (i32(warp_index()) - 4) * PIECE;
  i32 pair = -1;
  Slope slope[2] = {no_slope(), no_slope()};
  const auto turn_to = [&](const Note& note, bool(&sees)[2]) {
    if (pair != note.pair) {
      pair = note.pair;
      VK_UNROLL
      for (i32 h = 0; h < 2; ++h) {
        const i32 mine = row + accumulator_row(2 * h);
        slope[h] = mine < g.frame.size ? load(p.slopes(pair) + mine) : no_slope();
      }
    }
    // Only to rows with a gradient: a key may be NaN for those who see it.
    sees[0] = slope[0].alive(), sees[1] = slope[1].alive();
  };
  p.work(turn_to, [&](Accumulator(&s)[KEYS / 8], const Note& note, i32) {
    const i32 own = note.first + accumulator_column(0);
    Place place[2] = {Place(own, g.frame), Place(own + 1, g.frame)};
    VK_UNROLL
    for (i32 n = 0; n < KEYS / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j) {
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          float& v = s[n].v[2 * h + j];
          v = own + n * 8 + j < g.frame.size ? slope[h].at(v, place[j], g.centre_x, g.centre_y, g.scale * LOG2E) : 0.0f;
        }
        place[j].eight_on(g.frame);
      }
  });
}

// Rows are keys of one frame, tokens the queries of the frames that look at it. Each of the producer's warps brings 16 of a stage's tokens.
template <typename T, i32 DIM>
VK_DEVICE void dk(const Backward& g) {
  constexpr i32 QUERIES = 64;
  using Work = Program<T, DIM, QUERIES, true>;
  Work p(g);
  if (thread_index() == 0) mbarrier_make(p.there(), 1), p.ring.make(4, READERS);
  block_barrier();
  if (group_index() == 0) {
    registers_down<FEW>();
    if (thread_index() == 0) {
      prefetch(g.rows), prefetch(g.tokens);
      p.bring_rows();
    }
    warp_barrier();
    const i32 lane = i32(lane_index()), own = i32(warp_index()) * PIECE;
    const T* q = static_cast<const T*>(g.q) + p.group * g.q_group;
    i32 i = 0;
    for (i32 m = p.member; m < p.end; ++m) {
      const i32 pair = p.pair(m), other = p.other(m);
      const T* from = q + i64(other) * g.frame.size * g.q_token;
      for (i32 first = 0; first < g.frame.size; first += QUERIES) {
        if (!p.live(pair, first)) continue;
        const i32 token = first + own, mine = token + lane % PIECE;
        const Slope slope = mine < g.frame.size ? load(p.slopes(pair) + mine) : no_slope();
        const u32 alive = votes(slope.alive()), past = votes(mine >= g.frame.size);
        p.ring.wait_empty(i);
        if (lane < PIECE)
          store16(p.slope(i, own + lane), Words{{as_bits(slope.x), as_bits(slope.y), as_bits(slope.rest), as_bits(slope.lse)}});
        if (thread_index() == 0) p.leave_note(i, 3, pair, first);
        const auto right = p.right(i);
        if ((alive | past) == 0xffffffffu) {
          warp_barrier();
          if (leads()) {
            mbarrier_expect(p.ring.full(i), u32(Work::Right::COUNT * PIECE * STEP * 2));
            VK_UNROLL
            for (i32 n = 0; n < Work::Right::COUNT; ++n)
              copy_box(right.panel(n) + own * STEP * 2, g.tokens, n * STEP, token, other, p.group, p.ring.full(i));
          }
        } else {
          VK_NO_UNROLL
          for (i32 n = lane; n < PIECE * DIM / CHUNK; n += i32(WARP)) {
            const i32 row = n / (DIM / CHUNK), c = n % (DIM / CHUNK);
            const bool there = (alive >> row & 1) != 0 && c * CHUNK < g.dim;
            copy16(right.chunk(own + row, c), there ? from + (token + row) * g.q_token + c * CHUNK : q, there ? 16 : 0);
          }
          copies_commit(), copies_wait<0>();
          async_fence();
          warp_barrier();
          if (leads()) mbarrier_arrive(p.ring.full(i));
        }
        ++i;
      }
    }
    p.ring.wait_empty(i);
    if (thread_index() == 0) p.leave_note(i, 0, 0, 0);
    if (leads()) mbarrier_arrive(p.ring.full(i));
    return;
  }
  registers_up<MANY>();
  const i32 row = p.first + (i32(warp_index()) - 4) * PIECE;
  const Place place[2] = {Place(row + accumulator_row(0), g.frame), Place(row + accumulator_row(2), g.frame)};
  p.work([](const Note&, bool(&)[2]) {}, [&](Accumulator(&s)[QUERIES / 8], const Note&, i32 i) {
    VK_UNROLL
    for (i32 n = 0; n < QUERIES / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j) {
        const Words w = load16(p.slope(i, n * 8 + accumulator_column(j)));
        const Slope slope = {as_float(w.w[0]), as_float(w.w[1]), as_float(w.w[2]), as_float(w.w[3])};
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          float& v = s[n].v[2 * h + j];
          v = slope.at(v, place[h], g.centre_x, g.centre_y, g.scale * LOG2E);
        }
      }
  });
}

}  // namespace amf
}  // namespace vk

using vk::amf::Backward;

#define VK_AMF(name, ...)                                                                       \
  VK_KERNEL_ALONE(384) name(const VK_PARAMETER Backward given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Backward)
#define VK_AMF_BACKWARD(T, DIM)                         \
  VK_AMF(amf_hopper_dq_##T##_##DIM, dq<vk::T, DIM>)     \
  VK_AMF(amf_hopper_dk_##T##_##DIM, dk<vk::T, DIM>)

VK_AMF_BACKWARD(bf16, 64)
VK_AMF_BACKWARD(bf16, 128)
VK_AMF_BACKWARD(f16, 64)
VK_AMF_BACKWARD(f16, 128)
