"""The DFM network: a DiT that takes every level at once and predicts a velocity for each (arXiv 2506.19839, section 3.4).

Every level has its own patch embedding, time embedding and output head; embeddings are summed, and the trunk in between is an ordinary
DiT. A level that is not active enters as zeros: its embedding's bias and its time embedding stay, as in the paper.
"""

import torch
from torch import nn

from ..shared.dit import VideoDiT, modulate, sinusoid


def to_tokens(x, patch):
    """[B, C, H, W] or [B, C, T, H, W] -> [B, tokens, C * patch]; tokens by time, row, column; numbers by channel, time, row, column."""
    x = x.unsqueeze(2) if x.dim() == 4 else x
    B, C, T, H, W = x.shape
    t, y, z = patch
    if T % t or H % y or W % z:
        raise ValueError(f"level of {T}x{H}x{W}: expected multiples of its patch {patch}")
    x = x.reshape(B, C, T // t, t, H // y, y, W // z, z).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(B, T // t * (H // y) * (W // z), C * t * y * z)


def from_tokens(tokens, patch, shape):
    """Inverse of `to_tokens`."""
    B, C, *_, H, W = shape
    T = shape[2] if len(shape) == 5 else 1
    t, y, z = patch
    x = tokens.reshape(B, T // t, H // y, W // z, C, t, y, z).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(shape)


class Head(nn.Module):
    """AdaLN, then a linear layer to the patches of one level."""

    def __init__(self, dim, width):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, width)

    def forward(self, x, condition):
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DFM(VideoDiT):
    """Velocities of the active levels: ``model([z_1 .. z_Q], t [B, S])`` -> a list of Q tensors like the inputs.

    Levels run coarse to fine, [B, C, H, W] or [B, C, T, H, W]; t is data time (1 = data), 0 for levels that wait. Q is the length of the
    list, or `active`; what lies beyond is not read. stage: 1 .. S, an integer or [B], default Q. labels: int64 [B], `classes` = no label.
    With a mask per sample, all levels are given, zeros where masked, and `stage` [B] says how far each sample is.
    Attribute `pyramid`: the DFMConfig (`config` is that of the trunk).
    """

    def __init__(self, config):
        super().__init__(config.dit)
        del self.embed, self.time, self.final
        self.pyramid = config
        dim, freq, S = config.dit.dim, config.dit.freq_dim, config.levels
        self.embeds = nn.ModuleList(nn.Linear(config.width_of(s), dim) for s in range(S))
        self.times = nn.ModuleList(nn.Sequential(nn.Linear(freq, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(S))
        self.heads = nn.ModuleList(Head(dim, config.width_of(s)) for s in range(S))
        self.labels = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.stages = nn.Parameter(torch.zeros(S, dim)) if config.stage_embed else None
        self.reset_parameters()

    def reset_parameters(self):
        """Fresh weights: those of the trunk, the heads zero, and label embeddings of unit variance."""
        super().reset_parameters()
        for head in getattr(self, "heads", ()):
            nn.init.zeros_(head.linear.weight)
        if getattr(self, "labels", None) is not None:
            nn.init.normal_(self.labels.weight)     # of the size of the time embedding: a much smaller one is learned late

    def embed_times(self, t, labels, stage):
        """Sum [B, dim] of the levels' time embeddings, of the label's and of the stage's. The sinusoids take noise time, 1 - t."""
        dtype = self.embeds[0].weight.dtype
        total = sum(time(sinusoid(1 - t[:, s], self.config.freq_dim).to(dtype)) for s, time in enumerate(self.times))
        if self.labels is not None:
            if labels is not None:
                check_labels(labels, len(t), self.pyramid.classes)
            total = total + self.labels(torch.full((len(t),), self.pyramid.classes, device=t.device) if labels is None else labels)
        elif labels is not None:
            raise ValueError("labels: given, expected None for a model without classes")
        if self.stages is not None:
            index = torch.as_tensor(stage, device=t.device).long() - 1
            total = total + self.stages[index.expand(len(t))]
        return total

    def preconditioning(self, t, active):
        """(c_in, c_skip, c_out) as rows [B, 1, K], constant over a level's numbers (section A.1, derived for the linear path)."""
        config = self.pyramid
        std = t.new_tensor([1.0] * config.levels if config.standardise else config.std)
        noise = 1 - t
        power = (t * std) ** 2 + noise**2
        rows = power.rsqrt(), config.sign * (t * std**2 - noise) / power, config.sign * std * power.rsqrt()
        widths = torch.tensor([config.width_of(s) for s in range(active)], device=t.device)
        return [row[:, :active].repeat_interleave(widths, 1)[:, None] for row in rows]

    def forward(self, levels, t, *, stage=None, labels=None, active=None, text=None, text_mask=None, impl=None):
        active = len(levels) if active is None else active
        if not 1 <= active <= min(len(levels), self.pyramid.levels):
            raise ValueError(f"active={active} of {len(levels)} levels: expected 1 to {self.pyramid.levels} of them")
        levels = list(levels)[:active]
        patches = [self.pyramid.patch_of(s) for s in range(active)]
        grid = token_grid(levels[0].shape, patches[0])
        tokens = [to_tokens(z, patch) for z, patch in zip(levels, patches)]
        if len({x.shape[1] for x in tokens}) > 1:
            raise ValueError(f"levels: {[x.shape[1] for x in tokens]} tokens, expected the same number from every level")
        out = self.forward_tokens(torch.cat(tokens, -1), grid, t, stage=stage, labels=labels, text=text, text_mask=text_mask, impl=impl)
        parts = out.split([x.shape[2] for x in tokens], -1)
        return [from_tokens(x, patch, z.shape) for x, patch, z in zip(parts, patches, levels)]

    def forward_tokens(self, tokens, grid, t, *, stage=None, labels=None, text=None, text_mask=None, impl=None):
        """The same on tokens [B, N, K], the patches of the active levels side by side as `vidkern.pyramid_flow_inputs` makes them.

        grid: (time, row, column) numbers of tokens. Returns [B, N, K].
        """
        config, S = self.pyramid, self.pyramid.levels
        widths = [config.width_of(s) for s in range(S)]
        sums = [sum(widths[: s + 1]) for s in range(S)]
        if tokens.shape[-1] not in sums:
            raise ValueError(f"tokens: {tokens.shape[-1]} numbers each, expected one of {sums}, by the active levels")
        if tuple(t.shape) != (tokens.shape[0], S):
            raise ValueError(f"t: shape {tuple(t.shape)}, expected a time for each of {S} levels, {(tokens.shape[0], S)}")
        active = sums.index(tokens.shape[-1]) + 1
        dtype = self.embeds[0].weight.dtype
        embedded = self.embed_times(t, labels, active if stage is None else stage)
        if config.precond:
            c_in, c_skip, c_out = self.preconditioning(t.float(), active)
        weight = torch.cat([embed.weight for embed in self.embeds[:active]], 1)
        bias = sum(embed.bias for embed in self.embeds)
        hidden = nn.functional.linear((tokens * c_in if config.precond else tokens).to(dtype), weight, bias)
        tables = self.tables(1, *grid, tokens.device)
        inputs = {"text": text, "text_mask": text_mask, "valid": None, "impl": impl}
        hidden, _ = self.trunk(hidden, embedded, tables, (1, grid[0]), set(), None, inputs)
        condition = nn.functional.silu(embedded)
        out = torch.cat([head(hidden, condition) for head in self.heads[:active]], -1)
        return c_skip * tokens + c_out * out if config.precond else out


def check_labels(labels, batch, classes):
    """ValueError unless labels [batch] are integers from 0 to classes, which stands for none. Values on a GPU are not read."""
    if labels.shape != (batch,) or labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(f"labels: shape {tuple(labels.shape)} {labels.dtype}, expected one integer per sample, {(batch,)}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= labels.min() <= labels.max() <= classes:
        raise ValueError(f"labels: from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}, or {classes} for none")


def token_grid(shape, patch):
    """(time, row, column) numbers of tokens of a level's shape."""
    sizes = (1, *shape[2:]) if len(shape) == 4 else tuple(shape[2:])
    return tuple(n // p for n, p in zip(sizes, patch))


@torch.no_grad()
def from_plain(model, config):
    """A DFM model that starts as the plain `VideoDiT` it is made of (section 4.5): level 1 takes over its patch embedding, time embedding and
    output layer, finer levels start at zero, so that their inputs and times change nothing and their velocities are 0.

    config: see `config.flux`; the trunk must be the model's own.
    """
    if config.dit != model.config:
        raise ValueError("config.dit: differs from model.config, expected the plain model's own")
    if config.width_of(0) != model.embed.in_features:
        raise ValueError(f"config: level 1 has patches of {config.width_of(0)} numbers, expected the model's {model.embed.in_features}")
    dfm = DFM(config)
    dfm.blocks.load_state_dict(model.blocks.state_dict())
    for s in range(config.levels):
        dfm.times[s].load_state_dict(model.time.state_dict())
        dfm.heads[s].modulation.load_state_dict(model.final.modulation.state_dict())
    dfm.embeds[0].load_state_dict(model.embed.state_dict())
    dfm.heads[0].linear.load_state_dict(model.final.linear.state_dict())
    for s in range(1, config.levels):
        # The first layer of the time embedding keeps its weights: with zeros on both sides it could never learn. Heads start at zero anyway.
        for layer in (dfm.embeds[s], dfm.times[s][2]):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    if dfm.labels is not None:
        nn.init.zeros_(dfm.labels.weight)
    return dfm.to(next(model.parameters()))


def parameter_count(model):
    """How many numbers the parameters hold."""
    return sum(p.numel() for p in model.parameters())


def on_meta(config):
    """The model without memory, to count its parameters."""
    with torch.device("meta"):
        return DFM(config)
