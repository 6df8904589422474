"""Launchers of the compiled CPU kernels that the pruned ops are made of: one product with everything fused into its two ends, and
three elementwise passes."""

from __future__ import annotations

import functools

import torch

from .tape import launch

ACTS = {"none": 0, "gelu_tanh": 1, "silu": 2, "swiglu": 3}
LANES = 16


class Source:
    """An operand: memory rows of ``t`` (last stride 1), picked and normalised on the way in; see PrunedSource in csrc/cpu/pruned.h."""

    def __init__(self, t, across=False, rows=None, cols=None, prologue=None):
        self.t, self.across, self.rows, self.cols = t, across, rows, cols
        self.prologue = prologue or Prologue.NONE

    def fields(self) -> tuple:
        p = self.prologue
        return (
            self.t, self.t.stride(0), self.across, self.rows, self.cols, p.stat, p.scale, p.shift, p.group, p.width,
        )  # fmt: skip


class Prologue:
    """RMSNorm and modulation as the kernels take them: 1 / rms per token, 1 + scale and shift of the picked channels, float32."""

    NONE: Prologue

    def __init__(self, stat=None, scale=None, shift=None, group=0, width=0):
        self.stat, self.scale, self.shift, self.group, self.width = stat, scale, shift, group, width

    @classmethod
    def of(cls, x, scale, shift, in_index, norm, eps) -> Prologue:
        """For x [tokens, channels]."""
        if not norm and scale is None and shift is None:
            return cls.NONE
        tokens, width = x.shape
        stat = None
        if norm:
            stat = torch.empty(tokens, dtype=torch.float32)
            launch("pruned_stat", (x.dtype is torch.bfloat16, torch.get_num_threads(), tokens, 1, width, x, x.stride(0), stat), eps)
        count = max(1 if t is None else t.numel() // width for t in (scale, shift))

        def picked(t):
            if t is None:
                return None
            t = t.reshape(-1, width).float()
            t = t.repeat_interleave(count // t.shape[0], 0) if t.shape[0] != count else t
            return (t if in_index is None else t.index_select(1, in_index)).contiguous()

        scale = picked(scale)
        return cls(stat, None if scale is None else scale + 1, picked(shift), tokens // count, width if in_index is None else in_index.shape[0])


Prologue.NONE = Prologue()


def product(
    a: Source, b: Source, out, m, n, k, *, bias=None, gate=None, act="none", half=0, u=None, partial=None, residual=None, out_rows=None,
    out_cols=None, fill=0,
) -> None:
    """out[:, out_cols] = residual + gate * act(A B^T + partial + bias).

    Args:
        out: [m, width], last stride 1, the operands' dtype or float32; u: like it, [m, n], in the operands' dtype.
        bias, gate, partial: float32; gate [groups, n] of equally many rows each.
        residual: like ``out``, whose memory it may share.
        fill: what columns outside ``out_cols`` become: 0 what they are, 1 the residual, 2 zero.
    """
    launch("pruned_gemm", (
        a.t.dtype is torch.bfloat16, torch.get_num_threads(), m, n, k, *a.t.shape, *b.t.shape, *a.fields(), *b.fields(),
        partial, 0 if partial is None else partial.stride(0), bias, gate, 0 if gate is None else m // gate.shape[0],
        ACTS[act], half, u, 0 if u is None else u.stride(0), residual, 0 if residual is None else residual.stride(0),
        out, out.stride(0), out.shape[1], out.dtype is torch.bfloat16, out_rows, out_cols, fill,
    ))  # fmt: skip


def slope(dout, u, cols, gate, act, n, du, dbias, dgate) -> None:
    """Fill ``du`` (or None) with dout[:, cols] gate act'(u), and ``dbias`` [n] with its sums over tokens and with those of dout act(u)
    ``dgate`` [groups, n], float32, or None. ``n``: columns of u."""
    m = dout.shape[0]
    like = du if du is not None else u if u is not None else dout
    launch("pruned_slope", (
        like.dtype is torch.bfloat16, dout.dtype is torch.bfloat16, torch.get_num_threads(), m, n, dout, dout.stride(0),
        u, 0 if u is None else u.stride(0), cols, dout.shape[1], gate, m if gate is None else m // gate.shape[0],
        ACTS[act], du, 0 if du is None else du.stride(0), dbias, dgate,
    ))  # fmt: skip


@functools.lru_cache(maxsize=64)
def _paired(half: int) -> torch.Tensor:
    """Rows of a weight of pairs in the order of the kernel: 16 gates, their 16 values, and so on; -1 beyond the last."""
    first = torch.arange(-(-half // LANES) * LANES, dtype=torch.int32).view(-1, LANES)
    both = torch.stack([first, first + half], 1)
    return torch.where((first < half)[:, None], both, -1).flatten()


def pair_rows(half: int, rows) -> tuple[torch.Tensor, int]:
    """Which rows of a weight of pairs make B, through a list of kept rows, and how many columns the product then has."""
    order = _paired(half)
    if rows is not None:
        order = torch.where(order >= 0, rows[order.clamp_min(0)], -1).to(torch.int32)
    return order, order.shape[0]


def normed_backward(dh, x, in_index, prologue, dx, dscale, dshift) -> None:
    """Fill dx [tokens, channels] from dh [tokens, kept], and dscale and dshift (any shape of [groups, channels], or None)."""
    m, width = x.shape
    k, p = dh.shape[1], prologue
    group = p.group or m
    shape = (m // group, k)
    sums = [None if t is None else torch.zeros(shape) for t in (dscale, dshift)]
    launch("pruned_norm_backward", (
        x.dtype is torch.bfloat16, torch.get_num_threads(), m, k, width, x, x.stride(0), p.stat, dh, dh.stride(0),
        in_index, p.scale, group, dx, dx.stride(0), sums[0], sums[1],
    ))  # fmt: skip
    for target, part in zip((dscale, dshift), sums):
        if target is not None:
            wide = target.view(-1, width)
            part = part if part.shape[0] == wide.shape[0] else part.view(wide.shape[0], -1, k).sum(1)
            wide.copy_(part if in_index is None else part.new_zeros(wide.shape).index_copy(1, in_index.long(), part))
