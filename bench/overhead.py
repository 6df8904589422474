"""What the layers above a kernel's launcher cost, in microseconds a call."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from . import harness


def measure(calls: dict[str, Callable], timer: harness.Timer, rounds: int = 25) -> list[dict]:
    """One row per call: its microseconds, and those above the first call's, taken round by round (median)."""
    candidates = [harness.Candidate(name, call) for name, call in calls.items()]
    if not candidates:
        return []
    harness.choose_repeats(candidates, timer, sample_seconds=5e-3)
    samples = harness.interleave(candidates, rounds, timer)
    base = samples[candidates[0].name]
    return [
        {
            "name": name,
            "microseconds": statistics.median(s) * 1e6,
            "above_launcher": statistics.median(a - b for a, b in zip(s, base)) * 1e6,
        }
        for name, s in samples.items()
    ]
