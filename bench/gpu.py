"""Verify and measure vidkern on a borrowed GPU: ``python -m vidkern.bench.gpu``.

Each stage runs in a process of its own within its own minutes; what it found is on disk at once, and the same command with the
same ``--out`` goes on where a cut run stopped. ``--dry-run`` walks through every stage on the CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vidkern.errors import UserError

from . import gpu_machine, gpu_report, machine, records
from .gpu_job import Job, OutOfTime
from .shapes import GRID

STAGES = ("machine", "build", "verify", "sanitize", "time", "ops", "sweep", "profile")
DEFAULT = STAGES[:-1]
SHAPED = ("time", "sweep")  # the stages that --shape is for
SWEEP_SHAPES = ("C", "A", "F")
CUT = 3  # exit status of a run whose time was used up before all was measured


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m vidkern.bench.gpu", description=__doc__.split("\n")[0])
    p.add_argument("--stage", default=",".join(DEFAULT), help=f"of {', '.join(STAGES)}; separated by commas (default: %(default)s)")
    p.add_argument("--shape", help=f"of {', '.join(GRID)}; separated by commas; for stages {' and '.join(SHAPED)}, "
                   "the other stages take none "
                   f"(default: A to G for time, {', '.join(SWEEP_SHAPES)} for sweep and with --quick)")  # fmt: skip
    p.add_argument("--out", type=Path, help="folder of the results, which lie in a folder of the device's name there (default: "
                   "bench/results of a checkout; otherwise, and with --dry-run, vidkern/bench in the user's data folder)")  # fmt: skip
    p.add_argument("--minutes", type=float, default=9.0, help="of each stage (default: %(default)s)")
    p.add_argument("--quick", action="store_true",
                   help="three shapes, three rounds, three other ops, part of the sweep and of the verification")  # fmt: skip
    p.add_argument("--fresh", action="store_true", help="measure anew what is there already (with --shape: of these shapes)")
    p.add_argument("--dry-run", action="store_true", help="no GPU: every stage's code on the CPU with tiny shapes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: all stages are complete. 1: something is wrong (a backend failed, a stage crashed). 2: a mistake of the user's.
    3: cut by time; run it again."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"vidkern: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    names = [n.strip() for n in args.stage.split(",")]
    for name in names:
        if name not in STAGES:
            raise UserError(f"--stage: {name!r}, expected some of {', '.join(STAGES)}")
    if not (args.minutes > 0):
        raise UserError(f"--minutes: {args.minutes}, expected more than 0")
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no CUDA device on this machine; --dry-run walks through the stages without one"
        )
    shapes = _shapes(args.shape, names)
    where = args.out or (records.users_dir() if args.dry_run else records.default_dir())
    folder = records.folder(where, machine.slug("cpu" if args.dry_run else "cuda"))
    _check_out(where, folder, args.out is not None)
    if args.dry_run:
        print("a dry run: the code of every stage with tiny shapes on the CPU; its times say nothing of a GPU or of a real shape")
    if shapes and (others := [n for n in names if n not in SHAPED]):
        print(f"--shape {','.join(shapes)} is for {', '.join(n for n in names if n in SHAPED)}; {', '.join(others)} run as without it")
    if len(names) == 1 or args.dry_run:
        states = [run_stage(name, job_of(args, folder), shapes if name in SHAPED else None) for name in names]
    else:
        # A crash of one stage must not take the others' CUDA context with it, and a stuck one has to end.
        states = [_in_a_process(name, args) for name in names]
    for path in gpu_report.write(folder):
        print(f"wrote {path}")
    words = {0: "complete", 1: "FAILED", CUT: "cut by time, run again to go on"}
    print("; ".join(f"{n}: {words.get(s, f'ended with {s}')}" for n, s in zip(names, states)))
    return 1 if any(s not in (0, CUT) for s in states) else max(states)  # CUT is more than 0


def _shapes(given: str | None, stages: Sequence[str]) -> list[str] | None:
    """The shapes that ``--shape`` names, or None for those of each stage."""
    if given is None:
        return None
    found = list(dict.fromkeys(n.strip() for n in given.split(",")))
    for name in found:
        if name not in GRID:
            raise UserError(f"--shape: {name!r}, expected some of {', '.join(GRID)}")
    if not set(stages) & set(SHAPED):
        raise UserError(f"--shape: {given!r} with --stage {','.join(stages)}, expected a stage that takes shapes: {' or '.join(SHAPED)}")
    return found


def _check_out(where: Path, folder: Path, given: bool) -> None:
    """That results can be written, before the first stage measures some."""
    try:
        (folder / "gpu").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "gpu"):
            pass
    except OSError as error:
        name = repr(str(where)) if given else f"not given, its default {str(where)!r}"
        raise UserError(f"--out: {name}, expected a folder that can be made and written to ({error.strerror or error})") from None


def _in_a_process(name: str, args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "vidkern.bench.gpu", "--stage", name, "--minutes", str(args.minutes)]
    for option in ("shape", "out") if name in SHAPED else ("out",):
        if getattr(args, option):
            command += [f"--{option}", str(getattr(args, option))]
    command += [f"--{option}" for option in ("quick", "fresh") if getattr(args, option)]
    print(f"== {name}", flush=True)
    status, _ = gpu_machine.in_group(command, 60 * args.minutes + 40)
    if status is None:
        print(f"{name}: ended, it did not stop by itself", flush=True)
    return CUT if status is None else status


def job_of(args: argparse.Namespace, folder: Path) -> Job:
    device = "cpu" if args.dry_run else "cuda"
    return Job(folder, device, _stamp(args), 60 * args.minutes, args.quick, args.dry_run, args.fresh)


def _stamp(args: argparse.Namespace) -> dict:
    """What the results depend on."""
    from vidkern import registry, verified

    state = hashlib.sha256()
    for op in registry.ops().values():
        for backend in op.backends:
            state.update(f"{op.name} {backend.name} {verified.digest(tuple(backend.sources))}".encode())
    found = machine.versions()
    return {"sources": state.hexdigest()[:16], "torch": found.get("torch"), "triton": found.get("triton"),
            "nvrtc": found.get("nvidia-cuda-nvrtc"), "quick": args.quick, "dry": args.dry_run}  # fmt: skip


# ---- stages -----------------------------------------------------------------------------------------------------------
def run_stage(name: str, job: Job, shapes: Sequence[str] | None = None) -> int:
    """Run one stage in this process; 0, 1 or :data:`CUT`."""
    from tqdm import tqdm

    start = time.monotonic()
    if job.fresh:
        job.forget(name, shapes)
    with tqdm(desc=name, unit="step", dynamic_ncols=True, leave=False, disable=True if job.dry else None) as bar:

        def tick(what: str) -> None:
            bar.update()
            bar.set_postfix_str(what)

        try:
            status = RUN[name](job, shapes, tick, bar.write if not bar.disable else print)
        except OutOfTime as error:
            print(f"{name}: {error}")
            status = CUT
        except Exception as error:
            # The stages after this one still run; what this one had measured is on disk.
            import traceback

            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}")
            status = 1
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return status


def _machine(job: Job, shapes, tick: Callable, say: Callable) -> int:
    found = gpu_machine.measure(job)
    rates = {n: [v for v in r.values() if v] for n, r in found["limits"].items() if isinstance(r, dict)}
    say(f"{found['device']}: " + ", ".join(f"{n} {max(r) * 1e-12:.4g} T/s" for n, r in rates.items() if r))
    for key, value in {**found.get("gpu", {}), **found["nvidia_smi"], **found["versions"]}.items():
        say(f"  {key:<24} {value}")
    return 0


def machine_code(device: str) -> dict[str, dict]:
    """Where the machine code of each CUDA source comes from here and the seconds that took; nothing without a GPU."""
    import torch

    from vidkern.cuda import cubins
    from vidkern.cuda.launcher import declared

    return cubins.make_ready(declared(), torch.cuda.get_device_capability()) if device == "cuda" else {}


def _build(job: Job, shapes, tick: Callable, say: Callable) -> int:
    """What is installed, what each op chooses here, how long CUDA sources compile and a backend's first call takes."""
    import torch

    import vidkern
    from vidkern import registry
    from vidkern.verify import probes
    from vidkern.verify.rooms import room

    from .gpu_ops import reason_of

    found = job.done("build")
    if found is None or "first_call_failed" not in found:
        info = vidkern.info()
        found = {"versions": info.versions, "cpu": info.cpu, "cuda": info.cuda, "ops": info.ops,
                 "first_call_seconds": {}, "first_call_failed": {}, "not_served": {}}  # fmt: skip
        tick("CUDA sources")
        found["machine_code"] = machine_code(job.device)
        for name, op in registry.ops().items():
            r = room(name)
            for backend in op.backends:
                tick(f"{name} {backend.name}")
                key, start = f"{name} {backend.name}", time.perf_counter()
                try:
                    probes.same_bits(r, r.samples[0], torch.bfloat16, backend.name, job.device)
                    if job.device == "cuda":
                        torch.cuda.synchronize()
                    found["first_call_seconds"][key] = time.perf_counter() - start
                except registry.BackendUnavailable as error:
                    found["not_served"][key] = reason_of(str(error))
                except Exception as error:  # that it does not compile is what this stage is to find out
                    found["first_call_failed"][key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found = job.save("build", found)
    say(str(vidkern.info()))
    broken = 0
    for stem, code in found["machine_code"].items():
        say(f"  {stem}.cu: {code.get('reason') or code['from']}, {code['seconds']:.1f} s")
        broken += "does not compile" in code.get("reason", "")
    for name, seconds in found["first_call_seconds"].items():
        say(f"  first call of {name}: {seconds:.2f} s")
    for name, reason in found["first_call_failed"].items():
        say(f"  first call of {name}: {reason}")
    return 1 if broken or found["first_call_failed"] else 0


def _verify(job: Job, shapes, tick: Callable, say: Callable) -> int:
    """The accuracy rule on every backend, a unit (backend and dtype) at a time, and the record of what passed."""
    import torch

    from vidkern.verify import command

    device = torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu")
    seed = time.time_ns() % 10**9
    say(f"verify: seed {seed}")
    units, unable = [], None
    planned = command.plan(device, None, None, seed)
    waiting = [u for u in planned if job.done(f"verify/{u.op}-{u.backend}-{u.dtype}") is None]
    tick("compiling ahead")
    say(f"verify: kernels compiled ahead in {command.compile_ahead(waiting, device, seed, max(0, job.left - 120)):.0f} s")
    for unit in planned:
        key = f"verify/{unit.op}-{unit.backend}-{unit.dtype}"
        found = job.done(key)
        if found is None and unable is None:
            if job.quick or job.dry:
                unit.steps = unit.steps[:2]
            tick(f"{unit.op} {unit.backend} {unit.dtype}")
            unable = command.verify([unit], seed, 0, job.deadline - 5, quiet=True)
            if unit.state != "not finished":
                job.save(key, unit.facts())
        elif found is not None:
            unit = command.Unit.from_facts(found)
        units.append(unit)
    say("\n".join(command.table(units)))
    job.save("verify", {"units": [u.facts() for u in units], "versions": command.versions(device), "stopped": unable,
                        "cut": any(u.state == "not finished" for u in units)})  # fmt: skip
    if not (job.quick or job.dry):
        for path in command.keep(units, device, seed, job.folder.parent):
            say(f"wrote {path}")
    if unable or any(u.failed for u in units):
        return 1
    return CUT if any(u.state == "not finished" for u in units) else 0


def _sanitize(job: Job, shapes, tick: Callable, say: Callable) -> int:
    states = gpu_machine.sanitize(job)
    for tool, found in states.items():
        say(f"  {tool:<10} {found['state']} {found['reason']}")
    return 1 if any(s["state"] == "errors" for s in states.values()) else 0


def _time(job: Job, shapes, tick: Callable, say: Callable) -> int:
    from . import gpu_time

    found = gpu_time.run(job, shapes or (gpu_time.QUICK_SHAPES if job.quick else gpu_time.SHAPES), tick, say)
    return CUT if any(b["cut"] for b in found) else 0


def _ops(job: Job, shapes, tick: Callable, say: Callable) -> int:
    from . import gpu_ops

    gpu_ops.run(job, tick, say)
    return 0


def _sweep(job: Job, shapes, tick: Callable, say: Callable) -> int:
    from . import gpu_sweep

    gpu_sweep.run(job, shapes or SWEEP_SHAPES, tick, say)
    return 0


def _profile(job: Job, shapes, tick: Callable, say: Callable) -> int:
    from . import gpu_time

    for row in gpu_time.profile(job)["kernels"]:
        say(f"  {row['microseconds']:12.1f} us  {row['calls']:4} calls  {row['name']}")
    return 0


RUN = {"machine": _machine, "build": _build, "verify": _verify, "sanitize": _sanitize, "time": _time, "ops": _ops,
       "sweep": _sweep, "profile": _profile}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
