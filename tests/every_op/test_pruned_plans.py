"""Kept plans of the pruned ops: what a repeated call reuses is never another call's."""

import contextlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import vidkern
from vidkern import registry
from vidkern.ops import quiet
from vidkern.ops.pruned_ffn import cost as ffn_cost
from vidkern.ops.pruned_linear import cost

from .checks import calls_of
from .conftest import EXPECTED, INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED or "cpu" not in EXPECTED.get("pruned_linear", {}), reason="plans are kept for the compiled kernels"
)


def op_of(name):
    return registry.ops()[name]


@pytest.fixture(autouse=True)
def no_plans():
    """Every test begins without plans."""
    for name in ("pruned_linear", "pruned_ffn"):
        op_of(name)._plans.clear(), op_of(name)._seen.clear()


def linear_call(sample):
    fixed = {n: t.to(torch.int32) if isinstance(t, torch.Tensor) else t for n, t in sample.indices().items()}
    more = {} if sample.residual or not sample.into else {"out_features": sample.into}
    more |= {"norm": "rms"} if sample.norm else {}
    return lambda tensors, impl: vidkern.pruned_linear(**tensors, **fixed, **more, act=sample.act, impl=impl)


def ffn_call(sample):
    keep = {"keep": torch.arange(0, 2 * sample.hidden // sample.slab, 2, dtype=torch.int32), "slab": sample.slab} if sample.slab else {}
    more = keep | ({"norm": "rms"} if sample.norm else {})

    def call(tensors, impl):
        given = {"b1": None, "b2": None} | tensors
        first = [given.pop(n) for n in ("x", "w1", "b1", "w2", "b2")]
        return vidkern.pruned_ffn(*first, **given, **more, tile=sample.tile, act=sample.act, impl=impl)

    return call


CASES = {f"{op}-{s.name}": (op, s, made(s)) for op, samples, made in (
    ("pruned_linear", cost.SAMPLES, linear_call), ("pruned_ffn", ffn_cost.SAMPLES, ffn_call)) for s in samples}  # fmt: skip


def inputs(sample, dtype, seed, gradients):
    """Tensors of a sample; the second time rows of x and the first weight lie further apart."""
    tensors = sample.tensors(dtype, seed=seed)
    if seed == 1:
        tensors = {n: torch.cat([t, t[..., :1]], -1)[..., :-1] if n in ("x", "weight", "w1") else t for n, t in tensors.items()}
    return {n: t.detach().requires_grad_() for n, t in tensors.items()} if gradients else tensors


def results(call, tensors, impl, seed):
    """The result, and gradients where they are asked for."""
    out = call(tensors, impl)
    if not out.requires_grad:
        return [out]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(tensors.values()), g)]


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_repeated_call_computes_its_own_values(case, dtype, gradients):
    """Calls of a kind with other values each: the first is dispatched, the second noted, the third repeats the notes; then other strides
    and another number of threads. All are, bit for bit, what the dispatcher gives."""
    op, sample, call = CASES[case]
    before = torch.get_num_threads()
    try:
        for seed in (0, 2, 3, 1, 1, 1, 4, 5):
            torch.set_num_threads(1 + seed // 4)
            tensors = inputs(sample, dtype, seed, gradients)
            got = results(call, tensors, "cpu", seed)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), torch.utils.flop_counter.FlopCounterMode(display=False):
                want = results(call, tensors, "cpu", seed)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    assert len(op_of(op)._plans) == 3


def small(gradients=False, tokens=9):
    """A call of each op, made of a fixed list and fresh tensors."""
    draw = lambda *s: torch.randn(*s, requires_grad=gradients)
    kept, into = torch.arange(0, 24, 2, dtype=torch.int32), torch.arange(0, 30, 3, dtype=torch.int32)
    return {
        "pruned_linear": lambda: vidkern.pruned_linear(
            draw(1, tokens, 24), draw(10, 12), draw(10), in_index=kept, out_index=into, residual=draw(1, tokens, 30)
        ),
        "pruned_ffn": lambda: vidkern.pruned_ffn(draw(1, tokens, 24), draw(40, 24), draw(40), draw(24, 40), draw(24), tile=16),
    }


@pytest.mark.parametrize("name", ["pruned_linear", "pruned_ffn"])
@pytest.mark.parametrize("gradients", [False, True])
def test_most_calls_are_notes_repeated(name, gradients):
    """The plans that the small calls make can be repeated: nothing in them is beyond the notes."""
    call = small(gradients)[name]
    for _ in range(3):
        out = call()
        if gradients:
            out.backward(torch.randn(out.shape))
    (plan,) = op_of(name)._plans.values()
    assert plan.forward and all(plan.backward.values()) and bool(plan.backward) == gradients


def test_modulated_layers_are_notes_repeated_too():
    """scale, shift and gate of several samples between each other in one memory, as adaLN makes them."""
    w, w1, w2 = torch.randn(12, 16), torch.randn(32, 16), torch.randn(16, 32)
    for _ in range(4):
        x, both = torch.randn(2, 9, 16), torch.randn(2, 3, 16)
        scale, shift, gate = both[:, :, None].unbind(1)
        more = dict(norm="rms", scale=scale, shift=shift)
        h = F.rms_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
        torch.testing.assert_close(vidkern.pruned_linear(x, w, **more), F.linear(h, w), rtol=1e-4, atol=1e-4)
        got = vidkern.pruned_ffn(x, w1, None, w2, None, gate=gate, residual=x, tile=16, act="silu", **more)
        torch.testing.assert_close(got, x + gate * F.linear(F.silu(F.linear(h, w1)), w2), rtol=1e-4, atol=1e-4)
    for name in ("pruned_linear", "pruned_ffn"):
        assert all(p.forward for p in op_of(name)._plans.values()) and op_of(name)._plans


def test_a_list_that_changes_ends_the_plan():
    x, w, kept = torch.randn(2, 16), torch.randn(8, 4), torch.tensor([1, 2, 3, 5], dtype=torch.int32)
    call = lambda: vidkern.pruned_linear(x, w, in_index=kept)
    for _ in range(3):
        assert torch.equal(call(), vidkern.pruned_linear(x[:, kept.long()].contiguous(), w))
    kept[3] = 9
    for _ in range(3):
        torch.testing.assert_close(call(), F.linear(x[:, [1, 2, 3, 9]], w))
    kept[3] = 99
    with pytest.raises(ValueError, match="in_index: holds 99"):
        call()


def test_lists_of_one_length_are_told_apart():
    """Other tensors, other ChannelIndex objects, wide integers; a list that was dropped leaves no plan for the next one in its place."""
    x, w = torch.randn(2, 16), torch.randn(8, 3)
    for make in (lambda v: torch.tensor(v, dtype=torch.int32), torch.tensor, lambda v: vidkern.ChannelIndex(v, 16), list):
        for at in range(12):
            values = [at, at + 1, at + 4]
            kept = make(values)
            for _ in range(3):
                torch.testing.assert_close(vidkern.pruned_linear(x, w, in_index=kept), F.linear(x[:, values], w))
            del kept


def test_the_stream_may_be_the_input():
    """x as its own residual, then two tensors of the same kind, and the other way round."""
    w = torch.randn(16, 16)
    for own in (True, False, True):
        for _ in range(3):
            x = torch.randn(3, 16)
            r = x if own else torch.randn(3, 16)
            torch.testing.assert_close(vidkern.pruned_linear(x, w, residual=r), r + F.linear(x, w))
    for alike in (True, True, True, False):
        both, other = torch.randn(3, 32), torch.randn(3, 32)
        x, r = both[:, :16], (both if alike else other)[:, 16:]
        torch.testing.assert_close(vidkern.pruned_linear(x, w, residual=r), r + F.linear(x, w))
    for alike in (True, True, True, False):  # x begins where the second tile of w1 does
        w1, w2 = torch.randn(32, 16), torch.randn(16, 32)
        x = w1[16:19] if alike else torch.randn(3, 16)
        got = vidkern.pruned_ffn(x, w1, None, w2, None, tile=16, act="silu")
        torch.testing.assert_close(got, F.linear(F.silu(F.linear(x, w1)), w2), rtol=1e-4, atol=1e-4)
    for _ in range(3):
        x = torch.randn(3, 16, requires_grad=True)
        (dx,) = torch.autograd.grad(vidkern.pruned_linear(x, w, residual=x).sum(), x)
        torch.testing.assert_close(dx, 1 + w.sum(0).expand(3, 16))


def test_what_a_layer_does_not_touch_is_zero_each_time(monkeypatch):
    """Gradients of a weight of which some slabs are kept, in memory that comes full of NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    columns = torch.tensor([1], dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(4):
            x, w = torch.randn(5, 16), torch.randn(8, 32, requires_grad=True)
            (dw,) = torch.autograd.grad(vidkern.pruned_linear(x, w, columns=columns, slab=16), w, torch.ones(5, 8))
            assert not dw[:, :16].any()
            torch.testing.assert_close(dw[:, 16:], x.sum(0).expand(8, 16))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_checked_is_checked_again_where_it_differs():
    x, w = torch.randn(2, 16), torch.randn(8, 16)
    for _ in range(3):
        vidkern.pruned_linear(x, w, eps=1), vidkern.pruned_ffn(x, w, None, torch.randn(16, 8), None, tile=1)
    for wrong, match in ((dict(eps=True), "eps: True"), (dict(act="relu"), "act: "), (dict(act=["none"]), "act: "), (dict(impl="cuda13"), "impl: ")):
        with pytest.raises(ValueError, match=match):
            vidkern.pruned_linear(x, w, **{"eps": 1} | wrong)
    for tile in (True, 1.0):
        with pytest.raises(ValueError, match="tile: "):
            vidkern.pruned_ffn(x, w, None, torch.randn(16, 8), None, tile=tile)
    with pytest.raises(ValueError, match="w.* device meta|weight: on device meta"):
        vidkern.pruned_linear(x, w.to("meta"), eps=1)
    with pytest.raises(TypeError, match="x: list"):
        vidkern.pruned_linear([1.0], w, eps=1)


def refused(*args):
    raise ZeroDivisionError


def test_modes_and_named_backends_go_the_long_way(monkeypatch):
    """A planned op is still seen by dispatch modes, explained, lowered by autocast, and follows ``use``."""
    for name, call in small().items():
        for _ in range(3):
            call()
        kept = dict(op_of(name)._plans)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() > 0 and vidkern.explain(call).chosen == "cpu"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call().dtype is (torch.float32 if name == "pruned_linear" else torch.bfloat16)
        with vidkern.use("reference"), monkeypatch.context() as patch:
            patch.setitem(op_of(name)._by_name, "reference", registry.Backend("reference", lambda *args: None, refused))
            with pytest.raises(ZeroDivisionError):
                call()
        with torch.inference_mode():
            assert call().is_inference()
        assert all(op_of(name)._plans[k] is p for k, p in kept.items())


def test_double_backward_raises():
    w, g = torch.randn(24, 24), torch.randn(1, 9, 24)
    calls = (lambda x: vidkern.pruned_linear(x, w, act="silu"), lambda x: vidkern.pruned_ffn(x, w, None, w, None))
    for call in calls:
        for _ in range(4):
            x = torch.randn(1, 9, 24, requires_grad=True)
            (dx,) = torch.autograd.grad(call(x), x, g.clone().requires_grad_(), create_graph=True)
            with pytest.raises(RuntimeError, match="double backward"):
                dx.sum().backward()


@pytest.mark.parametrize("outside", [False, True])
def test_recomputation_saves_what_the_forward_saved(outside):
    """Checkpointing counts saved tensors: the forward may run by the dispatcher and its recomputation by a plan."""
    x, w = torch.randn(1, 9, 24, requires_grad=True), torch.randn(24, 24, requires_grad=True)
    layer = lambda x: vidkern.pruned_linear(x, w, act="silu", residual=x)
    want = torch.autograd.grad(layer(x).square().sum(), (x, w))
    for _ in range(3):
        layer(x)
        with torch.utils.flop_counter.FlopCounterMode(display=False) if outside else contextlib.nullcontext():
            out = checkpoint(layer, x, use_reentrant=False)
        for a, b in zip(torch.autograd.grad(out.square().sum(), (x, w)), want):
            torch.testing.assert_close(a, b)


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(quiet, "LIMIT", 5)
    w = torch.randn(8, 16)
    for tokens in range(1, 20):
        for _ in range(2):
            vidkern.pruned_linear(torch.randn(tokens, 16), w)
    assert len(op_of("pruned_linear")._plans) <= 5 and len(op_of("pruned_linear")._seen) <= 5


@pytest.mark.parametrize("name", ["pruned_linear", "pruned_ffn"])
def test_a_small_call_costs_a_few_function_calls(name):
    """A count, where a time would depend on the machine: a planned call neither dispatches nor walks through launchers nor checks anew."""
    call = small()[name]
    assert calls_of(call) < 25 < calls_of(lambda: [op_of(name)._plans.clear(), op_of(name)._seen.clear(), call()])
    assert quiet.alone()


HIDDEN = """
    import torch, vidkern

    def most(reset=False):
        if reset:
            open("/proc/self/clear_refs", "w").write("5")
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    draw = lambda *size: torch.randn(*size, requires_grad=True)
    inputs, g = (draw(1024, 128), draw(8192, 128), draw(8192), draw(128, 8192), draw(128)), torch.randn(1024, 128)
    for _ in range(4):
        y = vidkern.pruned_ffn(*inputs, tile=128)
        before = most(reset=True)
        grads = torch.autograd.grad(y, inputs, g)
        print(most() - before)
        del y, grads
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_repeated_backward_holds_no_more_hidden_channels():
    """MiB that backwards take at their peak, gradients (9 MiB) included: all hidden channels at once would be 32 MiB, with their slopes
    and activations 128. The first one also loads what it needs."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(HIDDEN)], capture_output=True, text=True, check=True, env=env)
    assert max(map(float, run.stdout.split()[1:])) < 20, run.stdout


def test_a_copied_list_is_read_anew():
    """Wide integers are copied, and memory that NumPy shares changes without a trace in torch: such calls make no plan."""
    import numpy

    x, w, shared = torch.randn(2, 16), torch.randn(8, 3), numpy.array([1, 2, 4])
    for values in ([1, 2, 4], [1, 2, 4], [1, 2, 4], [0, 5, 9]):
        shared[:] = values
        torch.testing.assert_close(vidkern.pruned_linear(x, w, in_index=torch.from_numpy(shared)), F.linear(x[:, values], w))
    kept = torch.from_numpy(shared)
    for values in ([1, 2, 4], [1, 2, 4], [1, 2, 4], [0, 5, 9]):
        shared[:] = values
        torch.testing.assert_close(vidkern.pruned_linear(x, w, in_index=kept), F.linear(x[:, values], w))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_wide_biases_of_narrow_grouped_layers_have_wide_gradients(impl):
    """1001 tokens count to 1001, which bfloat16 does not hold; a narrow bias beside a wide one keeps its dtype."""
    x, w = torch.randn(1001, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    wide, narrow = torch.zeros(8, requires_grad=True), torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    a, b = vidkern.pruned_linear_grouped([x, x], [w, w], [wide, narrow], impl=impl)
    (a.sum() + b.sum()).backward()
    assert wide.grad.dtype is torch.float32 and (wide.grad == 1001).all()
    assert narrow.grad.dtype is torch.bfloat16 and (narrow.grad == 1000).all()


def test_grouped_errors_name_the_layer():
    x, w, b = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)
    call = vidkern.pruned_linear_grouped
    with pytest.raises(TypeError, match="layer 1: bias: None, expected a tensor in each layer"):
        call([x, x], [w, w], [b, None])
    with pytest.raises(TypeError, match="xs: Tensor, expected a non-empty list of tensors"):
        call(x, [w])
    with pytest.raises(ValueError, match="weights: 1 of them, expected 2, one per x"):
        call([x, x], [w])
    with pytest.raises(ValueError, match=r"layer 1: weight: shape \(8, 15\), expected \[out, 16\]"):
        call([x, x], [w, w[:, :15]])
    with pytest.raises(ValueError, match=r"layer 0: bias: shape \(7,\)"):
        call([x], [w], [b[:7]])
    with pytest.raises(ValueError, match="layer 1: x: torch.bfloat16 on cpu, expected torch.float32"):
        call([x, x.bfloat16()], [w, w.bfloat16()])
    with pytest.raises(ValueError, match="act: 'swiglu', expected"):
        call([x], [w], act="swiglu")
