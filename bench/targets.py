"""Checks a record against its suite's targets. A target missed is a finding, never a failure."""

from __future__ import annotations

from dataclasses import dataclass

from .suite import Suite, Target


@dataclass(frozen=True)
class Verdict:
    """``met`` is None when the record does not hold what the target needs; ``text`` is one line for people."""

    met: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'met', False: 'MISSED', None: 'unknown'}[self.met]:7}  {self.text}"


def evaluate(record: dict, suite: Suite) -> list[Verdict]:
    """A verdict for every target that applies to the record's device, shape, dtype and mode."""
    device = record["block"]["device"]
    key = (device, record["mode"], record["dtype"])
    return [
        _verdict(record, suite, t)
        for t in suite.targets
        if (t.device, t.mode, t.dtype) == key and (not t.shapes or record["shape"]["name"] in t.shapes)
    ]


def _verdict(record: dict, suite: Suite, target: Target) -> Verdict:
    if target.measure == "launcher":
        return _launcher(record, target)
    rows = {r["name"]: r for r in record["rows"] if r["status"] == "timed"}
    ours = rows.get(suite.ours.name)
    name = f"{target.measure}" + (f" against {' or '.join(target.against)}" if target.against else "")
    if ours is None:
        return Verdict(None, f"{name}: ours was not timed")
    if target.measure in ("limit", "tflops", "bytes"):
        return _alone(record, suite, ours, target)
    rivals = [r for r in rows.values() if r["name"] in target.against or r["group"] in target.against]
    if not rivals:
        return Verdict(None, f"{name}: no such peer was timed")
    best = min(rivals, key=lambda r: r["seconds"]["median"])
    if target.measure == "time":
        # The peer's ratio to us, from the rounds in which both ran.
        return _at_least(f"times as fast as {best['name']}", best["ratio"], target.value)
    if target.measure == "memory":
        mine, theirs = ours.get("peak_mib"), best.get("peak_mib")
        if not mine or not theirs:
            return Verdict(None, f"{name}: memory is measured with the default allocator only")
        return _at_least(f"times less extra memory than {best['name']}", theirs / mine, target.value)
    errors = [max(r["error"], r.get("grad_error") or 0) for r in (ours, best)]
    return _at_most(f"of the error of {best['name']}", errors[0] / max(errors[1], 1e-30), target.value)


def _alone(record: dict, suite: Suite, ours: dict, target: Target) -> Verdict:
    if target.measure == "limit":
        return _at_least(f"of the limit ({record['limits']['ceiling']})", ours["of_limit"], target.value)
    if target.measure == "tflops":
        return _at_least("useful TFLOP/s", ours["gflops"] * 1e-3, target.value)
    if ours.get("peak_mib") is None:
        return Verdict(None, "extra memory: measured with the default allocator only")
    shape = suite.scaled(suite.shapes[record["shape"]["name"]], record["block"]["device"])[0]
    return _at_most("MiB of extra memory", ours["peak_mib"], target.value(shape) / 2**20)


def _launcher(record: dict, target: Target) -> Verdict:
    for row in record.get("overheads", ()):
        if row["name"] in target.against:
            return _at_most(f"us above the launcher, {row['name']}", row["above_launcher"], target.value)
    return Verdict(None, f"overhead of {' or '.join(target.against)}: not measured")


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GpuTarget:
    """A goal for a backend of ours on a GPU, read from a block of ``gpu_time.py``.

    Args:
        backend: whose; "" for the best of ours.
        measure: "dense" (useful TFLOP/s over the rate of dense attention on the same device), "time" (peer's time / ours),
            "tflops" (useful TFLOP/s), "deterministic" (its rate over that of the default), "plan" (host milliseconds beyond a
            later call when the grid is new, at most).
        wanted: the value asked for; ``goal`` is the one hoped for, if there is one.
        against: peers for "time".
        shapes: names, or () for all.
    """

    backend: str
    mode: str
    measure: str
    wanted: float
    goal: float | None = None
    against: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()


# FlashAttention-3 is the ceiling where it is installed; else the fastest dense attention that is, and the verdict names it.
DENSE_FIRST = "dense FlashAttention-3"
# Rates ("tflops") are for H100 and H200, on which torch.mm reaches 700 to 790 TFLOP/s.
GPU = (
    GpuTarget("triton", "fwd", "dense", 0.60, 0.75),
    GpuTarget("triton", "bwd", "dense", 0.45, 0.60),
    GpuTarget("", "fwd", "time", 1.7, against=("FlexAttention, block 128", "FlexAttention, block 64")),
    GpuTarget("", "bwd", "time", 1.9, against=("FlexAttention, block 128", "FlexAttention, block 64")),
    GpuTarget("", "fwd", "time", 1.8, against=("three dense calls merged",)),
    GpuTarget("", "fwd", "time", 1.1, against=("three dense calls merged, FlashAttention-3",)),
    GpuTarget("", "bwd", "deterministic", 0.65),
    GpuTarget("", "fwd", "plan", 0.020),
    *(
        GpuTarget("hopper", mode, "tflops", value, shapes=shapes)
        for mode, rates in (("fwd", (560, 400, 450)), ("bwd", (420, 300, 330)))
        for shapes, value in zip((("C", "D", "E"), ("A", "B"), ("F",)), rates)
    ),
)


def evaluate_gpu(block: dict) -> list[Verdict]:
    """A verdict for every GPU target that applies to the block's shape and mode and whose backend was timed."""
    rows = {r["name"]: r for r in block["rows"] if r["status"] == "timed"}
    found = []
    for target in GPU:
        if target.mode != block["mode"] or (target.shapes and block["shape"]["name"] not in target.shapes):
            continue
        plain = [r for n, r in rows.items() if r["group"] == "vidkern" and "," not in n]
        mine = [r for r in plain if target.backend in ("", r["name"].removeprefix("vidkern "))]
        if mine:
            found.append(_gpu_verdict(block, rows, max(mine, key=lambda r: r["tflops"]), target))
    return found


def _gpu_verdict(block: dict, rows: dict, mine: dict, target: GpuTarget) -> Verdict:
    if target.measure == "tflops":
        return _at_least(f"useful TFLOP/s, {mine['name']}", mine["tflops"], target.wanted)
    if target.measure == "plan":
        beyond = max(0.0, block["new_grid"]["first_ms"] - block["new_grid"]["later_ms"])
        return _at_most("host ms more for a grid not met before", beyond, target.wanted)
    if target.measure == "deterministic":
        other = rows.get(f"{mine['name']}, deterministic")
        if other is None:
            return Verdict(None, f"deterministic backward: {mine['name']} was not timed with it")
        return _at_least(f"of the rate, deterministic backward, {mine['name']}", other["tflops"] / mine["tflops"], target.wanted)
    if target.measure == "dense":
        dense = [r for r in rows.values() if r["group"] == "dense"]
        if not dense:
            return Verdict(None, "rate against dense attention: none was timed")
        best = rows.get(DENSE_FIRST) or max(dense, key=lambda r: r["tflops"])
        found = mine["tflops"] / best["tflops"]
        goal = "" if target.goal is None else f", goal {target.goal:.3g} {'reached' if found >= target.goal else 'not reached'}"
        verdict = _at_least(f"of the rate of {best['name']}, {mine['name']}", found, target.wanted)
        return Verdict(verdict.met, verdict.text + goal)
    rivals = [rows[n] for n in target.against if n in rows]
    if not rivals:
        return Verdict(None, f"time against {' or '.join(target.against)}: not timed")
    best = min(rivals, key=lambda r: r["seconds"]["median"])
    times = best["seconds"]["median"] / mine["seconds"]["median"]
    return _at_least(f"times as fast as {best['name']}, {mine['name']}", times, target.wanted)


def _at_least(what: str, found: float, wanted: float) -> Verdict:
    return _compare(found >= wanted, found, wanted, f"{found:.3g} {what}, target at least {wanted:.3g}")


def _at_most(what: str, found: float, wanted: float) -> Verdict:
    return _compare(found <= wanted, found, wanted, f"{found:.3g} {what}, target at most {wanted:.3g}")


def _compare(met: bool, found: float, wanted: float, text: str) -> Verdict:
    return Verdict(met, text if met else f"{text} (off by {abs(found / wanted - 1):.0%})")
