"""The video DiT that is pruned (arXiv 2507.13343, section 3): full attention over space and time, text cross-attention, one modulation for all
blocks. Every part that pruning may remove can be masked: blocks, heads of self- and cross-attention, groups of FFN channels.

Masked and cut model are the same function. Biases of the output projections stay when heads or channels go; they vanish with the block.
"""

import torch

from ..shared.dit import patchify, unpatchify
from ..shared.table_dit import TableDiT
from .keep import MASK_OF, counts


class MobileDiT(TableDiT):
    """Velocity (noise - data) of noised latents: ``model(z [B, C, T, H, W], sigma [B], text [B, S, text_dim])`` -> z's shape.

    sigma: noise time, 1 = noise. text_mask: bool [B, S], True = may be seen. masks: one dict per block, see `keep.masks_of` and
    `keep.unit_masks`; one number per unit, for all samples or for each; not for packed models. capture, stop_after: see `VideoDiT`;
    captured hidden states are the residual stream [B, T*H*W, dim] after a block. Text that is all zeros stands for no text (guidance).
    """

    def forward(self, z, sigma, text, *, text_mask=None, masks=None, capture=(), stop_after=None, impl=None):
        config, wanted = self.config, set(capture)
        if z.ndim != 5 or z.shape[1] != config.channels:
            raise ValueError(f"z: shape {tuple(z.shape)}, expected [B, {config.channels}, T, H, W]")
        if text is None or text.ndim != 3 or text.shape[0] != z.shape[0] or text.shape[2] != config.text_dim:
            raise ValueError(f"text: {'None' if text is None else f'shape {tuple(text.shape)}'}, expected [{z.shape[0]}, S, {config.text_dim}]")
        if masks is not None and config.packed:
            raise ValueError("masks: given for a packed model, expected one with plain layers (see `unpack`)")
        if masks is not None and len(masks) != len(self.blocks):
            raise ValueError(f"masks: {len(masks)} entries, expected one for each of {len(self.blocks)} blocks")
        B, C, T, H, W = z.shape
        for b, found in enumerate(masks or ()):
            _check_masks(b, found or {}, counts(config.blocks[b], config.group), B)
        patch, dtype = config.patch, self.embed.weight.dtype
        tokens = self.embed(patchify(z.transpose(1, 2)[:, None], patch).to(dtype))
        inputs = {"text": self.caption(text.to(dtype)), "text_mask": text_mask, "valid": None, "impl": impl, "masks": masks}
        embedded = self.embed_time(sigma)
        tables = self.tables(1, T, H // patch, W // patch, z.device)
        tokens, taps = self.trunk(tokens, embedded, tables, (1, T), wanted, stop_after, inputs)
        if stop_after is not None and stop_after < len(self.blocks):
            return (None, self._checked(taps, wanted)) if wanted else None
        out = unpatchify(self.final(tokens, embedded), patch, (B, 1, T, config.out_channels or C, H, W))[:, 0].transpose(1, 2)
        out = out.to(z.dtype)
        return (out, self._checked(taps, wanted)) if wanted else out


def _check_masks(block, masks, sizes, batch):
    """Masks of one block: a number per unit, or per sample and unit; torch would broadcast some others."""
    wanted = {"block": (), **{MASK_OF[level]: (n,) for level, n in sizes.items()}}
    for name, mask in masks.items():
        if name not in wanted:
            raise ValueError(f"masks: block {block} has {name!r}, expected {', '.join(wanted)}")
        size = wanted[name]
        if mask is not None and tuple(mask.shape) not in (size, (1, *size), (batch, *size)):
            raise ValueError(f"masks: {name} of block {block} has shape {tuple(mask.shape)}, expected {size} or {(batch, *size)}")


def parameter_count(model):
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in model.parameters())


def on_meta(config):
    """Build a model without memory, to count or inspect it."""
    with torch.device("meta"):
        return MobileDiT(config)


def x0_of(z, velocity, sigma):
    """The data that a velocity points to, z - sigma * velocity; sigma [B]."""
    return z - sigma.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1)) * velocity


def drop_text(text, dropped):
    """Text [B, S, D] with the samples in `dropped` (bool [B]) replaced by the absence of text."""
    return text if dropped is None else text * ~dropped[:, None, None]
