"""Timing that compares fairly: candidates take turns in one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Timer = Callable[[Callable[[], Any], int], float]


def cpu_timer(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, over ``repeats`` calls; results are freed after the clock has stopped."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed / repeats


class CudaTimer:
    """Seconds of one call between two events; what earlier calls left in the L2 cache is overwritten first."""

    def __init__(self):
        self.cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], Any], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats


def timer_for(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else cpu_timer


@dataclass
class Candidate:
    """Something to time. ``repeats`` calls make one sample, so that the clock's own cost does not count."""

    name: str
    call: Callable[[], Any]
    repeats: int = 1


def choose_repeats(candidates: Sequence[Candidate], timer: Timer, sample_seconds: float = 2e-3) -> dict[str, float]:
    """Warm every candidate up, set its ``repeats`` so that a sample lasts ``sample_seconds``; returns seconds a call."""
    seconds = {}
    for c in candidates:
        c.repeats = 1
        # Two calls, because the first may compile.
        seconds[c.name] = once = min(timer(c.call, 1), timer(c.call, 1))
        c.repeats = max(1, min(10_000, round(sample_seconds / max(once, 1e-7))))
        if c.repeats > 1:
            seconds[c.name] = timer(c.call, c.repeats)
    return seconds


def interleave(
    candidates: Sequence[Candidate], rounds: int, timer: Timer, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """One sample of every candidate per round; each round starts with another one, so that none always follows the same."""
    samples = {c.name: [] for c in candidates}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            for i in range(len(candidates)):
                c = candidates[(r + i) % len(candidates)]
                samples[c.name].append(timer(c.call, c.repeats))
                tick()
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum and interquartile range (0 for fewer than two samples), in the samples' unit."""
    quarters = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [0, 0, 0]
    return {"median": statistics.median(samples), "min": min(samples), "iqr": quarters[2] - quarters[0]}


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of sample / baseline: a slow spell of the machine hits both sides of a round's ratio."""
    return statistics.median(a / b for a, b in zip(samples, baseline, strict=True))


def peak_extra_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call holds at its peak beyond what was held before, its result included; None if unknown here.

    On a CPU it is the resident memory that the kernel counts (Linux), so pages that were never touched do not count.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _return_free_memory() -> None:
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
