"""Which gradients a call has to be ready for."""

from __future__ import annotations

import torch

# Bits of "wants": gradients of x (and scale, shift); of weights and biases; of gate or mask; of the residual.
INNER, OUTER, OTHERS, RESIDUAL = 1, 2, 4, 8


def wanted(inner, outer, others, residual) -> int:
    """Which gradients a call has to be ready for."""
    if not torch.is_grad_enabled():
        return 0
    sets = ((INNER, inner), (OUTER, outer), (OTHERS, others), (RESIDUAL, (residual,)))
    return sum(bit for bit, tensors in sets if any(t is not None and t.requires_grad for t in tensors))
