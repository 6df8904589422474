"""Triton kernels that take a volume apart: levels, with noise and target where asked for, and the adjoint. Laplacian and Haar.

A program owns a run of positions of one level, and what it writes is the next finer level there: 2 x 2 values for each (times 2 frames
where time is pooled), the two of a row side by side. The block means that interpolation needs around a position are made again from the
volume, which is in the cache for the second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_noise import normal, normals4, unsigned
from .triton_parts import alive, block_sum, clamp, decode, four_taps, grab, interleave, place, put, quarter_way


@triton.jit
def mean_between(X, c, t, far, y, x, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr, LAPLACIAN: tl.constexpr):
    """Block mean at (t, y, x); where time is pooled too (QT > 1), a quarter of the way to frame ``far``."""
    gain: tl.constexpr = 1.0 / (Q * Q * QT)
    near = block_sum(X, c, t, y, x, x_c, x_t, x_y, mask, Q, QT) * gain
    if LAPLACIAN and QT > 1:
        near = quarter_way(near, block_sum(X, c, far, y, x, x_c, x_t, x_y, mask, Q, QT) * gain)
    return near


@triton.jit
def rows_between(X, c, t, far, y, above, below, x, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr):
    """Column x of the interpolation of block means, at the upper and the lower of the two rows."""
    near = mean_between(X, c, t, far, y, x, x_c, x_t, x_y, mask, Q, QT, True)
    up = mean_between(X, c, t, far, above, x, x_c, x_t, x_y, mask, Q, QT, True)
    down = mean_between(X, c, t, far, below, x, x_c, x_t, x_y, mask, Q, QT, True)
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
def analysis_kernel(
    X, Z, V, EPS, TABLE, MASK, T, H, W, z_b, v_b, eps_b, columns, scale, first, x_b, x_c, x_t, x_y, z_r, v_r, table_b, table_s, mask_b,
    channels, active, key0, key1, offset, first_sample,
    S: tl.constexpr, GROUPS: tl.constexpr, FINE: tl.constexpr, LAPLACIAN: tl.constexpr, FT: tl.constexpr, MIX: tl.constexpr,
    HAS_V: tl.constexpr, HAS_MASK: tl.constexpr, PHILOX: tl.constexpr, RUNS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """X -> levels Z (and V). Programs: sample by sample, ``first[g]`` .. ``first[g + 1]`` run over level g and write level g + 1; those
    of g = 0 write level 0 as well (it alone without FINE).

    MIX: with a table. PHILOX: noise from the generator, else from EPS. RUNS: rows hold whole blocks of four elements.
    """
    pid = tl.program_id(0)
    b = pid // first[GROUPS]
    i = pid % first[GROUPS]
    k0 = unsigned(key0)
    k1 = unsigned(key1)
    sample = unsigned(first_sample) + b.to(tl.uint32)
    shift = unsigned(offset)
    base = X + b.to(tl.int64) * x_b
    for g in tl.static_range(GROUPS):
        if (i >= first[g]) & (i < first[g + 1]):
            Q: tl.constexpr = 2 ** (S - 1 - g)
            QT: tl.constexpr = Q if FT == 2 else 1
            start = (i - first[g]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e1 = start + tl.arange(0, BLOCK)
            count = channels * T[g] * H[g] * W[g]
            inside1 = e1 < count
            c, t, y, x = decode(e1, T[g], H[g], W[g])
            if g == 0:
                part = alive(MASK, mask_b, b, 0, active, HAS_MASK)
                mean = block_sum(base, c, t, y, x, x_c, x_t, x_y, inside1 & part, Q, QT) * (1.0 / (Q * Q * QT))
                eps = mean
                if MIX:
                    if PHILOX:
                        eps = normals4(start + 4 * tl.arange(0, BLOCK // 4), 0, sample, shift, k0, k1)
                    else:
                        eps = grab(EPS[0] + b.to(tl.int64) * eps_b[0], e1, inside1 & part)
                emit(
                    mean, eps, e1, b, T[0], H[0], W[0], Z[0], V[0], z_b[0], z_r, v_b[0], v_r, columns[0], TABLE + b * table_b, scale[0],
                    part, inside1, MIX, HAS_V, PT, PH, PW,
                )
            if FINE:
                s: tl.constexpr = g + 1
                part = alive(MASK, mask_b, b, s, active, HAS_MASK)
                read1 = inside1 & part
                e2 = 2 * start + tl.arange(0, 2 * BLOCK)
                inside2 = e2 < 2 * count
                c2, t2, y2, x2 = decode(e2, T[g], H[g], W[s])
                e4 = 2 * start + 4 * tl.arange(0, BLOCK // 2)
                c4, t4, y4, x4 = decode(e4, T[g], H[g], W[s])
                for late in tl.static_range(FT):
                    far = clamp(t + (2 * late - 1), T[g])
                    if LAPLACIAN:
                        above = clamp(y - 1, H[g])
                        below = clamp(y + 1, H[g])
                        left, left1 = rows_between(
                            base, c, t, far, y, above, below, clamp(x - 1, W[g]), x_c, x_t, x_y, read1, Q, QT
                        )
                        middle, middle1 = rows_between(base, c, t, far, y, above, below, x, x_c, x_t, x_y, read1, Q, QT)
                        right, right1 = rows_between(
                            base, c, t, far, y, above, below, clamp(x + 1, W[g]), x_c, x_t, x_y, read1, Q, QT
                        )
                        upper = interleave(quarter_way(middle, left), quarter_way(middle, right))
                        lower = interleave(quarter_way(middle1, left1), quarter_way(middle1, right1))
                    else:
                        mean = mean_between(base, c, t, far, y, x, x_c, x_t, x_y, read1, Q, QT, False)
                        upper = interleave(mean, mean)
                        lower = upper
                    for low in tl.static_range(2):
                        Q2: tl.constexpr = Q // 2
                        QT2: tl.constexpr = Q2 if FT == 2 else 1
                        own = block_sum(
                            base, c2, t2 * FT + late, 2 * y2 + low, x2, x_c, x_t, x_y, inside2 & part, Q2, QT2
                        ) * (1.0 / (Q2 * Q2 * QT2))
                        e = ((c2 * T[s] + t2 * FT + late) * H[s] + 2 * y2 + low) * W[s] + x2
                        value = own - (lower if low else upper)
                        eps = value
                        if MIX:
                            if PHILOX and RUNS:
                                row = ((c4 * T[s] + t4 * FT + late) * H[s] + 2 * y4 + low) * W[s] + x4
                                eps = normals4(row, s, sample, shift, k0, k1)
                            elif PHILOX:
                                eps = normal(e, s, sample, shift, k0, k1)
                            else:
                                eps = grab(EPS[s] + b.to(tl.int64) * eps_b[s], e, inside2 & part)
                        emit(
                            value, eps, e, b, T[s], H[s], W[s], Z[s], V[s], z_b[s], z_r, v_b[s], v_r, columns[s],
                            TABLE + b * table_b + s * table_s, scale[s], part, inside2, MIX, HAS_V, PT * FT**s, PH * 2**s, PW * 2**s,
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
    DZ, DV, c, t, y, x, b, s: tl.constexpr, T, H, W, channels, z_b, v_b, z_r, v_r, column, weight_z, weight_v, mask,
    LAPLACIAN: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr, FT: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Column x (of level s) of the adjoint of ``up`` at time t and row y of the level before: taps over rows and frames."""
    TAPS: tl.constexpr = 4 if LAPLACIAN else 2
    FRAMES: tl.constexpr = TAPS if FT == 2 else 1
    total = weight_z + weight_v + tl.zeros(x.shape, tl.float32)
    total = total * 0.0
    for j in tl.static_range(TAPS):
        yy = clamp(2 * y + (j - 1 if LAPLACIAN else j), H)
        line = total * 0.0
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
def analysis_adjoint_kernel(
    DX, DZ, DV, TABLE, MASK, T, H, W, z_b, v_b, columns, scale, x_b, x_c, x_t, x_y, z_r, v_r, table_b, table_s, mask_b, channels, active,
    blocks,
    S: tl.constexpr, LAPLACIAN: tl.constexpr, FT: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr,
    HAS_MASK: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the levels -> gradient of the volume, at the positions of the level before the finest. The adjoint of a block mean
    repeats a coarse value, so that what comes from all coarser levels is one value per position."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e1 = start + tl.arange(0, BLOCK)
    inside = e1 < channels * T[S - 2] * H[S - 2] * W[S - 2]
    c, t, y, x = decode(e1, T[S - 2], H[S - 2], W[S - 2])
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(S - 1):
        UP: tl.constexpr = S - 2 - s
        ts = t >> UP if FT == 2 else t
        ys = y >> UP
        xs = x >> UP
        part = alive(MASK, mask_b, b, s, active, HAS_MASK)
        weight_z, weight_v = weights(TABLE, b, table_b, table_s, s, scale[s], part, HAS_TABLE)
        own = gradient(
            DZ[s], DV[s], ((c * T[s] + ts) * H[s] + ys) * W[s] + xs, b, s, T[s], H[s], W[s], z_b[s], v_b[s], z_r, v_r, columns[s], weight_z,
            weight_v, inside & part, HAS_Z, HAS_V, FT, PT, PH, PW,
        )
        N: tl.constexpr = s + 1
        part = alive(MASK, mask_b, b, N, active, HAS_MASK)
        weight_z, weight_v = weights(TABLE, b, table_b, table_s, N, scale[N], part, HAS_TABLE)
        taken = inside & part
        TAPS: tl.constexpr = 4 if LAPLACIAN else 2
        back = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(TAPS):
            xx = clamp(2 * xs + (j - 1 if LAPLACIAN else j), W[N])
            column = adjoint_column(
                DZ[N], DV[N], c, ts, ys, xx, b, N, T[N], H[N], W[N], channels, z_b[N], v_b[N], z_r, v_r, columns[N], weight_z, weight_v,
                taken, LAPLACIAN, HAS_Z, HAS_V, FT, PT, PH, PW,
            )
            if LAPLACIAN:
                back += (0.75 if j == 1 or j == 2 else 0.25) * column
            else:
                back += column
        total = total * (0.125 if FT == 2 else 0.25) + (own - back)
    M: tl.constexpr = S - 1
    part = alive(MASK, mask_b, b, M, active, HAS_MASK)
    weight_z, weight_v = weights(TABLE, b, table_b, table_s, M, scale[M], part, HAS_TABLE)
    total = interleave(total, total) * (0.125 if FT == 2 else 0.25)
    e2 = 2 * start + tl.arange(0, 2 * BLOCK)
    inside = e2 < 2 * channels * T[S - 2] * H[S - 2] * W[S - 2]
    c, t, y, x = decode(e2, T[S - 2], H[S - 2], W[M])
    for late in tl.static_range(FT):
        for low in tl.static_range(2):
            tt = t * FT + late
            yy = 2 * y + low
            own = gradient(
                DZ[M], DV[M], ((c * T[M] + tt) * H[M] + yy) * W[M] + x, b, M, T[M], H[M], W[M], z_b[M], v_b[M], z_r, v_r, columns[M],
                weight_z, weight_v, inside & part, HAS_Z, HAS_V, FT, PT, PH, PW,
            )
            put(DX, b.to(tl.int64) * x_b + c * x_c + tt * x_t + yy * x_y + x, own + total, inside)
