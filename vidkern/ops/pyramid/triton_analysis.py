"""Triton kernels that take a volume apart: levels, with noise and target where asked for, and the adjoint. Laplacian and Haar.

A program owns a run of positions of one level, and what it writes is the next finer level there: 2 x 2 values for each (times 2 frames
where time is pooled), the two of a row side by side. The block means that interpolation needs around a position are made again from the
volume, which is in the cache for the second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_noise import normal, normals4, unsigned
from .triton_parts import alive, block_sum, clamp, decode, grab, interleave, place, put, quarter_way


@triton.jit
def mean_between(
    X, c, t, far, y, x, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr, LAPLACIAN: tl.constexpr, EVEN: tl.constexpr
):
    """Block mean at (t, y, x); where time is pooled too (QT > 1), a quarter of the way to frame ``far``."""
    gain: tl.constexpr = 1.0 / (Q * Q * QT)
    near = block_sum(X, c, t, y, x, x_c, x_t, x_y, mask, Q, QT, 1, EVEN) * gain
    if LAPLACIAN and QT > 1:
        near = quarter_way(near, block_sum(X, c, far, y, x, x_c, x_t, x_y, mask, Q, QT, 1, EVEN) * gain)
    return near


@triton.jit
def rows_between(
    X, c, t, far, y, above, below, x, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr, EVEN: tl.constexpr
):
    """Column x of the interpolation of block means, at the upper and the lower of the two rows."""
    near = mean_between(X, c, t, far, y, x, x_c, x_t, x_y, mask, Q, QT, True, EVEN)
    up = mean_between(X, c, t, far, above, x, x_c, x_t, x_y, mask, Q, QT, True, EVEN)
    down = mean_between(X, c, t, far, below, x, x_c, x_t, x_y, mask, Q, QT, True, EVEN)
    return quarter_way(near, up), quarter_way(near, down)


@triton.jit
def emit(
    value, eps, e, b, T, H, W, Z, V, z_b, z_r, v_b, v_r, column, coefficients, scale, takes_part, mask,
    MIX: tl.constexpr, HAS_V: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):
    """Store scale * value, or with MIX its mixtures with noise; zeros where the level does not take part."""
    value = scale * value
    z = value
    if MIX:
        z = tl.load(coefficients) * value + tl.load(coefficients + 1) * eps
    put(Z, place(e, b, T, H, W, z_b, z_r, column, PT, PH, PW), tl.where(takes_part, z, 0.0), mask)
    if HAS_V:
        v = tl.load(coefficients + 2) * value + tl.load(coefficients + 3) * eps
        put(V, place(e, b, T, H, W, v_b, v_r, column, PT, PH, PW), tl.where(takes_part, v, 0.0), mask)


@triton.jit
def coarsest(
    X, EPS, Z, V, row, T, H, W, z_b, z_r, v_b, v_r, eps_b, column, scale, b, start, count, part, x_c, x_t, x_y, sample, offset, key0, key1,
    S: tl.constexpr, FT: tl.constexpr, MIX: tl.constexpr, HAS_V: tl.constexpr, PHILOX: tl.constexpr, EVEN: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr,
):
    """Level 0 at the elements from ``start`` on: block means of the sample at X."""
    Q: tl.constexpr = 2 ** (S - 1)
    QT: tl.constexpr = Q if FT == 2 else 1
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, T, H, W)
    mean = block_sum(X, c, t, y, x, x_c, x_t, x_y, inside & part, Q, QT, 1, EVEN) * (1.0 / (Q * Q * QT))
    eps = mean
    if MIX:
        if PHILOX:
            eps = normals4(start + 4 * tl.arange(0, BLOCK // 4), 0, sample, offset, key0, key1)
        else:
            eps = grab(EPS, b.to(tl.int64) * eps_b + e, inside & part)
    emit(mean, eps, e, b, T, H, W, Z, V, z_b, z_r, v_b, v_r, column, row, scale, part, inside, MIX, HAS_V, PT, PH, PW)


@triton.jit
def interpolated(
    X, c, t, far, y, x, H, W, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr, LAPLACIAN: tl.constexpr, EVEN: tl.constexpr,
):
    """Block means of a run of positions, interpolated to their upper and their lower row of twice as many values."""
    if LAPLACIAN:
        above = clamp(y - 1, H)
        below = clamp(y + 1, H)
        left, left1 = rows_between(X, c, t, far, y, above, below, clamp(x - 1, W), x_c, x_t, x_y, mask, Q, QT, EVEN)
        middle, middle1 = rows_between(X, c, t, far, y, above, below, x, x_c, x_t, x_y, mask, Q, QT, EVEN)
        right, right1 = rows_between(X, c, t, far, y, above, below, clamp(x + 1, W), x_c, x_t, x_y, mask, Q, QT, EVEN)
        upper = interleave(quarter_way(middle, left), quarter_way(middle, right))
        return upper, interleave(quarter_way(middle1, left1), quarter_way(middle1, right1))
    mean = mean_between(X, c, t, far, y, x, x_c, x_t, x_y, mask, Q, QT, False, EVEN)
    both = interleave(mean, mean)
    return both, both


@triton.jit
def finer(
    up, X, EPS, Z, V, row, T, H, W, before_T, before_H, z_b, z_r, v_b, v_r, eps_b, column, scale, b, start, count, part, x_c, x_t, x_y,
    sample, offset, key0, key1, late: tl.constexpr, low: tl.constexpr, s: tl.constexpr,
    S: tl.constexpr, FT: tl.constexpr, MIX: tl.constexpr, HAS_V: tl.constexpr, PHILOX: tl.constexpr, RUNS: tl.constexpr,
    EVEN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr,
):
    """Frame ``late`` and row ``low`` of level s above the positions of level s - 1 from ``start`` on: own block means less ``up``."""
    Q: tl.constexpr = 2 ** (S - 1 - s)
    QT: tl.constexpr = Q if FT == 2 else 1
    n = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = n < 2 * count
    c, t, y, x = decode(n, before_T, before_H, W)
    t = t * FT + late
    y = 2 * y + low
    own = block_sum(X, c, t, y, x, x_c, x_t, x_y, inside & part, Q, QT, 4 if EVEN and RUNS else 1, EVEN) * (1.0 / (Q * Q * QT))
    e = ((c * T + t) * H + y) * W + x
    if RUNS:
        e = tl.max_contiguous(tl.multiple_of(e, 4), 4)
    value = own - up
    eps = value
    if MIX:
        if PHILOX and RUNS:
            c4, t4, y4, x4 = decode(2 * start + 4 * tl.arange(0, BLOCK // 2), before_T, before_H, W)
            eps = normals4(((c4 * T + t4 * FT + late) * H + 2 * y4 + low) * W + x4, s, sample, offset, key0, key1)
        elif PHILOX:
            eps = normal(e, s, sample, offset, key0, key1)
        else:
            eps = grab(EPS, b.to(tl.int64) * eps_b + e, inside & part)
    emit(
        value, eps, e, b, T, H, W, Z, V, z_b, z_r, v_b, v_r, column, row, scale, part, inside, MIX, HAS_V, PT * FT**s, PH * 2**s, PW * 2**s
    )


@triton.jit(do_not_specialize=("key0", "key1", "offset", "first_sample", "active", "mask_b"))
def analysis_kernel(
    X, Z, V, EPS, TABLE, MASK, T, H, W, z_b, v_b, eps_b, columns, scale, first, x_b, x_c, x_t, x_y, z_r, v_r, table_b, table_s, mask_b,
    counts, active, key0, key1, offset, first_sample,
    S: tl.constexpr, GROUPS: tl.constexpr, FINE: tl.constexpr, LAPLACIAN: tl.constexpr, FT: tl.constexpr, MIX: tl.constexpr,
    HAS_V: tl.constexpr, HAS_MASK: tl.constexpr, PHILOX: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """X -> levels Z (and V). Programs: sample by sample, ``first[g]`` .. ``first[g + 1]`` run over level g and write level g + 1; those
    of g = 0 write level 0 as well (it alone without FINE).

    MIX: with a table. PHILOX: noise from the generator, else from EPS. RUNS: rows hold whole blocks of four elements. EVEN: the strides of
    X are multiples of four.
    """
    pid = tl.program_id(0)
    b = pid // first[GROUPS]
    i = pid % first[GROUPS]
    sample = unsigned(first_sample) + b.to(tl.uint32)
    base = X + b.to(tl.int64) * x_b
    table = TABLE + b * table_b
    for g in tl.static_range(GROUPS):
        if (i >= first[g]) & (i < first[g + 1]):
            start = (i - first[g]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            if g == 0:
                coarsest(
                    base, EPS[0], Z[0], V[0], table, T[0], H[0], W[0], z_b[0], z_r, v_b[0], v_r, eps_b[0], columns[0], scale[0], b, start,
                    counts[0], alive(MASK, mask_b, b, 0, active, HAS_MASK), x_c, x_t, x_y, sample, unsigned(offset), unsigned(key0),
                    unsigned(key1), S, FT, MIX, HAS_V, PHILOX, EVEN, PT, PH, PW, BLOCK,
                )
            if FINE:
                part = alive(MASK, mask_b, b, g + 1, active, HAS_MASK)
                e = start + tl.arange(0, BLOCK)
                c, t, y, x = decode(e, T[g], H[g], W[g])
                for late in tl.static_range(FT):
                    upper, lower = interpolated(
                        base, c, t, clamp(t + (2 * late - 1), T[g]), y, x, H[g], W[g], x_c, x_t, x_y, (e < counts[g]) & part,
                        2 ** (S - 1 - g), 2 ** (S - 1 - g) if FT == 2 else 1, LAPLACIAN, EVEN,
                    )
                    for low in tl.static_range(2):
                        finer(
                            lower if low else upper, base, EPS[g + 1], Z[g + 1], V[g + 1], table + (g + 1) * table_s, T[g + 1], H[g + 1],
                            W[g + 1], T[g], H[g], z_b[g + 1], z_r, v_b[g + 1], v_r, eps_b[g + 1], columns[g + 1], scale[g + 1], b, start,
                            counts[g], part, x_c, x_t, x_y, sample, unsigned(offset), unsigned(key0), unsigned(key1), late, low, g + 1,
                            S, FT, MIX, HAS_V, PHILOX, RUNS, EVEN, PT, PH, PW, BLOCK,
                        )


@triton.jit
def gradient(
    DZ, DV, e, b, s: tl.constexpr, T, H, W, z_b, v_b, z_r, v_r, column, weight_z, weight_v, mask,
    HAS_Z: tl.constexpr, HAS_V: tl.constexpr, FT: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):
    """weight_z dz + weight_v dv at elements of level s; zeros where ``mask`` is off."""
    if HAS_Z:
        at = place(e, b, T, H, W, z_b, z_r, column, PT * FT**s, PH * 2**s, PW * 2**s)
        total = weight_z * grab(DZ, at, mask)
        if HAS_V:
            at = place(e, b, T, H, W, v_b, v_r, column, PT * FT**s, PH * 2**s, PW * 2**s)
            total += weight_v * grab(DV, at, mask)
        return total
    at = place(e, b, T, H, W, v_b, v_r, column, PT * FT**s, PH * 2**s, PW * 2**s)
    return weight_v * grab(DV, at, mask)


@triton.jit
def weights(TABLE, b, table_b, table_s, s, scale, takes_part, HAS_TABLE: tl.constexpr):
    """What dz and dv of a level are multiplied by; zeros where it does not take part, whatever the table holds there."""
    z = scale
    v = scale * 0.0
    if HAS_TABLE:
        row = TABLE + b * table_b + s * table_s
        z = scale * tl.load(row)
        v = scale * tl.load(row + 2)
    return tl.where(takes_part, z, 0.0), tl.where(takes_part, v, 0.0)


@triton.jit
def adjoint_column(
    DZ, DV, c, t, y, x, b, s: tl.constexpr, T, H, W, z_b, v_b, z_r, v_r, column, weight_z, weight_v, mask,
    LAPLACIAN: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr, FT: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Column x (of level s) of the adjoint of ``up`` at time t and row y of the level before: taps over rows and frames."""
    TAPS: tl.constexpr = 4 if LAPLACIAN else 2
    FRAMES: tl.constexpr = TAPS if FT == 2 else 1
    total = tl.zeros(x.shape, tl.float32)
    for j in tl.static_range(TAPS):
        yy = clamp(2 * y + (j - 1 if LAPLACIAN else j), H)
        line = tl.zeros(x.shape, tl.float32)
        for k in tl.static_range(FRAMES):
            tt = clamp(2 * t + (k - 1 if LAPLACIAN else k), T) if FT == 2 else t
            e = ((c * T + tt) * H + yy) * W + x
            g = gradient(
                DZ, DV, e, b, s, T, H, W, z_b, v_b, z_r, v_r, column, weight_z, weight_v, mask, HAS_Z, HAS_V, FT, PT, PH, PW
            )
            if FT == 2 and LAPLACIAN:
                line += (0.75 if k == 1 or k == 2 else 0.25) * g
            else:
                line += g
        if LAPLACIAN:
            total += (0.75 if j == 1 or j == 2 else 0.25) * line
        else:
            total += line
    return total


@triton.jit
def residual(
    DZ, DV, DZ1, DV1, TABLE, MASK, c, t, y, x, b, T, H, W, T1, H1, W1, z_b, v_b, z_b1, v_b1, z_r, v_r, column, column1, scale, scale1,
    table_b, table_s, mask_b, active, mask,
    s: tl.constexpr, LAPLACIAN: tl.constexpr, FT: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr,
    HAS_MASK: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):
    """The gradient of level s at positions (t, y, x), less what the next level (names with 1) sends back through ``up``."""
    part = alive(MASK, mask_b, b, s, active, HAS_MASK)
    weight_z, weight_v = weights(TABLE, b, table_b, table_s, s, scale, part, HAS_TABLE)
    own = gradient(
        DZ, DV, ((c * T + t) * H + y) * W + x, b, s, T, H, W, z_b, v_b, z_r, v_r, column, weight_z, weight_v, mask & part, HAS_Z, HAS_V, FT,
        PT, PH, PW,
    )
    part = alive(MASK, mask_b, b, s + 1, active, HAS_MASK)
    weight_z, weight_v = weights(TABLE, b, table_b, table_s, s + 1, scale1, part, HAS_TABLE)
    TAPS: tl.constexpr = 4 if LAPLACIAN else 2
    back = tl.zeros(x.shape, tl.float32)
    for j in tl.static_range(TAPS):
        taken = adjoint_column(
            DZ1, DV1, c, t, y, clamp(2 * x + (j - 1 if LAPLACIAN else j), W1), b, s + 1, T1, H1, W1, z_b1, v_b1, z_r, v_r, column1,
            weight_z, weight_v, mask & part, LAPLACIAN, HAS_Z, HAS_V, FT, PT, PH, PW,
        )
        back += (0.75 if j == 1 or j == 2 else 0.25) * taken if LAPLACIAN else taken
    return own - back


@triton.jit(do_not_specialize=("active", "mask_b"))
def analysis_adjoint_kernel(
    DX, DZ, DV, TABLE, MASK, T, H, W, z_b, v_b, columns, scale, x_b, z_r, v_r, table_b, table_s, mask_b, counts, active, blocks,
    S: tl.constexpr, LAPLACIAN: tl.constexpr, FT: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr,
    HAS_MASK: tl.constexpr, RUNS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the levels -> gradient of the (dense) volume, at the positions of the level before the finest. The adjoint of a block
    mean repeats a coarse value, so that what comes from all coarser levels is one value per position."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    M: tl.constexpr = S - 1
    SHARE: tl.constexpr = 0.125 if FT == 2 else 0.25
    e = start + tl.arange(0, BLOCK)
    inside = e < counts[M - 1]
    c, t, y, x = decode(e, T[M - 1], H[M - 1], W[M - 1])
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(M):
        total = total * SHARE + residual(
            DZ[s], DV[s], DZ[s + 1], DV[s + 1], TABLE, MASK, c, t >> (M - 1 - s) if FT == 2 else t, y >> (M - 1 - s), x >> (M - 1 - s), b,
            T[s], H[s], W[s], T[s + 1], H[s + 1], W[s + 1], z_b[s], v_b[s], z_b[s + 1], v_b[s + 1], z_r, v_r, columns[s], columns[s + 1],
            scale[s], scale[s + 1], table_b, table_s, mask_b, active, inside,
            s, LAPLACIAN, FT, HAS_TABLE, HAS_Z, HAS_V, HAS_MASK, PT, PH, PW,
        )
    part = alive(MASK, mask_b, b, M, active, HAS_MASK)
    weight_z, weight_v = weights(TABLE, b, table_b, table_s, M, scale[M], part, HAS_TABLE)
    total = interleave(total, total) * SHARE
    n = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = n < 2 * counts[M - 1]
    c, t, y, x = decode(n, T[M - 1], H[M - 1], W[M])
    for late in tl.static_range(FT):
        for low in tl.static_range(2):
            tt = t * FT + late
            at = ((c * T[M] + tt) * H[M] + 2 * y + low) * W[M] + x
            if RUNS:
                at = tl.max_contiguous(tl.multiple_of(at, 4), 4)
            own = gradient(
                DZ[M], DV[M], at, b, M, T[M], H[M], W[M], z_b[M], v_b[M], z_r, v_r, columns[M],
                weight_z, weight_v, inside & part, HAS_Z, HAS_V, FT, PT, PH, PW,
            )
            put(DX, b.to(tl.int64) * x_b + at, own + total, inside)
