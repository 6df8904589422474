"""Compile ahead, in several processes, what a verification will run: ``python -m vidkern.verify.warm <seed> <part> <parts> unit…``.

A backend that compiles at its first call spends nearly all of a verification on it, one kernel after the other. Its cache on
disk is shared, so that processes which each run a share of the cases once leave the verification little to compile.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from . import accuracy
from .rooms import room

MEMORY = 2 << 30  # of the device, for each process


def processes(device: torch.device) -> int:
    """How many are worth starting: half the CPUs, as the device's memory allows, at most eight; 0 for one alone."""
    found = min(8, (os.cpu_count() or 1) // 2, int(torch.cuda.mem_get_info(device)[0] // MEMORY))
    return found if found > 1 else 0


def cases(units: Sequence[str]) -> list[tuple]:
    """(op, backend, dtype, sample) of units written "op/backend/dtype"."""
    found = []
    for text in units:
        op, backend, dtype = text.split("/")
        found += [(op, backend, getattr(torch, dtype), sample) for sample in (*room(op).samples, *room(op).large)]
    return found


def run(units: Sequence[str], seed: int, part: int, parts: int, device: str = "cuda") -> int:
    """Run every ``parts``-th case once as the accuracy rule does; how many ran. What fails is the verification's to tell."""
    done = 0
    for op, backend, dtype, sample in cases(units)[part::parts]:
        r = room(op)
        with contextlib.suppress(Exception):
            tensors = r.inputs(sample, dtype, seed, device)
            with torch.no_grad():
                outputs = r.call(sample, tensors, impl=backend)
            weights = [torch.ones_like(o, dtype=torch.float64) for o in outputs]
            accuracy.measure(lambda x: r.call(sample, x, impl=backend), tensors, weights, r.differentiable)
            done += 1
    return done


def start(units: Sequence[str], seed: int, device: torch.device, limit: float = 240.0) -> float:
    """Run all of them in :func:`processes`, for at most ``limit`` seconds; returns the seconds it took (0: not worth it)."""
    parts = processes(device)
    if not parts or not units:
        return 0.0
    begun = time.monotonic()
    command = [sys.executable, "-m", "vidkern.verify.warm", str(seed)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen([*command, str(i), str(parts), *units], **quiet) for i in range(parts)]
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, begun + limit - time.monotonic()))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return time.monotonic() - begun


if __name__ == "__main__":
    run(sys.argv[4:], *map(int, sys.argv[1:4]))
