"""Launchers of the Triton kernels: NVIDIA GPUs of compute capability 8.0 on, or Triton's interpreter on the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl

from . import configs
from .plan import Shape, plan
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel
from .triton_forward import forward_kernel, liveness_kernel

# TRITON_INTERPRET=1 was set when the kernels were decorated: they run as Python on CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
_LOG2E = math.log2(math.e)
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_INT32 = 2**31
_ABSENT = (0, 0, 0)
_ROWS = 128  # rows per program of the delta kernel
_TOKENS = 1024  # tokens per program of the liveness kernel


@functools.lru_cache(maxsize=64)
def _family(device: torch.device) -> str:
    return "ampere" if INTERPRETED else configs.family(torch.cuda.get_device_capability(device))


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _wide(*tensors) -> bool:
    """Whether an offset within one head (or the length of the longest) leaves 32 bits, with room for a tile beyond the end."""
    return any(t is not None and (t.shape[2] + 256) * t.stride(2) + t.shape[3] >= _INT32 for t in tensors)


def _unit(*tensors) -> int:
    """What all strides are divided by before they are handed over: the compiler knows 16-byte alignment from a factor of 8, and
    by itself from multiples of 16 alone, which odd multiples of 8 as head dims do not give."""
    return 8 if all(s % 8 == 0 for t in tensors if t is not None for s in t.stride()[:3]) else 1


def _strides(t, unit=1) -> tuple[int, ...]:
    return _ABSENT if t is None else tuple(s // unit for s in t.stride()[:3])


def _live(q, valid, kv_len, text_len, n_frames, frame_len, n_text, text_front):
    """Bytes [B or 1, L] that say which tokens are live keys and which queries run, and the step between samples; None without
    any mask. One launch, no synchronisation."""
    masks = [m for m in (valid, kv_len, text_len) if m is not None]
    if not masks:
        return None, 0
    batch, length = max(m.shape[0] for m in masks), q.shape[2]
    live = torch.empty(batch, length, dtype=torch.uint8, device=q.device)
    if valid is not None:
        valid = valid.view(torch.uint8)

    def step(m):
        return 0 if m is None or m.shape[0] == 1 else m.stride(0)

    blocks = triton.cdiv(length, _TOKENS)
    liveness_kernel[(blocks * batch,)](
        live, valid, kv_len, text_len, step(valid), step(kv_len), step(text_len), length, frame_len, n_frames, blocks,
        0 if text_front else length - n_text, n_text if text_front else 0,
        HAS_VALID=valid is not None, HAS_KV_LEN=kv_len is not None, HAS_TEXT_LEN=text_len is not None, BLOCK=_TOKENS,
    )
    return live, 0 if batch == 1 else length


def _tables(kind: str, q, pattern, frame_len, n_text, text_front):
    """The plan of a kernel on the device, and the keyword arguments that follow from its configuration."""
    shape = Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, kind == "dkv")
    return _prepared(kind, shape, q.shape[3], q.dtype, q.device, configs.forced.get(kind))


# Never dropped: a captured CUDA graph goes on reading the tables.
@functools.lru_cache(maxsize=None)
def _prepared(kind, shape, dim, dtype, device, forced):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"grid_attention: first call for {shape} on {device} inside a CUDA graph capture, expected a call before it: tables "
            "have to be copied to the device"
        )
    family = _family(device)
    config, tiling = configs.choose(kind, dim, dtype.itemsize, family, shape, forced)
    # In a thread of its own: what a CUDA-graph pool or inference mode is switched on for is the calling thread.
    with ThreadPoolExecutor(1) as worker:
        tables = worker.submit(plan, shape, tiling, device).result()
    return tables, {
        "D": dim, "BLOCK_D": configs.padded_dim(dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_E": config.block_edge, "STRADDLE": tiling.straddle, "AHEAD": configs.ahead(family),
        "DOT": tl.float32 if INTERPRETED else _DTYPES[dtype], "num_warps": config.warps, "num_stages": config.stages,
        "maxnreg": config.registers,
    }


def forward(q, k, v, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, out, lse) -> None:
    """Fill ``out`` and ``lse``.

    Args:
        q, k, v, out: [B, H, L, D], float16, bfloat16 or float32, last stride 1, any other strides; k, v may have fewer heads.
        lse: float32 [B, H, L].
        valid: bool [B or 1, F]; kv_len: int32 [B or 1, F]; text_len: int32 [B]; each contiguous or None.
    """
    batch, heads = q.shape[:2]
    unit = _unit(q, k, v, out)
    with _on(q.device):
        tables, blocks = _tables("forward", q, pattern, frame_len, n_text, text_front)
        live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
        forward_kernel[(tables.n_tiles * batch * heads,)](
            q, k, v, out, lse, *tables, live, tables.n_tiles, heads, heads // k.shape[1], scale * _LOG2E, live_step,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(out, unit), *lse.stride(),
            HAS_LIVE=live is not None, NEGATIVE=scale < 0, WIDE=_wide(q, k, v, out), UNIT=unit, **blocks,
        )


def backward(
    dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, dq, dk, dv
) -> None:
    """Fill ``dq``, ``dk``, ``dv``; ``dout`` and ``dlse`` may be None (zero). Other arguments as in :func:`forward`.

    Always deterministic. Workspace: 4 bytes per query row, and a byte per token with masks.
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    everything = (q, k, v, out, dout, dq, dk, dv)
    unit = _unit(*everything)
    with _on(q.device):
        delta = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        delta_tiles = triton.cdiv(length, _ROWS)
        delta_kernel[(delta_tiles * batch * heads,)](
            dout, out, lse, dlse, delta, length, heads, delta_tiles,
            *_strides(dout, unit), *_strides(out, unit), *lse.stride(), *_strides(dlse),
            D=dim, BLOCK_D=configs.padded_dim(dim), BLOCK_M=_ROWS, HAS_DOUT=dout is not None, HAS_DLSE=dlse is not None,
            UNIT=unit, num_warps=8,
        )
        live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
        flags = {"HAS_LIVE": live is not None, "HAS_DOUT": dout is not None, "WIDE": _wide(*everything), "UNIT": unit}
        inputs = (*_strides(dout, unit), *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *lse.stride())

        tables, blocks = _tables("dq", q, pattern, frame_len, n_text, text_front)
        dq_kernel[(tables.n_tiles * batch * heads,)](
            dout, q, k, v, lse, delta, dq, *tables, live, tables.n_tiles, heads, heads // kv_heads, length, scale,
            scale * _LOG2E, live_step, *inputs, *_strides(dq, unit), **flags, **blocks,
        )
        tables, blocks = _tables("dkv", q, pattern, frame_len, n_text, text_front)
        dkv_kernel[(tables.n_tiles * batch * kv_heads,)](
            dout, q, k, v, lse, delta, dk, dv, *tables, live, tables.n_tiles, kv_heads, heads // kv_heads, length, scale,
            scale * _LOG2E, live_step, *inputs, *_strides(dk, unit), *_strides(dv, unit), **flags, **blocks,
        )
