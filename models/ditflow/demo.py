"""`vidkern demo ditflow`: train a tiny video diffusion transformer on real clips, read motion from clips, and transfer it to others.

The trained model is kept in the user's folder, for `vidkern motion` too; every transfer is written as soon as it is done: the same command continues
a stopped run.
"""

import dataclasses
import platform
import shlex
import sys
import time

import torch

import vidkern
from vidkern._files import prepare_folder
from vidkern.errors import UserError

from ..shared.page import rounded
from ..shared.train import Interrupted
from . import pictures, report, runs
from .adapter import TinyAdapter

FOLDERS = {False: "vidkern-ditflow", True: "vidkern-ditflow-quick"}
SHOWN = 3      # references in the video


def add_arguments(parser):
    """Options of `vidkern demo ditflow`."""
    parser.add_argument("--seed", type=int, default=0, help="of weights, clips and noise (default: %(default)s)")
    parser.add_argument("--out", help=f"folder for the results (default: {FOLDERS[False]}, with --quick {FOLDERS[True]})")
    parser.add_argument("--quick", action="store_true", help="a check of the plumbing in seconds; the numbers mean nothing")


def run(args):
    """Run the demo; returns the exit status. Raises UserError for what the user can mend."""
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected at least 0")
    out = prepare_folder(args.out or FOLDERS[args.quick])
    command = command_of(args)
    try:
        return show(runs.Recipe().quick() if args.quick else runs.Recipe(), args.seed, out, command, quick=args.quick)
    except (KeyboardInterrupt, Interrupted):
        print(f"\nvidkern: stopped; continue with: {command}", file=sys.stderr)
        return 130


def command_of(args):
    """The command that makes this run, as the record names it."""
    words = ["vidkern", "demo", "ditflow"] + ["--quick"] * args.quick + (["--seed", str(args.seed)] if args.seed else [])
    return shlex.join(words + (["--out", args.out] if args.out else []))


def show(recipe, seed, out, command, *, quick=False):
    """Make or continue the run, write its report, print its table."""
    began, spent = time.perf_counter(), time.process_time()
    runs.check_folder(out, {"seed": seed, **dataclasses.asdict(recipe)})
    folder = out if quick else runs.user_folder()      # what a quick run has trained is of no use to anyone
    if not quick:
        made = (folder / recipe.name(seed)).is_file()
        print(f"The model {'is there from an earlier run' if made else 'is trained first, some minutes, and kept'} ({folder / recipe.name(seed)}); then "
              f"{recipe.references * len(runs.METHODS)} transfers, about a minute. Ctrl-C stops; the same command continues.", flush=True)
    adapter = TinyAdapter(runs.model_of(recipe, seed, folder))
    blocks, scores = runs.choose_block(adapter, runs.probes(recipe, seed))
    done = runs.transfers(adapter, recipe, seed, blocks, out)
    known = runs.references(recipe, seed)
    record = rounded({
        "what": "motion of reference clips transferred by a toy video diffusion transformer; means over references, samples not chosen",
        "command": command, "seed": seed, "quick": quick, "recipe": dataclasses.asdict(recipe), "blocks": list(blocks),
        "scores": [dataclasses.asdict(s) for s in scores], "measures": report.MEASURES, "rows": [row for row, _ in done],
        "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent,
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "machine": platform.machine()},
    })
    clips = [(ref.name, {"reference": (ref.clip + 1) / 2, **{runs.METHODS[row["method"]]: (clip + 1) / 2 for row, clip in done if row["reference"] == i}})
             for i, ref in enumerate(known)][:SHOWN]
    flows = {}
    for name, ref in (("known_motion", known[0]), ("own_motion", next((r for r in known if r.motion is None), known[-1]))):
        flow = pictures.square(runs.flow_of(adapter, ref.clip, blocks[0]), adapter.grid(ref.clip[None]))
        flows[name] = ((ref.clip + 1) / 2, flow, f"Attention motion flow of a held-out clip: {ref.name}")
    report.write(out, record, clips, flows)
    print(report.markdown(record))
    print(report.verdict(record))
    print(f"report: {out / 'report.html'}")
    return 0
