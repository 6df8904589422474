// Attention motion flow, forward, for mma.sync (compute capability 8.0 on): logits of a tile of rows against one frame, tile after tile
// of its keys, and in the epilogue an online softmax that carries the sums of e, e x and e y: expected place, log-sum-exp, largest
// probability and entropy, and the place of the largest logit. Nothing of frames times frames is written. Coordinates are integers, exact
// in float32. A tile holds rows of all query frames that look at one target, end to end. Each lane folds its own columns; lanes meet at
// the end.
#include "amf.h"

namespace vk {
namespace amf {

struct Forward {
  const void *q, *k;
  const float* given;  // of the vote: the log-sum-exp, [B, G, P, S]
  float* mean;         // [B, G, P, S, 2]; this and the others null where they are not wanted
  i32* index;          // [B, G, P, S]; of a vote [B, P, S], as is top
  float *lse, *top, *entropy;
  const i32 *tiles, *members;  // [n, 4]: target, its first member, first row, rows in all; [P, 2]: query frame, pair
  Strides q_step, k_step;
  Frame frame;
  i32 n_tiles, n_pairs, groups, heads, dim;
  float scale_log2;  // of the logits in base 2; positive but for a vote
  u32 keep, flip;    // q's words are (w & keep) ^ flip: -q for a negative scale, 0 for none
};

// A tile of 64 M rows, and what each of its rows is.
struct Rows {
  i32 target, member, first, end;
  VK_DEVICE Rows(const i32* tile) { target = load(tile), member = load(tile + 1), first = load(tile + 2), end = load(tile + 3); }
  VK_DEVICE bool inside(i32 row) const { return first + row < end; }
  // Token of q, or, WHICH = 1, entry of [P, S], of a row that is inside.
  template <i32 WHICH>
  VK_DEVICE i64 of(i32 row, const Forward& g) const {
    const i32 at = first + row, frame = at / g.frame.size;
    return i64(load(g.members + (member + frame) * 2 + WHICH)) * g.frame.size + at % g.frame.size;
  }
};

// The row in the tile of row h of a lane's fragment m.
VK_DEVICE i32 row_of(i32 m, i32 h) { return m * BLOCK + i32(warp_index()) * 16 + accumulator_row(2 * h); }

// Tokens of the tile's rows, kept in shared memory: fills look them up.
constexpr u32 NONE = 0xffffffffu;
template <i32 M>
VK_DEVICE void list_tokens(const Rows& rows, const Forward& g) {
  if (const i32 row = i32(thread_index()); row < M * BLOCK)
    store4(shared_at<u8>(0) + row * 4, rows.inside(row) ? u32(rows.of<0>(row, g)) : NONE);
}

// What a lane holds of its rows: the largest product, and, relative to it, sums of e = 2^(logit - largest), e x, e y and e (logit -
// largest); and the lowest key that has the largest.
template <i32 M, bool FULL>
struct State {
  static constexpr i32 MORE = FULL ? 2 * M : 1;
  float best[2 * M], total[2 * M], x[2 * M], y[2 * M], tilt[MORE];
  i32 where[MORE];
  VK_DEVICE State() {
    VK_UNROLL
    for (i32 i = 0; i < 2 * M; ++i) best[i] = -infinity(), total[i] = x[i] = y[i] = 0;
    VK_UNROLL
    for (i32 i = 0; i < MORE; ++i) tilt[i] = 0, where[i] = 0;
  }
  VK_DEVICE float top(i32 i, float scale_log2) const { return max_of(best[i] * scale_log2, LEAST); }
};

// The keys from `first` on. TAIL: the frame may end among them.
template <bool TAIL, bool FULL, i32 M, i32 N>
VK_DEVICE void fold_tile(State<M, FULL>& r, Accumulator (&s)[M][N / 8], i32 first, const Frame& f, float scale_log2) {
  const i32 own = first + accumulator_column(0);
  if (TAIL) {
    VK_UNROLL
    for (i32 n = 0; n < N / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j)
        if (own + n * 8 + j >= f.size) {
          VK_UNROLL
          for (i32 i = 0; i < 2 * M; ++i) s[i / 2][n].v[i % 2 * 2 + j] = -infinity();
        }
  }
  float top[2 * M];
  VK_UNROLL
  for (i32 i = 0; i < 2 * M; ++i) {
    const float before = r.top(i, scale_log2);
    float best = r.best[i];
    VK_UNROLL
    for (i32 n = 0; n < N / 8; ++n)
      VK_UNROLL
      for (i32 j = 0; j < 2; ++j) {
        const float v = s[i / 2][n].v[i % 2 * 2 + j];
        if (FULL && v > best) r.where[FULL ? i : 0] = own + n * 8 + j;  // keys ascend: the lowest of equals stays
        best = max_of(best, v);
      }
    r.best[i] = best;
    top[i] = r.top(i, scale_log2);
    const float shrink = exp2_approx(before - top[i]);
    if (FULL) r.tilt[FULL ? i : 0] = shrink * (r.tilt[FULL ? i : 0] + r.total[i] * (before - top[i]));
    r.total[i] *= shrink, r.x[i] *= shrink, r.y[i] *= shrink;
  }
  Place at[2] = {Place(own, f), Place(own + 1, f)};
  VK_UNROLL
  for (i32 n = 0; n < N / 8; ++n)
    VK_UNROLL
    for (i32 j = 0; j < 2; ++j) {
      VK_UNROLL
      for (i32 i = 0; i < 2 * M; ++i) {
        const float below = s[i / 2][n].v[i % 2 * 2 + j] * scale_log2 - top[i], e = exp2_approx(below);
        r.total[i] += e, r.x[i] += e * at[j].x, r.y[i] += e * at[j].y;
        if (FULL) r.tilt[FULL ? i : 0] += e * max_of(below, LEAST);
      }
      at[j].eight_on(f);
    }
}
template <bool FULL, i32 M, i32 N>
VK_DEVICE void fold(State<M, FULL>& r, Accumulator (&s)[M][N / 8], i32 first, const Frame& f, float scale_log2) {
  if (first + N <= f.size) fold_tile<false, FULL, M, N>(r, s, first, f, scale_log2);
  else fold_tile<true, FULL, M, N>(r, s, first, f, scale_log2);
}

// The larger of two values and its key among the four lanes of a row, the lowest key of equals. Keys are exact in float32.
VK_DEVICE void best_of_quad(float& best, i32& where) {
  VK_UNROLL
  for (u32 mask = 1; mask < 4; mask *= 2) {
    const float other = shuffle_xor(best, mask);
    const i32 there = i32(shuffle_xor(float(where), mask));
    if (other > best || (other == best && there < where)) best = other, where = there;
  }
}

template <bool FULL, i32 M>
VK_DEVICE void finish(State<M, FULL>& r, const Rows& rows, i64 map, const Forward& g) {
  VK_UNROLL
  for (i32 i = 0; i < 2 * M; ++i) {
    const float own = r.top(i, g.scale_log2), top = quad_max(own), shrink = exp2_approx(own - top);
    const float total = quad_sum(r.total[i] * shrink), x = quad_sum(r.x[i] * shrink), y = quad_sum(r.y[i] * shrink);
    float tilt = 0;
    if (FULL) {
      tilt = quad_sum(shrink * (r.tilt[FULL ? i : 0] + r.total[i] * (own - top)));
      best_of_quad(r.best[i], r.where[FULL ? i : 0]);
    }
    const i32 row = row_of(i / 2, i % 2);
    if (lane_index() % 4 != 0 || !rows.inside(row)) continue;
    const i64 at = map * g.n_pairs * g.frame.size + rows.of<1>(row, g);
    if (g.mean != nullptr) store(g.mean + at * 2, x / total), store(g.mean + at * 2 + 1, y / total);
    if (g.lse != nullptr) store(g.lse + at, (top + log2_approx(total)) * LN2);
    if (!FULL) continue;
    if (g.index != nullptr) store(g.index + at, r.where[FULL ? i : 0]);
    if (g.top != nullptr) store(g.top + at, 1.0f / total);
    if (g.entropy != nullptr) store(g.entropy + at, (log2_approx(total) - tilt / total) * LN2);
  }
}

constexpr i32 M = 2, ROWS = M * BLOCK;

// One head per group and up to DIM channels: the queries stay in registers, and keys come in two stages.
template <typename T, i32 DIM, bool FULL>
VK_DEVICE void forward_held(const Forward& g) {
  constexpr i32 N = 64;
  const i64 map = i32(block_index()) / g.n_tiles, batch = map / g.groups, group = map % g.groups;
  const Rows rows(g.tiles + i32(block_index()) % g.n_tiles * 4);
  const T* q = group_of<T>(g.q, g.q_step, batch, group);
  const T* k = group_of<T>(g.k, g.k_step, batch, group) + i64(rows.target) * g.frame.size * g.k_step.token;
  const auto stage = [](i32 n) { return Tile<DIM>{shared_at<u8>(u32((ROWS + n * N) * DIM * 2))}; };
  const auto ask = [&](i32 first) { stage(first / N % 2).fill(k, g.k_step.token, first, g.frame.size, N, g.dim, All{}); };
  const Tile<DIM> own{shared_at<u8>(0)};
  put(own, ROWS, q, [&](i32 row, i32 c) {
    return rows.inside(row) && c * CHUNK < g.dim ? q + rows.of<0>(row, g) * g.q_step.token + c * CHUNK : nullptr;
  });
  ask(0);
  copies_commit();
  FragmentA<T> query[M][DIM / 16];
  State<M, FULL> r;
  for (i32 first = 0; first < g.frame.size; first += N) {
    copies_wait<0>();
    block_barrier();
    if (first + N < g.frame.size) ask(first + N);
    copies_commit();
    if (first == 0) {
      VK_UNROLL
      for (i32 m = 0; m < M; ++m)
        VK_UNROLL
        for (i32 d = 0; d < DIM / 16; ++d) {
          query[m][d] = own.template left<T>(m * BLOCK + i32(warp_index()) * 16, d);
          VK_UNROLL
          for (i32 w = 0; w < 4; ++w) query[m][d].w[w] = (query[m][d].w[w] & g.keep) ^ g.flip;
        }
    }
    Accumulator s[M][N / 8];
    VK_UNROLL
    for (i32 m = 0; m < M; ++m) clear(s[m]);
    multiply<T, DIM, M, N>(s, query, stage(first / N % 2), 0);
    fold<FULL, M, N>(r, s, first, g.frame, g.scale_log2);
  }
  finish(r, rows, map, g);
}

// Operands of a sweep: chunk c of the rows listed in shared memory, and of `n` keys from token `key` on.
template <typename T>
VK_DEVICE void ask_chunk(const Forward& g, const T* q, const T* k, i32 c, i32 m_rows, i64 key, i32 n, i32 n_end, const Tile<STEP>& a,
                         const Tile<STEP>& b) {
  const i32 each = (g.dim + STEP - 1) / STEP, head = c / each, first = c % each * STEP;
  q += head * g.q_step.head + first, k += head * g.k_step.head + first + key * g.k_step.token;
  put(a, m_rows, q, [&](i32 row, i32 chunk) {
    const u32 token = load4(shared_at<u8>(0) + row * 4);
    return token != NONE && first + chunk * CHUNK < g.dim ? q + i64(token) * g.q_step.token + chunk * CHUNK : nullptr;
  });
  b.fill(k, g.k_step.token, 0, n_end, n, g.dim - first, All{});
}

// Heads side by side, or more channels than registers hold.
template <typename T, bool FULL>
VK_DEVICE void forward_wide(const Forward& g) {
  constexpr i32 N = 128;
  const i64 map = i32(block_index()) / g.n_tiles, batch = map / g.groups, group = map % g.groups;
  const Rows rows(g.tiles + i32(block_index()) % g.n_tiles * 4);
  const T* q = group_of<T>(g.q, g.q_step, batch, group);
  const T* k = group_of<T>(g.k, g.k_step, batch, group) + i64(rows.target) * g.frame.size * g.k_step.token;
  list_tokens<M>(rows, g);
  block_barrier();
  State<M, FULL> r;
  sweep<T, M, N>(
      (g.frame.size + N - 1) / N, (g.dim + STEP - 1) / STEP * g.heads, ROWS * 4, g.keep, g.flip,
      [&](i32 i, i32 c, const Tile<STEP>& a, const Tile<STEP>& b) { ask_chunk(g, q, k, c, ROWS, i * N, N, g.frame.size - i * N, a, b); },
      [&](Accumulator(&s)[M][N / 8], i32 i) { fold<FULL, M, N>(r, s, i * N, g.frame, g.scale_log2); });
  finish(r, rows, map, g);
}

// Where the probabilities of all groups together are largest, and that mean probability: the products of a tile of keys group after group.
template <typename T>
VK_DEVICE void vote(const Forward& g) {
  constexpr i32 N = 64;
  const i64 batch = i32(block_index()) / g.n_tiles, plane = i64(g.n_pairs) * g.frame.size;
  const Rows rows(g.tiles + i32(block_index()) % g.n_tiles * 4);
  const T* q = group_of<T>(g.q, g.q_step, batch, 0);
  const T* k = group_of<T>(g.k, g.k_step, batch, 0) + i64(rows.target) * g.frame.size * g.k_step.token;
  list_tokens<1>(rows, g);
  block_barrier();
  i64 entry[2];
  float best[2];
  i32 where[2] = {0, 0};
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    entry[h] = rows.inside(row_of(0, h)) ? rows.of<1>(row_of(0, h), g) : -1;
    best[h] = -infinity();
  }
  Accumulator votes[N / 8];
  sweep<T, 1, N>(
      (g.frame.size + N - 1) / N * g.groups, (g.dim + STEP - 1) / STEP * g.heads, BLOCK * 4, NONE, 0,
      [&](i32 i, i32 c, const Tile<STEP>& a, const Tile<STEP>& b) {
        const i32 group = i % g.groups, first = i / g.groups * N;
        ask_chunk(g, q + group * g.q_step.group, k + group * g.k_step.group, c, BLOCK, first, N, g.frame.size - first, a, b);
      },
      [&](Accumulator(&s)[1][N / 8], i32 i) {
        const i32 group = i % g.groups, own = i / g.groups * N + accumulator_column(0);
        if (group == 0) clear(votes);
        VK_UNROLL
        for (i32 h = 0; h < 2; ++h) {
          const float lse = entry[h] < 0 ? 0.0f : load(g.given + (batch * g.groups + group) * plane + entry[h]) * LOG2E;
          VK_UNROLL
          for (i32 n = 0; n < N / 8; ++n)
            VK_UNROLL
            for (i32 j = 0; j < 2; ++j) {
              // A log-sum-exp of 1e8 is rounded by several units: no probability is above 1 for that.
              const float below = s[0][n].v[2 * h + j] * g.scale_log2 - lse;
              votes[n].v[2 * h + j] += exp2_approx(below > 0 ? 0.0f : below);
            }
        }
        if (group + 1 < g.groups) return;
        VK_UNROLL
        for (i32 n = 0; n < N / 8; ++n)
          VK_UNROLL
          for (i32 j = 0; j < 2; ++j)
            VK_UNROLL
            for (i32 h = 0; h < 2; ++h) {
              const i32 key = own + n * 8 + j;
              if (key < g.frame.size && votes[n].v[2 * h + j] > best[h]) best[h] = votes[n].v[2 * h + j], where[h] = key;
            }
      });
  VK_UNROLL
  for (i32 h = 0; h < 2; ++h) {
    best_of_quad(best[h], where[h]);
    if (lane_index() % 4 != 0 || entry[h] < 0) continue;
    if (g.index != nullptr) store(g.index + batch * plane + entry[h], where[h]);
    if (g.top != nullptr) store(g.top + batch * plane + entry[h], best[h] / float(g.groups));
  }
}

}  // namespace amf
}  // namespace vk

using vk::amf::Forward;

#define VK_AMF(name, ...)                                                 \
  VK_KERNEL(128) name(const Forward given) { vk::amf::__VA_ARGS__(given); } \
  VK_ENTRY(name, Forward)
#define VK_AMF_FORWARD(T)                                         \
  VK_AMF(amf_forward_##T##_64, forward_held<vk::T, 64, false>)    \
  VK_AMF(amf_forward_##T##_64_full, forward_held<vk::T, 64, true>)   \
  VK_AMF(amf_forward_##T##_128, forward_held<vk::T, 128, false>)  \
  VK_AMF(amf_forward_##T##_128_full, forward_held<vk::T, 128, true>) \
  VK_AMF(amf_forward_##T##_wide, forward_wide<vk::T, false>)      \
  VK_AMF(amf_forward_##T##_wide_full, forward_wide<vk::T, true>)  \
  VK_AMF(amf_vote_##T, vote<vk::T>)

VK_AMF_FORWARD(bf16)
VK_AMF_FORWARD(f16)
