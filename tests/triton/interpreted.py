"""Run by test_interpreter.py in the interpreter's process: shipped configurations, faults, and what only Triton has."""

import contextlib

import pytest
import torch

import vidkern
from vidkern.ops.grid_attention import configs
from vidkern.ops.grid_attention.cost import Sample
from vidkern.ops.grid_attention.patterns import FramePattern

# Frames longer than the smallest row tile and not divided by any block; and a token run that every main tile fits into.
ODD = Sample("odd", 1, 1, 1, 16, (2, 2), 70, n_text=3)


def shipped():
    """Every block shape in the table, once; warps and stages mean nothing here."""
    seen = set()
    for kind in configs.KINDS:
        for family in ("ampere", "hopper", "blackwell", "small"):
            for dim in (64, 128, 256):
                for itemsize in (2, 4):
                    for c in configs.shipped(kind, dim, itemsize, family):
                        key = (kind, c.block_m, c.block_n, c.block_edge, c.straddle)
                        if key not in seen:
                            seen.add(key)
                            yield pytest.param(kind, c, id="-".join(map(str, key)))


def results(sample, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = sample.call(*leaves, return_lse=True, impl="triton")
    weights = [torch.cos(torch.arange(o.numel()).view(o.shape)) for o in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, weights)]


@pytest.fixture(scope="module")
def expected():
    tensors = ODD.tensors()
    leaves = [t.double().requires_grad_() for t in tensors]
    out, lse = ODD.call(*leaves, return_lse=True, impl="reference")
    weights = [torch.cos(torch.arange(o.numel()).view(o.shape)).double() for o in (out, lse)]
    return tensors, [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, weights)]


@pytest.mark.parametrize("kind, config", list(shipped()))
def test_configuration(kind, config, expected):
    tensors, want = expected
    with contextlib.ExitStack() as stack:
        for other in configs.KINDS:
            stack.enter_context(configs.forced(other, config if other == kind else configs.Config(64, 64, 16, 4, 1)))
        for got, exact in zip(results(ODD, tensors), want):
            assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
def test_a_visible_nan_stays_with_those_who_see_it(where):
    """A NaN in one frame, in tiles that straddle frames: rows of frames that do not see it keep their exact results."""
    band = FramePattern.from_lists([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5]])
    sample = Sample("nan", 1, 1, 1, 16, (6, 1), 20, pattern=band)
    clean = list(sample.tensors())
    weight = torch.ones_like(clean[0])
    run = lambda tensors, g: (lambda leaves: (o := sample.call(*leaves, impl="triton"), *torch.autograd.grad(o, leaves, g)))(
        [t.detach().requires_grad_() for t in tensors]
    )
    frame, mask = 1, torch.from_numpy(sample.frames.frame_mask().copy())
    tokens = slice(frame * 20, frame * 20 + 20)
    dirty = [t.clone() for t in clean]
    bad = weight.clone()
    target = {"q": dirty[0], "k": dirty[1], "v": dirty[2], "dout": bad}[where]
    target[:, :, tokens] = torch.nan
    with contextlib.ExitStack() as stack:
        for kind in configs.KINDS:
            stack.enter_context(configs.forced(kind, configs.Config(64, 32, 16, 4, 1)))
        before, after = run(clean, weight), run(dirty, bad)
    frames = torch.arange(6 * 20) // 20
    # out and dq of a frame depend on the keys it sees, dk and dv on the queries that see it and, through their softmax, on all
    # that those see; V is not in the softmax.
    seeing, seen, own = mask[:, frame], mask[frame], torch.arange(6) == frame
    through, nobody = mask[seeing].any(0), torch.zeros(6, dtype=torch.bool)
    touched = {
        "k": (seeing, seeing, through, through), "v": (seeing, seeing, through, nobody), "q": (own, own, seen, seen),
        "dout": (nobody, own, seen, seen),
    }[where]
    for name, a, b, hit in zip(("out", "dq", "dk", "dv"), before, after, touched):
        safe = ~hit[frames]
        assert safe.any()
        torch.testing.assert_close(b[:, :, safe], a[:, :, safe], rtol=0, atol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.25])
def test_any_scale(scale):
    """Below 0 the largest logit is at the smallest product: large ones overflow where that is missed."""
    sample = Sample("scale", 1, 1, 1, 16, (1, 2), 40)
    q, k, v = (t * f for t, f in zip(sample.tensors(), (30, 30, 1)))
    got, lse = sample.call(q, k, v, scale=scale, return_lse=True, impl="triton")
    want, want_lse = sample.call(q.double(), k.double(), v.double(), scale=scale, return_lse=True, impl="reference")
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert (got.double() - want).abs().max() < 2e-3  # logits of some thousands carry 1e-4 of rounding


def test_offsets_that_only_together_leave_32_bits():
    """Three tokens 2^30 elements apart (untouched memory costs nothing): each stride fits 32 bits, the last row's offset does not."""
    step = 2**30
    memory = torch.empty(2 * step + 256, dtype=torch.bfloat16)
    far = [memory.as_strided((1, 1, 3, 16), (16, 16, step, 1), 32 * i) for i in range(3)]
    near = [torch.randn(1, 1, 3, 16).bfloat16() for _ in range(3)]
    for f, t in zip(far, near):
        f.copy_(t)
    run = lambda tensors: (lambda leaves: (
        o := vidkern.grid_attention(*leaves, grid=(1, 3), impl="triton"), *torch.autograd.grad(o, leaves, near[0])
    ))([t.detach().requires_grad_() for t in tensors])
    for a, b in zip(run(far), run(near)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [40, 64])
def test_strides_of_every_alignment(dim):
    """Strides that multiples of 8 divide are handed over divided, others as they are: the same result."""
    sample = Sample("unit", 1, 2, 1, dim, (1, 2), 20)
    plain = sample.tensors()
    padded = [torch.cat([t, t[..., :3]], -1)[..., :dim] for t in plain]
    assert plain[0].stride(2) % 8 == 0 and padded[0].stride(2) % 8 != 0
    for a, b in zip(results(sample, plain), results(sample, padded)):
        assert torch.equal(a, b)


def test_plans_cannot_be_made_inside_a_capture(monkeypatch):
    """The first call of a size copies tables to the device, which a CUDA graph cannot record: a clear error says so."""
    from vidkern.ops.grid_attention import plan
    from vidkern.ops.grid_attention import triton as launchers

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shape = plan.Shape("grid/2x3/svt", 5, 0, False, False)
    with pytest.raises(RuntimeError, match="inside a CUDA graph capture, expected a call before it"):
        launchers._prepared.__wrapped__("forward", shape, 16, torch.bfloat16, torch.device("cuda:0"), None)


def test_samples_further_apart_than_32_bits():
    """A batch stride of 2^31 + 64 elements: divided by 8 it fits 32 bits, and must not be multiplied back there."""
    step = 2**31 + 64
    memory = torch.empty(step + 512, dtype=torch.bfloat16)
    far = [memory.as_strided((2, 1, 4, 16), (step, 16, 16, 1), 64 * i) for i in range(3)]
    near = [torch.randn(2, 1, 4, 16).bfloat16() for _ in range(3)]
    for f, t in zip(far, near):
        f.copy_(t)
    assert torch.equal(*(vidkern.grid_attention(*x, grid=(1, 2), impl="triton") for x in (far, near)))
