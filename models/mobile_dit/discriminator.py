"""The discriminator: the first three quarters of the frozen teacher, with small trained heads on four of its blocks.

It judges noised latents at every latent position. A DiT has no encoder half, hence heads on intermediate blocks. A head first takes frames as a
batch (convolutions over space), then looks along time; the pooled text enters as a bias.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def tapped_blocks(depth, share=0.75, taps=4):
    """(number of teacher blocks that run, indices of those with a head): m = ceil(share * depth), blocks round(m * i / taps) - 1."""
    m = math.ceil(share * depth)
    return m, tuple(sorted({max(0, round(m * i / taps) - 1) for i in range(1, taps + 1)}))


class Head(nn.Module):
    """Residual stream [B, T*H*W, dim] -> logits [B, T, H, W]."""

    def __init__(self, dim, text_dim, width=256, heads=4):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, dim), dim)
        self.enter = nn.Conv2d(dim, width, 3, padding=1)
        self.text = nn.Linear(text_dim, width)
        self.spatial = nn.Sequential(nn.GroupNorm(math.gcd(32, width), width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                     nn.GroupNorm(math.gcd(32, width), width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.time_norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)
        self.heads = heads

    def forward(self, tokens, pooled, grid):
        """pooled: text [B, text_dim]. grid: (T, H, W) of the latent positions."""
        B, (T, H, W) = len(tokens), grid
        # Contiguous: torch 2.13's GroupNorm crashes in the backward of a channels-last input that needs no gradient itself (CPU).
        x = tokens.reshape(B * T, H, W, -1).permute(0, 3, 1, 2).contiguous()
        x = self.enter(F.silu(self.norm(x))) + self.text(pooled).repeat_interleave(T, 0)[:, :, None, None]
        x = x + self.spatial(x)
        x = x.reshape(B, T, -1, H * W).permute(0, 3, 1, 2).flatten(0, 1)
        q, k, v = self.qkv(self.time_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.logit(x).reshape(B, H, W, T).permute(0, 3, 1, 2)


class Discriminator(nn.Module):
    """``D(z [B, C, T, H, W], sigma [B], text [B, S, D])`` -> logits [B, taps, T, H, W], greater = more like real data.

    teacher: a `MobileDiT`, frozen here and not among this module's parameters or state. width: channels of the heads, 256 as published for
    the predecessors of this method. The text is pooled by its mean.
    """

    def __init__(self, teacher, *, share=0.75, taps=4, width=256):
        super().__init__()
        self._backbone = (teacher.requires_grad_(False).eval(),)       # in a tuple: not a submodule
        self.last, self.taps = tapped_blocks(len(teacher.blocks), share, taps)
        config = teacher.config
        self.patch = config.patch
        self.judges = nn.ModuleList(Head(config.dim, config.text_dim, width) for _ in self.taps)

    @property
    def backbone(self):
        """The teacher."""
        return self._backbone[0]

    def forward(self, z, sigma, text):
        _, found = self.backbone(z, sigma, text, capture={f"{b}.hidden" for b in self.taps}, stop_after=self.last - 1)
        T, H, W = z.shape[2:]
        pooled, grid = text.mean(1), (T, H // self.patch, W // self.patch)
        return torch.stack([judge(found[f"{b}.hidden"], pooled, grid) for b, judge in zip(self.taps, self.judges)], 1)
