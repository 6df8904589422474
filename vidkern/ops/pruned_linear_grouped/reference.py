"""A group of pruned layers in plain torch: one after the other."""

from __future__ import annotations

import torch

from ..pruned import activations


def forward(xs, weights, biases, act):
    """[(result, pre-activation)] of every layer, in at least float32; differentiable."""
    found = []
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        math = torch.promote_types(x.dtype, torch.float32)
        u = x.contiguous().to(math) @ weight.contiguous().to(math).t()
        u = u + biases[i].to(math) if biases else u
        found.append((activations.forward(u, act), u))
    return found


def backward(douts, xs, weights, biases, us, act):
    """[(dx, dweight, dbias or None)] of every layer; ``us`` None where the activation is none."""
    found = []
    for i, (dout, x, weight) in enumerate(zip(douts, xs, weights, strict=True)):
        math = torch.promote_types(x.dtype, torch.float32)
        du = dout.contiguous().to(math)
        du = du if us is None else activations.backward(du, us[i].to(math), act)
        dx, dweight = du @ weight.contiguous().to(math), du.t() @ x.contiguous().to(math)
        found.append((dx.to(x.dtype), dweight.to(weight.dtype), du.sum(0).to(biases[i].dtype) if biases else None))
    return found
