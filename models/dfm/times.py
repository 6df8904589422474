"""Training times (arXiv 2506.19839, Algorithm 1). Data time: 1 = data, 0 = noise."""

import random

import torch


def stage_weights(levels, first=0.9):
    """Probability of every stage: `first` for the coarsest (the paper's 0.9), the rest shared equally; (1.0,) for one level."""
    if not 0 < first <= 1:
        raise ValueError(f"first={first!r}: expected a probability in (0, 1]")
    return (1.0,) if levels == 1 else (first,) + ((1 - first) / (levels - 1),) * (levels - 1)


def draw_stage(weights, *, seed, step):
    """The stage 1 .. S of a training step: one for the whole batch, and the same on every rank that has the seed."""
    if not weights or any(w < 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights={tuple(weights)!r}: expected probabilities of the stages that add up to 1")
    return random.Random(f"{seed}/{step}").choices(range(1, len(weights) + 1), weights)[0]


def draw_times(batch, levels, stage, generator=None, *, loc=1.5, tied=False):
    """Times [batch, levels]: sigmoid(normal) for the level of the stage, sigmoid(loc + normal) for coarser ones, 0 for finer ones.

    stage: an integer 1 .. S, or a tensor [batch] of them. tied: one normal for all levels, the paper's worst ablation.
    """
    stages = torch.as_tensor(stage).expand(batch)
    if (stages < 1).any() or (stages > levels).any():
        raise ValueError(f"stage={stage!r}: expected 1 to {levels}")
    normal = torch.randn(batch, 1 if tied else levels, generator=generator).expand(batch, levels)
    number = torch.arange(1, levels + 1)
    below, now = number < stages[:, None], number == stages[:, None]
    if tied:
        below, now = torch.zeros_like(below), below | now
    t = torch.sigmoid(normal + loc * below)
    return torch.where(below | now, t, 0.0)
