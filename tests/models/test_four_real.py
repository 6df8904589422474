"""4Real-Video-V2's model: the fused variant against the base model, receptive fields, references, parameter counts (spec section 7)."""

import dataclasses

import pytest
import torch

from vidkern.models.four_real import FourRealLoss, FourRealVideo, ReferenceCodec, References, config, draw_modes, generate, on_meta, parameter_count, reference_mask
from vidkern.models.shared import BlockSpec, VideoDiT

TINY = config.tiny()


def shallow(blocks, variant="fused"):
    dit = dataclasses.replace(TINY.dit, blocks=(BlockSpec(),) * blocks)
    return dataclasses.replace(TINY, dit=dit).variant(variant)


@pytest.mark.parametrize("pattern", ["grid", "full"])
def test_one_view_is_the_base_model_bit_for_bit(randomise, pattern):
    base = randomise(VideoDiT(TINY.dit.with_attention(pattern)))
    model = FourRealVideo.from_base(base, TINY)
    z, sigma = torch.randn(2, 1, 5, 3, 8, 8), torch.tensor([0.2, 0.9])
    assert torch.equal(model(z, sigma), base(z, sigma))
    frames = References.from_grid(z, "fixed_view")
    assert torch.equal(model(z, sigma, frames.frames, frames.mask), base(z, sigma))


def test_one_time_is_not_a_video_of_views_unless_t_max_is_one(randomise):
    base = randomise(VideoDiT(TINY.dit))
    video, sigma = torch.randn(1, 1, 4, 3, 8, 8), torch.tensor([0.4])
    views = video.transpose(1, 2)
    apart = FourRealVideo.from_base(base, TINY)(views, sigma).transpose(1, 2)
    assert (apart - base(video, sigma)).abs().max() > 1e-3
    joined = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, t_max=1))
    torch.testing.assert_close(FourRealVideo.from_base(base, joined)(views, sigma).transpose(1, 2), base(video, sigma), rtol=1e-4, atol=1e-5)


def influence(randomise, cfg, v, t, V=3, T=3):
    """bool [V, T]: which input cells change the output of cell (v, t)."""
    model = randomise(FourRealVideo(cfg))
    z = torch.randn(1, V, T, 3, 4, 4, requires_grad=True)
    model(z, torch.tensor([0.5]))[:, v, t].square().sum().backward()
    return z.grad.abs().amax((0, 3, 4, 5)) > 0


def test_receptive_field_is_a_cross_after_one_layer_and_everything_after_two(randomise):
    cross = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(influence(randomise, shallow(1), 1, 2), cross)
    assert influence(randomise, shallow(2), 1, 2).all()
    assert influence(randomise, shallow(1, "full"), 1, 2).all()


def test_references_have_no_effect_at_first_and_have_one_after_a_step(randomise):
    torch.manual_seed(0)
    model = FourRealVideo.from_base(randomise(VideoDiT(TINY.dit)), TINY)
    grid, sigma = torch.randn(1, 3, 3, 3, 8, 8), torch.tensor([0.6])
    references = References.from_grid(grid, "both")
    z = torch.randn_like(grid)

    def gap():
        return (model(z, sigma, references.frames, references.mask) - model(z, sigma)).abs().max().item()

    assert gap() == 0.0
    optimiser = torch.optim.SGD(model.train_attention_only(), lr=0.1)
    frozen = model.dit.blocks[0].mlp[0].weight.clone()
    (model(z, sigma, references.frames, references.mask) - grid).square().mean().backward()
    optimiser.step()
    assert gap() > 1e-6 and torch.equal(frozen, model.dit.blocks[0].mlp[0].weight)


def test_unseen_cells_never_reach_the_conditioning():
    grid = torch.randn(2, 3, 4, 3, 8, 8)
    changed = grid.clone()
    changed[:, 1:, 1:] = 5.0
    for mode in ("fixed_view", "freeze_time", "both", "none"):
        a, b = References.from_grid(grid, mode), References.from_grid(changed, mode)
        assert torch.equal(a.frames, b.frames) and torch.equal(a.mask, b.mask)
        for (fa, ma), (fb, mb) in zip(a.spread(), b.spread()):
            assert torch.equal(fa, fb) and torch.equal(ma, mb)
        assert torch.equal(ReferenceCodec.predict(a), ReferenceCodec.predict(b))


def test_modes():
    assert reference_mask("fixed_view", 2, 3).tolist() == [[True] * 3, [False] * 3]
    assert reference_mask("freeze_time", 2, 3).tolist() == [[True, False, False]] * 2
    assert reference_mask("both", 2, 3).sum() == 4 and not reference_mask("none", 2, 3).any()
    with pytest.raises(ValueError, match="mode='row'"):
        reference_mask("row", 2, 2)
    picks = draw_modes(5000, torch.Generator().manual_seed(0))
    assert abs(picks.count("both") / 5000 - 0.6) < 0.03 and abs(picks.count("fixed_view") / 5000 - 0.2) < 0.03 and "none" not in picks
    spread = References.from_grid(torch.ones(1, 2, 2, 1, 1, 1), "fixed_view").spread()
    assert [m.flatten().tolist() for _, m in spread] == [[True] * 4, [True, True, False, False], [True] * 4]


def test_reference_codec_is_exact_and_knows_its_references():
    grid = torch.randn(4, 3, 4, 3, 8, 8)
    references = References.from_grid(grid, ["fixed_view", "freeze_time", "both", "none"])
    codec = ReferenceCodec()
    z = codec.encode(grid, references)
    torch.testing.assert_close(codec.decode(z, references), grid)
    assert not z[references.mask].any()
    expected = [grid[0, :1].expand(3, 4, 3, 8, 8), grid[1, :, :1].expand(3, 4, 3, 8, 8), None, torch.zeros(3, 4, 3, 8, 8)]
    predicted = codec.predict(references)
    for sample in (0, 1, 3):
        assert torch.equal(predicted[sample], expected[sample])
    torch.testing.assert_close(predicted[2, 1, 2], (grid[2, 0, 2] + grid[2, 1, 0]) / 2)


def test_parameter_counts():
    base = parameter_count(VideoDiT(TINY.dit))
    C, width = TINY.dit.dim, TINY.dit.channels * TINY.dit.patch**2
    fused, full = (FourRealVideo(TINY.variant(name)) for name in ("fused", "full"))
    assert parameter_count(fused) == parameter_count(full) == base + width * C + C
    assert fused.state_dict().keys() == full.state_dict().keys()
    attention = sum(p.numel() for p in fused.attention_parameters())
    D = C // TINY.dit.heads
    assert attention == len(TINY.dit.blocks) * (4 * C * C + 4 * C + 2 * D) + width * C + C


def test_the_paper_size_is_about_11_billion():
    model = on_meta(config.paper())
    C = 4096
    assert parameter_count(model) == pytest.approx(11e9, rel=0.08)
    matrices = sum(p.numel() for p in model.dit.blocks.parameters() if p.ndim == 2)
    assert matrices == 32 * 22 * C * C
    with pytest.raises(ValueError, match="variant='parallel'"):
        config.paper().variant("parallel")


def test_x0_prediction_gives_the_matching_velocity(randomise):
    model = randomise(FourRealVideo(dataclasses.replace(TINY, prediction="x0")))
    z, sigma = torch.randn(2, 2, 2, 3, 8, 8), torch.tensor([0.5, 0.01])
    x0, v = model.output(z, sigma), model(z, sigma)
    torch.testing.assert_close(v[0], (z[0] - x0[0]) / 0.5)
    torch.testing.assert_close(v[1], (z[1] - x0[1]) / TINY.sigma_floor)
    with pytest.raises(ValueError, match="prediction='noise'"):
        dataclasses.replace(TINY, prediction="noise")


def test_loss_counts_cells_and_follows_the_generator():
    torch.manual_seed(0)
    model = FourRealVideo(TINY)  # outputs zero: the loss is the mean square of its target, noise - x0, per cell weight
    grid = torch.randn(2, 3, 3, 3, 8, 8)
    references = References.from_grid(grid, "both")
    values = [FourRealLoss(reference_weight=w)(model, grid, references, torch.Generator().manual_seed(3)).item() for w in (1.0, 1.0, 0.0)]
    assert values[0] == values[1] and values[0] == pytest.approx(2.0, rel=0.1)
    assert values[2] == pytest.approx(2.0 * 4 / 9, rel=0.15)


def test_sampling_is_repeatable_and_guidance_scale_one_needs_no_null(randomise):
    model = randomise(FourRealVideo(TINY), spread=0.03)
    references = References.from_grid(torch.randn(1, 2, 3, 3, 8, 8), "both")
    draws = [generate(model, references, steps=3, scale=s, generator=torch.Generator().manual_seed(1)) for s in (1.0, 1.0, 5.0)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and draws[2].isfinite().all()
