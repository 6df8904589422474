"""The stages behind `vidkern demo mobile`: train a teacher, prune it, recover the rest by distillation, distil that to four steps."""

import copy
import dataclasses
import json

import torch

from vidkern._files import replacing
from vidkern.errors import UserError

from ..shared.page import write_json
from ..shared.train import TrainConfig
from .adversarial import StepConfig, StepDistiller, synthesise
from .config import tiny_teacher
from .cutting import compact
from .data import open_clips, words
from .discriminator import Discriminator
from .model import MobileDiT
from .pruning import prune
from .recovery import DistillLoss, recover, train_flow
from .sampler import sample
from .sensitivity import Calibration


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of a run at toy size. *_steps: optimiser steps. budget: share of the teacher's parameters. recover_flow: steps of flow matching
    before distillation. pool: teacher samples for the last stage. guidance: of 40-step sampling and of the teacher in the last stage."""

    channels: int = 32
    clips: int = 2048
    teacher_steps: int = 1000
    batch: int = 32
    lr: float = 4e-3
    ema: float = 0.99
    budget: float = 0.45
    calibration: int = 8
    times: int = 8
    recover_steps: int = 250
    recover_flow: int = 40
    recover_lr: float = 1e-3
    distil_steps: int = 150
    distil_lr: float = 3e-4
    heads_lr: float = 1e-3
    width: int = 64
    pool: int = 128
    steps: int = 40
    guidance: float = 3.0
    samples: int = 128

    def quick(self):
        """A check of the plumbing."""
        return dataclasses.replace(self, clips=64, teacher_steps=6, batch=8, calibration=2, times=2, recover_steps=4, recover_flow=2,
                                   distil_steps=3, width=16, pool=8, steps=6, samples=16)


def open_data(recipe, seed):
    """The moving shapes of a recipe."""
    return open_clips(train=recipe.clips, held_out=max(64, recipe.clips // 4), channels=recipe.channels, seed=seed)


def train_config(recipe, steps, lr, seed):
    """How every stage of a recipe is trained."""
    return TrainConfig(steps=steps, lr=lr, warmup=max(1, steps // 20), final_lr=0.1, ema=recipe.ema, seed=seed, save_every=50)


def teacher_trainer(recipe, clips, seed, config=None, steps=None, **trainer):
    """A Trainer of the teacher, or of another configuration from scratch."""
    torch.manual_seed(seed)
    model = MobileDiT(config or tiny_teacher(channels=recipe.channels))
    train = train_config(recipe, steps or recipe.teacher_steps, recipe.lr, seed)
    return train_flow(model, lambda g: clips.batch(recipe.batch, g), train, **trainer)


def calibration_of(recipe, clips, seed=0):
    """The calibration that units are scored on, from training clips."""
    n = recipe.calibration
    return Calibration.of(clips.train[:n], clips.vocabulary(clips.said[:n]), times=recipe.times, seed=seed)


def held_out_of(recipe, clips):
    """A larger calibration on held-out clips, for figures."""
    n = min(4 * recipe.calibration, len(clips.held_out))
    return Calibration.of(clips.held_out[:n], clips.vocabulary(clips.held_out_said[:n]), times=8, seed=1)


@torch.no_grad()
def flow_error(model, calibration):
    """Mean squared error of the velocity of the data."""
    return float((calibration.velocities(model.eval()) - calibration.target).double().square().mean())


def pruned(teacher, recipe, clips, *, how="auto", seed=0, remeasure=True, progress=False):
    """(keep, cut model) at the recipe's budget."""
    keep = prune(teacher, budget=recipe.budget, calibration=calibration_of(recipe, clips), how=how, seed=seed, remeasure=remeasure, progress=progress)
    return keep, compact(teacher, keep)


def recovery_trainer(student, teacher, keep, recipe, clips, seed, steps=None, **trainer):
    """A Trainer that recovers a copy of the student."""
    steps = recipe.recover_steps if steps is None else steps
    loss = DistillLoss(teacher, keep.blocks)
    return recover(copy.deepcopy(student), teacher, keep.blocks, lambda g: clips.batch(recipe.batch, g), steps=steps,
                   flow_steps=min(recipe.recover_flow, steps), config=train_config(recipe, steps, recipe.recover_lr, seed), loss=loss, run=False,
                   **trainer)


def teacher_pool(teacher, recipe, clips, seed, progress=False):
    """Synthetic data: (latents, text) of the guided teacher."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    text = clips.vocabulary(words(recipe.pool, generator))
    return synthesise(teacher, text, tuple(clips.train.shape[1:]), steps=recipe.steps, guidance=recipe.guidance, generator=generator,
                      progress=progress)


def distiller(student, teacher, recipe, seed):
    """A StepDistiller for a copy of the student."""
    torch.manual_seed(seed)
    config = StepConfig(guidance=recipe.guidance, lr_student=recipe.distil_lr, lr_heads=recipe.heads_lr)
    return StepDistiller(copy.deepcopy(student).train().requires_grad_(True), teacher, Discriminator(teacher, width=recipe.width), config)


@torch.no_grad()
def generate(model, clips, count, *, steps, guidance=1.0, seed=0, callback=None):
    """(latents, prompts [count, 3]): the same prompts and noise for every model."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    said = words(count, generator)
    noise = torch.randn(count, *clips.train.shape[1:], generator=generator)
    text = clips.vocabulary(said)
    made = [sample(model.eval(), z.shape, words_of, steps=steps, guidance=guidance, noise=z, callback=callback)
            for z, words_of in zip(noise.split(64), text.split(64))]
    return torch.cat(made), said


def check_folder(out, settings):
    """The settings of what lies in `out` must be these; a new folder gets them."""
    path, ours = out / "settings.json", json.loads(json.dumps(settings))
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key in sorted(set(ours) | set(theirs)):
            if theirs.get(key) != ours.get(key):
                raise UserError(f"--out {out}: holds a run with {key}={theirs.get(key)!r}, this one has {ours.get(key)!r}; choose another folder")
    write_json(path, ours)


def trained(trainer, path):
    """The averaged model of a Trainer: from `path` if it is done, else trained from its checkpoint or from the start, and kept in `path`."""
    if path.is_file():
        trainer.averaged.load_state_dict(torch.load(path, weights_only=True))
        return trainer.averaged.eval()
    checkpoint = path.with_suffix(".checkpoint.pt")
    trainer.checkpoint = checkpoint
    if checkpoint.is_file():
        trainer.resume(checkpoint)
    model = trainer.run().eval()
    with replacing(path) as fresh:
        torch.save(model.state_dict(), fresh)
    checkpoint.unlink(missing_ok=True)
    return model
