"""What the launchers of the pyramid ops have in common."""

from __future__ import annotations

import torch

from ... import registry
from ..launch import cpu_why_not, unit_stride


def unit(parts):
    """Tensors (or None, or a list of them) whose last stride is 1."""
    return [unit_stride(p) for p in parts] if isinstance(parts, (list, tuple)) else unit_stride(parts)


def dense(mask):
    return None if mask is None else mask.contiguous()


def why_not_any(*tensors) -> str | None:
    """Why the compiled CPU part cannot serve these tensors (None entries are skipped)."""
    for t in tensors:
        if t is not None and (reason := cpu_why_not(t)):
            return reason
    return None


def math_dtype(t: torch.Tensor) -> torch.dtype:
    """What the reference computes in: float32 for narrower inputs."""
    return torch.promote_types(t.dtype, torch.float32)


def backends(why_not, cpu_run, cpu_backward, reference_run, reference_backward):
    """The two backends of every pyramid op."""
    return (
        registry.Backend("cpu", why_not, cpu_run, cpu_backward),
        registry.Backend("reference", lambda *args: None, reference_run, reference_backward),
    )
