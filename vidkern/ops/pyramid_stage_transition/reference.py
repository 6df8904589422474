"""The transition in plain torch."""

from __future__ import annotations

import math

from ..pyramid import filters, levels, philox
from ..pyramid.backends import math_dtype


def forward(z, noise, table, *, sizes, level, seed, offset, first_sample):
    """The state at the new resolution, in float32 or wider; differentiable in z."""
    dtype = math_dtype(z)
    if noise is None:
        noise = philox.normal(
            levels.shapes(sizes)[1], seed=seed, level=level, offset=offset, first_sample=first_sample, dtype=dtype, device=z.device
        )
    g = noise.to(dtype)
    centred = g - filters.up(filters.down(g, "haar", False), "haar", False)
    scale, spread = (table[:, i].to(dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
    return scale * filters.up(z.to(dtype), "haar", False) + spread * math.sqrt(4 / 3) * centred


def backward(grad, table):
    """Gradient of the coarse state."""
    dtype = math_dtype(grad)
    return table[:, 0].to(dtype).view(-1, 1, 1, 1, 1) * filters.up_adjoint(grad.to(dtype), "haar", False)
