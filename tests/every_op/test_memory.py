"""What every op does with memory: strides, poison, guard rows, sizes beyond 2^31 elements, determinism, nothing of size L x L."""

import resource
import subprocess
import sys
import textwrap

import pytest
import torch

import vidkern
from vidkern.ops.grid_attention.cost import SAMPLES, Sample

from . import checks
from .conftest import EXPECTED, INTERPRETED, backend_runs, interpretable, poisoned, samples
from .rooms import ROOMS, room

RUNS = [(o, b, t) for o in EXPECTED for b, t in backend_runs(o)]
LOW = {"cpu": (torch.float32, torch.bfloat16), "triton": (torch.bfloat16,), "reference": (torch.float32,)}


def everything(op, sample, tensors, backend):
    """Outputs and gradients under fixed loss weights."""
    r = room(op)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with checks.threads_of(backend):
        outputs = r.call(sample, leaves, impl=backend)
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize("op, backend, tier", RUNS, indirect=["tier"])
def test_poisoned_fresh_memory(op, backend, tier):
    """Outputs and workspaces start as NaN: what comes back is the same, so every element was written and none read before."""
    r = room(op)
    for sample in samples(op, backend)[::5] if INTERPRETED else r.samples:
        for dtype in LOW[backend]:
            tensors = r.inputs(sample, dtype, 0)
            want = everything(op, sample, tensors, backend)
            with poisoned():
                got = everything(op, sample, tensors, backend)
            for a, b in zip(got, want):
                assert torch.equal(a, b), f"{sample.name} {dtype}"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)] if INTERPRETED else [True])
@pytest.mark.parametrize("op, backend, tier", RUNS, indirect=["tier"])
def test_any_strides(op, backend, tier, whole):
    """Sliced, transposed and unaligned inputs give the same bits; a last stride other than 1 costs a copy, not an error. ``whole``: every
    change of every sample, instead of one of each."""
    r, chosen = room(op), samples(op, backend)[:3]
    for i, sample in enumerate(chosen):
        for dtype in LOW[backend]:
            tensors = r.inputs(sample, dtype, 0)
            want = everything(op, sample, tensors, backend)

            def padded(t):
                big = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
                big[..., 1:-2] = t
                return big[..., 1:-2]

            def swapped(t):
                return t.transpose(-2, -3).contiguous().transpose(-2, -3)

            def scattered(t):
                return t.transpose(-1, -2).contiguous().transpose(-1, -2)

            changes = (padded, swapped, scattered)
            for change in changes if whole else changes[i :: len(chosen)]:
                for a, b in zip(everything(op, sample, [change(t) for t in tensors], backend), want):
                    assert torch.equal(a, b), f"{sample.name} {dtype} {change.__name__}"


@pytest.mark.parametrize("backend, tier", backend_runs("grid_attention"), indirect=["tier"])
def test_expanded_inputs(backend, tier):
    """Strides of zero: one key/value head or one sample shared by all."""
    sample = SAMPLES[0]
    q, k, v = sample.tensors()
    k, v = k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)
    got = sample.call(q, k, v, impl=backend)
    assert torch.equal(got, sample.call(q, k.contiguous(), v.contiguous(), impl=backend))


def test_output_layout_follows_the_input():
    for layout in ("bhld", "blhd"):
        sample = Sample("layout", 2, 3, 3, 16, (2, 2), 5, layout=layout)
        q, k, v = (t.requires_grad_() for t in sample.tensors())
        out, lse = sample.call(q, k, v, return_lse=True)
        assert out.is_contiguous() and out.shape == q.shape and lse.shape == (2, 3, 20)
        out.sum().backward()
        assert q.grad.is_contiguous() and k.grad.is_contiguous()


def hidden():
    """Poison and sample; in the interpreter's quick run one sample has both, the others have NaN."""
    for poison in (float("nan"), float("inf")):
        for sample in SAMPLES:
            if sample.with_valid or sample.with_kv_len or sample.with_text_len:
                later = INTERPRETED and poison == float("inf") and sample.name != "frames_masked"
                yield pytest.param(poison, sample, id=f"{poison}-{sample.name}", marks=[pytest.mark.slow] * later)


@pytest.mark.parametrize("backend, tier", backend_runs("grid_attention"), indirect=["tier"])
@pytest.mark.parametrize("poison, sample", list(hidden()))
def test_hidden_memory_never_leaks(backend, tier, poison, sample):
    for dtype in LOW[backend]:
        checks.hidden_memory(interpretable(sample) if INTERPRETED else sample, dtype, backend, poison)


@pytest.mark.parametrize("backend, tier", backend_runs("grid_attention"), indirect=["tier"])
@pytest.mark.parametrize("n", [1, 7, 63, 65, 113])
@pytest.mark.parametrize("grid", [(1, 2), pytest.param((2, 3), marks=pytest.mark.slow)] if INTERPRETED else [(2, 3)])
def test_guard_rows(backend, tier, grid, n):
    """NaN right before and after every input: tails must not be read."""
    sample = Sample("guard", 1, 2, 1, 40, grid, n)
    for dtype in LOW[backend]:
        tensors = sample.tensors(dtype)
        want = everything("grid_attention", sample, tensors, backend)

        def guarded(t):
            flat = torch.full((t.numel() + 128,), torch.nan, dtype=t.dtype)
            flat[64 : 64 + t.numel()] = t.flatten()
            return flat[64 : 64 + t.numel()].view(t.shape)

        for a, b in zip(everything("grid_attention", sample, [guarded(t) for t in tensors], backend), want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend, tier", backend_runs("grid_attention"), indirect=["tier"])
def test_more_than_two_to_the_31_elements(backend, tier):
    """Two tokens 2^31 elements apart (untouched memory costs nothing): offsets are computed in 64 bits."""
    step = 2**31 + 64
    memory = torch.empty(step + 256, dtype=torch.bfloat16)
    far = [memory.as_strided((1, 1, 2, 16), (16, 16, step, 1), 32 * i) for i in range(3)]
    near = [torch.randn(1, 1, 2, 16).bfloat16() for _ in range(3)]
    for f, t in zip(far, near):
        f.copy_(t)
    want = vidkern.grid_attention(*near, grid=(1, 2), impl=backend)
    assert torch.equal(vidkern.grid_attention(*far, grid=(1, 2), impl=backend), want)
    leaves = [t.detach().requires_grad_() for t in far]
    vidkern.grid_attention(*leaves, grid=(1, 2), impl=backend).backward(near[0])
    checked = [t.detach().requires_grad_() for t in near]
    vidkern.grid_attention(*checked, grid=(1, 2), impl=backend).backward(near[0])
    for a, b in zip(leaves, checked):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("op, backend, tier", RUNS, indirect=["tier"])
def test_same_inputs_same_bits(op, backend, tier):
    """Ten runs, forward and backward, equal bit for bit; where threads have no say, three."""
    r = room(op)
    quick = min(samples(op, backend)[: 2 if INTERPRETED else 1], key=lambda s: s.flops)
    sample = next((s for s in r.samples if s.name == "demo" and not INTERPRETED), quick)
    tensors = r.inputs(sample, torch.float32, 0)
    first = everything(op, sample, tensors, backend)
    for _ in range(9 if backend == "cpu" else 2):
        for a, b in zip(everything(op, sample, tensors, backend), first):
            assert torch.equal(a, b)


def test_no_allocation_grows_with_the_square_of_the_length():
    """Forward and backward at 16,384 tokens in a fresh process: far less memory than one L x L object of bytes."""
    code = """
        import resource, torch, vidkern
        q, k, v = (torch.randn(1, 1, 16384, 32, requires_grad=True) for _ in range(3))
        small = [t[:, :, :64].detach().requires_grad_() for t in (q, k, v)]
        vidkern.grid_attention(*small, grid=(2, 2), impl="cpu").sum().backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        vidkern.grid_attention(q, k, v, grid=(4, 8), impl="cpu").sum().backward()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16384 * 16384 / 4
