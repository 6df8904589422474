"""Stage ``time``: grid attention against its peers and against dense attention, and stage ``profile``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from . import block as blocks
from . import gpu_machine, harness, limits, machine, targets
from .gpu_job import Job
from .peers import _grid_attention_gpu as gpu_peers
from .peers import grid_attention as suite_of
from .shapes import GRID, GridShape, forward_flops
from .suite import DTYPES, Peer, Problem

MODES = ("fwd", "bwd")
SHAPES = ("C", "A", "F", "B", "G", "E", "D")
QUICK_SHAPES = ("C", "A", "F")
DTYPE = "bfloat16"
MASK_LENGTH = 20_000  # an L x L mask makes sense up to here
BLOCK_SECONDS = 40.0  # of the timed rounds of one block
ROUNDS = 24
RESERVE = 45.0  # seconds kept for the timing of what is prepared


class QueuedTimer(harness.CudaTimer):
    """As CudaTimer, but the device is kept busy while the host queues the call: what is timed is the device's work alone."""

    def __call__(self, call: Callable, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(4_000_000)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats


def timer_for(device: str) -> harness.Timer:
    return QueuedTimer() if device == "cuda" else harness.cpu_timer


def tiny(shape: GridShape) -> GridShape:
    """A stand-in of the same name that a dry run computes in milliseconds."""
    return replace(shape, heads=2, head_dim=16, views=3, times=2, tokens=8)


# ---- candidates -------------------------------------------------------------------------------------------------------
def ours(backend: str, **options) -> Peer:
    """A backend of ours as a candidate; ``options`` go to the call, except that with ``lse`` the lse is asked for too."""
    words = [backend, *("with lse" if k == "return_lse" else k for k in options)]

    def build(p: Problem):
        import vidkern

        grid = (p.shape.views, p.shape.times)

        def run(q, k, v):
            out = vidkern.grid_attention(q, k, v, grid=grid, impl=backend, **options)
            return out[0] if options.get("return_lse") else out

        return run

    return Peer(f"vidkern {', '.join(words)}", build, group="vidkern", memory=suite_of.SUITE.ours.memory)


def our_backends(problem: Problem) -> list[str]:
    """Backends of ours that serve the problem, best first; the reference only where nothing else does."""
    import vidkern
    from vidkern import registry

    found = vidkern.explain(vidkern.grid_attention, *problem.inputs, grid=(problem.shape.views, problem.shape.times))
    names = [b.name for b in registry.ops()["grid_attention"].backends]
    able = [n for n in names if "could serve" in found.reasons[n] or n == found.chosen]
    return [n for n in able if n != "reference"] or able


def candidates(problem: Problem, mode: str, dry: bool) -> list[Peer]:
    """What is timed on a problem, the most telling first: ours, then the strongest peers."""
    device, mine = problem.device.type, []
    for backend in our_backends(problem):
        mine.append(ours(backend))
        mine.append(ours(backend, return_lse=True) if mode == "fwd" else ours(backend, deterministic=True))
    by_name = {p.name: p for p in suite_of.PEERS}
    others = [by_name[n] for n in (*suite_of.FLEX, *suite_of.THREE)] + [gpu_peers.THREE_FLASH3]
    if problem.shape.length <= MASK_LENGTH:
        others.append(suite_of.DENSE_MASK)
    return [*mine, *(p for p in others if not (dry and (p.compiles or device not in p.devices)))]


# ---- one candidate ----------------------------------------------------------------------------------------------------
def backward_call(function: Callable, problem: Problem) -> Callable:
    """A call of the backward alone, on the graph of one forward."""
    inputs = tuple(x.detach().requires_grad_() for x in problem.inputs)
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, inputs, problem.grad_out, retain_graph=True)


def call_of(function: Callable, problem: Problem, mode: str) -> Callable:
    return backward_call(function, problem) if mode == "bwd" else blocks.runner(function, problem, "fwd")


def prepare(peer: Peer, problem: Problem, mode: str, right) -> tuple[dict, Callable | None]:
    """A peer's row and the call to time; None when it cannot run or computes something else."""
    row = {"name": peer.name, "group": peer.group}
    block = blocks.Block("grid_attention", problem.shape.name, DTYPE, "fwdbwd" if mode == "bwd" else "fwd",
                         device=problem.device.type)  # fmt: skip
    reason = blocks.why_not(peer, block, problem.shape)
    if reason:
        return {**row, "status": "not run", "reason": reason}, None
    try:
        start = time.perf_counter()
        function = peer.build(problem)
        _wait(problem)
        row["build_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        found = blocks.runner(function, problem, block.mode)()
        _wait(problem)
        row["first_call_seconds"] = time.perf_counter() - start
        found = blocks.errors(found, right)
        call = call_of(function, problem, mode)
        row["host_us"] = _host_microseconds(call, problem)
    except Exception as error:  # whatever a peer fails with belongs into the record, and the others still run
        torch._dynamo.reset()
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**row, "status": "failed", "reason": blocks._first_line(error)}, None
    row["error"] = found[0][0]
    if mode == "bwd":
        row["grad_error"] = max(e for e, _ in found[1:])
    worst, allowed = max(relative for _, relative in found), suite_of.SUITE.tolerance[DTYPE]
    if not worst <= allowed:
        reason = f"largest error {worst:.2g} of the largest value, expected at most {allowed:.2g}"
        return {**row, "status": "wrong", "reason": reason}, None
    return {**row, "status": "timed"}, call


def _wait(problem: Problem) -> None:
    if problem.device.type == "cuda":
        torch.cuda.synchronize()


def _host_microseconds(call: Callable, problem: Problem) -> float:
    """Median time until the call comes back to Python: what the host spends on a call that has been made before."""
    taken = []
    for _ in range(9):
        _wait(problem)
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    _wait(problem)
    return statistics.median(taken) * 1e6


def prepare_dense(dense: gpu_peers.Dense, shape: GridShape, device: str, mode: str) -> tuple[dict, Callable | None]:
    """A dense call on as many heads as its rate needs. Its row counts its own FLOPs."""
    shape = gpu_peers.dense_shape(shape)
    flops = gpu_peers.dense_flops(shape) * (2.5 if mode == "bwd" else 1)
    row = {"name": dense.name, "group": "dense", "heads": shape.heads, "flops": flops}
    reason = f"does not run on {device}" if device not in dense.devices else dense.missing(device)
    if reason:
        return {**row, "status": "not run", "reason": reason}, None
    try:
        problem = suite_of.problem(shape, DTYPES[DTYPE], device)
        call = call_of(dense.build(problem), problem, mode)
        out = call()[0]
        if not torch.isfinite(out).all():
            return {**row, "status": "wrong", "reason": "not finite"}, None
    except Exception as error:  # an unsupported shape, no memory: it belongs into the record
        return {**row, "status": "failed", "reason": blocks._first_line(error)}, None
    return {**row, "status": "timed"}, call


# ---- one block ----------------------------------------------------------------------------------------------------------
def measure(job: Job, name: str, mode: str, tick: Callable[[str], None]) -> dict:
    """A shape in a mode. When time runs short, what is prepared is timed and the rest is marked; a rerun measures it anew."""
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # a backward that is timed runs many times on one graph
    torch._dynamo.reset()  # compilations of other shapes count towards the limit at which it gives up
    shape = tiny(GRID[name]) if job.dry else GRID[name]
    problem = suite_of.problem(shape, DTYPES[DTYPE], job.device)
    tick("reference")
    right = suite_of.reference(problem, "fwdbwd" if mode == "bwd" else "fwd")
    rows, calls, cut = [], {}, False
    todo: list[tuple[str, Callable]] = [
        (p.name, lambda p=p: prepare(p, problem, mode, right)) for p in candidates(problem, mode, job.dry)
    ]
    dense = [d for d in gpu_peers.DENSE if not job.dry or job.device in d.devices]
    todo += [(d.name, lambda d=d: prepare_dense(d, shape, job.device, mode)) for d in dense]
    for label, make in todo:
        if job.left < RESERVE and rows:
            rows.append({"name": label, "group": "", "status": "not run", "reason": "out of time"})
            cut = True
            continue
        tick(label)
        row, call = make()
        rows.append(row)
        if call is not None:
            calls[label] = call
    del right

    tick("timing")
    timer = timer_for(job.device)
    chosen = [harness.Candidate(n, c) for n, c in calls.items()]
    once = {c.name: min(timer(c.call, 1), timer(c.call, 1)) for c in chosen}
    seconds = max(1.0, min(BLOCK_SECONDS, job.left - 15))
    most = 3 if job.quick or job.dry else ROUNDS
    rounds = max(3, min(most, int(seconds / max(sum(once.values()), 1e-9))))
    with machine.Disturbance() as disturbance:
        samples = harness.interleave(chosen, rounds, timer)
    after = gpu_machine.clocks()
    ceilings = limits.measure(job.device, True)
    ceiling, ceiling_name = limits.ceiling(ceilings, DTYPE)
    needed = forward_flops(shape) * (2.5 if mode == "bwd" else 1)
    first = next((n for n in calls if n.startswith("vidkern")), None)
    for row in rows:
        if row["status"] != "timed":
            continue
        times = samples[row["name"]]
        row["seconds"] = {**harness.summary(times), "samples": times}
        row["tflops"] = row.get("flops", needed) / row["seconds"]["median"] * 1e-12
        row["of_ceiling"] = row["tflops"] * 1e12 / ceiling
        if row["group"] != "dense":
            row["ratio"] = harness.ratio(times, samples[first]) if first else None
            extra = harness.peak_extra_memory(calls[row["name"]], job.device)
            row["peak_mib"] = None if extra is None else extra / 2**20
        else:
            # The time that dense attention takes over the whole problem, and what of it is useful here.
            full = gpu_peers.dense_flops(shape) * (2.5 if mode == "bwd" else 1)
            row["full_seconds"] = row["seconds"]["median"] * full / row["flops"]
            row["useful_tflops"] = needed / row["full_seconds"] * 1e-12
    return {
        "format": 1, "op": "grid_attention", "shape": {**shape.facts(), "name": name}, "dtype": DTYPE, "mode": mode, "rounds": rounds,
        "cut": cut, "flops": needed, "ceiling": {"name": ceiling_name, "tflops": ceiling * 1e-12, "limits": ceilings}, "rows": rows,
        "new_grid": new_grid(problem) if mode == "fwd" else None, "clocks": after, "others_share": disturbance.share,
    }  # fmt: skip


def new_grid(problem: Problem) -> dict:
    """Host milliseconds of the first call on a grid not met before, and of the second: the plan, and whether anything is
    compiled anew when the grid changes."""
    import vidkern

    s = problem.shape
    grid = (s.times, s.views) if s.times != s.views else (s.views * s.times, 1)
    taken = []
    with torch.no_grad():
        for _ in range(5):
            _wait(problem)
            start = time.perf_counter()
            vidkern.grid_attention(*problem.inputs, grid=grid)
            taken.append((time.perf_counter() - start) * 1e3)
            _wait(problem)
    return {"grid": list(grid), "first_ms": taken[0], "later_ms": statistics.median(taken[1:])}


def run(job: Job, shapes: Sequence[str], tick: Callable[[str], None], say: Callable[[str], None] = print) -> list[dict]:
    """Every block that is not there yet, in order of importance; saves each as soon as it is measured."""
    found = []
    for name in shapes:
        for mode in MODES:
            key = f"time/{name}-{DTYPE}-{mode}"
            block = job.done(key)
            if block is None:
                job.need(0.05 if job.dry else 75)
                block = job.save(key, measure(job, name, mode, lambda what: tick(f"{name} {mode}: {what}")))
                say(render(block, judged=not job.dry))
            found.append(block)
            if job.device == "cuda":
                torch.cuda.empty_cache()
    return found


def render(block: dict, judged: bool = True) -> str:
    """A block as a table; with the targets of its kind, which are GPUs' and say nothing of a dry run."""
    from .table import _number, align

    head = ("candidate", "ms", "TFLOP/s", "% ceiling", "time / ours", "peak MiB", "host us", "first call s")
    timed = sorted((r for r in block["rows"] if r["status"] == "timed"), key=lambda r: -r["tflops"])
    lines = [head]
    for r in timed:
        dense = f" ({r['heads']} heads; dense FLOPs, {_number(r['useful_tflops'])} useful)" if r["group"] == "dense" else ""
        ratio = f"{r['ratio']:.2f}" if r.get("ratio") else "-"
        lines.append((
            r["name"] + dense, _number(r["seconds"]["median"] * 1e3), _number(r["tflops"]), f"{100 * r['of_ceiling']:.1f}", ratio,
            _number(r.get("peak_mib")), _number(r.get("host_us")), _number(r.get("first_call_seconds")),
        ))  # fmt: skip
    s = block["shape"]
    text = [
        f"grid_attention {s['name']} {block['dtype']} {block['mode']}: V{s['views']} T{s['times']} N{s['tokens']} H{s['heads']} "
        f"D{s['head_dim']} L{s['length']}, {block['rounds']} rounds, ceiling {block['ceiling']['tflops']:.3g} TFLOP/s "
        f"({block['ceiling']['name']})",
        *align(lines),
        *(f"{r['name']}: {r['status']}: {r['reason']}" for r in block["rows"] if r["status"] != "timed"),
        *((f"  {v}" for v in targets.evaluate_gpu(block)) if judged else [f"  a dry run, a stand-in for {s['name']}: nothing is judged"]),
    ]
    return "\n".join(text) + "\n"


# ---- profile --------------------------------------------------------------------------------------------------------------
def profile(job: Job) -> dict:
    """Stage ``profile``: times of the kernels of one forward and backward of shape C, by torch's profiler."""
    found = job.done("profile")
    if found:
        return found
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    shape = tiny(GRID["C"]) if job.dry else replace(GRID["C"], heads=8)
    problem = suite_of.problem(shape, DTYPES[DTYPE], job.device)
    backend = our_backends(problem)[0]
    call = blocks.runner(ours(backend).build(problem), problem, "fwdbwd")
    call()
    on_gpu = job.device == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as result:
        for _ in range(3):
            call()
        _wait(problem)
    spent = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    rows = sorted(result.key_averages(), key=spent, reverse=True)[:15]
    return job.save("profile", {
        "backend": backend, "shape": shape.facts(),
        "kernels": [{"name": e.key[:120], "calls": e.count, "microseconds": spent(e) / 3} for e in rows if spent(e) > 0],
    })  # fmt: skip
