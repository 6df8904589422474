"""The training step of DFM (arXiv 2506.19839, Algorithm 1 and equation 4)."""

import torch

import vidkern

from . import levels as pyramid
from .model import check_labels, token_grid
from .times import draw_stage, draw_times, stage_weights


class DFMLoss:
    """Draws stage, times and noise, and returns the loss of one step: per level the mean squared error of its velocity, summed.

    weights: probability of every stage (`times.stage_weights`). loc: of the times of coarser levels. label_drop: share of labels hidden from
    the model, for guidance. per_sample: every sample has its own stage, not the batch. seed: of stages and noise; both depend on nothing
    but (seed, step, sample), whatever the number of ranks.
    """

    def __init__(self, config, *, weights=None, loc=1.5, label_drop=0.1, per_sample=False, tied=False, seed=0):
        self.config, self.weights = config, tuple(weights or stage_weights(config.levels))
        if len(self.weights) != config.levels:
            raise ValueError(f"weights={self.weights!r}: expected {config.levels}, one per stage")
        if not 0 <= label_drop <= 1:
            raise ValueError(f"label_drop={label_drop!r}: expected a share in [0, 1]")
        self.loc, self.label_drop, self.per_sample, self.tied, self.seed = loc, label_drop, per_sample, tied, seed
        draw_stage(self.weights, seed=seed, step=0)

    def __call__(self, model, x, *, step, generator=None, labels=None, stage=None, first_sample=0, text=None, text_mask=None, impl=None):
        """
        Args:
            x: clean pictures [B, C, H, W] or videos [B, C, T, H, W].
            step: number of the training step. generator: of times and dropped labels; None: torch's own.
            stage: 1 .. S (or [B]) in place of a drawn one. first_sample: number of x's first sample in the global batch.

        Returns:
            (loss, means [B, S]): the loss, and the error of every sample and level, 0 for levels that do not take part.
        """
        config, B = self.config, len(x)
        if labels is not None:
            check_labels(labels, B, config.classes)
        if stage is None and not self.per_sample:
            stage = draw_stage(self.weights, seed=self.seed, step=step)
        elif stage is None:
            stage = torch.multinomial(torch.tensor(self.weights), B, replacement=True, generator=generator) + 1
        t = draw_times(B, config.levels, stage, generator, loc=self.loc, tied=self.tied).to(x.device)
        if labels is not None and self.label_drop:
            dropped = torch.rand(B, generator=generator).to(x.device) < self.label_drop
            labels = torch.where(dropped, config.classes, labels)
        return self.at(model, x, t, stage=stage, offset=step, first_sample=first_sample, labels=labels, text=text, text_mask=text_mask, impl=impl)

    def at(self, model, x, t, *, stage, offset=0, first_sample=0, impl=None, **condition):
        """The same at given times t [B, S] and stages; offset: number of the noise."""
        config, mixed = self.config, isinstance(stage, torch.Tensor)
        active = torch.arange(config.levels, device=x.device) < stage.to(x.device)[:, None] if mixed else stage
        options = {"active": active, "seed": self.seed, "offset": offset, "first_sample": first_sample, "impl": impl}
        if config.upsample:
            z, v = pyramid.flow_inputs(x, t, config, **options)
            pred = model(z, t, stage=stage, impl=impl, **condition)
            loss, means = vidkern.pyramid_flow_loss(pred, v, active=active if mixed else None, return_levels=True, impl=impl)
        else:
            z, v = pyramid.flow_inputs(x, t, config, layout="tokens", **options)
            count = config.levels if mixed else stage
            shape = pyramid.shapes(x.shape, config)
            pred = model.forward_tokens(z, token_grid(shape[0], config.patch_of(0)), t, stage=stage, impl=impl, **condition)
            loss, means = vidkern.pyramid_flow_loss(
                pred, v, layout="tokens", patch=config.patch_of(0), shape=shape[count - 1], levels=count, factor=config.factor,
                active=active if mixed else None, return_levels=True, impl=impl)
        if means.shape[1] < config.levels:
            means = torch.cat((means, means.new_zeros(len(means), config.levels - means.shape[1])), 1)
        return loss, means.detach()
