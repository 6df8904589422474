"""Triton kernels of the backward where channels are many (heads side by side): one query frame at a time, the gradients of its logits are
written once (the slab, [S, targets, S rounded up]), and two products read them: dQ of that frame, and its share of dK.

The slab's rows are multiples of 8 long, which the compiler is told. dK is added up over query frames in float32, in their order, and rounded
once. Rows of q, k, dq and dk are read and written head by head, wherever heads lie."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward import ROWS, any_live, coefficients, listed_at, live_rows
from .triton_parts import IEEE, along, coordinates, rows_at, tile_product


@triton.jit
def banded(pid, tiles_m, tiles_n):
    """(row, column) of a tile: eight rows of tiles at a time, column after column, so that what is read stays in the L2 cache."""
    band = pid // (8 * tiles_n)
    rows_here = tl.minimum(tiles_m - band * 8, 8)
    at = pid - band * 8 * tiles_n
    return band * 8 + at % rows_here, at // rows_here


@triton.jit
def columns_at(column, dim, step_h, UNIT: tl.constexpr):
    """Offsets of columns of the concatenated heads, whose channels are multiples of UNIT and read so many at a time."""
    head = column // dim
    at = head.to(tl.int64) * step_h * UNIT + (column - head * dim)
    return tl.max_contiguous(tl.multiple_of(at, UNIT), UNIT)


@triton.jit(do_not_specialize=["n_slots", "slot", "frame", "size", "dim_units", "per_head", "chunks", "blocks", "padded_units", "plane"])
def slope_kernel(
    Q, K, COEF, FLAGS, SLAB, SLOTS, slot, n_slots, frame, size, dim_units, per_head, chunks, blocks, padded_units, plane, width, inverse,
    centre_x, centre_y, scale_log2, stride_qh, stride_ql, stride_kh, stride_kl,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of the SLAB of query frame ``frame``: gradients of the logits, zero beyond the frame. SLOTS int32 [*, 2]: target frame, pair,
    of which those of this frame are ``slot`` to ``slot + n_slots`` - 1. COEF and FLAGS are those of this sample and group."""
    padded = padded_units * 8
    dim = dim_units * UNIT
    tiles_n = tl.cdiv(size, BLOCK_N)
    tile_m, tile_n = banded(tl.program_id(0), tl.cdiv(size, BLOCK_M), tiles_n * n_slots)
    which = tile_n // tiles_n
    key = (tile_n - which * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(SLOTS + (slot + which) * 2)
    pair = tl.load(SLOTS + (slot + which) * 2 + 1).to(tl.int64)
    inside = row < size
    seen = key < size
    dl = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if any_live(FLAGS, pair * blocks, tile_m * BLOCK_M // ROWS, blocks, ROW_BLOCKS):
        q_row = Q + along(frame * size, stride_ql, UNIT) + rows_at(row, stride_ql, WIDE, UNIT)[:, None]
        k_row = K + along(target * size, stride_kl, UNIT) + rows_at(key, stride_kl, WIDE, UNIT)[None, :]
        product = tile_product(
            q_row, k_row, inside, seen, stride_qh, stride_kh, 0, chunks, per_head, dim, BLOCK_K, EVEN_K, BLOCK_M, BLOCK_N, UNIT, DOT
        )
        gx, gy, rest, lse = coefficients(COEF, pair * size + row, plane, inside)
        x, y = coordinates(key, width, inverse)
        slope = gx[:, None] * (x - centre_x)[None, :] + (gy[:, None] * (y - centre_y)[None, :] + rest[:, None])
        p = tl.exp2(product * scale_log2 - lse[:, None])
        # Rows without gradient may hold anything.
        dl = tl.where((lse != float("inf"))[:, None] & seen[None, :], p * slope, 0.0)
    to = SLAB + (row.to(tl.int64)[:, None] * n_slots + which) * padded + key[None, :]
    tl.store(to, dl.to(SLAB.dtype.element_ty), mask=inside[:, None] & (key < padded)[None, :])


@triton.jit(do_not_specialize=["n_slots", "slot", "frame", "size", "dim_units", "channel_units", "blocks", "padded_units"])
def dq_product_kernel(
    SLAB, K, FLAGS, UNITY, DQ, SLOTS, slot, n_slots, frame, size, dim_units, channel_units, blocks, padded_units, scale,
    stride_kh, stride_kl, stride_uh, stride_ul,
    HAS_UNITY: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ROW_BLOCKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of DQ of query frame ``frame``: rows by channels, summed over the keys of all its targets."""
    padded = padded_units * 8
    channels = channel_units * UNIT
    dim = dim_units * UNIT
    tile_m, tile_n = banded(tl.program_id(0), tl.cdiv(size, BLOCK_M), tl.cdiv(channels, BLOCK_N))
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < size
    in_column = column < channels
    k_column = K + columns_at(column, dim, stride_kh, UNIT)[None, :]
    slab_row = SLAB + row.to(tl.int64)[:, None] * n_slots * padded
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for s in range(n_slots):
        pair = tl.load(SLOTS + (slot + s) * 2 + 1).to(tl.int64)
        if any_live(FLAGS, pair * blocks, tile_m * BLOCK_M // ROWS, blocks, ROW_BLOCKS):
            k_base = k_column + along(tl.load(SLOTS + (slot + s) * 2) * size, stride_kl, UNIT)
            for start in range(0, size, BLOCK_K):
                key = start + tl.arange(0, BLOCK_K)
                seen = key < size
                dl = tl.load(slab_row + (s * padded + key)[None, :], mask=inside[:, None] & (key < padded)[None, :], other=0.0)
                k = tl.load(k_base + rows_at(key, stride_kl, WIDE, UNIT)[:, None], mask=seen[:, None] & in_column[None, :], other=0.0)
                acc = tl.dot(dl.to(DOT), k.to(DOT), acc, input_precision=IEEE)
    if HAS_UNITY:
        scale *= tl.load(UNITY)
    u_row = DQ + along(frame * size, stride_ul, UNIT) + rows_at(row, stride_ul, WIDE, UNIT)[:, None]
    tl.store(
        u_row + columns_at(column, dim, stride_uh, UNIT)[None, :], (acc * scale).to(DQ.dtype.element_ty),
        mask=inside[:, None] & in_column[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_slots", "slot", "frame", "size", "dim_units", "channel_units", "blocks", "padded_units"])
def dk_product_kernel(
    SLAB, Q, LIVE, BITS, COUNT, UNITY, SUM, DK, SLOTS, SHARES, slot, n_slots, frame, size, dim_units, channel_units, blocks, padded_units, scale,
    stride_qh, stride_ql, stride_sh, stride_sl, stride_uh, stride_ul,
    HAS_UNITY: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of the share of DK that query frame ``frame`` has: keys of one target by channels, summed over the rows with gradient. SHARES
    int32 [*, 2], beside SLOTS: whether it is the first and whether it is the last share of its target; those between are added to SUM."""
    padded = padded_units * 8
    channels = channel_units * UNIT
    dim = dim_units * UNIT
    tiles_m = tl.cdiv(size, BLOCK_M)
    tile_m, tile_n = banded(tl.program_id(0), tiles_m * n_slots, tl.cdiv(channels, BLOCK_N))
    which = tile_m // tiles_m
    key = (tile_m - which * tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = key < size
    in_column = column < channels
    target = tl.load(SLOTS + (slot + which) * 2)
    pair = tl.load(SLOTS + (slot + which) * 2 + 1).to(tl.int64)
    q_column = Q + along(frame * size, stride_ql, UNIT) + columns_at(column, dim, stride_qh, UNIT)[None, :]
    slab_key = SLAB + (which * padded + key)[None, :]
    listed = pair * blocks
    number, bits = listed_at(LIVE, BITS, listed, 0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(tl.load(COUNT + pair) * (ROWS // BLOCK_K)):
        if not AHEAD:
            number, bits = listed_at(LIVE, BITS, listed, i, BLOCK_K)
        row, there = live_rows(number, bits, i, BLOCK_K)
        if AHEAD:
            number, bits = listed_at(LIVE, BITS, listed, i + 1, BLOCK_K)
        dl = tl.load(slab_key + row.to(tl.int64)[:, None] * n_slots * padded, mask=there[:, None] & (key < padded)[None, :], other=0.0)
        q = tl.load(q_column + rows_at(row, stride_ql, WIDE, UNIT)[:, None], mask=there[:, None] & in_column[None, :], other=0.0)
        acc = tl.dot(tl.trans(dl).to(DOT), q.to(DOT), acc, input_precision=IEEE)
    both = seen[:, None] & in_column[None, :]
    s_row = SUM + along(target * size, stride_sl, UNIT) + rows_at(key, stride_sl, WIDE, UNIT)[:, None]
    s_ptr = s_row + columns_at(column, dim, stride_sh, UNIT)[None, :]
    if tl.load(SHARES + (slot + which) * 2) == 0:
        acc += tl.load(s_ptr, mask=both, other=0.0)
    if tl.load(SHARES + (slot + which) * 2 + 1) == 0:
        tl.store(s_ptr, acc, mask=both)
    else:
        if HAS_UNITY:
            scale *= tl.load(UNITY)
        u_row = DK + along(target * size, stride_ul, UNIT) + rows_at(key, stride_ul, WIDE, UNIT)[:, None]
        u_ptr = u_row + columns_at(column, dim, stride_uh, UNIT)[None, :]
        tl.store(u_ptr, (acc * scale).to(DK.dtype.element_ty), mask=both)
