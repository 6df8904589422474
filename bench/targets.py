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


def _at_least(what: str, found: float, wanted: float) -> Verdict:
    return _compare(found >= wanted, found, wanted, f"{found:.3g} {what}, target at least {wanted:.3g}")


def _at_most(what: str, found: float, wanted: float) -> Verdict:
    return _compare(found <= wanted, found, wanted, f"{found:.3g} {what}, target at most {wanted:.3g}")


def _compare(met: bool, found: float, wanted: float, text: str) -> Verdict:
    return Verdict(met, text if met else f"{text} (off by {abs(found / wanted - 1):.0%})")
