"""Ordered pairs of frames (query frame, key frame), and the text that stands for them in the op's schema."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

_EXPECTED = '"all", "upper", {"max_dt": n} with n >= 0, or [P, 2] integers'


def pairs_key(pairs, frames: int) -> str:
    """The text of ``pairs`` for a video of ``frames`` frames.

    Raises:
        ValueError: it is none of the forms, names a frame that does not exist or a pair twice, or leaves no pair.
    """
    if isinstance(pairs, str):
        if pairs not in ("all", "upper"):
            raise ValueError(f"pairs: {pairs!r}, expected {_EXPECTED}")
        if pairs == "upper" and frames < 2:
            raise ValueError(f'pairs: "upper" of {frames} frame leaves no pair, expected at least 2 frames')
        return pairs
    if isinstance(pairs, Mapping):
        dt = pairs.get("max_dt")
        if set(pairs) != {"max_dt"} or isinstance(dt, bool) or not isinstance(dt, int) or dt < 0:
            raise ValueError(f"pairs: {pairs!r}, expected {_EXPECTED}")
        return f"max_dt:{dt}"
    return _listed(pairs, frames)


def _listed(pairs, frames: int) -> str:
    what = type(pairs).__name__
    if isinstance(pairs, torch.Tensor):
        if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or pairs.dtype is torch.bool:
            raise ValueError(f"pairs: tensor of shape {tuple(pairs.shape)} and dtype {pairs.dtype}, expected [P, 2] integers")
        pairs = pairs.tolist()
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"pairs: {what}, expected {_EXPECTED}")
    if not pairs:
        raise ValueError("pairs: empty, expected at least one pair of frames")
    seen = set()
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(f) is int for f in pair)
        if not whole:
            raise ValueError(f"pairs: {pair!r} in it, expected {_EXPECTED}")
        if not all(0 <= f < frames for f in pair):
            raise ValueError(f"pairs: {tuple(pair)} in it, expected frames 0..{frames - 1}")
        if tuple(pair) in seen:
            raise ValueError(f"pairs: {tuple(pair)} twice, expected every pair once")
        seen.add(tuple(pair))
    return ",".join(f"{i}-{j}" for i, j in pairs)


@functools.lru_cache(maxsize=256)
def pairs_of(key: str, frames: int) -> tuple[tuple[int, int], ...]:
    """(query frame, key frame) of every row of the result, in order: the inverse of :func:`pairs_key`."""
    every = [(i, j) for i in range(frames) for j in range(frames)]
    if key == "all":
        return tuple(every)
    if key == "upper":
        return tuple((i, j) for i, j in every if i < j)
    if key.startswith("max_dt:"):
        reach = int(key.removeprefix("max_dt:"))
        return tuple((i, j) for i, j in every if abs(i - j) <= reach)
    return tuple((int(i), int(j)) for i, _, j in (pair.partition("-") for pair in key.split(",")))
