"""One block of measurements in one process: an op, a shape, a dtype, a mode, a memory setting.

Run as ``python -m vidkern.bench.block '<json>'`` by the command line, because a fresh process is the only way to choose
malloc's behaviour and to be rid of what earlier compilations left behind. Prints nothing but progress on stderr; the
record goes to the path it is given.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import harness, limits, machine, overhead, peers, records
from .suite import DTYPES, Peer, Problem, Reference, Suite

# glibc gives large blocks back to the system at every free and takes them anew, page by page, at every call. "kept"
# raises both thresholds, which is what a training process settles into by other means and what peers deserve.
MEMORY = {
    "default": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)},
}


@dataclass
class Block:
    """What to measure. ``peers`` is None for all, or names; ``seconds`` bounds the timed rounds."""

    op: str
    shape: str
    dtype: str
    mode: str
    memory: str = "default"
    device: str = "cpu"
    rounds: int = 9
    seconds: float = 60.0
    quick: bool = False
    peers: list[str] | None = None
    threads: int | None = None
    paths: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.mode} (memory {self.memory})"


def environment(block: Block) -> dict[str, str]:
    """Environment of the process that measures ``block``."""
    env = {k: v for k, v in os.environ.items() if k not in MEMORY["kept"]}
    return {**env, **MEMORY[block.memory]}


def why_not(peer: Peer, block: Block, shape) -> str | None:
    """Why a peer is not run at all, or None. Looked up in the order in which a user could do something about it."""
    if block.device not in peer.devices:
        return f"does not run on {block.device}"
    if block.dtype not in peer.dtypes:
        return f"has no {block.dtype}"
    if block.mode == "fwdbwd" and not peer.backward(block.device):
        return f"has no backward on {block.device}"
    if block.quick and peer.compiles and not (block.peers and peer.name in block.peers):
        return "is compiled at first use, left out of a quick run"
    need, free = peer.memory(shape, DTYPES[block.dtype].itemsize, block.mode), machine.free_memory(block.device)
    if need > 0.8 * free:
        return f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return peer.missing(block.device)


def runner(function: Callable, problem: Problem, mode: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call without arguments that gives the output and, for "fwdbwd", the gradients of the inputs."""
    if mode == "fwd":

        def forward():
            with torch.no_grad():
                return (function(*problem.inputs),)

        return forward

    inputs = tuple(x.detach().requires_grad_() for x in problem.inputs)

    def both():
        out = function(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out))

    return both


def errors(found: tuple[torch.Tensor, ...], right: Reference) -> list[tuple[float, float]]:
    """For each tensor: the largest error, and the same relative to the largest right value (NaN counts as infinite)."""
    result = []
    for x, y in zip(found, right.values, strict=True):
        x = right.pick(x)
        if x.shape != y.shape:
            raise ValueError(f"output: shape {tuple(x.shape)}, expected {tuple(y.shape)}")
        worst = (x.double() - y).abs().max().item()
        worst = worst if worst == worst else float("inf")
        result.append((worst, worst / max(y.abs().max().item(), 1e-30)))
    return result


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def prepare(peer: Peer, block: Block, suite: Suite, problem: Problem, right: Reference) -> tuple[dict, Callable | None]:
    """A peer's row, and the call to time; None when it cannot run or computes something else."""
    row = {"name": peer.name, "group": peer.group}
    reason = why_not(peer, block, problem.shape)
    if reason:
        return {**row, "status": "not run", "reason": reason}, None
    start = time.perf_counter()
    try:
        call = runner(peer.build(problem), problem, block.mode)
        found = errors(call(), right)
    except Exception as error:  # whatever a peer fails with belongs into the record, and the others still run
        torch._dynamo.reset()  # a failed compilation makes later ones fall back silently
        return {**row, "status": "failed", "reason": _first_line(error)}, None
    if peer.backend is not None:
        row["backend"] = peer.backend(problem)
    row["first_call_seconds"] = time.perf_counter() - start
    row["error"] = found[0][0]
    if block.mode == "fwdbwd":
        row["grad_error"] = max(e for e, _ in found[1:])
    allowed, worst = suite.tolerance[block.dtype], max(relative for _, relative in found)
    if not worst <= allowed:
        reason = f"largest error {worst:.2g} of the largest value, expected at most {allowed:.2g}"
        return {**row, "status": "wrong", "reason": reason}, None
    return {**row, "status": "timed"}, call


def rounds_for(seconds_per_round: float, block: Block) -> int:
    """As many rounds as asked for, fewer where they would outlast the block's seconds, and never fewer than three."""
    return max(min(3, block.rounds), min(block.rounds, int(block.seconds / max(seconds_per_round, 1e-9))))


def measure(block: Block, bar) -> dict:
    """The record of a block; see the README beside this file for its fields."""
    suite = peers.load(block.op)
    if block.threads:
        torch.set_num_threads(block.threads)
    bar.set_postfix_str("limits")
    ceilings = limits.measure(block.device, block.quick)
    shape, rule = suite.scaled(suite.shapes[block.shape], block.device)
    problem = suite.problem(shape, DTYPES[block.dtype], block.device)
    bar.set_postfix_str("reference")
    right = suite.reference(problem, block.mode)
    chosen = [p for p in suite.candidates if p is suite.ours or block.peers is None or p.name in block.peers]

    rows, calls = [], {}
    for peer in chosen:
        bar.set_postfix_str(f"prepare {peer.name}")
        row, call = prepare(peer, block, suite, problem, right)
        rows.append(row)
        if call is not None:
            calls[peer.name] = call
        bar.update()
    del right

    timer = harness.timer_for(block.device)
    candidates = [harness.Candidate(name, call) for name, call in calls.items()]
    bar.set_postfix_str("warm-up")
    estimate = harness.choose_repeats(candidates, timer)
    rounds = rounds_for(sum(estimate[c.name] * c.repeats for c in candidates), block)
    bar.total += rounds * len(candidates)
    bar.set_postfix_str("timing")
    with machine.Disturbance() as disturbance:
        samples = harness.interleave(candidates, rounds, timer, bar.update)

    bar.set_postfix_str("limits")
    ceilings = limits.measure(block.device, block.quick, ceilings)
    work = suite.work(shape, DTYPES[block.dtype].itemsize, block.mode)
    peak, peak_name = limits.ceiling(ceilings, block.dtype)
    floor = max(work.flops / peak, work.bytes / limits.bandwidth(ceilings))
    ours = samples.get(suite.ours.name)
    bar.set_postfix_str("memory")
    for row in rows:
        if row["status"] != "timed":
            continue
        times = samples[row["name"]]
        row["seconds"] = {**harness.summary(times), "samples": times}
        row["gflops"] = work.flops / row["seconds"]["median"] * 1e-9
        row["of_limit"] = floor / row["seconds"]["median"]
        row["ratio"] = harness.ratio(times, ours) if ours else None
        if block.memory == "default" or block.device == "cuda":  # kept memory is never given back, so nothing is extra
            extra = harness.peak_extra_memory(calls[row["name"]], block.device)
            row["peak_mib"] = None if extra is None else extra / 2**20
    record = {
        "format": 1,
        "op": block.op,
        "shape": {**shape.facts(), "name": block.shape},
        "scaling": rule,
        "dtype": block.dtype,
        "mode": block.mode,
        "memory": block.memory,
        "rounds": rounds,
        "quick": block.quick,
        # Where packages of peers lie on this machine says nothing about the measurement.
        "block": {name: value for name, value in asdict(block).items() if name != "paths"},
        "machine": machine.facts(block.device),
        "others_share": disturbance.share,
        "limits": {**ceilings, "ceiling": peak_name, "ceiling_flops": peak},
        "work": work._asdict(),
        "floor_seconds": floor,
        "rows": rows,
    }
    if suite.overheads and block.shape == suite.small and (block.mode, block.dtype) == ("fwd", "float32"):
        bar.set_postfix_str("overhead")
        record["overheads"] = overhead.measure(suite.overheads(block.device), timer, 5 if block.quick else 25)
    return record


def main(argv: list[str]) -> int:
    """``block.py '<json of a Block>' <path>``: measure and write the record."""
    from tqdm import tqdm

    block, path = Block(**json.loads(argv[0])), Path(argv[1])
    sys.path += block.paths
    total = len(peers.load(block.op).candidates) if block.peers is None else 1 + len(block.peers)
    with tqdm(total=total, desc=block.title, unit="step", leave=False, dynamic_ncols=True, disable=None) as bar:
        record = measure(block, bar)
    records.write_text(path, json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
