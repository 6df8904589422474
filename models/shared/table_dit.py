"""A video DiT of the LTX-Video form: RMS norms, one modulation for all blocks plus a learned table per block, text cross-attention without
norm or gate. Every block has its own numbers of heads, cross-attention heads and FFN channels.

The layers are ordinary linears, which take masks, or vidkern's pruned layers with norm, gate and residual fused (`TableConfig.packed`).
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from .attention import QKNorm, attend
from .dit import BlockSpec, DiTConfig, VideoDiT, modulate
from .rope import FullWidthRope, apply_head_rope, apply_rope

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class TableSpec(BlockSpec):
    """heads, cross_heads: of self- and cross-attention, 0 leaves its output bias alone. hidden: FFN channels.

    rope_heads: with full-width RoPE, the columns of the table that the heads own; () = the first ones.
    """

    attention: object = "sdpa"
    cross: bool = True
    heads: int = 4
    cross_heads: int = 4
    hidden: int = 256
    rope_heads: tuple = ()


@dataclasses.dataclass(frozen=True)
class TableConfig(DiTConfig):
    """heads: of an unpruned block, which sets the width of full-width RoPE; the blocks' own numbers are in their `TableSpec`.

    head_dim: channels of a head. group: FFN channels that are pruned together. qk_norm: "none", "head" or "all" (across heads).
    qk_divisor: with "all", what sums of squares are divided by: "kept" (the channels that are left) or a number (for example
    the channels before pruning); cutting heads changes the norm of the others unless masked and cut model divide by the same.
    mask_qk: masked heads leave that sum as well; without it, masking is another function than cutting. rope: "head" (every head has the
    same frequencies) or "full" (LTX, see `rope.FullWidthRope`), with `rope_scale` at LTX's own rates. qk_eps: of the
    norms. packed: vidkern's pruned layers. tile: FFN channels held at once when packed.
    """

    blocks: tuple = (TableSpec(),) * 4
    patch: int = 1
    head_dim: int = 16
    group: int = 128
    text_dim: int = 32
    qk_divisor: object = "kept"
    mask_qk: bool = True
    qk_eps: float = 1e-6
    rope: str = "head"
    rope_scale: tuple = ()
    packed: bool = False
    tile: int = 768

    def __post_init__(self):
        if self.rope not in ("head", "full"):
            raise ValueError(f"rope={self.rope!r}: expected 'head' or 'full'")
        if self.qk_divisor != "kept" and not (isinstance(self.qk_divisor, int) and self.qk_divisor > 0):
            raise ValueError(f"qk_divisor={self.qk_divisor!r}: expected 'kept' or a positive number of channels")
        if self.head_dim % 8:
            raise ValueError(f"head_dim={self.head_dim}: expected a multiple of 8")
        if self.group < 1:
            raise ValueError(f"group={self.group}: expected at least 1")
        for index, spec in enumerate(self.blocks):
            if spec.hidden < 1 or spec.hidden % self.group or min(spec.heads, spec.cross_heads) < 0:
                raise ValueError(f"block {index}: {spec.heads} heads, {spec.cross_heads} cross-attention heads, {spec.hidden} FFN channels; "
                                 f"expected heads of at least 0 and a positive multiple of the group, {self.group}")
            if spec.rope_heads and len(spec.rope_heads) != spec.heads:
                raise ValueError(f"block {index}: rope_heads={spec.rope_heads}: expected one for each of {spec.heads} heads")


def linear(inputs, outputs, packed):
    """A linear layer in the form of the configuration."""
    if not packed:
        return nn.Linear(inputs, outputs)
    from vidkern.nn import PrunedLinear

    return PrunedLinear(inputs, outputs)


def rms(x):
    """RMS norm over channels without weights."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _normed(layer, x, scale, shift):
    """layer(modulate(rms(x))); scale, shift [B, 1, dim]."""
    if isinstance(layer, nn.Linear):
        return layer(modulate(rms(x), shift, scale))
    return layer(x, norm="rms", scale=scale, shift=shift)


def _added(layer, x, residual, gate=None):
    """residual + gate * layer(x); gate [B, 1, dim] or None."""
    if not isinstance(layer, nn.Linear):
        return layer(x, gate=gate, residual=residual)
    return residual + (layer(x) if gate is None else gate * layer(x))


def _along(mask, axes):
    """A mask of units, [U] or one per sample [B, U], with `axes` axes of length 1 after the batch axis."""
    return mask if mask.ndim == 1 else mask.reshape(len(mask), *(1,) * axes, -1)


class BiasOnly(nn.Module):
    """What is left of an attention without heads: its output bias."""

    def __init__(self, dim):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))


class HeadAttention(nn.Module):
    """Attention of a set of heads over tokens [B, L, dim]: within them, or with `context_dim` to a context [B, S, context_dim].

    Queries, keys and values of a head are `head_dim` wide, whatever dim / heads is.
    """

    def __init__(self, config, heads, context_dim=0, rope_heads=()):
        super().__init__()
        dim, inner = config.dim, heads * config.head_dim
        self.heads, self.head_dim, self.mask_qk, self.divisor = heads, config.head_dim, config.mask_qk, config.qk_divisor
        self.rope_heads, self.full_rope = tuple(rope_heads), config.rope == "full"
        if not heads:
            self.out = BiasOnly(dim)
            return
        if context_dim:
            self.q, self.kv = linear(dim, inner, config.packed), linear(context_dim, 2 * inner, config.packed)
        else:
            self.qkv = linear(dim, 3 * inner, config.packed)
        self.q_norm, self.k_norm = (QKNorm(config.qk_norm, heads, config.head_dim, eps=config.qk_eps) for _ in range(2))
        self.out = linear(inner, dim, config.packed)

    def _unit(self, x, norm, mask):
        """QK norm of x [B, L, H, D] under the mask of heads."""
        divisor = None if self.divisor == "kept" else self.divisor
        if norm.kind == "all" and mask is not None and self.mask_qk:
            x = x * _along(mask, 1)[..., None].to(x.dtype)
            if self.divisor == "kept":
                divisor = _along(mask.sum(-1, keepdim=True), 1).float().clamp_min(1.0) * self.head_dim
        return norm(x, divisor)

    def rotate(self, x, table):
        if not self.full_rope:
            return apply_rope(x, table)
        if self.rope_heads:
            return apply_head_rope(x, tuple(part[:, list(self.rope_heads)] for part in table))
        return apply_head_rope(x, tuple(part[:, : self.heads] for part in table))

    def add_self(self, x, modulation, table, pattern, grid, *, mask=None, valid=None, impl=None, capture=None):
        """x + gate * self-attention(modulated norm of x). mask: of heads, [H] or [B, H]. capture: see `attention.SelfAttention`."""
        shift, scale, gate = modulation
        if not self.heads:
            return x + gate * self.out.bias
        q, k, v = _normed(self.qkv, x, scale, shift).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        q, k = self.rotate(self._unit(q, self.q_norm, mask), table), self.rotate(self._unit(k, self.k_norm, mask), table)
        if capture is not None:
            capture.update(q=q, k=k)
        return self._finish(attend(q, k, v, pattern, grid, valid=valid, impl=impl), x, mask, gate)

    def add_cross(self, x, context, context_mask=None, *, mask=None, gate=None):
        """x + gate * cross-attention to the context; context_mask: bool [B, S], True = may be seen."""
        if not self.heads:
            return x + (self.out.bias if gate is None else gate * self.out.bias)
        q = self._unit(self.q(x).unflatten(-1, (self.heads, self.head_dim)), self.q_norm, mask)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, self._unit(k, self.k_norm, mask), v))
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        return self._finish(F.scaled_dot_product_attention(q, k, v, attn_mask=context_mask).transpose(1, 2), x, mask, gate)

    def _finish(self, heads, x, mask, gate):
        if mask is not None:
            heads = heads * _along(mask, 1)[..., None].to(heads.dtype)
        return _added(self.out, heads.flatten(2), x, gate)


class FeedForward(nn.Module):
    """GELU (tanh form) network; `group` channels share one number of a mask [F / group] or [B, F / group]."""

    def __init__(self, dim, hidden, group):
        super().__init__()
        self.group = group
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x, mask=None):
        hidden = F.gelu(self.up(x), approximate="tanh")
        if mask is not None:
            hidden = hidden * _along(mask.repeat_interleave(self.group, -1), 1).to(hidden.dtype)
        return self.down(hidden)


class TableBlock(nn.Module):
    """x += gate * self-attention; x += cross-attention(text); x += gate * FFN, with the modulation of all blocks plus this block's table."""

    def __init__(self, config, spec):
        super().__init__()
        self.spec = spec
        self.attention = HeadAttention(config, spec.heads, rope_heads=spec.rope_heads)
        self.cross = HeadAttention(config, spec.cross_heads, config.dim) if spec.cross else None
        if config.packed:
            from vidkern.nn import PrunedFFN

            self.ffn = PrunedFFN(config.dim, spec.hidden, tile=config.tile, group=config.group)
        else:
            self.ffn = FeedForward(config.dim, spec.hidden, config.group)
        self.table = nn.Parameter(torch.zeros(6, config.dim))

    def forward(self, x, condition, table, grid, *, text=None, text_mask=None, pattern=None, masks=None, **attention):
        """x [B, L, dim]; condition [B, 6 * dim]; table: of RoPE. text: context [B, S, dim] or None.

        masks: {"block": scalar or [B], "heads", "cross_heads": [H] or [B, H], "ffn": [groups] or [B, groups]} or None; 1 = kept.
        """
        masks = masks or {}
        both = self.table + condition.unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = both.to(x.dtype)[:, :, None].unbind(1)
        kept = masks.get("block")
        if kept is not None:
            kept = kept.reshape(-1, 1, 1).to(x.dtype)
            gate1, gate2 = kept * gate1, kept * gate2
        h = self.attention.add_self(x, (shift1, scale1, gate1), table, pattern or self.spec.attention, grid,
                                    mask=masks.get("heads"), **attention)
        if self.cross is not None:
            h = self.cross.add_cross(h, text, text_mask, mask=masks.get("cross_heads"), gate=kept)
        if isinstance(self.ffn, FeedForward):
            return h + gate2 * self.ffn(modulate(rms(h), shift2, scale2), masks.get("ffn"))
        return self.ffn(h, norm="rms", scale=scale2, shift=shift2, gate=gate2, residual=h)


class TableFinal(nn.Module):
    """LayerNorm, modulation by the time embedding plus a table, linear to patch pixels."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, config.dim))
        self.linear = nn.Linear(config.dim, (config.out_channels or config.channels) * config.patch**2)

    def forward(self, x, embedded):
        shift, scale = (self.table + embedded[:, None]).to(x.dtype)[:, :, None].unbind(1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale))


class TableDiT(VideoDiT):
    """The trunk of `TableBlock`s; see `VideoDiT`. `text`: [B, S, text_dim], projected once for all blocks."""

    block_type = TableBlock

    def __init__(self, config):
        super().__init__(config)
        if config.rope == "full":
            self.rope = FullWidthRope(config.heads, config.head_dim, config.theta, scale=config.rope_scale)
        self.modulation = nn.Linear(config.dim, 6 * config.dim)
        self.caption = nn.Sequential(nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim))
        self.final = TableFinal(config)
        self.reset_parameters()

    def modulation_input(self, embedded):
        return self.modulation(F.silu(embedded))

    def inputs_of(self, index, inputs):
        masks = inputs.get("masks")
        return inputs if masks is None else {**inputs, "masks": masks[index]}
