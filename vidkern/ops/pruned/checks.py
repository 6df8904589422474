"""Argument checks that the pruned ops share. Every error is one line: argument, value, what was expected."""

from __future__ import annotations

import math

import torch

from .activations import ACTS

FLOAT = torch.float32


def tensor(name: str, t, dims: int | None = None) -> torch.Tensor:
    """``t``; TypeError when it is no tensor, ValueError when it is not dense, floating-point, non-empty and of ``dims`` dimensions."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
    if t.layout is not torch.strided:
        raise ValueError(f"{name}: layout {t.layout}, expected a dense tensor")
    if not t.is_floating_point():
        raise ValueError(f"{name}: dtype {t.dtype}, expected a floating-point dtype")
    if dims is not None and t.dim() != dims:
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {dims} dimensions")
    if t.dim() and 0 in t.shape:
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected no empty dimension")
    return t


def inputs(x, low: dict, high: dict) -> int:
    """Check x, and that every tensor of ``low`` has its dtype and every one of ``high`` that or float32, all on its device; the
    number of tokens.

    Under autocast dtypes are not compared: what it lowers it lowers below.
    """
    tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected [tokens, channels] or [batch, tokens, channels]")
    mixed = torch.is_autocast_enabled(x.device.type)
    for name, t in (*low.items(), *high.items()):
        if t is None:
            continue
        tensor(name, t)
        if t.device != x.device:
            raise ValueError(f"{name}: on device {t.device}, expected x's {x.device}")
        if t.dtype != x.dtype and not mixed and (name in low or t.dtype is not FLOAT or x.dtype is torch.float64):
            wanted = f"x's {x.dtype}" + ("" if name in low or x.dtype in (FLOAT, torch.float64) else " or torch.float32")
            raise ValueError(f"{name}: dtype {t.dtype}, expected {wanted}")
    return math.prod(x.shape[:-1])


def activation(act, channels: int, name: str = "weight") -> None:
    """ValueError for an unknown activation, and for pairs of an odd number of ``channels``; ``name``: whose rows they are."""
    if act not in ACTS:
        raise ValueError(f"act: {act!r}, expected one of {', '.join(map(repr, ACTS))}")
    if act == "swiglu" and channels % 2:
        raise ValueError(f"{name}: {channels} output channels, expected an even number: swiglu takes pairs (gates, then values)")


def vector(name: str, t, size: int, why: str) -> None:
    """ValueError for a ``t`` (not None) that is not [size], which ``why`` explains."""
    if t is not None and tuple(t.shape) != (size,):
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected ({size},): {why}")


def per_group(name: str, t, x: torch.Tensor, channels: int) -> None:
    """``t`` [..., channels] holds one row for all tokens, or one for each run of as many consecutive tokens."""
    if t is None:
        return
    rows = math.prod(t.shape[:-1])
    tokens, batch = math.prod(x.shape[:-1]), x.shape[0] if x.dim() > 2 else 1
    if t.shape[-1] != channels or (rows != 1 and (rows % batch or tokens % rows)):
        raise ValueError(
            f"{name}: shape {tuple(t.shape)}, expected [rows, {channels}] with 1 row, or rows that divide x's {tokens} tokens"
            + (f" and are a multiple of its batch {batch}" if batch > 1 else "")
        )


def slab_mask(name: str, t, channels: int) -> None:
    """``t`` [slabs] scales slabs of equally many channels."""
    if t is not None and (t.dim() != 1 or channels % t.shape[0]):
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected [slabs] with slabs that divide {channels} channels")


def norm_and_eps(norm, eps) -> bool:
    """Whether there is a norm; ValueError for an unknown one, and for an ``eps`` that is no finite number >= 0."""
    if norm not in (None, "rms"):
        raise ValueError(f'norm: {norm!r}, expected None or "rms"')
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: {eps!r}, expected a finite number >= 0")
    return norm == "rms"


def positive(name: str, value) -> int:
    """``value`` if it is an integer (or a symbolic size) of at least 1; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"{name}: {value!r}, expected an integer >= 1")
    return value


def residual(t, x: torch.Tensor, channels: int | None) -> None:
    """``t`` is the stream that the result is added to: x's leading shape; ``channels`` None for any."""
    if t is None:
        return
    if t.shape[:-1] != x.shape[:-1] or (channels is not None and t.shape[-1] != channels):
        wanted = (*x.shape[:-1], "channels" if channels is None else channels)
        raise ValueError(f"residual: shape {tuple(t.shape)}, expected ({', '.join(map(str, wanted))})")
