"""What the launchers of the pyramid ops have in common."""

from __future__ import annotations

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import TRITON_DTYPES, cpu_why_not, triton_why_not, unit_stride
from . import cuda, cuda_filters, cuda_stage, cuda_structures, plans


def unit(parts):
    """Tensors (or None, or a list of them) whose last stride is 1."""
    return [unit_stride(p) for p in parts] if isinstance(parts, (list, tuple)) else unit_stride(parts)


def dense(mask):
    """A mask whose rows follow each other, or None."""
    return None if mask is None else mask.contiguous()


def why_not_any(*tensors) -> str | None:
    """Why the compiled CPU part cannot serve these tensors (None entries are skipped)."""
    last = None
    for t in tensors:
        # Most are like the one before.
        if t is None or (last is not None and t.dtype is last.dtype and t.device == last.device):
            continue
        if reason := cpu_why_not(t):
            return reason
        last = t
    return None


def math_dtype(t: torch.Tensor) -> torch.dtype:
    """What the reference computes in: float32 for narrower inputs."""
    return torch.promote_types(t.dtype, torch.float32)


def _triton_why_not(*args) -> str | None:
    """Why the Triton kernels cannot serve these arguments of an op: all its floating-point tensors, and dtypes asked for."""
    for arg in args:
        for part in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and (reason := triton_why_not(part)):
                return reason
            if isinstance(part, torch.dtype) and part not in TRITON_DTYPES:
                return f"dtype is {part}, it serves {', '.join(str(d) for d in TRITON_DTYPES)}"
    return None


def _cuda_why_not(*args) -> str | None:
    """Why the CUDA kernels cannot serve these arguments of an op."""
    parts = (p for arg in args for p in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    tensor = next(p for p in parts if isinstance(p, torch.Tensor))
    return kernels.why_not(tensor) or cuda.why_not(*args)


def _cuda(name: str):
    def run(outputs, *args):
        getattr(cuda, name)(outputs, *args, launch=kernels.launch)

    return run


def _triton(name: str):
    def run(outputs, *args):
        from . import triton

        getattr(triton, name)(outputs, *args)

    return run


def backends(why_not, cpu, cpu_backward, reference_run, reference_backward, *, triton: str):
    """The backends of a pyramid op. ``cpu`` and ``cpu_backward`` describe launches (see :func:`plans.planned`); ``triton`` names the
    launcher in triton.py and cuda.py, that of the backward is called ``<triton>_backward``."""
    return (
        registry.Backend("cpu", why_not, plans.planned(cpu), plans.planned(cpu_backward)),
        registry.Backend(
            "cuda", _cuda_why_not, _cuda(triton), _cuda(f"{triton}_backward"),
            "CUDA kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on", "require",
            kernels.declare(cuda, cuda_filters, cuda_stage, cuda_structures),
        ),
        registry.Backend(
            "triton", _triton_why_not, _triton(triton), _triton(f"{triton}_backward"),
            "Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on", "warn", ("ops/pyramid/triton.py",),
        ),
        registry.Backend("reference", lambda *args: None, reference_run, reference_backward),
    )  # fmt: skip
