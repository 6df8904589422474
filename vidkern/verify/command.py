"""``vidkern verify``: apply the accuracy rule to every backend on this device and record what passed."""

from __future__ import annotations

import argparse
import datetime
import functools
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import about, registry, verified
from .._files import prepare_folder
from ..cuda import cubins
from ..cuda.launcher import declared
from ..errors import UserError, import_extra
from . import accuracy, probes, warm
from .rooms import room

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The reference is the plain form itself: a few samples show that its low-precision path is wired right.
REFERENCE_SAMPLES = 3


@dataclass
class Unit:
    """A backend with a dtype: what was run, what failed, and the worst ratios. It passed when all of ``steps`` ran and none
    failed."""

    op: str
    backend: str
    dtype: str
    steps: list[tuple[str, Callable]] = field(default_factory=list)
    done: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=lambda: {"max": 0.0, "rms": 0.0})

    @property
    def state(self) -> str:
        if self.failed:
            return "FAILED"
        return "passed" if self.done >= len(self.steps) else "not finished"

    def facts(self) -> dict:
        """What a JSON file says about it."""
        names = ("op", "backend", "dtype", "state", "done", "worst", "failed", "left_out")
        return {**{name: getattr(self, name) for name in names}, "cases": len(self.steps)}

    @classmethod
    def from_facts(cls, facts: dict) -> Unit:
        """A unit as it was when ``facts`` were taken, without anything to run."""
        names = ("op", "backend", "dtype", "done", "failed", "left_out", "worst")
        return cls(**{n: facts[n] for n in names}, steps=[("", None)] * facts["cases"])


class DeviceLost(RuntimeError):
    """A kernel has broken the device's context: nothing that follows in this process means anything."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--op", action="append", help="only this op (repeatable; default: all)")
    parser.add_argument("--backend", action="append", help="only this backend (repeatable; default: all that serve the device)")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="go on with fresh inputs for so long once every case has run (default: 2)"
    )
    parser.add_argument("--out", type=Path, help="folder of the record (default: vidkern's folder in the user's cache)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: from the clock; it is printed)")


def run(args: argparse.Namespace) -> int:
    """0 when everything passed, 1 when something failed."""
    if not args.minutes >= 0:
        raise UserError(f"--minutes: {args.minutes}, expected at least 0")
    check_names(args.op, args.backend)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device: cuda, but torch {torch.__version__} finds no CUDA device on this machine; "
            "`vidkern verify --device cpu` verifies what runs on the CPU"
        )
    out = prepare_folder(args.out or verified.cache_dir())
    seed = time.time_ns() % 10**9 if args.seed is None else args.seed
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    print(f"verifying on {verified.device_class(device)}, seed {seed}", flush=True)
    units = plan(device, args.op, args.backend, seed)
    seconds = compile_ahead(units, device, seed)
    if seconds:
        print(f"compiled kernels ahead in {seconds:.0f} s", flush=True)
    unable = verify(units, seed, args.minutes * 60)
    print("\n".join(table(units)))
    for path in keep(units, device, seed, out):
        print(f"wrote {path}")
    if unable:
        print(f"stopped: {unable}")
    return 1 if unable or any(u.failed for u in units) else 0


def check_names(ops: Sequence[str] | None, backends: Sequence[str] | None) -> tuple[dict[str, registry.Op], set[str]]:
    """The ops asked for and the names of their backends.

    Raises:
        UserError: an op or backend is unknown.
    """
    known = registry.ops()
    for name in ops or ():
        if name not in known:
            raise UserError(f"--op: {name!r}, expected one of {', '.join(known)}")
    chosen = {n: o for n, o in known.items() if n in (ops or known)}
    names = {b.name for o in chosen.values() for b in o.backends}
    for name in backends or ():
        if name not in names:
            raise UserError(f"--backend: {name!r}, expected one of {', '.join(sorted(names))}")
    return chosen, names


def plan(device, ops: Sequence[str] | None, backends: Sequence[str] | None, seed: int) -> list[Unit]:
    """Units for all that serves ``device``.

    Raises:
        UserError: an op or backend is unknown, or nothing that was asked for serves the device.
    """
    chosen, names = check_names(ops, backends)
    units, reasons = [], []
    for op in chosen.values():
        for backend in op.backends:
            if backend.name in (backends or names):
                found, reason = _units(op, backend.name, torch.device(device), seed)
                units += found
                reasons.append(f"{op.name}/{backend.name}: {reason}")
    if not units:
        raise UserError(f"--device: nothing that was asked for serves {device} ({'; '.join(reasons)})")
    return units


def compile_ahead(units: Sequence[Unit], device: torch.device, seed: int, limit: float = 240.0) -> float:
    """Let other processes compile what the backends compile at their first calls; the seconds that took."""
    if device.type != "cuda":
        return 0.0
    begun, known = time.monotonic(), registry.ops()
    backend = lambda u: known[u.op]._by_name[u.backend]  # noqa: E731
    written = lambda u: any(source.startswith("csrc/cuda/") for source in backend(u).sources)  # noqa: E731
    if any(map(written, units)):
        # A source holds all its kernels: processes that shared the cases would each compile the same. Why one does not compile, the first
        # call that needs it tells.
        cubins.make_ready(declared(), torch.cuda.get_device_capability(device))
    spent = time.monotonic() - begun
    waiting = [f"{u.op}/{u.backend}/{u.dtype}" for u in units if backend(u).trust != "none" and not written(u)]
    return spent + warm.start(waiting, seed, device, max(0.0, limit - spent))


def _units(op: registry.Op, backend: str, device: torch.device, seed: int) -> tuple[list[Unit], str]:
    r, units, reason = room(op.name), [], "serves it"
    for name, dtype in DTYPES.items():
        unit = Unit(op.name, backend, name)
        try:
            with torch.no_grad():
                r.call(r.samples[0], r.inputs(r.samples[0], dtype, seed, device), impl=backend)
        except registry.BackendUnavailable as error:
            reason = _reason(error)
            continue
        except Exception as error:  # whatever a kernel fails with, at its first call already, is a finding
            unit.failed.append(f"first call: {_first_line(error)}")
        unit.steps = _steps(unit, device)
        units.append(unit)
    return units, reason


def _steps(unit: Unit, device: torch.device) -> list[tuple[str, Callable]]:
    """(name, ``step(unit, seed)``) in order; together they are what a pass stands for."""
    r, dtype = room(unit.op), DTYPES[unit.dtype]
    samples = [*r.samples, *(r.large if device.type != "cpu" else ())]
    if unit.backend == "reference":
        samples = samples[:REFERENCE_SAMPLES]
    steps = [(s.name, functools.partial(_accuracy, sample=s, dtype=dtype, device=device)) for s in samples]
    for name, probe in r.probes.items() if unit.backend != "reference" else ():
        steps.append((name, lambda unit, seed, probe=probe: probe(dtype, unit.backend, device)))
    for s in {id(s): s for s in (samples[0], samples[-1])}.values():
        same = lambda unit, seed, s=s: probes.same_bits(r, s, dtype, unit.backend, device, seed)  # noqa: E731
        steps.append((f"same bits {s.name}", same))
    return steps


def _accuracy(unit: Unit, seed: int, *, sample, dtype, device) -> None:
    shared = {"device": device, "around": accuracy.poisoned}
    n = accuracy.draws(unit.op, sample, dtype, device)
    try:
        found = accuracy.check(unit.op, sample, dtype, unit.backend, seeds=range(seed, seed + n), **shared)
    except probes.CheckFailed:
        # With inputs from the clock the worst of a few numbers can be bad luck. Over four times as many, these among them,
        # luck evens out and a fault does not.
        found = accuracy.check(unit.op, sample, dtype, unit.backend, seeds=range(seed, seed + 4 * n), **shared)
    for kind, value in found.items():
        unit.worst[kind] = max(unit.worst[kind], value)


def verify(units: list[Unit], seed: int, seconds: float, deadline: float | None = None, quiet: bool = False) -> str | None:
    """Run every step of every unit, then again with fresh inputs until ``seconds`` have passed.

    Args:
        units: from :func:`plan`; filled in.
        deadline: ``time.monotonic()`` after which no step starts; units that it cuts are "not finished".
        quiet: no progress bar.

    Returns:
        None, or why it had to stop.
    """
    tqdm = import_extra("tqdm", "the progress bar").tqdm
    begun = time.monotonic()
    with tqdm(total=sum(len(u.steps) for u in units), unit="case", dynamic_ncols=True, disable=True if quiet else None) as bar:
        for cycle in range(1000):
            for unit in units:
                for i, (name, step) in enumerate(unit.steps):
                    now = time.monotonic()
                    if (deadline is not None and now > deadline) or (cycle and now - begun > seconds):
                        return None
                    bar.set_postfix_str(f"{unit.op} {unit.backend} {unit.dtype} {name}")
                    try:
                        _run(unit, name, step, seed + 10_000 * cycle + 100 * i)
                    except DeviceLost as error:
                        return str(error)
                    bar.update() if not cycle else None
            if seconds <= 0:
                return None
    return None


def _run(unit: Unit, name: str, step: Callable, seed: int) -> None:
    torch.manual_seed(seed)
    try:
        step(unit, seed)
    except probes.CheckFailed as error:
        unit.failed.append(str(error))
    except registry.BackendUnavailable as error:
        # It is never chosen for this; that it serves the first sample is what made it a unit.
        unit.left_out.append(f"{name}: it cannot serve it: {_reason(error)}")
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        unit.left_out.append(f"{name}: not enough memory")
    except Exception as error:  # a kernel that does not compile or crashes is a finding like a wrong result
        unit.failed.append(f"{name}: {_first_line(error)}")
        if "CUDA error" in str(error):
            raise DeviceLost(f"{unit.op} {unit.backend} {unit.dtype} {name}: {_first_line(error)}") from None
    unit.done += 1


def _reason(error: registry.BackendUnavailable) -> str:
    """Why a backend that was named cannot serve a call, without the words that name it."""
    return str(error).split(": ", 2)[-1]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def table(units: list[Unit]) -> list[str]:
    """A line per unit, and below it the first failure and what was left out."""
    head = ("op", "backend", "dtype", "result", "cases", "max", "RMS")
    rows = [
        (u.op, u.backend, u.dtype, u.state, str(u.done), f"{u.worst['max']:.2f}", f"{u.worst['rms']:.2f}") for u in units
    ]
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip()  # noqa: E731
    lines = [f"error over the yardstick's, at most {accuracy.RATIO_MAX:g} (max) and {accuracy.RATIO_RMS:g} (RMS)", line(head)]
    for unit, row in zip(units, rows):
        lines.append(line(row))
        if unit.failed:
            more = f" (and {len(unit.failed) - 1} more)" if len(unit.failed) > 1 else ""
            lines.append(f"    {unit.failed[0]}{more}")
        lines += [f"    left out: {text}" for text in dict.fromkeys(unit.left_out)]
    return lines


def keep(units: list[Unit], device, seed: int, folder: Path) -> list[Path]:
    """Write a record of each backend's dtypes that passed, and withdraw earlier ones of what failed now."""
    where = verified.device_class(device)
    backends = {(n, b.name): b for n, op in registry.ops().items() for b in op.backends}
    fresh, withdrawn = [], []
    for key in dict.fromkeys((u.op, u.backend) for u in units):
        mine = [u for u in units if (u.op, u.backend) == key]
        passed = [u for u in mine if u.state == "passed"]
        if not passed:
            if any(u.failed for u in mine):
                withdrawn.append(verified.key(*key, where))
            continue
        fresh.append(
            verified.Record(
                *key, *where, tuple(u.dtype for u in passed), round(max(u.worst["max"] for u in passed), 4),
                round(max(u.worst["rms"] for u in passed), 4), sum(u.done for u in passed), versions(device), seed,
                datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                verified.digest(tuple(backends[key].sources)),
            )
        )  # fmt: skip
    return verified.write(folder, fresh, withdrawn)


def versions(device) -> dict[str, str]:
    """Versions that a record names."""
    found = {name: about.version(name) for name in ("vidkern", "torch", "triton", "cuda-python", "nvidia-cuda-nvrtc")}
    if torch.device(device).type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "driver": driver()}
    return found


def driver() -> str:
    """Version of the GPU driver, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or "unknown"
