"""Launcher of the compiled CPU kernels of merge_attention."""

from __future__ import annotations

import torch

from vidkern import _cpu

_ABSENT = (0, 0, 0, 0)


def _strided(x):
    """Data pointer and the strides of B, H, L; a missing tensor is a null pointer."""
    return _ABSENT if x is None else (x.data_ptr(), *x.stride()[:3])


def _arguments(outs, whole_out, whole_lse):
    batch, heads, length, dim = outs[0].shape
    head = (outs[0].dtype is torch.bfloat16, torch.get_num_threads(), len(outs), batch, heads, length, dim)
    return [*head, *_strided(whole_out), *_strided(whole_lse)]


def forward(outs, lses, *, signs, out, lse) -> None:
    """Fill ``out`` and ``lse`` with the merged result.

    Args:
        outs: list of [B, H, L, D], float32 or bfloat16, last stride 1; lses: list of float32 [B, H, L].
        signs: one +1 or -1 per part.
        out, lse: like one element of ``outs`` and ``lses``.
    """
    fields = _arguments(outs, out, lse)
    for i, (o, s) in enumerate(zip(outs, lses, strict=True)):
        fields += (signs[i], *_strided(o), *_strided(s))
    _cpu.merge_attention_forward(tuple(fields))


def backward(dout, dlse, outs, lses, *, signs, douts, dlses) -> None:
    """Fill ``douts`` and ``dlses`` (lists like ``outs`` and ``lses``); ``dout`` and ``dlse`` may be None (zero)."""
    fields = _arguments(outs, dout, dlse)
    for i, (o, s, do, ds) in enumerate(zip(outs, lses, douts, dlses, strict=True)):
        fields += (signs[i], *_strided(o), *_strided(s), *_strided(do), *_strided(ds))
    _cpu.merge_attention_backward(tuple(fields))
