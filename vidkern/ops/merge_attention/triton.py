"""Triton kernels of merge_attention, forward and backward, and their launchers.

One program merges a block of rows of one head: it reads every part's rows and log-sum-exps once (the backward reads the rows a second
time, from the cache) and writes once. Everything is computed in float32; a part without weight is not read.
Source: the log-sum-exp merge of blockwise and ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

WARPS = 4
_ELEMENTS = 4096  # of a part that a program holds: 32 per thread, and half of it where many parts' addresses take registers
_FEW = 5


@triton.jit
def _offset(steps, unit: tl.constexpr, batch, head):
    return (batch * steps[0] + head * steps[1]) * unit


@triton.jit
def _weights(LSES, LSE_STEPS, SIGNS: tl.constexpr, batch, head, rows, inside):
    """(largest lse where there is one, sum of the signed weights, whether a row sees nothing) of rows."""
    top = tl.full(rows.shape, float("-inf"), tl.float32)
    for i in tl.static_range(len(SIGNS)):
        lse = tl.load(LSES[i] + _offset(LSE_STEPS[i], 1, batch, head) + rows * LSE_STEPS[i][2], mask=inside, other=float("-inf"))
        top = tl.maximum(top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros(rows.shape, tl.float32)
    for i in tl.static_range(len(SIGNS)):
        lse = tl.load(LSES[i] + _offset(LSE_STEPS[i], 1, batch, head) + rows * LSE_STEPS[i][2], mask=inside, other=float("-inf"))
        total += SIGNS[i] * tl.exp(lse - top)
    return top, total, total <= 0.0


@triton.jit
def _weight(LSES, LSE_STEPS, i: tl.constexpr, SIGNS: tl.constexpr, batch, head, rows, inside, top, total, empty):
    lse = tl.load(LSES[i] + _offset(LSE_STEPS[i], 1, batch, head) + rows * LSE_STEPS[i][2], mask=inside, other=float("-inf"))
    return tl.where(empty, 0.0, SIGNS[i] * tl.exp(lse - top) / tl.where(empty, 1.0, total))


@triton.jit(do_not_specialize=["heads", "length", "n_tiles"])
def forward_kernel(
    OUTS, LSES, OUT, LSE, OUT_STEPS, LSE_STEPS, out_steps, lse_steps, heads, length, n_tiles,
    SIGNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
):
    """OUT and LSE of BLOCK_M rows of one head. Steps: strides of batch, head and row; UNIT: what those of outs were divided by."""
    pid = tl.program_id(0)
    batch = (pid // n_tiles // heads).to(tl.int64)
    head = (pid // n_tiles % heads).to(tl.int64)
    rows = (pid % n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < D

    top, total, empty = _weights(LSES, LSE_STEPS, SIGNS, batch, head, rows, inside)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(len(SIGNS)):
        w = _weight(LSES, LSE_STEPS, i, SIGNS, batch, head, rows, inside, top, total, empty)
        at = _offset(OUT_STEPS[i], UNIT, batch, head) + rows[:, None] * OUT_STEPS[i][2] * UNIT + dims[None, :]
        part = tl.load(OUTS[i] + at, mask=(inside & (w != 0.0))[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        acc += w[:, None] * part
    at = _offset(out_steps, UNIT, batch, head) + rows[:, None] * out_steps[2] * UNIT + dims[None, :]
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & in_dim[None, :])
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(LSE + _offset(lse_steps, 1, batch, head) + rows * lse_steps[2], lse, mask=inside)


@triton.jit(do_not_specialize=["heads", "length", "n_tiles"])
def backward_kernel(
    DOUT, DLSE, OUTS, LSES, DOUTS, DLSES, dout_steps, dlse_steps, OUT_STEPS, LSE_STEPS, DOUT_STEPS, DLSE_STEPS, heads, length, n_tiles,
    SIGNS: tl.constexpr, HAS_DOUT: tl.constexpr, HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
):
    """Gradients of every part's rows and lses, of BLOCK_M rows of one head; a missing DOUT or DLSE is zero."""
    pid = tl.program_id(0)
    batch = (pid // n_tiles // heads).to(tl.int64)
    head = (pid // n_tiles % heads).to(tl.int64)
    rows = (pid % n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    dims = tl.arange(0, BLOCK_D)
    cells = inside[:, None] & (dims < D)[None, :]

    top, total, empty = _weights(LSES, LSE_STEPS, SIGNS, batch, head, rows, inside)
    go = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_DOUT:
        at = _offset(dout_steps, UNIT, batch, head) + rows[:, None] * dout_steps[2] * UNIT + dims[None, :]
        go = tl.load(DOUT + at, mask=cells, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    if HAS_DLSE:
        mean -= tl.load(DLSE + _offset(dlse_steps, 1, batch, head) + rows * dlse_steps[2], mask=inside, other=0.0)
    if HAS_DOUT:
        for i in tl.static_range(len(SIGNS)):
            w = _weight(LSES, LSE_STEPS, i, SIGNS, batch, head, rows, inside, top, total, empty)
            at = _offset(OUT_STEPS[i], UNIT, batch, head) + rows[:, None] * OUT_STEPS[i][2] * UNIT + dims[None, :]
            part = tl.load(OUTS[i] + at, mask=cells & (w != 0.0)[:, None], other=0.0).to(tl.float32)
            mean += w * tl.sum(go * part, 1)
    for i in tl.static_range(len(SIGNS)):
        w = _weight(LSES, LSE_STEPS, i, SIGNS, batch, head, rows, inside, top, total, empty)
        slope = -mean
        if HAS_DOUT:
            at = _offset(OUT_STEPS[i], UNIT, batch, head) + rows[:, None] * OUT_STEPS[i][2] * UNIT + dims[None, :]
            part = tl.load(OUTS[i] + at, mask=cells & (w != 0.0)[:, None], other=0.0).to(tl.float32)
            slope += tl.sum(go * part, 1)
        at = _offset(DOUT_STEPS[i], UNIT, batch, head) + rows[:, None] * DOUT_STEPS[i][2] * UNIT + dims[None, :]
        dout = tl.where((w != 0.0)[:, None], w[:, None] * go, 0.0)
        tl.store(DOUTS[i] + at, dout.to(DOUTS[i].dtype.element_ty), mask=cells)
        at = _offset(DLSE_STEPS[i], 1, batch, head) + rows * DLSE_STEPS[i][2]
        tl.store(DLSES[i] + at, tl.where(w != 0.0, w * slope, 0.0), mask=inside)


def _steps(t, unit=1):
    return (0, 0, 0) if t is None else tuple(s // unit for s in t.stride()[:3])


def _all_steps(tensors, unit=1):
    return tuple(_steps(t, unit) for t in tensors)


def _on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(outs, signs, *others):
    """(grid, what strides of ``outs`` [B, H, L, D] and ``others`` are divided by, sizes, constants) of a kernel."""
    batch, heads, length, dim = outs[0].shape
    # A factor of 8 tells the compiler that rows are aligned to 16 bytes.
    unit = 8 if all(s % 8 == 0 for t in (*outs, *others) if t is not None for s in t.stride()[:3]) else 1
    block_d = max(8, triton.next_power_of_2(dim))
    block_m = max(1, (_ELEMENTS if len(outs) <= _FEW else _ELEMENTS // 2) // block_d)
    tiles = triton.cdiv(length, block_m)
    constants = {"SIGNS": signs, "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "UNIT": unit, "num_warps": WARPS}
    return (tiles * batch * heads,), unit, (heads, length, tiles), constants


def forward(outs, lses, *, signs, out, lse) -> None:
    """Fill ``out`` and ``lse`` with the merged result.

    Args:
        outs: list of [B, H, L, D], float16, bfloat16 or float32, last stride 1; lses: list of float32 [B, H, L].
        signs: one +1 or -1 per part.
        out, lse: like one element of ``outs`` and ``lses``.
    """
    grid, unit, sizes, constants = _launch(outs, signs, out)
    with _on(out.device):
        forward_kernel[grid](
            tuple(outs), tuple(lses), out, lse, _all_steps(outs, unit), _all_steps(lses), _steps(out, unit), _steps(lse), *sizes,
            **constants,
        )


def backward(dout, dlse, outs, lses, *, signs, douts, dlses) -> None:
    """Fill ``douts`` and ``dlses`` (lists like ``outs`` and ``lses``); ``dout`` or ``dlse`` may be None (zero)."""
    grid, unit, sizes, constants = _launch(outs, signs, dout, *douts)
    with _on(outs[0].device):
        backward_kernel[grid](
            dout, dlse, tuple(outs), tuple(lses), tuple(douts), tuple(dlses), _steps(dout, unit), _steps(dlse),
            _all_steps(outs, unit), _all_steps(lses), _all_steps(douts, unit), _all_steps(dlses), *sizes,
            HAS_DOUT=dout is not None, HAS_DLSE=dlse is not None, **constants,
        )
