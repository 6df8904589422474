"""The toy output layer: a per-pixel mixture of references."""

import dataclasses

import pytest
import torch

from vidkern.models.four_real import FourRealVideo, References, config
from vidkern.models.four_real.blend import SHIFTS, mixture, shifted


def test_shifts_move_pixels_and_repeat_edges():
    x = torch.arange(20.0).view(1, 4, 5)
    same, moved = shifted(x, ((0, 0), (1, -2)))
    assert torch.equal(same, x)
    for y in range(4):
        for c in range(5):
            assert moved[0, y, c] == x[0, min(y + 1, 3), max(c - 2, 0)]


def test_a_sure_network_copies_exactly_one_candidate():
    grid = torch.rand(2, 3, 4, 3, 8, 8)
    references = References.from_grid(grid, ["both", "fixed_view"])
    for choice in (0, 1, 7):
        logits = torch.zeros(2, 3, 4, 1 + len(SHIFTS), 8, 8)
        logits[:, :, :, choice] = 50.0
        pixels, where = mixture(logits, references, SHIFTS)
        expected = grid[:1, :, :1] if choice == 0 else shifted(grid[:1, :1], SHIFTS)[choice - 1]
        torch.testing.assert_close(pixels[:1], expected.expand(1, 3, 4, 3, 8, 8))
        assert where[0, 1:, 1:].all() and where.sum() == 2 * 3  # nowhere else, and never with a single reference


def test_the_demo_model_starts_from_that_mixture_and_its_velocity_is_consistent():
    torch.manual_seed(0)
    small = config.demo()
    small = dataclasses.replace(small, dit=dataclasses.replace(small.dit, dim=32, heads=1, blocks=small.dit.blocks[:1]))
    model = FourRealVideo(small)
    grid, sigma = torch.rand(1, 2, 3, 3, 16, 16) * 2 - 1, torch.tensor([0.5])
    references, z = References.from_grid(grid, "both"), torch.randn(1, 2, 3, 3, 16, 16)
    x0 = model.output(z, sigma, references.frames, references.mask)
    assert x0.shape == z.shape and not x0[references.mask].any() and x0[0, 1, 1:].abs().max() > 0
    torch.testing.assert_close(model(z, sigma, references.frames, references.mask), (z - x0) / 0.5)
    assert not model.output(z, sigma).any()  # without references only the residual is left, zero at first


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="out_channels=0: expected 7 with 3 blend_shifts"):
        dataclasses.replace(config.tiny(), blend_shifts=((0, 0), (0, 1), (1, 0)), prediction="x0")
    with pytest.raises(ValueError, match="expected 'x0'"):
        dataclasses.replace(config.demo(), prediction="velocity")
