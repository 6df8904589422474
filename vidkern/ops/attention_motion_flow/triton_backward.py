"""Triton kernels of the backward for one head per group and up to 128 dims: what a row's gradient says of its logits, then dQ by tiles of
rows and dK by tiles of keys, both recomputing the softmax.

``dl_ij = p_ij (<G_i, c_j - m_i> + dlse_i) = p_ij (Gx x_j + Gy y_j + r_i)``: no product with values, and no second pass for the row sums.
Every sum has a fixed order and there are no atomics: the same bits from run to run. Blocks of ROWS rows without gradient are not visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import IEEE, LOG2E, along, coordinates, rows_at

ROWS = tl.constexpr(64)  # rows that are skipped together


@triton.jit(do_not_specialize=["groups", "n_pairs", "size", "blocks", "plane"])
def prepare_kernel(
    DMEAN, DLSE, MEAN, LSE, UNITY, COEF, FLAGS, LIVE, BITS, COUNT, groups, n_pairs, size, blocks, plane, centre_x, centre_y,
    stride_gb, stride_gg, stride_gp, stride_gs, stride_gc, stride_tb, stride_tg, stride_tp, stride_ts,
    HAS_MEAN: tl.constexpr, HAS_LSE: tl.constexpr, HAS_UNITY: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of one pair of frames of one group: COEF float32 [4, B, G, P, S] (Gx, Gy, r, and the log-sum-exp in base 2, infinite for rows
    without gradient). Which blocks of ROWS rows have any: FLAGS int32 [B, G, P, blocks]; COUNT int32 [B, G, P] of them, their numbers LIVE
    and which of their rows BITS int64, both [B, G, P, blocks] and one unused entry.

    Coordinates are relative to the frame's centre, which halves the rounding of r. UNITY: gradients are divided by it."""
    own = tl.program_id(0)
    entry = own.to(tl.int64)
    batch = (own // n_pairs // groups).to(tl.int64)
    group = (own // n_pairs % groups).to(tl.int64)
    pair = (own % n_pairs).to(tl.int64)
    plane = plane.to(tl.int64)
    count = 0
    for start in range(0, blocks, BLOCK_R):
        block = start + tl.arange(0, BLOCK_R)
        row = block[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        inside = row < size
        at = entry * size + row
        gx = tl.zeros([BLOCK_R, ROWS], tl.float32)
        gy = tl.zeros([BLOCK_R, ROWS], tl.float32)
        rest = tl.zeros([BLOCK_R, ROWS], tl.float32)
        unity = 1.0
        if HAS_UNITY:
            unity = 1.0 / tl.load(UNITY)
        if HAS_LSE:
            t_ptr = DLSE + batch * stride_tb + group * stride_tg + pair * stride_tp + row.to(tl.int64) * stride_ts
            rest = tl.load(t_ptr, mask=inside, other=0.0).to(tl.float32) * unity
        alive = rest != 0.0
        if HAS_MEAN:
            g_ptr = DMEAN + batch * stride_gb + group * stride_gg + pair * stride_gp + row.to(tl.int64) * stride_gs
            gx = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32) * unity
            gy = tl.load(g_ptr + stride_gc, mask=inside, other=0.0).to(tl.float32) * unity
            mean_x = tl.load(MEAN + at * 2, mask=inside, other=0.0) - centre_x
            mean_y = tl.load(MEAN + at * 2 + 1, mask=inside, other=0.0) - centre_y
            alive = alive | (gx != 0.0) | (gy != 0.0)
            rest -= gx * mean_x + gy * mean_y
        lse = tl.load(LSE + at, mask=inside, other=0.0) * LOG2E
        tl.store(COEF + at, gx, mask=inside)
        tl.store(COEF + plane + at, gy, mask=inside)
        tl.store(COEF + plane * 2 + at, tl.where(alive, rest, 0.0), mask=inside)
        tl.store(COEF + plane * 3 + at, tl.where(alive, lse, float("inf")), mask=inside)
        any_alive = tl.max(alive.to(tl.int32), 1)
        tl.store(FLAGS + entry * blocks + block, any_alive, mask=block < blocks)
        before = tl.cumsum(any_alive, 0) - any_alive
        to = entry * blocks + count + before
        tl.store(LIVE + to, block, mask=any_alive != 0)
        bits = tl.sum(alive.to(tl.int64) << tl.arange(0, ROWS).to(tl.int64)[None, :], 1)
        tl.store(BITS + to, bits, mask=any_alive != 0)
        count += tl.sum(any_alive, 0)
    tl.store(COUNT + own, count)


@triton.jit
def coefficients(COEF, at, plane, inside):
    """(Gx, Gy, r, log-sum-exp in base 2) of rows."""
    plane = plane.to(tl.int64)
    gx = tl.load(COEF + at, mask=inside, other=0.0)
    gy = tl.load(COEF + plane + at, mask=inside, other=0.0)
    rest = tl.load(COEF + plane * 2 + at, mask=inside, other=0.0)
    lse = tl.load(COEF + plane * 3 + at, mask=inside, other=float("inf"))
    return gx, gy, rest, lse


@triton.jit
def any_live(FLAGS, at, block, blocks, ROW_BLOCKS: tl.constexpr):
    """Whether one of ROW_BLOCKS blocks of a pair (whose flags start ``at``) has a gradient."""
    found = 0
    for i in tl.static_range(ROW_BLOCKS):
        found |= tl.load(FLAGS + at + block + i, mask=block + i < blocks, other=0)
    return found != 0


@triton.jit
def listed_at(LIVE, BITS, listed, step, STEP: tl.constexpr):
    """(number, bits) of the block that step ``step`` of STEP rows is in, of the list that starts at ``listed``."""
    at = listed + step * STEP // ROWS
    return tl.load(LIVE + at), tl.load(BITS + at)


@triton.jit
def live_rows(number, bits, step, STEP: tl.constexpr):
    """Rows of a step, and which of them have a gradient; the others may hold anything and are not read."""
    lane = step * STEP - step * STEP // ROWS * ROWS + tl.arange(0, STEP)
    return number * ROWS + lane, ((bits >> lane.to(tl.int64)) & 1) != 0


@triton.jit(do_not_specialize=["n_tiles", "n_pairs", "groups", "size", "dim_units", "blocks", "plane"])
def dq_kernel(
    Q, K, COEF, FLAGS, UNITY, DQ, TILES, MEMBERS,
    n_tiles, n_pairs, groups, size, dim_units, blocks, plane, width, inverse, centre_x, centre_y, scale, scale_log2,
    stride_qb, stride_qg, stride_ql, stride_kb, stride_kg, stride_kl, stride_ub, stride_ug, stride_ul,
    EVEN_K: tl.constexpr, HAS_UNITY: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ROW_BLOCKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """DQ of one tile of rows of one query frame, over all its targets. TILES int32 [tiles, 4]: frame, first row in it, its members from, to;
    MEMBERS int32 [pairs, 2]: target frame, pair."""
    pid = tl.program_id(0)
    dim = dim_units * UNIT
    own = pid // n_tiles
    tile = TILES + (pid - own * n_tiles) * 4
    batch = own // groups
    group = own - batch * groups
    frame = tl.load(tile)
    first = tl.load(tile + 1)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < size
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < dim
    block = inside[:, None] & in_dim[None, :]
    q_base = Q + along(batch, stride_qb, UNIT) + along(group, stride_qg, UNIT) + along(frame * size, stride_ql, UNIT)
    q = tl.load(q_base + rows_at(row, stride_ql, WIDE, UNIT)[:, None] + dims[None, :], mask=block, other=0.0)
    k_from = K + along(batch, stride_kb, UNIT) + along(group, stride_kg, UNIT)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for m in range(tl.load(tile + 2), tl.load(tile + 3)):
        entry = own.to(tl.int64) * n_pairs + tl.load(MEMBERS + m * 2 + 1)
        if any_live(FLAGS, entry * blocks, first // ROWS, blocks, ROW_BLOCKS):
            gx, gy, rest, lse = coefficients(COEF, entry * size + row, plane, inside)
            k_base = k_from + along(tl.load(MEMBERS + m * 2) * size, stride_kl, UNIT)
            for start in range(0, size, BLOCK_N):
                key = start + tl.arange(0, BLOCK_N)
                seen = key < size
                k_ptr = k_base + rows_at(key, stride_kl, WIDE, UNIT)[:, None] + dims[None, :]
                if EVEN_K:
                    k = tl.load(k_ptr, mask=seen[:, None], other=0.0)
                else:
                    k = tl.load(k_ptr, mask=seen[:, None] & in_dim[None, :], other=0.0)
                p = tl.exp2(tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision=IEEE) * scale_log2 - lse[:, None])
                x, y = coordinates(key, width, inverse)
                slope = gx[:, None] * (x - centre_x)[None, :] + (gy[:, None] * (y - centre_y)[None, :] + rest[:, None])
                # Keys beyond the frame were read as zeros, but beside deep logits a logit of zero is infinitely likely; rows without
                # gradient may hold anything.
                dl = tl.where((lse != float("inf"))[:, None] & seen[None, :], p * slope, 0.0)
                acc += tl.dot(dl.to(k.dtype).to(DOT), k.to(DOT), input_precision=IEEE)
    if HAS_UNITY:
        scale *= tl.load(UNITY)
    u_base = DQ + along(batch, stride_ub, UNIT) + along(group, stride_ug, UNIT) + along(frame * size, stride_ul, UNIT)
    u_ptr = u_base + rows_at(row, stride_ul, WIDE, UNIT)[:, None] + dims[None, :]
    tl.store(u_ptr, (acc * scale).to(DQ.dtype.element_ty), mask=block)


@triton.jit(do_not_specialize=["n_tiles", "n_pairs", "groups", "size", "dim_units", "blocks", "plane"])
def dk_kernel(
    Q, K, COEF, LIVE, BITS, COUNT, UNITY, DK, TILES, MEMBERS,
    n_tiles, n_pairs, groups, size, dim_units, blocks, plane, width, inverse, centre_x, centre_y, scale, scale_log2,
    stride_qb, stride_qg, stride_ql, stride_kb, stride_kg, stride_kl, stride_ub, stride_ug, stride_ul,
    EVEN_K: tl.constexpr, HAS_UNITY: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """DK of one tile of keys of one target frame, over all query frames that have it. TILES as for DQ, MEMBERS: query frame, pair. Only the
    blocks of rows in LIVE are visited, BLOCK_N rows at a time. AHEAD: their numbers are read a step early, because loads that wait for an index
    in their own step are not prefetched; Triton's pass for sm_100 fails on it."""
    pid = tl.program_id(0)
    dim = dim_units * UNIT
    own = pid // n_tiles
    tile = TILES + (pid - own * n_tiles) * 4
    batch = own // groups
    group = own - batch * groups
    frame = tl.load(tile)
    key = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    seen = key < size
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < dim
    block = seen[:, None] & in_dim[None, :]
    k_base = K + along(batch, stride_kb, UNIT) + along(group, stride_kg, UNIT) + along(frame * size, stride_kl, UNIT)
    k = tl.load(k_base + rows_at(key, stride_kl, WIDE, UNIT)[:, None] + dims[None, :], mask=block, other=0.0)
    q_from = Q + along(batch, stride_qb, UNIT) + along(group, stride_qg, UNIT)
    x, y = coordinates(key, width, inverse)
    x -= centre_x
    y -= centre_y
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for m in range(tl.load(tile + 2), tl.load(tile + 3)):
        entry = own.to(tl.int64) * n_pairs + tl.load(MEMBERS + m * 2 + 1)
        q_base = q_from + along(tl.load(MEMBERS + m * 2) * size, stride_ql, UNIT)
        listed = entry * blocks
        number, bits = listed_at(LIVE, BITS, listed, 0, BLOCK_N)
        for i in range(tl.load(COUNT + entry) * (ROWS // BLOCK_N)):
            if not AHEAD:
                number, bits = listed_at(LIVE, BITS, listed, i, BLOCK_N)
            row, there = live_rows(number, bits, i, BLOCK_N)
            if AHEAD:
                number, bits = listed_at(LIVE, BITS, listed, i + 1, BLOCK_N)
            gx, gy, rest, lse = coefficients(COEF, entry * size + row, plane, there)
            q_ptr = q_base + rows_at(row, stride_ql, WIDE, UNIT)[:, None] + dims[None, :]
            if EVEN_K:
                q = tl.load(q_ptr, mask=there[:, None], other=0.0)
            else:
                q = tl.load(q_ptr, mask=there[:, None] & in_dim[None, :], other=0.0)
            p = tl.exp2(tl.dot(k.to(DOT), tl.trans(q).to(DOT), input_precision=IEEE) * scale_log2 - lse[None, :])
            dl = p * (x[:, None] * gx[None, :] + (y[:, None] * gy[None, :] + rest[None, :]))
            acc += tl.dot(dl.to(q.dtype).to(DOT), q.to(DOT), input_precision=IEEE)
    if HAS_UNITY:
        scale *= tl.load(UNITY)
    u_base = DK + along(batch, stride_ub, UNIT) + along(group, stride_ug, UNIT) + along(frame * size, stride_ul, UNIT)
    u_ptr = u_base + rows_at(key, stride_ul, WIDE, UNIT)[:, None] + dims[None, :]
    tl.store(u_ptr, (acc * scale).to(DK.dtype.element_ty), mask=block)
