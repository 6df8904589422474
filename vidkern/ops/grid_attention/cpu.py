"""Launcher of the compiled CPU kernels: pointers, strides and sizes go in, nothing is allocated but the workspace."""

from __future__ import annotations

import torch

from vidkern import _cpu

_ABSENT = (0, 0, 0, 0)


def _strided(x):
    """Data pointer and the strides of B, H, L; a missing tensor is a null pointer."""
    return _ABSENT if x is None else (x.data_ptr(), *x.stride()[:3])


def _per_batch(x):
    """Data pointer and the step from one batch item to the next, 0 when all share one row."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0)


def _arguments(backward, q, k, v, out, lse, valid, kv_len, text_len, pattern, frame_len, n_text, text_front, work):
    """The flat tuple the extension reads, and the workspace it points to (keep it alive during the call)."""
    batch, heads, length, dim = q.shape
    shape = (
        q.dtype is torch.bfloat16, torch.get_num_threads(), batch, heads, k.shape[1], length, dim,
        pattern.n_frames, frame_len, n_text,
    )
    size = _cpu.grid_attention_workspace(backward, shape)
    workspace = torch.empty(size, dtype=torch.uint8)
    lists = pattern.lists("cpu")
    return workspace, (
        *shape, text_front, pattern.text_visible,
        lists[0].data_ptr(), lists[1].data_ptr(), lists[2].data_ptr(), lists[3].data_ptr(),
        *_per_batch(valid), *_per_batch(kv_len), *_per_batch(text_len),
        workspace.data_ptr(), size, 0 if work is None else work.data_ptr(),
        *_strided(q), *_strided(k), *_strided(v), *_strided(out), *_strided(lse),
    )


def forward(
    q, k, v, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, out, lse, work=None
) -> None:
    """Fill ``out`` and ``lse``.

    Args:
        q, k, v, out: [B, H, L, D], float32 or bfloat16, last stride 1, any other strides; k and v may have fewer heads.
        lse: float32 [B, H, L], any strides.
        valid: bool or uint8 [B or 1, F]; kv_len: int32 [B or 1, F]; text_len: int32 [B or 1]; each contiguous or None.
        work: int64 [2] or None: score elements computed and score elements needed are added to it.
    """
    workspace, arguments = _arguments(
        False, q, k, v, out, lse, valid, kv_len, text_len, pattern, frame_len, n_text, text_front, work
    )
    _cpu.grid_attention_forward(arguments, scale)


def backward(
    dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, dq, dk, dv,
    work=None,
) -> None:
    """Fill ``dq``, ``dk``, ``dv``; ``dout`` and ``dlse`` may be None (zero). Other arguments as in :func:`forward`.

    The result does not depend on the number of threads and is the same bits from run to run.
    """
    workspace, arguments = _arguments(
        True, q, k, v, out, lse, valid, kv_len, text_len, pattern, frame_len, n_text, text_front, work
    )
    gradients = (*_strided(dout), *_strided(dlse), *_strided(dq), *_strided(dk), *_strided(dv))
    _cpu.grid_attention_backward(arguments + gradients, scale)
