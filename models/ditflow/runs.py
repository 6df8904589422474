"""What `vidkern demo ditflow` and `vidkern motion` run: the tiny model (trained once), its guidance block, transfers, and how they are measured."""

import dataclasses
import hashlib
import json

import torch

from vidkern._files import prepare_folder, replacing
from vidkern.errors import UserError, import_extra
from vidkern.verified import cache_dir

from ..shared.flow import RectifiedFlow, logit_normal_sigma
from ..shared.page import write_json
from ..shared.train import TrainConfig, Trainer
from . import data, losses, probe, tracking
from .adapter import TinyAdapter
from .config import GuidanceConfig
from .guidance import MotionGuidance
from .model import TinyVideoDiT, tiny
from .sampler import FlowSampler, transfer
from .taps import QK

METHODS = {"backbone": "no guidance", "injection": "injection alone", "latent": "DiTFlow, latent", "positions": "DiTFlow, positions",
           "smm": "SMM", "moft": "MOFT"}
MOTIONS = ((4, 0), (-4, 0), (0, 4), (0, -4), (4, 4), (-4, -4))     # pixels a frame of the known references; a patch is 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of a run. steps, batch, lr, ema: of training; shown: share of its frames that are given without noise.
    sampling: steps. updates, rates: of guidance; position_rates: of the tables."""

    dim: int = 64
    heads: int = 2
    blocks: int = 4
    steps: int = 1200
    batch: int = 8
    lr: float = 5e-3
    ema: float = 0.99
    shown: float = 0.4
    probes: int = 12
    sampling: int = 20
    share: float = 0.5
    updates: int = 5
    rates: tuple = (0.02, 0.01)
    position_rates: tuple = (0.02, 0.01)
    references: int = 6

    def quick(self):
        """A check of the plumbing."""
        return dataclasses.replace(self, steps=8, batch=4, probes=4, sampling=6, updates=2, references=2)

    def name(self, seed):
        """File name of the trained model: another recipe is another file."""
        told = json.dumps([self.dim, self.heads, self.blocks, self.steps, self.batch, self.lr, self.ema, self.shown, seed, data.FRAMES, data.SIZE, data.HEIGHTS,
                           data.STRIDES])
        return f"ditflow-tiny-{hashlib.sha256(told.encode()).hexdigest()[:12]}.pt"

    def model(self):
        return TinyVideoDiT(tiny(channels=3, patch=data.PATCH, dim=self.dim, heads=self.heads, blocks=self.blocks,
                                 rope_axes=(8, 12, 12), classes=len(data.bundled_clips())))


def flow_loss(batch, shown):
    """Rectified flow on training windows, over the frames that are noisy.

    A frame is given without noise with probability `shown`: what noise hides in the others is to be found there, so that attention learns what
    lies where. From noisy frames alone so small a model hardly does in minutes (0.53 instead of 0.86 of correlation with known motion).
    """
    def loss(model, step, generator):
        x0, labels = data.batch(batch, generator)
        sigma = logit_normal_sigma(batch, generator)
        noise = torch.randn(x0.shape, generator=generator)
        given = torch.rand(x0.shape[:2], generator=generator) < shown
        given &= ~given.all(1, keepdim=True)
        noisy = ~given[:, :, None, None, None]
        v = model(torch.where(noisy, RectifiedFlow().interpolate(x0, noise, sigma), x0), sigma, labels)
        error = (v - RectifiedFlow.velocity(x0, noise)).square()
        return (error * noisy).mean() / noisy.float().mean(), {}

    return loss


def trainer_of(recipe, seed, **options):
    torch.manual_seed(seed)
    train = TrainConfig(steps=recipe.steps, lr=recipe.lr, warmup=max(1, recipe.steps // 20), final_lr=0.05, ema=recipe.ema, seed=seed, save_every=100)
    return Trainer(recipe.model(), flow_loss(recipe.batch, recipe.shown), train, **options)


def model_of(recipe, seed, folder, progress=True):
    """The trained model: read from `folder`, or trained (from its checkpoint, if a training was stopped) and kept there."""
    path = folder / recipe.name(seed)
    trainer = trainer_of(recipe, seed, checkpoint=path.with_suffix(".checkpoint.pt"), progress=progress)
    if not path.is_file():
        if trainer.checkpoint.is_file():
            trainer.resume(trainer.checkpoint)
        trainer.run()
        with replacing(path) as fresh:
            torch.save(trainer.averaged.state_dict(), fresh)
        trainer.checkpoint.unlink(missing_ok=True)
    trainer.averaged.load_state_dict(torch.load(path, weights_only=True))
    return trainer.averaged.eval()


def user_folder():
    """Where the trained model is kept between runs."""
    try:
        return prepare_folder(cache_dir() / "models")
    except UserError as error:
        raise UserError(f"{cache_dir() / 'models'}: cannot be written, expected a folder for the trained model (set VIDKERN_CACHE)") from error


def null_label():
    """The condition of no label."""
    return torch.tensor([len(data.sources())])


def probes(recipe, seed):
    """[(latent [1, ...], motion in patches)]: held-out stills with a window that moves by whole patches."""
    generator, clips = torch.Generator().manual_seed(40_000 + seed), data.sources()
    made = []
    for i in range(recipe.probes):
        motion = MOTIONS[i % len(MOTIONS)]
        made.append((clips[i // len(MOTIONS) % len(clips)].draw(generator, height=64, motion=motion, stride=0, held_out=True)[None],
                     tuple(m / data.PATCH for m in motion)))
    return made


def choose_block(adapter, clips, tau=2.0):
    """(guidance blocks, scores of all blocks) by known translations; the best block where none of them is good enough by `select_block`."""
    scores = probe.score_blocks(adapter, clips, condition=null_label(), config=GuidanceConfig(blocks=(0,), inject=(), tau=tau))
    try:
        return probe.select_block(scores), scores
    except ValueError:
        return (scores[0].block,), scores


@dataclasses.dataclass(frozen=True)
class Reference:
    """clip: [F, 3, h, w] in -1 .. 1. label: its source; target: the source that is asked for. motion: known, pixels a frame, or None."""

    name: str
    clip: torch.Tensor
    label: int
    target: int
    motion: tuple | None


def references(recipe, seed):
    """Held-out clips to take motion from: pans of known motion, and every third one the clip's own motion."""
    generator, clips, made = torch.Generator().manual_seed(50_000 + seed), data.sources(), []
    for i in range(recipe.references):
        label = i % len(clips)
        own = i % 3 == 2
        motion = (0, 0) if own else MOTIONS[(i - i // 3) % len(MOTIONS)]
        clip = clips[label].draw(generator, height=64, motion=motion, stride=3 if own else 0, held_out=True)
        name = f"{clips[label].name}, " + ("its own motion" if own else f"moved by ({motion[0]}, {motion[1]})")
        made.append(Reference(name, clip, label, (label + 1) % len(clips), None if own else motion))
    return made


def config_of(method, recipe, blocks):
    """The `GuidanceConfig` of one of METHODS."""
    shared = {"blocks": blocks, "share": recipe.share, "updates": recipe.updates, "lr": recipe.rates}
    return {
        "backbone": GuidanceConfig(**{**shared, "share": 0.0, "optimise": "none", "inject": ()}),
        "injection": GuidanceConfig(**{**shared, "optimise": "none"}),
        "latent": GuidanceConfig(**shared),
        "positions": GuidanceConfig(**{**shared, "optimise": "positions", "lr": recipe.position_rates}),
        "smm": GuidanceConfig(**{**shared, "signal": "smm", "inject": ()}),
        "moft": GuidanceConfig(**{**shared, "signal": "moft", "inject": (), "channels": 0.1}),
    }[method]


def noise_of(recipe, seed, index):
    """The noise that the samples of reference number `index` start from, the same for every method."""
    return torch.randn(1, data.FRAMES, 3, *data.SIZE, generator=torch.Generator().manual_seed(60_000 + 1000 * seed + index))


def generate(adapter, reference, method, recipe, blocks, noise):
    """(clip [F, 3, h, w] in -1 .. 1, losses of the guided steps)."""
    sampler = FlowSampler(recipe.sampling)
    guide = MotionGuidance(adapter, config_of(method, recipe, blocks), add_noise=sampler.add_noise)
    guide.extract(reference.clip[None], null_label())
    made = transfer(guide, sampler, noise, condition=torch.tensor([reference.target]))
    return made[0].clamp(-1, 1), [step["losses"] for step in guide.history]


@torch.no_grad()
def flow_of(adapter, clip, block, mode="hard", tau=2.0):
    """Flow [F * F, S, 2] of a clean clip [F, 3, h, w]."""
    config = GuidanceConfig(blocks=(block,), inject=(), tau=tau)
    pair = adapter.features(clip[None], 0.0, null_label(), {block: (QK,)})[block, QK]
    return losses.flow_of(*pair, config, adapter.grid(clip[None]), mode=mode, n_text=adapter.n_text(None))


@torch.no_grad()
def measured(adapter, made, reference, blocks):
    """What can be said of a generated clip: see `report.MEASURES`."""
    wanted, got = (flow_of(adapter, clip, blocks[0]) for clip in (reference.clip, made))
    soft = flow_of(adapter, made, blocks[0], "soft")
    mask = wanted.norm(dim=-1) > 0
    row = {"loss": float((soft - wanted)[mask].square().mean()) if mask.any() else 0.0, "agreement": tracking.agreement(got, wanted, mask)}
    pixels, shown = ((x + 1) / 2 for x in (made, reference.clip))
    row["fidelity"] = tracking.fidelity(pixels, shown, radius=6)
    moved = tracking.mean_motion(pixels, radius=6)
    row["tracked"] = None if moved is None else moved.tolist()
    if reference.motion is not None:
        wanted = torch.tensor(reference.motion, dtype=torch.float32)
        moved = torch.zeros(2) if moved is None else moved
        row["error"] = float((moved - wanted).norm())
        row["follows"] = bool(moved @ wanted >= 0.5 * wanted @ wanted and float((moved - wanted).norm()) <= float(wanted.norm()))
    return row


def check_folder(out, settings):
    """The settings of what lies in `out` must be these; a new folder gets them."""
    path, ours = out / "settings.json", json.loads(json.dumps(settings))
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key in sorted(set(ours) | set(theirs)):
            if theirs.get(key) != ours.get(key):
                raise UserError(f"--out {out}: holds a run with {key}={theirs.get(key)!r}, this one has {ours.get(key)!r}; choose another folder")
    write_json(path, ours)


def transfers(adapter, recipe, seed, blocks, out, progress=True):
    """[(row, clip)] of all methods and references, those done before read from `out`."""
    (out / "transfers").mkdir(exist_ok=True)
    wanted = [(i, ref, method) for i, ref in enumerate(references(recipe, seed)) for method in METHODS]
    done = []
    for i, ref, method in import_extra("tqdm", "a progress bar").tqdm(wanted, desc="transfers", leave=False, disable=not progress):
        path = out / "transfers" / f"{i}-{method}.pt"
        if not path.is_file():
            clip, steps = generate(adapter, ref, method, recipe, blocks, noise_of(recipe, seed, i))
            row = {"reference": i, "name": ref.name, "method": method, "motion": ref.motion, "guided": steps, **measured(adapter, clip, ref, blocks)}
            with replacing(path) as fresh:
                torch.save({"row": row, "clip": clip}, fresh)
        saved = torch.load(path, weights_only=True)
        done.append((saved["row"], saved["clip"]))
    return done
