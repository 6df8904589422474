// Attention motion flow, backward of one head per group and up to 128 channels, for mma.sync (compute capability 8.0 on), in three
// launches without atomics: what a row's gradient says of its logits, dQ by tiles of rows, dK by tiles of keys. P is made again from the
// log-sum-exp: dl = p (<G, c - m> + dlse), of rank 2 in the keys' places, so that there is no product with values and no second pass for
// row sums. Blocks of rows without gradient are not visited; rows without one may hold anything. Deterministic.
#include "amf.h"

namespace vk {
namespace amf {

struct Prepare {
  const float *dmean, *dlse, *mean, *lse;  // [B, G, P, S (, 2)], dense; dmean (then mean is not read) or dlse null: zero
  const float* unity;                      // gradients are divided by it; null: 1
  Slope* slopes;                           // [B, G, P, S]
  i32* flags;                              // [B, G, P, blocks]: whether a block of rows has any gradient
  i32 maps, size, blocks;                  // maps = B G P
  float centre_x, centre_y;
};

struct Backward {
  const void *q, *k;
  const Slope* slopes;
  const i32* flags;
  const float* unity;
  void* out;                   // dq or dk
  const i32 *tiles, *members;  // [n, 4]: frame, first row in it, its members from, to; [P, 2]: the other frame, pair
  Strides q_step, k_step, out_step;
  Frame frame;
  i32 n_tiles, n_pairs, groups, blocks, dim;
  float centre_x, centre_y, scale;
};

// One warp a block of rows.
VK_DEVICE void prepare(const Prepare& g) {
  const i32 item = i32(block_index()) * WARPS + i32(warp_index()), map = item / g.blocks, block = item % g.blocks;
  if (map >= g.maps) return;
  const float unity = g.unity == nullptr ? 1.0f : 1.0f / load(g.unity);
  u32 any = 0;
  for (i32 part = 0; part < BLOCK; part += i32(WARP)) {
    const i32 row = block * BLOCK + part + i32(lane_index());
    const i64 at = i64(map) * g.size + row;
    Slope s = no_slope();
    if (row < g.size) {
      const float x = g.dmean == nullptr ? 0.0f : load(g.dmean + at * 2) * unity;
      const float y = g.dmean == nullptr ? 0.0f : load(g.dmean + at * 2 + 1) * unity;
      const float rest = g.dlse == nullptr ? 0.0f : load(g.dlse + at) * unity;
      if (x != 0 || y != 0 || rest != 0) {
        s = {x, y, rest, load(g.lse + at) * LOG2E};
        if (g.dmean != nullptr) s.rest -= x * (load(g.mean + at * 2) - g.centre_x) + y * (load(g.mean + at * 2 + 1) - g.centre_y);
      }
      store(g.slopes + at, s);
    }
    any |= votes(s.alive());
  }
  if (lane_index() == 0) store(g.flags + i64(map) * g.blocks + block, i32(any != 0));
}

// The part of a program's work that is asked for at a time: 64 tokens, from `first` on, of the other frame of a member.
struct Step {
  i32 member, first;
};

// What dQ and dK share: a tile of 64 rows of one frame, which stays in registers, against tiles of 64 tokens of other frames.
template <typename T, i32 DIM>
struct Program {
  static constexpr i32 TOKENS = 64;
  const Backward& g;
  i32 frame, first, end;  // of the tile, and of the members
  i64 map, batch, group;
  Step step;
  VK_DEVICE Program(const Backward& g) : g(g) {
    const i32* tile = g.tiles + i32(block_index()) % g.n_tiles * 4;
    map = i32(block_index()) / g.n_tiles, batch = map / g.groups, group = map % g.groups;
    frame = load(tile), first = load(tile + 1), step = {load(tile + 2), 0}, end = load(tile + 3);
  }
  VK_DEVICE i32 row() const { return first + i32(warp_index()) * 16; }
  VK_DEVICE i64 pair(const Step& at) const { return map * g.n_pairs + load(g.members + at.member * 2 + 1); }
  VK_DEVICE const Slope* slopes(const Step& at) const { return g.slopes + pair(at) * g.frame.size; }
  static VK_DEVICE Tile<DIM> tile(i32 n) { return {shared_at<u8>(u32(n * TOKENS * DIM * 2))}; }  // 0: the rows' own; 1, 2: stages
  // First token of a frame.
  VK_DEVICE const T* of(const void* base, const Strides& by, i32 frame) const {
    return group_of<T>(base, by, batch, group) + i64(frame) * g.frame.size * by.token;
  }
  VK_DEVICE const T* other(const void* base, const Strides& by, const Step& at) const {
    return of(base, by, load(g.members + at.member * 2));
  }

  // Runs `visit(step, tile)` over all steps that `live` lets through, while `ask(step, tile)` has the next one copied.
  template <typename Live, typename Ask, typename Visit>
  VK_DEVICE void run(FragmentA<T> (&own)[1][DIM / 16], Live live, Ask ask, Visit visit) {
    // Moves on to a step that counts, if there is one.
    const auto find = [&](Step& at) {
      for (; at.member < end; at.first = 0, ++at.member)
        for (; at.first < g.frame.size; at.first += TOKENS)
          if (live(at)) return true;
      return false;
    };
    Step at = step;
    bool here = false, more = find(step);
    i32 stage = 1;
    do {
      if (more) ask(step, tile(stage ^ 3));
      copies_commit();
      if (here) visit(at, tile(stage));
      // The next one is there, and nobody reads this one any more.
      copies_wait<0>();
      block_barrier();
      if (!here) {
        VK_UNROLL
        for (i32 d = 0; d < DIM / 16; ++d) own[0][d] = tile(0).template left<T>(i32(warp_index()) * 16, d);
      }
      at = step, here = more, stage ^= 3;
      if (more) step.first += TOKENS, more = find(step);
    } while (here);
  }
  // The rows' gradients, times scale.
  VK_DEVICE void leave(const Accumulator (&out)[DIM / 8]) const {
    const float factor = g.unity == nullptr ? g.scale : g.scale * load(g.unity);
    T* to = const_cast<T*>(of(g.out, g.out_step, frame));
    hand_over<T, DIM>(out, factor, tile(0), [&](i32 n, i32 c) {
      return row() + n < g.frame.size && c * CHUNK < g.dim ? to + (row() + n) * g.out_step.token + c * CHUNK : nullptr;
    });
  }
};

// Rows are queries of one frame, tokens the keys of its targets.
template <typename T, i32 DIM>
VK_DEVICE void dq(const Backward& g) {
  constexpr i32 PART = 32;  // keys that are worked on at a time
  Program<T, DIM> p(g);
  const float scale_log2 = g.scale * LOG2E;
  p.tile(0).fill(p.of(g.q, g.q_step, p.frame), g.q_step.token, p.first, g.frame.size, BLOCK, g.dim, All{});
  FragmentA<T> query[1][DIM / 16];
  Accumulator out[DIM / 8];
  clear(out);
  p.run(
      query, [&](const Step& at) { return load(g.flags + p.pair(at) * g.blocks + p.first / BLOCK) != 0; },
      [&](const Step& at, const Tile<DIM>& to) {
        to.fill(p.other(g.k, g.k_step, at), g.k_step.token, at.first, g.frame.size, p.TOKENS, g.dim, All{});
      },
      [&](const Step& at, const Tile<DIM>& keys) {
        Slope slope[2];
        bool alive[2];
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const i32 row = p.row() + accumulator_row(2 * h);
          slope[h] = row < g.frame.size ? load(p.slopes(at) + row) : no_slope();
          alive[h] = slope[h].alive();
        }
        VK_NO_UNROLL
        for (i32 part = 0; part < p.TOKENS; part += PART) {
          Accumulator s[1][PART / 8];
          clear(s[0]);
          multiply<T, DIM, 1, PART>(s, query, keys, part);
          const i32 own = at.first + part + accumulator_column(0);
          Place place[2] = {Place(own, g.frame), Place(own + 1, g.frame)};
          VK_UNROLL
          for (i32 n = 0; n < PART / 8; ++n)
            VK_UNROLL
            for (i32 j = 0; j < 2; ++j) {
              VK_UNROLL
              for (i32 h = 0; h < 2; ++h) {
                float& v = s[0][n].v[2 * h + j];
                v = own + n * 8 + j < g.frame.size ? slope[h].at(v, place[j], g.centre_x, g.centre_y, scale_log2) : 0.0f;
              }
              place[j].eight_on(g.frame);
            }
          // Only to rows with a gradient: a key may be NaN for those who see it.
          gather<T, DIM, PART, true>(out, s[0], keys, part, alive);
        }
      });
  p.leave(out);
}

// Rows are keys of one frame, tokens the queries of the frames that look at it, 0 where they have no gradient.
template <typename T, i32 DIM>
VK_DEVICE void dk(const Backward& g) {
  constexpr i32 PART = 16;  // queries that are worked on at a time: each lane holds the slopes of a quarter of them
  Program<T, DIM> p(g);
  const float scale_log2 = g.scale * LOG2E;
  p.tile(0).fill(p.of(g.k, g.k_step, p.frame), g.k_step.token, p.first, g.frame.size, BLOCK, g.dim, All{});
  FragmentA<T> key[1][DIM / 16];
  Accumulator out[DIM / 8];
  clear(out);
  const Place place[2] = {Place(p.row() + accumulator_row(0), g.frame), Place(p.row() + accumulator_row(2), g.frame)};
  const bool all[2] = {true, true};
  p.run(
      key, [&](const Step& at) { return load(g.flags + p.pair(at) * g.blocks + at.first / BLOCK) != 0; },
      [&](const Step& at, const Tile<DIM>& to) {
        const Slope* slopes = p.slopes(at);
        to.fill(p.other(g.q, g.q_step, at), g.q_step.token, at.first, g.frame.size, p.TOKENS, g.dim,
                [&](i32 row) { return load(&slopes[row].lse) != infinity(); });
      },
      [&](const Step& at, const Tile<DIM>& queries) {
        const Slope* slopes = p.slopes(at);
        VK_NO_UNROLL
        for (i32 part = 0; part < p.TOKENS; part += PART) {
          Accumulator s[1][PART / 8];
          clear(s[0]);
          multiply<T, DIM, 1, PART>(s, key, queries, part);
          const i32 own = at.first + part + accumulator_column(0);
          VK_UNROLL
          for (i32 n = 0; n < PART / 8; ++n)
            VK_UNROLL
            for (i32 j = 0; j < 2; ++j) {
              const i32 row = own + n * 8 + j;
              const Slope slope = row < g.frame.size ? load(slopes + row) : no_slope();
              VK_UNROLL
              for (i32 h = 0; h < 2; ++h) {
                float& v = s[0][n].v[2 * h + j];
                v = slope.at(v, place[h], g.centre_x, g.centre_y, scale_log2);
              }
            }
          gather<T, DIM, PART, false>(out, s[0], queries, part, all);
        }
      });
  p.leave(out);
}

}  // namespace amf
}  // namespace vk

using vk::amf::Backward;
using vk::amf::Prepare;

#define VK_AMF(name, ...)                                                    \
  VK_KERNEL(128) name(const Backward given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Backward)
#define VK_AMF_BACKWARD(T)                     \
  VK_AMF(amf_dq_##T##_64, dq<vk::T, 64>)       \
  VK_AMF(amf_dq_##T##_128, dq<vk::T, 128>)     \
  VK_AMF(amf_dk_##T##_64, dk<vk::T, 64>)       \
  VK_AMF(amf_dk_##T##_128, dk<vk::T, 128>)

VK_KERNEL(128) amf_prepare(const Prepare given) { vk::amf::prepare(given); }
VK_ENTRY(amf_prepare, Prepare)
VK_AMF_BACKWARD(bf16)
VK_AMF_BACKWARD(f16)
