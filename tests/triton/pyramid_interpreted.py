"""Run by test_interpreter.py in the interpreter's process: the pyramid kernels against the reference, to the last bits."""

import pytest
import torch
import triton
import triton.language as tl

import vidkern
from vidkern.ops.pyramid import filters, levels, philox
from vidkern.ops.pyramid import triton as launchers
from vidkern.ops.pyramid.cost import PYRAMIDS
from vidkern.ops.pyramid.triton_noise import normal, normals4, unsigned, words
from vidkern.ops.pyramid_flow_inputs.cost import SAMPLES


def ulps(got, want):
    """Worst error in units in the last place of max(|value|, 1)."""
    unit = torch.exp2(torch.floor(torch.log2(want.double().abs().clamp_min(1))) - 23)
    return ((got.double() - want.double()).abs() / unit).max().item()


@triton.jit
def noise_kernel(WORDS, ONE, FOUR, level, sample, offset, key0, key1, first, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    key = unsigned(key0)
    high = unsigned(key1)
    w0, w1, w2, w3 = words(first // 4 + at, unsigned(level), unsigned(sample), unsigned(offset), key, high)
    tl.store(WORDS + 4 * at, w0.to(tl.int32, bitcast=True))
    tl.store(WORDS + 4 * at + 1, w1.to(tl.int32, bitcast=True))
    tl.store(WORDS + 4 * at + 2, w2.to(tl.int32, bitcast=True))
    tl.store(WORDS + 4 * at + 3, w3.to(tl.int32, bitcast=True))
    element = tl.arange(0, 4 * BLOCK)
    tl.store(ONE + element, normal(first + element, unsigned(level), unsigned(sample), unsigned(offset), key, high))
    tl.store(FOUR + element, normals4(first + 4 * at, unsigned(level), unsigned(sample), unsigned(offset), key, high))


@pytest.mark.parametrize("seed, offset, sample, first", [(0, 0, 0, 0), (0x7BADC0DEDEADBEEF, 0xFFFFFFFF, 0x9ABCDEF0, 1 << 20)])
def test_words_are_those_of_the_generator(seed, offset, sample, first):
    """The integers exactly; normals within 4 ulp of the exact ones, however they are made."""
    n, level = 4096, 3
    made, one, four = torch.zeros(n, dtype=torch.int32), torch.zeros(n), torch.zeros(n)
    args = (launchers._signed(v) for v in (level, sample, offset, seed, seed >> 32))
    noise_kernel[(1,)](made, one, four, *args, first, BLOCK=n // 4)
    want = philox.words(first + n, seed=seed, level=level, sample=sample, offset=offset)[first:]
    assert torch.equal(made.long() & 0xFFFFFFFF, want)
    exact = philox.box_muller(want.view(-1, 2)).flatten()
    assert torch.equal(one, four)
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 23)
    assert ((one.double() - exact).abs() / unit).max() <= 4


CHOSEN = (
    "video", "spacetime_noise_masked_std", "haar_spacetime", "odd", "video_active1_zero", "odd_given_noise_given_levels", "image_tokens",
)  # fmt: skip


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name in CHOSEN], ids=lambda s: s.name)
def test_within_four_ulp(sample, monkeypatch):
    """z and v against the reference with the same seed; programs so short that there are several."""
    monkeypatch.setattr(launchers, "POSITIONS", 256)
    x = sample.tensors()
    with torch.no_grad():
        got, want = sample.call(*x, impl="triton"), sample.call(*x, impl="reference")
    flat = lambda r: torch.cat([p.flatten() for p in (r if isinstance(r, list) else [r])])
    for a, b in zip(got, want):
        assert ulps(flat(a), flat(b)) <= 4


@pytest.mark.parametrize("p", [p for p in PYRAMIDS if p.name in ("image", "odd", "haar")], ids=lambda p: p.name)
def test_two_spatial_levels_have_the_same_bits(p):
    """No product of these filters rounds, so that the order of additions is all there is: that of the reference."""
    (x,) = p.draw([p.shape], torch.float32, "cpu", 0)
    run = lambda impl: vidkern.pyramid_decompose(x, levels=2, kind=p.kind, impl=impl)
    parts = run("reference")
    assert all(torch.equal(a, b) for a, b in zip(run("triton"), parts))
    merge = lambda impl: vidkern.pyramid_merge(parts, kind=p.kind, impl=impl)
    assert torch.equal(merge("triton"), merge("reference"))


@pytest.mark.parametrize("kind", levels.KINDS)
@pytest.mark.parametrize("pool_time", [False, True])
def test_filters(kind, pool_time):
    """The launch-per-level form, every filter against the reference's, into strided memory."""
    n = 4 if kind == "dct" else 3
    coarse, fine = torch.randn(2, 2, n if pool_time else 3, n, n), torch.randn(2, 2, 2 * n if pool_time else 3, 2 * n, 2 * n)
    for which, source, like in (("down", fine, coarse), ("up", coarse, fine), ("down_t", coarse, fine), ("up_t", fine, coarse)):
        name = which.replace("_t", "_adjoint")
        want = getattr(filters, name)(source.double(), kind, pool_time)
        out = torch.full((*like.shape[:-1], like.shape[-1] + 5), torch.nan)[..., 2:-3]
        launchers._filter(which, kind, pool_time, source, out, like, launchers._SUBTRACT)
        assert (out - (like.double() - want)).abs().max() < 1e-5


def test_a_step_in_place_and_what_is_not_active():
    z, c, u = ([torch.randn(2, 3, 4 << s, 4 << s) for s in range(2)] for _ in range(3))
    flat = torch.cat([p.flatten() for p in z])
    sizes = levels.free_sizes([p.unsqueeze(2) for p in z])
    views = levels.handed_out(flat, levels.places(sizes, 4))
    want, _ = vidkern.pyramid_flow_step(z, c, u, dt=0.1, guidance=2.0, impl="triton")
    got, given = vidkern.pyramid_flow_step(views, c, u, dt=0.1, guidance=2.0, out=(flat, torch.empty_like(flat)), impl="triton")
    assert got[0].data_ptr() == flat.data_ptr() and all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(given, want))
    nan = torch.full_like(z[1], torch.nan)
    moved, given = vidkern.pyramid_flow_step([z[0], nan], [c[0], nan], dt=0.1, active=1, impl="triton")
    assert torch.isfinite(moved[0]).all() and len(given) == 1


def test_masked_levels_are_never_read():
    table, mask = torch.rand(2, 2, 4), torch.tensor([[True, False], [True, True]])
    table = table.masked_fill(~mask[..., None], torch.nan)
    parts = [torch.randn(2, 1, 4 << s, 4 << s) for s in range(2)]
    parts[1][0] = torch.nan
    z, v = vidkern.pyramid_flow_inputs(parts, table, active=mask, seed=1, impl="triton")
    assert not z[1][0].any() and not v[1][0].any() and torch.isfinite(z[1][1]).all()
    pred = [p.clone().requires_grad_() for p in parts]
    loss = vidkern.pyramid_flow_loss(pred, [torch.zeros_like(p) for p in parts], active=mask, impl="triton")
    grads = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss) and not grads[1][0].any() and grads[1][1].all()


def test_the_loss_adds_in_a_fixed_order():
    """Long enough for several runs; twice the same bits, and those of float64 rounded once."""
    pred = [torch.randn(2, 5, 64 << s, 64 << s) for s in range(2)]
    target = [torch.randn_like(p) for p in pred]
    run = lambda: vidkern.pyramid_flow_loss(pred, target, return_levels=True, impl="triton")
    (loss, means), (again, _) = run(), run()
    want = torch.stack([(p.double() - t.double()).square().flatten(1).mean(1) for p, t in zip(pred, target)], 1)
    assert torch.equal(loss, again) and ulps(means, want) <= 4 and ulps(loss, want.sum() / 2) <= 4
