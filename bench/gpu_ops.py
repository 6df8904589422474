"""Stage ``ops``: every other op against its peers, a row for each backend of ours that serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import block as blocks
from . import gpu_time, harness, limits, machine, peers
from .gpu_job import Job
from .suite import DTYPES, Peer, Problem, Suite

# op -> shapes of its suite; an op with a suite in ``peers`` joins by an entry.
OPS = {
    "attention_motion_flow": ("2b", "5b", "wan"),
    "pruned_linear": ("gather", "qkv_irregular", "out_irregular"),
    "pruned_ffn": ("mobile", "irregular"),
    "pyramid_flow_inputs": ("wan", "pixels32"),
    "pyramid_flow_loss": ("wan",),
    "pyramid_flow_step": ("wan",),
    "pyramid_decompose": ("wan",),
    "pyramid_merge": ("wan",),
    "pyramid_stage_inputs": ("wan",),
    "pyramid_stage_transition": ("wan",),
}
QUICK = ("attention_motion_flow", "pruned_linear", "pyramid_flow_inputs")
DTYPE = gpu_time.DTYPE
LEFT_OUT = "is compiled at first use, left out of a dry run"
SECONDS = 15.0  # of the timed rounds of one block
NEEDED = 40.0  # seconds that a block may take, compiling included


def backends(op: str) -> list[str]:
    """Names of our backends, best first; the reference is no candidate."""
    from vidkern import registry

    return [b.name for b in registry.ops()[op].backends if b.name != "reference"]


def ours(suite: Suite, backend: str) -> Peer:
    """The suite's call of ours on one backend. The backward runs on the backend of the forward."""
    import vidkern

    def build(problem: Problem) -> Callable:
        with vidkern.use(backend):
            function = suite.ours.build(problem)

        def run(*inputs):
            with vidkern.use(backend):
                return function(*inputs)

        return run

    return Peer(f"vidkern {backend}", build, group="vidkern", backward=suite.ours.backward, memory=suite.ours.memory)


def prepare(peer: Peer, block: blocks.Block, suite: Suite, problem: Problem, right) -> tuple[dict, Callable | None]:
    """As ``block.prepare``; a backend that cannot serve the problem is not run rather than failed."""
    row, call = blocks.prepare(peer, block, suite, problem, right)
    if row["status"] == "failed" and row["reason"].startswith("BackendUnavailable"):
        row |= {"status": "not run", "reason": reason_of(row["reason"])}
    return row, call


def reason_of(text: str) -> str:
    """Why a backend cannot serve, out of the sentence of a BackendUnavailable that names backend and op as well."""
    return text.partition("cannot serve this call of ")[2].partition(": ")[2] or text


def measure(job: Job, op: str, name: str, mode: str, tick: Callable[[str], None]) -> dict:
    """A shape of an op in a mode."""
    suite = peers.load(op)
    shape, rule = suite.scaled(suite.shapes[name], job.device)
    problem = suite.problem(shape, DTYPES[DTYPE], job.device)
    block = blocks.Block(op, name, DTYPE, mode, device=job.device, quick=job.quick)
    tick("reference")
    right = suite.reference(problem, mode)
    rows, calls = [], {}
    for peer in (*(ours(suite, b) for b in backends(op)), *suite.peers):
        tick(peer.name)
        if job.dry and peer.compiles and blocks.why_not(peer, block, problem.shape) is None:
            rows.append({"name": peer.name, "group": peer.group, "status": "not run", "reason": LEFT_OUT})
            continue
        row, call = prepare(peer, block, suite, problem, right)
        rows.append(row)
        if call is not None:
            calls[peer.name] = call
    del right

    tick("timing")
    timer = gpu_time.timer_for(job.device)
    chosen = [harness.Candidate(n, c) for n, c in calls.items()]
    once = harness.choose_repeats(chosen, timer)
    seconds = max(1.0, min(SECONDS, job.left - 10))
    most = 3 if job.quick or job.dry else gpu_time.ROUNDS
    rounds = max(3, min(most, int(seconds / max(sum(once[c.name] * c.repeats for c in chosen), 1e-9))))
    with machine.Disturbance() as disturbance:
        samples = harness.interleave(chosen, rounds, timer)
    ceilings = limits.measure(job.device, True)
    work = suite.work(shape, DTYPES[DTYPE].itemsize, mode)
    floor = max(work.flops / limits.ceiling(ceilings, DTYPE)[0], work.bytes / limits.bandwidth(ceilings))
    first = next((n for n in calls if n.startswith("vidkern ")), None)
    for row in rows:
        if row["status"] == "timed":
            times = samples[row["name"]]
            median = harness.summary(times)["median"]
            row["seconds"] = {**harness.summary(times), "samples": times}
            row |= {"tflops": work.flops / median * 1e-12, "gbytes": work.bytes / median * 1e-9, "of_limit": floor / median}
            row["ratio"] = harness.ratio(times, samples[first]) if first else None
    return {
        "format": 1, "op": op, "shape": {**shape.facts(), "name": name}, "scaling": rule, "dtype": DTYPE, "mode": mode, "rounds": rounds,
        "cut": False, "work": work._asdict(), "floor_seconds": floor, "limits": ceilings, "rows": rows, "others_share": disturbance.share,
    }  # fmt: skip


def plan(job: Job, table: dict[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """(op, shape, mode) in order. A dry run takes each suite's small shape, a quick one the first shape of three ops, forward alone."""
    found = []
    for op, shapes in table.items():
        suite = peers.load(op)
        if job.quick and op not in QUICK:
            continue
        for name in (suite.quick,) if job.dry else shapes[:1] if job.quick else shapes:
            modes = ("fwd", "fwdbwd") if suite.ours.backward(job.device) and not (job.quick or job.dry) else ("fwd",)
            found += [(op, name, mode) for mode in modes]
    return found


def run(job: Job, tick: Callable[[str], None], say: Callable[[str], None] = print) -> list[dict]:
    """Every block that is not there yet; each is on disk as soon as it is measured."""
    found, told = [], set()
    for op, name, mode in plan(job, OPS):
        key = f"ops/{op}-{name}-{DTYPE}-{mode}"
        block = job.done(key)
        if block is None:
            job.need(0.05 if job.dry else NEEDED)
            torch._dynamo.reset()  # compilations of other shapes count towards the limit at which it gives up
            block = job.save(key, measure(job, op, name, mode, lambda what: tick(f"{op} {name} {mode}: {what}")))
            say(render(block, told))
        found.append(block)
        if job.device == "cuda":
            torch.cuda.empty_cache()
    return found


def render(block: dict, told: set | None = None) -> str:
    """A block as a table. What is in ``told``, a candidate and why it has no time, is not explained again; the rest joins it."""
    from .table import _number, align

    lines = [("candidate", "ms", "TFLOP/s", "GB/s", "% limit", "time / ours", "first call s")]
    for r in sorted((r for r in block["rows"] if r["status"] == "timed"), key=lambda r: r["seconds"]["median"]):
        ratio = f"{r['ratio']:.2f}" if r.get("ratio") else "-"
        lines.append((
            r["name"], _number(r["seconds"]["median"] * 1e3), _number(r["tflops"]), _number(r["gbytes"]), f"{100 * r['of_limit']:.1f}",
            ratio, _number(r.get("first_call_seconds")),
        ))  # fmt: skip
    told = set() if told is None else told
    others = [(r, (r["name"], r["status"], r["reason"])) for r in block["rows"] if r["status"] != "timed"]
    again = [r["name"] for r, key in others if key in told]
    text = [
        f"{block['op']} {block['shape']['name']} {block['dtype']} {block['mode']}, {block['rounds']} rounds",
        *align(lines),
        *(": ".join(key) for _, key in others if key not in told),
        *([f"without a time, as said above: {'; '.join(again)}"] if again else []),
    ]
    told.update(key for _, key in others)
    return "\n".join(text) + "\n"
