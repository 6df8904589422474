"""The tiled feed-forward network on the kernels of a kit (see ops/pruned/compose.py): a tile of hidden channels at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..pruned.compose import FLOAT, channels, factor_gradients, factors, flat, into, vector
from ..pruned.wants import INNER, OUTER


class _Tile(NamedTuple):
    """A tile of hidden channels: how many, where among the kept ones, and its parts of the weights. ``rows`` and ``columns`` pick from
    them, None where they are slices already."""

    size: int
    start: int
    w1: torch.Tensor
    rows: torch.Tensor | None
    w2: torch.Tensor
    columns: torch.Tensor | None

    def first(self, t):
        """The tile's part of something like w1 or b1."""
        return t if self.rows is not None else t[self.start : self.start + self.size]

    def second(self, t):
        """The tile's part of something like w2."""
        return t if self.columns is not None else t[:, self.start : self.start + self.size]


def _tiles(w1, w2, keep, slab: int, tile: int, act: str) -> Iterator[_Tile]:
    kept = channels(keep, slab)
    hidden = w2.shape[1] if kept is None else kept.shape[0]
    for start in range(0, hidden, tile):
        size = min(tile, hidden - start)
        columns = None if kept is None else kept[start : start + size].contiguous()
        rows = columns
        if act == "swiglu":
            first = torch.arange(start, start + size, dtype=torch.int32, device=w1.device) if columns is None else columns
            rows = torch.cat([first, first + w2.shape[1]])
        part = _Tile(size, start, w1, rows, w2, columns)
        yield part._replace(w1=part.first(w1), w2=part.second(w2))


def _hidden(kit, x, prologue, t: _Tile, b1, mask, act, z, u=None) -> None:
    """Fill z [tokens, size] with the tile's masked activations, and u with what they are activations of."""
    pairs = act == "swiglu"
    order, count = kit.pair_rows(t.size, t.rows) if pairs else (t.rows, t.size)
    bias = None if b1 is None else vector(t.first(b1), t.rows)
    gate = None if mask is None else mask[:, t.start : t.start + t.size].contiguous()
    kit.product(
        kit.Source(x, prologue=prologue), kit.Source(t.w1, rows=order), z, x.shape[0], count, x.shape[1], bias=bias, gate=gate, act=act,
        half=t.size if pairs else 0, u=u,
    )


def _spread(mask, hidden: int):
    return None if mask is None else mask.float().repeat_interleave(hidden // mask.numel())[None]


def _size(w2, keep, slab):
    return w2.shape[1] if keep is None else keep.shape[0] * slab


def forward(
    kit, outputs, x, w1, b1, w2, b2, gate, mask, residual, scale, shift, keep, slab, tile, act, norm, eps, wants, impl
) -> None:
    """Fill (out,): arguments as of the op."""
    x, w1, w2 = flat(x), flat(w1), flat(w2)
    m, width, hidden = x.shape[0], w2.shape[0], _size(w2, keep, slab)
    prologue = kit.Prologue.of(x, scale, shift, None, norm, eps)
    spread = _spread(mask, hidden)
    target, own = into(outputs[0])
    z = x.new_empty(m, min(tile, hidden))
    acc = x.new_empty(m, width, dtype=FLOAT) if tile < hidden else None
    for t in _tiles(w1, w2, keep, slab, tile, act):
        part = z[:, : t.size]
        _hidden(kit, x, prologue, t, b1, spread, act, part)
        partial = acc if t.start else None
        second = kit.Source(t.w2, cols=t.columns)
        if t.start + t.size < hidden:
            kit.product(kit.Source(part), second, acc, m, width, t.size, partial=partial)
            continue
        kit.product(
            kit.Source(part), second, target, m, width, t.size, partial=partial, bias=vector(b2), gate=factors(gate, None, width),
            residual=None if residual is None else flat(residual),
        )
    if not own:
        outputs[0].copy_(target.view(outputs[0].shape))


def backward(
    kit, outputs, dout, x, w1, b1, w2, b2, gate, mask, scale, shift, keep, slab, tile, act, norm, eps, wants, impl
) -> None:
    """Fill the gradients: arguments as of the backward op. Holds a few tiles of hidden channels and sums as large as x."""
    dx, dw1, db1, dw2, db2, dgate, dmask, dscale, dshift = outputs
    dout, x, w1, w2 = flat(dout), flat(x), flat(w1), flat(w2)
    m, channels_in, width, hidden = x.shape[0], x.shape[1], w2.shape[0], _size(w2, keep, slab)
    inner, outer, pairs = wants & INNER, wants & OUTER, 2 if act == "swiglu" else 1
    factor = factors(gate, None, width)
    dy = dout if factor is None and dout.dtype is x.dtype else x.new_empty(m, width)
    sums2 = x.new_zeros(width, dtype=FLOAT) if outer and b2 is not None else None
    if dy is not dout or sums2 is not None:
        kit.slope(dout, None, None, factor, "none", width, None if dy is dout else dy, sums2, None)
    if sums2 is not None:
        db2.copy_(sums2)
    if outer and keep is not None:
        for t in (dw1, dw2, db1):
            if t.dim() and t.numel():
                t.zero_()
    prologue = kit.Prologue.of(x, scale, shift, None, norm, eps)
    spread = _spread(mask, hidden)
    mask_sums = None if mask is None else x.new_zeros(hidden, dtype=FLOAT)
    y = x.new_empty(m, width, dtype=FLOAT) if gate is not None else None
    acc = x.new_empty(m, channels_in, dtype=FLOAT) if inner and tile < hidden else None
    modulated = prologue is not kit.Prologue.NONE
    dh = None if not inner else x.new_empty(m, channels_in) if modulated else dx.view(m, -1)
    for t in _tiles(w1, w2, keep, slab, tile, act):
        n = t.size * pairs
        u, du, z, dz = x.new_empty(m, n), x.new_empty(m, n), x.new_empty(m, t.size), x.new_empty(m, t.size)
        _hidden(kit, x, prologue, t, b1, spread, act, z, u)
        if y is not None:
            kit.product(kit.Source(z), kit.Source(t.w2, cols=t.columns), y, m, width, t.size, partial=y if t.start else None)
        if outer:
            kit.product(
                kit.Source(dy, across=True), kit.Source(z, across=True), t.second(dw2), width, t.size, m, out_cols=t.columns,
            )  # fmt: skip
        kit.product(kit.Source(dy), kit.Source(t.w2, across=True, cols=t.columns), dz, m, t.size, width)
        sums1 = x.new_zeros(n, dtype=FLOAT) if outer and b1 is not None else None
        part = None if spread is None else spread[:, t.start : t.start + t.size].contiguous()
        slabs = None if spread is None else x.new_zeros(1, t.size, dtype=FLOAT)
        kit.slope(dz, u, None, part, act, n, du, sums1, slabs)
        if slabs is not None:
            mask_sums[t.start : t.start + t.size] = slabs[0]
        if sums1 is not None:
            if t.rows is None:
                t.first(db1).copy_(sums1)
            else:
                db1.index_copy_(0, t.rows.long(), sums1.to(db1.dtype))
        if outer:
            kit.product(kit.Source(du, across=True), kit.Source(x, across=True, prologue=prologue), t.first(dw1), n, channels_in, m, out_rows=t.rows)
        if inner:
            last = t.start + t.size == hidden
            partial = acc if t.start else None
            kit.product(kit.Source(du), kit.Source(t.w1, across=True, rows=t.rows), dh if last else acc, m, channels_in, n, partial=partial)
    if mask is not None:
        dmask.copy_(mask_sums.view(mask.numel(), -1).sum(1))
    if gate is not None:
        sums = torch.zeros_like(factor)
        y = y if b2 is None else y.add_(b2.float())
        kit.slope(dout, y.to(x.dtype), None, factor, "none", width, None, None, sums)
        factor_gradients(sums, gate, None, dgate, None)
    if inner and modulated:
        given = (dscale if scale is not None else None, dshift if shift is not None else None)
        kit.normed_backward(dh, x, None, prologue, dx.view(m, -1), *given)
