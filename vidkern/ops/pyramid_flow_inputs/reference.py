"""Noisy levels and targets in plain torch."""

from __future__ import annotations

import torch

from ..pyramid import filters, levels, philox
from ..pyramid.backends import math_dtype


def _spread(table, level):
    """(alpha, sigma, d_alpha, d_sigma) of one level, each [B, 1, 1, 1, 1]."""
    return table[:, level].unbind(-1)


def _shape(c, dtype):
    return c.to(dtype).view(-1, 1, 1, 1, 1)


def _select(mask, level, value):
    """Zeros where the sample's level is masked, whatever the value holds there."""
    return value if mask is None else torch.where(mask[:, level].view(-1, 1, 1, 1, 1), value, torch.zeros_like(value))


def forward(x, table, mask, noise, *, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, written):
    """(z, v): lists of the first ``written`` levels in float32 or wider; differentiable in x."""
    math = math_dtype(x[0])
    x = [t.to(math) for t in x]
    shapes = levels.shapes(sizes)
    parts = x if given else filters.decompose(x[0], len(shapes), kind, pool_time)
    zs, vs = [], []
    for s in range(written):
        if s >= active:
            zs.append(x[0].new_zeros(shapes[s]))
            vs.append(zs[-1])
            continue
        if noise:
            eps = noise[s].to(math)
        else:
            eps = philox.normal(
                shapes[s], seed=seed, level=s, offset=offset, first_sample=first_sample, dtype=math, device=x[0].device
            )
        alpha, sigma, d_alpha, d_sigma = (_shape(c, math) for c in _spread(table, s))
        part = scale[s] * parts[s]
        zs.append(_select(mask, s, alpha * part + sigma * eps))
        vs.append(_select(mask, s, d_alpha * part + d_sigma * eps))
    return zs, vs


def backward(dz, dv, table, mask, *, sizes, given, active, kind, pool_time, scale):
    """Gradients of what x holds (one volume, or the levels given) from lists of the levels' gradients, either None."""
    grads = []
    for s, shape in enumerate(levels.shapes(sizes)):
        total = None
        for parts, column in ((dz, 0), (dv, 2)):
            if parts is not None and s < active:
                math = math_dtype(parts[s])
                g = _select(mask, s, scale[s] * _shape(table[:, s, column], math) * parts[s].to(math))
                total = g if total is None else total + g
        if total is None:
            total = next(p for p in (dz, dv) if p is not None)[0].new_zeros(shape)
        grads.append(total)
    return grads if given else [filters.decompose_adjoint(grads, len(grads), kind, pool_time)]
