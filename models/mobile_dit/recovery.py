"""Training a model by its flow, and recovering a pruned one by distillation from its unpruned teacher.

The student matches the teacher's velocity and, block by block, its residual stream. A student block stands for every teacher block up to the
next kept one, so its target is the last of those. A few entries of a DiT's residual stream are far greater than all others; each side drops
its own before the comparison (masked distillation, TinyFusion, arXiv 2412.01199). A short stage of flow matching alone comes first: right
after the cut the features are too far off to be matched.
"""

import dataclasses

import torch

from ..shared.flow import RectifiedFlow, logit_normal_sigma, shift_sigma
from ..shared.train import TrainConfig, Trainer
from .keep import KeepError
from .model import drop_text

FLOW = RectifiedFlow()


@dataclasses.dataclass(frozen=True)
class Noised:
    """One training batch: z at sigma [B] on the way from x0 to noise; text, with that of `dropped` (bool [B]) samples already removed."""

    x0: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    z: torch.Tensor
    text: torch.Tensor
    dropped: torch.Tensor

    @property
    def target(self):
        return FLOW.velocity(self.x0, self.noise)


def draw(x0, text, generator, *, dropout=0.1, shift=1.0):
    """Noise, times (logit-normal, then shifted) and one decision of text dropout, which everybody who sees this batch shares."""
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    sigma = shift_sigma(logit_normal_sigma(len(x0), generator), shift).to(x0)
    dropped = (torch.rand(len(x0), generator=generator) < dropout).to(x0.device)
    return Noised(x0, noise, sigma, FLOW.interpolate(x0, noise, sigma), drop_text(text, dropped), dropped)


class FlowLoss:
    """Mean squared error of the velocity: ``loss(model, x0, text, generator)`` -> scalar.

    dropout: of the text. shift: of the times, 3 at paper scale.
    """

    def __init__(self, dropout=0.1, shift=1.0):
        self.dropout, self.shift = dropout, shift

    def draw(self, x0, text, generator):
        return draw(x0, text, generator, dropout=self.dropout, shift=self.shift)

    def __call__(self, model, x0, text, generator=None):
        batch = self.draw(x0, text, generator)
        return (model(batch.z, batch.sigma, batch.text) - batch.target).square().mean()


def feature_targets(blocks, depth):
    """For every kept block, in order: the last teacher block that it stands for."""
    blocks = tuple(blocks)
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[-1] >= depth or blocks[0] < 0:
        raise KeepError(f"blocks: {list(blocks)}, expected rising indices below {depth}")
    return tuple(after - 1 for after in blocks[1:]) + (depth - 1,)


def without_extremes(hidden, limit=2.0):
    """hidden [B, N, dim] with entries that lie `limit` standard deviations of their sample or more from its mean set to 0."""
    mean, std = hidden.mean((1, 2), keepdim=True), hidden.std((1, 2), keepdim=True)
    return hidden * ((hidden - mean).abs() < limit * std).detach()


def feature_loss(student, teacher, limit=2.0):
    """Mean squared difference of two residual streams, each without its own extreme entries; no gradient to the teacher."""
    return (without_extremes(student, limit) - without_extremes(teacher.detach(), limit)).square().mean()


class DistillLoss:
    """``loss(student, x0, text, generator)`` -> (scalar, {"flow", "velocity", "features"}), parts as numbers.

    (1 - alpha) * flow matching + alpha * |v_student - v_teacher|^2 + beta * mean over blocks of `feature_loss`. teacher: the unpruned model,
    frozen here. blocks: the teacher's blocks that the student kept. Teacher and student see the same text dropout.
    """

    def __init__(self, teacher, blocks, *, alpha=0.9, beta=1e-2, limit=2.0, dropout=0.1, shift=1.0):
        self.teacher = teacher.requires_grad_(False).eval()
        self.blocks, self.targets = tuple(blocks), feature_targets(blocks, len(teacher.blocks))
        self.alpha, self.beta, self.limit = alpha, beta, limit
        self.flow = FlowLoss(dropout, shift)

    def __call__(self, student, x0, text, generator=None):
        if len(student.blocks) != len(self.blocks):
            raise ValueError(f"student: {len(student.blocks)} blocks, expected those that `blocks` names, {list(self.blocks)}")
        batch = self.flow.draw(x0, text, generator)
        with torch.no_grad():
            wanted, theirs = self.teacher(batch.z, batch.sigma, batch.text, capture={f"{b}.hidden" for b in self.targets})
        velocity, ours = student(batch.z, batch.sigma, batch.text, capture=[f"{k}.hidden" for k in range(len(self.blocks))])
        flow = (velocity - batch.target).square().mean()
        match = (velocity - wanted).square().mean()
        features = sum(feature_loss(ours[f"{k}.hidden"], theirs[f"{b}.hidden"], self.limit) for k, b in enumerate(self.targets)) / len(self.blocks)
        total = (1 - self.alpha) * flow + self.alpha * match + self.beta * features
        return total, {"flow": flow.item(), "velocity": match.item(), "features": features.item()}


def train_flow(model, batches, config, *, loss=None, **trainer):
    """A `Trainer` that fits the model by its flow. batches(generator) -> (x0, text). Further keywords go to the Trainer."""
    loss = loss or FlowLoss()
    return Trainer(model, lambda net, step, generator: (loss(net, *batches(generator), generator), {}), config, **trainer)


def recover(student, teacher, blocks, batches, *, steps, flow_steps=300, config=None, loss=None, run=True, **trainer):
    """Recover a pruned student: `flow_steps` steps of flow matching alone, then distillation up to `steps`.

    blocks: see `DistillLoss`. batches(generator) -> (x0, text). config: a TrainConfig, default 5e-5 falling to 5e-6, EMA 0.9995. Returns the
    averaged student; with run=False the `Trainer`. Further keywords go to the Trainer.
    """
    if not 0 <= flow_steps <= steps:
        raise ValueError(f"flow_steps={flow_steps}: expected 0 to steps={steps}")
    config = config or TrainConfig(steps=steps, lr=5e-5, final_lr=0.1, ema=0.9995)
    distil = loss or DistillLoss(teacher, blocks)

    def objective(net, step, generator):
        if step < flow_steps:
            return distil.flow(net, *batches(generator), generator), {"stage": "flow"}
        value, parts = distil(net, *batches(generator), generator)
        return value, {"stage": "distil", **parts}

    made = Trainer(student, objective, config, **trainer)
    return made.run() if run else made
