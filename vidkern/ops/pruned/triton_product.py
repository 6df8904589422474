"""The Triton product of the pruned layers: ``out[:, OC] = residual + gate * act(A B^T + partial + bias)``.

Sizes and strides are run-time arguments, divided by UM, UN, UK (8 wherever they are multiples of 8) so that the compiler knows how
rows are aligned without a build per shape. Accumulation is float32 with one rounding at the end; DOT is the dtype that products read:
the operands', or float32 in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

IEEE = tl.constexpr("ieee")  # float32 inputs are not rounded to TF32
GELU_1 = tl.constexpr(2 * 0.7978845608028654)  # (1 + tanh(y)) / 2 = sigmoid(2 y)
GELU_3 = tl.constexpr(2 * 0.7978845608028654 * 0.044715)


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), the second without cancellation."""
    e = tl.exp(-tl.maximum(x, -87.0))
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def activate(u, ACT: tl.constexpr):
    """act(u): 0 none, 1 gelu (tanh form), 2 silu."""
    if ACT == 1:
        s, _ = sigmoids(u * (GELU_1 + GELU_3 * u * u))
        return u * s
    elif ACT == 2:
        s, _ = sigmoids(u)
        return u * s
    else:
        return u


@triton.jit
def slope(u, ACT: tl.constexpr):
    """d act(u) / du"""
    if ACT == 1:
        s, other = sigmoids(u * (GELU_1 + GELU_3 * u * u))
        return s * (1.0 + u * (GELU_1 + 3 * GELU_3 * u * u) * other)
    elif ACT == 2:
        s, other = sigmoids(u)
        return s * (1.0 + u * other)
    else:
        return tl.zeros_like(u) + 1.0


@triton.jit
def picked(MAP, at, inside, HAS: tl.constexpr, RUNS: tl.constexpr):
    """Numbers ``at`` through a map, if there is one; RUNS: it is made of aligned runs of at least eight."""
    if HAS:
        found = tl.load(MAP + at, mask=inside, other=0)
        if RUNS:
            found = tl.max_contiguous(tl.multiple_of(found, 8), 8)
        return found
    else:
        return at


@triton.jit
def operand(S, outer, k, outer_in, k_in, step, ACROSS: tl.constexpr, OUTER_FIRST: tl.constexpr):
    """A tile of an operand, [outer, k] or, not OUTER_FIRST, [k, outer]. ACROSS: k counts memory rows."""
    if OUTER_FIRST:
        inside = outer_in[:, None] & k_in[None, :]
        if ACROSS:
            at = k.to(tl.int64)[None, :] * step + outer[:, None]
        else:
            at = outer.to(tl.int64)[:, None] * step + k[None, :]
    else:
        inside = outer_in[None, :] & k_in[:, None]
        if ACROSS:
            at = k.to(tl.int64)[:, None] * step + outer[None, :]
        else:
            at = outer.to(tl.int64)[None, :] * step + k[:, None]
    return tl.load(S + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["m_units", "n_units", "k_units", "half", "gate_group"])
def product_kernel(
    A, B, OUT, U, BIAS, GATE, RESIDUAL, PARTIAL, A_COLS, B_ROWS, B_COLS, OUT_ROWS, OUT_COLS,
    m_units, n_units, k_units, half, gate_group, step_a, step_b, step_out, step_u, step_residual, step_partial,
    UM: tl.constexpr, UN: tl.constexpr, UK: tl.constexpr, UA: tl.constexpr, UB: tl.constexpr, UO: tl.constexpr,
    A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr, RUNS: tl.constexpr, ACT: tl.constexpr, PAIRS: tl.constexpr,
    HAS_U: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    HAS_A_COLS: tl.constexpr, HAS_B_ROWS: tl.constexpr, HAS_B_COLS: tl.constexpr, HAS_OUT_ROWS: tl.constexpr, HAS_OUT_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):
    """One tile of the result. A is [m, k] (A_ACROSS: [k, m] in memory), B is [n, k] (B_ACROSS: [k, n]); B_ROWS and B_COLS pick memory
    rows and columns, A_COLS memory columns. PAIRS: n counts pairs, whose second row of B is ``half`` further; ACT is then their gate's."""
    m = m_units * UM
    n = n_units * UN
    k = k_units * UK
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    # Eight rows of tiles at a time, column after column: what is read stays in the L2 cache.
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n)
    rows_here = tl.minimum(tiles_m - band * 8, 8)
    tile_m = band * 8 + pid % (8 * tiles_n) % rows_here
    tile_n = pid % (8 * tiles_n) // rows_here
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = row < m
    col_in = col < n
    if B_ACROSS:
        b_outer = picked(B_COLS, col, col_in, HAS_B_COLS, RUNS)
    else:
        b_outer = picked(B_ROWS, col, col_in, HAS_B_ROWS, False)
        if PAIRS:
            b_second = picked(B_ROWS, col + half, col_in, HAS_B_ROWS, False)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PAIRS:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = at < k
        a_k = picked(A_COLS, at, inside, HAS_A_COLS, RUNS)
        a = operand(A, row, a_k, row_in, inside, step_a * UA, A_ACROSS, True)
        if B_ACROSS:
            b_k = picked(B_ROWS, at, inside, HAS_B_ROWS, False)
        else:
            b_k = picked(B_COLS, at, inside, HAS_B_COLS, False)
        b = operand(B, b_outer, b_k, col_in, inside, step_b * UB, B_ACROSS, False)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=IEEE)
        if PAIRS:
            b = operand(B, b_second, b_k, col_in, inside, step_b * UB, B_ACROSS, False)
            acc2 = tl.dot(a.to(DOT), b.to(DOT), acc2, input_precision=IEEE)

    both = row_in[:, None] & col_in[None, :]
    row_at = row.to(tl.int64)[:, None]
    if HAS_PARTIAL:
        acc += tl.load(PARTIAL + row_at * step_partial + col[None, :], mask=both, other=0.0)
    if HAS_BIAS:
        acc += tl.load(BIAS + col, mask=col_in, other=0.0).to(tl.float32)[None, :]
    if HAS_U:
        tl.store(U + row_at * step_u + col[None, :], acc.to(U.dtype.element_ty), mask=both)
    if PAIRS:
        if HAS_BIAS:
            acc2 += tl.load(BIAS + half + col, mask=col_in, other=0.0).to(tl.float32)[None, :]
        if HAS_U:
            tl.store(U + row_at * step_u + half + col[None, :], acc2.to(U.dtype.element_ty), mask=both)
        z = activate(acc, 2) * acc2
    else:
        z = activate(acc, ACT)
    if HAS_GATE:
        z *= tl.load(GATE + (row // gate_group).to(tl.int64)[:, None] * n + col[None, :], mask=both, other=0.0)
    to = picked(OUT_COLS, col, col_in, HAS_OUT_COLS, False)
    if HAS_RESIDUAL:
        z += tl.load(RESIDUAL + row_at * (step_residual * UO) + to[None, :], mask=both, other=0.0).to(tl.float32)
    into = picked(OUT_ROWS, row, row_in, HAS_OUT_ROWS, False).to(tl.int64)[:, None]
    tl.store(OUT + into * (step_out * UO) + to[None, :], z.to(OUT.dtype.element_ty), mask=both)
