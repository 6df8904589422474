"""Kept plans of attention motion flow: what a repeated call reuses is never another call's."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vidkern
from vidkern import registry
from vidkern.ops import quiet
from vidkern.ops.attention_motion_flow import OP, plans

from .checks import calls_of
from .conftest import EXPECTED, INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED or "cpu" not in EXPECTED.get("attention_motion_flow", {}), reason="plans are kept for the compiled kernels"
)
GRID = (2, 3, 4)
CALLS = {
    "plain": {},
    "text_front": {"n_text": 5},
    "text_back": {"n_text": 5, "text_position": "back"},
    "tokens_first": {"layout": "blhd"},
    "tokens_first_text": {"layout": "blhd", "n_text": 5},
    "heads_apart": {"heads": "none"},
    "first_sample": {"batch_index": 0},
    "every_sample": {"batch_index": None, "heads": "none"},
    "upper": {"pairs": "upper", "tau": 3, "scale": -0.2},
    "not_upper": {"tau": 3, "scale": -0.2},
    "prob_mean": {"heads": "prob_mean"},
    "qk_mean": {"heads": "qk_mean"},
}
PLANNED = set(CALLS) - {"prob_mean", "qk_mean"}


@pytest.fixture(autouse=True)
def no_plans():
    """Every test begins without plans."""
    plans._plans.clear()


def operands(more, dtype=torch.float32, seed=0, gradients=False, spread=(False, False)):
    """q and k [2, 3, L, 16], or with tokens first; ``spread``: which of them are cut out of wider tensors."""
    g = torch.Generator().manual_seed(seed)
    shape = (2, 3, 24 + more.get("n_text", 0), 16)
    if more.get("layout") == "blhd":
        shape = (shape[0], shape[2], shape[1], shape[3])
    wide = [torch.randn(*shape[:3], 16 * (1 + apart), generator=g).to(dtype) for apart in spread]
    return [t[..., :16].detach().requires_grad_(gradients) for t in wide]


def results(more, tensors, seed):
    """The flow and, where they are asked for, the gradients of q and k."""
    flow = vidkern.attention_motion_flow(*tensors, grid=GRID, impl="cpu", **more)
    if not flow.requires_grad:
        return [flow]
    g = torch.randn(flow.shape, generator=torch.Generator().manual_seed(seed))
    return [flow.detach(), *torch.autograd.grad(flow, tensors, g)]


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_computes_its_own_values(name, dtype, gradients):
    """Other values each time, then other strides and another number of threads: bit for bit what the dispatcher gives."""
    before = torch.get_num_threads()
    try:
        kinds = ((False, False, 1), (False, True, 1), (True, True, 1), (False, False, 2))
        for seed in range(2 * len(kinds)):
            *spread, threads = kinds[seed // 2]
            torch.set_num_threads(threads)
            tensors = operands(CALLS[name], dtype, seed, gradients, spread)
            got = results(CALLS[name], tensors, seed)
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                want = results(CALLS[name], tensors, seed)
            assert counter.get_total_flops() > 0  # the long way
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    assert len(plans._plans) == len(kinds)
    assert all((p is not None) == (name in PLANNED) for p in plans._plans.values())


def test_calls_of_every_kind_side_by_side():
    """Plans of different calls do not answer for each other."""
    for seed in range(2):
        for name, more in CALLS.items():
            tensors = operands(more, seed=seed)
            got = results(more, tensors, seed)[0]
            want = vidkern.attention_motion_flow(*tensors, grid=GRID, impl="reference", **more)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert sum(p is not None for p in plans._plans.values()) == len(PLANNED)


def test_what_is_checked_is_checked_again_where_it_differs():
    q, k = operands({})
    call = lambda **more: vidkern.attention_motion_flow(q, k, **{"grid": GRID} | more)  # noqa: E731
    for _ in range(2):
        call(tau=1, n_text=0, batch_index=1)
    wrong = (
        ({"tau": True}, "tau: True"), ({"n_text": False}, "n_text: False"), ({"batch_index": True}, "batch_index: True"),
        ({"return_lse": 0}, "return_lse: 0"), ({"heads": []}, "heads: "), ({"grid": (2, 3, 4.0)}, "grid: "), ({"impl": "cuda13"}, "impl: "),
    )  # fmt: skip
    for more, match in wrong:
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                call(**{"tau": 1, "n_text": 0, "batch_index": 1} | more)
    with pytest.raises(TypeError, match="k: list"):
        vidkern.attention_motion_flow(q, [1.0], grid=GRID)


def refused(*args):
    raise ZeroDivisionError


def test_modes_and_named_backends_go_the_long_way(monkeypatch):
    """A planned call is still explained, lowered by autocast, transformed, and follows ``use``."""
    q, k = operands({})
    call = lambda q=q, k=k: vidkern.attention_motion_flow(q, k, grid=GRID)  # noqa: E731
    for _ in range(3):
        plain = call()
    assert any(plans._plans.values()) and vidkern.explain(call).chosen == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(), call(q.bfloat16(), k.bfloat16())) and not torch.equal(call(), plain)
    with vidkern.use("reference"), monkeypatch.context() as patch:
        patch.setitem(OP._by_name, "reference", registry.Backend("reference", lambda *args: None, refused))
        with pytest.raises(ZeroDivisionError):
            call()
    with torch.inference_mode():
        assert call().is_inference()
    d = torch.func.grad(lambda q: call(q).square().sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(d, torch.autograd.grad(call(leaf).square().sum(), leaf)[0])


def test_double_backward_raises():
    g = torch.randn(4, 12, 2)
    for weight in (g, g.clone().requires_grad_()):
        for _ in range(2):
            q, k = operands({}, gradients=True)
            (dq,) = torch.autograd.grad(vidkern.attention_motion_flow(q, k, grid=GRID), q, weight, create_graph=True)
            with pytest.raises(RuntimeError, match="double backward"):
                dq.sum().backward()


@pytest.mark.parametrize("more", [{}, {"n_text": 5, "layout": "blhd"}], ids=["plain", "text"])
def test_batched_gradients(more):
    """Several gradients at once, as ``is_grads_batched`` and vectorised Jacobians ask for them."""
    q, k = operands(more, gradients=True)
    g = torch.randn(3, 4, 12, 2)
    for _ in range(3):
        flow = vidkern.attention_motion_flow(q, k, grid=GRID, **more)
        got = torch.autograd.grad(flow, (q, k), g, retain_graph=True, is_grads_batched=True)
        want = zip(*(torch.autograd.grad(flow, (q, k), one, retain_graph=True) for one in g))
        assert all(torch.equal(a, torch.stack(b)) for a, b in zip(got, want))


@pytest.mark.parametrize("more", [{}, {"heads": "none"}, {"batch_index": None}], ids=str)
def test_a_result_may_be_changed_in_place(more):
    for gradients in (False, True):
        q, k = operands(more, gradients=gradients)
        for _ in range(3):
            flow = vidkern.attention_motion_flow(q, k, grid=GRID, **more)
            before = flow.detach().clone()
            flow += 1
            flow[0] += 1
            assert torch.equal(flow[1:], before[1:] + 1) and torch.equal(flow[0], before[0] + 1 + 1)
            if gradients:
                flow.sum().backward()


def test_results_can_be_copied_and_pickled():
    q, k = operands({})
    found = vidkern.attention_motion_flow(q, k, grid=GRID, mode="both", return_conf=True)
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(again) is type(found) and all(torch.equal(a, b) for a, b in zip(again, found))


def test_changed_inputs_are_told():
    for _ in range(2):
        q, k = (t * 1 for t in operands({}, gradients=True))
        flow = vidkern.attention_motion_flow(q, k, grid=GRID)
        q.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            flow.sum().backward()


@pytest.mark.parametrize("more", [{}, {"n_text": 5, "layout": "blhd"}], ids=["plain", "text"])
@pytest.mark.parametrize("outside", [False, True])
def test_recomputation_saves_what_the_forward_saved(outside, more):
    """Checkpointing compares saved tensors: the forward may run by the dispatcher and its recomputation by a plan."""
    q, k = operands(more, gradients=True)
    loss = lambda q, k: vidkern.attention_motion_flow(q, k, grid=GRID, **more).square().sum()  # noqa: E731
    want = torch.autograd.grad(loss(q, k), (q, k))
    for _ in range(3):
        plans._plans.clear() if outside else loss(q, k)
        with torch.utils.flop_counter.FlopCounterMode(display=False) if outside else contextlib.nullcontext():
            out = checkpoint(loss, q, k, use_reentrant=False)
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (q, k)), want))


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(quiet, "LIMIT", 5)
    for tokens in range(1, 20):
        q = torch.randn(1, 1, 2 * tokens, 8)
        vidkern.attention_motion_flow(q, q, grid=(2, 1, tokens))
    assert 0 < len(plans._plans) <= 5


def test_a_small_call_costs_a_few_function_calls():
    """A count, where a time would depend on the machine: a planned call neither dispatches nor checks anew."""
    q, k = operands({})
    call = lambda: vidkern.attention_motion_flow(q, k, grid=GRID)  # noqa: E731
    assert calls_of(call) < 25 < calls_of(lambda: [plans._plans.clear(), call()])
