"""Stage ``sweep``: every configuration of the Triton kernels on shapes that stand for the real ones.

Compiling is most of the work, so several processes first fill Triton's cache with a kernel's configurations; then this process
times them one after the other, each from the cache.
"""

from __future__ import annotations

import contextlib
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
HEADS = {"A": 16, "C": 4, "F": 6}
SAMPLES = 7
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


def tables(dry: bool):
    """The module of configurations; a stand-in for a dry run."""
    if dry:
        return DryConfigs
    from vidkern.ops.grid_attention import configs

    return configs


def shape_of(name: str, dry: bool) -> GridShape:
    return gpu_time.tiny(GRID[name]) if dry else replace(GRID[name], heads=HEADS[name])


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
    configs, problem = tables(False), suite_of.problem(shape_of(name, False), DTYPES[gpu_time.DTYPE], "cuda")
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
    configs, timer = tables(job.dry), gpu_time.timer_for(job.device)
    for name in shapes:
        problem = suite_of.problem(shape_of(name, job.dry), DTYPES[gpu_time.DTYPE], job.device)
        backend = "triton" if not job.dry else gpu_time.our_backends(problem)[0]
        for kind in KINDS:
            file = f"sweep/{name}-{kind}"
            known = {r["key"] for r in job.rows(file)}
            todo = configs.candidates(kind, problem.shape.head_dim, problem.dtype.itemsize, shared_memory(job.device))
            if job.quick:
                todo = todo[:: max(1, len(todo) // 16)]
            todo = [c for c in todo if key_of(c) not in known]
            if not todo:
                continue
            job.need(0.05 if job.dry else 60)
            call = runner(problem, kind, backend)
            right = tuple(x.clone() for x in call())
            if job.device == "cuda":
                tick(f"{name} {kind}: compiling {len(todo)}")
                say(f"sweep {name} {kind}: {len(todo)} configurations compiled in {_warm_all(job, name, kind, backend):.0f} s")
            for config in todo:
                tick(f"{name} {kind} {tuple(asdict(config).values())}")
                job.need(0.05 if job.dry else 15)
                job.append(file, measure(call, config, kind, right, configs, timer))
    best = job.save("sweep", summary(job, shapes))
    say(render(best))
    return best


# ---- the answer -------------------------------------------------------------------------------------------------------
def summary(job: Job, shapes) -> dict:
    """Per kernel and head dim the best configurations: of each shape, and of all shapes of that head dim together.

    ``rate`` is a configuration's speed over the best one's, the geometric mean over the shapes.
    """
    found: dict = {}
    for name in shapes:
        dim = str(shape_of(name, job.dry).head_dim)
        for kind in KINDS:
            rows = [r for r in job.rows(f"sweep/{name}-{kind}") if r["status"] == "timed"]
            if rows:
                found.setdefault(kind, {}).setdefault(dim, {})[name] = sorted(rows, key=lambda r: r["ms"])
    best: dict = {}
    for kind, dims in found.items():
        for dim, by_shape in dims.items():
            times = {name: {r["key"]: r["ms"] for r in rows} for name, rows in by_shape.items()}
            least = {name: min(t.values()) for name, t in times.items()}
            shared = set.intersection(*(set(t) for t in times.values()))
            rates = {k: math.exp(sum(math.log(least[n] / t[k]) for n, t in times.items()) / len(times)) for k in shared}
            ranked = sorted(rates, key=rates.get, reverse=True)[:6]
            best.setdefault(kind, {})[dim] = {
                "together": [{**json.loads(k), "rate": round(rates[k], 3)} for k in ranked],
                **{n: [{**json.loads(r["key"]), "ms": round(r["ms"], 4)} for r in rows[:4]] for n, rows in by_shape.items()},
            }
    counts = {"timed": 0, "failed": 0, "wrong": 0}
    for name in shapes:
        for kind in KINDS:
            for row in job.rows(f"sweep/{name}-{kind}"):
                counts[row["status"]] += 1
    return {"dtype": gpu_time.DTYPE, "heads": HEADS, "best": best, "counts": counts}


def render(best: dict) -> str:
    lines = [f"sweep: {', '.join(f'{n} {state}' for state, n in best['counts'].items())}"]
    for kind, dims in best["best"].items():
        for dim, found in dims.items():
            top = "; ".join(f"{tuple(v for k, v in c.items() if k != 'rate')} {c['rate']:.2f}" for c in found["together"][:4])
            lines.append(f"  {kind:<8} D {dim:<4} {top}")
    return "\n".join(lines)


if __name__ == "__main__":
    warm(*sys.argv[1:4], *map(int, sys.argv[4:6]))
