"""Kept plans of the pyramid ops: what a repeated call reuses is never another call's."""

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops.pyramid import plans

from .checks import calls_of
from .conftest import EXPECTED, INTERPRETED
from .rooms import room

pytestmark = pytest.mark.skipif(INTERPRETED, reason="plans are kept for the compiled kernels")
OPS = [op for op in EXPECTED if op.startswith("pyramid")]


def op_of(name):
    return registry.ops()[name]


@pytest.mark.parametrize("name", OPS)
def test_a_repeated_call_computes_its_own_values(name):
    """Every sample three times with other values, strides and threads in between: the first is made, the second planned, and all are
    what the reference says; no gradient is asked for, so that the plans serve."""
    r = room(name)
    before = torch.get_num_threads()
    for sample in r.samples:
        for seed in range(3):
            torch.set_num_threads(1 + seed % 2)
            tensors = r.inputs(sample, torch.float32, seed)
            if seed == 1:
                tensors = [torch.cat([t, t[..., :3]], -1)[..., : t.shape[-1]] for t in tensors]
            with torch.no_grad():
                got, want = r.call(sample, tensors, impl="cpu"), r.call(sample, tensors, impl="reference")
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    torch.set_num_threads(before)
    assert op_of(name)._plans


def test_seeds_are_no_part_of_a_plan():
    x, table = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1), torch.tensor([0.5, 0.5, 1, -1]).expand(2, 2, 4)
    call = lambda **k: vidkern.pyramid_flow_inputs(x, table, impl="cpu", **k)[0][0]
    first = call(seed=1)
    kept = len(op_of("pyramid_flow_inputs")._plans)
    big = (1 << 62) + 5
    results = [call(seed=2), call(seed=1, offset=7), call(seed=1, first_sample=1), call(seed=big, offset=3, first_sample=9)]
    assert len(op_of("pyramid_flow_inputs")._plans) == kept
    assert all(not torch.equal(first, r) for r in results) and torch.equal(first, call(seed=1))
    assert torch.equal(first[1], results[2][0])
    want = vidkern.pyramid_flow_inputs(x, table, impl="reference", seed=big, offset=3, first_sample=9)[0][0]
    torch.testing.assert_close(results[3], want, atol=1e-6, rtol=0)


def test_one_tensor_in_two_places_is_no_plan():
    """z given as its own velocity, then two tensors of the same kind: the second call reads both."""
    z, c = ([torch.randn(3, 5, 4 << s, 4 << s) for s in range(2)] for _ in range(2))
    step = lambda c: vidkern.pyramid_flow_step(z, c, dt=0.5, next_active=0, impl="cpu")[0]
    step(z)
    for a, b, v in zip(step(c), z, c):
        torch.testing.assert_close(a, b + 0.5 * v)


def test_what_is_checked_is_checked_again_where_it_differs():
    x = torch.randn(1, 1, 8, 8)
    vidkern.pyramid_decompose(x, levels=2)
    for wrong in (True, 2.0):
        with pytest.raises(ValueError, match="levels: "):
            vidkern.pyramid_decompose(x, levels=wrong)
    with pytest.raises(ValueError, match="expected no level to be skipped|expected 2 booleans"):
        vidkern.pyramid_flow_loss([x, x], [x, x], active=(True, False)), vidkern.pyramid_flow_loss([x, x], [x, x], active=(1, 0))
    with pytest.raises(ValueError, match="layout torch.sparse_coo"):
        vidkern.pyramid_decompose(x.to_sparse(), levels=2)


def test_gradients_modes_and_named_backends_go_the_long_way():
    """A planned op still has gradients, is seen by dispatch modes, follows ``use`` and fills given outputs."""
    x = torch.randn(2, 1, 8, 8)
    plain = vidkern.pyramid_decompose(x)
    leaf = x.clone().requires_grad_()
    vidkern.pyramid_decompose(leaf)[1].sum().backward()
    assert leaf.grad is not None
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        vidkern.pyramid_decompose(x)
    assert counter.get_total_flops() > 0
    with vidkern.use("reference"):
        assert all(torch.equal(a, b) for a, b in zip(vidkern.pyramid_decompose(x), plain))
    out = torch.full((2 * 80,), torch.nan)
    for value in (x, 2 * x):
        vidkern.pyramid_decompose(value, out=out)
        assert torch.equal(out[:32].view(2, 1, 4, 4), vidkern.pyramid_decompose(value)[0])
    with pytest.raises(RuntimeError, match="inference only"):
        vidkern.pyramid_decompose(leaf, out=out)
    with pytest.raises(ValueError, match="out"):
        vidkern.pyramid_decompose(x, out=out.double())


def test_a_small_call_costs_a_few_function_calls():
    """A count, where a time would depend on the machine: a planned call neither dispatches nor builds fields nor checks anew."""
    z, c, u = ([torch.randn(2, 3, 4 << s, 4 << s) for s in range(2)] for _ in range(3))
    with torch.no_grad():
        for call in (
            lambda: vidkern.pyramid_decompose(z[1], impl="cpu"), lambda: vidkern.pyramid_merge(z, impl="cpu"),
            lambda: vidkern.pyramid_flow_loss(z, c, impl="cpu"), lambda: vidkern.pyramid_flow_step(z, c, u, dt=0.1, impl="cpu"),
        ):
            assert calls_of(call) < 45
        assert plans.alone()
