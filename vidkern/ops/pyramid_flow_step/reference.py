"""The sampler step in plain torch."""

from __future__ import annotations

import torch

from ..pyramid import filters
from ..pyramid.backends import math_dtype


def _shape(c, dtype):
    return c.to(dtype).view(-1, 1, 1, 1, 1)


def forward(z, cond, uncond, table, active):
    """All levels after the step, in float32 or wider; differentiable."""
    result = []
    for s, part in enumerate(z):
        math = math_dtype(part)
        part = part.to(math)
        if s < active:
            v = cond[s].to(math)
            if uncond:
                u = uncond[s].to(math)
                v = u + _shape(table[:, s, 1], math) * (v - u)
            part = part + _shape(table[:, s, 0], math) * v
        result.append(part)
    return result


def merged(state, kind, pool_time, scale):
    """The volume that the levels after the step, times ``scale``, give."""
    return filters.merge([k * p for k, p in zip(scale, state)], kind, pool_time)


def merged_backward(grad, levels, kind, pool_time, scale):
    """Gradients of the levels after the step from that of the volume."""
    return [k * g for k, g in zip(scale, filters.merge_adjoint(grad.to(math_dtype(grad)), levels, kind, pool_time))]


def joined(states, inputs, shapes, active, upcoming):
    """Gradient of every level: of the state (active levels) plus of the model input (upcoming levels); either list may be None."""
    grads = []
    some = (states or inputs)[0]
    for s, shape in enumerate(shapes):
        g = torch.zeros(shape, dtype=math_dtype(some), device=some.device)
        if states is not None and s < active:
            g = g + states[s]
        if inputs is not None and s < upcoming:
            g = g + inputs[s]
        grads.append(g)
    return grads


def backward(grads, table, active, guided):
    """(dz, dcond, duncond) from the gradient of every level after the step."""
    dcond, duncond = [], []
    for s, g in enumerate(grads[:active]):
        dt, w = (_shape(table[:, s, i], g.dtype) for i in (0, 1))
        moved = dt * g
        dcond.append(w * moved if guided else moved)
        if guided:
            duncond.append((1 - w) * moved)
    return grads, dcond, duncond
