"""Merging in plain torch."""

from __future__ import annotations

from ..pyramid import filters
from ..pyramid.backends import math_dtype


def forward(parts, kind, pool_time, scale):
    """The volume [B, C, T, H, W] in float32 or wider; differentiable."""
    return filters.merge([k * p.to(math_dtype(p)) for k, p in zip(scale, parts)], kind, pool_time)


def backward(grad, levels, kind, pool_time, scale):
    """Gradients of the levels from that of the volume."""
    return [k * g for k, g in zip(scale, filters.merge_adjoint(grad.to(math_dtype(grad)), levels, kind, pool_time))]
