"""The ``vidkern`` command. Each subcommand's module is imported only when that subcommand is run."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import vidkern
from vidkern.errors import UserError, missing_extra

# Each module has run(args) -> int | None and, where it takes options, add_arguments(parser).
DEMOS = {
    "four-real": "vidkern.models.four_real.demo",
    "dfm": "vidkern.models.dfm.demo",
    "mobile": "vidkern.models.mobile_dit.demo",
    "ditflow": "vidkern.models.ditflow.demo",
}
COMMANDS = {"bench": "vidkern.bench.cli", "verify": "vidkern.verify.command", "motion": "vidkern.models.ditflow.command"}
HELP = {
    "info": "what is installed, what was built, which backend each op chooses and why",
    "demo": "train and sample a small model on the bundled clip or on procedural scenes and show the result",
    "bench": "measure the ops against their peers on this machine",
    "motion": "extract the attention motion flow of a clip and draw it",
    "verify": "check that every backend is right on this device, and record it",
}
SECONDS_IN_A_LOG = "30"  # between two entries of a progress bar
INTERRUPTED = 130  # the shell's own status for a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    0: done. 2: a mistake the user can mend, told in one line on stderr. 130: interrupted. Anything unforeseen is raised.
    """
    if argv is None and not (sys.stderr and sys.stderr.isatty()):
        # tqdm reads these when it is imported. In a log, where a bar cannot overwrite itself, one entry now and then is enough.
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, SECONDS_IN_A_LOG)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except UserError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        cure = missing_extra(error)
        if cure is None:
            raise
        return _fail(f"this command needs {error.name}, {cure}")
    except ValueError as error:
        # Named in the environment, met wherever the compiled part is loaded first.
        if "VIDKERN_CPU_ISA" not in str(error):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        print("\nvidkern: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(reason) -> int:
    print(f"vidkern: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vidkern", description="Fused kernels for video generation.")
    parser.add_argument("--version", action="version", version=f"vidkern {vidkern.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    subparsers = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    subparsers["demo"].add_argument(
        "method", nargs="?", default="four-real", choices=DEMOS, help="which demo (default: %(default)s)"
    )
    # Only the command that was named adds its options: the others are not imported to print a help text.
    named = argv[0] if argv else None
    if named == "demo":
        method = next((word for word in argv[1:2] if word in DEMOS), "four-real")
        module = importlib.import_module(DEMOS[method])
        module.add_arguments(subparsers["demo"])
        others = ", ".join(f"`vidkern demo {m} --help`" for m in DEMOS if m != method)
        subparsers["demo"].epilog = f"The options are those of {method}; for the others see {others}."
    elif named in COMMANDS:
        module = importlib.import_module(COMMANDS[named])
        module.add_arguments(subparsers[named])
    args = parser.parse_args(argv)
    if args.command == "info":
        print(vidkern.info())
        return 0
    return module.run(args) or 0
