"""How every op behaves inside torch: opcheck, compile, fake tensors, autocast, FLOP counter, DTensor, checkpointing, out=."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import vidkern
from vidkern import registry

from .checks import in_two_processes
from .conftest import EXPECTED, INTERPRETED
from .rooms import ROOMS, room

EVERY = [(o, b) for o in EXPECTED for b in EXPECTED[o]]


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every vidkern op that runs below it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vidkern":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(op, backend, sample, backward=True):
    r = room(op)
    with _Recorder() as recorder:
        tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
        out = r.call(sample, tensors, impl=backend)[0]
        if backward:
            out.sum().backward()
    return recorder.calls


@pytest.mark.parametrize("op, backend", EVERY)
def test_opcheck(op, backend):
    calls = recorded(op, backend, ROOMS[op].samples[0])
    assert [f.name() for f, _ in calls] == [f"vidkern::{op}", f"vidkern::{op}_backward"]
    forward, args = calls[0]
    leaf = lambda a: a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
    args = [[leaf(x) for x in a] if isinstance(a, list) else leaf(a) for a in args]
    results = torch.library.opcheck(forward, args)
    assert set(results.values()) == {"SUCCESS"}
    backward, args = calls[1]
    results = torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op, backend", EVERY)
def test_compiles_as_one_graph(op, backend):
    """fullgraph, forward and backward, equal to eager bit for bit."""
    r = room(op)
    for sample in r.samples[: 1 if INTERPRETED else 2]:
        torch._dynamo.reset()
        tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
        step = torch.compile(lambda *x: r.call(sample, x, impl=backend), fullgraph=True, backend="aot_eager")
        want = r.call(sample, tensors, impl=backend)
        got = step(*tensors)
        weights = [torch.randn_like(o) for o in want]
        for a, b in zip(got, want):
            assert torch.equal(a, b) and a.stride() == b.stride()
        grads = [torch.autograd.grad(o, tensors, weights) for o in (got, want)]
        for a, b in zip(*grads):
            assert torch.equal(a, b)


def test_inductor_compiles_a_training_step():
    """The whole compiler, with the op between pointwise code that it fuses."""
    torch._dynamo.reset()
    sample = ROOMS["grid_attention"].samples[1]
    tensors = [t.requires_grad_() for t in sample.tensors()]
    step = lambda q, k, v: (sample.call(q * 2, k + 1, torch.sin(v)) * 3).square().sum()
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*tensors), tensors)
    for a, b in zip(got, torch.autograd.grad(step(*tensors), tensors)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_one_graph_serves_many_lengths():
    torch._dynamo.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    step = torch.compile(lambda q: vidkern.grid_attention(q, q, q, grid=(2, 3)), fullgraph=True, backend=backend, dynamic=True)
    for n in (4, 5, 9, 30):
        q = torch.randn(1, 2, 6 * n, 16)
        assert torch.equal(step(q), vidkern.grid_attention(q, q, q, grid=(2, 3)))
    assert len(compiles) == 1


def test_rules_and_patterns_compile():
    torch._dynamo.reset()
    q, k, v = ROOMS["grid_attention"].samples[0].tensors()
    valid = torch.rand(2, 3, 4) > 0.2

    def step(q, k, v, valid):
        a = vidkern.grid_attention(
            q, k, v, grid=(3, 4), causal_time=True, window_view=(1, 0), cyclic_view=True, anchors={"frames": [(0, 1)]},
            valid=valid, include=("self", "view"),
        )
        b = vidkern.frame_sparse_attention(q, k, v, vidkern.GridPattern(3, 4, window_time=1), scale=0.5)
        return a, b

    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, valid), step(q, k, v, valid)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", EXPECTED)
def test_fake_tensors_know_shapes_and_strides(op):
    r = room(op)
    for sample in r.samples:
        real = r.call(sample, r.inputs(sample, torch.float32, 0), impl="reference")
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = r.call(sample, [torch.empty_strided(t.shape, t.stride()) for t in r.inputs(sample, torch.float32, 0)])
        for a, b in zip(fake, real):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), sample.name


def test_what_changes_between_calls_compiles():
    """Another scale, another grid, several masks with dynamic shapes: no graph break."""
    torch._dynamo.reset()
    q = torch.randn(1, 2, 24, 16)
    step = torch.compile(lambda q, s, g: vidkern.grid_attention(q, q, q, grid=g, scale=s), fullgraph=True, backend="aot_eager")
    for scale, grid in ((0.1, (2, 3)), (0.2, (2, 3)), (0.3, (4, 3)), (0.3, (6, 2))):
        assert torch.equal(step(q, scale, grid), vidkern.grid_attention(q, q, q, grid=grid, scale=scale))
    torch._dynamo.reset()
    call = lambda q, valid, kv_len, text_len: vidkern.grid_attention(
        q, q, q, grid=(2, 3), n_text=6, valid=valid, kv_len=kv_len, text_len=text_len
    )
    masks = torch.tensor([[[True, True, False], [True, True, True]]]), torch.tensor([[[1, 2, 3], [3, 2, 1]]]), torch.tensor([4])
    got = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)(q, *masks)
    assert torch.equal(got, call(q, *masks))


def test_autocast_takes_mixed_dtypes():
    """A norm in float32 before q, projections in bfloat16: what a DiT block hands over."""
    sample = ROOMS["grid_attention"].samples[0]
    q, k, v = sample.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        got = sample.call(q, k.bfloat16(), v.bfloat16())
        found = vidkern.explain(vidkern.grid_attention, q.half(), k, v, grid=(3, 4))
    assert torch.equal(got, sample.call(q.bfloat16(), k.bfloat16(), v.bfloat16())) and found.chosen == "cpu"


@pytest.mark.parametrize("op, backend", EVERY)
def test_unsupported_derivatives_raise(op, backend):
    """Forward mode, and second order through torch.func: an error, never a silent zero."""
    r = room(op)
    sample = r.samples[0]
    first, *rest = r.inputs(sample, torch.float32, 0)
    call = lambda x: r.call(sample, (x, *rest), impl=backend)[0]
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(call, (first,), (first,))
    inner = lambda x: torch.func.grad(lambda y: call(y).square().sum())(x).square().sum()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(inner)(first)


def test_autocast_lowers_attention():
    sample = ROOMS["grid_attention"].samples[0]
    tensors = [t.requires_grad_() for t in sample.tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = sample.call(*tensors, return_lse=True)
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    low = sample.call(*[t.bfloat16() for t in tensors])
    assert torch.equal(out, low)
    out.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in tensors)


@pytest.mark.parametrize("op", EXPECTED)
def test_flop_counter_equals_cost(op):
    import importlib

    cost = importlib.import_module(f"vidkern.ops.{op}.cost")
    r = room(op)
    for sample in r.samples[:12]:
        tensors = [t.requires_grad_() for t in r.inputs(sample, torch.float32, 0)]
        with FlopCounterMode(display=False) as counter:
            out = r.call(sample, tensors)[0]
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == sample.flops > 0
        calls = recorded(op, None, sample)
        rule = registry.ops()[op].gradient.flops
        assert counter.get_total_flops() - forward == rule(*calls[1][1]) > (0 if op.startswith("pyramid") else forward)
    assert cost.SAMPLES is r.samples


def test_attention_flops_are_the_closed_form():
    """4 B H D L K forward and 10 B H D L K backward with K = (V + T - 1) N."""
    from vidkern.ops.grid_attention import cost

    pattern = vidkern.GridPattern(8, 16)
    length, keys = 8 * 16 * 576, 23 * 576
    assert cost.forward_flops(1, 32, 128, pattern, 576) == 4 * 32 * 128 * length * keys == 16_003_048_144_896
    assert cost.backward_flops(1, 32, 128, pattern, 576) == 10 * 32 * 128 * length * keys


def test_selective_checkpointing_keeps_attention():
    """A policy that names the op saves its output: the forward kernel is not run again in backward."""
    runs = []
    op = registry.ops()["grid_attention"]
    plain = op._by_name["reference"]
    op._by_name["reference"] = registry.Backend("reference", plain.why_not, lambda *a: (runs.append(1), plain.run(*a)), plain.run_backward)

    def policy(ctx, func, *args, **kwargs):
        keep = func is torch.ops.vidkern.grid_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x):
        return vidkern.grid_attention(x * 2, x, x, grid=(2, 3), impl="reference").sin()

    try:
        x = torch.randn(1, 2, 24, 16, requires_grad=True)
        (want,) = torch.autograd.grad(block(x).sum(), x)
        runs.clear()
        saved = checkpoint(block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        (got,) = torch.autograd.grad(saved.sum(), x)
        assert torch.equal(got, want) and len(runs) == 1
        runs.clear()
        (got,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
        assert torch.equal(got, want) and len(runs) == 2
    finally:
        op._by_name["reference"] = plain


def test_out_overload_writes_in_place_and_is_inference_only():
    sample = ROOMS["merge_attention"].samples[1]
    outs, lses = sample.tensors()
    want, lse = sample.call(outs, lses)
    for impl in ("cpu", "reference"):
        out = torch.full_like(outs[0], torch.nan)
        got, got_lse = sample.call(outs, lses, out=out, impl=impl)
        assert got is out
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(got_lse, lse)
    with pytest.raises(RuntimeError, match="out= is inference only"):
        sample.call([outs[0].requires_grad_(), *outs[1:]], lses, out=torch.empty_like(outs[0]))
    with pytest.raises(ValueError, match="out: .* no repeated memory"):
        sample.call([o.detach() for o in outs], lses, out=torch.zeros_like(outs[0][:1]).expand_as(outs[0]))
    with pytest.raises(ValueError, match=r"out: .* expected"):
        sample.call([o.detach() for o in outs], lses, out=torch.empty_like(outs[0])[..., :8])
    torch._dynamo.reset()

    def step(a, b, la, lb, out):
        vidkern.merge_attention([a, b], [la, lb], out=out)
        return out * 2

    sample = ROOMS["merge_attention"].samples[0]
    outs, lses = sample.tensors()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*outs, *lses, torch.empty_like(outs[0]))
    assert torch.equal(got, 2 * sample.call(outs, lses)[0])


DTENSOR = """
    import json, os, sys, torch, vidkern
    import torch.distributed as dist
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    q, k, v, g = torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 4, 24, 16)
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    result = {}
    for layout in ("bhld", "blhd"):
        for name, axis in (("batch", 0), ("heads", 1 if layout == "bhld" else 2), ("length", 2 if layout == "bhld" else 1)):
            turn = (lambda t: t) if layout == "bhld" else (lambda t: t.transpose(1, 2).contiguous())
            plain = [turn(t).detach().clone().requires_grad_() for t in (q, k, v)]
            want = vidkern.grid_attention(*plain, grid=(2, 3), valid=valid, layout=layout)
            want.backward(turn(g))
            shared = [distribute_tensor(turn(t.detach()), mesh, [Shard(axis)]).requires_grad_() for t in (q, k, v)]
            got = vidkern.grid_attention(*shared, grid=(2, 3), valid=distribute_tensor(valid, mesh, [Replicate()]), layout=layout)
            got.backward(distribute_tensor(turn(g), mesh, [Shard(axis)]))
            pairs = [(got, want)] + [(s.grad, p.grad) for s, p in zip(shared, plain)]
            result[f"{layout} {name}"] = [str(got.placements[0]), max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)]
    parts, lses = [q, g], [q[..., 0].contiguous(), g[..., 0].contiguous()]
    for axis in (0, 1, 2):
        plain = [t.clone().requires_grad_() for t in parts]
        want = vidkern.merge_attention(plain, lses)
        want[0].backward(q)
        shared = [distribute_tensor(t, mesh, [Shard(axis)]).requires_grad_() for t in parts]
        got = vidkern.merge_attention(shared, [distribute_tensor(t, mesh, [Shard(axis)]) for t in lses])
        got[0].backward(distribute_tensor(q, mesh, [Shard(axis)]))
        pairs = [(got[0], want[0]), (got[1], want[1])] + [(s.grad, p.grad) for s, p in zip(shared, plain)]
        result[f"merge {axis}"] = [str(got[0].placements[0]), max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)]
    finish(rank, result)
"""


def test_dtensor_shards_batch_and_heads(tmp_path):
    """Two processes: batch and heads stay sharded through forward and backward; a sharded sequence is gathered first."""
    result = in_two_processes(DTENSOR, tmp_path)
    assert all(error < 1e-5 for _, error in result.values()), result
    where = {name: placement for name, (placement, _) in result.items()}
    assert where["bhld batch"] == where["blhd batch"] == "S(0)"
    assert [where[f"merge {axis}"] for axis in (0, 1, 2)] == ["S(0)", "S(1)", "S(2)"]
    assert where["bhld heads"] == "S(1)" and where["blhd heads"] == "S(2)"


def test_choice_is_explained_and_forced():
    q, k, v = ROOMS["grid_attention"].samples[0].tensors()
    found = vidkern.explain(vidkern.grid_attention, q, k, v, grid=(3, 4))
    assert found.chosen == "cpu" and "comes later" in found.reasons["reference"]
    found = vidkern.explain(vidkern.grid_attention, q.half(), k.half(), v.half(), grid=(3, 4))
    assert found.chosen == "reference" and "torch.float16" in found.reasons["cpu"]
    with vidkern.use("reference"):
        assert vidkern.explain(vidkern.grid_attention, q, k, v, grid=(3, 4)).chosen == "reference"
        assert vidkern.explain(vidkern.grid_attention, q, k, v, grid=(3, 4), impl="cpu").chosen == "cpu"
    with pytest.raises(vidkern.BackendUnavailable, match='impl: "cpu" cannot serve .* torch.float16'):
        vidkern.grid_attention(q.half(), k.half(), v.half(), grid=(3, 4), impl="cpu")
    with pytest.raises(ValueError, match="impl: 'gpu' is no backend"):
        vidkern.grid_attention(q, k, v, grid=(3, 4), impl="gpu")
    with pytest.raises(ValueError, match="impl: 'gpu', expected one of"):
        with vidkern.use("gpu"):
            pass
    with pytest.raises(TypeError, match="called no vidkern op"):
        vidkern.explain(torch.sin, q)


def test_a_backend_that_was_named_and_cannot_serve_heads_the_explanation():
    q, k, v = ROOMS["grid_attention"].samples[0].tensors()
    found = vidkern.explain(vidkern.grid_attention, q, k, v, grid=(3, 4), impl="hopper")
    assert found.chosen is None and str(found).startswith('grid_attention: "hopper", which was named, cannot serve this\n')
    assert 'cpu: could serve it, but "hopper" was named' in str(found) and "hopper: tensors are on cpu" in str(found)


def test_use_of_a_backend_that_an_op_does_not_have():
    """No ``impl`` was given, so none is wrong; an op that cannot serve raises what ops that cannot serve raise."""
    x = torch.randn(1, 2, 1, 4, 4)
    call = lambda **more: vidkern.pyramid_decompose(x, levels=2, **more)  # noqa: E731
    message = r'^vidkern.use\("hopper"\): pyramid_decompose has no such backend; name one of its own by impl=: "auto", "cpu", .*"reference"$'
    with vidkern.use("hopper"):
        for asked in (call, lambda: vidkern.explain(call)):
            with pytest.raises(vidkern.BackendUnavailable, match=message if asked is call else "has no such backend"):
                asked()
        assert all(map(torch.equal, call(impl="cpu"), call(impl="auto")))
    with pytest.raises(ValueError, match="impl: 'hopper' is no backend of pyramid_decompose, expected one of"):
        call(impl="hopper")


def test_errors_name_the_function_that_was_called():
    q = torch.randn(1, 2, 24, 16, dtype=torch.float64)
    with pytest.raises(vidkern.BackendUnavailable, match=r'impl: "cpu" cannot serve this call of attention_mass \(op grid_attention\): dtype'):
        vidkern.attention_mass(q, q, 6, impl="cpu")
    with pytest.raises(ValueError, match=r"impl: 'gpu' is no backend of attention_mass \(op grid_attention\), expected"):
        vidkern.attention_mass(q, q, 6, impl="gpu")
    maps = torch.randn(1, 48, 2, 16)
    target = vidkern.attention_motion_flow(maps, maps, grid=(2, 4, 6), layout="blhd")
    with pytest.raises(vidkern.BackendUnavailable, match=r"this call of amf_loss \(op attention_motion_flow\): tensors are on cpu"):
        vidkern.amf_loss(maps, maps, target, grid=(2, 4, 6), layout="blhd", impl="hopper")


def test_info_names_every_op_and_backend():
    text = str(vidkern.info())
    for op in registry.ops().values():
        assert op.name in text and all(b.name in text for b in op.backends)


def _batched_calls():
    draw = lambda *size: torch.randn(*size, requires_grad=True)  # noqa: E731
    x, w, up, down, video, q = draw(4, 16), draw(8, 16), draw(32, 16), draw(16, 32), draw(1, 3, 2, 8, 8), draw(1, 2, 24, 16)
    return {
        "pruned_linear": (lambda: vidkern.pruned_linear(x, w), (x, w)),
        "pruned_ffn": (lambda: vidkern.pruned_ffn(x, up, None, down, None, tile=16), (x, up, down)),
        "pyramid_decompose": (lambda: vidkern.pyramid_decompose(video, levels=2)[1], (video,)),
        "grid_attention": (lambda: vidkern.grid_attention(q, q, q, grid=(2, 3)), (q,)),
        "attention_motion_flow": (lambda: vidkern.attention_motion_flow(q, q, grid=(2, 3, 4)), (q,)),
    }


@pytest.mark.skipif(INTERPRETED, reason="plans are kept for the compiled kernels")
@pytest.mark.parametrize("name", _batched_calls())
def test_batched_gradients(name):
    """Several gradients at once (``is_grads_batched``), of first calls and of those that a plan repeats."""
    call, inputs = _batched_calls()[name]
    for _ in range(4):
        out = call()
        g = torch.randn(3, *out.shape)
        got = torch.autograd.grad(out, inputs, g, retain_graph=True, is_grads_batched=True)
        want = zip(*(torch.autograd.grad(out, inputs, one, retain_graph=True) for one in g))
        assert all(torch.equal(a, torch.stack(b)) for a, b in zip(got, want))
