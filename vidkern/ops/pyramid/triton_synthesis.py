"""Triton kernels that put levels together, their adjoint, and one filter of any kind from a level to the next."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import clamp, decode, grab, put, quarter_way

DOWN, UP, DOWN_T, UP_T = (tl.constexpr(i) for i in range(4))
LAPLACIAN, HAAR, DCT = (tl.constexpr(i) for i in range(3))
SET, SUBTRACT, ADD = (tl.constexpr(i) for i in range(3))


@triton.jit
def stepped(
    Z, CV, UV, at, b, z_b, c_b, u_b, row, scale, moves, mask, STEP: tl.constexpr, GUIDED: tl.constexpr,
):
    """scale * (z + dt (u + w (c - u))) at elements of a level; ``row`` points at its (dt, w). Without STEP or where nothing moves,
    scale * z."""
    b = b.to(tl.int64)
    value = grab(Z, b * z_b + at, mask)
    if STEP:
        moved = mask & moves
        velocity = grab(CV, b * c_b + at, moved)
        if GUIDED:
            other = grab(UV, b * u_b + at, moved)
            velocity = other + tl.load(row + 1) * (velocity - other)
        value = tl.where(moves, value + tl.load(row) * velocity, value)
    return scale * value


@triton.jit
def merged(
    Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, x, table_b, table_s, mask,
    s: tl.constexpr, IS_LAPLACIAN: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr,
):
    """The merge of levels 0 .. s at position (t, y, x) of level s."""
    at = ((c * T[s] + t) * H[s] + y) * W[s] + x
    row = TABLE + b * table_b + s * table_s
    value = stepped(Z[s], CV[s], UV[s], at, b, z_b[s], c_b[s], u_b[s], row, scale[s], True, mask, STEP, GUIDED)
    if s > 0:
        near = x >> 1
        far = clamp(near + 2 * (x & 1) - 1, W[s - 1])
        up = merged_rows(
            Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, near, table_b, table_s, mask, s, IS_LAPLACIAN, FT, STEP, GUIDED
        )
        if IS_LAPLACIAN:
            other = merged_rows(
                Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, far, table_b, table_s, mask, s, IS_LAPLACIAN, FT, STEP,
                GUIDED,
            )
            up = quarter_way(up, other)
        value = up + value
    return value


@triton.jit
def merged_rows(
    Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, x, table_b, table_s, mask,
    s: tl.constexpr, IS_LAPLACIAN: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr,
):
    """The merge of levels 0 .. s - 1 at column x, interpolated to time t and row y of level s."""
    near = y >> 1
    far = clamp(near + 2 * (y & 1) - 1, H[s - 1])
    result = merged_frames(
        Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, near, x, table_b, table_s, mask, s, IS_LAPLACIAN, FT, STEP, GUIDED
    )
    if IS_LAPLACIAN:
        other = merged_frames(
            Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, far, x, table_b, table_s, mask, s, IS_LAPLACIAN, FT, STEP, GUIDED
        )
        result = quarter_way(result, other)
    return result


@triton.jit
def merged_frames(
    Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, x, table_b, table_s, mask,
    s: tl.constexpr, IS_LAPLACIAN: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr,
):
    """The merge of levels 0 .. s - 1 at row y and column x, interpolated to time t of level s."""
    near = t >> 1 if FT == 2 else t
    result = merged(
        Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, near, y, x, table_b, table_s, mask, s - 1, IS_LAPLACIAN, FT, STEP, GUIDED
    )
    if IS_LAPLACIAN and FT == 2:
        far = clamp(near + 2 * (t & 1) - 1, T[s - 1])
        other = merged(
            Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, far, y, x, table_b, table_s, mask, s - 1, IS_LAPLACIAN, FT, STEP, GUIDED
        )
        result = quarter_way(result, other)
    return result


@triton.jit
def synthesis_kernel(
    OUT, Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, out_b, out_c, out_t, out_y, table_b, table_s, counts, blocks,
    S: tl.constexpr, IS_LAPLACIAN: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Levels (after a guided step with STEP) -> volume. A program makes a run of its values."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e = start + tl.arange(0, BLOCK)
    M: tl.constexpr = S - 1
    inside = e < counts[M]
    c, t, y, x = decode(e, T[M], H[M], W[M])
    value = merged(
        Z, CV, UV, TABLE, T, H, W, z_b, c_b, u_b, scale, b, c, t, y, x, table_b, table_s, inside, M, IS_LAPLACIAN, FT, STEP, GUIDED
    )
    put(OUT, b.to(tl.int64) * out_b + c * out_c + t * out_t + y * out_y + x, value, inside)


@triton.jit
def spread(DZ, DC, DU, at, g, row, mask, STEP: tl.constexpr, GUIDED: tl.constexpr):
    """g, w (dt g) and (1 - w) (dt g): the gradients of a state and of its two velocities; ``row`` points at (dt, w)."""
    put(DZ, at, g, mask)
    if STEP:
        moved = tl.load(row) * g
        if GUIDED:
            w = tl.load(row + 1)
            put(DU, at, (1.0 - w) * moved, mask)
            moved = w * moved
        put(DC, at, moved, mask)


@triton.jit
def synthesis_adjoint_kernel(
    G, DZ, DC, DU, TABLE, T, H, W, scale, g_b, g_c, g_t, g_y, table_b, table_s, counts, blocks,
    IS_LAPLACIAN: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradient of a volume -> gradients of its two levels and of their velocities. A program owns a run of coarse positions and the
    finest values there."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    base = G + b.to(tl.int64) * g_b
    count = counts[0]
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, T[0], H[0], W[0])
    TAPS: tl.constexpr = 4 if IS_LAPLACIAN else 2
    FRAMES: tl.constexpr = TAPS if FT == 2 else 1
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TAPS):
        xx = clamp(2 * x + (i - 1 if IS_LAPLACIAN else i), W[1])
        column = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(TAPS):
            yy = clamp(2 * y + (j - 1 if IS_LAPLACIAN else j), H[1])
            line = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(FRAMES):
                tt = clamp(2 * t + (k - 1 if IS_LAPLACIAN else k), T[1]) if FT == 2 else t
                g = grab(base, c * g_c + tt * g_t + yy * g_y + xx, inside)
                line += (0.75 if k == 1 or k == 2 else 0.25) * g if IS_LAPLACIAN and FT == 2 else g
            column += (0.75 if j == 1 or j == 2 else 0.25) * line if IS_LAPLACIAN else line
        total += (0.75 if i == 1 or i == 2 else 0.25) * column if IS_LAPLACIAN else column
    row = TABLE + b * table_b
    spread(DZ[0], DC[0], DU[0], b.to(tl.int64) * count + e, scale[0] * total, row, inside, STEP, GUIDED)
    e = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = e < 2 * count
    c, t, y, x = decode(e, T[0], H[0], W[1])
    for late in tl.static_range(FT):
        for low in tl.static_range(2):
            tt = t * FT + late
            yy = 2 * y + low
            g = scale[1] * grab(base, c * g_c + tt * g_t + yy * g_y + x, inside)
            at = b.to(tl.int64) * (counts[1]) + ((c * T[1] + tt) * H[1] + yy) * W[1] + x
            spread(DZ[1], DC[1], DU[1], at, g, row + table_s, inside, STEP, GUIDED)


@triton.jit
def dct_tap(i, k, MATRIX, FILTER: tl.constexpr):
    """Input position and weight of tap k of output position i of an axis of blocks; see csrc/common/pyramid.h."""
    WIDENS: tl.constexpr = FILTER == UP or FILTER == DOWN_T
    HALF: tl.constexpr = 0.5 if FILTER == DOWN or FILTER == DOWN_T else 1.0
    if WIDENS:
        at = i // 8 * 4 + k
        weight = tl.load(MATRIX + (i % 8 * 4 + k)) * HALF
    else:
        at = i // 4 * 8 + k
        weight = tl.load(MATRIX + (k * 4 + i % 4)) * HALF
    return at, weight


@triton.jit
def tap(i, k, n, FILTER: tl.constexpr, KIND: tl.constexpr):
    """Input position of tap k of output position i of an axis whose input has n positions, laplacian or Haar; weights are in
    ``combined``."""
    if FILTER == UP and KIND == LAPLACIAN:
        at = clamp(i // 2 + k * (2 * (i % 2) - 1), n)
    elif FILTER == UP_T and KIND == LAPLACIAN:
        at = clamp(2 * i - 1 + k, n)
    elif FILTER == UP or FILTER == DOWN_T:
        at = i // 2 + k
    else:
        at = 2 * i + k
    return at


@triton.jit
def combined(a, b, c, d, TAPS: tl.constexpr, FILTER: tl.constexpr):
    """What up to four taps of a laplacian or Haar filter give, in the order of operations of the reference; a mean is a sum here."""
    if TAPS == 1:
        return a
    if TAPS == 4:
        return 0.75 * (b + c) + 0.25 * (a + d)
    return quarter_way(a, b) if FILTER == UP else a + b


@triton.jit
def frames_of(
    IN, at, t, T, in_t, mask, MATRIX, FILTER: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, POOL_TIME: tl.constexpr,
):
    """The filter along time at offsets ``at`` of frame 0, [n, columns]; t is [n]."""
    if not POOL_TIME:
        return grab(IN, at + (t * in_t)[:, None], mask)
    if KIND == DCT:
        total = tl.zeros(at.shape, tl.float32)
        for k in range(TAPS):
            tt, weight = dct_tap(t, k, MATRIX, FILTER)
            total += weight[:, None] * grab(IN, at + (tt * in_t)[:, None], mask)
        return total
    t0 = tap(t, 0, T, FILTER, KIND)
    a = grab(IN, at + (t0 * in_t)[:, None], mask)
    b = a
    c = a
    d = a
    if TAPS > 1:
        t1 = tap(t, 1, T, FILTER, KIND)
        b = grab(IN, at + (t1 * in_t)[:, None], mask)
    if TAPS > 2:
        t2 = tap(t, 2, T, FILTER, KIND)
        t3 = tap(t, 3, T, FILTER, KIND)
        c = grab(IN, at + (t2 * in_t)[:, None], mask)
        d = grab(IN, at + (t3 * in_t)[:, None], mask)
    return combined(a, b, c, d, TAPS, FILTER)


@triton.jit
def rows_of(
    IN, at, t, y, T, H, in_t, in_y, mask, MATRIX, FILTER: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, POOL_TIME: tl.constexpr,
):
    """The filter along time and rows at offsets ``at`` of frame 0 and row 0, [n, columns]; t and y are [n]."""
    if KIND == DCT:
        total = tl.zeros(at.shape, tl.float32)
        for k in range(TAPS):
            yy, weight = dct_tap(y, k, MATRIX, FILTER)
            total += weight[:, None] * frames_of(
                IN, at + (yy * in_y)[:, None], t, T, in_t, mask, MATRIX, FILTER, KIND, TAPS, POOL_TIME
            )
        return total
    y0 = tap(y, 0, H, FILTER, KIND)
    a = frames_of(IN, at + (y0 * in_y)[:, None], t, T, in_t, mask, MATRIX, FILTER, KIND, TAPS, POOL_TIME)
    b = a
    c = a
    d = a
    if TAPS > 1:
        y1 = tap(y, 1, H, FILTER, KIND)
        b = frames_of(IN, at + (y1 * in_y)[:, None], t, T, in_t, mask, MATRIX, FILTER, KIND, TAPS, POOL_TIME)
    if TAPS > 2:
        y2 = tap(y, 2, H, FILTER, KIND)
        y3 = tap(y, 3, H, FILTER, KIND)
        c = frames_of(IN, at + (y2 * in_y)[:, None], t, T, in_t, mask, MATRIX, FILTER, KIND, TAPS, POOL_TIME)
        d = frames_of(IN, at + (y3 * in_y)[:, None], t, T, in_t, mask, MATRIX, FILTER, KIND, TAPS, POOL_TIME)
    return combined(a, b, c, d, TAPS, FILTER)


@triton.jit
def filter_kernel(
    IN, BASE, OUT, MATRIX, to_T, to_H, to_W, T, H, W, in_b, in_c, in_t, in_y, base_b, base_c, base_t, base_y, out_b, out_c, out_t, out_y,
    count, blocks,
    FILTER: tl.constexpr, KIND: tl.constexpr, MODE: tl.constexpr, TAPS: tl.constexpr, POOL_TIME: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = a filter of IN [T, H, W] (SET), BASE minus it (SUBTRACT) or plus it (ADD). BASE may be OUT. One axis after the other, time,
    rows, columns, as in the reference: the errors of one axis do not add up over the taps of another."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, to_T, to_H, to_W)
    columns = tl.arange(0, TAPS)[None, :]
    if KIND == DCT:
        xx, weight = dct_tap(x[:, None], columns, MATRIX, FILTER)
    else:
        xx = tap(x[:, None], columns, W, FILTER, KIND)
    at = (b * in_b + c * in_c)[:, None] + xx
    rows = rows_of(IN, at, t, y, T, H, in_t, in_y, inside[:, None], MATRIX, FILTER, KIND, TAPS, POOL_TIME)
    if KIND == DCT:
        total = tl.sum(weight * rows, 1)
    elif TAPS == 1:
        total = tl.reshape(rows, [BLOCK])
    elif TAPS == 2:
        near, far = tl.split(rows)
        total = combined(near, far, near, far, TAPS, FILTER)
    else:
        even, odd = tl.split(tl.reshape(rows, [BLOCK, 2, 2]))
        a, third = tl.split(even)
        second, last = tl.split(odd)
        total = combined(a, second, third, last, TAPS, FILTER)
    if KIND != DCT and (FILTER == DOWN or FILTER == DOWN_T):
        total *= 0.125 if POOL_TIME else 0.25
    if MODE != SET:
        own = grab(BASE, b * base_b + c * base_c + t * base_t + y * base_y + x, inside)
        total = own - total if MODE == SUBTRACT else own + total
    put(OUT, b * out_b + c * out_c + t * out_t + y * out_y + x, total, inside)
