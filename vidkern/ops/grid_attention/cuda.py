"""Launchers of the hand-written CUDA kernels (csrc/cuda/grid_attention*.cu): which kernel, over how many blocks, with which parameters."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from ...cuda import first_byte
from . import reference
from .plan import Shape, Tiling, plan

# Source below csrc/cuda -> what the names of its kernels begin with.
SOURCES = {
    "grid_attention": ("grid_attention_forward_",),
    "grid_attention_backward": ("grid_attention_delta_", "grid_attention_dq_", "grid_attention_dkv_"),
}
ROWS, THREADS = 64, 128
TILING = Tiling(ROWS, 64, 32, True)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)


class Strides(ctypes.Structure):
    """``vk::grid::Strides``: elements between samples, heads and tokens."""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "head", "token")]


class Delta(ctypes.Structure):
    """``vk::grid::Delta``."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("dout", "out", "dlse", "delta")),
        *((n, Strides) for n in ("dout_step", "out_step", "dlse_step")),
        *((n, ctypes.c_int32) for n in ("rows", "heads", "length", "dim")),
    ]  # fmt: skip


class Backward(ctypes.Structure):
    """``vk::grid::Backward``."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("dout", "q", "k", "v", "lse", "delta", "dq", "dk", "dv", "tiles", "main", "edge", "live")),
        *((f"{n}_step", Strides) for n in ("dout", "q", "k", "v", "lse", "delta", "dq", "dk", "dv")),
        ("live_step", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("n_tiles", "heads", "group", "dim")),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


class Forward(ctypes.Structure):
    """``vk::grid::Forward``."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "out", "lse", "tiles", "main", "edge", "live")),
        *((n, Strides) for n in ("q_step", "k_step", "v_step", "out_step", "lse_step")),
        ("live_step", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("n_tiles", "heads", "group", "dim")),
        ("scale_log2", ctypes.c_float),
    ]  # fmt: skip


def why_not(q, k, v) -> str | None:
    """Why the kernels cannot serve these tensors [B, H, L, D], or None."""
    if q.dtype not in _NAMES:
        return f"dtype is {q.dtype}, it serves torch.float16 and torch.bfloat16"
    if q.shape[3] > 128:
        return f"head_dim is {q.shape[3]}, it serves up to 128"
    for name, t in (("q", q), ("k", k), ("v", v)):
        # Rows of a multiple of 8 values: where they follow each other, only the first can be off.
        if first_byte(t) % 16 or (not t.is_contiguous() and any(s % 8 for s, n in zip(t.stride()[:3], t.shape) if n > 1)):
            return f"{name}'s rows are not aligned to 16 bytes"
    return None


def _live(q, valid, kv_len, text_len, n_frames, frame_len, n_text, text_front):
    """A byte per token, bit 0: a live key, bit 1: its query runs; and the bytes between samples. None without any mask."""
    if valid is None and kv_len is None and text_len is None:
        return None, 0
    keys, rows = reference.liveness(
        valid, kv_len, text_len, n_frames=n_frames, frame_len=frame_len, n_text=n_text, text_front=text_front, device=q.device
    )
    live = (keys.to(torch.uint8) + 2 * rows.to(torch.uint8)).contiguous()
    return live, 0 if live.shape[0] == 1 else live.shape[1]


@functools.lru_cache(maxsize=None)
def _tables(shape: Shape, device: torch.device):
    return plan(shape, TILING, device)


def _addresses(*tensors) -> list:
    return [None if t is None else t.data_ptr() for t in tensors]


def _strides(*tensors) -> list[Strides]:
    return [Strides() if t is None else Strides(*t.stride()[:3]) for t in tensors]


def forward(q, k, v, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, out, lse, launch) -> None:
    """Fill ``out`` and ``lse``; arguments as of the Triton launcher.

    Args:
        launch: ``launch(kernel, parameters, blocks, threads, shared, reads, writes)`` runs a kernel by name; shared memory in bytes, and
            the tensors that it may read and write.
    """
    batch, heads = q.shape[:2]
    tables = _tables(Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, False), q.device)
    live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
    dim = 64 if q.shape[3] <= 64 else 128
    reads = [q, k, v, *tables, *([] if live is None else [live])]
    strides = _strides(q, k, v, out, lse)
    given = Forward(
        *_addresses(q, k, v, out, lse, *tables, live), *strides, live_step,
        tables.n_tiles, heads, heads // k.shape[1], q.shape[3], scale * _LOG2E,
    )  # fmt: skip
    name = f"grid_attention_forward_{_NAMES[q.dtype]}_{dim}{'_live' if live is not None else ''}"
    # The rows' own tile, and two stages of keys and values.
    shared = 2 * dim * (ROWS + 2 * 2 * TILING.block_n)
    launch(name, given, tables.n_tiles * batch * heads, THREADS, shared, reads, [out, lse])


def backward(
    dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, dq, dk, dv, launch
) -> None:
    """Fill ``dq``, ``dk``, ``dv``; arguments as of the Triton launcher, ``launch`` as in :func:`forward`. Deterministic."""
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    if dout is None:
        dout = q.new_zeros(head_dim).expand(q.shape)
    elif why_not(dout, dout, dout) is not None:
        dout = dout.contiguous()  # an expanded gradient, or one cut out of a larger tensor
    dtype = _NAMES[q.dtype]
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    rows = batch * heads * length
    given = Delta(*_addresses(dout, out, dlse, delta), *_strides(dout, out, dlse), rows, heads, length, head_dim)
    launch(f"grid_attention_delta_{dtype}", given, -(-rows // 4), THREADS, 0, [t for t in (dout, out, dlse) if t is not None], [delta])

    live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
    dim = 64 if head_dim <= 64 else 128
    inputs = [dout, q, k, v, lse, delta]
    # Two tiles of the rows' own, and two stages of two for the columns'.
    shared = 2 * dim * (2 * ROWS + 2 * 2 * TILING.block_n)
    for part, transposed, of, grads in (("dq", False, heads, (dq, None, None)), ("dkv", True, kv_heads, (None, dk, dv))):
        tables = _tables(Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, transposed), q.device)
        given = Backward(
            *_addresses(*inputs, *grads, *tables, live), *_strides(*inputs, *grads), live_step, tables.n_tiles, of, heads // kv_heads,
            head_dim, scale,
        )  # fmt: skip
        reads = [*inputs, *tables, *([] if live is None else [live])]
        name = f"grid_attention_{part}_{dtype}_{dim}{'_live' if live is not None else ''}"
        launch(name, given, tables.n_tiles * batch * of, THREADS, shared, reads, [g for g in grads if g is not None])
