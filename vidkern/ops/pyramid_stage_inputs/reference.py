"""Stage inputs in plain torch."""

from __future__ import annotations

from ..pyramid import filters, levels, philox
from ..pyramid.backends import math_dtype


def _shape(c, dtype):
    return c.to(dtype).view(-1, 1, 1, 1, 1)


def _halved(x, times, gain=1.0):
    """The finest and every halving of it, coarse to fine."""
    result = [x]
    for _ in range(times):
        result.insert(0, filters.down(result[0], "haar", False, gain))
    return result


def forward(x, noise, table, *, sizes, stage, seed, offset, first_sample):
    """(z, v) in float32 or wider; differentiable in x."""
    math = math_dtype(x)
    top = levels.level_count(sizes) - 1
    if noise is None:
        noise = philox.normal(
            levels.shapes(sizes)[-1], seed=seed, level=top, offset=offset, first_sample=first_sample, dtype=math, device=x.device
        )
    clean = _halved(x.to(math), top - max(stage - 1, 0))
    eps = _halved(noise.to(math), top - stage, gain=2.0)[0]
    s, e, r = (_shape(table[:, i], math) for i in range(3))
    start = s * eps
    if stage:
        start = start + (1 - s) * filters.up(clean[0], "haar", False)
    end = e * eps + (1 - e) * clean[1 if stage else 0]
    return r * start + (1 - r) * end, start - end


def backward(dz, dv, table, *, sizes, stage):
    """Gradient of x; dz or dv may be None."""
    math = math_dtype(dz if dz is not None else dv)
    s, e, r = (_shape(table[:, i], math) for i in range(3))
    top = levels.level_count(sizes) - 1
    to_start = to_end = 0
    if dz is not None:
        to_start, to_end = r * dz.to(math), (1 - r) * dz.to(math)
    if dv is not None:
        to_start, to_end = to_start + dv.to(math), to_end - dv.to(math)
    grad = (1 - e) * to_end
    if stage:
        grad = grad + filters.down_adjoint(filters.up_adjoint((1 - s) * to_start, "haar", False), "haar", False)
    for _ in range(top - stage):
        grad = filters.down_adjoint(grad, "haar", False)
    return grad
