"""Training and held-out grids of the demo, its baselines, and clips that do not fit."""

import pytest
import torch

from vidkern.data import bundled_clip, read_video, write_video
from vidkern.errors import UserError
from vidkern.models.four_real.baselines import baselines
from vidkern.models.four_real.data import GridSource, flipped, open_clip, shortest


def numbered(n=40):
    """A clip whose frame number can be read from any pixel."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 32, 32) * 5


def test_training_and_held_out_frames_never_meet():
    source = GridSource(numbered(), stride=2, views=2, times=4, size=(16, 16))
    generator = torch.Generator().manual_seed(0)

    def frames(grids):
        return set(((grids[:, 0, :, 0, 8, 8] + 1) * 127.5 / 5).round().int().flatten().tolist())

    seen, held = frames(source.train(200, generator)), frames(source.held_out(6))
    assert source.split == 28 and seen == set(range(28)) and held <= set(range(28, 40)) and {28, 39} <= held
    assert torch.equal(source.held_out(3), source.held_out(3))
    assert source.train(2, generator).shape == (2, 2, 4, 3, 16, 16)


def test_views_are_constant_homographies_of_view_zero():
    source = GridSource(read_video(bundled_clip(), size=(48, 64), max_frames=40).frames, stride=2, times=4, size=(24, 32))
    grid = source.held_out(1)[0]
    assert grid.shape == (4, 4, 3, 24, 32) and grid.min() >= -1.001 and grid.max() <= 1.001
    assert (grid[1] - grid[0]).abs().mean() < (grid[3] - grid[0]).abs().mean()


def test_mirroring_keeps_a_grid_a_grid():
    grid = torch.rand(2, 3, 3, 4, 5)
    for seed in range(8):
        out = flipped(grid, torch.Generator().manual_seed(seed))
        assert out.shape == grid.shape and torch.equal(out.flatten(1).sort(1).values, grid.flatten(1).sort(1).values)  # views stay apart


def test_baselines_use_references_alone():
    grid = torch.rand(1, 3, 4, 3, 2, 2) * 2 - 1
    other = grid.clone()
    other[:, 1:, 1:] = 0.5
    for name, filled in baselines(grid).items():
        assert torch.equal(filled, baselines(other)[name]), name
    b = baselines(grid)
    assert torch.equal(b["nearest"][0, 1, 2], grid[0, 0, 2]) and torch.equal(b["nearest"][0, 2, 1], grid[0, 2, 0])
    torch.testing.assert_close(b["weighted"][0, 1, 3], 0.75 * grid[0, 0, 3] + 0.25 * grid[0, 1, 0])


def test_short_clips(tmp_path):
    assert shortest(8) == 24
    path = tmp_path / "short.mkv"
    write_video(path, numbered(23), 10, codec="ffv1")
    with pytest.raises(UserError, match="has 23 frames, expected at least 24"):
        open_clip(path, seconds_per_time=0.27)
    write_video(path, numbered(24), 10, codec="ffv1")
    source, fps = open_clip(path, seconds_per_time=0.27)
    assert source.stride == 1 and fps == 10 and source.held_out(2).shape == (2, 4, 8, 3, 48, 64)
