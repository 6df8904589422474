"""`vidkern demo four-real --compare` from the command line."""

import dataclasses
import shlex
from pathlib import Path

from vidkern.errors import UserError

from . import compare_report
from .compare import CompareSettings, compare

DEFAULTS = {"--video": ("video", None), "--minutes": ("minutes", None), "--recipe": ("recipe", "simple"), "--device": ("device", "cpu"),
            "--impl": ("impl", None), "--seed": ("seed", 0)}


def settings_of(args):
    """The settings that the options ask for; UserError for options that a comparison does not take."""
    for option, (name, default) in DEFAULTS.items():
        if getattr(args, name) != default:
            raise UserError(f"{option} {getattr(args, name)}: expected without --compare")
    if args.record is not None and not Path(args.record).absolute().parent.is_dir():
        raise UserError(f"--record {args.record}: its folder does not exist")
    for name in ("seeds", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    settings = CompareSettings(data=args.scene or CompareSettings.data)
    if args.quick:
        settings = dataclasses.replace(settings, seeds=1, base_steps=2, base_batch=1, steps=2, batch=1, scenes=4, held_out=2,
                                       sampling_steps=1, eval_every=1)
    given = {name: getattr(args, name) for name in ("seeds", "steps") if getattr(args, name) is not None}
    return dataclasses.replace(settings, **given)


def command_of(args):
    """The command that makes this comparison, as the record names it."""
    words = ["vidkern", "demo", "four-real", "--compare"]
    for name in ("scene", "seeds", "steps", "record"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words + ["--quick"] * args.quick)


def run(args, out):
    """Make or continue the comparison in the folder `out` and print its tables; returns the exit status."""
    settings = settings_of(args)
    record = compare(settings, out, command=command_of(args))
    compare_report.write(out, record, settings, args.record)
    print(compare_report.markdown(record))
    print(compare_report.verdict(record))
    print(f"report: {out / 'report.html'}")
    return 0
