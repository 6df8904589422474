"""`vidkern demo dfm`: train Decomposable Flow Matching and plain flow matching on small pictures, and show both at work.

One seed of each on the digits and on crops of the bundled clip; with --compare three seeds. Every run is resumable: repeat the command.
"""

import shlex
import sys
import time
from pathlib import Path

import torch

from vidkern._files import prepare_folder
from vidkern.errors import UserError

from . import report, runs
from .data import NAMES

FOLDERS = {False: "vidkern-dfm", True: "vidkern-dfm-compare"}
FACTOR = 3  # the demo, with one seed, trains longer than the runs of a comparison


def add_arguments(parser):
    """Options of `vidkern demo dfm`."""
    parser.add_argument("--data", choices=NAMES, help="train on this alone (default: both)")
    parser.add_argument("--compare", action="store_true", help="three seeds of each model instead of one")
    parser.add_argument("--seeds", type=int, help="with --compare: how many (default: 3)")
    parser.add_argument("--seed", type=int, help="without --compare: of weights, pictures and noise (default: 0)")
    parser.add_argument("--record", help="with --compare: write the record to this JSON file too")
    parser.add_argument("--out", help=f"folder for the results (default: {FOLDERS[False]}, with --compare {FOLDERS[True]})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="training steps of DFM; the twin takes as many as cost the same (default: "
                        + ", ".join(f"{recipe.steps * FACTOR} for {name}" for name, recipe in runs.RECIPES.items()) + "; with --compare a third)")
    length.add_argument("--quick", action="store_true", help="a check of the plumbing in seconds; the pictures mean nothing")


def run(args):
    """Run the demo; returns the exit status. Raises UserError for what the user can mend."""
    settings = settings_of(args)
    out = prepare_folder(args.out or FOLDERS[args.compare])
    if args.record is not None and not Path(args.record).absolute().parent.is_dir():
        raise UserError(f"--record {args.record}: its folder does not exist")
    command = command_of(args)
    try:
        record = runs.run_all(settings, out, command=command, started=lambda *what: announce(settings, *what))
    except KeyboardInterrupt:
        print(f"\nvidkern: stopped; continue with: {command}", file=sys.stderr)
        return 130
    report.write(out, record, args.record)
    print(report.markdown(record))
    print(report.verdict(record))
    print(f"report: {out / 'report.html'}")
    return 0


def settings_of(args):
    """The settings that the options ask for; UserError for options that do not fit each other."""
    for name in ("seeds", "record"):
        if getattr(args, name) is not None and not args.compare:
            raise UserError(f"--{name} {getattr(args, name)}: expected with --compare")
    if args.seed is not None and args.compare:
        raise UserError(f"--seed {args.seed}: expected without --compare, which takes --seeds")
    for name, least in (("seeds", 1), ("steps", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    seeds = range(1 if args.quick else 3) if args.compare else (args.seed or 0,)
    return runs.Settings(data=(args.data,) if args.data else NAMES, seeds=tuple(seeds if args.seeds is None else range(args.seeds)),
                         factor=1 if args.compare or args.quick else FACTOR, steps=args.steps, quick=args.quick)


def command_of(args):
    """The command that makes these runs, as the record names it."""
    words = ["vidkern", "demo", "dfm"] + ["--compare"] * args.compare + ["--quick"] * args.quick
    for name in ("data", "seeds", "seed", "steps", "record", "out"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words)


def announce(settings, total, sources, plans):
    """Time a few steps of every model and say how long the runs will take."""
    if settings.quick:
        return
    seconds = 0.0
    for name, pictures in sources.items():
        recipe = settings.recipe(name)
        for model, (_, steps) in plans[name].items():
            network = runs.DFM(runs.config_of(model, recipe, pictures))
            loss = runs.loss_of(network.pyramid, recipe, 0)
            x, labels = pictures.batch(recipe.batch, torch.Generator().manual_seed(0))
            times = []
            for _ in range(3):
                began = time.perf_counter()
                loss(network, x, step=0, labels=labels)[0].backward()
                times.append(time.perf_counter() - began)
            # The optimiser and the average cost about a quarter more; a sample costs a third of a training picture at every sampling step.
            sampled = recipe.points * recipe.samples * sum(recipe.sampling) / recipe.batch / 3
            seconds += len(settings.seeds) * min(times) * (1.25 * steps + sampled)
    print(f"{2 * len(settings.seeds) * len(sources)} runs, {total} training steps in all: about {seconds / 60:.1f} minutes on this machine. "
          "Ctrl-C stops; the same command continues.", flush=True)
