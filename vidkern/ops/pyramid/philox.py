"""Philox4x32-10 in torch's int64 arithmetic, and normals from its words: the definition is in csrc/common/philox.h."""

from __future__ import annotations

import math

import torch

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _product(m: int, x):
    """High and low word of a 32 x 32 bit product; int64 wraps, which leaves the bits in place."""
    p = x * m
    return (p >> 32) & _LOW, p & _LOW


def philox4x32(counter, key):
    """Four words from four counter words and two key words; int64 tensors (or integers) that hold 32-bit values."""
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        (h0, l0), (h1, l1) = _product(_M0, c0), _product(_M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(count: int, *, seed: int, level: int, sample: int, offset: int, device="cpu") -> torch.Tensor:
    """The generator's words of the elements 0 .. count - 1 of one level of one sample: int64 [count]."""
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    rest = (torch.full_like(blocks, v) for v in (level, sample & _LOW, offset))
    return torch.stack(philox4x32((blocks, *rest), (seed & _LOW, seed >> 32)), 1).flatten()[:count]


def uniforms(w: torch.Tensor, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(u in (0, 1], angle in turns in [0, 1)) of pairs of words [..., 2]; exact in float32 and float64."""
    return ((w[..., 0] >> 8) + 1).to(dtype) / 2**24, (w[..., 1] >> 8).to(dtype) / 2**24


def box_muller(w: torch.Tensor) -> torch.Tensor:
    """Normals [..., 2] of pairs of words [..., 2], in float64. The angle is reduced to an eighth of a turn first, so that the sines
    of whole quarters are exact."""
    radius = torch.sqrt(-2 * torch.log(uniforms(w)[0]))
    a = w[..., 1] >> 8
    quarter = (a + (1 << 21)) >> 22
    angle = (a - (quarter << 22)).to(torch.float64) / 2**24 * (2 * math.pi)
    sine, cosine, odd = torch.sin(angle), torch.cos(angle), (quarter & 1).bool()
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quarter + 1) & 2).bool(), -first, first)
    second = torch.where((quarter & 2).bool(), -second, second)
    return torch.stack((radius * first, radius * second), -1)


def normal(shape, *, seed: int, level: int, offset: int, first_sample: int, dtype, device) -> torch.Tensor:
    """Noise [B, C, T, H, W] of one level: computed in float64 and rounded once to ``dtype`` (float32 for narrower ones)."""
    per_sample = math.prod(shape[1:])
    result = []
    for b in range(shape[0]):
        w = words(per_sample + per_sample % 2, seed=seed, level=level, sample=first_sample + b, offset=offset, device=device)
        result.append(box_muller(w.view(-1, 2)).flatten()[:per_sample])
    return torch.stack(result).view(shape).to(torch.promote_types(dtype, torch.float32))
