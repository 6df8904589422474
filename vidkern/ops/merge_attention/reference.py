"""Merging partial attention results in plain torch."""

from __future__ import annotations

import torch


def _weights(lses, signs):
    """Signed weights of the parts, summing to one, and the merged lse; empty rows have weight 0 and lse -inf."""
    stack = torch.stack(list(lses))
    top = stack.amax(0)
    safe = top.masked_fill(torch.isneginf(top), 0)
    sign = torch.tensor(signs, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    w = sign * (stack - safe).exp()
    z = w.sum(0)
    # Signed weights may cancel: a row with nothing left sees nothing.
    empty = z <= 0
    lse = (safe + z.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
    return (w / z.masked_fill(empty, 1)).masked_fill(empty, 0), lse


def _clean(outs, w, math):
    """Parts in the working precision, with zeros where a part has no weight (its memory may hold anything)."""
    return [o.to(math).masked_fill((wi == 0)[..., None], 0) for o, wi in zip(outs, w)]


def forward(outs, lses, *, signs):
    """Merged output [B, H, L, D] in the parts' dtype and lse [B, H, L]; differentiable."""
    math = torch.promote_types(outs[0].dtype, torch.float32)
    w, lse = _weights(lses, signs)
    merged = sum(wi[..., None] * o for wi, o in zip(w, _clean(outs, w, math)))
    return merged.to(outs[0].dtype), lse


def backward(dout, dlse, outs, lses, *, signs):
    """Gradients of every part's output and lse; ``dout`` or ``dlse`` may be None."""
    math = torch.promote_types(outs[0].dtype, torch.float32)
    w, _ = _weights(lses, signs)
    go = torch.zeros_like(outs[0], dtype=math) if dout is None else dout.to(math)
    inner = torch.stack([(go * o).sum(-1) for o in _clean(outs, w, math)])
    slope = inner - (w * inner).sum(0)
    if dlse is not None:
        slope = slope + dlse
    douts = [(wi[..., None] * go).masked_fill((wi == 0)[..., None], 0).to(outs[0].dtype) for wi in w]
    return douts, list((w * slope).masked_fill(w == 0, 0))
