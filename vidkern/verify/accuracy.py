"""The accuracy rule: the error against float64 is bounded by the error of the best-practice torch form in the same dtype.

Largest element at most twice, root mean square at most 1.3 times, for every output and every gradient, and never a tolerance
of our own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings

import torch

from .probes import CheckFailed, finite, require
from .rooms import room

RATIO_MAX, RATIO_RMS = 2.0, 1.3


@contextlib.contextmanager
def poisoned():
    """Fresh memory is NaN: an element that a kernel forgets to write, or reads before it is written, shows."""
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Warn only, because the fill is all that is wanted: other ops of torch may have no deterministic form on this device.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def measure(call, tensors, weights, differentiable: bool = True) -> list[torch.Tensor]:
    """Outputs, then the gradients of a loss on the first output, and of a loss on all of them; all detached. Without
    ``differentiable`` the outputs alone.

    The lse's gradient is measured together with the output's, as it occurs: every flash backward recomputes P from a rounded
    lse, which plain torch, keeping P, does not, while it has no form of the lse that does without the L x L object.
    """
    if not differentiable:
        with torch.no_grad():
            return list(call([t.detach().clone() for t in tensors]))
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = call(leaves)
    losses = [(finite(o).double() * w).sum() for o, w in zip(outputs, weights)]
    results = [o.detach() for o in outputs]
    for i, loss in enumerate((losses[0], sum(losses))):
        results += torch.autograd.grad(loss, leaves, retain_graph=i == 0, allow_unused=True, materialize_grads=True)
    return results


@functools.lru_cache(maxsize=1024)
def _kept(op, sample, dtype, seed, device):
    return _fresh(op, sample, dtype, seed, device)


def _fresh(op, sample, dtype, seed, device):
    """Inputs, loss weights, the float64 reference's results and the yardstick's."""
    r = room(op)
    tensors = [t.detach() for t in r.inputs(sample, dtype, seed, device)]
    exact_in = [t.double() for t in tensors]
    generator = torch.Generator(device).manual_seed(seed + 100)
    with torch.no_grad():
        shapes = [o.shape for o in r.call(sample, tensors, impl="reference")]
    weights = [torch.randn(s, generator=generator, device=device).to(dtype).double() for s in shapes]
    exact = measure(lambda x: r.call(sample, x, impl="reference"), exact_in, weights, r.differentiable)
    yard = measure(lambda x: r.yardstick(sample, x), tensors, weights, r.differentiable)
    return tensors, weights, exact, yard


def draws(op: str, sample, dtype, device="cpu") -> int:
    """At least two draws, and enough of them that the worst of a few dozen numbers is not a matter of luck."""
    r = room(op)
    tensors = r.inputs(sample, dtype, 0, device)
    with torch.no_grad():
        outputs = r.call(sample, tensors, impl="reference")
    return max(2, min(16, 1500 // min(t.numel() for t in (*outputs, *tensors))))


def check(op: str, sample, dtype, backend: str, *, device="cpu", seeds, around=contextlib.nullcontext, keep=False) -> dict:
    """Apply the rule to one sample, pooled over ``seeds``; a floor of 2 ulp holds where the yardstick is exact.

    Args:
        op, backend: names in the registry.
        sample: one of the op's.
        dtype: of the inputs.
        device: where everything runs, the yardstick too.
        seeds: of the inputs; several, so that small samples hold enough elements to compare.
        around: a context in which the backend runs, and only it.
        keep: remember expectations for other backends that are checked with the same seeds.

    Returns:
        {"max": ..., "rms": ...}: the worst ratio to the yardstick's error over outputs and gradients.

    Raises:
        CheckFailed: the rule is broken, an output is not finite, or empty rows differ.
    """
    r = room(op)
    where = f"{op} {sample.name} {str(dtype).removeprefix('torch.')} {backend}"
    pool: dict[str, list] = {}
    for seed in seeds:
        expectation = _kept if keep else _fresh
        tensors, weights, exact, yard = expectation(op, sample, dtype, seed, str(device))
        with around():
            ours = measure(lambda x: r.call(sample, x, impl=backend), tensors, weights, r.differentiable)
        losses = (r.outputs[0], "all") if r.differentiable else ()
        labels = [*r.outputs] + [f"d{o}/d{i}" for o in losses for i in range(len(tensors))]
        for label, e, o, y in zip(labels, exact, ours, yard, strict=True):
            require(torch.equal(torch.isneginf(e), torch.isneginf(o)), f"{where} {label}: empty rows differ")
            require(torch.isfinite(finite(o)).all(), f"{where} {label}: not finite")
            flat = (finite(e).flatten(), finite(o).double().flatten(), finite(y).double().flatten())
            pool.setdefault(label, []).append((*flat, o.dtype))
    worst = {"max": 0.0, "rms": 0.0}
    for label, parts in pool.items():
        exact, ours, yard = (torch.cat([p[i] for p in parts]) for i in range(3))
        ours_error, yard_error = (ours - exact).abs(), (yard - exact).nan_to_num().abs()
        floor = 2 * torch.finfo(parts[0][3]).eps * exact.abs().max().item() if yard_error.max() == 0 else 0.0
        for kind, limit, norm in (("max", RATIO_MAX, torch.max), ("rms", RATIO_RMS, lambda x: x.square().mean().sqrt())):
            error, allowed = norm(ours_error).item(), max(limit * norm(yard_error).item(), floor)
            ratio = error / (allowed / limit) if allowed else (math.inf if error else 0.0)
            if error > allowed:
                raise CheckFailed(
                    f"{where} {label}: {kind} error {error:.3e} is {ratio:.2f} times the yardstick's, expected at most {limit}"
                )
            worst[kind] = max(worst[kind], ratio)
    return worst
