"""Attention motion flow: the properties of motion.py on every backend and tier, wrong implementations that they catch, pair sets, memory,
and every documented error."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vidkern
from vidkern import registry
from vidkern.ops.attention_motion_flow import OP, reference

from . import motion
from .conftest import backend_runs

BACKENDS = backend_runs("attention_motion_flow")


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
@pytest.mark.parametrize("check", motion.CHECKS, ids=lambda c: c.__name__)
def test_property(check, backend, tier):
    check(backend)


@pytest.mark.parametrize("heads", motion.VARIANTS)
def test_gradcheck(heads):
    q, k = (motion.draw(1, 2, 12, 8, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))

    def call(q, k):
        got = vidkern.attention_motion_flow(q, k, grid=(2, 2, 3), heads=heads, return_lse=True)
        return got.flow, got.lse

    assert torch.autograd.gradcheck(call, (q, k))


# ---- wrong implementations ------------------------------------------------------------------------------------------------
def _wrong(change):
    """The reference's launchers with ``change(outputs, grid)`` made after the forward, or ``change(dq, dk)`` after the backward."""
    kind, act = change

    def forward(q, k, pairs, *, grid, scale, **outputs):
        if kind == "inputs":
            q, k, pairs, scale = act(q, k, pairs, scale)
        reference.forward(q, k, pairs, grid=grid, scale=scale, **outputs)
        if kind == "outputs":
            act(outputs, grid)

    def backward(*args, dq, dk, **more):
        reference.backward(*args, dq=dq, dk=dk, **more)
        if kind == "gradients":
            act(dq, dk)

    return {"forward": forward, "vote": reference.vote, "backward": backward}


def _swap_axes(outputs, grid):
    if outputs["mean"] is not None:
        outputs["mean"].copy_(outputs["mean"].flip(-1))


def _last_of_ties(outputs, grid):
    if outputs["index"] is not None:
        outputs["index"].copy_(torch.where(outputs["index"] == 0, outputs["index"].max() + 1, outputs["index"]))


def _shift_lse(outputs, grid):
    if outputs["lse"] is not None:
        outputs["lse"].add_(0.01)


FAULTS = {
    "x and y swapped": ("outputs", _swap_axes),
    "the last of ties": ("outputs", _last_of_ties),
    "pairs the other way round": ("inputs", lambda q, k, pairs, scale: (q, k, tuple((j, i) for i, j in pairs), scale)),
    "one head of a mean": ("inputs", lambda q, k, pairs, scale: (q[:, :, :1], k[:, :, :1], pairs, scale * q.shape[2])),
    "no temperature": ("inputs", lambda q, k, pairs, scale: (q, k, pairs, scale / 2)),
    "a shifted log-sum-exp": ("outputs", _shift_lse),
    "a gradient of q twice": ("gradients", lambda dq, dk: dq.mul_(2)),
    "keys without gradient": ("gradients", lambda dq, dk: dk.zero_()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_implementation_is_caught(fault, monkeypatch):
    from vidkern.ops import attention_motion_flow as op

    launchers = _wrong(FAULTS[fault])
    wrong = registry.Backend("wrong", lambda *args: None, op._run_with(launchers.__getitem__), op._run_backward_with(launchers.__getitem__))
    monkeypatch.setattr(OP, "backends", (*OP.backends, wrong))
    monkeypatch.setattr(OP, "_by_name", {b.name: b for b in OP.backends})
    caught = 0
    for check in motion.CHECKS:
        try:
            check("wrong")
        except AssertionError:
            caught += 1
    assert caught


# ---- pairs, memory, precision ---------------------------------------------------------------------------------------------
def test_pair_sets():
    q, k = (motion.draw(1, 2, 4 * 6, 16, seed=s) for s in (1, 2))
    flow = lambda pairs: vidkern.attention_motion_flow(q, k, grid=(4, 2, 3), pairs=pairs)  # noqa: E731
    every = flow("all").unflatten(0, (4, 4))
    upper = [(i, j) for i in range(4) for j in range(4) if i < j]
    near = [(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1]
    for pairs, listed in (("upper", upper), ({"max_dt": 1}, near), ([(2, 0), (3, 3), (0, 2)],) * 2, (torch.tensor([[1, 2]]), [(1, 2)])):
        torch.testing.assert_close(flow(pairs), torch.stack([every[i, j] for i, j in listed]))


def test_all_samples_at_once():
    q, k = (motion.draw(3, 2, 2 * 6, 16, seed=s) for s in (1, 2))
    both = vidkern.attention_motion_flow(q, k, grid=(2, 2, 3), batch_index=None, heads="none")
    for b in range(3):
        torch.testing.assert_close(both[b], vidkern.attention_motion_flow(q, k, grid=(2, 2, 3), batch_index=b, heads="none"))
    torch.testing.assert_close(vidkern.attention_motion_flow(q, k, grid=(2, 2, 3), heads="none"), both[2])


class Largest(TorchDispatchMode):
    """The most elements that a tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("heads", [1, 2])
def test_the_reference_holds_nothing_of_n_by_n(heads):
    """Its launchers called directly: a mode does not see into an op. What C++ holds is a block per thread."""
    grid = (6, 10, 12)
    n, pairs = math.prod(grid), tuple((i, j) for i in range(6) for j in range(6))
    q, k = (motion.draw(1, 1, heads, n, 16, seed=s) for s in (1, 2))
    rows = (1, 1, 36, 120)
    mean, lse, dmean = torch.empty(*rows, 2), torch.empty(rows), torch.ones(*rows, 2)
    with Largest() as forward:
        reference.forward(q, k, pairs, grid=grid, scale=0.3, mean=mean, index=None, lse=lse, top=None, entropy=None)
    with Largest() as backward:
        reference.backward(dmean, None, q, k, mean, lse, pairs, grid=grid, scale=0.3, dq=torch.empty_like(q), dk=torch.empty_like(k))
    with Largest() as dense:
        q @ k.mT
    assert 0 < forward.elements < n * n and 0 < backward.elements < n * n and dense.elements >= n * n


def test_sums_are_not_in_sixteen_bits():
    """bfloat16 inputs against float64 on the same rounded inputs: within 2e-3 of a patch."""
    q, k = (2 * motion.draw(1, 4, 2 * 30 * 45, 64, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    got = vidkern.attention_motion_flow(q, k, grid=(2, 30, 45))
    want = vidkern.attention_motion_flow(q.double(), k.double(), grid=(2, 30, 45))
    assert (got - want).abs().max() < 2e-3


def test_the_averages_of_qk_mean_are_rounded():
    """What docs/motion.md says: 0.002 patches against the rounded averages, not against exact ones, and how to have these."""
    q, k = ((4 * torch.randn(1, 4, 600, 64)).bfloat16() for _ in range(2))
    flow = lambda q, k, **more: vidkern.attention_motion_flow(q, k, grid=(2, 15, 20), **more).double()  # noqa: E731
    off = lambda a, b: (a - b).abs().max().item()  # noqa: E731
    got, exact = flow(q, k, heads="qk_mean"), flow(q.double(), k.double(), heads="qk_mean")
    rounded, single = (q.mean(1, keepdim=True), k.mean(1, keepdim=True)), (q.float().mean(1, keepdim=True), k.float().mean(1, keepdim=True))
    assert off(got, flow(*(t.double() for t in rounded))) < 0.002 < 0.02 < off(got, exact)
    assert off(flow(*single), exact) < 1e-4


# ---- bad input --------------------------------------------------------------------------------------------------------------
Q = torch.randn(2, 2, 12, 16)
MISTAKES = [
    ({"grid": (2, 2, 4)}, r"grid: \(2, 2, 4\) has 16 tokens, expected the 12 video tokens of q"),
    ({"grid": (2, 6)}, r"grid: \(2, 6\), expected \(frames, height, width\)"),
    ({"grid": (2, 2, 3.0)}, "grid: "),
    ({"q": Q[..., :15], "k": Q[..., :15]}, "q: head_dim 15, expected a multiple of 8"),
    ({"q": Q[0], "k": Q[0]}, "q: shape"),
    ({"k": Q[:, :, :6]}, "k: shape"),
    ({"k": Q.double()}, "k: dtype torch.float64, expected q's dtype torch.float32"),
    ({"q": Q.long(), "k": Q.long()}, "q: dtype torch.int64, expected a floating-point dtype"),
    ({"tau": 0.0}, "tau: 0.0, expected a number > 0"),
    ({"tau": -1}, "tau: -1, expected a number > 0"),
    ({"tau": math.nan}, "tau: nan"),
    ({"scale": math.inf}, "scale: inf, expected a finite number"),
    ({"layout": "bdhl"}, "layout: 'bdhl', expected one of"),
    ({"heads": "mean"}, "heads: 'mean', expected one of"),
    ({"n_text": -1}, "n_text: -1, expected an integer >= 0"),
    ({"text_position": "middle"}, "text_position: 'middle', expected one of"),
    ({"batch_index": 2}, r"batch_index: 2, expected None or an integer in -2..1"),
    ({"pairs": "lower"}, "pairs: "),
    ({"pairs": [(0, 2)]}, "pairs: "),
    ({"pairs": []}, "pairs: empty, expected at least one pair"),
    ({"pairs": [(0, 1), (0, 1)]}, "pairs: .*twice, expected every pair once"),
    ({"pairs": {"max_dt": -1}}, "pairs: "),
    ({"grid": (1, 3, 4), "pairs": "upper"}, "pairs: "),
    ({"impl": "tpu"}, "impl"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", MISTAKES)
def test_bad_input(change, message):
    given = {"q": Q, "k": Q, "grid": (2, 2, 3), **change}
    with pytest.raises(ValueError, match=message):
        vidkern.attention_motion_flow(**given)
    with pytest.raises(ValueError, match=message):
        vidkern.amf_loss(given.pop("q"), given.pop("k"), torch.zeros(4, 6, 2), **given)


def test_bad_results_and_references():
    call = lambda **more: vidkern.attention_motion_flow(Q, Q, grid=(2, 2, 3), **more)  # noqa: E731
    with pytest.raises(ValueError, match="mode: 'sharp', expected one of"):
        call(mode="sharp")
    with pytest.raises(ValueError, match="return_lse: 1, expected True or False"):
        call(return_lse=1)
    with pytest.raises(TypeError, match="q: list, expected a torch.Tensor"):
        vidkern.attention_motion_flow([], Q, grid=(2, 2, 3))
    loss = lambda *args: vidkern.amf_loss(Q, Q, *args, grid=(2, 2, 3))  # noqa: E731
    with pytest.raises(TypeError, match="flow_ref: list, expected a torch.Tensor"):
        loss([])
    with pytest.raises(ValueError, match=r"flow_ref: shape \(3, 6, 2\), expected \(4, 6, 2\)"):
        loss(torch.zeros(3, 6, 2))
    with pytest.raises(ValueError, match=r"mask: shape \(4, 5\), expected \(4, 6\)"):
        loss(torch.zeros(4, 6, 2), torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: dtype torch.float32, expected torch.bool"):
        loss(torch.zeros(4, 6, 2), torch.zeros(4, 6))


def test_no_second_gradient_and_none_of_hard_flows():
    q = Q.clone().requires_grad_()
    flow = vidkern.attention_motion_flow(q, q, grid=(2, 2, 3))
    (first,) = torch.autograd.grad(flow.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
    hard = vidkern.attention_motion_flow(q, q, grid=(2, 2, 3), mode="hard")
    assert not hard.requires_grad
