"""`vidkern demo mobile`: train a small text-to-video model on moving shapes, prune it, recover it, distil it to four steps, and show all stages.

Every stage is written as soon as it is done and trainings keep checkpoints: the same command continues a stopped run. With --ablation: how well
units are chosen, see `ablation`.
"""

import dataclasses
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

import vidkern
from vidkern._files import prepare_folder, replacing
from vidkern.errors import UserError, import_extra

from ..shared.page import rounded
from ..shared.train import Interrupted
from . import ablation, report, runs
from .adversarial import mix
from .cutting import compact, pack
from .keep import Keep
from .latency import medians
from .model import parameter_count
from .quality import Measure
from .sampler import sample
from .sensitivity import distance

FOLDERS = {False: "vidkern-mobile", True: "vidkern-mobile-ablation"}
SHOWN = 8


def add_arguments(parser):
    """Options of `vidkern demo mobile`."""
    parser.add_argument("--ablation", action="store_true", help="compare ways to choose what is pruned, over several seeds")
    parser.add_argument("--seeds", type=int, help="with --ablation: how many (default: 3)")
    parser.add_argument("--seed", type=int, help="without --ablation: of clips, weights and noise (default: 0)")
    parser.add_argument("--record", help="with --ablation: write the record to this JSON file too")
    parser.add_argument("--out", help=f"folder for the results (default: {FOLDERS[False]}, with --ablation {FOLDERS[True]})")
    parser.add_argument("--quick", action="store_true", help="a check of the plumbing in seconds; the pictures mean nothing")


def run(args):
    """Run the demo; returns the exit status. Raises UserError for what the user can mend."""
    for name in ("seeds", "record"):
        if getattr(args, name) is not None and not args.ablation:
            raise UserError(f"--{name} {getattr(args, name)}: expected with --ablation")
    if args.seed is not None and args.ablation:
        raise UserError(f"--seed {args.seed}: expected without --ablation, which takes --seeds")
    for name, least in (("seeds", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if args.record is not None and not Path(args.record).absolute().parent.is_dir():
        raise UserError(f"--record {args.record}: its folder does not exist")
    out = prepare_folder(args.out or FOLDERS[args.ablation])
    command = command_of(args)
    try:
        if args.ablation:
            return ablation.run(args, out, command)
        return show(runs.Recipe().quick() if args.quick else runs.Recipe(), args.seed or 0, out, command, quick=args.quick)
    except (KeyboardInterrupt, Interrupted):
        print(f"\nvidkern: stopped; continue with: {command}", file=sys.stderr)
        return 130


def command_of(args):
    """The command that makes this run, as the record names it."""
    words = ["vidkern", "demo", "mobile"] + ["--ablation"] * args.ablation + ["--quick"] * args.quick
    for name in ("seeds", "seed", "record", "out"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words)


def distilled(student, teacher, pool, recipe, clips, seed, path, progress=True):
    """The student after step distillation, kept in `path`; a stopped run goes on from its checkpoint."""
    work = runs.distiller(student, teacher, recipe, seed)
    if path.is_file():
        work.student.load_state_dict(torch.load(path, weights_only=True))
        return work.student.eval()
    checkpoint, generator, done = path.with_suffix(".checkpoint.pt"), torch.Generator().manual_seed(30_000 + seed), 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        work.resume(saved["state"])
        generator.set_state(saved["generator"])
        done = saved["done"]
    bar = import_extra("tqdm", "a progress bar").tqdm(total=recipe.distil_steps, initial=done, desc="step distillation", leave=False,
                                                      disable=not progress)
    with bar:
        for step in range(done, recipe.distil_steps):
            x0, text = clips.batch(recipe.batch, generator)
            parts = work.step(*mix(x0, text, pool, work.config.synthetic, generator), generator)
            bar.set_postfix(D=f"{parts['discriminator']:.2f}", velocity=f"{parts['velocity']:.3f}", refresh=False)
            bar.update()
            if (step + 1) % 25 == 0:
                with replacing(checkpoint) as fresh:
                    torch.save({"state": work.state(), "generator": generator.get_state(), "done": step + 1}, fresh)
    with replacing(path) as fresh:
        torch.save(work.student.state_dict(), fresh)
    checkpoint.unlink(missing_ok=True)
    return work.student.eval()


def stage_models(recipe, seed, out, clips, progress=True):
    """({stage: model}, keep): all stages, made or continued in `out`."""
    say = print if progress else (lambda *_, **__: None)
    say("1/4 the teacher", flush=True)
    teacher = runs.trained(runs.teacher_trainer(recipe, clips, seed, progress=progress), out / "teacher.pt")
    say("2/4 pruning", flush=True)
    path = out / "keep.json"
    if path.is_file():
        keep = Keep.load(path, teacher.config.group)
        cut = compact(teacher, keep)
    else:
        keep, cut = runs.pruned(teacher, recipe, clips, progress=progress)
        keep.save(path)
    say("3/4 recovery", flush=True)
    recovered = runs.trained(runs.recovery_trainer(cut, teacher, keep, recipe, clips, seed, progress=progress), out / "recovered.pt")
    say("4/4 distillation to four steps, from the recovered student and from the one just cut", flush=True)
    path = out / "pool.pt"
    if path.is_file():
        pool = tuple(torch.load(path, weights_only=True))
    else:
        pool = runs.teacher_pool(teacher, recipe, clips, seed, progress)
        with replacing(path) as fresh:
            torch.save(list(pool), fresh)
    done = {name: distilled(start, teacher, pool, recipe, clips, seed, out / f"{name}.pt", progress)
            for name, start in (("distilled", recovered), ("hasty", cut))}
    return {"teacher": teacher, "pruned": cut.eval(), "recovered": recovered, **done}, keep


def clock(models, clips, recipe, quick):
    """Median milliseconds of an evaluation and of a clip, one clip at a time."""
    packed = pack(models["distilled"]).eval()
    z, sigma, text = clips.train[:1], torch.tensor([0.5]), clips.vocabulary(clips.said[:1])
    chosen = {"teacher": models["teacher"], "distilled": models["distilled"], "packed": packed}
    repeats = 3 if quick else 15

    def clip(model, steps, guidance):
        return lambda: sample(model, z.shape, text, steps=steps, guidance=guidance, noise=z)

    return {"evaluation": medians({name: (lambda m=m: m(z, sigma, text)) for name, m in chosen.items()}, repeats=2 * repeats),
            "sample": medians({name: clip(m, recipe.steps, recipe.guidance) if name == "teacher" else clip(m, 4, 1.0) for name, m in chosen.items()},
                              repeats=repeats, warm=1)}


def show(recipe, seed, out, command, *, quick=False):
    """Make or continue the run, write its report, print its table."""
    began, spent = time.perf_counter(), time.process_time()
    runs.check_folder(out, {"seed": seed, **dataclasses.asdict(recipe)})
    if not quick:
        print("Teacher, pruning, recovery, distillation, samples: some eight minutes on two idle cores. Ctrl-C stops; the same command continues.",
              flush=True)
    clips = runs.open_data(recipe, seed)
    models, keep = stage_models(recipe, seed, out, clips)
    measure, held_out = Measure(clips, recipe.samples), runs.held_out_of(recipe, clips)
    wanted = held_out.velocities(models["teacher"])
    plan = [(stage, steps, guidance) for stage in models for steps, guidance in ((recipe.steps, recipe.guidance), (4, 1.0))]
    plan = [row for row in plan if row[:2] not in (("hasty", recipe.steps), ("distilled", recipe.steps))] + [("teacher", 4, recipe.guidance)]
    order = list(report.STAGES)
    plan.sort(key=lambda row: (order.index(row[0]), -row[1], -row[2]))
    rows, kept = [], {}
    for stage, steps, guidance in import_extra("tqdm", "a progress bar").tqdm(plan, desc="samples", leave=False):
        latents, said = runs.generate(models[stage], clips, recipe.samples, steps=steps, guidance=guidance, seed=seed)
        rows.append({"stage": stage, "steps": steps, "guidance": guidance, **measure(latents, said)})
        if (steps > 4) == (guidance != 1.0):
            kept[stage, steps] = latents[:SHOWN]
    record = rounded({
        "what": "a toy video diffusion transformer, pruned, recovered and distilled to four steps; figures on generated and held-out clips",
        "command": command, "seed": seed, "quick": quick, "recipe": dataclasses.asdict(recipe), "measure": measure.what,
        "rows": rows, "floor": measure.floor, "keep": keep.to_dict(), "prompts": said[:SHOWN].tolist(),
        "held_out": {stage: {"flow": runs.flow_error(model, held_out), "distance": distance(model, wanted, held_out)}
                     for stage, model in models.items() if stage in ("teacher", "pruned", "recovered")},
        "latency": clock(models, clips, recipe, quick),
        "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent,
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "machine": platform.machine()},
    })
    record["parameters"] = {stage: parameter_count(model) for stage, model in models.items()}
    report.write(out, record, kept, clips)
    print(report.markdown(record))
    print(report.verdict(record))
    print(f"report: {out / 'report.html'}")
    return 0
