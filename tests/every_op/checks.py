"""The checks themselves, as functions of (op, sample, dtype, backend): tests call them, and the fault-injection tests show that
each wrong implementation fails at least one. The accuracy rule and the counting probe are the product's own (vidkern/verify)."""

from __future__ import annotations

import contextlib
import cProfile
import functools
import json
import os
import pstats
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import vidkern
from vidkern.ops.grid_attention.cost import Sample
from vidkern.verify import accuracy as rule
from vidkern.verify.probes import counting

__all__ = [
    "WORST", "accuracy", "calls_of", "counting", "hidden_memory", "in_two_processes", "inclusion_exclusion", "threads_of",
]  # fmt: skip
WORST: dict[tuple, dict[str, float]] = {}


@contextlib.contextmanager
def threads_of(backend: str):
    """Compiled kernels under test run on two threads; plain torch, like the expectations, on one (see conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if backend == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(op: str, sample, dtype, backend: str, device: str = "cpu") -> None:
    """The product's accuracy rule on fixed seeds, the worst ratio remembered for the report at the end of the run."""
    draws = rule.draws(op, sample, dtype, device)
    # The interpreter takes seconds per draw.
    seeds = range(min(draws, 4) if backend == "triton" else draws)
    around = functools.partial(threads_of, backend)
    found = rule.check(op, sample, dtype, backend, device=device, seeds=seeds, around=around, keep=True)
    before = WORST.setdefault((op, backend, str(dtype).removeprefix("torch.")), {"max": 0.0, "rms": 0.0})
    for kind, value in found.items():
        before[kind] = max(before[kind], value)


# ---- probes of grid attention -----------------------------------------------------------------------------------------------
def hidden_memory(sample: Sample, dtype, backend: str, poison: float) -> None:
    """What is not visible to anybody may hold anything: outputs and gradients stay the same, bit for bit."""
    tensors = [t.requires_grad_() for t in sample.tensors(dtype)]
    options = sample.options()
    keys, rows = attention_liveness(sample, options)
    out, lse = sample.call(*tensors, return_lse=True, impl=backend)
    weight = torch.randn_like(out)
    clean = torch.autograd.grad(out, tensors, weight)

    def spoil(t, alive):
        dead = ~alive.expand(sample.batch, -1)
        dead = dead[:, :, None, None] if sample.layout == "blhd" else dead[:, None, :, None]
        return t.detach().masked_fill(dead, poison).requires_grad_()

    spoiled = [spoil(tensors[0], rows), spoil(tensors[1], keys), spoil(tensors[2], keys)]
    out2, lse2 = sample.call(*spoiled, return_lse=True, impl=backend)
    dirty = torch.autograd.grad(out2, spoiled, spoil(weight, rows).detach())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *clean), (out2, lse2, *dirty)):
        assert torch.equal(a, b), f"{name}: changed by what nobody sees"


def attention_liveness(sample: Sample, options):
    from vidkern.ops.grid_attention.reference import liveness

    return liveness(
        options.get("valid"), options.get("kv_len"), options.get("text_len"), n_frames=sample.frames.n_frames,
        frame_len=sample.frame_len, n_text=sample.n_text, text_front=sample.text_position == "front",
        device=torch.device("cpu"),
    )


def inclusion_exclusion(views, times, n, d, dtype, backend: str) -> None:
    """Against three dense attentions (same view, same time, own frame) merged with signs +, +, -: no mask, no tiles, no L x L."""
    shape = (1, 1, views, times, n, d)
    q, k, v, g = (torch.randn(shape).to(dtype).double() for _ in range(4))

    def dense(dims):
        """Attention over the frames that ``dims`` merges ("v": same view, "t": same time, "": own)."""
        def fold(x):
            x = x.permute(0, 1, 2, 3, 4, 5)
            if dims == "view":
                return x.reshape(views, times * n, d)
            if dims == "time":
                return x.transpose(2, 3).reshape(times, views * n, d)
            return x.reshape(views * times, n, d)

        def unfold(x):
            tail = x.shape[2:]
            if dims == "time":
                return x.reshape(times, views, n, *tail).transpose(0, 1)
            return x.reshape(views, times, n, *tail)

        return fold, unfold

    parts = {}
    for dims in ("view", "time", "own"):
        fold, unfold = dense(dims)
        logits = fold(q) @ fold(k).transpose(-1, -2) / d**0.5
        lse = logits.logsumexp(-1)
        parts[dims] = (fold, unfold, logits, lse, unfold((logits - lse[..., None]).exp() @ fold(v)), unfold(lse))
    signs = {"view": 1, "time": 1, "own": -1}
    lse = sum(s * parts[p][5].exp() for p, s in signs.items()).log()
    out = sum(s * (parts[p][5] - lse).exp()[..., None] * parts[p][4] for p, s in signs.items())
    delta = (g[0, 0] * out).sum(-1)
    grads = [0, 0, 0]
    for p, s in signs.items():
        fold, unfold, logits, *_ = parts[p]
        flat = lambda x: fold(x[None, None]) if x.dim() == 4 else fold(x[None, None, ..., None].expand(shape))[..., 0]
        prob = (logits - flat(lse)[..., None]).exp()
        ds = prob * (fold(g) @ fold(v).transpose(-1, -2) - flat(delta)[..., None]) / d**0.5
        for i, x in enumerate((ds @ fold(k), ds.transpose(-1, -2) @ fold(q), prob.transpose(-1, -2) @ fold(g))):
            grads[i] = grads[i] + s * unfold(x)
    leaves = [x.to(dtype).reshape(1, 1, -1, d).requires_grad_() for x in (q, k, v)]
    got, got_lse = vidkern.grid_attention(*leaves, grid=(views, times), return_lse=True, impl=backend)
    got_grads = torch.autograd.grad(got, leaves, g.to(dtype).reshape(got.shape))
    # Rounding of the working precision against values of order one (fp32), or of the storage type (bf16).
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    want = (out.reshape(got.shape), lse.reshape(got_lse.shape), *(x.reshape(got.shape) for x in grads))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), (got, got_lse, *got_grads), want):
        scale = b.abs().max().clamp_min(1)
        error = ((a.double() - b).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: {error:.3e} off inclusion-exclusion at V={views} T={times} N={n} D={d}"


def calls_of(function) -> int:
    """How many Python functions one call runs, after three others."""
    for _ in range(3):
        function()
    profile = cProfile.Profile(builtins=False)
    profile.runcall(function)
    return pstats.Stats(profile).total_calls


def in_two_processes(body: str, folder: Path):
    """Run a script as ranks 0 and 1; what rank 0 prints last, as JSON. Its arguments: rank, file to meet in. ``finish(rank, result)``, which
    is put before it, prints and ends a rank."""
    script = folder / "ranks.py"
    script.write_text(_FINISH + textwrap.dedent(body))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [subprocess.Popen([sys.executable, script, str(r), folder / "store"], stdout=subprocess.PIPE, env=env) for r in (0, 1)]
    outputs = [p.communicate(timeout=240)[0] for p in run]
    assert all(p.returncode == 0 for p in run)
    return json.loads(outputs[0].splitlines()[-1])


_FINISH = """
def finish(rank, result):
    import json, os
    import torch.distributed as dist

    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads at times abort a process that ends by itself

"""
