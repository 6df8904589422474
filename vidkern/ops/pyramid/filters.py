"""The pyramid filters in plain torch, one axis at a time in the order time, row, column; csrc/common/pyramid.h states them.

Each is linear; ``*_adjoint`` is its transpose.
"""

from __future__ import annotations

import functools
import math

import torch


def _axes(pool_time: bool) -> tuple[int, ...]:
    return (2, 3, 4) if pool_time else (3, 4)


@functools.lru_cache(maxsize=1)
def dct_up() -> tuple[tuple[float, ...], ...]:
    """[8][4]: 4 samples -> the block of 8 that has their DCT-II coefficients (times sqrt 2) and no higher ones."""

    def basis(n, k, j):
        return math.cos(math.pi * (j + 0.5) * k / n) * math.sqrt((1 if k == 0 else 2) / n)

    return tuple(
        tuple(math.sqrt(2) * sum(basis(8, k, j) * basis(4, k, i) for k in range(4)) for i in range(4)) for j in range(8)
    )


def _blocks(x, axis: int, matrix):
    """Every block of len(matrix[0]) values along ``axis`` times ``matrix``."""
    m = torch.tensor(matrix, dtype=x.dtype, device=x.device)
    x = x.movedim(axis, -1)
    x = x.reshape(*x.shape[:-1], -1, m.shape[1]) @ m.T
    return x.flatten(-2).movedim(-1, axis)


def _pairs(x, axis: int):
    return x.unflatten(axis, (-1, 2)).unbind(axis + 1)


def _repeat(x, axis: int):
    return torch.stack((x, x), axis + 1).flatten(axis, axis + 1)


def _transposed(matrix, factor=1.0):
    return tuple(tuple(factor * v for v in column) for column in zip(*matrix))


def down(x, kind: str, pool_time: bool, gain: float = 1.0):
    """[B, C, T, H, W] -> half the pooled axes: block means, or the low DCT coefficients."""
    axes = _axes(pool_time)
    for axis in axes:
        if kind == "dct":
            x = _blocks(x, axis, _transposed(dct_up(), 0.5))
        else:
            first, second = _pairs(x, axis)
            x = first + second
    return x if kind == "dct" else x * (gain / 2 ** len(axes))


def down_adjoint(g, kind: str, pool_time: bool):
    """The transpose of :func:`down`: twice the pooled axes."""
    axes = _axes(pool_time)
    for axis in axes:
        if kind == "dct":
            g = _blocks(g, axis, tuple(tuple(0.5 * v for v in row) for row in dct_up()))
        else:
            g = _repeat(g, axis)
    return g if kind == "dct" else g / 2 ** len(axes)


def _shift(x, axis: int, by: int):
    """Neighbours along ``axis``, the edge repeated."""
    n = x.shape[axis]
    index = (torch.arange(n, device=x.device) + by).clamp(0, n - 1)
    return x.index_select(axis, index)


def up(x, kind: str, pool_time: bool):
    """[B, C, T, H, W] -> twice the pooled axes."""
    for axis in _axes(pool_time):
        if kind == "dct":
            x = _blocks(x, axis, dct_up())
        elif kind == "haar":
            x = _repeat(x, axis)
        else:
            even, odd = (x + 0.25 * (_shift(x, axis, by) - x) for by in (-1, 1))
            x = torch.stack((even, odd), axis + 1).flatten(axis, axis + 1)
    return x


def up_adjoint(g, kind: str, pool_time: bool):
    """The transpose of :func:`up`: half the pooled axes."""
    for axis in _axes(pool_time):
        if kind == "dct":
            g = _blocks(g, axis, _transposed(dct_up()))
        elif kind == "haar":
            first, second = _pairs(g, axis)
            g = first + second
        else:
            first, second = _pairs(g, axis)
            before, after = _pairs(_shift(g, axis, -1), axis)[0], _pairs(_shift(g, axis, 1), axis)[1]
            g = 0.75 * (first + second) + 0.25 * (before + after)
    return g


def decompose(x, levels: int, kind: str, pool_time: bool) -> list[torch.Tensor]:
    """Residual levels, coarse to fine: X_s = G_s - up(G_{s-1}), X_1 = G_1."""
    gaussian = [x]
    for _ in range(levels - 1):
        gaussian.insert(0, down(gaussian[0], kind, pool_time))
    return [gaussian[0], *(g - up(c, kind, pool_time) for c, g in zip(gaussian, gaussian[1:]))]


def decompose_adjoint(grads, levels: int, kind: str, pool_time: bool):
    """Gradient of the volume from those of the first len(grads) levels (the others have none)."""
    total = None
    for s in range(levels):
        g = grads[s] if s < len(grads) else None
        if s + 1 < len(grads):
            g = g - up_adjoint(grads[s + 1], kind, pool_time)
        if total is not None:
            back = down_adjoint(total, kind, pool_time)
            g = back if g is None else g + back
        total = g
    return total


def merge(parts, kind: str, pool_time: bool):
    """R_1 = X_1, R_s = up(R_{s-1}) + X_s."""
    result = parts[0]
    for part in parts[1:]:
        result = up(result, kind, pool_time) + part
    return result


def merge_adjoint(grad, levels: int, kind: str, pool_time: bool) -> list[torch.Tensor]:
    """Gradients of the levels, coarse to fine, from that of the volume."""
    grads = [grad]
    for _ in range(levels - 1):
        grads.insert(0, up_adjoint(grads[0], kind, pool_time))
    return grads
