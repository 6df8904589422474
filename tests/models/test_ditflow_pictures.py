"""Drawn and tracked motion: directions, colours, paths, files; block matching on clips of known motion."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vidkern.data import read_video
from vidkern.models.ditflow import data, pictures, probe, tracking


def still(seed=0, height=60, width=80):
    """A smooth random picture in 0 .. 1."""
    x = torch.rand(1, 3, height + 8, width + 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(x, 3, 1)[0, :, :height, :width].clamp(0, 1)


def pan(motion, frames=4, size=(32, 40)):
    return probe.window(still(), (20, 14), motion, frames=frames, size=size)


def uniform(motion, frames=4, height=8, width=10):
    return probe.known_flow((frames, height, width), motion)[0].view(frames, frames, height, width, 2)


@pytest.mark.parametrize("motion", [(4, 0), (-3, 2), (0, -4), (1, 3)])
def test_a_window_over_a_still_moves_as_it_says_and_the_tracker_sees_it(motion):
    clip = pan(motion)
    x, y = motion
    a, b = clip[0], clip[1]
    inner = slice(max(0, y), 32 + min(0, y)), slice(max(0, x), 40 + min(0, x))
    before = slice(max(0, -y), 32 + min(0, -y)), slice(max(0, -x), 40 + min(0, -x))
    assert torch.equal(b[:, inner[0], inner[1]], a[:, before[0], before[1]])      # content has moved right for x > 0, down for y > 0
    assert tracking.mean_motion(clip, radius=5).tolist() == [float(x), float(y)]
    real = data.sources()[1].window(64, 110, 0, (20, 16), motion)
    assert tracking.mean_motion((real + 1) / 2, radius=6).tolist() == [float(x), float(y)]


def test_fidelity_tells_directions_apart():
    right, left = pan((4, 0)), pan((-4, 0))
    assert tracking.fidelity(right, right) == pytest.approx(1, abs=1e-4)
    assert tracking.fidelity(right, left) < -0.5 and tracking.fidelity(right, pan((0, 4))) < 0.5
    at_rest = pan((0, 0))
    assert tracking.fidelity(right, at_rest) is None and tracking.mean_motion(at_rest).tolist() == [0, 0]
    assert tracking.mean_motion(torch.full((3, 3, 16, 16), 0.5)) is None      # nothing to match
    for bad in (right[:1], right[:, :, :4], right[0]):
        with pytest.raises(ValueError, match="expected at least two frames"):
            tracking.block_flow(bad)


def test_agreement_is_a_correlation():
    a = torch.randn(6, 20, 2)
    mask = torch.rand(6, 20) > 0.3
    assert tracking.agreement(a, 3 * a, mask) == pytest.approx(1) and tracking.agreement(a, -a, mask) == pytest.approx(-1)
    assert tracking.agreement(a, torch.zeros_like(a), mask) == 0 and tracking.agreement(a, a, torch.zeros_like(mask)) == 0


def test_colours_are_the_directions_of_the_wheel():
    names = {"red": (1, 0, 0), "yellow-green": (0.5, 1, 0), "cyan": (0, 1, 1), "violet": (0.5, 0, 1)}
    flow = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(pictures.colours(flow, 1.0), torch.tensor(list(names.values())), atol=1e-5, rtol=0)
    assert torch.equal(pictures.colours(torch.zeros(2), 1.0), torch.ones(3))
    torch.testing.assert_close(pictures.colours(flow * 5, 1.0), pictures.colours(flow, 1.0))      # no more than full
    torch.testing.assert_close(pictures.colours(flow * 0.5, 1.0), 0.5 + 0.5 * pictures.colours(flow, 1.0))
    wheel = np.asarray(pictures.wheel(101)).astype(float) / 255
    for (x, y), rgb in zip(((85, 50), (50, 85), (15, 50), (50, 15)), names.values()):
        assert np.abs(wheel[y, x] - (1 - 0.7 * (1 - np.array(rgb)))).max() < 0.05      # right, down, left, up at 0.7 of the rim
    assert wheel[0, 0].min() == 1


@pytest.mark.parametrize("motion", [(1, 0), (-1, 0), (0, 1), (-1, -1)])
def test_arrows_point_where_the_content_goes(motion):
    """Ink added to a white frame lies on the side of the patch's centre to which it moves, and the head is at the far end."""
    flow = torch.zeros(3, 3, 2)
    flow[1, 1] = torch.tensor(motion, dtype=torch.float32)
    whole = 255 - np.asarray(pictures.arrows(torch.ones(3, 90, 90), flow, (90, 90))).astype(int)
    rest = 255 - np.asarray(pictures.arrows(torch.ones(3, 90, 90), torch.zeros(3, 3, 2), (90, 90))).astype(int)
    rows, columns = np.nonzero((whole != rest).any(-1))
    offset = np.array([columns.mean() - 45, rows.mean() - 45])
    unit = np.array(motion) / math.hypot(*motion)
    assert offset @ unit > 10 and abs(offset @ unit[::-1] * (1 if 0 in motion else 0)) < 2
    along = (np.stack([columns, rows], 1) - 45) @ unit
    across = np.abs((np.stack([columns, rows], 1) - 45) @ np.array([-unit[1], unit[0]]))
    far = along > 0.75 * along.max()
    assert across[far].max() > across[~far & (along > 3)].max() + 1


def test_paths_follow_the_flow_and_end_where_it_leaves():
    paths = pictures.chain(uniform((1, 0)))
    assert paths.shape == (4, 8, 10, 2)
    assert paths[:, 2, 3].tolist() == [[3, 2], [4, 2], [5, 2], [6, 2]]
    assert paths[1, 2, 9].isnan().all() and paths[2, 2, 7].tolist() == [9, 2] and paths[3, 2, 7].isnan().all()
    turning = uniform((1, 0))
    turning[1, 2] = torch.tensor([0.0, 1.0])      # then down
    assert pictures.chain(turning)[:3, 2, 3].tolist() == [[3, 2], [4, 2], [4, 3]]
    half = uniform((0.5, 0))
    half[1, 2, :, :5] = torch.tensor([2.0, 0])      # read between patches: 4.5 lies between 0.5 and 2
    assert float(pictures.chain(half)[2, 0, 4, 0]) == pytest.approx(4.5 + (2 + 0.5) / 2)


def test_files_hold_what_was_drawn(tmp_path):
    clip, flow = pan((4, 0)), uniform((1, 0))
    pictures.sheet(clip, flow, tmp_path / "flow.png", "known")
    pictures.movie(clip, flow, tmp_path / "flow.mp4")
    pictures.save_flow(tmp_path / "flow.npz", flow)
    sheet = Image.open(tmp_path / "flow.png")
    assert sheet.width > 4 * 240 and sheet.height > 400
    colours = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert (colours == (255, 0, 0)).all(-1).sum() > 10_000      # fields to the right are red
    video = read_video(tmp_path / "flow.mp4")
    assert len(video) == 12 and video.frames.shape[-1] == 648 and float(video.fps) == 2
    stored = np.load(tmp_path / "flow.npz")["flow"]
    assert stored.dtype == np.float32 and stored.shape == (4, 4, 8, 10, 2) and stored[0, 2, 3, 4].tolist() == [2, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flow.mp4", "flow.npz", "flow.png"]
    one = uniform((1, 0), frames=1)      # a single frame has nothing to go to
    pictures.sheet(clip[:1], one, tmp_path / "one.png")
    for frames, given in ((clip[:3], flow), (clip, flow[0]), (clip[0], flow)):
        with pytest.raises(ValueError, match="flow: shape|frames: shape"):
            pictures.sheet(frames, given, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="all pairs of 4 frames"):
        pictures.square(flow.view(16, 80, 2)[:6], (4, 8, 10))


def test_windows_of_the_bundled_clips():
    generator = torch.Generator().manual_seed(0)
    clips, labels = data.batch(12, generator)
    assert clips.shape == (12, 4, 3, 32, 40) and clips.min() >= -1 and clips.max() <= 1 and set(labels.tolist()) <= {0, 1, 2}
    source = data.sources()[0]
    for _ in range(20):      # held-out windows see none of the training frames
        source.draw(generator, held_out=True)
    with pytest.raises(ValueError, match="frame 1 leaves the picture"):
        source.window(48, 0, 0, (0, 0), (4, 0))
