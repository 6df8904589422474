"""Triton kernels of the forward: products of a tile of rows with one target frame, tile after tile of its keys, and what the softmax over
that frame says of each row: expected place, log-sum-exp, largest probability, entropy, and the place of the largest logit.

Nothing of frames times frames is written. A tile may hold rows of several query frames, since it reads from one target frame alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import IEEE, LEAST, LN2, LOG2E, along, fold_best, fold_soft, ranked, rows_at, tile_product


@triton.jit
def rows_of(TILES, MEMBERS, tile, size, BLOCK_M: tl.constexpr):
    """(target frame, rows of q, entries of the pairs' rows, which exist) of a tile. TILES int32 [tiles, 4]: target, its first member, first
    row, rows in all; MEMBERS int32 [pairs, 2]: query frame, pair."""
    target = tl.load(TILES + tile * 4)
    member = MEMBERS + tl.load(TILES + tile * 4 + 1) * 2
    row = tl.load(TILES + tile * 4 + 2) + tl.arange(0, BLOCK_M)
    inside = row < tl.load(TILES + tile * 4 + 3)
    which = row // size
    patch = row - which * size
    frame = tl.load(member + which * 2, mask=inside, other=0)
    pair = tl.load(member + which * 2 + 1, mask=inside, other=0)
    return target, frame * size + patch, pair.to(tl.int64) * size + patch, inside


@triton.jit(do_not_specialize=["n_tiles", "n_pairs", "groups", "size", "dim_units", "per_head", "chunks"])
def forward_kernel(
    Q, K, MEAN, INDEX, LSE, TOP, ENTROPY, TILES, MEMBERS,
    n_tiles, n_pairs, groups, size, dim_units, per_head, chunks, width, inverse, scale_log2,
    stride_qb, stride_qg, stride_qh, stride_ql, stride_kb, stride_kg, stride_kh, stride_kl,
    HELD: tl.constexpr, SIGN: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_LSE: tl.constexpr, HAS_TOP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one group; results are contiguous [B, G, P, S]. HELD: one chunk is the whole of q, which stays where it is."""
    pid = tl.program_id(0)
    dim = dim_units * UNIT
    own = pid // n_tiles
    batch = own // groups
    group = own - batch * groups
    target, row, entry, inside = rows_of(TILES, MEMBERS, pid - own * n_tiles, size, BLOCK_M)
    q_row = Q + along(batch, stride_qb, UNIT) + along(group, stride_qg, UNIT) + rows_at(row, stride_ql, WIDE, UNIT)[:, None]
    k_base = K + along(batch, stride_kb, UNIT) + along(group, stride_kg, UNIT) + along(target * size, stride_kl, UNIT)
    SOFT: tl.constexpr = HAS_MEAN or HAS_LSE or HAS_TOP or HAS_ENTROPY
    lane = tl.arange(0, BLOCK_K)
    if HELD:
        q = tl.load(q_row + lane[None, :], mask=inside[:, None] & (lane < dim)[None, :], other=0.0)

    top = tl.full([BLOCK_M], LEAST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_x = tl.zeros([BLOCK_M], tl.float32)
    sum_y = tl.zeros([BLOCK_M], tl.float32)
    tilt = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, size, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        seen = key < size
        k_row = k_base + rows_at(key, stride_kl, WIDE, UNIT)[None, :]
        if HELD:
            if EVEN_K:
                k = tl.load(k_row + lane[:, None], mask=seen[None, :], other=0.0)
            else:
                k = tl.load(k_row + lane[:, None], mask=seen[None, :] & (lane < dim)[:, None], other=0.0)
            product = tl.dot(q.to(DOT), k.to(DOT), input_precision=IEEE)
        else:
            product = tile_product(
                q_row, k_row, inside, seen, stride_qh, stride_kh, 0, chunks, per_head, dim, BLOCK_K, EVEN_K, BLOCK_M, BLOCK_N, UNIT, DOT
            )
        value = ranked(product, seen, SIGN)
        high = tl.max(value, 1)
        if HAS_INDEX:
            best, where = fold_best(value, high, key, best, where)
        if SOFT:
            top, total, sum_x, sum_y, tilt = fold_soft(
                value, high, key, scale_log2, width, inverse, top, total, sum_x, sum_y, tilt, HAS_MEAN, HAS_ENTROPY
            )

    at = own.to(tl.int64) * n_pairs * size + entry
    if HAS_MEAN:
        tl.store(MEAN + at * 2, sum_x / total, mask=inside)
        tl.store(MEAN + at * 2 + 1, sum_y / total, mask=inside)
    if HAS_INDEX:
        tl.store(INDEX + at, where, mask=inside)
    if HAS_LSE:
        tl.store(LSE + at, (top + tl.log2(total)) * LN2, mask=inside)
    if HAS_TOP:
        tl.store(TOP + at, 1.0 / total, mask=inside)
    if HAS_ENTROPY:
        tl.store(ENTROPY + at, (tl.log2(total) - tilt / total) * LN2, mask=inside)


@triton.jit(do_not_specialize=["n_tiles", "n_pairs", "groups", "size", "dim_units", "per_head", "chunks"])
def vote_kernel(
    Q, K, LSE, INDEX, TOP, TILES, MEMBERS,
    n_tiles, n_pairs, groups, size, dim_units, per_head, chunks, scale_log2,
    stride_qb, stride_qg, stride_qh, stride_ql, stride_kb, stride_kg, stride_kh, stride_kl,
    HAS_INDEX: tl.constexpr, HAS_TOP: tl.constexpr, SINGLE: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Where the probabilities of all groups together are largest, for one tile of rows; LSE is contiguous [B, G, P, S], INDEX and TOP (that
    largest mean probability) are [B, P, S]. SINGLE: a group is one chunk."""
    pid = tl.program_id(0)
    dim = dim_units * UNIT
    batch = pid // n_tiles
    target, row, entry, inside = rows_of(TILES, MEMBERS, pid - batch * n_tiles, size, BLOCK_M)
    q_row = Q + along(batch, stride_qb, UNIT) + rows_at(row, stride_ql, WIDE, UNIT)[:, None]
    k_base = K + along(batch, stride_kb, UNIT) + along(target * size, stride_kl, UNIT)
    lse_row = LSE + batch.to(tl.int64) * groups * n_pairs * size + entry
    lane = tl.arange(0, BLOCK_K)
    q_there = inside[:, None] & (lane < dim)[None, :]

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, size, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        seen = key < size
        k_row = k_base + rows_at(key, stride_kl, WIDE, UNIT)[None, :]
        k_there = seen[None, :] & (lane < dim)[:, None]
        votes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for group in range(groups):
            q_from = q_row + along(group, stride_qg, UNIT)
            k_from = k_row + along(group, stride_kg, UNIT)
            if SINGLE:
                if EVEN_K:
                    q = tl.load(q_from + lane[None, :], mask=inside[:, None], other=0.0)
                    k = tl.load(k_from + lane[:, None], mask=seen[None, :], other=0.0)
                else:
                    q = tl.load(q_from + lane[None, :], mask=q_there, other=0.0)
                    k = tl.load(k_from + lane[:, None], mask=k_there, other=0.0)
                product = tl.dot(q.to(DOT), k.to(DOT), input_precision=IEEE)
            else:
                product = tile_product(
                    q_from, k_from, inside, seen, stride_qh, stride_kh, 0, chunks, per_head, dim, BLOCK_K, EVEN_K, BLOCK_M, BLOCK_N, UNIT, DOT
                )
            lse = tl.load(lse_row + tl.cast(group, tl.int64) * n_pairs * size, mask=inside, other=0.0) * LOG2E
            # A log-sum-exp of 1e8 is rounded by several units: no probability is above 1 for that.
            below = product * scale_log2 - lse[:, None]
            votes += tl.exp2(tl.where(below > 0.0, 0.0, below))
        votes = tl.where(seen[None, :], votes, float("-inf"))
        best, where = fold_best(votes, tl.max(votes, 1), key, best, where)

    at = batch.to(tl.int64) * n_pairs * size + entry
    if HAS_INDEX:
        tl.store(INDEX + at, where, mask=inside)
    if HAS_TOP:
        tl.store(TOP + at, best / groups, mask=inside)
