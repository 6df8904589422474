"""``vidkern bench``: measure ops against their peers, print tables, keep records."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from vidkern.errors import UserError, comes_with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="op to measure (default: every op that has peers)")
    parser.add_argument("--shape", help="names separated by commas, or `all` (default: those meant for the device)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="separated by commas (default: %(default)s)")
    parser.add_argument("--mode", choices=("fwd", "fwdbwd", "all"), default="all", help="forward, with backward, or both")
    parser.add_argument(
        "--memory",
        choices=("default", "kept", "all"),
        default="all",
        help="malloc as it is, or made to keep freed memory (CPU on Linux; default: both, each in its own process)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each candidate (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds of timing per block; fewer rounds if short (default: 60)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: what torch takes)")
    parser.add_argument("--peers", help="names separated by semicolons, or `none` (default: all; `list` prints them)")
    parser.add_argument(
        "--peer-path", action="append", default=[], metavar="DIR", help="also look for peers' packages here (repeatable)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the records (default: bench/results of a checkout; of an installed vidkern, and with --quick, a folder of the user's)")
    parser.add_argument(
        "--quick", action="store_true", help="a small shape, float32, forward, no peers that compile: some seconds"
    )


def run(args: argparse.Namespace) -> int:
    """Run every block asked for. 0 even when a target is missed; 1 when a block could not be measured."""
    import torch  # noqa: F401  (its absence is reported before any process is started)
    import tqdm  # noqa: F401

    from . import peers, records

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, expected cpu")
    for name in ("threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}, expected at least 1")
    results = args.out or (records.users_dir() if args.quick else records.default_dir())
    known = peers.names()
    ops = known if args.op is None else [_one_of("op", args.op, known)]
    if args.peers == "list":
        for op in ops:
            print(f"{op}: " + "; ".join(p.name for p in peers.load(op).peers))
        return 0
    failed = 0
    for op in ops:
        measured = []
        for block in blocks(args, op, device):
            record = _measure(block)
            if record is None:
                failed += 1
                continue
            measured.append(_report(record, op, results))
        if measured:
            print("\n".join(f"wrote {path}" for path in [*measured, *_summarise(results, measured[0].parent.parent.name, op)]))
    return 1 if failed else 0


def blocks(args: argparse.Namespace, op: str, device: str) -> list:
    """The blocks that the command line asks for, in the order in which they run."""
    from . import peers
    from .block import MEMORY, Block
    from .suite import DTYPES, MODES

    suite = peers.load(op)
    if args.quick and args.shape is None:
        shapes = [suite.quick]
    elif args.shape == "all":
        shapes = list(suite.shapes)
    else:
        names = args.shape.split(",") if args.shape else suite.default[device]
        shapes = [_one_of("--shape", n.strip(), suite.shapes) for n in names]
    dtypes = [_one_of("--dtype", n.strip(), DTYPES) for n in args.dtype.split(",")]
    modes = MODES if args.mode == "all" else (args.mode,)
    both = device == "cpu" and sys.platform == "linux"  # elsewhere malloc cannot be told
    memories = tuple(MEMORY) if args.memory == "all" and both else (args.memory.replace("all", "default"),)
    if args.quick:
        dtypes, modes, memories = dtypes[:1], modes[:1], memories[:1]
    names = None
    if args.peers is not None:
        known = [p.name for p in suite.peers]
        names = [] if args.peers == "none" else [_one_of("--peers", n.strip(), known) for n in args.peers.split(";")]
    return [
        Block(
            op, shape, dtype, mode, memory, device, min(args.rounds, 3) if args.quick else args.rounds, args.budget,
            args.quick, names, args.threads, [str(Path(p).resolve()) for p in args.peer_path],
        )  # fmt: skip
        for shape, dtype, mode, memory in itertools.product(shapes, dtypes, modes, memories)
    ]


def _one_of(argument: str, value: str, known) -> str:
    if value not in known:
        raise UserError(f"{argument}: {value!r}, expected one of {('; ' if argument == '--peers' else ', ').join(known)}")
    return value


def _measure(block) -> dict | None:
    """Measure a block in its own process; None, with its complaint on stderr, when that process failed."""
    from .block import environment

    with tempfile.TemporaryDirectory(prefix="vidkern-bench-") as folder:
        path = Path(folder, "record.json")
        command = [sys.executable, "-m", "vidkern.bench.block", json.dumps(asdict(block)), str(path)]
        done = subprocess.run(command, env=environment(block))
        if done.returncode == 0 and path.is_file():
            return json.loads(path.read_text())
    print(f"vidkern: {block.title}: not measured, its process ended with {done.returncode}", file=sys.stderr)
    return None


def _report(record: dict, op: str, results: Path) -> Path:
    """Add the targets' verdicts, keep the record, print its table."""
    from . import peers, records, table, targets

    verdicts = targets.evaluate(record, peers.load(op))
    record["targets"] = [{"met": v.met, "text": v.text} for v in verdicts]
    print(table.render(record, verdicts), flush=True)
    return records.save(results, record)


def _summarise(results: Path, device: str, op: str) -> list[Path]:
    """The CSV and the rooflines of everything measured so far."""
    import importlib.util

    from . import records, roofline

    written = [records.save_csv(results, device, op)]
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no roofline: matplotlib is not installed, {comes_with('bench')}", file=sys.stderr)
        return written
    return written + roofline.draw_all(results, device, op)
