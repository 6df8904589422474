"""The activations of the pruned layers in plain torch, with their derivatives.

"swiglu" takes pairs: the first half of the channels are gates, ``silu(first) * second``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTS = ("none", "gelu_tanh", "silu", "swiglu")


def width(act: str, channels: int) -> int:
    """Channels after the activation."""
    return channels // 2 if act == "swiglu" else channels


def forward(u: torch.Tensor, act: str) -> torch.Tensor:
    """act(u): as wide as ``u``, for pairs half as wide."""
    if act == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if act == "silu":
        return F.silu(u)
    if act == "swiglu":
        gate, up = u.chunk(2, -1)
        return F.silu(gate) * up
    return u


def _silu_slope(u: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def backward(dz: torch.Tensor, u: torch.Tensor, act: str) -> torch.Tensor:
    """Gradient of ``u`` from the gradient ``dz`` of :func:`forward`'s result."""
    if act == "gelu_tanh":
        k = (2 / torch.pi) ** 0.5
        t = torch.tanh(k * (u + 0.044715 * u**3))
        return dz * (0.5 * (1 + t) + 0.5 * u * (1 - t * t) * k * (1 + 3 * 0.044715 * u * u))
    if act == "silu":
        return dz * _silu_slope(u)
    if act == "swiglu":
        gate, up = u.chunk(2, -1)
        return torch.cat([dz * up * _silu_slope(gate), dz * F.silu(gate)], -1)
    return dz
