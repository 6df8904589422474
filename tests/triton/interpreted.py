"""Run by test_interpreter.py in the interpreter's process: shipped configurations, faults, and what only Triton has."""

import contextlib

import pytest
import torch

from vidkern.ops.grid_attention import configs
from vidkern.ops.grid_attention.cost import Sample
from vidkern.ops.grid_attention.patterns import FramePattern

# Frames longer than the smallest row tile and not divided by any block; and a token run that every main tile fits into.
ODD = Sample("odd", 1, 2, 1, 16, (2, 2), 70, n_text=3)


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
