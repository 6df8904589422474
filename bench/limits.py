"""The ceilings of this machine, measured in the process that the results come from.

Rates are in FLOP/s and bytes/s (a copy counts what it reads and what it writes). A ceiling is the best of several short
windows: whatever disturbs a window can only lower it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vidkern import compiled

from .harness import timer_for


def _best(call: Callable[[], object], work: float, seconds: float, device: str) -> float:
    timer = timer_for(device)
    timer(call, 1)
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        best = max(best, work / timer(call, 1))
    return best


def _thread_counts(n: int) -> list[int]:
    return sorted({t for t in (1, 2, 4, 8, 16, 32, 64, 128) if t < n} | {n})


def arithmetic_peak(dtype: str, threads: int, seconds: float) -> float | None:
    """Multiply-adds on registers alone, or None where the compiled part or the instruction is missing."""
    module = compiled.cpu()
    if module is None:
        return None
    loop = {"float32": module.peak_fp32, "bfloat16": module.peak_bf16}[dtype]
    windows = 5
    return max(loop(threads, seconds / windows) for _ in range(windows)) or None


def _cpu(seconds: float, size: int, copy_bytes: int, thread_counts: list[int]) -> dict:
    found = {name: {} for name in ("peak_float32", "peak_bfloat16", "mm_float32", "mm_bfloat16", "onednn_float32", "copy")}
    a, b = (torch.randn(size, size) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    big, big_out = (torch.ones(copy_bytes // 4) for _ in range(2))
    flops = 2.0 * size**3
    n = torch.get_num_threads()
    try:
        for t in thread_counts:
            torch.set_num_threads(t)
            for dtype in ("float32", "bfloat16"):
                found[f"peak_{dtype}"][t] = arithmetic_peak(dtype, t, seconds)
            found["mm_float32"][t] = _best(lambda: torch.mm(a, b), flops, seconds, "cpu")
            found["mm_bfloat16"][t] = _best(lambda: torch.mm(a16, b16), flops, seconds, "cpu")
            if torch.backends.mkldnn.is_available():
                linear = torch.ops.mkldnn._linear_pointwise
                found["onednn_float32"][t] = _best(lambda: linear(a, b, None, "none", [], ""), flops, seconds, "cpu")
            found["copy"][t] = _best(lambda: big_out.copy_(big), 2.0 * copy_bytes, seconds, "cpu")
    finally:
        torch.set_num_threads(n)
    return found


def _cuda(seconds: float) -> dict:
    found = {}
    for dtype, size in ((torch.float32, 4096), (torch.bfloat16, 8192)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        found[f"mm_{str(dtype)[6:]}"] = {1: _best(lambda: torch.mm(a, b), 2.0 * size**3, seconds, "cuda")}  # noqa: B023
    big, big_out = (torch.ones(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    found["copy"] = {1: _best(lambda: big_out.copy_(big), 2.0 * (1 << 30), seconds, "cuda")}
    return found


def measure(device: str, quick: bool = False, earlier: dict | None = None) -> dict:
    """All ceilings: ``{name: {threads: rate or None}}`` plus ``threads``, the count the results were made with.

    Takes about three seconds a thread count, or half a second with ``quick``. Given ``earlier`` ceilings of the same process,
    measures those with all threads once more and keeps the better: results lie between the two measurements, and a
    ceiling taken in a bad moment would flatter them.
    """
    n = torch.get_num_threads()
    if device == "cuda":
        n, found = 1, _cuda(0.1 if quick else 1.0)
    else:
        counts = [n] if earlier else _thread_counts(n)
        found = _cpu(0.05, 512, 32 << 20, counts) if quick else _cpu(0.5, 2048, 512 << 20, counts)
    if earlier:
        for name, rates in found.items():
            rates[n] = max(rates.get(n) or 0, earlier[name].get(n) or 0) or None
            found[name] = {**earlier[name], **rates}
    return {"threads": n, **found}


def ceiling(limits: dict, dtype: str) -> tuple[float, str]:
    """The arithmetic ceiling for a dtype and what it is: the register loop where there is one, else the best matmul.

    A CPU without a 16-bit dot product computes 16-bit data in float32, whose ceiling then holds.
    """
    n = limits["threads"]
    kind = "float32" if dtype == "float32" else "bfloat16"
    for name in (f"peak_{kind}", "peak_float32"):
        rate = _at(limits, name, n)
        if rate:
            return rate, name
    rates = {name: _at(limits, name, n) for name in (f"mm_{kind}", "onednn_float32", "mm_float32")}
    if kind == "bfloat16" and rates["mm_bfloat16"]:
        return rates["mm_bfloat16"], "mm_bfloat16"
    name = max((k for k in rates if rates[k] and k != "mm_bfloat16"), key=lambda k: rates[k])
    return rates[name], name


def bandwidth(limits: dict) -> float:
    """Copy bandwidth with all threads, bytes/s read and written."""
    return _at(limits, "copy", limits["threads"])


def _at(limits: dict, name: str, threads: int) -> float | None:
    by_threads = limits.get(name) or {}
    return by_threads.get(threads, by_threads.get(str(threads)))  # JSON turns the counts into strings
