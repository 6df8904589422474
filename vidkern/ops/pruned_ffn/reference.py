"""The tiled feed-forward network in plain torch: ``acc = b2; for j in tiles: acc += W2[:, j] act(W1[j] P(x) + b1[j])``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..pruned import activations
from ..pruned_linear.reference import channels, gather, normed, normed_backward, spread


def tiles(w2, keep, slab: int, tile: int) -> Iterator[tuple[slice, torch.Tensor | slice]]:
    """(kept hidden channels, the same in the weights) of every tile."""
    kept = None if keep is None else channels(keep, slab)
    size = w2.shape[1] if kept is None else kept.shape[0]
    for start in range(0, size, tile):
        part = slice(start, min(start + tile, size))
        yield part, part if kept is None else kept[part]


def rows(w1, part, act):
    """Rows of the first weight (or bias) that make hidden channels ``part``: for pairs, the gates' and the values'."""
    if act != "swiglu":
        return w1[part]
    first, second = w1.chunk(2)
    return torch.cat([first[part], second[part]])


def _masked(mask, part, size, math):
    return None if mask is None else mask.to(math).repeat_interleave(size // mask.numel())[part]


def _size(w2, keep, slab):
    return w2.shape[1] if keep is None else keep.shape[0] * slab


def forward(x, w1, b1, w2, b2, gate, mask, residual, scale, shift, keep, *, slab, tile, act, norm, eps):
    """The result in at least float32; differentiable."""
    math = torch.promote_types(x.dtype, torch.float32)
    h = normed(x.to(math), scale, shift, norm, eps)
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    acc = h.new_zeros((*x.shape[:-1], w2.shape[0])) if b2 is None else b2.to(math).expand(*x.shape[:-1], -1)
    for part, at in tiles(w2, keep, slab, tile):
        u = h @ rows(w1, at, act).to(math).t()
        z = activations.forward(u if b1 is None else u + rows(b1, at, act).to(math), act)
        m = _masked(mask, part, _size(w2, keep, slab), math)
        acc = acc + (z if m is None else z * m) @ w2[:, at].to(math).t()
    if gate is not None:
        acc = acc * spread(gate, acc, math)
    return acc if residual is None else residual.to(math) + acc


def backward(dout, x, w1, b1, w2, b2, gate, mask, scale, shift, keep, *, slab, tile, act, norm, eps, inner, outer):
    """Gradients of x, w1, b1, w2, b2, gate, mask, scale, shift (None where there is nothing to differentiate); the residual's is dout.

    Every tile is computed again; ``inner`` and ``outer`` as in pruned_linear.
    """
    math = torch.promote_types(x.dtype, torch.float32)
    dout = dout.to(math).contiguous()
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    h = normed(x.to(math), scale, shift, norm, eps)
    dgate = dmask = dx = dscale = dshift = None
    if gate is not None:
        out = forward(x, w1, b1, w2, b2, None, mask, None, scale, shift, keep, slab=slab, tile=tile, act=act, norm=norm, eps=eps)
        dgate = gather(dout * out, gate)
        dout = dout * spread(gate, dout, math)
    dout2, h2 = dout.flatten(0, -2), h.flatten(0, -2)
    dh = torch.zeros_like(h2)
    dw1, dw2 = torch.zeros_like(w1, dtype=math), torch.zeros_like(w2, dtype=math)
    db1 = None if b1 is None else torch.zeros_like(b1, dtype=math)
    slabs = []
    for part, at in tiles(w2, keep, slab, tile):
        first = rows(w1, at, act).to(math)
        u = h2 @ first.t()
        u = u if b1 is None else u + rows(b1, at, act).to(math)
        z = activations.forward(u, act)
        m = _masked(mask, part, _size(w2, keep, slab), math)
        dz = dout2 @ w2[:, at].to(math)
        if outer:
            dw2[:, at] = dout2.t() @ (z if m is None else z * m)
        if m is not None:
            slabs.append((dz * z).sum(0))
            dz = dz * m
        du = activations.backward(dz, u, act)
        if outer:
            halves = 2 if act == "swiglu" else 1
            for half, grad in zip(dw1.chunk(halves), (du.t() @ h2).chunk(halves)):
                half[at] = grad
            if b1 is not None:
                for half, grad in zip(db1.chunk(halves), du.sum(0).chunk(halves)):
                    half[at] = grad
        dh += du @ first
    if mask is not None:
        dmask = torch.cat(slabs).view(mask.numel(), -1).sum(1).to(mask.dtype)
    if inner:
        dx, dscale, dshift = normed_backward(dh.view(h.shape), x.to(math), scale, shift, norm, eps)
        dx = dx.to(x.dtype)
    if not outer:
        return dx, None, None, None, None, dgate, dmask, dscale, dshift
    db1 = None if b1 is None else db1.to(b1.dtype)
    db2 = None if b2 is None else dout2.sum(0).to(b2.dtype)
    return dx, dw1.to(w1.dtype), db1, dw2.to(w2.dtype), db2, dgate, dmask, dscale, dshift
