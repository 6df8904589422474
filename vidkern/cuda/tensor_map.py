"""Tensor maps of the tensor memory accelerator (CUtensorMap), and the parameters of kernels that hold them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

ALIGNMENT = 64  # bytes, of a tensor map and so of parameters that begin with one
PANEL = 64  # 16-bit values that are swizzled together: 128 bytes


class TensorMap(ctypes.Structure):
    """``vk::TensorMap``: opaque, made by ``launch.tensor_map``."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


def parameters(name: str, fields: Sequence[tuple]) -> type[ctypes.Structure]:
    """The class of a kernel's parameters as the device lays them out: their size is a multiple of a tensor map's alignment.

    Args:
        fields: as of ``ctypes.Structure``; tensor maps come first.

    Raises:
        ValueError: a tensor map stands behind something else.
    """
    kinds = [field[1] for field in fields]
    maps = sum(kind is TensorMap for kind in kinds)
    if any(kind is not TensorMap for kind in kinds[:maps]):
        raise ValueError(f"fields: {', '.join(f[0] for f in fields)}, expected the tensor maps first")
    plain = type(name, (ctypes.Structure,), {"_fields_": list(fields)})
    short = -ctypes.sizeof(plain) % ALIGNMENT
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, *([("_pad", ctypes.c_uint8 * short)] if short else [])]})
