"""Attention motion flow: numerics in patches, results as asked for, any memory layout, workspaces, compiling and sharding."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vidkern
from vidkern import compiled
from vidkern.ops.attention_motion_flow import OP, cost, reference
from vidkern.ops.attention_motion_flow.pairs import pairs_key, pairs_of
from vidkern.verify import amf_rooms

from . import checks, motion
from .conftest import EXPECTED, backend_runs

IMPLS = list(EXPECTED.get("attention_motion_flow", {}))
RUNS = backend_runs("attention_motion_flow") if IMPLS else []


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.mark.parametrize("impl, tier", RUNS, indirect=["tier"])
def test_counting(impl, tier):
    for dtype in (torch.float32, torch.bfloat16):
        for sample in amf_rooms.COUNTS:
            amf_rooms.counting(sample, dtype, impl)


@pytest.mark.parametrize("heads", motion.VARIANTS)
def test_float64_is_the_oracle_to_the_last_digits(heads):
    """The reference, with its gradients."""
    leaves = [motion.draw(1, 3, 5 + 24, 8, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2)]
    got = motion.flow(*leaves, (2, 3, 4), "reference", heads=heads, n_text=5, mode="both", **motion.EXTRAS)
    want = motion.oracle(*(t[0, :, 5:] for t in leaves), (2, 3, 4), heads)
    assert all((getattr(got, name) - t).abs().max() < 1e-12 for name, t in want.items())
    assert got.flow.dtype is got.lse.dtype is torch.float64
    call = lambda q, k: motion.flow(q, k, (2, 3, 4), "reference", heads=heads, n_text=5)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("impl, tier", RUNS, indirect=["tier"])
@pytest.mark.parametrize("dtype, patch, slope", [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 2e-3, 1e-2)])
def test_tolerances(impl, tier, dtype, patch, slope):
    """In patches, and in the relative norm of the gradients, against float64 on the same rounded inputs."""
    for heads in ("logit_mean", "none", "prob_mean"):
        leaves = [motion.draw(1, 4, 2 * 12 * 17, 64, seed=s).to(dtype).requires_grad_() for s in (1, 2)]
        got = motion.flow(*leaves, (2, 12, 17), impl, heads=heads, **motion.EXTRAS)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want = motion.oracle(exact[0][0], exact[1][0], (2, 12, 17), heads)
        assert got.flow.dtype is torch.float32 and (got.flow - want["flow"]).abs().max() <= patch
        assert (got.lse - want["lse"]).abs().max() < 1e-5 and (got.entropy - want["entropy"]).abs().max() < 1e-4
        weight = motion.draw(*got.flow.shape, seed=3)
        grads = [torch.autograd.grad((f * weight).sum(), x) for f, x in ((got.flow, leaves), (want["flow"], exact))]
        for a, b in zip(*grads):
            assert a.dtype is dtype and (a.double() - b).norm() <= slope * b.norm()


# ---- results and pairs -------------------------------------------------------------------------------------------------------
def test_results_come_as_asked_for(impl):
    q, k = (motion.draw(2, 3, 24, 16, seed=s) for s in (1, 2))
    shapes = {"flow": (4, 12, 2), "hard": (4, 12, 2), "index": (4, 12), "lse": (4, 12), "conf": (4, 12), "entropy": (4, 12)}
    call = lambda **more: vidkern.attention_motion_flow(q, k, grid=(2, 3, 4), impl=impl, **more)
    for mode in ("soft", "hard"):
        assert isinstance(call(mode=mode), torch.Tensor)
    everything = call(mode="both", **motion.EXTRAS)
    assert {n: tuple(t.shape) for n, t in everything._asdict().items()} == shapes
    flow, index = call(mode="hard", return_index=True)
    assert torch.equal(flow, everything.hard) and index.dtype is torch.int32 and torch.equal(index, everything.index)
    soft, lse = call(return_lse=True)
    assert torch.equal(soft, everything.flow) and torch.equal(lse, everything.lse)
    for heads, lead in (("none", (2, 3)), ("logit_mean", (2,)), ("prob_mean", (2,))):
        found = call(mode="both", heads=heads, batch_index=None, **motion.EXTRAS)._asdict()
        per_head = (2, 3)
        assert {n: tuple(t.shape) for n, t in found.items()} == {
            n: (per_head if n == "lse" and heads == "prob_mean" else lead) + s for n, s in shapes.items()
        }
        each = [call(mode="both", heads=heads, batch_index=b, **motion.EXTRAS) for b in (0, -1)]
        for i, t in enumerate(found.values()):
            assert torch.equal(t[0], each[0][i]) and torch.equal(t[1], each[1][i])


def test_only_the_flow_and_the_lse_have_gradients(impl):
    q, k = (motion.draw(1, 2, 24, 16, seed=s).requires_grad_() for s in (1, 2))
    found = motion.flow(q, k, (2, 3, 4), impl, mode="both", **motion.EXTRAS)
    assert [n for n, t in found._asdict().items() if t.requires_grad] == ["flow", "lse"]
    assert not motion.flow(q, k, (2, 3, 4), impl, mode="hard").requires_grad
    raw = OP(q[:, None], k[:, None], "all", 2, 3, 4, 0.1, 1 | 8, impl)
    with pytest.raises(RuntimeError, match="top and entropy have no gradient"):
        raw[3].sum().backward()


@pytest.mark.parametrize("pairs, want", [
    ("all", [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]),
    ("upper", [(0, 1), (0, 2), (1, 2)]),
    ({"max_dt": 1}, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]),
    ({"max_dt": 0}, [(0, 0), (1, 1), (2, 2)]),
    ([(2, 0), [0, 1]], [(2, 0), (0, 1)]),
    (torch.tensor([[1, 1], [0, 2]]), [(1, 1), (0, 2)]),
])  # fmt: skip
@pytest.mark.parametrize("heads", ["logit_mean", "prob_mean"])
def test_pairs_choose_rows(pairs, want, heads, impl):
    """The rows of "all", in the order of the pairs; the gradient is that of those rows."""
    assert list(pairs_of(pairs_key(pairs, 3), 3)) == want
    q, k = (motion.draw(1, 2, 36, 16, seed=s).requires_grad_() for s in (1, 2))
    rows = [3 * i + j for i, j in want]
    got = motion.flow(q, k, (3, 3, 4), impl, pairs=pairs, mode="both", heads=heads, **motion.EXTRAS)
    every = motion.flow(q, k, (3, 3, 4), impl, mode="both", heads=heads, **motion.EXTRAS)
    for name, t in got._asdict().items():
        assert torch.equal(t, getattr(every, name)[..., rows, :, :] if name in ("flow", "hard") else getattr(every, name)[..., rows, :])
    weight = motion.draw(*got.flow.shape)
    for a, b in zip(*(torch.autograd.grad((f * weight).sum(), (q, k)) for f in (got.flow, every.flow[rows]))):
        assert (a - b).abs().max() < 1e-5


def test_any_number_of_frames(impl):
    for frames in (1, 2, 7, 13):
        q, k = (motion.draw(1, 2, frames * 6, 16, seed=s) for s in (1, 2))
        got = motion.flow(q, k, (frames, 2, 3), impl)
        assert got.shape == (frames**2, 6, 2)
        assert (got - motion.oracle(q[0], k[0], (frames, 2, 3))["flow"]).abs().max() < 1e-4


# ---- memory ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl, tier", RUNS, indirect=["tier"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (1, 113)])
def test_guard_rows(impl, tier, shape):
    """NaN right before and after every input, and in the text: what is not a token of the video must not be read."""
    grid = (2, *shape)
    length = 2 * shape[0] * shape[1] + 3
    for dtype in (torch.float32, torch.bfloat16) if impl != "triton" else (torch.bfloat16,):
        tensors = [motion.draw(1, 2, length, 24, seed=s).to(dtype) for s in (1, 2)]
        for t in tensors:
            t[:, :, :3] = torch.nan

        def guarded(t):
            flat = torch.full((t.numel() + 128,), torch.nan, dtype=t.dtype)
            flat[64 : 64 + t.numel()] = t.flatten()
            return flat[64 : 64 + t.numel()].view(t.shape)

        found = []
        for change in (lambda t: t, guarded):
            leaves = [change(t).requires_grad_() for t in tensors]
            out = motion.flow(*leaves, grid, impl, n_text=3, heads="none")
            found.append((out, *torch.autograd.grad(out, leaves, motion.draw(*out.shape))))
        for a, b in zip(*found):
            assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("impl, tier", RUNS, indirect=["tier"])
def test_more_than_two_to_the_31_elements(impl, tier):
    """Two frames 2^31 elements apart (untouched memory costs nothing): offsets are computed in 64 bits."""
    step = 2**31 + 64
    memory = torch.empty(step + 256, dtype=torch.bfloat16)
    near = [motion.draw(1, 1, 2, 16, seed=s).bfloat16() for s in (1, 2)]
    far = [memory.as_strided((1, 1, 2, 16), (16, 16, step, 1), 32 * i) for i in range(2)]
    results = []
    for f, t in zip(far, near):
        f.copy_(t)
    for tensors in (near, far):
        leaves = [t.detach().requires_grad_() for t in tensors]
        found = motion.flow(*leaves, (2, 1, 1), impl, return_lse=True)
        results.append((*found, *torch.autograd.grad(found.lse.sum(), leaves)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that plain torch made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_nothing_of_the_reference_is_as_large_as_all_logits():
    """Forward, vote and backward: no tensor of more than one query frame against all tokens."""
    frames, size, heads = 6, 256, 8
    tokens, pairs = frames * size, pairs_of("all", frames)
    q, k, dq, dk = (torch.randn(1, heads, 1, tokens, 8) for _ in range(4))
    shared = {"grid": (frames, 16, 16), "scale": 0.3}
    rows = (1, heads, len(pairs), size)
    mean, lse, index = torch.empty(*rows, 2), torch.empty(rows), torch.empty(1, 1, *rows[2:], dtype=torch.int32)
    with _Largest() as largest:
        reference.forward(q, k, pairs, mean=mean, lse=lse, top=None, entropy=None, index=None, **shared)
        reference.vote(q, k, lse, pairs, index=index, top=None, **shared)
        reference.backward(mean, lse, q, k, mean, lse, pairs, dq=dq, dk=dk, **shared)
    assert size**2 <= largest.numel <= size * tokens


@pytest.mark.skipif("cpu" not in IMPLS, reason="another backend is under test")
def test_workspaces_are_no_larger_than_a_slab():
    """Keys of some frames, and one frame of keys against all queries: never N x N. In shapes of real models, without running them."""
    from vidkern.ops.attention_motion_flow.cpu import _by_key_frame

    for bf16 in (False, True):
        for groups, heads, dim, grid in ((8, 1, 64, (8, 20, 24)), (1, 48, 64, (6, 30, 45)), (1, 48, 64, (13, 30, 45)), (12, 1, 128, (21, 30, 52))):
            frames, size = grid[0], grid[1] * grid[2]
            lists = _by_key_frame(pairs_of("all", frames), frames)
            fields = (bf16, 2, 1, groups, heads, dim, *grid, frames**2, *(t.data_ptr() for t in lists))
            tokens = frames * size
            gradient = tokens * heads * dim * 4
            for kind in range(3):
                got = compiled.cpu().amf_workspace(kind, fields)
                # A frame of keys and what the threads work on; the backward also sums dq in float32.
                allowed = (32 << 20) + groups * heads * dim * size * 4 + (6 * gradient / frames + 2 * gradient) * (kind == 2)
                assert got < allowed and got < tokens**2 * 4, (kind, groups, grid, got >> 20)


@pytest.mark.skipif("cpu" not in IMPLS, reason="another backend is under test")
def test_memory_of_a_training_step():
    """16 frames of 256 patches in a fresh process: far less than one table of all logits, let alone of every head."""
    code = """
        import resource, torch, vidkern
        grid, heads = (16, 16, 16), {heads!r}
        q, k = (torch.randn(1, 4, 4096, 16, requires_grad=True) for _ in range(2))
        step = lambda q, k, grid: vidkern.attention_motion_flow(q, k, grid=grid, heads=heads, impl="cpu", mode="both")[0].square().sum().backward()
        step(q[:, :, :64], k[:, :, :64], (4, 4, 4))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(q, k, grid)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    for heads in ("logit_mean", "prob_mean"):
        run = [sys.executable, "-c", textwrap.dedent(code.format(heads=heads))]
        grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        assert grown < 4096 * 4096 * 4 / 2


# ---- inside torch ------------------------------------------------------------------------------------------------------------
def test_every_option_compiles(impl):
    torch._dynamo.reset()
    q, k = (motion.draw(2, 2, 30, 16, seed=s).requires_grad_() for s in (1, 2))
    hard = motion.flow(q, k, (2, 3, 4), impl, n_text=6, mode="hard", pairs="upper")

    def step(q, k):
        shared = {"grid": (2, 3, 4), "n_text": 6, "impl": impl}
        every = vidkern.attention_motion_flow(q, k, heads="prob_mean", mode="both", batch_index=None, **motion.EXTRAS, **shared)
        one = vidkern.attention_motion_flow(q, k, heads="qk_mean", tau=3.0, pairs={"max_dt": 0}, **shared)
        return vidkern.amf_loss(q, k, hard, pairs="upper", **shared) + one.square().sum(), every

    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k), step(q, k)
    assert got[1]._fields == want[1]._fields
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(got[0], (q, k)), torch.autograd.grad(want[0], (q, k))):
        assert torch.equal(a, b)


def test_one_graph_serves_many_frame_sizes():
    torch._dynamo.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    step = torch.compile(lambda q, h, w: vidkern.attention_motion_flow(q, q, grid=(2, h, w)), fullgraph=True, backend=backend, dynamic=True)
    for h, w in ((3, 4), (5, 7), (6, 9)):
        q = torch.randn(1, 2, 2 * h * w, 16)
        assert torch.equal(step(q, h, w), vidkern.attention_motion_flow(q, q, grid=(2, h, w)))
    assert len(compiles) == 1


def test_autocast_lowers_and_takes_mixed_dtypes():
    q, k = (motion.draw(1, 2, 24, 16, seed=s) for s in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        got = vidkern.attention_motion_flow(q, k.bfloat16(), grid=(2, 3, 4))
    assert got.dtype is torch.float32 and torch.equal(got, vidkern.attention_motion_flow(q.bfloat16(), k.bfloat16(), grid=(2, 3, 4)))


SHARDED = """
    import json, sys, torch, vidkern
    import torch.distributed as dist
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 24, 16), torch.randn(2, 4, 24, 16)
    result = {}
    for heads in ("none", "prob_mean", "logit_mean"):
        for name, axis in (("batch", 0), ("heads", 1)):
            call = lambda q, k: vidkern.attention_motion_flow(q, k, grid=(2, 3, 4), heads=heads, batch_index=None, mode="both", return_lse=True)
            plain = [t.clone().requires_grad_() for t in (q, k)]
            shared = [distribute_tensor(t, mesh, [Shard(axis)]).requires_grad_() for t in (q, k)]
            want, got = call(*plain), call(*shared)
            want.flow.square().sum().backward()
            got.flow.square().sum().backward()
            pairs = [*zip(got, want)] + [(s.grad, p.grad) for s, p in zip(shared, plain)]
            result[f"{heads} {name}"] = [str(got.lse.placements[0]), max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)]
    finish(rank, result)
"""


@pytest.mark.slow
def test_dtensor_shards_batch_and_heads(tmp_path):
    """Two processes: batch stays sharded, and the heads where each has a map of its own and no vote goes over them."""
    result = checks.in_two_processes(SHARDED, tmp_path)
    assert all(error < 1e-5 for _, error in result.values()), result
    where = {name: placement for name, (placement, _) in result.items()}
    assert where["none batch"] == where["prob_mean batch"] == where["logit_mean batch"] == "S(0)"
    assert where["none heads"] == "S(1)"


def test_cost_of_the_measured_case():
    """8 frames of 480 tokens, 8 heads of 64: 15.6 GFLOP forward, 61.8 with the backward."""
    forward, backward = cost.forward_flops(8, 64, 480, 64), cost.backward_flops(8, 64, 480, 64)
    assert forward == 2 * 8 * 3840**2 * 66 and backward == 2 * 8 * 3840**2 * 194
    assert round(forward / 1e9, 1) == 15.6 and round((forward + backward) / 1e9, 1) == 61.3
