"""The 4D video model of 4Real-Video-V2 (arXiv 2506.18839): a video DiT whose self-attention is fused over views and times.

What is new in the paper ("Fused view-time attention", "Positional embedding", conditioning paragraph):

1. A pretrained video DiT denoises a grid of V views x T times. Its full self-attention is replaced by ONE masked attention in which
   a token sees its own frame, all frames of its view and all frames of its time: one softmax over V + T - 1 frames. No new weights.
2. Coordinates (view, time, y, x) collapse to the base model's three: (view * t_max + time, y, x).
3. Reference frames enter by adding their patch embedding to the noised tokens before the first block.
4. Only the self-attention is fine-tuned (and here the new reference embedding, which starts at zero).

With V = 1 and no references the model *is* the base video DiT. The architectures that the paper compares with are in `variants`.
"""

import torch
from torch import nn

from ..shared.dit import patchify
from ..shared.flow import RectifiedFlow
from .blend import mixture
from .codec import ReferenceCodec
from .conditioning import References
from .variants import base_names, build, load_base


class ReferenceEmbedding(nn.Module):
    """Tokens to add for reference frames: mask * (patch embedding of the clean frame + bias), all zero at initialisation.

    With `spread` three more such embeddings add to each cell the reference of its time, of its view, and their common corner.
    """

    def __init__(self, config):
        super().__init__()
        self.patch, self.spread = config.dit.patch, config.spread_references
        width = config.dit.channels * self.patch**2
        self.embeds = nn.ModuleList(nn.Linear(width, config.dit.dim) for _ in range(4 if self.spread else 1))
        for embed in self.embeds:
            nn.init.zeros_(embed.weight)
            nn.init.zeros_(embed.bias)

    def forward(self, references):
        tokens = 0
        for embed, (frames, mask) in zip(self.embeds, [(references.frames, references.mask)] + references.spread() * self.spread):
            patches = embed(patchify(frames, self.patch))
            per_frame = patches.shape[1] // mask[0].numel()
            tokens = tokens + patches * mask.flatten(1).repeat_interleave(per_frame, 1)[..., None].to(patches.dtype)
        return tokens


class FourRealVideo(nn.Module):
    """Velocity of a noised grid given its references.

    ``forward(z [B, V, T, C, H, W], sigma [B], frames, mask, text=None)`` -> velocity, z's shape. frames, mask: a `References`,
    or both None for the bare base model. sigma: noise time, 1 = noise. impl: attention backend. cameras (sequential_insert alone):
    world-to-camera [B, V, T, 3, 4]. Further keywords go to `VideoDiT`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dit = build(config)
        self.references = ReferenceEmbedding(config)

    @classmethod
    def from_base(cls, base, config):
        """Start from a trained base: its weights are used as they are, and what the variant adds starts from them (see `variants`).

        base: a `VideoDiT`, and the reference embedding starts at zero; or a `FourRealVideo`, whose reference embedding is kept.
        """
        model = cls(config)
        trained = isinstance(base, FourRealVideo)
        load_base(model.dit, (base.dit if trained else base).state_dict())
        if trained:
            model.references.load_state_dict(base.references.state_dict())
        return model

    def output(self, z, sigma, frames=None, mask=None, **kwargs):
        """What the network itself predicts: the velocity, or x0 when config.prediction says so."""
        references = None if frames is None else References(frames, mask)
        out = self.dit(z, sigma, extra=None if references is None else self.references(references), **kwargs)
        return self._blended(out, references) if self.config.blend_shifts else out

    def _blended(self, out, references):
        """Toy sizes only (see `blend`): x0 = residual + what the chosen mixture of references adds to the codec's prediction."""
        residual, logits = out.float().split((self.config.dit.channels, 1 + len(self.config.blend_shifts)), dim=3)
        if references is None:
            return residual
        pixels, where = mixture(logits, references, self.config.blend_shifts)
        added = ReferenceCodec(self.config.codec_scale).encode(pixels, references)
        return residual + added * where[..., None, None, None]

    def forward(self, z, sigma, frames=None, mask=None, **kwargs):
        out = self.output(z, sigma, frames, mask, **kwargs)
        if self.config.prediction == "velocity":
            return out
        return RectifiedFlow.velocity_from_x0(z, out.to(z.dtype), sigma, floor=self.config.sigma_floor)

    def attention_parameters(self):
        """What the paper fine-tunes: q, k, v, output projections and QK norms of every self-attention, plus the reference embedding."""
        return self.parameters_of("attention")

    def parameters_of(self, scope):
        """A part of the parameters, always with the reference embedding.

        "attention": the base model's self-attentions. "new": what the variant adds to the base model (for sequential_insert its
        column attentions, for the parallel ones the synchronisation). "both": those two. "all": every parameter.
        """
        base = base_names(self.config.dit)
        inside = {"attention": lambda name: name in base and ".attention." in name, "new": lambda name: name not in base,
                  "both": lambda name: name not in base or ".attention." in name, "all": lambda name: True}
        if scope not in inside:
            raise ValueError(f"scope={scope!r}: expected one of {tuple(inside)}")
        chosen = [parameter for name, parameter in self.dit.named_parameters() if inside[scope](name)]
        return list(self.references.parameters()) + chosen

    def train_only(self, scope):
        """Freeze everything but `parameters_of(scope)`; returns those, ready for an optimiser."""
        self.requires_grad_(False)
        chosen = self.parameters_of(scope)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def train_attention_only(self):
        """`train_only("attention")`, as in the paper."""
        return self.train_only("attention")


def parameter_count(module):
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in module.parameters())


def on_meta(config):
    """Build a model without memory, to count or inspect it."""
    with torch.device("meta"):
        return FourRealVideo(config)
