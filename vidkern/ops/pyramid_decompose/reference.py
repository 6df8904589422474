"""Decomposition in plain torch."""

from __future__ import annotations

from ..pyramid import filters
from ..pyramid.backends import math_dtype


def forward(x, levels, kind, pool_time, scale):
    """Levels [B, C, T, H, W], coarse to fine, in float32 or wider; differentiable."""
    return [k * part for k, part in zip(scale, filters.decompose(x.to(math_dtype(x)), levels, kind, pool_time))]


def backward(grads, kind, pool_time, scale):
    """Gradient of the volume from those of its levels."""
    return filters.decompose_adjoint([k * g.to(math_dtype(g)) for k, g in zip(scale, grads)], len(grads), kind, pool_time)
