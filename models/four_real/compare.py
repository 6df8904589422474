"""`vidkern demo four-real --compare`: every architecture of the paper, fine-tuned from one base model a seed, on held-out scenes.

As in the paper (arXiv 2506.18839, "Architecture comparison"), a base video model is trained first, on ordinary videos of one row or one
column with their first frame given. Each variant then starts from its weights and is fine-tuned on whole grids with both references; the
loss counts unseen cells alone. Two fair comparisons are made:

  parameters  every variant trains about as many parameters, for as many steps
  compute     every variant in its natural form, for as many steps as cost the same training FLOPs

A run's result is written as soon as it exists; the same command continues where it stopped.
"""

import dataclasses
import json
import os
import platform
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import vidkern
from vidkern._files import replacing
from vidkern.errors import UserError, import_extra

from ..shared.dit import BlockSpec, DiTConfig
from ..shared.flow import RectifiedFlow
from ..shared.metrics import psnr, ssim
from ..shared.page import rounded, write_json
from ..shared.train import TrainConfig, Trainer
from . import cost
from .baselines import baselines
from .codec import ReferenceCodec
from .conditioning import References
from .config import FourRealConfig
from .loss import FourRealLoss
from .mix import reversed_views
from .model import FourRealVideo, parameter_count
from .sample import generate
from .toy import ToySource

TOY = "toy"
CODEC = ReferenceCodec()  # for every variant alike, cells are coded as what differs from the mean of their references


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """What all runs share. data: a scene of `vidkern.data.scenes`, or "toy". size, patch: pixels. scenes: training scenes; seconds: between
    two rendered times.

    steps: fine-tuning steps of fused; batch: grids a step. eval_every: steps between two points of a curve. held_out: grids.
    reach: pixels by which the output layer may move the fixed-view frame (`blend`), 0 for a plain output layer; with that one a few hundred
    steps teach hardly more than to repeat the mean of the references.
    sigma_mean: noise times are logit-normal around it; sampling_shift: of the sampler, towards noise for the same reason as there.
    """

    data: str = "bounce"
    seeds: int = 3
    base_steps: int = 400
    base_batch: int = 8
    steps: int = 120
    batch: int = 4
    lr: float = 2e-3
    views: int = 4
    times: int = 4
    clip_times: int = 8
    size: int = 16
    patch: int = 4
    dim: int = 64
    heads: int = 4
    blocks: int = 4
    scenes: int = 384
    seconds: float = 0.2
    held_out: int = 32
    sampling_steps: int = 4
    sampling_shift: float = 4.0
    sigma_mean: float = 1.5
    eval_every: int = 30
    prediction: str = "x0"
    reach: int = 2

    def config(self):
        """The fused model of this size: references enter as in the paper, at their own cells alone, and attention carries them."""
        shifts = tuple((y, x) for y in (0, -self.reach, self.reach) for x in (0, -self.reach, self.reach)) if self.reach else ()
        outputs = 3 + (1 + len(shifts) if shifts else 0)
        dit = DiTConfig(channels=3, out_channels=outputs, patch=self.patch, dim=self.dim, heads=self.heads, t_max=16,
                        blocks=(BlockSpec(),) * self.blocks)
        return FourRealConfig(dit, prediction=self.prediction, blend_shifts=shifts)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant in one comparison. scope: what is trained, see `FourRealVideo.parameters_of`."""

    name: str
    budget: str
    variant: str
    scope: str = "both"
    positions: str = "collapsed"
    insert_every: int = 1

    def config(self, settings):
        return settings.config().variant(self.variant, positions=self.positions, insert_every=self.insert_every)


ENTRIES = (
    Entry("fused", "parameters", "fused"),
    Entry("fused, v + t", "parameters", "fused", positions="sum"),
    Entry("fused, learned view", "parameters", "fused", positions="learned"),
    Entry("full", "parameters", "full"),
    Entry("sequential_interleave", "parameters", "sequential_interleave"),
    # Column attentions in every second block: as many new parameters as the other variants train in all their attentions.
    Entry("sequential_insert", "parameters", "sequential_insert", "new", insert_every=2),
    Entry("parallel_hard", "parameters", "parallel_hard", "new"),
    Entry("parallel_soft", "parameters", "parallel_soft", "new"),
    Entry("parallel_light", "parameters", "parallel_light"),
    Entry("full", "compute", "full"),
    Entry("sequential_interleave", "compute", "sequential_interleave"),
    Entry("sequential_insert", "compute", "sequential_insert", "new"),
    Entry("parallel_hard", "compute", "parallel_hard"),
    Entry("parallel_soft", "compute", "parallel_soft"),
    Entry("parallel_light", "compute", "parallel_light"),
)


def file_name(entry, seed):
    """Name of a run's files, without suffix."""
    return f"{entry.budget}-{entry.name.replace(', ', '-').replace(' ', '')}-{seed}"


def open_source(settings, out):
    """Training and held-out grids; rendered scenes are kept in `out`."""
    if settings.data == TOY:
        return ToySource(settings.views, settings.times, settings.size, settings.clip_times)
    from .scenes import Pool, SceneSource

    pools = []
    for split, count in (("train", settings.scenes), ("held_out", settings.held_out)):
        path = out / f"{split}.pt"
        if path.is_file():
            pools.append(Pool(**torch.load(path, weights_only=True)))
        else:
            pools.append(Pool.render(settings.data, count, views=settings.clip_times, times=settings.clip_times, size=settings.size,
                                     split=split, step=settings.seconds))
            with replacing(path) as fresh:
                torch.save({"frames": pools[-1].frames, "cameras": pools[-1].cameras}, fresh)
    return SceneSource(*pools, settings.views, settings.times, settings.clip_times)


class ClipLoss:
    """Base training: videos [n, 1, T, ...] with their first frame given; every other frame counts."""

    def __init__(self, source, settings):
        self.source, self.settings = source, settings
        self.loss = FourRealLoss(reference_weight=0.0, sigma_mean=settings.sigma_mean)

    def __call__(self, model, step, generator):
        clips = self.source.clips(self.settings.base_batch, generator)
        references = References.from_grid(clips, "freeze_time")
        return self.loss(model, CODEC.encode(clips, references), references, generator), {}


class UnseenLoss:
    """Fine-tuning: grids with both references, in either order of views; unseen cells count."""

    def __init__(self, source, settings):
        self.source, self.settings = source, settings
        self.loss = FourRealLoss(reference_weight=0.0, sigma_mean=settings.sigma_mean)

    def __call__(self, model, step, generator):
        grid = reversed_views(self.source.train(self.settings.batch, generator), generator)
        references = References.from_grid(grid, "both")
        return self.loss(model, CODEC.encode(grid, references), references, generator), {}


class HeldOut:
    """Held-out grids with fixed noise and fixed noise times (quantiles of the training distribution)."""

    def __init__(self, source, settings):
        self.grids, self.settings = source.held_out(settings.held_out), settings
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.grids.shape, generator=generator)
        quantiles = (torch.arange(len(self.grids)) + 0.5) / len(self.grids)
        self.sigma = torch.sigmoid(settings.sigma_mean + torch.erfinv(2 * quantiles - 1) * 2**0.5)

    @torch.no_grad()
    def error(self, model):
        """Mean squared error of the velocity over unseen cells."""
        total = 0.0
        for grid, noise, sigma in zip(*(x.split(8) for x in (self.grids, self.noise, self.sigma))):
            references = References.from_grid(grid, "both")
            z0 = CODEC.encode(grid, references)
            v = model(RectifiedFlow().interpolate(z0, noise, sigma), sigma, references.frames, references.mask)
            total += (v - RectifiedFlow.velocity(z0, noise)).square()[~references.mask].mean().item() * len(grid)
        return total / len(self.grids)

    @torch.no_grad()
    def scores(self, model):
        """({"psnr", "psnr_expected", "ssim"} over unseen cells, the sampled first grid in [0, 1]).

        psnr, ssim: of samples. psnr_expected: of the picture that the network expects from pure noise, one evaluation.
        """
        sampled, expected = [], []
        for grid in self.grids.split(8):
            references = References.from_grid(grid, "both")
            for kept, steps in ((sampled, self.settings.sampling_steps), (expected, 1)):
                noise = torch.Generator().manual_seed(0)
                z = generate(model, references, steps=steps, shift=self.settings.sampling_shift, generator=noise)
                kept.append(CODEC.decode(z, references))
        truth, unseen = (self.grids + 1) / 2, ~references.mask[0]
        sampled, expected = (((torch.cat(x) + 1) / 2).clamp(0, 1) for x in (sampled, expected))
        values = {"psnr": psnr(sampled, truth), "psnr_expected": psnr(expected, truth)}
        if min(truth.shape[-2:]) >= 11:
            values["ssim"] = ssim(sampled, truth)
        shown = torch.where(references.mask[0][..., None, None, None], truth[0], sampled[0])
        return {name: value[:, unseen].mean().item() for name, value in values.items()}, shown

    def simple(self):
        """PSNR of the simple blends of the references, over unseen cells."""
        truth, unseen = (self.grids + 1) / 2, ~References.from_grid(self.grids[:1], "both").mask[0]
        return {name: psnr((grid + 1) / 2, truth)[:, unseen].mean().item() for name, grid in baselines(self.grids).items()}


def train_config(settings, steps, seed):
    """How every model of a comparison is trained."""
    return TrainConfig(steps=steps, lr=settings.lr, warmup=min(50, max(1, steps // 5)), ema=0.98, seed=seed)


def base_model(settings, source, seed, path, bar):
    """The base video model of a seed, trained or read back."""
    torch.manual_seed(seed)
    model = FourRealVideo(settings.config())
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        bar.update(settings.base_steps)
        return model
    trainer = Trainer(model, ClipLoss(source, settings), train_config(settings, settings.base_steps, seed), progress=False)
    for _ in range(settings.base_steps):
        trainer.one_step()
        bar.update()
    with replacing(path) as fresh:
        torch.save(trainer.averaged.state_dict(), fresh)
    return trainer.averaged


def prepared(entry, settings, base):
    """(model, trained parameters) of a run before its first step. base: None for random weights."""
    config = entry.config(settings)
    model = FourRealVideo(config) if base is None else FourRealVideo.from_base(base, config)
    trained = model.train_only(entry.scope)
    final = list(model.dit.final.requires_grad_(True).parameters())  # its mixture of references has no meaning in the base model
    return model, trained + final


def step_flops(entry, settings, source):
    """FLOPs of one training step, forward and backward, by torch's counter on the parameters that train."""
    model, _ = prepared(entry, settings, None)
    loss, _ = UnseenLoss(source, settings), vidkern.grid_attention  # an op must be known before counting begins
    with FlopCounterMode(display=False) as counter:
        loss(model, 0, torch.Generator().manual_seed(0))[0].backward()
    return counter.get_total_flops()


def plan(entries, settings, source):
    """[(entry, FLOPs of a step, steps)]: equal parameters take fused's steps, equal compute as many as cost the same."""
    flops = [step_flops(entry, settings, source) for entry in entries]
    fused = step_flops(ENTRIES[0], settings, source)
    return [(entry, f, settings.steps if entry.budget == "parameters" else max(1, round(settings.steps * fused / f)))
            for entry, f in zip(entries, flops)]


def run_one(entry, flops, steps, seed, settings, source, base, held_out, bar):
    """Fine-tune one variant. Returns (its record, the sampled grid to show)."""
    torch.manual_seed(1000 + seed)
    model, trained = prepared(entry, settings, base)
    trainer = Trainer(model, UnseenLoss(source, settings), train_config(settings, steps, seed), parameters=trained, progress=False)
    began = time.process_time()
    curve = [[0, held_out.error(model)]]
    for step in range(1, steps + 1):
        trainer.one_step()
        bar.update()
        if step % settings.eval_every == 0 or step == steps:
            curve.append([step, held_out.error(trainer.averaged)])
    scores, shown = held_out.scores(trainer.averaged)
    forward = cost.forward_flops(model.config, batch=1, views=settings.views, times=settings.times, size=(settings.size,) * 2)
    record = {**dataclasses.asdict(entry), "seed": seed, "steps": steps, "parameters": parameter_count(model),
              "trained_parameters": sum(p.numel() for p in trained), "forward_flops": sum(forward.values()), "step_flops": flops,
              "training_flops": flops * steps, "zero_shot": curve[0][1], "error": curve[-1][1], "curve": curve, **scores,
              "cpu_seconds": time.process_time() - began}
    return rounded(record), shown


def check_folder(out, settings):
    """The settings of the runs in `out` must be these; a new folder gets them."""
    path, ours = out / "settings.json", dataclasses.asdict(settings)
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise UserError(f"--out {out}: holds a comparison with {key}={theirs.get(key)!r}, this one has {value!r}; "
                                "choose another folder")
    write_json(path, ours)


def run_seed(seed, settings, out, source, planned, held_out, bar):
    """All runs of one seed that `out` does not hold yet; returns the records of all."""
    bar.set_description(f"seed {seed}: base video model")
    base, records = base_model(settings, source, seed, out / f"base-{seed}.pt", bar), []
    for entry, flops, steps in planned:
        path = out / "runs" / f"{file_name(entry, seed)}.json"
        if path.is_file():
            bar.update(steps)
        else:
            bar.set_description(f"seed {seed}: {entry.name}, equal {entry.budget}")
            result, shown = run_one(entry, flops, steps, seed, settings, source, base, held_out, bar)
            with replacing(path.with_suffix(".pt")) as fresh:
                torch.save(shown, fresh)
            write_json(path, result)
        records.append(json.loads(path.read_text()))
    return records


def compare(settings, out, *, command, entries=ENTRIES, progress=True):
    """Make or continue the comparison in the folder `out`; returns its record, of which `compare_report` makes tables and pictures.

    Runs depend on nothing but the settings and their seed, so several processes may work in one folder on different seeds.
    """
    check_folder(out, settings)
    (out / "runs").mkdir(exist_ok=True)
    source = open_source(settings, out)
    held_out, planned = HeldOut(source, settings), plan(entries, settings, source)
    total = settings.seeds * (settings.base_steps + sum(steps for _, _, steps in planned))
    with import_extra("tqdm", "a progress bar").tqdm(total=total, unit="step", disable=not progress) as bar:
        runs = [run for seed in range(settings.seeds) for run in run_seed(seed, settings, out, source, planned, held_out, bar)]
    return {
        "what": "architectures of 4Real-Video-V2, fine-tuned from one base video model a seed; scores on unseen cells of held-out grids",
        "command": command,
        "settings": dataclasses.asdict(settings),
        "baselines_psnr": rounded(held_out.simple()),
        "runs": runs,
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in runs)),
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "machine": platform.machine()},
    }
