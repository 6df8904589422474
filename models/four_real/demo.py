"""`vidkern demo`: train a small 4Real-Video-V2 on one clip or on procedural scenes, let it generate unseen cells, and show the result.

Steps: read the clip, and train on its first 70 % under random homographies; or, with --scene, render dynamic scenes with true cameras,
and train on some of them; generate held-out grids with the real sampler; compare with simple baselines; write pictures, metrics and a
report. Everything is resumable and every file appears whole or not at all. With --compare: see `compare`.
"""

import copy
import dataclasses
import math
import platform
import sys
import time

import torch

import vidkern
from vidkern._files import prepare_folder
from vidkern.data import bundled_clip
from vidkern.errors import UserError

from ..shared.metrics import psnr, ssim
from ..shared.train import Interrupted, TrainConfig, Trainer
from . import config, report
from .baselines import baselines
from .codec import ReferenceCodec
from .conditioning import References, draw_modes
from .data import open_clip
from .loss import FourRealLoss
from .mix import Curriculum, DataMix, reversed_views
from .model import FourRealVideo, parameter_count
from .sample import generate

SECONDS_PER_TIME = 0.27  # between two times of a grid: long enough that the freeze-time frame alone is a poor guess
MODE_MIX = (0.0, 0.0, 1.0, 0.0)  # both references always: in minutes, single references teach nothing but their own ambiguity
RECIPES = ("simple", "paper")
PAPER_MIX = {"scene": 0.6, "homography": 0.2, "static": 0.2}  # arXiv 2506.18839: 40 + 20 % dynamic, 20 % 2D-transformed, 20 % static
FOLDERS = {False: "vidkern-demo", True: "vidkern-compare"}


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What a run depends on; stored in the checkpoint and in metrics.json."""

    steps: int = 1200
    batch: int = 2
    lr: float = 1e-3
    sampling_steps: int = 4
    sampling_shift: float = 8.0
    sigma_mean: float = 2.5
    held_out_grids: int = 12
    seed: int = 0
    video: str = ""
    scene: str = ""
    scenes: int = 160
    recipe: str = "simple"
    device: str = "cpu"
    autocast: bool = False
    impl: str = "auto"


def add_arguments(parser):
    """Options of `vidkern demo`."""
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--video", help="a video file of your own; default: the bundled clip")
    data.add_argument("--scene", help="procedural scenes with true cameras in place of a video: bounce, orbit, boxes, mixed or robots")
    parser.add_argument("--recipe", choices=RECIPES, default="simple", help="with --scene: 'paper' mixes in homography videos, static"
                        " scenes, single references, and lengthens the clips midway (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="compare the paper's architectures instead, on --scene (default: bounce;"
                        " toy: drifting textures); an interrupted comparison continues when the command is repeated")
    parser.add_argument("--seeds", type=int, help="with --compare: runs of each variant (default: 3)")
    parser.add_argument("--record", help="with --compare: write the record to this JSON file too")
    parser.add_argument("--out", help="folder for the results (default: vidkern-demo, with --compare vidkern-compare; then the name of"
                        " --scene, and -quick)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"training steps (default: {DemoSettings.steps}); with --compare: fine-tuning steps")
    length.add_argument("--minutes", type=float, help="train for about this long instead; the number of steps is measured first")
    length.add_argument("--quick", action="store_true", help="a check of the plumbing in about a minute; the pictures mean nothing")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in the same folder")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training grids and noise (default: %(default)s)")
    parser.add_argument("--impl", help="force an attention backend, such as cpu or reference; default: vidkern's own choice")


def run(args):
    """Run the demo; returns the exit status. Raises UserError for what the user can mend."""
    check_scene(args)
    if args.compare:
        from . import compare_cli

        return compare_cli.run(args, prepare_folder(args.out or default_folder(args)))
    check_options(args)
    device = check_device(args.device)
    check_impl(args.impl, device)
    out = prepare_folder(args.out or default_folder(args))
    saved = load_checkpoint(out / "checkpoint.pt") if args.resume else None
    settings = initial_settings(args, saved)
    source, fps = open_source(settings)
    torch.manual_seed(settings.seed)
    model = FourRealVideo(config.demo()).to(device)
    loss = GridLoss(source, settings)
    if saved is None:
        settings = measure(settings, model, loss, args.minutes)
        loss = GridLoss(source, settings)
    trainer = Trainer(model, loss, train_config(settings), checkpoint=out / "checkpoint.pt", log=out / "train.jsonl",
                      settings={**dataclasses.asdict(settings), **source.identity()})
    if saved is not None:
        resume(trainer, saved)
    try:
        trainer.run()
    except Interrupted as stop:
        repeated = "".join(f" --{name} {getattr(settings, name)}" for name in ("video", "scene") if getattr(settings, name))
        repeated += f" --recipe {settings.recipe}" * (settings.recipe != "simple")
        print(f"vidkern: stopped after {stop.step} of {settings.steps} steps; continue with: vidkern demo --out {out} --resume{repeated}",
              file=sys.stderr)
        return 130
    result = evaluate(trainer.averaged.eval(), source, settings)
    metrics = summarise(result, settings, source, fps, trainer, explain(model, source, settings))
    report.write(out, result, metrics, fps)
    print(("a --quick run, whose numbers mean nothing: " if report.is_quick(metrics) else "") + report.headline(metrics))
    print(f"report: {out / 'report.html'}")
    return 0


def default_folder(args):
    """A folder of its own for each kind of run, so that none replaces another's results."""
    return "-".join([FOLDERS[args.compare], *([args.scene] if args.scene else []), *(["quick"] if args.quick else [])])


def check_impl(name, device):
    """UserError unless the attention backend `name` exists and serves this device."""
    if name is None:
        return
    q = torch.zeros(1, 1, 4, 8, device=device)
    try:
        vidkern.grid_attention(q, q, q, grid=(2, 2), impl=name)
    except (ValueError, vidkern.BackendUnavailable) as error:
        raise UserError(f"--impl {name}: {error}") from error


def check_scene(args):
    """UserError unless --scene is one."""
    if args.scene is None:
        return
    from vidkern.data.scenes import scene_names

    known = (*scene_names(), *["toy"] * args.compare)
    if args.scene not in known:
        raise UserError(f"--scene {args.scene}: expected one of {', '.join(known)}")


def check_options(args):
    """Options that need another one."""
    if args.recipe != "simple" and not args.scene:
        raise UserError(f"--recipe {args.recipe}: expected with --scene")
    for name in ("seeds", "record"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} {getattr(args, name)}: expected with --compare")


def open_source(settings):
    """(source of grids, times of a grid per second)."""
    if not settings.scene:
        source, fps = open_clip(settings.video or bundled_clip(), seconds_per_time=SECONDS_PER_TIME)
        return source, fps / source.stride
    from .scenes import Pool, SceneSource

    step, size = 0.2, (48, 64)
    pools = [Pool.render(settings.scene, count, views=4, times=8, size=size, split=split, step=step)
             for split, count in (("train", settings.scenes), ("held_out", settings.held_out_grids))]
    return SceneSource(*pools, name=settings.scene), 1 / step


def check_device(name):
    """The torch device `name`, proven to hold a tensor; UserError otherwise."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}") from error
    return device


def load_checkpoint(path):
    """Contents of a checkpoint; UserError if it is missing or unreadable."""
    if not path.is_file():
        raise UserError(f"--resume: {path} does not exist, expected the checkpoint of an interrupted run")
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise UserError(f"--resume: {path} cannot be read ({type(error).__name__}), expected a checkpoint of this demo") from error


def resume(trainer, saved):
    """Continue from a checkpoint; UserError if it belongs to other settings."""
    try:
        trainer.resume(saved)
    except (ValueError, KeyError) as error:
        raise UserError(f"--resume: {error}; repeat the options of the first run, or start anew without --resume") from error


def initial_settings(args, saved):
    """Settings from the command line; what a first run measured is taken from its checkpoint."""
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected at least 1")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes}: expected a positive number")
    known = {} if saved is None else saved.get("settings", {})
    for name in ("video", "scene"):
        given = getattr(args, name) or ""
        if known.get(name, given) != given:
            raise UserError(f"--resume: the first run had --{name} {known[name] or '(none)'}, this one has {given or '(none)'}; repeat its"
                            " options, or start anew without --resume")
    settings = DemoSettings(steps=args.steps or known.get("steps", DemoSettings.steps), seed=args.seed, device=args.device,
                            impl=args.impl or "auto", video=str(args.video or ""), autocast=known.get("autocast", False),
                            scene=args.scene or "", scenes=DemoSettings.scenes if args.scene else 0, recipe=args.recipe)
    if args.quick or (args.steps is None and known.get("held_out_grids") == 2):
        settings = dataclasses.replace(settings, steps=20, held_out_grids=2, sampling_steps=2, scenes=min(settings.scenes, 3))
    return settings


class GridLoss:
    """Draws training grids and computes the loss of a step; every random number comes from the trainer's generator."""

    def __init__(self, source, settings):
        self.source, self.settings, self.codec = source, settings, ReferenceCodec()
        self.impl = None if settings.impl == "auto" else settings.impl
        # Reference cells are known and easy: they count little, so that capacity goes to the cells that are asked for. Times near noise
        # are drawn most, where the picture must come from the references; the sampler's shift spends its steps there too.
        self.loss = FourRealLoss(reference_weight=0.1, sigma_mean=settings.sigma_mean)
        self.mix = self.curriculum = None
        if settings.recipe == "paper":
            clip, _ = open_clip(bundled_clip(), seconds_per_time=SECONDS_PER_TIME, views=source.views, times=source.times, size=source.size)
            self.mix, self.curriculum = DataMix({"scene": source, "homography": clip}, PAPER_MIX), Curriculum.halves(source.times)

    def draw(self, step, generator):
        """Grids and their modes for this step."""
        batch = self.settings.batch
        if self.mix is not None:
            return self.mix.draw(batch, generator, self.curriculum.times(step, self.settings.steps))
        grid = self.source.train(batch, generator)
        return reversed_views(grid, generator) if self.settings.scene else grid, draw_modes(batch, generator, MODE_MIX)

    def __call__(self, model, step, generator):
        grid, modes = self.draw(step, generator)
        grid = grid.to(self.settings.device)
        references = References.from_grid(grid, modes)
        return self.loss(model, self.codec.encode(grid, references), references, generator, impl=self.impl), {}


def train_config(settings):
    """The training loop's settings for this run."""
    return TrainConfig(steps=settings.steps, lr=settings.lr, warmup=min(20, settings.steps), seed=settings.seed, ema=0.99,
                       save_every=100, autocast="bf16" if settings.autocast else None)


def measure(settings, model, loss, minutes):
    """Time a few steps in fp32 and in bf16, take the faster, and say how long the run will take."""
    print("measuring the speed of this machine ...", flush=True)
    seconds = {}
    for autocast in (False, True):
        trial = dataclasses.replace(settings, steps=3, autocast=autocast)
        trainer = Trainer(copy.deepcopy(model), loss, train_config(trial), progress=False)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            trainer.one_step()
            times.append(time.perf_counter() - began)
        seconds[autocast] = min(times)
    autocast = min(seconds, key=seconds.get)
    steps = settings.steps if minutes is None else max(20, round(minutes * 60 / seconds[autocast]))
    # Sampling: forward passes alone, about a third of a training step for each grid, sampling step and grid of the batch.
    sampling = settings.held_out_grids * settings.sampling_steps / settings.batch * seconds[autocast] / 3
    total = (steps * seconds[autocast] + sampling + 10) / 60
    print(f"{parameter_count(model) / 1e6:.1f}M parameters, {steps} steps of {seconds[autocast]:.2f} s in {'bf16' if autocast else 'fp32'}:"
          f" about {total:.1f} minutes in total", flush=True)
    return dataclasses.replace(settings, steps=steps, autocast=autocast)


@torch.no_grad()
def evaluate(model, source, settings):
    """Generate the held-out grids from their references. Returns pixels in [0, 1], all [n, V, T, 3, h, w], and the mask [V, T]."""
    truth, codec = source.held_out(settings.held_out_grids), ReferenceCodec()
    noise = torch.Generator().manual_seed(settings.seed)
    generated = []
    for grid in truth.split(2):
        grid = grid.to(settings.device)
        references = References.from_grid(grid, "both")
        z = generate(model, references, steps=settings.sampling_steps, shift=settings.sampling_shift, generator=noise, progress=True,
                     autocast=torch.bfloat16 if settings.autocast else None, impl=None if settings.impl == "auto" else settings.impl)
        pixels = codec.decode(z, references).clamp(-1, 1)
        generated.append(torch.where(references.mask[..., None, None, None], grid, pixels).cpu())
    unit = {name: (value + 1) / 2 for name, value in baselines(truth).items()}
    return {"truth": (truth + 1) / 2, "model": (torch.cat(generated) + 1) / 2, "baselines": unit, "mask": references.mask[0].cpu()}


def explain(model, source, settings):
    """Which backend serves the model's attention, and why; text."""
    dit = model.config.dit
    tokens = source.views * source.times * (source.size[0] // dit.patch) * (source.size[1] // dit.patch)
    q = torch.empty(settings.batch, tokens, dit.heads, dit.dim // dit.heads, device=settings.device,
                    dtype=torch.bfloat16 if settings.autocast else torch.float32)
    impl = None if settings.impl == "auto" else settings.impl
    return str(vidkern.explain(vidkern.grid_attention, q, q, q, grid=(source.views, source.times), layout="blhd", impl=impl))


def summarise(result, settings, source, fps, trainer, backend):
    """Everything that metrics.json holds. PSNR and SSIM are means over unseen cells of all held-out grids."""
    truth, unseen, dit = result["truth"], ~result["mask"], trainer.model.config.dit
    filled = {"model": result["model"], **result["baselines"]}
    cells = {name: psnr(grid, truth).mean(0) for name, grid in filled.items()}
    means = {name: round(cell[unseen].mean().item(), 3) for name, cell in cells.items()}
    best = max(result["baselines"], key=means.get)
    pooled = {name: round(-10 * math.log10((grid - truth).square().mean((0, -3, -2, -1))[unseen].mean().item()), 3)
              for name, grid in filled.items()}
    per_grid = psnr(filled["model"], truth)[:, unseen].mean(1) - psnr(filled[best], truth)[:, unseen].mean(1)
    return {
        "psnr": means,
        "ssim": {name: round(ssim(grid, truth).mean(0)[unseen].mean().item(), 4) for name, grid in filled.items()},
        "psnr_of_mean_error": pooled,
        "best_baseline": best,
        "margin_db_over_best": round(means["model"] - means[best], 3),
        "margin_db_over_nearest": round(means["model"] - means["nearest"], 3),
        "margin_db_per_grid": [round(x, 2) for x in per_grid.tolist()],
        "psnr_per_cell": {name: [[None if result["mask"][v, t] else round(x, 2) for t, x in enumerate(row)]
                                 for v, row in enumerate(cells[name].tolist())] for name in ("model", best, "nearest")},
        "shown_grid": int(per_grid.argsort()[len(per_grid) // 2]),
        "settings": dataclasses.asdict(settings),
        **source.description(settings, fps),
        "model": {"parameters": parameter_count(trainer.model), "blocks": len(dit.blocks), "dim": dit.dim, "heads": dit.heads,
                  "patch": dit.patch},
        "training_seconds": round(trainer.seconds, 1),
        "attention_backend": backend,
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads()},
    }

