"""VideoDiT: patchify -> transformer blocks with AdaLN-zero -> final layer, over a grid of V views x T times (V = 1: a video).

The block list is data (`DiTConfig.blocks`); each block names its self-attention pattern. Follows DiT (arXiv 2212.09748, §3.2)
with 3-axis RoPE; V = 1 is an ordinary video DiT, and more views reuse the same weights through collapsed positions.
"""

import dataclasses
import math

import torch
from torch import nn

from .attention import CrossAttention, SelfAttention
from .rope import RotaryEmbedding, grid_positions, split_head_dim


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block. attention: a pattern of `attention.attend`. cross: text cross-attention. positions: a kind of `rope.grid_positions`.

    A block that attends more than once takes a tuple of patterns and a tuple of kinds.
    """

    attention: object = "grid"
    cross: bool = False
    positions: object = "collapsed"


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """channels: of a latent or pixel frame; out_channels: of the output, 0 = the same. patch: side of a square patch.

    text_dim: width of text tokens (cross blocks).
    t_max: greatest T, the stride of a view on the time axis of RoPE. freq_dim: width of the sinusoidal time features.
    """

    channels: int = 3
    out_channels: int = 0
    patch: int = 8
    dim: int = 64
    heads: int = 4
    blocks: tuple = (BlockSpec(),) * 4
    mlp_ratio: float = 4.0
    qk_norm: str = "head"
    text_dim: int = 0
    t_max: int = 16
    rope_axes: tuple = ()
    theta: float = 10_000.0
    freq_dim: int = 256

    def with_attention(self, pattern):
        """The same configuration with another self-attention pattern in every block."""
        return dataclasses.replace(self, blocks=tuple(dataclasses.replace(b, attention=pattern) for b in self.blocks))


def patchify(x, patch):
    """[B, V, T, C, H, W] -> tokens [B, V*T*(H/p)*(W/p), C*p*p], view-major, rows before columns."""
    B, V, T, C, H, W = x.shape
    if H % patch or W % patch:
        raise ValueError(f"frame size {H}x{W}: expected multiples of the patch size {patch}")
    x = x.reshape(B, V, T, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(B, V * T * (H // patch) * (W // patch), C * patch * patch)


def unpatchify(tokens, patch, shape):
    """Inverse of `patchify`; shape: the (B, V, T, C, H, W) to return, C may differ from the input's."""
    B, V, T, C, H, W = shape
    x = tokens.reshape(B, V, T, H // patch, W // patch, C, patch, patch)
    return x.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(B, V, T, C, H, W)


def sinusoid(value, dim):
    """Features [B, dim] of scalars [B] in [0, 1]: cosines and sines of 1000 * value at geometric frequencies 1 .. 1e-4, fp32."""
    rate = torch.exp(torch.arange(dim // 2, device=value.device, dtype=torch.float32) * (-math.log(10_000.0) / (dim // 2)))
    angle = 1000.0 * value.float()[:, None] * rate
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def modulate(x, shift, scale):
    """AdaLN modulation: x [B, L, C] scaled by 1 + scale and shifted; shift, scale [B, 1, C]."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """AdaLN-zero block: x += gate * self-attention; x += cross-attention(text); x += gate * MLP."""

    attention_type = SelfAttention

    def __init__(self, config, spec):
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.spec = spec
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = self.attention_type(dim, config.heads, qk_norm=config.qk_norm)
        if spec.cross:
            self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
            self.cross = CrossAttention(dim, config.heads, config.text_dim, qk_norm=config.qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, condition, table, grid, *, text=None, text_mask=None, pattern=None, **attention):
        """x [B, L, dim]; condition [B, dim], after its SiLU; table: RoPE (cos, sin); grid (V, T).

        pattern: in place of the spec's own. Further keywords (offset, valid, impl, capture) go to the self-attention.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(h, table, pattern or self.spec.attention, grid, **attention)
        return self.after_attention(x, (shift2, scale2, gate2), text, text_mask)

    def after_attention(self, x, modulation, text=None, text_mask=None):
        """The rest of the block: text cross-attention and MLP; modulation: its shift, scale and gate."""
        shift2, scale2, gate2 = modulation
        if self.spec.cross:
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """AdaLN, then a zero-initialised linear to patch pixels (DiT, arXiv 2212.09748, §3.2)."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.linear = nn.Linear(config.dim, (config.out_channels or config.channels) * config.patch**2)

    def forward(self, x, condition):
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class VideoDiT(nn.Module):
    """Predicts one value per input channel and pixel (by convention the velocity) for noised frames.

    ``forward(x [B, V, T, C, H, W], sigma [B])`` -> the same shape (with out_channels, if set). sigma: noise time in [0, 1], 1 = noise.
    `extra`: tokens [B, L, dim] added to the patch embedding (conditioning). `capture`: an iterable of tap names, "<block>.hidden", "<block>.q",
    "<block>.k"; the call then returns (output, {name: tensor}). `stop_after`: last block to run; the output is then None.
    `valid`: bool [B, V, T], dead frames. `impl`: attention backend. `block_inputs`: further keywords of every block.

    A model of other blocks or another trunk is a subclass with its own `block_type` or `trunk`.
    """

    block_type = Block

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.channels * config.patch**2, config.dim)
        self.time = nn.Sequential(nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.rope = RotaryEmbedding(config.rope_axes or split_head_dim(config.dim // config.heads), config.theta)
        self.blocks = nn.ModuleList(self.block_type(config, spec) for spec in config.blocks)
        self.final = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self):
        """Xavier for linears, zeros for every modulation, gate and output layer: each block starts as the identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("modulation", "final.linear", "cross.out")):
                    nn.init.zeros_(module.weight)

    def positions(self, views, times, height, width, device=None, kind="collapsed"):
        """RoPE positions of every token: the time axis by `kind` (`rope.grid_positions`), y, x in patch units; three fp32 [L]."""
        time = grid_positions(kind, views, times, self.config.t_max, device)
        y, x = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
        shape = (views * times, height, width)
        expand = (time[:, None, None], y[None, :, None], x[None, None, :])
        return tuple(p.expand(shape).flatten() for p in expand)

    def tables(self, views, times, height, width, device=None):
        """A function from a block's spec to its RoPE table, or to a tuple of tables; each kind of positions is made once."""
        made = {}

        def table(kind):
            if kind not in made:
                made[kind] = self.rope(self.positions(views, times, height, width, device, kind))
            return made[kind]

        return lambda kinds: tuple(map(table, kinds)) if isinstance(kinds, tuple) else table(kinds)

    def embed_time(self, sigma):
        """Time embedding [B, dim] of sigma [B]."""
        return self.time(sinusoid(sigma, self.config.freq_dim).to(self.time[0].weight.dtype))

    def condition(self, sigma):
        """The time embedding after the SiLU that every modulation expects."""
        return nn.functional.silu(self.embed_time(sigma))

    def forward(self, x, sigma, *, extra=None, text=None, text_mask=None, valid=None, impl=None, capture=(), stop_after=None,
                block_inputs=None):
        B, V, T, C, H, W = x.shape
        patch, wanted = self.config.patch, set(capture)
        tokens = self.embed(patchify(x, patch))
        if extra is not None:
            tokens = tokens + extra
        tables = self.tables(V, T, H // patch, W // patch, x.device)
        inputs = {"text": text, "text_mask": text_mask, "valid": valid, "impl": impl, **(block_inputs or {})}
        embedded = self.embed_time(sigma)
        tokens, taps = self.trunk(tokens, embedded, tables, (V, T), wanted, stop_after, inputs)
        if stop_after is not None and stop_after < len(self.blocks):
            return (None, self._checked(taps, wanted)) if wanted else None
        out = self.final(tokens, nn.functional.silu(embedded))
        out = unpatchify(out, patch, (B, V, T, self.config.out_channels or C, H, W))
        return (out, self._checked(taps, wanted)) if wanted else out

    def trunk(self, tokens, embedded, tables, grid, wanted, stop_after, inputs):
        """All blocks up to `stop_after`, given the time embedding [B, dim]: returns the tokens and {tap name: tensor}."""
        condition, taps = self.modulation_input(embedded), {}
        for index, block in enumerate(self.blocks):
            found = {} if wanted & {f"{index}.q", f"{index}.k"} else None
            tokens = block(tokens, condition, tables(block.spec.positions), grid, capture=found, **self.inputs_of(index, inputs))
            found = {"hidden": tokens, **(found or {})} if wanted else {}
            taps.update({f"{index}.{key}": value for key, value in found.items() if f"{index}.{key}" in wanted})
            if index == stop_after:
                break
        return tokens, taps

    def modulation_input(self, embedded):
        """What every block gets as its condition, from the time embedding [B, dim]."""
        return nn.functional.silu(embedded)

    def inputs_of(self, index, inputs):
        """Keywords of block `index`, from those of all blocks."""
        return inputs

    @staticmethod
    def _checked(taps, wanted):
        if missing := sorted(wanted - set(taps)):
            raise ValueError(f"capture={missing}: no such tap among the blocks that ran; expected '<block>.hidden', '.q' or '.k'")
        return taps
