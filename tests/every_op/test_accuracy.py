"""Accuracy of every op, backend, tier, dtype and sample; the matrix of what must run; gradients."""

from dataclasses import replace

import pytest
import torch

import vidkern
from vidkern import compiled, registry

from . import checks
from .conftest import EXPECTED, INTERPRETED, MATRIX, TIERS, backend_runs, samples
from .rooms import ROOMS, room

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES_HERE = list(DTYPES)


# These differ from others in the plan's tables alone, which tests/triton/test_plan.py counts pair by pair for every sample and many
# tiles; or have the masks of "everything".
TABLES_ALONE = ("one_view", "one_time", "causal", "windows", "cyclic", "anchors", "part_self", "part_time", "valid", "demo")


def redundant(op, backend, dtype, i, name) -> bool:
    """Left to the slow run: of the interpreter, and of the many samples of the pyramid ops on the CPU, each is run in one of two dtypes;
    and of attention's patterns in the interpreter, those whose tables alone are theirs."""
    one_dtype = INTERPRETED or (op.startswith("pyramid") and backend == "cpu")
    return (one_dtype and DTYPES_HERE.index(dtype) != i % 2) or (INTERPRETED and op == "grid_attention" and name in TABLES_ALONE)


CASES = [
    pytest.param(
        op, backend, tier, dtype, sample, id=f"{op}-{backend}{'-' + tier if tier else ''}-{dtype}-{sample.name}",
        marks=[pytest.mark.slow] * redundant(op, backend, dtype, i, sample.name),
    )
    for op in EXPECTED
    for backend, tier in backend_runs(op)
    for dtype in EXPECTED[op][backend]
    for i, sample in enumerate(samples(op, backend))
]


def test_matrix_is_what_the_registry_offers():
    """Every op, backend and dtype that the registry would serve on this machine is listed, and nothing else."""
    offered = {}
    for name, op in registry.ops().items():
        r = room(name)
        offered[name] = {}
        for backend in op.backends:
            dtypes = []
            for label, dtype in DTYPES.items():
                try:
                    r.call(r.samples[0], r.inputs(r.samples[0], dtype, 0), impl=backend.name)
                    dtypes.append(label)
                except registry.BackendUnavailable:
                    pass
            offered[name][backend.name] = sorted(dtypes)
    # No GPU is at hand that CUDA kernels could serve, or Triton without the interpreter.
    absent = ("hopper", "cuda") if INTERPRETED else ("hopper", "cuda", "triton")
    expected = {o: {b: [] if b in absent else sorted(d) for b, d in r.items()} for o, r in MATRIX.items()}
    assert offered == expected


def test_every_tier_is_built():
    assert compiled.cpu_missing() is None
    import platform

    wanted = TIERS if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]
    assert list(compiled.cpu().build_info()["isas"]) == wanted


@pytest.mark.parametrize("op, backend, tier, dtype, sample", CASES, indirect=["tier"])
def test_accuracy(op, backend, tier, dtype, sample):
    checks.accuracy(op, sample, DTYPES[dtype], backend)


@pytest.mark.parametrize("op, backend, tier", [(o, b, t) for o in EXPECTED for b, t in backend_runs(o)], indirect=["tier"])
def test_directional_derivative(op, backend, tier):
    """The gradient along a random direction equals the central difference of the loss."""
    r = room(op)
    for sample in samples(op, backend)[:1] if INTERPRETED else r.samples[:2]:
        tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
        outputs = r.call(sample, tensors, impl=backend)
        weights = [torch.randn_like(o) for o in outputs]
        loss = lambda x: sum((o * w).double().sum() for o, w in zip(r.call(sample, x, impl=backend), weights))
        direction = [torch.randn_like(t) for t in tensors]
        slope = sum((g * d).double().sum() for g, d in zip(torch.autograd.grad(loss(tensors), tensors), direction))
        step = 3e-3
        with torch.no_grad():
            ahead, behind = (loss([t + s * step * d for t, d in zip(tensors, direction)]) for s in (1, -1))
        assert torch.isclose((ahead - behind) / (2 * step), slope, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("op", EXPECTED)
def test_gradcheck_of_the_reference(op):
    r = room(op)
    for sample in sorted(r.samples, key=lambda s: s.flops)[:6]:
        small = [t.requires_grad_() for t in r.inputs(sample, torch.float64, 0)]
        if sum(t.numel() for t in small) > 4000:
            continue
        call = lambda *x: tuple(torch.where(torch.isinf(o), 0, o) for o in r.call(sample, x, impl="reference"))
        assert torch.autograd.gradcheck(call, small, fast_mode=True)


def first(op):
    """The op's first sample; of attention in the interpreter, a smaller one of as many dimensions that strides go over."""
    sample = room(op).samples[0]
    return replace(sample, heads=2, kv_heads=2, grid=(2, 2), frame_len=5) if INTERPRETED and op == "grid_attention" else sample


@pytest.mark.parametrize("op, backend", [(o, b) for o in EXPECTED for b in EXPECTED[o]])
def test_cotangents_of_every_form(op, backend):
    """dO expanded from one number, dO transposed in memory, or absent: the same gradients as a dense dO."""
    r = room(op)
    sample = first(op)
    tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
    out, *others = r.call(sample, tensors, impl=backend)
    grads = lambda o, g: torch.autograd.grad(o, tensors, g, retain_graph=True, allow_unused=True, materialize_grads=True)
    for a, b in zip(grads(out, torch.ones(()).expand_as(out)), grads(out, torch.ones_like(out))):
        assert torch.equal(a, b)
    weight = torch.randn_like(out)
    scattered = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    for a, b in zip(grads(out, scattered), grads(out, weight)):
        assert torch.equal(a, b)
    zero = torch.zeros_like(out)
    for other in others:
        alone = grads(other, torch.ones_like(other))
        both = torch.autograd.grad((out, other), tensors, (zero, torch.ones_like(other)), retain_graph=True)
        for a, b in zip(alone, both):
            assert torch.allclose(a, b, atol=1e-6)
        assert any(g.abs().max() > 0 for g in alone)


@pytest.mark.parametrize("op, backend", [(o, b) for o in EXPECTED for b in EXPECTED[o]])
def test_double_backward_raises(op, backend):
    r = room(op)
    sample = first(op)
    tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
    out = r.call(sample, tensors, impl=backend)[0]
    once = torch.autograd.grad(out.square().sum(), tensors, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        sum(g.sum() for g in once if g is not None).backward()


@pytest.mark.parametrize("op, backend", [(o, b) for o in EXPECTED for b in EXPECTED[o]])
def test_torch_func_grad(op, backend):
    r = room(op)
    sample = first(op)
    tensors = r.inputs(sample, torch.float32, 0)
    loss = lambda leaf, *rest: r.call(sample, (leaf, *rest), impl=backend)[0].square().sum()
    got = torch.func.grad(loss)(*tensors)
    leaf = tensors[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, *tensors[1:]), leaf)
    assert torch.equal(got, want)


def test_backward_follows_the_backend_of_the_forward():
    """The choice is made once: leaving ``use`` before backward() does not change the backend."""
    sample = ROOMS["grid_attention"].samples[0]
    tensors = [t.requires_grad_() for t in sample.tensors()]
    seen = []
    op = registry.ops()["grid_attention"]
    spy = op._by_name["reference"]
    wrapped = registry.Backend("reference", spy.why_not, spy.run, lambda *a: (seen.append("reference"), spy.run_backward(*a)))
    op._by_name["reference"] = wrapped
    try:
        with vidkern.use("reference"):
            out = sample.call(*tensors)
        out.sum().backward()
    finally:
        op._by_name["reference"] = spy
    assert seen == ["reference"]
