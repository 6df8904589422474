"""Triton kernels around the product: RMSNorm, modulation and gathering of its input, the gradient of its pre-activation with the sums
over tokens, and RMSNorm backward. All bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_product import activate, slope


@triton.jit(do_not_specialize=["width", "k", "group"])
def gather_kernel(
    X, OUT, STAT, SCALE, SHIFT, COLS, width, k, group, eps, step_x, step_out,
    NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_COLS: tl.constexpr, BLOCK: tl.constexpr,
):
    """A row of P(x)[:, COLS], compact, and its 1 / rms. SCALE holds 1 + scale; it and SHIFT have the k picked columns."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    stat = 1.0
    if NORM:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(X + row * step_x + start + lanes, mask=start + lanes < width, other=0.0).to(tl.float32)
            total += x * x
        stat = 1.0 / tl.sqrt(tl.sum(total) / width + eps)
        tl.store(STAT + row, stat)
    for start in range(0, k, BLOCK):
        at = start + lanes
        inside = at < k
        col = at
        if HAS_COLS:
            col = tl.load(COLS + at, mask=inside, other=0)
        x = tl.load(X + row * step_x + col, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            x *= stat
        own = row // group * k + at
        if HAS_SCALE:
            x *= tl.load(SCALE + own, mask=inside, other=0.0)
        if HAS_SHIFT:
            x += tl.load(SHIFT + own, mask=inside, other=0.0)
        tl.store(OUT + row * step_out + at, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "n", "written", "gate_group", "rows"])
def slope_kernel(
    DOUT, U, COLS, GATE, DU, DBIAS, DGATE, m, n, written, gate_group, rows, step_dout, step_u, step_du,
    ACT: tl.constexpr, PAIRS: tl.constexpr, HAS_U: tl.constexpr, HAS_COLS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DU: tl.constexpr,
    HAS_DBIAS: tl.constexpr, HAS_DGATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """du = gate dout act'(u) for ``rows`` rows of one group and a block of columns; their sums go to row program_id(1) of DBIAS
    [parts, n] and DGATE [parts, written], which are added up in that order."""
    part = tl.program_id(1)
    parts = tl.cdiv(gate_group, rows)
    first = part // parts * gate_group + part % parts * rows
    last = tl.minimum(tl.minimum(first + rows, (part // parts + 1) * gate_group), m)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < written
    at = col
    if HAS_COLS:
        at = tl.load(COLS + col, mask=col_in, other=0)
    gate = tl.zeros([BLOCK_N], tl.float32) + 1.0
    if HAS_GATE:
        gate = tl.load(GATE + (first // gate_group).to(tl.int64) * written + col, mask=col_in, other=0.0)
    bias1 = tl.zeros([BLOCK_N], tl.float32)
    bias2 = tl.zeros([BLOCK_N], tl.float32)
    gates = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        both = (row < last)[:, None] & col_in[None, :]
        row_at = row.to(tl.int64)[:, None]
        d = tl.load(DOUT + row_at * step_dout + at[None, :], mask=both, other=0.0).to(tl.float32)
        if HAS_U:
            a = tl.load(U + row_at * step_u + col[None, :], mask=both, other=0.0).to(tl.float32)
            if PAIRS:
                b = tl.load(U + row_at * step_u + written + col[None, :], mask=both, other=0.0).to(tl.float32)
        if HAS_DGATE:
            if PAIRS:
                gates += tl.sum(d * activate(a, 2) * b, 0)
            else:
                gates += tl.sum(d * activate(a, ACT), 0)
        d *= gate[None, :]
        if PAIRS:
            second = d * activate(a, 2)
            d = d * b * slope(a, 2)
            bias2 += tl.sum(second, 0)
            if HAS_DU:
                tl.store(DU + row_at * step_du + written + col[None, :], second.to(DU.dtype.element_ty), mask=both)
        elif ACT != 0:
            d *= slope(a, ACT)
        bias1 += tl.sum(d, 0)
        if HAS_DU:
            tl.store(DU + row_at * step_du + col[None, :], d.to(DU.dtype.element_ty), mask=both)
    if HAS_DBIAS:
        tl.store(DBIAS + part.to(tl.int64) * n + col, bias1, mask=col_in)
        if PAIRS:
            tl.store(DBIAS + part.to(tl.int64) * n + written + col, bias2, mask=col_in)
    if HAS_DGATE:
        tl.store(DGATE + part.to(tl.int64) * written + col, gates, mask=col_in)


@triton.jit(do_not_specialize=["width", "group"])
def norm_backward_kernel(
    X, DH, STAT, SCALE, DX, width, group, step_x, step_dh, step_dx,
    NORM: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx = r (dh' - x r^2 mean(dh' x)) of one row, dh' = dh (1 + scale); all ``width`` channels, dh zero where nothing was picked."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    stat = 1.0
    mean = 0.0
    if NORM:
        stat = tl.load(STAT + row)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + lanes
            inside = at < width
            d = tl.load(DH + row * step_dh + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_SCALE:
                d *= tl.load(SCALE + row // group * width + at, mask=inside, other=0.0)
            total += d * tl.load(X + row * step_x + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total) * stat * stat / width
    for start in range(0, width, BLOCK):
        at = start + lanes
        inside = at < width
        d = tl.load(DH + row * step_dh + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            d *= tl.load(SCALE + row // group * width + at, mask=inside, other=0.0)
        if NORM:
            d = (d - tl.load(X + row * step_x + at, mask=inside, other=0.0).to(tl.float32) * mean) * stat
        tl.store(DX + row * step_dx + at, d.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width", "group", "rows"])
def modulation_kernel(
    X, DH, STAT, DSCALE, DSHIFT, width, group, rows, step_x, step_dh,
    NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums of dh and of dh x r over ``rows`` rows of one group, into row program_id(1) of DSHIFT and DSCALE."""
    part = tl.program_id(1)
    parts = tl.cdiv(group, rows)
    first = part // parts * group + part % parts * rows
    last = tl.minimum(first + rows, (part // parts + 1) * group)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = col < width
    shift = tl.zeros([BLOCK_N], tl.float32)
    scale = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_in = row < last
        both = row_in[:, None] & col_in[None, :]
        d = tl.load(DH + row.to(tl.int64)[:, None] * step_dh + col[None, :], mask=both, other=0.0).to(tl.float32)
        shift += tl.sum(d, 0)
        if HAS_SCALE:
            x = tl.load(X + row.to(tl.int64)[:, None] * step_x + col[None, :], mask=both, other=0.0).to(tl.float32)
            if NORM:
                x *= tl.load(STAT + row, mask=row_in, other=0.0)[:, None]
            scale += tl.sum(d * x, 0)
    if HAS_SHIFT:
        tl.store(DSHIFT + part.to(tl.int64) * width + col, shift, mask=col_in)
    if HAS_SCALE:
        tl.store(DSCALE + part.to(tl.int64) * width + col, scale, mask=col_in)
