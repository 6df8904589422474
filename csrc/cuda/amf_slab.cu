// Attention motion flow, backward where channels are many, for mma.sync (compute capability 8.0 on): of one query frame of one sample and
// group, the gradients of its logits are written once (the slab, [S, targets, S rounded up to 8]), and two products read them: dQ of that
// frame, and its share of dK, added up over query frames in float32, in their order, and rounded once. Heads are read and written where
// they lie. Blocks of rows without gradient are neither made nor read. Deterministic.
#include "amf.h"

namespace vk {
namespace amf {

struct Steps {  // elements between heads and tokens
  i64 head, token;
};

struct Slab {
  const void *q, *k;  // of this sample and group, as are all others
  const Slope* slopes;
  const i32* flags;
  const float* unity;
  void* slab;
  void* out;            // dq or dk
  float* sum;           // [N, channels]: dK so far
  const i32 *slots;     // [*, 2]: target, pair; this frame's are slot to slot + n_slots - 1
  const i32* shares;    // [*, 2]: whether it is the first and whether it is the last share of its target's dK
  Steps q_step, k_step, out_step;
  Frame frame;
  i32 slot, n_slots, query, heads, dim, blocks, padded;  // query: the frame; padded: keys of a slab's row
  float centre_x, centre_y, scale;
  VK_DEVICE i32 target(i32 which) const { return load(slots + (slot + which) * 2); }
  VK_DEVICE i64 pair(i32 which) const { return load(slots + (slot + which) * 2 + 1); }
  VK_DEVICE bool live(i32 which, i32 row) const {
    return row < frame.size && load(flags + pair(which) * blocks + row / BLOCK) != 0;
  }
  VK_DEVICE i64 first_token(i32 f) const { return i64(f) * frame.size; }
  VK_DEVICE bool in_columns(i32 at) const { return at < heads * dim; }
  // Where a column of the concatenated heads is in a token's row; chunks of 8 channels lie in one head.
  VK_DEVICE i64 column(i32 at, const Steps& by) const { return at / dim * by.head + at % dim; }
};

constexpr i32 M = 2, ROWS = M * BLOCK, N = 128;
constexpr i32 DEPTH = 64;  // keys or rows that a product of the slab takes at a time

// One tile of the slab: 128 rows by 128 keys of a target. Programs of a launch, of this kernel and of the others, are numbered by tiles of
// rows first: those that run together share the other operand.
template <typename T>
VK_DEVICE void slope(const Slab& g) {
  const i32 down = tiles_of(g.frame.size, ROWS), across = tiles_of(g.frame.size, N), pid = i32(block_index());
  const i32 row_first = pid % down * ROWS, which = pid / down / across, first = pid / down % across * N;
  if (!g.live(which, row_first) && !g.live(which, row_first + BLOCK)) return;
  const T* q = static_cast<const T*>(g.q) + g.first_token(g.query) * g.q_step.token;
  const T* k = static_cast<const T*>(g.k) + g.first_token(g.target(which)) * g.k_step.token;
  const i32 each = tiles_of(g.dim, STEP);
  const auto ask = [&](i32, i32 c, const Tile<STEP>& a, const Tile<STEP>& b) {
    const i32 head = c / each, from = c % each * STEP;
    a.fill(q + head * g.q_step.head + from, g.q_step.token, row_first, g.frame.size, ROWS, g.dim - from, All{});
    b.fill(k + head * g.k_step.head + from, g.k_step.token, first, g.frame.size, N, g.dim - from, All{});
  };
  const auto done = [&](Accumulator(&s)[M][N / 8], i32) {
    const float scale_log2 = g.scale * LOG2E;
    block_barrier();  // the stages are read no more: the slab leaves through them
    const Slope* slopes = g.slopes + g.pair(which) * g.frame.size;
    const i32 own = first + accumulator_column(0);
    VK_UNROLL
    for (i32 m = 0; m < M; ++m) {
      const i32 row = row_first + m * BLOCK + i32(warp_index()) * 16;
      Slope of[2];
      VK_UNROLL
      for (i32 h = 0; h < 2; ++h) {
        const i32 mine = row + accumulator_row(2 * h);
        of[h] = mine < g.frame.size ? load(slopes + mine) : no_slope();
      }
      Place place[2] = {Place(own, g.frame), Place(own + 1, g.frame)};
      VK_UNROLL
      for (i32 n = 0; n < N / 8; ++n)
        VK_UNROLL
        for (i32 j = 0; j < 2; ++j) {
          VK_UNROLL
          for (i32 h = 0; h < 2; ++h) {
            float& v = s[m][n].v[2 * h + j];
            v = own + n * 8 + j < g.frame.size ? of[h].at(v, place[j], g.centre_x, g.centre_y, scale_log2) : 0.0f;
          }
          place[j].eight_on(g.frame);
        }
      T* to = static_cast<T*>(g.slab) + i64(which) * g.padded + first;
      hand_over<T, N>(s[m], 1.0f, Tile<N>{shared_at<u8>(u32(m * BLOCK * N * 2))}, [&](i32 n, i32 c) {
        return row + n < g.frame.size && first + c * CHUNK < g.padded ? to + i64(row + n) * g.n_slots * g.padded + c * CHUNK : nullptr;
      });
    }
  };
  sweep<T, M, N>(1, each * g.heads, 0, 0xffffffffu, 0, ask, done);
}

// A product of the slab, step after step: `find` moves on to a step that counts and says whether there is one, `ask` has its operands
// copied, `visit` works on them. Two stages, one barrier a step.
template <i32 LEFT, i32 RIGHT, typename Step, typename Find, typename Ask, typename Visit>
VK_DEVICE void steps(Step next, i32 left_rows, Find find, Ask ask, Visit visit) {
  const u32 left = u32(left_rows * LEFT * 2), both = left + DEPTH * RIGHT * 2;
  const auto left_of = [&](u32 n) { return Tile<LEFT>{shared_at<u8>(n * both)}; };
  const auto right_of = [&](u32 n) { return Tile<RIGHT>{shared_at<u8>(n * both + left)}; };
  u32 stage = 0;
  Step at = next;
  bool more = find(next);
  for (bool here = false; here || more; stage ^= 1) {
    if (more) ask(next, left_of(stage ^ 1), right_of(stage ^ 1));
    copies_commit();
    if (here) visit(at, left_of(stage), right_of(stage));
    // The next one is there, and nobody reads this one any more.
    copies_wait<0>();
    block_barrier();
    at = next, here = more;
    if (more) next.first += DEPTH, more = find(next);
  }
}

struct Step {  // a target, and the first of its keys; or the first of the rows
  i32 which, first;
};

// One tile of dQ of the query frame: 128 rows by 64 channels, summed over the keys of its targets.
template <typename T>
VK_DEVICE void slab_dq(const Slab& g) {
  constexpr i32 N = 64;
  const i32 down = tiles_of(g.frame.size, ROWS), pid = i32(block_index()), row_first = pid % down * ROWS, channel = pid / down * N;
  const i32 own = i32(warp_index()) * 16;
  const T* slab = static_cast<const T*>(g.slab);
  // A thread copies one chunk of channels of several keys.
  const i32 mine = channel + i32(thread_index()) % (N / CHUNK) * CHUNK;
  const T* k = static_cast<const T*>(g.k) + g.column(mine, g.k_step);
  Accumulator out[M][N / 8];
  VK_UNROLL
  for (i32 m = 0; m < M; ++m) clear(out[m]);
  steps<DEPTH, N>(
      Step{0, 0}, ROWS,
      [&](Step& at) {
        for (; at.which < g.n_slots; at = {at.which + 1, 0})
          if (at.first < g.frame.size && (g.live(at.which, row_first) || g.live(at.which, row_first + BLOCK))) return true;
        return false;
      },
      [&](const Step& at, const Tile<DEPTH>& a, const Tile<N>& b) {
        put(a, ROWS, slab, [&](i32 row, i32 c) {
          const bool there = row_first + row < g.frame.size && at.first + c * CHUNK < g.padded;
          return there ? slab + (i64(row_first + row) * g.n_slots + at.which) * g.padded + at.first + c * CHUNK : nullptr;
        });
        const T* from = k + (g.first_token(g.target(at.which)) + at.first) * g.k_step.token;
        put(b, DEPTH, static_cast<const T*>(g.k), [&](i32 row, i32) {
          return at.first + row < g.frame.size && g.in_columns(mine) ? from + row * g.k_step.token : nullptr;
        });
      },
      [&](const Step& at, const Tile<DEPTH>& a, const Tile<N>& b) {
        const Slope* slopes = g.slopes + g.pair(at.which) * g.frame.size;
        bool alive[M][2];
        VK_UNROLL
        for (i32 m = 0; m < M; ++m)
          VK_UNROLL
          for (i32 h = 0; h < 2; ++h) {
            const i32 row = row_first + m * BLOCK + own + accumulator_row(2 * h);
            alive[m][h] = row < g.frame.size && load(&slopes[row].lse) != infinity();
          }
        FragmentA<T> left[M][DEPTH / 16];
        VK_UNROLL
        for (i32 m = 0; m < M; ++m)
          VK_UNROLL
          for (i32 d = 0; d < DEPTH / 16; ++d) left[m][d] = a.template left<T>(m * BLOCK + own, d);
        VK_UNROLL
        for (i32 n = 0; n < N / 8; n += 2) {
          Accumulator part[M][2];
          VK_UNROLL
          for (i32 m = 0; m < M; ++m) clear(part[m]);
          VK_UNROLL
          for (i32 d = 0; d < DEPTH / 16; ++d) {
            FragmentB<T> right[2];
            b.template right_transposed<T>(right, d * 16, n);
            VK_UNROLL
            for (i32 m = 0; m < M; ++m) multiply_add(part[m][0], left[m][d], right[0]), multiply_add(part[m][1], left[m][d], right[1]);
          }
          // Only to rows with a gradient: of the others nothing was written, and a key may be NaN for those who see it.
          VK_UNROLL
          for (i32 m = 0; m < M; ++m)
            VK_UNROLL
            for (i32 j = 0; j < 2; ++j)
              VK_UNROLL
              for (i32 i = 0; i < 4; ++i)
                if (alive[m][i / 2]) out[m][n + j].v[i] += part[m][j].v[i];
        }
      });
  const float factor = g.unity == nullptr ? g.scale : g.scale * load(g.unity);
  T* to = static_cast<T*>(g.out) + g.first_token(g.query) * g.out_step.token;
  VK_UNROLL
  for (i32 m = 0; m < M; ++m) {
    const i32 row = row_first + m * BLOCK + own;
    hand_over<T, N>(out[m], factor, Tile<N>{shared_at<u8>(u32(m * BLOCK * N * 2))}, [&](i32 n, i32 c) {
      const i32 column = channel + c * CHUNK;
      return row + n < g.frame.size && g.in_columns(column) ? to + (row + n) * g.out_step.token + g.column(column, g.out_step) : nullptr;
    });
  }
}

// One tile of the share of dK that the query frame has: 128 keys of a target by 128 channels, summed over the rows with gradient.
template <typename T>
VK_DEVICE void slab_dk(const Slab& g) {
  const i32 down = tiles_of(g.frame.size, ROWS), pid = i32(block_index());
  const i32 key_first = pid % down * ROWS, which = pid / down % g.n_slots, channel = pid / down / g.n_slots * N;
  const i32 own = i32(warp_index()) * 16, channels = g.heads * g.dim;
  const T* slab = static_cast<const T*>(g.slab) + i64(which) * g.padded + key_first;
  const Slope* slopes = g.slopes + g.pair(which) * g.frame.size;
  const i32 mine = channel + i32(thread_index()) % (N / CHUNK) * CHUNK;
  const T* q = static_cast<const T*>(g.q) + g.column(mine, g.q_step) + g.first_token(g.query) * g.q_step.token;
  Accumulator out[M][N / 8];
  VK_UNROLL
  for (i32 m = 0; m < M; ++m) clear(out[m]);
  steps<ROWS, N>(
      Step{which, 0}, DEPTH,
      [&](Step& at) {
        while (at.first < g.frame.size && !g.live(which, at.first)) at.first += DEPTH;
        return at.first < g.frame.size;
      },
      [&](const Step& at, const Tile<ROWS>& a, const Tile<N>& b) {
        put(a, DEPTH, static_cast<const T*>(g.slab), [&](i32 row, i32 c) {
          const bool there = at.first + row < g.frame.size && key_first + c * CHUNK < g.padded;
          return there ? slab + i64(at.first + row) * g.n_slots * g.padded + c * CHUNK : nullptr;
        });
        // A row without gradient may hold anything.
        put(b, DEPTH, static_cast<const T*>(g.q), [&](i32 row, i32) {
          const i32 r = at.first + row;
          const bool there = r < g.frame.size && g.in_columns(mine) && load(&slopes[r].lse) != infinity();
          return there ? q + r * g.q_step.token : nullptr;
        });
      },
      [&](const Step&, const Tile<ROWS>& a, const Tile<N>& b) {
        VK_UNROLL_TWICE
        for (i32 d = 0; d < DEPTH / 16; ++d) {
          FragmentA<T> left[M];
          VK_UNROLL
          for (i32 m = 0; m < M; ++m) left[m] = a.template left_transposed<T>(d * 16, (m * BLOCK + own) / CHUNK);
          VK_UNROLL
          for (i32 n = 0; n < N / 8; n += 2) {
            FragmentB<T> right[2];
            b.template right_transposed<T>(right, d * 16, n);
            VK_UNROLL
            for (i32 m = 0; m < M; ++m) multiply_add(out[m][n], left[m], right[0]), multiply_add(out[m][n + 1], left[m], right[1]);
          }
        }
      });
  const bool first_share = load(g.shares + (g.slot + which) * 2) != 0, last_share = load(g.shares + (g.slot + which) * 2 + 1) != 0;
  const i64 target = g.first_token(g.target(which));
  const float factor = g.unity == nullptr ? g.scale : g.scale * load(g.unity);
  T* to = static_cast<T*>(g.out) + target * g.out_step.token;
  VK_UNROLL
  for (i32 m = 0; m < M; ++m) {
    const i32 key = key_first + m * BLOCK + own;
    if (!(first_share && last_share)) {
      VK_UNROLL
      for (i32 n = 0; n < N / 8; ++n)
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const i32 row = key + accumulator_row(2 * h), column = channel + n * 8 + accumulator_column(0);
          if (row >= g.frame.size || column >= channels) continue;
          Two* at = reinterpret_cast<Two*>(g.sum + (target + row) * channels + column);
          Two sum = {out[m][n].v[2 * h], out[m][n].v[2 * h + 1]};
          if (!first_share) {
            const Two before = load(at);
            sum = {before.a + sum.a, before.b + sum.b};
          }
          if (last_share) out[m][n].v[2 * h] = sum.a, out[m][n].v[2 * h + 1] = sum.b;
          else store(at, sum);
        }
    }
    if (!last_share) continue;
    hand_over<T, N>(out[m], factor, Tile<N>{shared_at<u8>(u32(m * BLOCK * N * 2))}, [&](i32 n, i32 c) {
      const i32 column = channel + c * CHUNK;
      return key + n < g.frame.size && g.in_columns(column) ? to + (key + n) * g.out_step.token + g.column(column, g.out_step) : nullptr;
    });
  }
}

}  // namespace amf
}  // namespace vk

using vk::amf::Slab;

#define VK_AMF(name, ...)                                                \
  VK_KERNEL(128) name(const Slab given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Slab)
#define VK_AMF_SLAB(T)                         \
  VK_AMF(amf_slope_##T, slope<vk::T>)          \
  VK_AMF(amf_slab_dq_##T, slab_dq<vk::T>)      \
  VK_AMF(amf_slab_dk_##T, slab_dk<vk::T>)

VK_AMF_SLAB(bf16)
VK_AMF_SLAB(f16)
