"""Toy grids in which both references are needed, and the small experiment on them that tells the paper's architectures apart.

A drifting blob before a texture, seen with parallax: view v moves the texture by v * parallax pixels and the blob by twice that; the blob
also moves with time. The parallax can be seen in the freeze-time frames alone and the motion in the fixed-view frames alone, so an unseen
cell follows only from the two together.

``python -m vidkern.models.four_real.toy --record FILE`` trains a base video model of 0.3M parameters a seed on clips of one row or one
column, makes a 4D model of it in four ways, and measures each on unknown cells before and after a short fine-tuning: does an architecture
use the base model's layers as they were trained (arXiv 2506.18839, "Architecture")? About three minutes of one core a seed.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import platform
import time

import torch

import vidkern
from vidkern.errors import import_extra

from ..shared.flow import RectifiedFlow
from ..shared.page import rounded, write_json
from ..shared.train import TrainConfig, Trainer
from .conditioning import References
from .config import tiny
from .loss import FourRealLoss
from .model import FourRealVideo

HELD_OUT_SEED = 2_000_003


@dataclasses.dataclass(frozen=True)
class ToySource:
    """views, times: of a grid. size: side of a frame in pixels. clip_times: frames of a clip. contrast: least and greatest amplitude of the
    texture in a channel; pixels are in [-1, 1]. Made on the fly from the generator."""

    views: int = 4
    times: int = 4
    size: int = 8
    clip_times: int = 8
    contrast: tuple = (0.2, 0.6)

    def _frames(self, n, generator, view, time):
        """[n, *shape, 3, size, size] in [-1, 1] for indices `view`, `time` of one shape; all else is drawn per sample."""
        def draw(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        scale = self.size / 8
        parallax, start = draw(2, low=-0.8, high=0.8) * scale, draw(2, low=2.0, high=6.0) * scale
        velocity, colour = draw(2, low=-0.8, high=0.8) * scale, draw(3, low=-1.0)
        wave, phase = draw(2, low=-1.0) * (2 * math.pi / (4 * scale)), draw(3, high=2 * math.pi)
        tint = draw(3, low=self.contrast[0], high=self.contrast[1])
        per = (slice(None),) + (None,) * view.ndim
        view, time = view[None, ..., None], time[None, ..., None]
        shift = view * parallax[per]
        centre = start[per] + time * velocity[per] + 2 * shift
        y, x = torch.meshgrid(*(torch.arange(self.size, dtype=torch.float32),) * 2, indexing="ij")
        place = torch.stack((y, x), -1)
        at = place - shift[..., None, None, :]
        angle = (at * wave[per][..., None, None, :]).sum(-1)
        texture = tint[per][..., None, None] * torch.sin(angle[..., None, :, :] + phase[per][..., None, None])
        blob = torch.exp(-(place - centre[..., None, None, :]).square().sum(-1) / (2 * (1.2 * scale) ** 2))[..., None, :, :]
        return texture * (1 - blob) + colour[per][..., None, None] * blob

    def train(self, n, generator):
        """n grids [n, V, T, 3, size, size]."""
        view, time = torch.meshgrid(torch.arange(float(self.views)), torch.arange(float(self.times)), indexing="ij")
        return self._frames(n, generator, view, time)

    def clips(self, n, generator):
        """n ordinary videos [n, 1, clip_times, 3, size, size]: half of them with a fixed view, half with a frozen time."""
        moving, still = torch.arange(float(self.clip_times)), torch.zeros(self.clip_times)
        fixed, frozen = self._frames(n - n // 2, generator, still, moving), self._frames(n // 2, generator, moving, still)
        return torch.cat((fixed, frozen))[:, None]

    def held_out(self, n):
        """The same n grids on every call, from a seed of their own."""
        return self.train(n, torch.Generator().manual_seed(HELD_OUT_SEED))

@dataclasses.dataclass(frozen=True)
class ToySettings:
    """Settings of the toy experiment. base_steps, steps: of the base model and of fine-tuning, both with `batch` samples, AdamW (`betas`) at `lr` after
    `warmup` steps, then constant, no average of weights. held_out: grids (and clips) of the validation. `config()` is the network."""

    base_steps: int = 1200
    steps: int = 250
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 100
    betas: tuple = (0.9, 0.999)
    held_out: int = 128
    contrast: tuple = (0.5, 1.0)

    def source(self):
        return ToySource(contrast=self.contrast)

    @staticmethod
    def config():
        """`config.tiny`, fused: 66,688 attention parameters; velocity in plain pixels, plain output layer."""
        return tiny()

    def training(self, steps, seed):
        return TrainConfig(steps=steps, lr=self.lr, warmup=self.warmup, final_lr=1.0, betas=self.betas, ema=0.0, seed=seed)


# Variant and what of it trains: all self-attentions, or of the two streams their synchronisation alone.
VARIANTS = {"fused": "attention", "full": "attention", "sequential_interleave": "attention", "parallel_soft": "new"}

# What is asserted of every run: a variant's error before (0) or after (1) fine-tuning must exceed that of fused by more than the margin.
CLAIMS = {
    "before: fused < parallel_soft": ("parallel_soft", 0, 0.0),
    "before: fused + 0.05 < sequential_interleave": ("sequential_interleave", 0, 0.05),
    "after: fused < full": ("full", 1, 0.0),
    "after: fused < parallel_soft": ("parallel_soft", 1, 0.0),
}


def holds(errors):
    """{claim: bool} of one seed's errors {variant: [before, after]}."""
    return {claim: errors["fused"][when] + margin < errors[name][when] for claim, (name, when, margin) in CLAIMS.items()}


def validation_error(model, samples, mode, given=True):
    """Velocity MSE on the cells that are no references, with fixed noise and fixed noise times (quantiles of the training distribution).

    samples [n, V, T, 3, H, W]. model: None predicts a velocity of zero. given: False withholds the references.
    """
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    quantiles = (torch.arange(len(samples)) + 0.5) / len(samples)
    sigma, total = torch.sigmoid(torch.special.ndtri(quantiles)), 0.0
    for z0, eps, s in zip(samples.split(16), noise.split(16), sigma.split(16)):
        references = References.from_grid(z0, mode)
        shown = references if given else references.dropped()
        with torch.no_grad():
            v = 0 if model is None else model(RectifiedFlow().interpolate(z0, eps, s), s, shown.frames, shown.mask)
        total += (v - RectifiedFlow.velocity(z0, eps)).square()[~references.mask].mean().item() * len(z0)
    return total / len(samples)


def _train(model, draw, mode, weight, config):
    """Train in place on draw(n, generator) with its references of a mode; weight: of the reference cells in the loss."""
    loss = FourRealLoss(reference_weight=weight)

    def step(model, index, generator):
        z0 = draw(generator)
        return loss(model, z0, References.from_grid(z0, mode), generator), {}

    Trainer(model, step, config, progress=False).run()


def train_base(seed, settings):
    """(base model, its errors, CPU seconds): dense attention, single-row clips, their first frame given, the loss on every frame."""
    began, source = time.process_time(), settings.source()
    torch.manual_seed(seed)
    model = FourRealVideo(settings.config().variant("full"))
    _train(model, lambda g: source.clips(settings.batch, g), "freeze_time", 1.0, settings.training(settings.base_steps, seed))
    clips = source.clips(settings.held_out, torch.Generator().manual_seed(HELD_OUT_SEED))
    errors = {"first_frame_given": validation_error(model, clips, "freeze_time"),
              "first_frame_withheld": validation_error(model, clips, "freeze_time", given=False),
              "zero_velocity": validation_error(None, clips, "freeze_time")}
    return model, errors, time.process_time() - began


def fine_tune(name, seed, settings, base):
    """{"errors": [before, after], ...} of a variant on the held-out grids: both references given, the loss on unknown cells alone."""
    began, source = time.process_time(), settings.source()
    torch.manual_seed(seed)
    model = FourRealVideo.from_base(base, settings.config().variant(name))
    model.train_only(VARIANTS[name])
    model.references.requires_grad_(False)  # trained with the base already
    grids = source.held_out(settings.held_out)
    before = validation_error(model, grids, "both")
    _train(model, lambda g: source.train(settings.batch, g), "both", 0.0, settings.training(settings.steps, seed))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"errors": [before, validation_error(model, grids, "both")], "trained_parameters": trained, "cpu_seconds": time.process_time() - began}


def run(seeds, processes=1, settings=ToySettings(), progress=True):
    """The experiment, one record a seed. Every model trains on one thread of a process of its own pool, whose size is `processes`."""
    bar = import_extra("tqdm", "a progress bar").tqdm(total=len(seeds) * (1 + len(VARIANTS)), unit="model", disable=not progress)
    spawn = multiprocessing.get_context("spawn")
    with bar, concurrent.futures.ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        bases = {pool.submit(train_base, seed, settings): seed for seed in seeds}
        records, tuning = {}, {}
        for done in concurrent.futures.as_completed(bases):
            seed, (base, errors, seconds) = bases[done], done.result()
            records[seed] = {"seed": seed, "base": rounded(errors, 4), "variants": {}, "cpu_seconds": seconds}
            tuning |= {pool.submit(fine_tune, name, seed, settings, base): (seed, name) for name in VARIANTS}
            bar.update()
        for done in concurrent.futures.as_completed(tuning):
            seed, name = tuning[done]
            result = done.result()
            records[seed]["cpu_seconds"] += result.pop("cpu_seconds")
            records[seed]["variants"][name] = rounded(result, 4)
            bar.set_postfix_str(f"seed {seed}, {name}: {result['errors'][0]:.3f}, {result['errors'][1]:.3f}", refresh=False)
            bar.update()
    for record in records.values():
        record["cpu_seconds"] = round(record["cpu_seconds"])
        record["variants"] = {name: record["variants"][name] for name in VARIANTS}
        record["holds"] = holds({name: variant["errors"] for name, variant in record["variants"].items()})
    return [records[seed] for seed in seeds]


def main(arguments=None):
    """Run the experiment from the command line and write its record."""
    parser = argparse.ArgumentParser(prog="python -m vidkern.models.four_real.toy", description=main.__doc__)
    parser.add_argument("--record", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--processes", type=int, default=1, help="models trained at a time, each on one thread (default 1)")
    args = parser.parse_args(arguments)
    for name in ("seeds", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    settings = ToySettings()
    runs = run(range(args.seeds), args.processes, settings)
    write_json(args.record, {
        "what": "velocity MSE on the unknown cells of held-out toy grids, [before, after] fine-tuning, from one base model a seed",
        "command": f"python -m vidkern.models.four_real.toy --record {args.record}",
        "settings": dataclasses.asdict(settings), "runs": runs,
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "machine": platform.machine()}})


if __name__ == "__main__":
    main()
