"""Stage ``sweep``: every configuration of the kernels for compute capability 9.0 and of the Triton kernels on shapes that stand for the
real ones.

Compiling is most of the work of Triton's, so several processes first fill its cache with a kernel's configurations; then this process
times them one after the other, each from the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from . import block as blocks
from . import gpu_time
from .gpu_job import Job
from .peers import grid_attention as suite_of
from .shapes import GRID, GridShape
from .suite import DTYPES, Problem

KINDS = ("forward", "dq", "dkv")
# Heads of the large shapes: a call of some milliseconds (reckoned from FLOPs) tells a configuration's speed. The others have all of theirs.
HEADS = {"A": 16, "B": 16, "C": 4, "D": 1, "E": 1, "F": 6, "G": 1}
SAMPLES = 7
RATE = "speed over that of the fastest one, the geometric mean over the shapes of that head dim"
STAND_IN = "a dry run on a tiny shape: the order is chance, and a CPU's configurations are stand-ins that change nothing"
# A wrong configuration is far off; two right ones differ in the order of their sums.
ALLOWED = 2e-2


@dataclass(frozen=True)
class StandIn:
    """Configuration of a dry run without Triton's tables."""

    block_m: int
    block_n: int


class DryConfigs:
    """What the sweep needs of ``vidkern.ops.grid_attention.configs``, with nothing behind it."""

    @staticmethod
    def candidates(kind, dim, itemsize, shared):
        return [StandIn(m, n) for m in (64, 128) for n in (32, 64)]

    @staticmethod
    @contextlib.contextmanager
    def forced(kind, config) -> Iterator[None]:
        yield


class HopperConfigs:
    """The same of ``vidkern.ops.grid_attention.hopper`` and its backward, whose kernels are there once they are built."""

    @staticmethod
    def candidates(kind, dim, itemsize, shared):
        from vidkern.ops.grid_attention import hopper, hopper_backward

        return hopper.candidates(dim) if kind == "forward" else hopper_backward.candidates(kind, dim)

    @staticmethod
    def forced(kind, config) -> contextlib.AbstractContextManager:
        from vidkern.ops.grid_attention import hopper

        return hopper.forced(kind, config)


def tables(backend: str):
    """What has a backend's configurations; of one without, a stand-in for a dry run."""
    if backend == "hopper":
        return HopperConfigs
    if backend != "triton":
        return DryConfigs
    from vidkern.ops.grid_attention import configs

    return configs


def backends(job: Job, problem: Problem) -> list[str]:
    """Those of ours that serve the problem and have something to try; for a dry run the best, as a stand-in."""
    found = gpu_time.our_backends(problem)
    return found[:1] if job.dry else [n for n in found if n in ("hopper", "triton")]


def file_of(name: str, kind: str, backend: str) -> str:
    return f"sweep/{name}-{kind}-{backend}"


def shape_of(name: str, dry: bool) -> GridShape:
    return gpu_time.tiny(GRID[name]) if dry else replace(GRID[name], heads=HEADS.get(name, GRID[name].heads))


def shared_memory(device: str) -> int:
    """Bytes of shared memory that one block may take."""
    if device != "cuda":
        return 227 << 10
    p = torch.cuda.get_device_properties(0)
    known = getattr(p, "shared_memory_per_block_optin", 0)
    if known:
        return known
    from vidkern.ops.grid_attention import configs

    return configs.shared_memory((p.major, p.minor))


def runner(problem: Problem, kind: str, backend: str) -> Callable:
    """The call that contains kernel ``kind``: the forward, or the backward on the graph of one forward."""
    function = gpu_time.ours(backend).build(problem)
    return gpu_time.call_of(function, problem, "fwd" if kind == "forward" else "bwd")


def key_of(config) -> str:
    return json.dumps({k: v for k, v in asdict(config).items() if k != "rate"}, sort_keys=True)


# ---- compiling ahead --------------------------------------------------------------------------------------------------
def warm(name: str, kind: str, backend: str, part: int, parts: int) -> None:
    """Run this process's share of the configurations once, so that Triton's cache holds them."""
    configs, problem = tables(backend), suite_of.problem(shape_of(name, False), DTYPES[gpu_time.DTYPE], "cuda")
    call = runner(problem, kind, backend)
    todo = configs.candidates(kind, problem.shape.head_dim, problem.dtype.itemsize, shared_memory("cuda"))
    for config in todo[part::parts]:
        with contextlib.suppress(Exception), configs.forced(kind, config):  # the timing process records why one fails
            call()
            torch.cuda.synchronize()


def _warm_all(job: Job, name: str, kind: str, backend: str) -> float:
    """Seconds that compiling took, in half as many processes as there are CPUs."""
    parts = max(1, min(8, (os.cpu_count() or 2) // 2))
    start = time.monotonic()
    command = [sys.executable, "-m", "vidkern.bench.gpu_sweep", name, kind, backend]
    running = [subprocess.Popen([*command, str(i), str(parts)], stderr=subprocess.DEVNULL) for i in range(parts)]
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(1.0, job.left - 30))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return time.monotonic() - start


# ---- timing -----------------------------------------------------------------------------------------------------------
def measure(call: Callable, config, kind: str, right: tuple, configs, timer) -> dict:
    """A configuration's row: milliseconds, or why it has none."""
    row = {"config": asdict(config), "key": key_of(config)}
    try:
        with configs.forced(kind, config):
            found = call()
            worst = max(
                ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)).item() for a, b in zip(found, right)
            )
            if not worst <= ALLOWED:
                return {**row, "status": "wrong", "reason": f"{worst:.2g} of the largest value off the shipped configuration"}
            times = [timer(call, 1) for _ in range(SAMPLES)]
    except Exception as error:  # no resources for it, a compiler that gives up: part of the answer
        return {**row, "status": "failed", "reason": blocks._first_line(error)}
    return {**row, "status": "timed", "ms": sorted(times)[len(times) // 2] * 1e3, "ms_min": min(times) * 1e3}


def run(job: Job, shapes, tick: Callable[[str], None], say: Callable[[str], None] = print) -> dict:
    """Every configuration of every kernel on every shape; each row is on disk as soon as it is measured."""
    try:
        for name in shapes:
            problem = suite_of.problem(shape_of(name, job.dry), DTYPES[gpu_time.DTYPE], job.device)
            for backend, kind in itertools.product(backends(job, problem), KINDS):
                _one(job, name, problem, kind, backend, tick, say)
    finally:
        best = summary(job)
        if any(best["counts"].values()):  # a run that was cut before its first row leaves the answer of an earlier one alone
            best = job.save("sweep", best)
    say(render(best))
    return best


def _one(job: Job, name: str, problem: Problem, kind: str, backend: str, tick: Callable, say: Callable) -> None:
    """What is not there yet of one kernel on one shape."""
    configs, file = tables(backend), file_of(name, kind, backend)
    known = {r["key"] for r in job.rows(file)}
    todo = configs.candidates(kind, problem.shape.head_dim, problem.dtype.itemsize, shared_memory(job.device))
    if job.quick:
        todo = todo[:: max(1, len(todo) // 16)]
    todo = [c for c in todo if key_of(c) not in known]
    if not todo:
        return
    job.need(0.05 if job.dry else 60)
    call = runner(problem, kind, backend)
    right = tuple(x.clone() for x in call())
    if backend == "triton":
        tick(f"{name} {kind}: compiling {len(todo)}")
        say(f"sweep {name} {kind}: {len(todo)} configurations compiled in {_warm_all(job, name, kind, backend):.0f} s")
    for config in todo:
        tick(f"{name} {kind} {backend} {tuple(asdict(config).values())}")
        job.need(0.05 if job.dry else 15)
        job.append(file, measure(call, config, kind, right, configs, gpu_time.timer_for(job.device)))


# ---- the answer -------------------------------------------------------------------------------------------------------
def measured(job: Job) -> list[tuple[str, str, str]]:
    """(shape, kernel, backend) of every file of rows, also those of earlier runs on other shapes, in the order of their shapes."""
    found = [tuple(path.stem.split("-", 2)) for path in job.path("sweep").glob("*-*-*.jsonl")]
    order = {name: i for i, name in enumerate(GRID)}
    return sorted((f for f in found if f[0] in order and f[1] in KINDS), key=lambda f: (order[f[0]], KINDS.index(f[1]), f[2]))


def summary(job: Job) -> dict:
    """Of all rows that still hold, per backend, kernel and head dim the best configurations: of each shape, and of all shapes of that
    head dim together, with their :data:`RATE`."""
    found: dict = {}
    counts, heads = {"timed": 0, "failed": 0, "wrong": 0}, {}
    for name, kind, backend in measured(job):
        rows = job.rows(file_of(name, kind, backend))
        if rows:
            heads[name] = shape_of(name, job.dry).heads
        for row in rows:
            counts[row["status"]] += 1
        if timed := sorted((r for r in rows if r["status"] == "timed"), key=lambda r: r["ms"]):
            found.setdefault((backend, kind, str(shape_of(name, job.dry).head_dim)), {})[name] = timed
    best: dict = {}
    for (backend, kind, dim), by_shape in found.items():
        times = {name: {r["key"]: r["ms"] for r in rows} for name, rows in by_shape.items()}
        least = {name: min(t.values()) for name, t in times.items()}
        shared = set.intersection(*(set(t) for t in times.values()))
        rates = {k: math.exp(sum(math.log(least[n] / t[k]) for n, t in times.items()) / len(times)) for k in shared}
        ranked = sorted(rates, key=rates.get, reverse=True)[:6]
        best.setdefault(backend, {}).setdefault(kind, {})[dim] = {
            "together": [{**json.loads(k), "rate": round(rates[k], 3)} for k in ranked],
            **{n: [{**json.loads(r["key"]), "ms": round(r["ms"], 4)} for r in rows[:4]] for n, rows in by_shape.items()},
        }
    return {"dtype": gpu_time.DTYPE, "heads": heads, "best": best, "counts": counts,
            "about": {"rate": RATE, **({"dry": STAND_IN} if job.dry else {})}, "dry": job.dry}  # fmt: skip


def render(best: dict) -> str:
    shapes = ", ".join(best["heads"]) or "no shape"
    lines = [f"sweep: {', '.join(f'{n} {state}' for state, n in best['counts'].items())}, on {shapes}"]
    if not best["heads"]:
        return f"{lines[0]}: no backend that serves here has configurations to try"
    if best["dry"]:
        lines.append(f"  {STAND_IN}")
    lines.append(f"  each configuration with its rate: {RATE}")
    for backend, kinds in best["best"].items():
        for kind, dims in kinds.items():
            for dim, found in dims.items():
                top = "; ".join(f"{tuple(v for k, v in c.items() if k != 'rate')} {c['rate']:.2f}" for c in found["together"][:4])
                lines.append(f"  {backend:<7} {kind:<8} D {dim:<4} {top}")
    return "\n".join(lines)


if __name__ == "__main__":
    warm(*sys.argv[1:4], *map(int, sys.argv[4:6]))
