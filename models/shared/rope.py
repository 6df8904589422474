"""Rotary position embedding over any number of axes, with float positions (RoFormer, arXiv 2104.09864, §3.2.2).

A head of width D holds D/2 complex numbers z_i = x_i + 1j x_(i + D/2). They are shared out over the axes in order; inside the
share of an axis of width d (d/2 numbers), number j is turned by ``position * theta ** (-2 j / d)``: z <- z * exp(1j * angle).
"""

import math

import torch
from torch import nn


def split_head_dim(head_dim, n_axes=3):
    """Even channel counts per axis that add up to `head_dim`: the first axis (time) gets half, the others share the rest."""
    if head_dim % 2 or head_dim < 2 * n_axes:
        raise ValueError(f"head_dim={head_dim}: expected an even number of at least {2 * n_axes} for {n_axes} axes")
    if n_axes == 1:
        return (head_dim,)
    rest = max(1, head_dim // 2 // (2 * (n_axes - 1))) * 2
    return (head_dim - rest * (n_axes - 1),) + (rest,) * (n_axes - 1)


def collapsed_time(views, times, t_max, device=None):
    """Positions [views * times] on the time axis: ``view * t_max + time`` (4Real-Video-V2, arXiv 2506.18839, "Positional embedding").

    Frames of one view keep the offsets that a video model knows; frames of one time differ by multiples of `t_max`, so a view
    step is never mistaken for a time step. That holds only while ``times <= t_max``; a longer clip raises ValueError.
    """
    if times > t_max:
        raise ValueError(f"T={times} is greater than t_max={t_max}: positions of different views would collide; raise t_max")
    view = torch.arange(views, device=device, dtype=torch.float32)
    time = torch.arange(times, device=device, dtype=torch.float32)
    return (view[:, None] * t_max + time[None, :]).flatten()


POSITIONS = ("collapsed", "sum", "time", "view")


def grid_positions(kind, views, times, t_max, device=None):
    """Positions [views * times] on the time axis of RoPE, view-major.

    kind: "collapsed" (view * t_max + time, see `collapsed_time`); "sum" (view + time: cells on one anti-diagonal share a position);
    "time" or "view" (that index alone, for attention within one view or within one time).
    """
    if kind == "collapsed":
        return collapsed_time(views, times, t_max, device)
    if kind not in POSITIONS:
        raise ValueError(f"positions={kind!r}: expected one of {POSITIONS}")
    view = torch.arange(views, device=device, dtype=torch.float32)[:, None].expand(views, times)
    time = torch.arange(times, device=device, dtype=torch.float32)[None, :].expand(views, times)
    return {"sum": view + time, "time": time, "view": view}[kind].flatten()


class RotaryEmbedding(nn.Module):
    """Makes the (cos, sin) tables [L, head_dim / 2] for positions given per axis.

    axes: channels per axis, even, their sum is head_dim. theta: base of the frequencies.
    """

    def __init__(self, axes, theta=10_000.0):
        super().__init__()
        if any(a <= 0 or a % 2 for a in axes):
            raise ValueError(f"axes={tuple(axes)}: expected positive even channel counts")
        self.axes, self.theta = tuple(axes), float(theta)

    def forward(self, positions):
        """positions: one float tensor [L] per axis. Returns fp32 (cos, sin), each [L, head_dim / 2].

        A leading batch axis on every position tensor gives tables [B, L, head_dim / 2]."""
        if len(positions) != len(self.axes):
            raise ValueError(f"positions: got {len(positions)} axes, expected {len(self.axes)}")
        angles = []
        for position, width in zip(positions, self.axes):
            rate = self.theta ** (-torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width)
            angles.append(position.double()[..., None] * rate)
        angle = torch.cat(angles, -1)
        return angle.cos().float(), angle.sin().float()

    def extra_repr(self):
        return f"axes={self.axes}, theta={self.theta:g}"


class FullWidthRope(nn.Module):
    """RoPE whose frequencies run over all heads together, as in LTX-Video: every head owns other frequencies.

    Of the width/2 complex numbers of all heads, number ``pad + n_axes * j + a`` turns with axis a at rate ``theta ** (-j / n)``, where n =
    width // (2 * n_axes); the first ``pad`` numbers, which do not divide among the axes, stay. ``forward(positions)``: one float tensor [L] per
    axis -> fp32 (cos, sin), each [L, heads, head_dim / 2]. A model that has lost heads gathers its heads' columns of this table; a table made
    anew for the smaller width is another function.

    scale: one number per axis for the rates of LTX-Video's own weights: ``pi / 2 * theta ** (j / (n - 1))``, of positions ``2 * scale * p - 1``.
    """

    def __init__(self, heads, head_dim, theta=10_000.0, n_axes=3, scale=()):
        super().__init__()
        self.heads, self.head_dim, self.theta, self.n_axes, self.scale = heads, head_dim, float(theta), n_axes, tuple(scale)
        if self.scale and len(self.scale) != n_axes:
            raise ValueError(f"scale={self.scale}: expected one number for each of {n_axes} axes")
        if heads * head_dim < 2 * n_axes:
            raise ValueError(f"heads={heads}, head_dim={head_dim}: expected at least {2 * n_axes} channels for {n_axes} axes")

    def forward(self, positions):
        if len(positions) != self.n_axes:
            raise ValueError(f"positions: got {len(positions)} axes, expected {self.n_axes}")
        half = self.heads * self.head_dim // 2
        n = half // self.n_axes
        index, where = torch.arange(n, device=positions[0].device, dtype=torch.float64), torch.stack(list(positions), -1).double()
        rate = self.theta ** (-index / n)
        if self.scale:
            rate = math.pi / 2 * self.theta ** (index / max(1, n - 1))
            where = 2 * where * where.new_tensor(self.scale) - 1
        angle = (where[:, None, :] * rate[:, None]).flatten(1)
        angle = torch.cat((angle.new_zeros(len(angle), half - angle.shape[1]), angle), 1).unflatten(1, (self.heads, -1))
        return angle.cos().float(), angle.sin().float()

    def extra_repr(self):
        return f"heads={self.heads}, head_dim={self.head_dim}, theta={self.theta:g}"


def apply_rope(x, table):
    """Turn x [B, L, H, D] by ``table = (cos, sin)`` of a `RotaryEmbedding`; computed in fp32, returned in x's dtype."""
    return _turn(x, *(part[..., None, :] for part in table))


def apply_head_rope(x, table):
    """Turn x [B, L, H, D] by the (cos, sin) [L, H, D / 2] of a `FullWidthRope`, one column of the table per head."""
    return _turn(x, *table)


def _turn(x, cos, sin):
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
