"""A tiny video diffusion transformer to guide: text in front of the video tokens, one joint attention (as CogVideoX), rectified flow."""

import dataclasses
import functools

import torch
from torch import nn

import vidkern

from ..shared.attention import SelfAttention
from ..shared.dit import Block, BlockSpec, DiTConfig, VideoDiT, sinusoid
from ..shared.rope import apply_rope

POSITIONS = ("rope", "additive")


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """dit: the trunk. positions: "rope" (tables on queries and keys) or "additive" (an embedding on the tokens). classes: kinds of clips that can
    be asked for; label `classes` is the null label. n_text: tokens of a label."""

    dit: DiTConfig
    positions: str = "rope"
    classes: int = 2
    n_text: int = 6

    def __post_init__(self):
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}: expected one of {POSITIONS}")


def tiny(*, channels=8, patch=1, dim=64, heads=4, blocks=4, rope_axes=(4, 6, 6), **changes):
    """F = 4, 8 x 10 patches, four blocks of width 64; changes: further fields of `TinyConfig`."""
    dit = DiTConfig(channels=channels, patch=patch, dim=dim, heads=heads, blocks=(BlockSpec(attention="full"),) * blocks, rope_axes=rope_axes,
                    freq_dim=64)
    return TinyConfig(dit, **changes)


class TappedAttention(SelfAttention):
    """Self-attention over [text, video] whose queries, keys and values pass by a `Taps`."""

    def forward(self, x, table, pattern, grid, *, taps=None, index=0, n_text=0, impl=None, **_):
        """table: a pair of (cos, sin) [L, D / 2], for queries and for keys, or None."""
        q, k, v = self.project(x)
        if table is not None:
            q, k = apply_rope(q, table[0]), apply_rope(k, table[1])
        if taps is not None:
            k, v = taps.attention(index, q, k, v, n_text)
        # One view of all frames, and text that sees everything: dense joint attention.
        return self.out(vidkern.grid_attention(q, k, v, grid=grid, layout="blhd", n_text=n_text, impl=impl).flatten(2))


class TappedBlock(Block):
    attention_type = TappedAttention


class TinyVideoDiT(VideoDiT):
    """Velocity noise - data of frames: ``model(z [B, F, C, H, W], sigma [B], labels [B], taps=None)`` -> [B, F, C, H, W]."""

    block_type = TappedBlock

    def __init__(self, config):
        super().__init__(config.dit)
        self.tiny = config
        self.labels = nn.Embedding(config.classes + 1, config.n_text * config.dit.dim)

    def forward(self, z, sigma, labels, taps=None):
        if not 0 <= int(labels.min()) <= int(labels.max()) <= self.tiny.classes:
            raise ValueError(f"labels={labels.tolist()}: expected 0 to {self.tiny.classes}, the last one for no label")
        text = self.labels(labels).unflatten(-1, (self.tiny.n_text, -1))
        where = self.own_positions(*self.grid_of(z), z.device) if taps is None or taps.positions is None else taps.positions
        return super().forward(z[:, None], sigma, block_inputs={"text": text, "taps": taps, "where": where})[:, 0]

    def grid_of(self, z):
        """(F, h, w) in patches of z [B, F, C, H, W]."""
        return z.shape[1], z.shape[3] // self.config.patch, z.shape[4] // self.config.patch

    def own_positions(self, frames, height, width, device=None):
        """The table of a grid of patches: RoPE [2 (query, key), 2 (cos, sin), N, D / 2] or an embedding [1, N, dim], fp32."""
        where = self.positions(1, frames, height, width, device)
        if self.tiny.positions == "rope":
            return torch.stack(self.rope(where)).expand(2, -1, -1, -1)
        share = self.config.dim // 6 * 2
        waves = torch.cat([sinusoid(p / 1000, share) for p in where], -1)    # `sinusoid` multiplies by 1000: one radian a patch at most
        return nn.functional.pad(waves, (0, self.config.dim - 3 * share))[None]

    def trunk(self, tokens, embedded, tables, grid, wanted, stop_after, inputs):
        text, taps, where = inputs["text"], inputs["taps"], inputs["where"]
        n_text, rotation = text.shape[1], None
        if self.tiny.positions == "rope":
            rotation = tuple(tuple(_behind(n_text, part, fill) for part, fill in zip(pair, (1.0, 0.0))) for pair in where)
        else:
            tokens = tokens + where.to(tokens.dtype)
        condition, x = self.modulation_input(embedded), torch.cat((text.to(tokens.dtype), tokens), 1)
        for index, block in enumerate(self.blocks):
            run = functools.partial(block, table=rotation, grid=grid, taps=taps, index=index, n_text=n_text, impl=inputs["impl"])
            x = run(x, condition) if taps is None else taps.run(index, run, x, condition)
            if taps is not None:
                taps.output(index, x[:, n_text:])
        return x[:, n_text:], {}


def _behind(n_text, part, fill):
    """A table [N, D / 2] behind rows of `fill` for the text, which is not turned."""
    return torch.cat((part.new_full((n_text, part.shape[1]), fill), part))
