"""Which gradients a call has to be ready for, and the one that needs no work: a residual's is that of the result itself."""

from __future__ import annotations

import threading

import torch

# Bits of "wants": gradients of x (and scale, shift); of weights and biases; of gate or mask; of the residual.
INNER, OUTER, OTHERS, RESIDUAL = 1, 2, 4, 8


def wanted(inner, outer, others, residual) -> int:
    """Which gradients a call has to be ready for."""
    if not torch.is_grad_enabled():
        return 0
    sets = ((INNER, inner), (OUTER, outer), (OTHERS, others), (RESIDUAL, (residual,)))
    return sum(bit for bit, tensors in sets if any(t is not None and t.requires_grad for t in tensors))


class Through:
    """Carries the output's gradient from ``call`` to ``scatter`` of a :class:`vidkern.registry.Gradient`.

    A backward op may not return one of its inputs, and a copy of the whole stream would cost more than the layer's own epilogue.
    Autograd calls the two one after the other on one thread.
    """

    def __init__(self):
        self._local = threading.local()

    def keep(self, grad):
        self._local.grad = grad
        return grad

    def take(self):
        grad, self._local.grad = self._local.grad, None
        return grad
