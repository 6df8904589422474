"""Launching the hand-written CUDA kernels of csrc/cuda, which ship as sources.

A kernel's machine code comes from a cubin that was built with the package (``VIDKERN_CUDA_ARCHS``), else from NVRTC at its first use on a
kind of device, kept on disk by content. It runs on torch's current stream; nothing synchronises, nothing is allocated here. Importing this
loads neither CUDA nor cuda-python.

Sources named ``*_hopper*`` use what compute capability 9.0 alone has: they are compiled for sm_90a and offered on such devices only.
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import cubins
from .launcher import Launcher, declare

__all__ = ["CAPABILITY", "Launcher", "declare", "first_byte", "launch", "why_not", "why_not_hopper"]

CAPABILITY = (8, 0)
launch = Launcher()


@functools.lru_cache(maxsize=64)
def _missing(index: int | None, hopper: bool = False) -> str | None:
    if torch.version.hip:
        return "the CUDA kernels are written for NVIDIA GPUs, and this torch is built for ROCm"
    if reason := cubins.missing_python():
        return reason
    # Without a GPU these are fake tensors, which are traced for another machine.
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY or (hopper and capability != cubins.HOPPER):
        expected = "{}.{}".format(*cubins.HOPPER) if hopper else "at least {}.{}".format(*CAPABILITY)
        return "the GPU's compute capability is {}.{}, expected ".format(*capability) + expected
    return None if cubins.built_ahead(capability, hopper) else cubins.missing_compiler()


def why_not(t: torch.Tensor) -> str | None:
    """Why no CUDA kernel can be launched for tensors like ``t``: one sentence, or None. A family's own conditions come on top."""
    return _missing(t.device.index) if t.device.type == "cuda" else f"tensors are on {t.device.type}, it serves cuda"


def why_not_hopper(t: torch.Tensor) -> str | None:
    """As :func:`why_not`, for kernels that run on compute capability 9.0 alone."""
    return _missing(t.device.index, True) if t.device.type == "cuda" else f"tensors are on {t.device.type}, it serves cuda"


def first_byte(t: torch.Tensor) -> int:
    """A tensor's address, for predicates about alignment; of a fake tensor, that in a storage which begins at 0."""
    return t.storage_offset() * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
