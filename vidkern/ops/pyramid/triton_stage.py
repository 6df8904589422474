"""Triton kernels of the stages of Pyramidal Flow: block means down, repetition up, rows and columns only."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_noise import normal, normals4, unsigned
from .triton_parts import block_sum, decode, grab, interleave, put

_SQRT_4_3 = tl.constexpr(1.15470053837925152902)


@triton.jit(do_not_specialize=("key0", "key1", "offset", "first_sample"))
def stage_kernel(
    X, EPS, Z, V, TABLE, T, H, W, x_b, x_c, x_t, x_y, eps_b, eps_c, eps_t, eps_y, z_b, z_c, z_t, z_y, v_b, v_c, v_t, v_y, table_b, count,
    blocks, level, key0, key1, offset, first_sample,
    Q: tl.constexpr, FIRST: tl.constexpr, PHILOX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Volume and its noise -> z and v of a stage [T, H, W], whose values are blocks of Q x Q. FIRST: there is no stage before it."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, T, H, W)
    wide = b.to(tl.int64)
    clean = block_sum(X + wide * x_b, c, t, y, x, x_c, x_t, x_y, inside, Q, 1, 1, False) * (1.0 / (Q * Q))
    if PHILOX:
        sample = unsigned(first_sample) + b.to(tl.uint32)
        fine = ((c * T + t) * (H * Q) + y * Q) * (W * Q) + x * Q
        if Q == 1:
            eps = normals4(start + 4 * tl.arange(0, BLOCK // 4), level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
        else:
            columns = fine[:, None] + tl.arange(0, Q)[None, :]
            noise = tl.zeros([BLOCK, Q], tl.float32)
            for i in range(Q):
                noise += normal(columns + i * (W * Q), level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
            eps = tl.sum(noise, 1) * (1.0 / Q)
    else:
        eps = block_sum(EPS + wide * eps_b, c, t, y, x, eps_c, eps_t, eps_y, inside, Q, 1, 1, False) * (1.0 / Q)
    row = TABLE + b * table_b
    s = tl.load(row)
    end_sigma = tl.load(row + 1)
    r = tl.load(row + 2)
    begin = s * eps
    if not FIRST:
        before = block_sum(X + wide * x_b, c, t, y >> 1, x >> 1, x_c, x_t, x_y, inside, 2 * Q, 1, 1, False) * (0.25 / (Q * Q))
        begin = begin + (1.0 - s) * before
    end = end_sigma * eps + (1.0 - end_sigma) * clean
    put(Z, wide * z_b + c * z_c + t * z_t + y * z_y + x, r * begin + (1.0 - r) * end, inside)
    put(V, wide * v_b + c * v_c + t * v_t + y * v_y + x, begin - end, inside)


@triton.jit
def ends(DZ, DV, at, mask, HAS_Z: tl.constexpr, HAS_V: tl.constexpr, r):
    """Gradients of the two ends of a stage."""
    begin = tl.zeros(at.shape, tl.float32)
    end = begin
    if HAS_Z:
        g = grab(DZ, at, mask)
        begin += r * g
        end += (1.0 - r) * g
    if HAS_V:
        g = grab(DV, at, mask)
        begin += g
        end -= g
    return begin, end


@triton.jit
def stage_adjoint_kernel(
    DX, DZ, DV, TABLE, T, H, W, table_b, count, blocks,
    Q: tl.constexpr, FIRST: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of z and v [T, H, W] -> gradient of the volume; all dense."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, T, H * Q, W * Q)
    y = y // Q
    x = x // Q
    plane = b.to(tl.int64) * (count // (Q * Q)) + (c * T + t) * H * W
    row = TABLE + b * table_b
    r = tl.load(row + 2)
    _, end = ends(DZ, DV, plane + y * W + x, inside, HAS_Z, HAS_V, r)
    total = (1.0 - tl.load(row + 1)) * end
    if not FIRST:
        late = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(4):
            begin, _ = ends(DZ, DV, plane + (y // 2 * 2 + i % 2) * W + x // 2 * 2 + i // 2, inside, HAS_Z, HAS_V, r)
            late += begin
        total += 0.25 * ((1.0 - tl.load(row)) * late)
    put(DX, b.to(tl.int64) * count + e, total * (1.0 / (Q * Q)), inside)


@triton.jit(do_not_specialize=("key0", "key1", "offset", "first_sample"))
def transition_kernel(
    OUT, Z, EPS, TABLE, T, H, W, z_b, z_c, z_t, z_y, eps_b, eps_c, eps_t, eps_y, out_b, out_c, out_t, out_y, table_b, count, blocks, level,
    key0, key1, offset, first_sample,
    PHILOX: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """scale * up(z) + spread * sqrt(4/3) (g - its 2 x 2 mean), for a run of positions of z [T, H, W]; ``count`` of them a sample."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    wide = b.to(tl.int64)
    e = start + tl.arange(0, BLOCK)
    inside = e < count
    c, t, y, x = decode(e, T, H, W)
    z = grab(Z, wide * z_b + c * z_c + t * z_t + y * z_y + x, inside)
    e2 = 2 * start + tl.arange(0, 2 * BLOCK)
    inside2 = e2 < 2 * count
    c2, t2, y2, x2 = decode(e2, T, H, 2 * W)
    if PHILOX:
        sample = unsigned(first_sample) + b.to(tl.uint32)
        if RUNS:
            c4, t4, y4, x4 = decode(2 * start + 4 * tl.arange(0, BLOCK // 2), T, H, 2 * W)
            at = ((c4 * T + t4) * H + y4) * (4 * W) + x4
            upper = normals4(at, level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
            lower = normals4(at + 2 * W, level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
        else:
            at = ((c2 * T + t2) * H + y2) * (4 * W) + x2
            upper = normal(at, level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
            lower = normal(at + 2 * W, level, sample, unsigned(offset), unsigned(key0), unsigned(key1))
    else:
        at = wide * eps_b + c2 * eps_c + t2 * eps_t + 2 * y2 * eps_y + x2
        upper = grab(EPS, at, inside2)
        lower = grab(EPS, at + eps_y, inside2)
    even, odd = tl.split(tl.reshape(upper + lower, [BLOCK, 2]))
    mean = 0.25 * (even + odd)
    mean = interleave(mean, mean)
    scale = tl.load(TABLE + b * table_b)
    spread = tl.load(TABLE + b * table_b + 1) * _SQRT_4_3
    up = scale * interleave(z, z)
    at = wide * out_b + c2 * out_c + t2 * out_t + 2 * y2 * out_y + x2
    put(OUT, at, up + spread * (upper - mean), inside2)
    put(OUT, at + out_y, up + spread * (lower - mean), inside2)


@triton.jit
def transition_adjoint_kernel(
    DZ, G, TABLE, T, H, W, g_b, g_c, g_t, g_y, table_b, count, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """scale * the sum of every 2 x 2 block of the gradient G, at positions [T, H, W]."""
    pid = tl.program_id(0)
    b = pid // blocks
    start = (pid % blocks) * BLOCK
    if WIDE:
        start = start.to(tl.int64)
    e2 = 2 * start + tl.arange(0, 2 * BLOCK)
    c, t, y, x = decode(e2, T, H, 2 * W)
    at = b.to(tl.int64) * g_b + c * g_c + t * g_t + 2 * y * g_y + x
    even, odd = tl.split(tl.reshape(grab(G, at, e2 < 2 * count) + grab(G, at + g_y, e2 < 2 * count), [BLOCK, 2]))
    e = start + tl.arange(0, BLOCK)
    put(DZ, b.to(tl.int64) * count + e, tl.load(TABLE + b * table_b) * (even + odd), e < count)
