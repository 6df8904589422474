"""Triton kernels without a filter: noise on given levels, the guided Euler step, the loss, and the adjoint of each. A program owns a run
of values of one level of one sample."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_analysis import emit, gradient, weights
from .triton_noise import normals4, unsigned
from .triton_parts import alive, grab, place, put
from .triton_synthesis import spread, stepped


@triton.jit(do_not_specialize=("key0", "key1", "offset", "first_sample", "active", "mask_b"))
def mix_kernel(
    X, Z, V, EPS, TABLE, MASK, T, H, W, x_b, z_b, v_b, eps_b, columns, scale, first, z_r, v_r, table_b, table_s, mask_b, counts, active,
    key0, key1, offset, first_sample,
    S: tl.constexpr, FT: tl.constexpr, MIX: tl.constexpr, HAS_V: tl.constexpr, HAS_MASK: tl.constexpr, PHILOX: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Levels X -> Z (and V): scaled, and with MIX mixed with noise; zeros where a level does not take part."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    sample = unsigned(first_sample) + b.to(tl.uint32)
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            start = (i - first[s]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e = start + tl.arange(0, BLOCK)
            inside = e < counts[s]
            part = alive(MASK, mask_b, b, s, active, HAS_MASK)
            value = grab(X[s] + b.to(tl.int64) * x_b[s], e, inside & part)
            eps = value
            if MIX:
                if PHILOX:
                    eps = normals4(start + 4 * tl.arange(0, BLOCK // 4), s, sample, unsigned(offset), unsigned(key0), unsigned(key1))
                else:
                    eps = grab(EPS[s] + b.to(tl.int64) * eps_b[s], e, inside & part)
            emit(
                value, eps, e, b, T[s], H[s], W[s], Z[s], V[s], z_b[s], z_r, v_b[s], v_r, columns[s], TABLE + b * table_b + s * table_s,
                scale[s], part, inside, MIX, HAS_V, PT * FT**s, PH * 2**s, PW * 2**s,
            )


@triton.jit(do_not_specialize=("active", "mask_b"))
def mix_adjoint_kernel(
    DX, DZ, DV, TABLE, MASK, T, H, W, z_b, v_b, columns, scale, first, z_r, v_r, table_b, table_s, mask_b, counts, active,
    S: tl.constexpr, FT: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_Z: tl.constexpr, HAS_V: tl.constexpr, HAS_MASK: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of Z and V -> those of the levels."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            start = (i - first[s]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e = start + tl.arange(0, BLOCK)
            count = counts[s]
            inside = e < count
            part = alive(MASK, mask_b, b, s, active, HAS_MASK)
            weight_z, weight_v = weights(TABLE, b, table_b, table_s, s, scale[s], part, HAS_TABLE)
            g = gradient(
                DZ[s], DV[s], e, b, s, T[s], H[s], W[s], z_b[s], v_b[s], z_r, v_r, columns[s], weight_z, weight_v, inside & part, HAS_Z,
                HAS_V, FT, PT, PH, PW,
            )
            put(DX[s], b.to(tl.int64) * count + e, g, inside)


@triton.jit(do_not_specialize=("active", "upcoming", "given", "kept"))
def step_kernel(
    Z, CV, UV, STATE, INPUT, TABLE, T, H, W, z_b, c_b, u_b, state_b, input_b, columns, scale, first, input_r, table_b, table_s, counts,
    active, upcoming, kept, given,
    S: tl.constexpr, FT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """STATE (the first ``kept`` levels) after a step of the first ``active`` ones; INPUT (the first ``given`` ones) has the new state of
    the first ``upcoming`` and zeros of the others. STATE may be Z."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            start = (i - first[s]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e = start + tl.arange(0, BLOCK)
            inside = e < counts[s]
            row = TABLE + b * table_b + s * table_s
            value = stepped(
                Z[s], CV[s], UV[s], e, b, z_b[s], c_b[s], u_b[s], row, scale[s], s < active, inside & ((s < kept) | (s < upcoming)), STEP,
                GUIDED,
            )
            put(STATE[s], b.to(tl.int64) * state_b[s] + e, value, inside & (s < kept))
            at = place(e, b, T[s], H[s], W[s], input_b[s], input_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s)
            put(INPUT[s], at, tl.where(s < upcoming, value, 0.0), inside & (s < given))


@triton.jit(do_not_specialize=("active", "upcoming"))
def step_adjoint_kernel(
    DSTATE, DINPUT, DZ, DC, DU, TABLE, T, H, W, state_b, input_b, columns, scale, first, input_r, table_b, table_s, counts, active,
    upcoming,
    S: tl.constexpr, FT: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr, STEP: tl.constexpr, GUIDED: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of the state and of the next input -> those of z and, for the first ``active`` levels, of the velocities."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            start = (i - first[s]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e = start + tl.arange(0, BLOCK)
            count = counts[s]
            inside = e < count
            g = tl.zeros([BLOCK], tl.float32)
            if HAS_STATE:
                g = grab(DSTATE[s], b.to(tl.int64) * state_b[s] + e, inside & (s < active))
            if HAS_INPUT:
                at = place(e, b, T[s], H[s], W[s], input_b[s], input_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s)
                g += grab(DINPUT[s], at, inside & (s < upcoming))
            g = scale[s] * g
            at = b.to(tl.int64) * count + e
            row = TABLE + b * table_b + s * table_s
            if s < active:
                spread(DZ[s], DC[s], DU[s], at, g, row, inside, STEP, GUIDED)
            else:
                put(DZ[s], at, g, inside)


@triton.jit(do_not_specialize=("active", "mask_b"))
def loss_kernel(
    PRED, TARGET, MASK, SUMS, T, H, W, p_b, t_b, columns, first, p_r, t_r, mask_b, counts, active, batch,
    S: tl.constexpr, FT: tl.constexpr, HAS_MASK: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sum of squared differences of CHUNKS * BLOCK values: SUMS[run of the level, sample, level]."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            part = alive(MASK, mask_b, b, s, active, HAS_MASK)
            total = tl.zeros([BLOCK], tl.float32)
            for j in tl.static_range(CHUNKS):
                start = ((i - first[s]) * CHUNKS + j) * BLOCK
                if WIDE:
                    start = start.to(tl.int64)
                e = start + tl.arange(0, BLOCK)
                taken = (e < counts[s]) & part
                p = grab(PRED[s], place(e, b, T[s], H[s], W[s], p_b[s], p_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s), taken)
                t = grab(TARGET[s], place(e, b, T[s], H[s], W[s], t_b[s], t_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s), taken)
                total += (p - t) * (p - t)
            tl.store(SUMS + ((i - first[s]) * batch + b) * S + s, tl.sum(total, 0))


@triton.jit
def loss_sum_kernel(SUMS, LOSS, MEANS, first, counts, batch, S: tl.constexpr, PAIRS: tl.constexpr, RUNS: tl.constexpr):
    """Sums of the runs, in their order, -> mean of every sample and level, and the loss. One program."""
    pair = tl.arange(0, PAIRS)
    inside = pair < batch * S
    level = pair % S
    count = tl.zeros([PAIRS], tl.int64) + 1
    runs = tl.zeros([PAIRS], tl.int32)
    most = 0
    for s in tl.static_range(S):
        here = level == s
        count = tl.where(here, tl.zeros([PAIRS], tl.int64) + counts[s], count)
        runs = tl.where(here, first[s + 1] - first[s], runs)
        most = tl.maximum(most, first[s + 1] - first[s])
    total = tl.zeros([RUNS, PAIRS], tl.float64)
    for at in range(0, most, RUNS):
        run = at + tl.arange(0, RUNS)
        taken = (run[:, None] < runs[None, :]) & inside[None, :]
        total += tl.load(SUMS + run[:, None] * (batch * S) + pair[None, :], mask=taken, other=0.0).to(tl.float64)
    means = (tl.sum(total, 0) / count.to(tl.float64)).to(tl.float32)
    tl.store(MEANS + pair, means, mask=inside)
    tl.store(LOSS, (tl.sum(tl.where(inside, means, 0.0).to(tl.float64), 0) / batch).to(tl.float32))


@triton.jit(do_not_specialize=("active", "mask_b"))
def loss_backward_kernel(
    PRED, TARGET, MASK, DLOSS, DMEANS, DP, T, H, W, p_b, t_b, d_b, columns, first, p_r, t_r, d_r, mask_b, counts, active, batch,
    S: tl.constexpr, FT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_MEANS: tl.constexpr, LEVELS: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradient of the predictions: 2 (dloss / B + dmeans) / n times the difference. LEVELS: columns of DMEANS."""
    pid = tl.program_id(0)
    b = pid // first[S]
    i = pid % first[S]
    for s in tl.static_range(S):
        if (i >= first[s]) & (i < first[s + 1]):
            start = (i - first[s]) * BLOCK
            if WIDE:
                start = start.to(tl.int64)
            e = start + tl.arange(0, BLOCK)
            count = counts[s]
            inside = e < count
            part = alive(MASK, mask_b, b, s, active, HAS_MASK)
            weight = tl.zeros([1], tl.float32)
            if HAS_LOSS:
                weight += tl.load(DLOSS).to(tl.float32) / batch
            if HAS_MEANS:
                weight += tl.load(DMEANS + b * LEVELS + s).to(tl.float32)
            weight = 2.0 * weight / count
            p = grab(PRED[s], place(e, b, T[s], H[s], W[s], p_b[s], p_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s), inside & part)
            t = grab(TARGET[s], place(e, b, T[s], H[s], W[s], t_b[s], t_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s), inside & part)
            at = place(e, b, T[s], H[s], W[s], d_b[s], d_r, columns[s], PT * FT**s, PH * 2**s, PW * 2**s)
            put(DP[s], at, tl.where(part, weight * (p - t), 0.0), inside)
