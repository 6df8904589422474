"""The training mix, the curriculum, scenes as grids, and references of an autoencoder (spec section 7, properties 12 to 14)."""

import pytest
import torch
from torch import nn

from vidkern.models.four_real import (Curriculum, DataMix, References, SceneSource, encode_references, latent_times, reversed_views,
                                      static_grids)
from vidkern.models.four_real.scenes import Pool
from vidkern.models.four_real.toy import ToySource


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Numbered:
    """A source whose grids tell (source, view, time) in their three channels."""

    def __init__(self, number):
        self.number = number

    def train(self, n, generator):
        grid = torch.full((n, 3, 4, 3, 2, 2), float(self.number))
        grid[:, :, :, 1] = torch.arange(3.0).view(1, 3, 1, 1, 1)
        grid[:, :, :, 2] = torch.arange(4.0).view(1, 1, 4, 1, 1)
        return grid


def test_reversing_views_touches_views_alone_and_half_of_the_samples():
    grid = Numbered(0).train(400, seeded())
    out = reversed_views(grid, seeded(1))
    turned = (out[:, 0, 0, 1, 0, 0] == 2)
    assert torch.equal(out[turned], grid[turned].flip(1)) and torch.equal(out[~turned], grid[~turned])
    assert 0.4 < turned.float().mean() < 0.6
    assert torch.equal(reversed_views(out, seeded(1)), grid)  # the same draw twice is the identity


def test_static_samples_stand_still_and_lose_their_references():
    mix = DataMix({"scene": Numbered(1), "homography": Numbered(2)}, {"scene": 0.6, "homography": 0.2, "static": 0.2})
    grids, modes = mix.draw(1000, seeded())
    static = torch.tensor([mode == "none" for mode in modes])
    assert torch.equal(grids[static], static_grids(grids[static])) and (grids[~static][:, :, 3, 2] == 3).all()
    assert (grids[static][:, :, 3, 2] == 0).all() and (grids[static][:, :, :, 0] == 1).all()
    assert not References.from_grid(grids[static], [m for m in modes if m == "none"]).mask.any()
    shares = [static.float().mean(), (grids[:, 0, 0, 0, 0, 0] == 2).float().mean()]
    assert all(abs(share - 0.2) < 0.04 for share in shares)
    assert abs(modes.count("both") / (1000 - modes.count("none")) - 0.6) < 0.05
    again, same = mix.draw(1000, seeded())
    assert torch.equal(again, grids) and same == modes
    assert mix.draw(2, seeded(), times=2)[0].shape == (2, 3, 2, 3, 2, 2)


@pytest.mark.parametrize("weights", [{}, {"scene": -1.0, "static": 2.0}, {"scene": 0.0}, {"other": 1.0}])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ValueError, match=r"expected shares, not all zero, of \['scene'\] and 'static'"):
        DataMix({"scene": Numbered(0)}, weights)


def test_curriculum():
    course = Curriculum.halves(16)
    assert [course.times(step, 6000) for step in (0, 3999, 4000, 5999)] == [8, 8, 16, 16]  # 4,000 of 6,000 iterations, as in the paper
    for stages in ((), ((0.1, 4),), ((0.0, 4), (0.0, 8)), ((0.0, 0),), ((0.0, 4), (1.0, 8))):
        with pytest.raises(ValueError, match="expected rising shares"):
            Curriculum(stages)


def pool(n=3, views=8, times=8):
    """Frames that tell (scene, view, time)."""
    frames = torch.zeros(n, views, times, 3, 4, 4, dtype=torch.uint8)
    for axis, size in enumerate((n, views, times)):
        frames[..., axis, :, :] = torch.arange(size).view([-1 if i == axis else 1 for i in range(3)] + [1, 1]) * 10
    return Pool(frames, torch.zeros(n, views, times, 3, 4))


def numbers(grid):
    """(scene, view, time) of every frame."""
    return ((grid[..., 0, 0] + 1) * 127.5 / 10).round().int()


def test_scene_grids_are_evenly_spaced_windows():
    source = SceneSource(pool(), pool(2), views=4, times=4)
    seen = numbers(source.train(200, seeded()))
    assert seen.shape == (200, 4, 4, 3) and (seen[..., 0] == seen[:, :1, :1, 0]).all()
    assert (seen[:, 1:, :, 1] - seen[:, :-1, :, 1] == 2).all()  # views rise: only `reversed_views` turns them
    steps = seen[:, :, 1:, 2] - seen[:, :, :-1, 2]
    assert set(steps.flatten().tolist()) == {2, -2} and seen[..., 1].min() == 0 and seen[..., 1].max() == 7
    clips = numbers(source.clips(20, seeded()))
    assert clips.shape == (20, 1, 8, 3)
    for i, clip in enumerate(clips[:, 0]):
        fixed, moving = (1, 2) if i % 2 == 0 else (2, 1)
        assert (clip[:, fixed] == clip[0, fixed]).all() and (clip[1:, moving] - clip[:-1, moving]).abs().eq(1).all()
    assert torch.equal(source.held_out(2), source.held_out(2))
    with pytest.raises(ValueError, match="pool of 8 views and 8 times: expected at least 9 and 4"):
        SceneSource(pool(), pool(), views=9, times=4)


def test_rendered_pools_hold_scenes_and_cameras_and_never_meet():
    train, test = (Pool.render("bounce", 2, views=2, times=2, size=12, split=split, progress=False) for split in ("train", "held_out"))
    assert train.frames.shape == (2, 2, 2, 3, 12, 12) and train.cameras.shape == (2, 2, 2, 3, 4)
    assert not torch.equal(train.frames, test.frames) and train.frames.float().std() > 10
    rotation = train.cameras[..., :3]
    torch.testing.assert_close(rotation @ rotation.transpose(-1, -2), torch.eye(3).expand_as(rotation), rtol=0, atol=1e-5)
    assert not torch.equal(train.cameras[:, 0], train.cameras[:, 1])


def test_toy_grids_need_both_references():
    source = ToySource()
    grid = source.train(64, seeded())
    assert grid.shape == (64, 4, 4, 3, 8, 8) and torch.equal(grid, source.train(64, seeded()))
    assert (grid[:, 0, 3] - grid[:, 0, 0]).abs().mean() > 0.05 and (grid[:, 3, 0] - grid[:, 0, 0]).abs().mean() > 0.05
    # The same first row with another parallax, and the same first column with another motion, have other last cells.
    assert source.clips(4, seeded()).shape == (4, 1, 8, 3, 8, 8) and torch.equal(source.held_out(3), source.held_out(3))


class Causal(nn.Module):
    """A toy causal video encoder: the first frame alone, then groups of four, each with all that came before it."""

    def forward(self, video):
        B, F = video.shape[:2]
        small = nn.functional.avg_pool2d(video.flatten(0, 1), 8).unflatten(0, (B, F))
        groups = [small[:, :1]] + list(small[:, 1:].split(4, 1))
        return torch.stack([0.1 * small[:, : 1 + 4 * i].sum(1) + group.mean(1) for i, group in enumerate(groups)], 1)


def test_latent_lengths_and_references():
    assert [latent_times(f) for f in (1, 29, 61)] == [1, 8, 16]
    with pytest.raises(ValueError, match="frames=28: expected 1 plus a multiple of 4"):
        latent_times(28)
    scene, encode = torch.rand(2, 3, 29, 3, 16, 24), Causal()
    both = encode_references(encode, fixed_view=scene[:, 0], freeze_time=scene[:, :, 0])
    assert both.frames.shape == (2, 3, 8, 3, 2, 3) and both.mask.sum().item() == 2 * (8 + 3 - 1)
    assert torch.equal(both.frames[:, 0], encode(scene[:, 0]))
    for v in range(3):  # the first latent of the whole row: the freeze-time frame encoded alone
        torch.testing.assert_close(both.frames[:, v, 0], encode(scene[:, v])[:, 0])
    assert not both.frames[~both.mask].any()
    row = encode_references(encode, fixed_view=scene[:, 0], views=3)
    column = encode_references(encode, freeze_time=scene[:, :, 0], times=8)
    assert row.mask[0].sum() == 8 and column.mask[0].sum() == 3 and row.frames.shape == column.frames.shape == both.frames.shape
    grouped = encode(scene[:, :, :5].transpose(1, 2)[:, :, 0])  # the fault: the views as one video gives fewer latents than views
    assert grouped.shape[1] != 3
    for arguments, name in (({}, "both None"), ({"fixed_view": scene[:, 0]}, "views: None"), ({"freeze_time": scene[:, :, 0]}, "times: None")):
        with pytest.raises(ValueError, match=name):
            encode_references(encode, **arguments)
