"""The loss in plain torch."""

from __future__ import annotations

import torch

from ..pyramid.backends import math_dtype


def _alive(mask, level, active, part):
    """Which samples of a level take part, [B, 1, 1, 1, 1]."""
    if level >= active:
        return torch.zeros(part.shape[0], 1, 1, 1, 1, dtype=torch.bool, device=part.device)
    if mask is None:
        return torch.ones(part.shape[0], 1, 1, 1, 1, dtype=torch.bool, device=part.device)
    return mask[:, level].view(-1, 1, 1, 1, 1)


def _differences(pred, target, mask, active):
    for s, (p, t) in enumerate(zip(pred, target)):
        math = math_dtype(p)
        # Chosen, not multiplied: what is masked may hold NaN.
        yield torch.where(_alive(mask, s, active, p), p.to(math) - t.to(math), torch.zeros((), dtype=math, device=p.device))


def means(pred, target, mask, active):
    """Mean of the squared difference of every sample and level, [B, S]; differentiable in pred."""
    return torch.stack([d.square().flatten(1).mean(1) for d in _differences(pred, target, mask, active)], 1)


def backward(weights, pred, target, mask, active):
    """Gradients of ``pred``: weights [B, S, 1] times the difference."""
    weights = weights.unbind(1)
    return [w.view(-1, 1, 1, 1, 1) * d for w, d in zip(weights, _differences(pred, target, mask, active))]
