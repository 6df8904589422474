"""Tensor maps of the tensor memory accelerator (CUtensorMap), and the parameters of kernels that hold them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

ALIGNMENT = 64  # bytes, of a tensor map and so of parameters that begin with one
PANEL = 64  # 16-bit values that are swizzled together: 128 bytes
MOST_BOX, MOST_RANK = 256, 5
CHUNK = 8  # 16-bit values of 16 bytes, in which the tensor memory accelerator reckons
KINDS = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType


class TensorMap(ctypes.Structure):
    """``vk::TensorMap``: opaque, made by ``launch.tensor_map``."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


def aligned() -> TensorMap:
    """A tensor map where the driver can write one. ctypes aligns to 16 bytes at most; CUDA 13 declares 128."""
    held = (ctypes.c_uint8 * (2 * ctypes.sizeof(TensorMap)))()
    return TensorMap.from_buffer(held, -ctypes.addressof(held) % 128)


def check(address: int, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> None:
    """Raise for the first thing that the tensor memory accelerator cannot do; arguments as of ``launch.tensor_map``.

    Raises:
        ValueError: see there.
    """
    if dtype not in KINDS:
        raise ValueError(f"t: dtype {dtype}, expected torch.bfloat16 or torch.float16")
    if address % (2 * CHUNK):
        raise ValueError(f"t: begins at {address:#x}, expected a multiple of {2 * CHUNK} bytes")
    rank = len(sizes)
    if not 1 <= rank <= MOST_RANK or not all(1 <= n <= 2**32 for n in sizes):
        raise ValueError(f"sizes: {tuple(sizes)}, expected 1 to {MOST_RANK} numbers from 1 to 2**32")
    if len(strides) != rank - 1 or any(s % CHUNK or not 0 < s < 2**39 for s, n in zip(strides, sizes[1:]) if n > 1):
        said = f"{rank - 1} multiples of {CHUNK} elements above 0, of all dimensions but the first"
        raise ValueError(f"strides: {tuple(strides)}, expected {said}")
    if len(box) != rank or not all(1 <= n <= MOST_BOX for n in box) or box[0] > PANEL or box[0] % CHUNK:
        said = f"{rank} sides from 1 to {MOST_BOX}, the first a multiple of {CHUNK} up to {PANEL}"
        raise ValueError(f"box: {tuple(box)}, expected {said}")


def parameters(name: str, fields: Sequence[tuple]) -> type[ctypes.Structure]:
    """The class of a kernel's parameters as the device lays them out: their size is a multiple of a tensor map's alignment.

    Args:
        fields: as of ``ctypes.Structure``; tensor maps, and arrays of them, come first.

    Raises:
        ValueError: a tensor map stands behind something else.
    """
    are_maps = [getattr(field[1], "_type_", field[1]) is TensorMap for field in fields]
    if not all(are_maps[: sum(are_maps)]):
        raise ValueError(f"fields: {', '.join(f[0] for f in fields)}, expected the tensor maps first")
    plain = type(name, (ctypes.Structure,), {"_fields_": list(fields)})
    short = -ctypes.sizeof(plain) % ALIGNMENT
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, *([("_pad", ctypes.c_uint8 * short)] if short else [])]})
