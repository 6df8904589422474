"""Pruned layers: what section 6 of the method asks of the operator, each known mistake, and every documented error."""

import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F

import vidkern
from vidkern import registry
from vidkern.ops.pruned import index
from vidkern.ops.pruned_ffn import cost as ffn_cost
from vidkern.ops.pruned_ffn import tiles
from vidkern.ops.pruned_linear import cost, reference

from . import checks
from .conftest import EXPECTED, INTERPRETED

IMPLS = list(EXPECTED.get("pruned_linear", {}))


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def kept(n, size):
    return torch.randperm(size)[:n].sort().values.int()


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


ACT = {"none": lambda u: u, "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"), "silu": F.silu}


# ---- the general operator ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("act", ACT)
def test_is_the_plain_chain(act, impl):
    """R.index_add(1, O, gate * act(P(X)[:, I] W + b)), with adaLN gate, scale and shift per sample."""
    x, r = torch.randn(2, 17, 40), torch.randn(2, 17, 30)
    w, b, gate, scale, shift = torch.randn(11, 13), torch.randn(11), torch.randn(2, 11), torch.randn(2, 40), torch.randn(2, 40)
    i, o = kept(13, 40), kept(11, 30)
    got = vidkern.pruned_linear(
        x, w, b, in_index=i, out_index=o, act=act, gate=gate, residual=r, norm="rms", scale=scale, shift=shift, impl=impl
    )
    u = (rms(x) * (1 + scale[:, None]) + shift[:, None])[..., i.long()] @ w.t() + b
    torch.testing.assert_close(got, r.index_add(2, o, gate[:, None] * ACT[act](u)), rtol=1e-5, atol=1e-4)


def test_scale_and_shift_without_a_norm_act_on_x_itself(impl):
    """What docs/pruned.md says of ``norm=None``: no norm is implied."""
    x, w, scale, shift = torch.randn(2, 7, 16), torch.randn(9, 16), torch.randn(2, 16), torch.randn(2, 16)
    want = (x * (1 + scale[:, None]) + shift[:, None]) @ w.t()
    torch.testing.assert_close(vidkern.pruned_linear(x, w, scale=scale, shift=shift, impl=impl), want, rtol=1e-5, atol=1e-5)
    got = vidkern.pruned_ffn(x, w, None, torch.eye(9), None, act="none", scale=scale, shift=shift, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_is_the_dense_layer_with_zero_rows_and_columns(impl):
    x, w, b, i, o = torch.randn(1, 21, 33), torch.randn(9, 14), torch.randn(9), kept(14, 33), kept(9, 27)
    dense, bias = torch.zeros(27, 33), torch.zeros(27)
    dense[o.long()[:, None], i.long()], bias[o.long()] = w, b
    got = vidkern.pruned_linear(x, w, b, in_index=i, out_index=o, out_features=27, impl=impl)
    torch.testing.assert_close(got, F.linear(x, dense, bias), rtol=1e-5, atol=1e-5)


def test_the_norm_is_over_all_channels(impl):
    """Changing x outside the kept channels changes the result, and the gradient there is not zero."""
    x, w, i = torch.randn(1, 5, 32, requires_grad=True), torch.randn(8, 12), kept(12, 32)
    out = vidkern.pruned_linear(x, w, in_index=i, norm="rms", impl=impl)
    other = torch.ones(32, dtype=torch.bool).index_fill_(0, i.long(), False)
    assert not torch.allclose(vidkern.pruned_linear(x.detach() + 3 * other, w, in_index=i, norm="rms", impl=impl), out, atol=1e-2)
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert (dx[..., other].abs() > 1e-4).any(-1).all()
    want = torch.autograd.grad((rms(x)[..., i.long()] @ w.t()).square().sum(), x)[0]
    torch.testing.assert_close(dx, want, rtol=1e-4, atol=1e-4)


def test_without_a_norm_other_channels_have_no_gradient(impl):
    x, w, i = torch.randn(1, 5, 32, requires_grad=True), torch.randn(8, 12), kept(12, 32)
    (dx,) = torch.autograd.grad(vidkern.pruned_linear(x, w, in_index=i, impl=impl).sum(), x)
    assert not dx.index_fill(2, i.long(), 0).any() and dx.any()


def test_gradcheck():
    """Every differentiable argument of both ops, float64."""
    i, o = kept(4, 7), kept(6, 9)
    draw = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)

    def linear(x, w, b, gate, mask, r, scale, shift):
        return vidkern.pruned_linear(
            x, w, b, in_index=i, out_index=o, act="swiglu", gate=gate, mask=mask, residual=r, norm="rms", scale=scale, shift=shift
        )

    args = (draw(2, 3, 7), draw(12, 4), draw(12), draw(2, 6), draw(3), draw(2, 3, 9), draw(2, 7), draw(1, 7))
    assert torch.autograd.gradcheck(linear, args)

    def ffn(x, w1, b1, w2, b2, gate, mask, r, scale, shift):
        more = dict(tile=3, act="gelu_tanh", gate=gate, mask=mask, residual=r, norm="rms", scale=scale, shift=shift)
        return vidkern.pruned_ffn(x, w1, b1, w2, b2, **more)

    args = (draw(2, 3, 5), draw(8, 5), draw(8), draw(5, 8), draw(5), draw(2, 5), draw(4), draw(2, 3, 5), draw(2, 5), draw(2, 5))
    assert torch.autograd.gradcheck(ffn, args)


def test_the_residual_is_added_before_the_one_rounding(impl):
    """bf16 layer, float32 stream: no rounding of the sum to bf16; bf16 stream: one."""
    x, w = torch.randn(1, 9, 24).bfloat16(), torch.randn(16, 24).bfloat16()
    exact = x.double() @ w.double().t()
    wide = torch.randn(1, 9, 16)
    got = vidkern.pruned_linear(x, w, residual=wide, impl=impl)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), wide.double() + exact, rtol=1e-6, atol=1e-5)
    narrow = (wide * 100).bfloat16()
    got = vidkern.pruned_linear(x, w, residual=narrow, impl=impl)
    assert torch.equal(got, (narrow.float() + exact.float()).bfloat16())


def test_in_place_into_the_stream(impl):
    x, w, o = torch.randn(1, 40, 24), torch.randn(10, 24), kept(10, 32)
    stream = torch.randn(1, 40, 32)
    want = vidkern.pruned_linear(x, w, out_index=o, residual=stream, impl=impl)
    place = stream.data_ptr()
    got = vidkern.pruned_linear(x, w, out_index=o, residual=stream, out=stream, impl=impl)
    assert got is stream and got.data_ptr() == place and torch.equal(got, want)
    with pytest.raises(RuntimeError, match="out= is inference only"):
        vidkern.pruned_linear(x, w.requires_grad_(), out_index=o, residual=stream, out=stream, impl=impl)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of tiles take the interpreter minutes")
@pytest.mark.parametrize("shape", [(1, 400, 300, 290, 700, 650), (1, 3, 700, 260, 900, 520), (2, 130, 64, 513, 64, 1100)])
def test_large_enough_for_blocks(shape):
    """More than one chunk of rows, strip of columns and block of sums, with threads: few rows and many."""
    b, t, k, n, width, into = shape
    x, w, i, o = torch.randn(b, t, width), torch.randn(n, k) / k**0.5, kept(k, width), kept(n, into)
    r = torch.randn(b, t, into)
    want = r.double().index_add(2, o, x.double()[..., i.long()] @ w.double().t())
    with checks.threads_of("cpu"):
        for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
            got = vidkern.pruned_linear(x.to(dtype), w.to(dtype), in_index=i, out_index=o, residual=r.to(dtype), impl="cpu")
            assert (got - want).abs().max() < limit


def test_mask_gradient_scores_slabs(impl):
    """dL/dm of a slab at m = 1 is the sum of dZ * Z over it; at m = 0 it is still right."""
    x, w, g = torch.randn(1, 12, 16), torch.randn(24, 16), torch.randn(1, 12, 24)
    z = F.gelu(x @ w.t(), approximate="tanh")
    for value in (1.0, 0.0):
        mask = torch.full((3,), value, requires_grad=True)
        (got,) = torch.autograd.grad((vidkern.pruned_linear(x, w, act="gelu_tanh", mask=mask, impl=impl) * g).sum(), mask)
        torch.testing.assert_close(got, (g * z).view(-1, 3, 8).sum((0, 2)), rtol=1e-4, atol=1e-4)


def test_candidates_of_an_unrepacked_weight(impl):
    """Slab lists give what cutting gives; the gradient is full size and zero elsewhere."""
    x, w, b = torch.randn(1, 11, 32), torch.randn(48, 64, requires_grad=True), torch.randn(48)
    rows, columns = [0, 2], [1, 3]
    at = lambda slabs: torch.tensor([c for s in slabs for c in range(16 * s, 16 * s + 16)])
    out = vidkern.pruned_linear(x, w, b, rows=rows, columns=columns, slab=16, impl=impl)
    cut = w[at(rows)][:, at(columns)]
    torch.testing.assert_close(out, x @ cut.t() + b[at(rows)], rtol=1e-5, atol=1e-5)
    (dw,) = torch.autograd.grad(out.sum(), w)
    (want,) = torch.autograd.grad((x @ cut.t()).sum(), w)
    torch.testing.assert_close(dw, want, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_is_computed(impl):
    """A frozen weight costs no product for its gradient, and gets none."""
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(1, 12, 16, requires_grad=True), torch.randn(24, 16)
    with FlopCounterMode(display=False) as counter:
        vidkern.pruned_linear(x, w, act="silu", impl=impl).sum().backward()
    assert counter.get_total_flops() == 2 * cost.forward_flops(12, 16, 24)


# ---- the tiled network -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tile", [16, 40, 96, 7, 1000])
def test_tiling_changes_nothing(tile, impl):
    """One group, a divisor, all, a short last tile, more than all."""
    tile = 24 if INTERPRETED and tile == 7 else tile  # fourteen tiles take the interpreter half a minute
    x, w1, b1, w2, b2 = torch.randn(2, 9, 24), torch.randn(96, 24) / 5, torch.randn(96), torch.randn(24, 96) / 10, torch.randn(24)
    want = F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
    torch.testing.assert_close(vidkern.pruned_ffn(x, w1, b1, w2, b2, tile=tile, impl=impl), want, rtol=1e-5, atol=1e-5)


class Hidden(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that live at once in tensors as wide as a part of the hidden channels."""

    def __init__(self, tokens, widths):
        super().__init__()
        self.tokens, self.widths, self.alive, self.peak = tokens, widths, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memory = lambda t: t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) else None
        fresh = isinstance(out, torch.Tensor) and all(memory(out) != memory(a) for a in args)
        if fresh and out.dim() == 2 and out.shape[0] == self.tokens and out.shape[1] in self.widths:
            self.alive += out.numel()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(out, self._gone, out.numel())
        return out

    def _gone(self, elements):
        self.alive -= elements


@pytest.mark.parametrize("kit", [i for i in IMPLS if i != "reference"])
def test_no_more_than_a_tile_of_hidden_channels_lives(kit):
    """Peak of hidden elements, counted where torch allocates: N * tile, where the whole would be N * F."""
    kit = importlib.import_module(f"vidkern.ops.pruned.{kit}")
    tokens, dim, hidden = 64, 24, 320
    x, w1, w2, out = torch.randn(1, tokens, dim), torch.randn(hidden, dim), torch.randn(dim, hidden), torch.empty(1, tokens, dim)
    for tile in (40, 100, hidden):
        with Hidden(tokens, set(range(25, hidden + 1))) as seen:
            tiles.forward(kit, (out,), x, w1, None, w2, None, *(None,) * 6, 1, tile, "gelu_tanh", False, 1e-6, 0, "cpu")
        assert seen.peak == tokens * tile
        torch.testing.assert_close(out, F.linear(F.gelu(F.linear(x, w1), approximate="tanh"), w2), rtol=1e-4, atol=1e-3)


# ---- costs -------------------------------------------------------------------------------------------------------------------
def test_costs_are_the_closed_form():
    """FLOPs and bytes of the paper's layers: 1344 tokens, 2048 channels, 6144 hidden, 20 heads of 64."""
    assert cost.forward_flops(1344, 2048, 3840) == 2 * 1344 * 2048 * 3840 == 21_139_292_160
    up, down = cost.forward_flops(1344, 2048, 6144), cost.forward_flops(1344, 6144, 2048)
    assert ffn_cost.forward_flops(1344, 2048, 6144, 2048) == up + down == 67_645_734_912
    assert round(20 * (up + down) / 1e9) == 1353 and round(20 * cost.forward_flops(1344, 2048, 3840) / 1e9) == 423
    assert round(20 * cost.forward_flops(1344, 1280, 2048) / 1e9) == 141
    assert round(cost.forward_bytes(1344, 2048, 6144, 2) / 2**20, 1) == 45.0
    assert round(cost.forward_bytes(1344, 2048, 3840, 2) / 2**20, 1) == 30.1
    assert cost.backward_flops(7, 3, 5) == 2 * cost.forward_flops(7, 3, 5)


# ---- mistakes ----------------------------------------------------------------------------------------------------------------
def norm_over_kept(x, weight, bias, gate, mask, residual, scale, shift, in_index, *rest, norm, **more):
    kept_x = x if in_index is None else x.index_select(-1, in_index)
    own = [t if t is None or in_index is None else t.index_select(-1, in_index) for t in (scale, shift)]
    return reference.forward(kept_x, weight, bias, gate, mask, residual, *own, None, *rest, norm=norm, **more)


def bias_after_act(x, weight, bias, *rest, act, **more):
    out, u = reference.forward(x, weight, None, *rest, act=act, **more)
    if bias is None or rest[6] is not None or out.shape[-1] != bias.shape[0]:
        return out, u
    return out + bias, u


def gate_before_act(x, weight, bias, gate, *rest, act, **more):
    if gate is None or act == "swiglu":
        return reference.forward(x, weight, bias, gate, *rest, act=act, **more)
    out, u = reference.forward(x, weight, bias, None, None, None, *rest[2:4], rest[4], None, *rest[6:], act="none", **more)
    z = reference.activations.forward(u * reference.spread(gate, u, u.dtype), act)
    return (z if rest[1] is None else rest[1] + z) if rest[5] is None else out, u


def ignores_order_of_pairs(x, weight, *rest, act, **more):
    if act == "swiglu":
        weight = torch.cat(list(weight.chunk(2))[::-1])
    return reference.forward(x, weight, *rest, act=act, **more)


def forgets_residual(x, weight, bias, gate, mask, residual, *rest, **more):
    out, u = reference.forward(x, weight, bias, gate, mask, None if residual is None else residual * 0, *rest, **more)
    return out, u


def dx_only_on_kept(*args, norm, **more):
    dx, *others = reference.backward(*args, norm=norm, **more)
    in_index = args[8]
    if norm and in_index is not None:
        gone = torch.ones(dx.shape[-1], dtype=torch.bool).index_fill_(0, in_index.long(), False)
        dx = dx.masked_fill(gone, 0)
    return dx, *others


def dgate_of_u(dout, x, weight, bias, gate, *rest, **more):
    grads = list(reference.backward(dout, x, weight, bias, gate, *rest, **more))
    grads[3] = None if gate is None else grads[3] * 1.01
    return tuple(grads)


FAULTS = {
    "norm over the kept channels": (norm_over_kept, reference.backward, ("modulated", "every_part")),
    "bias after the activation": (bias_after_act, reference.backward, ("packed",)),
    "gate before the activation": (gate_before_act, reference.backward, ("one_token",)),
    "gates and values swapped": (ignores_order_of_pairs, reference.backward, ("pairs",)),
    "residual forgotten": (forgets_residual, reference.backward, ("gather_scatter",)),
    "no gradient outside the kept channels": (reference.forward, dx_only_on_kept, ("modulated",)),
    "gate gradient one per cent off": (reference.forward, dgate_of_u, ("gated_residual",)),
}


@pytest.mark.skipif(INTERPRETED, reason="on the reference")
@pytest.mark.parametrize("name", ["none", *FAULTS])
def test_mistake_is_caught(name):
    """The accuracy rule of the every-op test notices each of them, and passes the right implementation."""
    forward, backward, samples = FAULTS.get(name, (reference.forward, reference.backward, ("every_part",)))

    def run(outputs, *args):
        *tensors, slab, act, norm, eps, features, wants, impl = args
        results = forward(*tensors, slab=slab, act=act, norm=norm, eps=eps, out_features=features)
        for target, value in zip(outputs, results):
            if target.dim() > 1:
                target.copy_(value)

    def run_backward(outputs, *args):
        *tensors, slab, act, norm, eps, wants, impl = args
        grads = backward(*tensors, slab=slab, act=act, norm=norm, eps=eps, inner=bool(wants & 1), outer=bool(wants & 2))
        for target, grad in zip(outputs, grads):
            if grad is not None:
                target.copy_(grad)

    op = registry.ops()["pruned_linear"]
    op._by_name["faulty"] = registry.Backend("faulty", lambda *args: None, run, run_backward)
    worst = dict(checks.WORST)
    try:
        for sample in (s for s in cost.SAMPLES if s.name in samples):
            if name == "none":
                checks.accuracy("pruned_linear", sample, torch.float32, "faulty")
                continue
            with pytest.raises(AssertionError):
                checks.accuracy("pruned_linear", sample, torch.float32, "faulty")
    finally:
        del op._by_name["faulty"]
        checks.WORST.clear()
        checks.WORST.update(worst)


# ---- bad input ---------------------------------------------------------------------------------------------------------------
def linear(**more):
    x, weight = more.pop("x", torch.zeros(2, 3, 16)), more.pop("weight", torch.zeros(8, 16))
    return lambda: vidkern.pruned_linear(x, weight, **more)


def ffn(**more):
    given = {"x": torch.zeros(2, 3, 16), "w1": torch.zeros(32, 16), "b1": None, "w2": torch.zeros(16, 32), "b2": None} | more
    first = [given.pop(n) for n in ("x", "w1", "b1", "w2", "b2")]
    return lambda: vidkern.pruned_ffn(*first, **given)


w4 = torch.zeros(8, 4)
BAD = {
    "x type": (linear(x=[1]), TypeError, "x: list, expected a torch.Tensor"),
    "x rank": (linear(x=torch.zeros(16)), ValueError, r"x: shape \(16,\), expected \[tokens, channels\]"),
    "x dtype": (linear(x=torch.zeros(2, 16, dtype=torch.int32)), ValueError, "x: dtype torch.int32, expected a floating-point dtype"),
    "x empty": (linear(x=torch.zeros(0, 16)), ValueError, r"x: shape \(0, 16\), expected no empty dimension"),
    "weight rank": (linear(weight=torch.zeros(16)), ValueError, r"weight: shape \(16,\), expected \[out, in\]"),
    "weight dtype": (linear(weight=torch.zeros(8, 16).bfloat16()), ValueError, "weight: dtype torch.bfloat16, expected x's torch.float32"),
    "weight width": (linear(weight=torch.zeros(8, 15)), ValueError, "weight: 15 input channels .* expected x's 16 channels"),
    "weight against index": (linear(in_index=[1, 2, 3], weight=w4), ValueError, "weight: 4 input channels .* expected the 3 channels of in_index"),
    "no channel left": (linear(weight=torch.zeros(8, 0)), ValueError, r"weight: shape \(8, 0\), expected no empty dimension"),
    "unsorted": (linear(in_index=[1, 5, 3, 7], weight=w4), ValueError, r"in_index: holds 3 after 5, expected sorted numbers .* among 0\.\.15"),
    "repeated": (linear(in_index=torch.tensor([1, 5, 5, 7]), weight=w4), ValueError, "in_index: holds 5 twice"),
    "out of range": (linear(in_index=[1, 5, 6, 16], weight=w4), ValueError, "in_index: holds 16, expected"),
    "negative": (linear(in_index=[-1, 5, 6, 7], weight=w4), ValueError, "in_index: holds -1, expected"),
    "index empty": (linear(in_index=[], weight=w4), ValueError, "in_index: empty, expected"),
    "index float": (linear(in_index=torch.tensor([0.5]), weight=w4), ValueError, r"in_index: shape \(1,\) torch.float32, expected a 1-D integer"),
    "index text": (linear(in_index="abc", weight=w4), TypeError, "in_index: 'abc', expected a list of channel numbers"),
    "index size": (linear(in_index=vidkern.ChannelIndex([1], 20)), ValueError, "in_index: chooses from 20 channels, expected from 16"),
    "mask length": (lambda: vidkern.ChannelIndex(torch.ones(3, dtype=torch.bool), 4), ValueError, "values: mask of 3 channels, expected 4"),
    "out_index": (linear(out_index=[1, 2], out_features=9), ValueError, "out_index: 2 channels, expected 8"),
    "out_features missing": (linear(out_index=list(range(8))), ValueError, "out_features: None, expected the result's number of channels"),
    "out_features": (linear(out_features=9), ValueError, "out_features: 9, expected 8"),
    "out_features type": (linear(out_features="8"), ValueError, "out_features: '8', expected an integer >= 1"),
    "out_features of a stream": (
        linear(out_index=list(range(8)), out_features=24, residual=torch.zeros(2, 3, 32)),
        ValueError, r"residual: shape \(2, 3, 32\), expected \(2, 3, 24\)",
    ),
    "act": (linear(act="relu"), ValueError, "act: 'relu', expected one of 'none', 'gelu_tanh'"),
    "odd pairs": (linear(act="swiglu", weight=torch.zeros(7, 16)), ValueError, "weight: 7 output channels, expected an even number"),
    "bias": (linear(bias=torch.zeros(7)), ValueError, r"bias: shape \(7,\), expected \(8,\)"),
    "gate": (linear(gate=torch.zeros(4, 8)), ValueError, r"gate: shape \(4, 8\), expected \[rows, 8\]"),
    "gate dtype": (linear(gate=torch.zeros(2, 8).half()), ValueError, "gate: dtype torch.float16, expected x's torch.float32"),
    "mask": (linear(mask=torch.zeros(3)), ValueError, r"mask: shape \(3,\), expected \[slabs\] with slabs that divide 8"),
    "residual": (linear(residual=torch.zeros(2, 3, 9)), ValueError, r"residual: shape \(2, 3, 9\), expected \(2, 3, 8\)"),
    "norm": (linear(norm="layer"), ValueError, "norm: 'layer', expected None or \"rms\""),
    "eps": (linear(eps=-1.0), ValueError, "eps: -1.0, expected a finite number >= 0"),
    "slab": (linear(rows=[0], slab=3), ValueError, "slab: 3, expected a divisor of the weight's 8 rows"),
    "rows": (linear(rows=[2], slab=4), ValueError, r"rows: holds 2, expected .* among 0\.\.1"),
    "device": (linear(bias=torch.zeros(8, device="meta")), ValueError, "bias: on device meta, expected x's cpu"),
    "out": (linear(out=torch.zeros(2, 3, 9)), ValueError, r"out: \(2, 3, 9\) .* expected \(2, 3, 8\)"),
    "impl": (linear(impl="cuda13"), ValueError, "impl: 'cuda13' is no backend of pruned_linear"),
    "w1 width": (ffn(w1=torch.zeros(32, 15)), ValueError, "w1: 15 input channels .* expected x's 16"),
    "w1 rows": (ffn(w1=torch.zeros(31, 16)), ValueError, "w1: 31 rows, expected 32: w2 has 32 input channels"),
    "pairs rows": (ffn(act="swiglu"), ValueError, 'w1: 32 rows, expected 64: w2 has 32 input channels, and act "swiglu" takes two rows'),
    "b2": (ffn(b2=torch.zeros(15)), ValueError, r"b2: shape \(15,\), expected \(16,\): one value per row of w2"),
    "tile": (ffn(tile=0), ValueError, "tile: 0, expected an integer >= 1"),
    "tile of slabs": (ffn(keep=[0], slab=16, tile=24), ValueError, "tile: 24, expected a multiple of slab 16"),
    "keep": (ffn(keep=[0, 0], slab=16, tile=16), ValueError, "keep: holds 0 twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_checked_index_that_changes_is_checked_again():
    """In-place writes are seen; the kernel itself refuses what it cannot read."""
    channels = torch.tensor([1, 2, 3, 5], dtype=torch.int32)
    x = torch.zeros(2, 16)
    vidkern.pruned_linear(x, w4, in_index=channels)
    channels[3] = 99
    with pytest.raises(ValueError, match="in_index: holds 99"):
        vidkern.pruned_linear(x, w4, in_index=channels)
    assert index.fault(torch.tensor([0, 3]), 4) is None


@pytest.mark.skipif("cpu" not in IMPLS, reason="the compiled kernel")
def test_the_kernel_refuses_channels_beyond_its_memory():
    bad = torch.tensor([0, 1, 2, 1000], dtype=torch.int32)
    args = (torch.zeros(2, 16), w4, *(None,) * 6, bad, None, None, None, 1, "none", False, 1e-6, 8, 0, "cpu")
    with pytest.raises(ValueError, match="index: 1000, expected a number below 16"):
        torch.ops.vidkern.pruned_linear(*args)
