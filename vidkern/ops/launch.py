"""What the launchers of every op share."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .. import compiled
from ..errors import comes_with

CPU_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_CAPABILITY = (8, 0)


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


@functools.lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    if torch.version.hip:
        return "Triton kernels are written for NVIDIA GPUs, and this torch is built for ROCm"
    return None if importlib.util.find_spec("triton") else f"Triton is not installed ({comes_with('triton')})"


@functools.lru_cache(maxsize=64)
def _gpu_too_old(index: int | None) -> str | None:
    # Without a GPU these are fake tensors, which are traced for another machine.
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= TRITON_CAPABILITY:
        return None
    return "the GPU's compute capability is {}.{}, expected at least {}.{}".format(*capability, *TRITON_CAPABILITY)


def triton_why_not(t: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot serve tensors like ``t``: one sentence, or None. Does not import Triton."""
    device = t.device
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"tensors are on {device.type}, it serves cuda (and cpu under TRITON_INTERPRET=1)"
    if t.dtype not in TRITON_DTYPES:
        return f"dtype is {t.dtype}, it serves {', '.join(str(d) for d in TRITON_DTYPES)}"
    return _triton_missing() or (None if interpreted else _gpu_too_old(device.index))


def fill(targets, values) -> None:
    """Copy ``values`` into the preallocated ``targets``."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
