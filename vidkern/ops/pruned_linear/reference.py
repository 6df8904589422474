"""The pruned linear layer in plain torch: gather, matrix product, activation, gate, scatter."""

from __future__ import annotations

import torch

from ..pruned import activations


def spread(t: torch.Tensor, x: torch.Tensor, math: torch.dtype) -> torch.Tensor:
    """[rows, C] as one row for every token of x: [..., C]."""
    t = t.to(math).reshape(-1, t.shape[-1])
    tokens = x.numel() // x.shape[-1]
    return t.repeat_interleave(tokens // t.shape[0], 0).view(*x.shape[:-1], t.shape[-1])


def gather(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum the token rows of ``t`` [..., C] over the runs that share a row of ``like``: like's shape and dtype."""
    rows = like.numel() // like.shape[-1]
    return t.reshape(rows, -1, t.shape[-1]).sum(1).reshape(like.shape).to(like.dtype)


def channels(slabs: torch.Tensor, slab: int) -> torch.Tensor:
    """The channels of a list of slabs."""
    return (slabs.long()[:, None] * slab + torch.arange(slab, device=slabs.device)).flatten()


def chosen(weight, bias, rows, columns, slab):
    """The rows and columns of an un-repacked weight that a candidate keeps."""
    if rows is not None:
        weight = weight.index_select(0, channels(rows, slab))
        bias = None if bias is None else bias.index_select(0, channels(rows, slab))
    if columns is not None:
        weight = weight.index_select(1, channels(columns, slab))
    return weight.contiguous(), bias


def normed(x, scale, shift, norm, eps):
    """P(x): RMSNorm over all channels of x, then scale and shift, in x's dtype."""
    if norm:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        x = x * (1 + spread(scale, x, x.dtype))
    return x if shift is None else x + spread(shift, x, x.dtype)


def normed_backward(dh, x, scale, shift, norm, eps):
    """Gradients of x, scale, shift from the gradient ``dh`` of :func:`normed`'s result over all of x's channels."""
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) if norm else 1.0
    dscale, dshift = None, None if shift is None else gather(dh, shift)
    if scale is not None:
        dscale = gather(dh * (x * r), scale)
        dh = dh * (1 + spread(scale, dh, x.dtype))
    if norm:
        dh = r * (dh - x * (r * r) * (dh * x).mean(-1, keepdim=True))
    return dh, dscale, dshift


def pre_activation(x, weight, bias, scale, shift, in_index, rows, columns, *, slab, norm, eps):
    """U = P(x)[:, I] W^T + b in at least float32."""
    math = torch.promote_types(x.dtype, torch.float32)
    x = x.contiguous()
    h = normed(x.to(math), scale, shift, norm, eps)
    if in_index is not None:
        h = h.index_select(-1, in_index)
    weight, bias = chosen(weight, bias, rows, columns, slab)
    u = h @ weight.to(math).t()
    return u if bias is None else u + bias.to(math)


def needs_u(act, gate, mask) -> bool:
    """Whether the backward reads the pre-activation."""
    return act != "none" or gate is not None or mask is not None


def forward(
    x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, *, slab, act, norm, eps, out_features
):
    """(out, u): the layer's result and its pre-activation, both in at least float32; differentiable."""
    u = pre_activation(x, weight, bias, scale, shift, in_index, rows, columns, slab=slab, norm=norm, eps=eps)
    z = activations.forward(u, act)
    if mask is not None:
        z = z * mask.to(u.dtype).repeat_interleave(z.shape[-1] // mask.numel())
    if gate is not None:
        z = z * spread(gate, z, u.dtype)
    if out_index is not None:
        base = u.new_zeros((*x.shape[:-1], out_features)) if residual is None else residual.to(u.dtype)
        return base.index_add(-1, out_index, z), u
    return (z if residual is None else residual.to(u.dtype) + z), u


def backward(
    dout, x, weight, bias, gate, mask, scale, shift, in_index, out_index, rows, columns, u, *, slab, act, norm, eps, inner, outer
):
    """Gradients of x, weight, bias, gate, mask, scale, shift (None where there is nothing to differentiate); the residual's is dout.

    ``inner``: x, scale and shift are wanted; ``outer``: weight and bias are. ``u`` may be None: it is computed again.
    """
    math = torch.promote_types(x.dtype, torch.float32)
    x, dout = x.contiguous(), dout.to(math).contiguous()
    if out_index is not None:
        dout = dout.index_select(-1, out_index)
    dz, dgate, dmask = dout, None, None
    if not needs_u(act, gate, mask):
        u = dout
    elif u is None:
        u = pre_activation(x, weight, bias, scale, shift, in_index, rows, columns, slab=slab, norm=norm, eps=eps)
    u = u.to(math)
    if gate is not None or mask is not None:
        z = activations.forward(u, act)
        m = None if mask is None else mask.to(math).repeat_interleave(z.shape[-1] // mask.numel())
        if gate is not None:
            dgate = gather(dout * z if m is None else dout * z * m, gate)
            dz = dout * spread(gate, dout, math)
        if mask is not None:
            dmask = (dz * z).flatten(0, -2).sum(0).view(mask.numel(), -1).sum(1).to(mask.dtype)
            dz = dz * m
    du = activations.backward(dz, u, act)
    du2 = du.flatten(0, -2)
    w, _ = chosen(weight, None, rows, columns, slab)
    h = normed(x.to(math), scale, shift, norm, eps)
    dweight = dbias = dx = dscale = dshift = None
    if outer:
        a = h if in_index is None else h.index_select(-1, in_index)
        full = du2.t() @ a.flatten(0, -2)
        if columns is not None:
            full = full.new_zeros(full.shape[0], weight.shape[1]).index_copy(1, channels(columns, slab), full)
        if rows is not None:
            full = full.new_zeros(weight.shape).index_copy(0, channels(rows, slab), full)
        dweight = full.to(weight.dtype)
        if bias is not None:
            dbias = du2.sum(0)
            if rows is not None:
                dbias = dbias.new_zeros(bias.shape).index_copy(0, channels(rows, slab), dbias)
            dbias = dbias.to(bias.dtype)
    if inner:
        dh = du @ w.to(math)
        if in_index is not None:
            dh = torch.zeros_like(h).index_copy(-1, in_index.long(), dh)
        dx, dscale, dshift = normed_backward(dh, x.to(math), scale, shift, norm, eps)
        dx = dx.to(x.dtype)
    return dx, dweight, dbias, dgate, dmask, dscale, dshift
