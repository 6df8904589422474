"""A pretrained FLUX or Wan transformer as a model of Decomposable Flow Matching, by the zero-init recipe (arXiv 2506.19839, section 4.5).

All levels live at the full size of the latent, the coarser ones enlarged by the pyramid's own filter before noise is added, so that the
base model's patch fits each. Level 1 has the base model's patch embedding, time embedding and output layer; finer levels get their own,
which start at zero. Before any fine-tuning the model therefore predicts, for level 1, what the base model predicts for that input, bit for bit.
"""

import copy

import torch
from torch import nn

from ...errors import import_extra

BASES = ("FluxTransformer2DModel", "WanTransformer3DModel")


def is_flux(transformer):
    """True for FLUX, False for Wan, TypeError for others."""
    diffusers = import_extra("diffusers", "a DFM model from a diffusers transformer")
    for name in BASES:
        if isinstance(transformer, getattr(diffusers, name)):
            return name == BASES[0]
    raise TypeError(f"transformer: {type(transformer).__name__}, expected {' or '.join(BASES)} (not yet wrapped)")


def zeroed(module):
    """A copy of a linear or convolution whose output is 0."""
    fresh = copy.deepcopy(module)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    return fresh


def silent(embedder):
    """A copy of diffusers' TimestepEmbedding whose output is 0. Its first layer stays: between zeros on both sides nothing would learn."""
    fresh = copy.deepcopy(embedder)
    for parameter in fresh.linear_2.parameters():
        nn.init.zeros_(parameter)
    return fresh


class LevelEmbeds(nn.Module):
    """Patch embeddings of all levels, whose inputs lie side by side on axis `dim`; outputs are summed."""

    def __init__(self, base, levels, dim):
        super().__init__()
        self.dim, self.levels = dim, nn.ModuleList([base] + [zeroed(base) for _ in range(levels - 1)])

    def forward(self, x):
        parts = [embed(part) for embed, part in zip(self.levels, x.chunk(len(self.levels), self.dim))]
        return sum(parts[1:], parts[0])


class FluxTimes(nn.Module):
    """Stands for `time_text_embed`: timestep [B, S], one time per level."""

    def __init__(self, base, levels):
        super().__init__()
        self.base, self.levels = base, nn.ModuleList(silent(base.timestep_embedder) for _ in range(levels - 1))

    def forward(self, timestep, *condition):
        total = self.base(timestep[:, 0], *condition)
        for s, embedder in enumerate(self.levels, 1):
            total = total + embedder(self.base.time_proj(timestep[:, s]).to(total.dtype))
        return total


class WanTimes(nn.Module):
    """Stands for `condition_embedder`: timestep flattened from [B, S]; the base transformer keeps an axis of length 1 for it.

    The embedding that goes to the output layer is repeated once per level, as that layer's modulation is (see `_wan`).
    """

    def __init__(self, base, levels):
        super().__init__()
        self.base, self.levels = base, nn.ModuleList(silent(base.time_embedder) for _ in range(levels - 1))

    def forward(self, timestep, text, image=None, timestep_seq_len=None):
        count = len(self.levels) + 1
        times = timestep.unflatten(0, (-1, count))
        embedded, projected, text, image = self.base(times[:, 0], text, image)
        if self.levels:
            for s, embedder in enumerate(self.levels, 1):
                wave = self.base.timesteps_proj(times[:, s]).to(embedder.linear_1.weight.dtype)
                embedded = embedded + embedder(wave).type_as(embedded)
            projected = self.base.time_proj(self.base.act_fn(embedded))
        return embedded.repeat(1, count)[:, None], projected[:, None], text, image


class FluxNorms(nn.Module):
    """Stands for `norm_out`: the modulated hidden states of every level, side by side."""

    def __init__(self, base, levels):
        super().__init__()
        self.levels = nn.ModuleList([base] + [copy.deepcopy(base) for _ in range(levels - 1)])

    def forward(self, x, condition):
        return torch.cat([norm(x, condition) for norm in self.levels], -1)


class RepeatedNorm(nn.Module):
    """Stands for Wan's `norm_out`: normed hidden states once per level; the modulation is that of the transformer, per level."""

    def __init__(self, base, levels):
        super().__init__()
        self.base, self.count = base, levels

    def forward(self, x):
        return self.base(x).repeat(1, 1, self.count)


class LevelHeads(nn.Module):
    """Output layers of all levels. patch: positions of a patch if its numbers come position by position (Wan), 1 if they need no order."""

    def __init__(self, base, levels, patch=1):
        super().__init__()
        self.patch, self.levels = patch, nn.ModuleList([base] + [zeroed(base) for _ in range(levels - 1)])

    def forward(self, x):
        parts = [head(part).unflatten(-1, (self.patch, -1)) for head, part in zip(self.levels, x.chunk(len(self.levels), -1))]
        return torch.cat(parts, -1).flatten(-2)


def _flux(transformer, levels):
    transformer.x_embedder = LevelEmbeds(transformer.x_embedder, levels, -1)
    transformer.time_text_embed = FluxTimes(transformer.time_text_embed, levels)
    transformer.norm_out = FluxNorms(transformer.norm_out, levels)
    transformer.proj_out = LevelHeads(transformer.proj_out, levels)


def _wan(transformer, levels):
    p_t, p_h, p_w = transformer.config.patch_size
    transformer.patch_embedding = LevelEmbeds(transformer.patch_embedding, levels, 1)
    transformer.condition_embedder = WanTimes(transformer.condition_embedder, levels)
    transformer.norm_out = RepeatedNorm(transformer.norm_out, levels)
    transformer.scale_shift_table = nn.Parameter(transformer.scale_shift_table.detach().repeat(1, 1, levels))
    transformer.proj_out = LevelHeads(transformer.proj_out, levels, p_t * p_h * p_w)


def pack(latents):
    """FLUX's tokens [B, H/2 * W/2, 4 C] of latents [B, C, H, W]: a 2x2 block each, channel by channel."""
    B, C, H, W = latents.shape
    return latents.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H // 2 * (W // 2), 4 * C)


def unpack(tokens, shape):
    """Inverse of `pack` for latents of this shape."""
    B, C, H, W = shape
    return tokens.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)


class DFMTransformer(nn.Module):
    """Velocities noise - data of the levels of a latent; see :func:`dfm_from_diffusers`.

    ``model(levels, timestep, **condition)``: levels is a list of S latents of full size, [B, C, H, W] for FLUX and [B, C, T, H, W] for Wan,
    or its first Q ones while the others wait; timestep [B, S] or [S], a row of `DFMFlowMatchEulerScheduler.timesteps`; condition: further
    arguments of the base model, without image ids. Returns the list of the Q velocities.

    Attributes: transformer, the base model with the new parts in it; pyramid, the `vidkern.models.dfm.DFMConfig` for `split` and `join`.
    """

    def __init__(self, transformer, levels):
        super().__init__()
        from ...models.dfm import DFMConfig
        from ...models.shared import DiTConfig

        self.flux = is_flux(transformer)
        if isinstance(levels, bool) or levels not in (1, 2, 3, 4):
            raise ValueError(f"levels: {levels!r}, expected 1 to 4")
        self.patch = 2 if self.flux else transformer.config.patch_size[1]
        channels = transformer.config.in_channels // (4 if self.flux else 1)
        self.pyramid = DFMConfig(DiTConfig(channels=channels), levels=levels, patch=self.patch, upsample=True, direction="noise")
        (_flux if self.flux else _wan)(transformer, levels)
        self.transformer = transformer

    def level_parameters(self):
        """Parameters of the patch embeddings, added times and output layers, which may be trained alone for a while first."""
        names = ("x_embedder", "time_text_embed.levels", "patch_embedding", "condition_embedder.levels", "norm_out", "proj_out", "scale_shift_table")
        return [p for name, p in self.transformer.named_parameters() if name.startswith(names)]

    def _check(self, levels, timestep):
        S, shape = self.pyramid.levels, tuple(levels[0].shape)
        if len(levels) > S or any(tuple(z.shape) != shape for z in levels):
            raise ValueError(f"levels: shapes {[tuple(z.shape) for z in levels]}, expected 1 to {S} of one shape, that of the latent")
        if len(shape) != (4 if self.flux else 5) or shape[1] != self.pyramid.dit.channels:
            raise ValueError(f"levels: shape {shape}, expected [B, {self.pyramid.dit.channels}, {'H, W' if self.flux else 'T, H, W'}]")
        if any(n % self.patch for n in shape[-2:]):
            raise ValueError(f"levels: shape {shape}, expected height and width that divide by the patch size {self.patch}")
        if tuple(timestep.shape) not in ((S,), (shape[0], S)):
            raise ValueError(f"timestep: shape {tuple(timestep.shape)}, expected {(S,)} or {(shape[0], S)}, a time for every level")

    def forward(self, levels, timestep, **condition):
        levels = list(levels)
        self._check(levels, timestep)
        shape, dtype = levels[0].shape, next(self.transformer.parameters()).dtype
        # A level that waits enters as zeros, whatever it holds; its own biases and time stay.
        waiting = [levels[0].new_zeros(shape)] * (self.pyramid.levels - len(levels))
        inputs, times = [z.to(dtype) for z in levels + waiting], timestep.expand(shape[0], -1)
        if not self.flux:
            out = self.transformer(hidden_states=torch.cat(inputs, 1), timestep=times, return_dict=False, **condition)[0]
            return list(out.chunk(self.pyramid.levels, 1)[: len(levels)])
        text = condition["encoder_hidden_states"]
        rows, columns = (torch.arange(n // 2, device=text.device, dtype=torch.float32) for n in shape[-2:])
        ids = torch.stack(torch.meshgrid(rows.new_zeros(1), rows, columns, indexing="ij"), -1).flatten(0, 2)
        condition.setdefault("txt_ids", rows.new_zeros(text.shape[1], 3))
        out = self.transformer(hidden_states=torch.cat([pack(z) for z in inputs], -1), timestep=times / 1000, img_ids=ids, return_dict=False,
                               **condition)[0]
        return [unpack(tokens, shape) for tokens in out.chunk(self.pyramid.levels, -1)[: len(levels)]]


def dfm_from_diffusers(transformer, *, levels=2):
    """Make a pretrained flow transformer a model of Decomposable Flow Matching (arXiv 2506.19839), to be fine-tuned with
    `vidkern.models.dfm.DFMLoss` recipes and sampled with :class:`DFMFlowMatchEulerScheduler`.

    Args:
        transformer: FluxTransformer2DModel or WanTransformer3DModel; it is changed in place.
        levels: S, from 1 to 4; 1 leaves the model's function as it is.

    Raises:
        MissingExtra: diffusers is not installed.
        TypeError: another class of transformer.
        ValueError: ``levels``.
    """
    return DFMTransformer(transformer, levels)
