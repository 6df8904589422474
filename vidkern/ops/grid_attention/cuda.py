"""Launcher of the hand-written CUDA kernels (csrc/cuda/grid_attention.cu): which kernel, over how many blocks, with which parameters."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from . import reference
from .plan import Shape, Tiling, plan

ROWS, THREADS = 64, 128
TILING = Tiling(ROWS, 64, 32, True)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)


class Strides(ctypes.Structure):
    """``vk::grid::Strides``: elements between samples, heads and tokens."""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "head", "token")]


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
        if t.data_ptr() % 16 or any(s % 8 for s, n in zip(t.stride()[:3], t.shape) if n > 1):
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
    strides = [Strides(*t.stride()[:3]) for t in (q, k, v, out, lse)]
    given = Forward(
        *[t.data_ptr() for t in (q, k, v, out, lse, *tables)], live.data_ptr() if live is not None else None, *strides, live_step,
        tables.n_tiles, heads, heads // k.shape[1], q.shape[3], scale * _LOG2E,
    )  # fmt: skip
    name = f"grid_attention_forward_{_NAMES[q.dtype]}_{dim}{'_live' if live is not None else ''}"
    # The rows' own tile, and two stages of keys and values.
    shared = 2 * dim * (ROWS + 2 * 2 * TILING.block_n)
    launch(name, given, tables.n_tiles * batch * heads, THREADS, shared, reads, [out, lse])
