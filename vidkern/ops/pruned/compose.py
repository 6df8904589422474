"""The pruned ops as compositions of one product and the passes around it, whoever computes them.

A *kit* is a module with ``Source``, ``Prologue``, ``product``, ``slope``, ``normed_backward`` and ``pair_rows``: cpu.py, cuda.py and triton.py.
"""

from __future__ import annotations

import torch

from .wants import INNER, OUTER

FLOAT = torch.float32


def flat(t: torch.Tensor) -> torch.Tensor:
    """[..., C] as [tokens, C] with a last stride of 1: a view wherever tokens lie at one distance."""
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def channels(slabs, slab: int):
    """The channels of a list of slabs, int32; None for None."""
    if slabs is None:
        return None
    return (slabs[:, None] * slab + torch.arange(slab, dtype=torch.int32, device=slabs.device)).flatten()


def factors(gate, mask, written: int):
    """gate * mask as float32 [groups, written]; None where there is neither."""
    if gate is not None:
        gate = gate.reshape(-1, written).float()
    if mask is not None:
        spread = mask.float().repeat_interleave(written // mask.numel())[None]
        gate = spread if gate is None else gate * spread
    return None if gate is None else gate.contiguous()


def factor_gradients(sums, gate, mask, dgate, dmask) -> None:
    """From ``sums`` [groups, written], the gradient of :func:`factors`."""
    written = sums.shape[1]
    if gate is not None:
        part = sums if mask is None else sums * mask.float().repeat_interleave(written // mask.numel())
        dgate.copy_(part.view(dgate.shape))
    if mask is not None:
        part = sums if gate is None else sums * gate.reshape(-1, written).float()
        dmask.copy_(part.sum(0).view(mask.numel(), -1).sum(1))


def vector(t, rows=None):
    """A bias as the kernels take it."""
    if t is None:
        return None
    return (t if rows is None else t.index_select(0, rows)).float().contiguous()


def into(out: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """[..., C] as [tokens, C] that a kernel may write, and whether that is ``out``'s own memory."""
    try:
        view = out.view(-1, out.shape[-1])
    except RuntimeError:
        return torch.empty(out.shape, dtype=out.dtype, device=out.device).view(-1, out.shape[-1]), False
    return view, True


def linear(
    kit, x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, *, slab, act, norm, eps, out, u
) -> None:
    """Fill ``out`` [..., C] and, if it has dimensions, ``u`` [..., N]: arguments as of the op pruned_linear."""
    x, weight = flat(x), flat(weight)
    rows, columns = channels(rows, slab), channels(columns, slab)
    n = weight.shape[0] if rows is None else rows.shape[0]
    m, k = x.shape[0], weight.shape[1] if columns is None else columns.shape[0]
    half, order, count = 0, rows, n
    if act == "swiglu":
        half = n // 2
        order, count = kit.pair_rows(half, rows)
    target, own = into(out)
    stream = None if residual is None else flat(residual)
    fill = 0
    if out_index is not None:
        in_place = stream is not None and stream.data_ptr() == target.data_ptr() and stream.stride() == target.stride()
        fill = 0 if in_place else 2 if stream is None else 1
    kit.product(
        kit.Source(x, cols=in_index, prologue=kit.Prologue.of(x, scale, shift, in_index, norm, eps)), kit.Source(weight, rows=order, cols=columns), target,
        m, count, k, bias=vector(bias, rows), gate=factors(gate, mask, half or n), act=act, half=half,
        u=None if u is None or u.dim() < 2 else u.view(m, n), residual=stream, out_cols=out_index, fill=fill,
    )  # fmt: skip
    if not own:
        out.copy_(target.view(out.shape))


def linear_backward(
    kit, dout, x, weight, bias, gate, mask, scale, shift, in_index, out_index, rows, columns, u, *, slab, act, norm, eps, wants, needs_u, grads
) -> None:
    """Fill ``grads`` (dx, dweight, dbias, dgate, dmask, dscale, dshift): arguments as of the op pruned_linear_backward."""
    dx, dweight, dbias, dgate, dmask, dscale, dshift = grads
    dtype = x.dtype
    dout, x, weight = flat(dout), flat(x), flat(weight)
    m = x.shape[0]
    if needs_u and u is None:
        n = weight.shape[0] if rows is None else rows.shape[0] * slab
        u = x.new_empty(m, n)
        linear(kit, x, weight, bias, None, None, None, scale, shift, in_index, None, rows, columns, slab=slab, act="none", norm=norm, eps=eps, out=u, u=None)
    rows, columns = channels(rows, slab), channels(columns, slab)
    n = weight.shape[0] if rows is None else rows.shape[0]
    k = weight.shape[1] if columns is None else columns.shape[0]
    u = None if u is None else u.view(m, n)
    factor = factors(gate, mask, n // 2 if act == "swiglu" else n)
    same = not needs_u and out_index is None and dout.dtype is dtype
    sums = x.new_zeros(n, dtype=FLOAT) if bias is not None and wants & OUTER else None
    factor_sums = None if factor is None else torch.zeros_like(factor)
    du = dout if same else x.new_empty(m, n)
    if not same or sums is not None:
        kit.slope(dout, u, out_index, factor, act, n, None if same else du, sums, factor_sums)
    if sums is not None:
        if rows is None:
            dbias.copy_(sums)
        else:
            dbias.zero_().index_copy_(0, rows.long(), sums.to(dbias.dtype))
    if factor is not None:
        factor_gradients(factor_sums, gate, mask, dgate, dmask)
    prologue = kit.Prologue.of(x, scale, shift, in_index, norm, eps) if wants & (INNER | OUTER) else kit.Prologue.NONE
    if wants & OUTER:
        if rows is not None or columns is not None:
            dweight.zero_()
        kit.product(
            kit.Source(du, across=True), kit.Source(x, across=True, cols=in_index, prologue=prologue), dweight, n, k, m, out_rows=rows, out_cols=columns
        )
    if wants & INNER:
        modulated = prologue is not kit.Prologue.NONE
        dx = dx.view(m, -1)
        dh = x.new_empty(m, k) if modulated else dx
        scatter = {} if modulated or in_index is None else {"out_cols": in_index, "fill": 2}
        kit.product(kit.Source(du), kit.Source(weight, across=True, rows=rows, cols=columns), dh, m, k, n, **scatter)
        if modulated:
            given = (dscale if scale is not None else None, dshift if shift is not None else None)
            kit.normed_backward(dh, x, in_index, prologue, dx, *given)
