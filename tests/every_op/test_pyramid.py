"""Pyramids and their flows: what the method promises, checked in closed form, and every documented error."""

import math

import pytest
import torch
import torch.nn.functional as F

import vidkern
from vidkern import compiled
from vidkern.ops.pyramid import filters, levels, philox
from vidkern.ops.pyramid_flow_inputs import cost as inputs_cost
from vidkern.ops.pyramid_flow_step import cost as step_cost

from .conftest import EXPECTED

IMPLS = list(EXPECTED.get("pyramid_decompose", {}))
KINDS = [(k, f) for k in levels.KINDS for f in levels.FACTORS]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def coefficients(batch, number, direction="data"):
    return vidkern.flow_coefficients(torch.rand(batch, number), direction=direction)


# ---- decomposition ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, factor", KINDS)
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_reconstruction_is_exact(kind, factor, number):
    """Float64 to 1e-12 and float32 to 1e-5, at sizes that divide only just; a constant has no detail."""
    n = levels.divisor(number, kind)
    shape = (2, 2, n if factor[0] == 2 else 3, n * 3, n)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = torch.randn(shape, dtype=dtype)
        parts = vidkern.pyramid_decompose(x, levels=number, kind=kind, factor=factor)
        assert [p.shape[3] for p in parts] == [n * 3 >> (number - 1 - s) for s in range(number)]
        assert (vidkern.pyramid_merge(parts, kind=kind, factor=factor) - x).abs().max() < limit
    flat = vidkern.pyramid_decompose(torch.full(shape, 1.5), levels=number, kind=kind, factor=factor)
    assert (flat[0] - 1.5).abs().max() < 1e-6 and all(p.abs().max() < 1e-5 for p in flat[1:])


def test_filters_have_the_printed_coefficients(impl):
    """Impulse responses of up, and of down after up, along one axis: neither nearest, nor align-corners, nor antialiased."""
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 4] = 1
    zero = torch.zeros(1, 1, 16, 16)
    up = vidkern.pyramid_merge([impulse, zero], impl=impl)
    assert up[0, 0, 0].tolist() == [0] * 7 + [0.25, 0.75, 0.75, 0.25] + [0] * 5
    assert vidkern.pyramid_decompose(up, impl=impl)[0][0, 0, 0].tolist() == [0, 0, 0, 0.125, 0.75, 0.125, 0, 0]
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 0] = 1
    assert vidkern.pyramid_merge([edge, zero], impl=impl)[0, 0, 0, :4].tolist() == [1, 0.75, 0.25, 0]
    delta = torch.zeros(1, 1, 16, 16)
    delta[..., 4] = 1
    assert vidkern.pyramid_decompose(delta, levels=3, impl=impl)[0][0, 0, 0].tolist() == [0, 0.25, 0, 0]


def test_filters_are_those_of_torch(impl):
    x = torch.randn(2, 3, 12, 20)
    coarse, fine = vidkern.pyramid_decompose(x, impl=impl)
    torch.testing.assert_close(coarse, F.avg_pool2d(x, 2))
    torch.testing.assert_close(fine, x - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=False)
    torch.testing.assert_close(coarse, half)


def test_dct_keeps_the_low_coefficients(impl):
    """A block with only low coefficients has no fine level, one with only high coefficients no coarse one."""
    def basis(n, k):
        return torch.cos(math.pi * (torch.arange(n) + 0.5) * k / n)

    for row, column in ((0, 0), (3, 1), (4, 0), (2, 5), (7, 7)):
        x = (basis(8, row)[:, None] * basis(8, column)).expand(1, 1, 8, 8)
        coarse, fine = vidkern.pyramid_decompose(x, kind="dct", impl=impl)
        gone = fine if max(row, column) < 4 else coarse
        assert gone.abs().max() < 1e-6 < (coarse.abs().max() + fine.abs().max())


def test_factor_four_is_two_levels_merged(impl):
    x = torch.randn(1, 2, 16, 24)
    coarse, middle, fine = vidkern.pyramid_decompose(x, levels=3, impl=impl)
    detail = vidkern.pyramid_merge([middle, fine], impl=impl)
    up4 = filters.up(filters.up(coarse.unsqueeze(2), "laplacian", False), "laplacian", False).squeeze(2)
    torch.testing.assert_close(detail, x - up4)
    torch.testing.assert_close(coarse, F.avg_pool2d(x, 4))


@pytest.mark.parametrize("kind, factor", KINDS)
def test_adjoints(kind, factor, impl):
    """<A x, g> = <x, A' g> for decomposing and merging."""
    dtype, limit = (torch.float64, 1e-10) if impl == "reference" else (torch.float32, 2e-5)
    x = torch.randn(1, 2, 16, 16, 48, dtype=dtype, requires_grad=True)
    options = dict(kind=kind, factor=factor, impl=impl)
    parts = vidkern.pyramid_decompose(x, levels=2, **options)
    grads = [torch.randn_like(p) for p in parts]
    (back,) = torch.autograd.grad(parts, x, grads)
    left, right = sum((p * g).double().sum() for p, g in zip(parts, grads)), (x * back).double().sum()
    assert abs(left - right) < limit * x.numel() ** 0.5 * 10
    leaves = [p.detach().requires_grad_() for p in parts]
    merged, g = vidkern.pyramid_merge(leaves, **options), torch.randn_like(x)
    backs = torch.autograd.grad(merged, leaves, g)
    left, right = (merged * g).double().sum(), sum((p * b).double().sum() for p, b in zip(leaves, backs))
    assert abs(left - right) < limit * x.numel() ** 0.5 * 10


@pytest.mark.parametrize("kind, factor", [k for k in KINDS if k[0] != "dct"])
def test_backends_give_the_same_bits(kind, factor):
    """Laplacian and Haar arithmetic has no product whose rounding a fused multiply-add could change."""
    x = torch.randn(2, 2, 4, 12, 40)
    tiers = compiled.cpu().isas()
    before = compiled.cpu().isa()
    want = vidkern.pyramid_decompose(x, kind=kind, factor=factor, impl="reference")
    for name in tiers:
        compiled.cpu().set_isa(name)
        got = vidkern.pyramid_decompose(x, kind=kind, factor=factor, impl="cpu")
        merged = vidkern.pyramid_merge(want, kind=kind, factor=factor, impl="cpu")
        compiled.cpu().set_isa(before)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert torch.equal(merged, vidkern.pyramid_merge(want, kind=kind, factor=factor, impl="reference"))


def test_padding_and_cropping():
    x = torch.randn(1, 2, 5, 7)
    padded = vidkern.pyramid_pad(x, levels=3)
    assert padded.shape == (1, 2, 8, 8) and torch.equal(padded[..., 5:, :7], x[..., 4:, :].expand(-1, -1, 3, -1))
    merged = vidkern.pyramid_merge(vidkern.pyramid_decompose(padded, levels=3))
    torch.testing.assert_close(vidkern.pyramid_crop(merged, x.shape[2:]), x)
    assert vidkern.pyramid_pad(padded, levels=3) is padded
    assert vidkern.pyramid_pad(torch.zeros(1, 1, 3, 4, 4), factor=(2, 2, 2)).shape == (1, 1, 4, 4, 4)


# ---- flow inputs ------------------------------------------------------------------------------------------------------------
def within(a, b, largest, limit=4):
    """Every element within ``limit`` units in the last place of the largest term that entered it."""
    unit = torch.exp2(torch.floor(torch.log2(largest.double().clamp_min(1e-30))) - 23)
    return ((a.double() - b.double()).abs() / unit).max() <= limit


@pytest.mark.parametrize("sample", [s for s in inputs_cost.SAMPLES if s.pyramid.kind != "dct"], ids=lambda s: s.name)
def test_backends_agree_within_four_ulp(sample):
    """z and v of every tier against the reference, same seed; the terms are sigma eps and alpha X."""
    x = sample.tensors()
    want = sample.call(*x, impl="reference")
    before = compiled.cpu().isa()
    for name in compiled.cpu().isas():
        compiled.cpu().set_isa(name)
        got = sample.call(*x, impl="cpu")
        compiled.cpu().set_isa(before)
        flat = lambda r: torch.cat([p.flatten() for p in (r if isinstance(r, list) else [r])])
        for a, b in zip(got, want):
            a, b = flat(a), flat(b)
            # The two terms are of order one; where both are small, so is the noise's own unit.
            assert within(a, b, b.abs().clamp_min(1.0))


def test_tiles_threads_and_batches_do_not_change_a_bit():
    """Any tile, any number of threads, and a batch cut in two (first_sample) make the same noise and the same values."""
    cpu = pytest.importorskip("vidkern.ops.pyramid.cpu")
    x, table = torch.randn(3, 2, 4, 24, 44), coefficients(3, 3)
    for kind, pool_time in (("laplacian", False), ("laplacian", True), ("haar", True)):
        factor = (2, 2, 2) if pool_time else (1, 2, 2)
        options = dict(levels=3, seed=9, offset=2, kind=kind, factor=factor, impl="cpu")
        z, v = vidkern.pyramid_flow_inputs(x, table, **options)
        sizes = levels.sizes_of(x, 3, kind, pool_time)
        for tile in ((1, 1), (1, 2), (1, 5)):
            outs = [torch.full((levels.numel(sizes),), math.nan) for _ in range(2)]
            cpu.launch(
                "pyramid_analysis", sizes, kind=kind, pool_time=pool_time, volume=x, outs=[levels.split(o, sizes) for o in outs],
                table=table, philox=1, seed=9, offset=2, tile=tile,
            ).run()  # fmt: skip
            for whole, cut in zip((z, v), outs):
                assert all(torch.equal(a, b) for a, b in zip(whole, levels.split(cut, sizes)))
            merged = torch.full_like(x, math.nan)
            cpu.launch("pyramid_synthesis", sizes, kind=kind, pool_time=pool_time, volume=merged, ins=[z], tile=tile).run()
            assert torch.equal(merged, vidkern.pyramid_merge(z, kind=kind, factor=factor, impl="cpu"))
        part, _ = vidkern.pyramid_flow_inputs(x[1:], table[1:], first_sample=1, **options)
        assert all(torch.equal(a[1:], b) for a, b in zip(z, part))
    tokens = vidkern.pyramid_flow_inputs(x, table, layout="tokens", **(options | {"kind": "laplacian", "factor": (1, 2, 2)}))[0]
    z, _ = vidkern.pyramid_flow_inputs(x, table, **(options | {"kind": "laplacian", "factor": (1, 2, 2)}))
    assert torch.equal(tokens, levels.to_tokens(z, (1, 1, 1), False))


def test_noise_of_levels_is_independent(impl):
    """z of pure noise: unit variance at every level, no correlation with the downsampled finer one."""
    table = vidkern.flow_coefficients(torch.zeros(2, 2), direction="data")
    coarse, fine = vidkern.pyramid_flow_inputs(torch.randn(2, 8, 64, 64), table, seed=1, impl=impl)[0]
    n = coarse.numel()
    assert abs(coarse.square().mean() - 1) < 5 * (2 / n) ** 0.5
    small = F.avg_pool2d(fine, 2) * 2
    assert abs((coarse * small).mean()) < 5 / n**0.5


def test_one_level_is_plain_flow_matching(impl):
    x, t = torch.randn(2, 3, 8, 12), torch.rand(2, 1)
    (z,), (v,) = vidkern.pyramid_flow_inputs(x, vidkern.flow_coefficients(t, direction="data"), levels=1, seed=4, impl=impl)
    (eps,), _ = vidkern.pyramid_flow_inputs(x, vidkern.flow_coefficients(0 * t, direction="data"), levels=1, seed=4, impl=impl)
    assert torch.equal(v, x - eps)
    t = t.view(2, 1, 1, 1)
    # The compiled kernels keep the product's low bits, in the reference nothing differs.
    torch.testing.assert_close(z, t * x + (1 - t) * eps, atol=0 if impl == "reference" else 3e-7, rtol=0)


def test_directions_of_time(impl):
    """Noise time u = 1 - t: the same state, the opposite velocity."""
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2, 2)
    a = vidkern.pyramid_flow_inputs(x, vidkern.flow_coefficients(t, direction="data"), seed=4, impl=impl)
    b = vidkern.pyramid_flow_inputs(x, vidkern.flow_coefficients(1 - t, direction="noise"), seed=4, impl=impl)
    for s in range(2):
        torch.testing.assert_close(a[0][s], b[0][s], atol=1e-6, rtol=0)
        assert torch.equal(a[1][s], -b[1][s])


def test_masked_levels_are_exact_zeros_whatever_they_hold(impl):
    table, mask = coefficients(2, 3), torch.tensor([[True, False, True], [True, True, False]])
    parts = [torch.randn(2, 1, 4 << s, 4 << s) for s in range(3)]
    clean = vidkern.pyramid_flow_inputs(parts, table, active=mask, seed=1, impl=impl)
    table = table.masked_fill(~mask[..., None], math.nan)
    spoiled = [p.masked_fill(~mask[:, s].view(2, 1, 1, 1), math.nan) for s, p in enumerate(parts)]
    dirty = vidkern.pyramid_flow_inputs(spoiled, table, active=mask, seed=1, impl=impl)
    for a, b in zip(clean, dirty):
        for s in range(3):
            assert torch.equal(a[s], b[s]) and b[s][~mask[:, s]].abs().sum() == 0
    x = torch.randn(2, 1, 16, 16)
    (only,), _ = vidkern.pyramid_flow_inputs(x, table.nan_to_num(), levels=3, active=1, seed=1, impl=impl)
    kept, _ = vidkern.pyramid_flow_inputs(x, table.nan_to_num(), levels=3, active=1, seed=1, inactive="zero", impl=impl)
    assert torch.equal(only, kept[0]) and len(kept) == 3 and not kept[1].any() and not kept[2].any()


def test_strides_of_tables_masks_and_gradients_do_not_matter(impl):
    """Transposed, expanded and sliced ones: the same bits; copies that a launcher makes live as long as they are read."""
    x, table = torch.randn(2, 3, 8, 16, requires_grad=True), coefficients(2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    scattered = table.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for options in ({}, {"layout": "tokens", "patch": (1, 2, 2)}):
        results = []
        for t, m in ((table, mask), (scattered, mask.T.contiguous().T)):
            z, v = vidkern.pyramid_flow_inputs(x, t, active=m, seed=2, impl=impl, **options)
            z = z if options else torch.cat([p.flatten(1) for p in z], 1)
            results += [z.detach(), torch.autograd.grad(z.sum(), x)[0]]
            if options:
                for g in (torch.ones(()).expand_as(z), torch.ones_like(z).transpose(1, 2).contiguous().transpose(1, 2)):
                    z, _ = vidkern.pyramid_flow_inputs(x, t, active=m, seed=2, impl=impl, **options)
                    assert torch.equal(torch.autograd.grad(z, x, g)[0], results[1])
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_token_product_is_the_sum_of_the_embeddings(impl):
    x, table = torch.randn(2, 4, 16, 24), coefficients(2, 2)
    (a, b), _ = vidkern.pyramid_flow_inputs(x, table, seed=1, impl=impl)
    first, second = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 4, 4)
    want = (F.conv2d(a, first, stride=2) + F.conv2d(b, second, stride=4)).flatten(2).transpose(1, 2)
    tokens = vidkern.pyramid_flow_inputs(x, table, seed=1, layout="tokens", patch=(1, 2, 2), target=False, impl=impl)
    torch.testing.assert_close(tokens @ torch.cat((first.flatten(1), second.flatten(1)), 1).T, want, atol=1e-4, rtol=1e-5)


# ---- loss -------------------------------------------------------------------------------------------------------------------
def test_loss_sums_the_means_of_the_levels(impl):
    pred = [torch.randn(2, 3, 4 << s, 4 << s, requires_grad=True) for s in range(2)]
    target = [torch.randn_like(p) for p in pred]
    loss, means = vidkern.pyramid_flow_loss(pred, target, return_levels=True, impl=impl)
    torch.testing.assert_close(loss, sum(F.mse_loss(p, t) for p, t in zip(pred, target)))
    assert means.shape == (2, 2)
    mixed = vidkern.pyramid_flow_loss([p.bfloat16() for p in pred], target, impl=impl)
    assert mixed.dtype is torch.float32 and abs(mixed - loss) < 0.05


def test_loss_never_reads_what_is_masked(impl):
    pred = [torch.randn(2, 3, 4 << s, 4 << s) for s in range(2)]
    target = [torch.randn_like(p) for p in pred]
    mask = torch.tensor([[True, True], [True, False]])
    clean = vidkern.pyramid_flow_loss(pred, target, active=mask, return_levels=True, impl=impl)
    pred[1][1] = math.nan
    target[1][1] = math.inf
    leaves = [p.requires_grad_() for p in pred]
    dirty = vidkern.pyramid_flow_loss(leaves, target, active=mask, return_levels=True, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty)) and dirty[1][1, 1] == 0
    grads = torch.autograd.grad(dirty[0], leaves)
    assert not grads[1][1].any() and grads[1][0].all() and torch.isfinite(grads[0]).all()
    one = vidkern.pyramid_flow_loss(leaves, target, active=1, impl=impl)
    grads = torch.autograd.grad(one, leaves)
    assert torch.isfinite(one) and not grads[1].any()


def test_loss_is_the_same_for_any_threads():
    pred = [torch.randn(3, 5, 64 << s, 64 << s) for s in range(2)]
    target = [torch.randn_like(p) for p in pred]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(vidkern.pyramid_flow_loss(pred, target, return_levels=True, impl="cpu"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- step -------------------------------------------------------------------------------------------------------------------
def state(number=2, batch=2):
    return [torch.randn(batch, 3, 4 << s, 4 << s) for s in range(number)]


def test_guidance_ends(impl):
    z, c, u = state(), state(), state()
    step = lambda *a, **k: vidkern.pyramid_flow_step(*a, dt=[0.1, 0.2], impl=impl, **k)[0]
    nan = [torch.full_like(p, math.nan) for p in z]
    for a, b in zip(step(z, c, u, guidance=1.0), step(z, c)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for a, b in zip(step(z, c, u, guidance=0.0), step(z, u)):
        assert torch.equal(a, b)
    # What is not active is not read: neither velocities nor, as an output, its state.
    moved, given = vidkern.pyramid_flow_step([z[0], nan[1]], [c[0], nan[1]], [u[0], nan[1]], dt=0.1, guidance=2.0, active=1, impl=impl)
    assert torch.isfinite(moved[0]).all() and moved[1] is not None and len(given) == 1


def test_merged_last_step_is_the_step_then_the_merge(impl):
    z, c, u = state(3), state(3), state(3)
    options = dict(dt=[0.1, 0.2, 0.3], guidance=1.5, impl=impl)
    moved, _ = vidkern.pyramid_flow_step(z, c, u, **options)
    for std in (None, [0.5, 2.0, 3.0]):
        merged = vidkern.pyramid_flow_step(z, c, u, merge=True, std=std, **options)
        torch.testing.assert_close(merged, vidkern.pyramid_merge(moved, std=std, impl=impl), atol=2e-6, rtol=0)


def test_next_input_takes_in_the_level_that_joins(impl):
    z, c = state(), state()
    moved, given = vidkern.pyramid_flow_step(z, c[:1], dt=0.1, active=1, next_active=2, dtype=torch.bfloat16, impl=impl)
    assert torch.equal(given[0], moved[0].bfloat16()) and torch.equal(given[1], z[1].bfloat16()) and moved[1] is z[1]
    _, none = vidkern.pyramid_flow_step(z, c, dt=0.1, next_active=0, impl=impl)
    assert none is None


def test_step_in_place():
    z, c, u = state(), state(), state()
    flat = torch.cat([p.flatten() for p in z])
    sizes = levels.free_sizes([p.unsqueeze(2) for p in z])
    views = levels.handed_out(flat, levels.places(sizes, 4))
    want, _ = vidkern.pyramid_flow_step(z, c, u, dt=0.1, guidance=2.0, impl="cpu")
    got, given = vidkern.pyramid_flow_step(views, c, u, dt=0.1, guidance=2.0, out=(flat, torch.empty_like(flat)), impl="cpu")
    assert got[0].data_ptr() == flat.data_ptr() and all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(given, want))


@pytest.mark.parametrize("op", ["pyramid_flow_loss", "pyramid_flow_step"])
def test_gradcheck(op):
    if op == "pyramid_flow_loss":
        pred = [torch.randn(2, 1, 2 << s, 2 << s, dtype=torch.float64, requires_grad=True) for s in range(2)]
        target = [torch.randn_like(p).detach() for p in pred]
        mask = torch.tensor([[True, True], [True, False]])
        assert torch.autograd.gradcheck(lambda *p: vidkern.pyramid_flow_loss(list(p), target, active=mask, return_levels=True), pred)
        return
    sample = next(s for s in step_cost.SAMPLES if s.merge and s.pyramid.name == "image" and s.guided)
    small = [t.double()[:, :1].requires_grad_() for t in sample.tensors()]
    call = lambda *t: vidkern.pyramid_flow_step(list(t[:2]), list(t[2:4]), list(t[4:]), dt=[0.1, 0.2], guidance=1.5, merge=True)
    assert torch.autograd.gradcheck(call, small, fast_mode=True)


def test_no_device_tensor_is_read():
    """Tables on a device without data: shapes are all that the host looks at."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, t = torch.empty(2, 3, 8, 8), torch.empty(2, 2)
        z, v = vidkern.pyramid_flow_inputs(x, vidkern.flow_coefficients(t, direction="data"))
        moved, given = vidkern.pyramid_flow_step(z, v, v, dt=t, guidance=t, layout="tokens")
        loss = vidkern.pyramid_flow_loss(v, z, active=torch.empty(2, 2, dtype=torch.bool))
    assert given.shape == (2, 16, 3 * 5) and loss.shape == ()


# ---- Pyramidal Flow ---------------------------------------------------------------------------------------------------------
def test_stage_sigmas():
    stages = vidkern.pyramid_stages(3)
    found = [(round(s.start, 5), round(s.end, 3)) for s in stages]
    assert found == [(1.0, 0.667), (0.80024, 0.334), (0.50075, 0.0)]
    for before, stage in zip(stages, stages[1:]):
        s = 1 - before.end
        assert stage.scale == pytest.approx(1 / (2 - s)) and stage.spread == pytest.approx(stage.scale * (1 - s) * 3**0.5)
        assert stage.start == pytest.approx(1 - s / (2 - s)) == pytest.approx(2 * stage.scale * (1 - s))


def test_transition_makes_white_noise_of_the_new_level(impl):
    """Block covariance of the corrective noise, and of the whole: white, of the starting sigma."""
    stage, before = vidkern.pyramid_stages(3)[1], vidkern.pyramid_stages(3)[0]
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 32, 64, 64, generator=g)
    blocks = lambda t: t.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4).double()
    noise = blocks(vidkern.pyramid_stage_transition(0 * z, 0.0, 1.0, seed=3, impl=impl))
    error = 5 / noise.shape[0] ** 0.5
    cov = noise.T @ noise / noise.shape[0]
    assert (cov - (torch.eye(4) * 4 / 3 - 1 / 3)).abs().max() < error * 2 and noise.sum(1).abs().max() < 1e-5
    out = blocks(vidkern.pyramid_stage_transition(before.end * z, stage.scale, stage.spread, seed=3, impl=impl))
    cov = out.T @ out / out.shape[0]
    assert (cov - torch.eye(4) * stage.start**2).abs().max() < error * 2 * stage.start**2


def test_coarse_noise_is_made_from_fine_noise_and_keeps_its_variance(impl):
    """Stage 0 of zero data is pure noise: twice the block means of the finest."""
    x, table = torch.zeros(1, 8, 64, 64), torch.tensor([[1.0, 0.0, 1.0]])
    z, v = vidkern.pyramid_stage_inputs(x, table, stages=3, stage=0, seed=8, impl=impl)
    eps = philox.normal((1, 8, 1, 64, 64), seed=8, level=2, offset=0, first_sample=0, dtype=torch.float32, device="cpu")[:, :, 0]
    torch.testing.assert_close(z, 4 * F.avg_pool2d(eps, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(z, v)
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5


def test_last_stage_ends_at_the_data(impl):
    x = torch.randn(2, 3, 16, 16)
    ends = vidkern.pyramid_stages(2)[1]
    z, _ = vidkern.pyramid_stage_inputs(x, torch.tensor([[ends.start, ends.end, 0.0]]).expand(2, 3), stages=2, stage=1, impl=impl)
    assert torch.equal(z, x)


# ---- errors -----------------------------------------------------------------------------------------------------------------
X = torch.randn(2, 3, 8, 8)
TABLE = torch.rand(2, 2, 4)
Z = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
V = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
inputs = lambda **k: lambda: vidkern.pyramid_flow_inputs(k.pop("x", X), k.pop("table", TABLE), **k)
step = lambda **k: lambda: vidkern.pyramid_flow_step(k.pop("z", Z), k.pop("c", V), k.pop("u", None), **({"dt": 0.1} | k))
decompose = lambda x=X, **k: lambda: vidkern.pyramid_decompose(x, **k)
BAD = {
    "no tensor": (decompose([1.0]), TypeError, "x: list, expected a torch.Tensor"),
    "rank": (decompose(torch.randn(3, 8, 8)), ValueError, r"x: shape \(3, 8, 8\), expected \[B, C, H, W\] or"),
    "integers": (decompose(torch.ones(1, 1, 8, 8).int()), ValueError, "x: dtype torch.int32, expected a floating-point"),
    "empty": (decompose(torch.ones(1, 0, 8, 8)), ValueError, "expected no empty dimension"),
    "sparse": (decompose(torch.zeros(1, 1, 8, 8).to_sparse()), ValueError, "x: layout torch.sparse_coo, expected a dense"),
    "width": (decompose(torch.randn(1, 1, 8, 10), levels=3), ValueError, r"x: W = 10, expected a multiple of 4 for 3 laplacian levels"),
    "height": (decompose(torch.randn(1, 1, 7, 8)), ValueError, r"x: H = 7, expected a multiple of 2"),
    "odd time": (decompose(torch.randn(1, 1, 3, 8, 8), factor=(2, 2, 2)), ValueError, "x: T = 3, expected a multiple of 2"),
    "dct block": (decompose(torch.randn(1, 1, 8, 12), kind="dct"), ValueError, "x: W = 12, expected a multiple of 8 for 2 dct"),
    "levels 0": (decompose(levels=0), ValueError, "levels: 0, expected a number of levels from 1 to 4"),
    "levels 5": (decompose(levels=5), ValueError, "levels: 5, expected a number of levels from 1 to 4"),
    "levels text": (decompose(levels="2"), ValueError, "levels: '2', expected a number"),
    "kind": (decompose(kind="gauss"), ValueError, "kind: 'gauss', expected one of 'laplacian'"),
    "factor": (decompose(factor=(1, 4, 4)), ValueError, r"factor: \(1, 4, 4\), expected \(1, 2, 2\) or"),
    "std": (decompose(std=(1.0, 0.0)), ValueError, r"std: \(1.0, 0.0\), expected 2 positive numbers"),
    "out": (decompose(out=torch.zeros(3)), ValueError, r"out: shape \(3,\), expected a 1-D tensor of 480 values"),
    "impl": (decompose(impl="gpu"), ValueError, "impl: 'gpu' is no backend of pyramid_decompose"),
    "merge none": (lambda: vidkern.pyramid_merge([]), TypeError, "parts: list, expected a non-empty list"),
    "merge sizes": (lambda: vidkern.pyramid_merge([Z[0], Z[0]]), ValueError, r"parts\[0\]: .* expected the size that the finest level"),
    "merge dtype": (lambda: vidkern.pyramid_merge([Z[0].half(), Z[1]]), ValueError, r"parts\[1\]: dtype torch.float32, expected"),
    "merge channels": (lambda: vidkern.pyramid_merge([Z[0][:, :2], Z[1]]), ValueError, r"parts\[1\]: channels 3, expected"),
    "merge many": (lambda: vidkern.pyramid_merge([Z[0]] * 5), ValueError, "parts: 5 levels, expected 1 to 4"),
    "table type": (inputs(table=[1.0]), TypeError, "coefficients: list, expected a torch.Tensor"),
    "table dtype": (inputs(table=TABLE.double()), ValueError, "coefficients: dtype torch.float64, expected torch.float32"),
    "table shape": (inputs(table=TABLE[:, :1]), ValueError, r"coefficients: shape \(2, 1, 4\), expected \[B, S, 4\] = \(2, 2, 4\)"),
    "table grad": (inputs(table=TABLE.clone().requires_grad_()), ValueError, "coefficients: requires grad"),
    "table device": (inputs(table=TABLE.to("meta")), ValueError, "coefficients: on device meta, expected cpu"),
    "skips a level": (inputs(active=[False, True]), ValueError, r"active: \[False, True\], expected no level to be skipped"),
    "active 0": (inputs(active=0), ValueError, "active: 0, expected 1 to 2 levels"),
    "active 3": (inputs(active=3), ValueError, "active: 3, expected 1 to 2 levels"),
    "active length": (inputs(active=[True]), ValueError, r"active: \[True\], expected 2 booleans"),
    "mask dtype": (inputs(active=torch.ones(2, 2)), ValueError, "active: dtype torch.float32, expected torch.bool"),
    "mask shape": (inputs(active=torch.ones(2, 3).bool()), ValueError, r"active: shape \(2, 3\), expected \[B, S\] = \(2, 2\)"),
    "seed": (inputs(seed=-1), ValueError, r"seed: -1, expected an integer from 0 to 2\^63"),
    "offset": (inputs(offset=1 << 32), ValueError, r"offset: 4294967296, expected an integer from 0 to 2\^32"),
    "first sample": (inputs(first_sample=1.5), ValueError, "first_sample: 1.5, expected an integer"),
    "noise count": (inputs(noise=[Z[0]]), ValueError, "noise: 1 levels, expected 2"),
    "noise shape": (inputs(noise=[Z[0], Z[0]]), ValueError, r"noise\[1\]: .* expected that of its level"),
    "noise dtype": (inputs(noise=[z.half() for z in Z]), ValueError, r"noise\[0\]: dtype torch.float16, expected x's torch.float32"),
    "layout": (inputs(layout="rows"), ValueError, "layout: 'rows', expected"),
    "inactive": (inputs(inactive="nan"), ValueError, "inactive: 'nan', expected"),
    "patch": (inputs(layout="tokens", patch=(1, 3, 1)), ValueError, "patch: 3 along H, expected a divisor of the coarsest level's 4"),
    "patch type": (inputs(layout="tokens", patch=2), ValueError, "patch: 2, expected three positive integers"),
    "dtype": (inputs(dtype=torch.int32), ValueError, "dtype: torch.int32, expected a floating-point torch.dtype"),
    "direction": (lambda: vidkern.flow_coefficients(torch.rand(2, 2), direction="t"), ValueError, "direction: 't', expected"),
    "times": (lambda: vidkern.flow_coefficients(torch.ones(2, 2).int(), direction="data"), ValueError, "time: .* expected floating-point"),
    "loss count": (lambda: vidkern.pyramid_flow_loss(Z, V[:1]), ValueError, "target: 1 levels, expected pred's 2"),
    "loss shape": (lambda: vidkern.pyramid_flow_loss(Z, V[::-1]), ValueError, r"target\[0\]: .* expected pred's"),
    "loss grad": (lambda: vidkern.pyramid_flow_loss(Z, [v.clone().requires_grad_() for v in V]), ValueError, r"target\[0\]: requires grad"),
    "loss skips": (lambda: vidkern.pyramid_flow_loss(Z, V, active=[False, True]), ValueError, "expected no level to be skipped"),
    "loss tokens": (lambda: vidkern.pyramid_flow_loss(X, X, layout="tokens"), ValueError, "shape: None, expected the volume's"),
    "cond count": (step(c=V[:1]), ValueError, "cond: 1 levels, expected the 2 active ones"),
    "cond none": (step(c=None), TypeError, "cond: NoneType, expected"),
    "cond shape": (step(c=V[::-1]), ValueError, r"cond\[0\]: .* expected z's"),
    "uncond dtype": (step(u=[v.half() for v in V]), ValueError, r"uncond\[0\]: dtype torch.float16, expected cond's torch.float32"),
    "dt count": (step(dt=[0.1]), ValueError, r"dt: \[0.1\], expected a number, 2 numbers"),
    "dt shape": (step(dt=torch.rand(3)), ValueError, r"dt: \(3,\) torch.float32 on cpu, expected torch.float32 \[S\] = \(2,\)"),
    "guidance alone": (step(guidance=2.0), ValueError, "guidance: 2.0 without uncond, expected 1"),
    "guidance dtype": (step(guidance=torch.rand(2).double()), ValueError, "guidance: .* expected torch.float32"),
    "next": (step(next_active=3), ValueError, "next_active: 3, expected 1 to 2 levels"),
    "merge early": (step(merge=True, active=1), ValueError, "active: 1, expected all 2 levels to be active on the last step"),
    "crop": (lambda: vidkern.pyramid_crop(X, (9, 9)), ValueError, r"size: \(9, 9\), expected 2 numbers"),
    "stages": (lambda: vidkern.pyramid_stages(0), ValueError, "stages: 0, expected 1 to 4"),
    "gamma": (lambda: vidkern.pyramid_stages(3, gamma=0.5), ValueError, "gamma: 0.5, expected a number in"),
    "ranges": (lambda: vidkern.pyramid_stages(2, ranges=[0, 0.5]), ValueError, r"ranges: \[0, 0.5\], expected 3 increasing"),
    "steps": (lambda: vidkern.pyramid_stages(3, steps=0), ValueError, "steps: 0, expected an integer of at least 3"),
    "stage": (lambda: vidkern.pyramid_stage_inputs(X, torch.rand(2, 3), stages=2, stage=2), ValueError, "stage: 2, expected 0 to 1"),
    "stage table": (lambda: vidkern.pyramid_stage_inputs(X, torch.rand(2, 2), stages=2), ValueError, "table: shape"),
    "scale": (lambda: vidkern.pyramid_stage_transition(X, "a", 1.0), ValueError, "scale: 'a', expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
