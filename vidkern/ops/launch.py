"""What the launchers of every op share."""

from __future__ import annotations

import torch

from .. import compiled

CPU_DTYPES = (torch.float32, torch.bfloat16)


def unit_stride(t: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels read rows of consecutive values: a tensor with any other last stride costs this one copy."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def cpu_why_not(t: torch.Tensor) -> str | None:
    """Why the compiled CPU part cannot serve tensors like ``t``: one sentence, or None."""
    if t.device.type != "cpu":
        return f"tensors are on {t.device.type}, it serves cpu"
    if t.dtype not in CPU_DTYPES:
        return f"dtype is {t.dtype}, it serves torch.float32 and torch.bfloat16"
    missing = compiled.cpu_missing()
    return f"the compiled CPU part {missing}" if missing else None


def fill(targets, values) -> None:
    """Copy ``values`` into the preallocated ``targets``."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
