"""The checks themselves, as functions of (op, sample, dtype, backend): tests call them, and the fault-injection tests show that
each wrong implementation fails at least one."""

from __future__ import annotations

import contextlib
import functools
import math

import torch

import vidkern
from vidkern.ops.grid_attention.cost import Sample

from .rooms import room

RATIO_MAX, RATIO_RMS = 2.0, 1.3
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


def _finite(t):
    """-inf marks empty rows, which must agree exactly and carry no error."""
    return torch.where(torch.isinf(t), torch.zeros_like(t), t)


def _measure(call, tensors, weights):
    """Outputs, then the gradients of a loss on the first output, and of a loss on all of them; all detached.

    The lse's gradient is measured together with the output's, as it occurs: every flash backward recomputes P from a rounded
    lse, which plain torch, keeping P, does not, while it has no form of the lse that does without the L x L object.
    """
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = call(leaves)
    losses = [(_finite(o).double() * w).sum() for o, w in zip(outputs, weights)]
    results = [o.detach() for o in outputs]
    for i, loss in enumerate((losses[0], sum(losses))):
        results += torch.autograd.grad(loss, leaves, retain_graph=i == 0, allow_unused=True, materialize_grads=True)
    return results


@functools.lru_cache(maxsize=1024)
def _expectation(op, sample, dtype, seed):
    """Inputs, loss weights, the float64 reference's results and the yardstick's: shared by every backend and tier."""
    r = room(op)
    tensors = [t.detach() for t in r.inputs(sample, dtype, seed)]
    exact_in = [t.double() for t in tensors]
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        shapes = [o.shape for o in r.call(sample, tensors, impl="reference")]
    weights = [torch.randn(s, generator=generator).to(dtype).double() for s in shapes]
    exact = _measure(lambda x: r.call(sample, x, impl="reference"), exact_in, weights)
    yard = _measure(lambda x: r.yardstick(sample, x), tensors, weights)
    return tensors, weights, exact, yard


def accuracy(op: str, sample, dtype, backend: str) -> None:
    """Error against the reference in float64, at most twice (max) and 1.3 times (RMS) that of best-practice torch in the same
    dtype; pooled over seeds, so that small samples hold enough elements to compare. A floor of 2 ulp where the yardstick is 0.
    """
    r = room(op)
    pool: dict[str, list] = {}
    # At least two draws, and enough of them that the worst of a few dozen numbers is not a matter of luck.
    with torch.no_grad():
        outputs = r.call(sample, r.inputs(sample, dtype, 0), impl=backend)
    smallest = min(t.numel() for t in (*outputs, *r.inputs(sample, dtype, 0)))
    for seed in range(max(2, min(16, 1500 // smallest))):
        tensors, weights, exact, yard = _expectation(op, sample, dtype, seed)
        with threads_of(backend):
            ours = _measure(lambda x: r.call(sample, x, impl=backend), tensors, weights)
        labels = [*r.outputs] + [f"d{o}/d{i}" for o in (r.outputs[0], "all") for i in range(len(tensors))]
        assert len(labels) == len(ours)
        for label, e, o, y in zip(labels, exact, ours, yard):
            assert torch.equal(torch.isneginf(e), torch.isneginf(o)), f"{label}: empty rows differ"
            assert torch.isfinite(_finite(o)).all(), f"{label}: not finite"
            pool.setdefault(label, []).append((_finite(e).flatten(), _finite(o).double().flatten(), _finite(y).double().flatten(), o.dtype))
    for label, parts in pool.items():
        exact, ours, yard = (torch.cat([p[i] for p in parts]) for i in range(3))
        ours_error, yard_error = (ours - exact).abs(), (yard - exact).nan_to_num().abs()
        floor = 2 * torch.finfo(parts[0][3]).eps * exact.abs().max().item() if yard_error.max() == 0 else 0.0
        ratios = {}
        for kind, limit, norm in (("max", RATIO_MAX, torch.max), ("rms", RATIO_RMS, lambda x: x.square().mean().sqrt())):
            error, allowed = norm(ours_error).item(), max(limit * norm(yard_error).item(), floor)
            ratios[kind] = error / (allowed / limit) if allowed else (math.inf if error else 0.0)
            assert error <= allowed, (
                f"{op} {sample.name} {dtype} {backend} {label}: {kind} error {error:.3e} is {ratios[kind]:.2f} times the "
                f"yardstick's, expected at most {limit}"
            )
        key = (op, backend, str(dtype).removeprefix("torch."))
        before = WORST.setdefault(key, {"max": 0.0, "rms": 0.0})
        for kind, value in ratios.items():
            before[kind] = max(before[kind], value)


# ---- probes of grid attention -----------------------------------------------------------------------------------------------
def visible_counts(sample: Sample) -> torch.Tensor:
    """Closed form: visible keys of each query row, float64 [F, F] per frame pair times N (no masks, no text)."""
    return torch.from_numpy(sample.frames.frame_mask().copy()).double() * sample.frame_len


def counting(sample: Sample, dtype, backend: str) -> None:
    """With q = 0 every visible key weighs the same: the lse counts the keys, one-hot values count them per key frame, and
    one-hot output gradients give dV in closed form. Exact up to the rounding of one division. Needs F <= D and no masks."""
    f, n, d = sample.frames.n_frames, sample.frame_len, sample.dim
    assert f <= d and not (sample.n_text or sample.with_valid or sample.with_kv_len) and sample.layout == "bhld"
    counts = visible_counts(sample)
    total = counts.sum(1)
    frame = torch.arange(f * n) // n
    onehot = torch.zeros(f * n, d).index_put((torch.arange(f * n), frame), torch.ones(()))
    q = torch.zeros(sample.batch, sample.heads, f * n, d, dtype=dtype)
    k = torch.randn(sample.batch, sample.kv_heads, f * n, d).to(dtype)
    v = onehot.to(dtype).expand(sample.batch, sample.kv_heads, -1, -1).clone().requires_grad_()
    out, lse = sample.call(q, k, v, return_lse=True, impl=backend)
    eps = torch.finfo(torch.float32).eps
    want = total.log()[frame].expand_as(lse)
    assert torch.equal(torch.isneginf(want), torch.isneginf(lse)), "lse: empty rows differ"
    error = (_finite(lse.double()) - _finite(want)).abs()
    assert (error <= 2 * eps * _finite(want).abs().clamp_min(1)).all(), f"lse: off log(count) by {error.max():.3e}"
    share = torch.where(total[:, None] > 0, counts / total[:, None].clamp_min(1), 0)
    want = torch.zeros(f, d, dtype=torch.float64)
    want[:, :f] = share
    ulp = torch.finfo(dtype).eps
    error = (out.double() - want[frame]).abs()
    assert (error <= (ulp / 2 + 3 * eps) * want[frame]).all(), f"out: per-frame counts off by {error.max():.3e}"
    (dv,) = torch.autograd.grad(out, v, onehot.to(dtype).expand_as(out))
    group = sample.heads // sample.kv_heads
    # Rows of key frame g: sum over the n queries of frame f that see it of 1 / total(f), for each query head of the group.
    want = torch.zeros(f, d, dtype=torch.float64)
    want[:, :f] = torch.where(total[:, None] > 0, group * counts / total[:, None].clamp_min(1), 0).T
    error = (dv.double() - want[frame]).abs()
    # P is rounded to the inputs' dtype before the product, as in every flash backward.
    assert (error <= (2 * ulp + 20 * eps) * want[frame]).all(), f"dv: per-frame counts off by {error.max():.3e}"


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
