"""Run by test_interpreter_pruned.py in the interpreter's process: the pruned ops with every part, every shipped tile, and the choice of it."""

import pytest
import torch

import vidkern
from vidkern.ops.pruned import configs, index
from vidkern.ops.pruned import triton as kit
from vidkern.ops.pruned_ffn import cost as ffn
from vidkern.ops.pruned_linear import cost as linear

SMALL = configs.Config(32, 32, 32, 4, 1)
CASES = [s for s in linear.SAMPLES if s.name in ("gated_residual", "runs_into_zeros", "one_token")] + [
    s for s in ffn.SAMPLES if s.name in ("short_last_tile", "slabs")
]


def against_reference(sample, dtype=torch.float32, limit=2e-5):
    named = sample.tensors(dtype)
    leaves = [{n: t.detach().to(d).requires_grad_() for n, t in named.items()} for d in (dtype, torch.float64)]
    got, want = sample.call(leaves[0], impl="triton"), sample.call(leaves[1], impl="reference")
    g = torch.randn_like(got)
    grads = [torch.autograd.grad(o, list(t.values()), g.to(o.dtype)) for o, t in zip((got, want), leaves)]
    for name, a, b in zip(("out", *named), (got, *grads[0]), (want, *grads[1])):
        assert (a.double() - b).abs().max() <= limit * b.abs().max().clamp_min(1), f"{sample.name} {name}"


@pytest.mark.parametrize("sample", CASES, ids=lambda s: s.name)
def test_every_part(sample):
    with configs.forced(SMALL):
        against_reference(sample)


@pytest.mark.parametrize("wanted", ["x", "weight", "gate", "scale", "residual"])
def test_one_gradient_alone(wanted):
    """What the others leave behind is not relied on: with a frozen weight nothing gathers x in the backward, but the norm needs its rms."""
    sample = linear.Sample("alone", (2, 5), 24, 16, width=40, act="silu", gate=2, residual=True, norm=True, modulate=2)
    named = sample.tensors()
    grads = []
    for impl in ("triton", "reference"):
        leaf = named[wanted].clone().requires_grad_()
        with configs.forced(SMALL):
            out = sample.call(named | {wanted: leaf}, impl=impl)
        grads += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("itemsize, pairs", sorted(configs._TABLE))
def test_every_shipped_tile(itemsize, pairs):
    """At its own block sizes, on a layer with ragged edges."""
    dtype = {2: torch.float16, 4: torch.float32}[itemsize]
    sample = linear.Sample("tiles", (1, 70), 72, 134, act="swiglu" if pairs else "gelu_tanh")
    for config in {c for row in configs._TABLE[itemsize, pairs].values() for c in row}:
        with configs.forced(config):
            against_reference(sample, dtype, 2e-5 if itemsize == 4 else 4e-3)


def test_runs_of_eight_are_gathered_by_the_product(monkeypatch):
    """Known runs skip the compact copy; anything else takes it; the result is the same."""
    copies = []
    gather = kit.gather
    monkeypatch.setattr(kit, "gather", lambda *a: (copies.append(1), gather(*a))[1])
    x, w = torch.randn(1, 33, 64), torch.randn(24, 16)
    runs = torch.tensor([*range(8, 16), *range(40, 48)], dtype=torch.int32)
    single = torch.tensor(sorted(torch.randperm(64)[:16].tolist()), dtype=torch.int32)
    with configs.forced(SMALL):
        for channels, expected in ((runs, 0), (single, 1)):
            copies.clear()
            got = vidkern.pruned_linear(x, w, in_index=channels, impl="triton")
            torch.testing.assert_close(got, x[..., channels.long()] @ w.t(), rtol=1e-5, atol=1e-5)
            assert len(copies) == expected and index.in_runs(channels) is (expected == 0)


def test_the_choice_fills_the_last_wave():
    """1344 x 2048 on 132 processors: 176 tiles of 128 x 128 are 1.3 waves, so smaller tiles win; 6144 columns are 4 whole waves."""
    narrow = configs.choose(2, False, "hopper", 1344, 2048, 132)
    wide = configs.choose(2, False, "hopper", 1344, 6144, 132)
    assert (narrow.block_m, wide.block_m, wide.block_n) == (64, 128, 128)


def test_every_family_has_a_tile_that_fits():
    """Operands of all stages within the shared memory of a block."""
    for (itemsize, pairs), row in configs._TABLE.items():
        for family, memory in configs._SHARED.items():
            for c in row.get(family, row["any"]):
                assert (c.block_m + (2 if pairs else 1) * c.block_n) * c.block_k * itemsize * c.stages <= memory
