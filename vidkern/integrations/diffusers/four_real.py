"""The 4D video model of 4Real-Video-V2 (arXiv 2506.18839) on a pretrained diffusers video transformer, without a new parameter.

All views are denoised jointly by the blocks of the base model: the frame axis holds V views x T times, self-attention shows each
token its own frame, its view and its time ("fused view-time attention"), and the coordinates (view, time, y, x) collapse to
the base model's three, (view * t_max + time, y, x) ("positional embedding"). With V = 1 it is the base model.
"""

import torch
from torch import nn

from .enable import enable_vidkern, family_of

BASES = ("WanTransformer3DModel", "CogVideoXTransformer3DModel")
WAN_T_MAX = 21        # latent frames of the 81-frame clips that Wan 2.1 was trained on; its configuration does not say
COGVIDEOX_THETA = 10_000.0


def shifted_table(table, views, step):
    """CogVideoX's RoPE tables of ``views`` views, view v moved by v * step along time.

    Args:
        table: (cos, sin), each [T * N, D], of one view; time owns the first quarter of the channels, in pairs.
        step: t_max, in frames of the table.

    Returns:
        (cos, sin), each [V * T * N, D].
    """
    cos, sin = table
    width = cos.shape[1] // 4
    rate = COGVIDEOX_THETA ** (-torch.arange(0, width, 2, device=cos.device, dtype=torch.float64) / width)
    angle = torch.arange(views, device=cos.device, dtype=torch.float64)[:, None] * step * rate.repeat_interleave(2)
    shift_cos, shift_sin = (t[:, None].to(cos.dtype) for t in (angle.cos(), angle.sin()))
    time_cos, time_sin = cos[:, :width], sin[:, :width]
    moved = time_cos * shift_cos - time_sin * shift_sin, time_sin * shift_cos + time_cos * shift_sin
    return tuple(
        torch.cat((time, rest[:, width:].expand(views, -1, -1)), -1).flatten(0, 1) for time, rest in zip(moved, table)
    )


class FourRealTransformer(nn.Module):
    """Prediction of a base transformer for a grid of V views x T times; see :func:`four_real_from_diffusers`.

    Attributes:
        transformer: the base model, which holds every parameter. Called by itself it is the base model, on vidkern.
        t_max: greatest T, and the distance of neighbouring views on the base model's time axis, in latent frames.
        handle: the :class:`VidkernHandle` of the base model.
    """

    def __init__(self, transformer, *, t_max=None, pattern="grid", impl=None):
        super().__init__()
        name, _ = family_of(transformer, BASES)
        config = transformer.config
        self.wan = name == "WanTransformer3DModel"
        self.patch_t = config.patch_size[0] if self.wan else config.patch_size_t or 1
        if t_max is None:
            frames = WAN_T_MAX if self.wan else (config.sample_frames - 1) // config.temporal_compression_ratio + 1
            t_max = -(-frames // self.patch_t) * self.patch_t
        if isinstance(t_max, bool) or not isinstance(t_max, int) or t_max < 1 or t_max % self.patch_t:
            raise ValueError(f"t_max: {t_max!r}, expected a positive multiple of the temporal patch size {self.patch_t}")
        if not self.wan and config.use_learned_positional_embeddings:
            raise ValueError("transformer: learned positional embeddings, expected rotary or sinusoidal ones (they end at one view)")
        self.t_max, self.transformer = t_max, transformer
        self.handle = enable_vidkern(transformer, pattern, impl=impl)
        if self.wan:
            self._hooks = [transformer.rope.register_forward_hook(self._wan_positions)]
        elif config.use_rotary_positional_embeddings:
            self._hooks = []
        else:
            embed = transformer.patch_embed
            self._hooks = [embed.register_forward_pre_hook(self._stretch), embed.register_forward_hook(self._select)]

    # ---- positions --------------------------------------------------------------------------------------------------
    def _every_view(self, table):
        """From tokens [B, V * t_max * N, ...] of views of full length, those of the times that there are."""
        frames = self.handle.frames
        grid = table.unflatten(1, (frames.views, self.t_max // self.patch_t, -1))
        return grid[:, :, : frames.count // frames.views].flatten(1, 3)

    def _wan_positions(self, rope, args, output):
        views = self.handle.frames.views
        if views == 1:
            return None
        batch, channels, _, height, width = args[0].shape
        longest = args[0].new_empty(1).expand(batch, channels, views * self.t_max, height, width)    # only its shape is read
        return tuple(self._every_view(table) for table in rope.forward(longest))

    def _stretch(self, embed, args):
        """Sinusoidal positions are added inside CogVideoX's patch embedding: give it every frame up to t_max ..."""
        views = self.handle.frames.views
        if views == 1:
            return None
        text, latents = args
        grid = latents.unflatten(1, (views, -1))
        padded = grid.new_zeros(grid.shape[0], views, self.t_max, *grid.shape[3:])
        padded[:, :, : grid.shape[2]] = grid
        return text, padded.flatten(1, 2)

    def _select(self, embed, args, output):
        """... and keep the tokens of the frames that there are."""
        if self.handle.frames.views == 1:
            return None
        n_text = args[0].shape[1]
        return torch.cat((output[:, :n_text], self._every_view(output[:, n_text:])), 1)

    # ---- use --------------------------------------------------------------------------------------------------------
    def _check(self, latents, condition):
        if latents.dim() != 6:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, expected 6 dimensions [B, V, T, C, H, W]")
        views, times = latents.shape[1:3]
        if not 1 <= times <= self.t_max:
            raise ValueError(f"latents: {times} times, expected 1 to t_max = {self.t_max} (beyond it positions of views collide)")
        if times % self.patch_t:
            raise ValueError(f"latents: {times} times, expected a multiple of the temporal patch size {self.patch_t}")
        if condition is not None and condition.shape[:3] + condition.shape[4:] != latents.shape[:3] + latents.shape[4:]:
            raise ValueError(f"condition: shape {tuple(condition.shape)}, expected latents' {tuple(latents.shape)} up to channels")
        channels, extra = latents.shape[3], 0 if condition is None else condition.shape[3]
        wanted = self.transformer.config.in_channels
        if channels + extra != wanted:
            raise ValueError(
                f"latents: {channels} channels and {extra} of condition, expected the {wanted} input channels of the base model"
            )
        if self.wan and views * self.t_max // self.patch_t > self.transformer.config.rope_max_seq_len:
            raise ValueError(
                f"latents: {views} views x t_max {self.t_max}, expected at most "
                f"{self.transformer.config.rope_max_seq_len * self.patch_t} positions in time (rope_max_seq_len)"
            )

    def forward(self, latents, timestep, encoder_hidden_states, *, condition=None, image_rotary_emb=None, **kwargs):
        """
        Args:
            latents: [B, V, T, C, H, W], noised, the layout of `vidkern.models.four_real`.
            timestep, encoder_hidden_states: as the base model takes them; one text for all views.
            condition: [B, V, T, C', H, W], further input channels of an image-to-video base (mask and clean latents of the
                reference frames, as its pipeline makes them for one video), C + C' = in_channels. A text-to-video base has none.
            image_rotary_emb: CogVideoX with rotary positions: the tables of one view of T frames, as CogVideoXPipeline makes them.
            kwargs: further arguments of the base model.

        Returns:
            [B, V, T, out_channels, H, W], the base model's prediction.

        Raises:
            ValueError: shapes, channels or T that do not fit, or ``image_rotary_emb`` missing or not wanted.
        """
        self._check(latents, condition)
        if condition is not None:
            latents = torch.cat((latents, condition), 3)
        views, times = latents.shape[1:3]
        rotary = not self.wan and self.transformer.config.use_rotary_positional_embeddings
        if rotary != (image_rotary_emb is not None):
            raise ValueError(
                f"image_rotary_emb: {'missing' if rotary else 'given'}, expected {'the tables of one view' if rotary else 'None'} "
                "for this base model"
            )
        if rotary:
            kwargs["image_rotary_emb"] = shifted_table(image_rotary_emb, views, self.t_max // self.patch_t)
        stacked = latents.permute(0, 3, 1, 2, 4, 5).flatten(2, 3) if self.wan else latents.flatten(1, 2)
        frames = self.handle.frames
        frames.views = views
        try:
            out = self.transformer(
                hidden_states=stacked, timestep=timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs
            )[0]
        finally:
            frames.views = 1      # a call of the base model by itself is one of a single video
        if self.wan:
            return out.unflatten(2, (views, times)).permute(0, 2, 3, 1, 4, 5)
        return out.unflatten(1, (views, times))

    def attention_parameters(self):
        """What the paper fine-tunes: projections and QK norms of every self-attention."""
        return [parameter for module in self.handle.modules.values() for parameter in module.parameters()]

    def train_attention_only(self):
        """Freeze everything but `attention_parameters`; returns them, ready for an optimiser."""
        self.requires_grad_(False)
        chosen = self.attention_parameters()
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def remove(self):
        """Give the base model its stock attention and positions back; this module cannot be used for V > 1 afterwards."""
        self.handle.remove()
        for hook in self._hooks:
            hook.remove()


def four_real_from_diffusers(transformer, *, t_max=None, pattern="grid", impl=None):
    """Make a pretrained video transformer a 4D model of views x times (4Real-Video-V2, arXiv 2506.18839, fused attention).

    Adds no parameter; with one view the result is the base model. To be fine-tuned (the paper: self-attention only, some
    thousand steps) on grids whose reference frames are given through ``condition``.

    Args:
        transformer: WanTransformer3DModel or CogVideoXTransformer3DModel; it is changed in place, see
            :meth:`FourRealTransformer.remove`.
        t_max: greatest number of latent frames per view, and the distance of views on the time axis. Must be the same in
            training and sampling. Default: the base model's longest clip (Wan: 21; CogVideoX: from its configuration).
        pattern: ``"grid"``, or another pattern of :func:`enable_vidkern`, e.g. ``dict(causal_time=True)``.
        impl: backend by name, as in :func:`vidkern.grid_attention`.

    Raises:
        MissingExtra: diffusers is not installed.
        TypeError: another class of transformer.
        ValueError: ``t_max``, ``pattern``, or learned positional embeddings.
    """
    return FourRealTransformer(transformer, t_max=t_max, pattern=pattern, impl=impl)
