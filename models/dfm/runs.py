"""The runs behind `vidkern demo dfm`: DFM and its twin, plain flow matching, on the same pictures with the same compute.

The twin is the same network with one level: the same trunk, tokens, training code and sampler (with one level all of it is plain flow
matching). It trains as many steps as cost the same FLOPs, with the same seed, learning rate and order of pictures, and samples with as many
steps. A run's result is written as soon as it exists and a run that was stopped goes on from its checkpoint.
"""

import dataclasses
import json
import platform
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import vidkern
from vidkern._files import replacing
from vidkern.errors import UserError, import_extra

from ..shared.dit import BlockSpec, DiTConfig
from ..shared.page import rounded, write_json
from ..shared.train import TrainConfig, Trainer
from .config import DFMConfig
from .data import open_pictures
from .levels import level_std
from .loss import DFMLoss
from .model import DFM, parameter_count
from .sampler import sample
from .times import stage_weights

MODELS = ("dfm", "flow")
SHOWN = 60  # samples kept of every run for the pictures
PREVIEWS = 10
SAVE_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Of one data set, for both models but where it says otherwise.

    steps: of DFM; the twin's follow from the FLOPs. patch: side of a patch of the finest level. first: probability of the first stage.
    sampling: steps per phase; the twin takes their sum. samples: for the figure of quality. points: of the curves.
    """

    steps: int
    patch: int
    batch: int
    first: float
    levels: int = 2
    lr: float = 3e-3
    dim: int = 64
    heads: int = 4
    layers: int = 3
    thresholds: tuple = (0.9,)
    sampling: tuple = (15, 5)
    precond: bool = True
    ema: float = 0.995
    samples: int = 256
    points: int = 4


RECIPES = {"digits": Recipe(steps=400, patch=2, batch=64, first=0.5), "clip": Recipe(steps=300, patch=4, batch=16, first=0.7, points=2)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs share. factor: of every recipe's steps; steps: in place of them, if given."""

    data: tuple = ("digits", "clip")
    seeds: tuple = (0, 1, 2)
    factor: int = 1
    steps: int | None = None
    quick: bool = False

    def recipe(self, name):
        """The recipe of a data set under these settings."""
        recipe = RECIPES[name]
        if self.quick:
            recipe = dataclasses.replace(recipe, steps=12, batch=8, samples=60, sampling=(3, 2), points=2)
        return dataclasses.replace(recipe, steps=self.steps or recipe.steps * self.factor)


def config_of(model, recipe, pictures):
    """Configuration of "dfm" or of its twin, "flow"."""
    axis = (recipe.dim // recipe.heads - 4) // 4 * 2
    dit = DiTConfig(channels=pictures.train.shape[1], patch=recipe.patch, dim=recipe.dim, heads=recipe.heads, qk_norm="none",
                    blocks=(BlockSpec(attention="sdpa"),) * recipe.layers, rope_axes=(recipe.dim // recipe.heads - 2 * axis, axis, axis))
    levels = recipe.levels if model == "dfm" else 1
    plain = DFMConfig(dit, levels=levels, patch=recipe.patch >> (levels - 1), classes=pictures.classes)
    if not recipe.precond:
        return plain
    return dataclasses.replace(plain, std=tuple(rounded(level_std(pictures.train, plain))), precond=True)


def loss_of(config, recipe, seed):
    """The training loss of a run: stages drawn by the recipe (a plain model has one), noise and times by the seed."""
    return DFMLoss(config, weights=stage_weights(config.levels, recipe.first if config.levels > 1 else 1.0), seed=seed)


def step_flops(model, recipe, pictures):
    """FLOPs of a training step by torch's counter, averaged over the stages."""
    config = config_of(model, recipe, pictures)
    network, loss, total = DFM(config), loss_of(config, recipe, 0), 0.0
    x, labels = pictures.batch(recipe.batch, torch.Generator().manual_seed(0))
    loss(network, x, step=0, labels=labels, stage=1)    # ops must be known before counting begins
    for stage, weight in enumerate(loss.weights, 1):
        with FlopCounterMode(display=False) as counter:
            loss(network, x, step=0, labels=labels, stage=stage)[0].backward()
        total += weight * counter.get_total_flops()
    return total


def plan(name, settings, pictures):
    """{model: (FLOPs of a step, steps)} of equal compute."""
    recipe = settings.recipe(name)
    flops = {model: step_flops(model, recipe, pictures) for model in MODELS}
    return {model: (flops[model], max(1, round(recipe.steps * flops["dfm"] / flops[model]))) for model in MODELS}


class HeldOut:
    """Held-out pictures with fixed noise and times: the error of every level's velocity in its own stage."""

    def __init__(self, pictures, config, recipe, count):
        self.x, self.labels = pictures.held_out[:count], None if pictures.labels is None else pictures.held_out_labels[:count]
        self.loss, self.config = loss_of(config, recipe, 2**32), config
        generator = torch.Generator().manual_seed(1)
        quantiles = (torch.arange(len(self.x)) + 0.5) / len(self.x)
        self.times = []
        for stage in range(1, config.levels + 1):
            normal = torch.stack([torch.erfinv(2 * quantiles[torch.randperm(len(self.x), generator=generator)] - 1) * 2**0.5
                                  for _ in range(config.levels)], 1)
            normal[:, : stage - 1] += self.loss.loc
            self.times.append(torch.sigmoid(normal) * (torch.arange(config.levels) < stage))

    @torch.no_grad()
    def errors(self, model):
        """Mean squared error of the velocity of level s while s is the stage, coarse to fine."""
        return [self.loss.at(model, self.x, t, stage=s, labels=self.labels)[1][:, s - 1].mean().item() for s, t in enumerate(self.times, 1)]


def labels_of(pictures, count):
    """Labels asked for, all classes in turn, or None."""
    return torch.arange(count) % pictures.classes if pictures.classes else None


def generate(model, pictures, recipe, count, *, seed=0, callback=None):
    """Samples in -1 .. 1; their noise is none that training has seen."""
    single = model.pyramid.levels == 1
    steps, thresholds = ((sum(recipe.sampling),), ()) if single else (recipe.sampling, recipe.thresholds)
    shape = (count, *pictures.train.shape[1:])
    out = sample(model, shape, steps=steps, thresholds=thresholds, labels=labels_of(pictures, count), seed=2**40 + seed, callback=callback)
    return out.clamp(-1, 1)


def run_one(name, model, seed, flops, steps, settings, pictures, checkpoint, bar):
    """Train and judge one model. Returns (its record, {"samples", "previews"} for the pictures)."""
    recipe = settings.recipe(name)
    config = config_of(model, recipe, pictures)
    torch.manual_seed(seed)
    network, loss = DFM(config), loss_of(config, recipe, seed)
    held_out = HeldOut(pictures, config, recipe, 64 if settings.quick else 256)
    state = {"curve": [{"step": 0, "levels": held_out.errors(network.eval())}], "cpu_seconds": 0.0}

    def objective(net, step, generator):
        x, labels = pictures.batch(recipe.batch, generator)
        return loss(net, x, step=step, generator=generator, labels=labels)[0], {}

    train = TrainConfig(steps=steps, lr=recipe.lr, warmup=max(1, steps // 20), ema=recipe.ema, seed=seed, save_every=10**9)
    trainer = Trainer(network, objective, train, progress=False, settings={"name": name, "model": model})
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        trainer.resume(saved["trainer"])
        state = saved["state"]
        bar.update(trainer.step)
    marks = {max(1, round(steps * k / recipe.points)) for k in range(1, recipe.points + 1)}
    began, spent = time.process_time(), state["cpu_seconds"]
    network.train()
    while trainer.step < steps:
        trainer.one_step()
        bar.update()
        if trainer.step in marks:
            averaged = trainer.averaged.eval()
            quality = pictures.measure(generate(averaged, pictures, recipe, recipe.samples, seed=seed), labels_of(pictures, recipe.samples))
            state["curve"].append({"step": trainer.step, "levels": held_out.errors(averaged), **quality})
        if trainer.step in marks or trainer.step % SAVE_EVERY == 0:
            state["cpu_seconds"] = spent + time.process_time() - began
            with replacing(checkpoint) as fresh:
                torch.save({"trainer": trainer.state(), "state": state}, fresh)
    averaged, moments = trainer.averaged.eval(), []
    generate(averaged, pictures, recipe, PREVIEWS, seed=seed, callback=lambda m: moments.append((m.times, m.picture().clamp(-1, 1))))
    shown = {"samples": generate(averaged, pictures, recipe, SHOWN, seed=seed), "previews": moments}
    quality = {key: state["curve"][-1][key] for key in pictures.measure.floor}
    record = {"data": name, "model": model, "seed": seed, "steps": steps, "parameters": parameter_count(network), "step_flops": flops,
              "training_flops": flops * steps, "sampling_steps": sum(recipe.sampling), **quality, "curve": state["curve"],
              "cpu_seconds": state["cpu_seconds"]}
    return rounded(record), shown


def check_folder(out, settings):
    """The settings of the runs in `out` must be these; a new folder gets them."""
    path, ours = out / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise UserError(f"--out {out}: holds runs with {key}={theirs.get(key)!r}, these have {value!r}; choose another folder")
    write_json(path, ours)


def run_all(settings, out, *, command, progress=True, started=None):
    """Make or continue all runs in the folder `out`; returns the record. started: called with the number of steps before the first one."""
    check_folder(out, settings)
    (out / "runs").mkdir(exist_ok=True)
    sources = {name: open_pictures(name, quick=settings.quick) for name in settings.data}
    plans = {name: plan(name, settings, pictures) for name, pictures in sources.items()}
    total = len(settings.seeds) * sum(steps for planned in plans.values() for _, steps in planned.values())
    if started is not None:
        started(total, sources, plans)
    runs = []
    with import_extra("tqdm", "a progress bar").tqdm(total=total, unit="step", disable=not progress) as bar:
        for seed in settings.seeds:
            for name, pictures in sources.items():
                for model in MODELS:
                    bar.set_description(f"{name}, {model}, seed {seed}")
                    path = out / "runs" / f"{name}-{model}-{seed}.json"
                    flops, steps = plans[name][model]
                    if path.is_file():
                        bar.update(steps)
                    else:
                        checkpoint = path.with_suffix(".checkpoint.pt")
                        record, shown = run_one(name, model, seed, flops, steps, settings, pictures, checkpoint, bar)
                        with replacing(path.with_suffix(".pt")) as fresh:
                            torch.save(shown, fresh)
                        write_json(path, record)
                        checkpoint.unlink(missing_ok=True)
                    runs.append(json.loads(path.read_text()))
    return {
        "what": "Decomposable Flow Matching and plain flow matching, the same network and training compute; figures on held-out pictures",
        "command": command,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "recipes": {name: json.loads(json.dumps(dataclasses.asdict(settings.recipe(name)))) for name in settings.data},
        "measures": {name: {"what": pictures.measure.what, "floor": rounded(pictures.measure.floor)} for name, pictures in sources.items()},
        "runs": runs,
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in runs)),
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "machine": platform.machine()},
    }
