"""Pseudo-views: every property that the training data of a view-and-time model relies on."""

import pytest
import torch

from vidkern.data import bundled_clip, homography_path, pseudo_views, read_video, warp
from vidkern.data.views import ViewsError, common_window


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_clip(T=3, height=40, width=60):
    """[T, 3, H, W] in 0..1, so smooth that interpolation hardly changes it, different at every time."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([
        torch.stack([0.5 + 0.4 * torch.sin(3 * x + c + t) * torch.cos(2 * y - c) for c in range(3)]) for t in range(T)
    ])  # fmt: skip


def moved_corners(H, height, width):
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64) - 0.5
    points = torch.cat([corners, torch.ones(4, 1, dtype=torch.float64)], 1) @ H.T
    return points[:, :2] / points[:, 2:] - corners


def test_the_path_starts_at_the_identity_and_moves_corners_linearly():
    H = homography_path(5, 48, 64, seeded(3), max_shift=0.15)
    assert H.shape == (5, 3, 3) and H.dtype == torch.float64
    assert torch.equal(H[0], torch.eye(3, dtype=torch.float64))
    last = moved_corners(H[-1], 48, 64)
    assert (last[:, 0].abs() <= 0.15 * 64).all() and (last[:, 1].abs() <= 0.15 * 48).all() and last.abs().max() > 1
    for v in range(5):
        torch.testing.assert_close(moved_corners(H[v], 48, 64), last * v / 4, rtol=0, atol=1e-9)


def test_the_displacements_fill_their_range():
    last = torch.stack([moved_corners(homography_path(2, 100, 100, seeded(s), max_shift=0.2)[1], 100, 100) for s in range(200)])
    assert last.abs().max() <= 20 + 1e-9 and last.max() > 19 and last.min() < -19 and last.mean().abs() < 1


def test_seeds():
    a, b, c = (homography_path(4, 48, 64, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    clip = smooth_clip()
    assert torch.equal(pseudo_views(clip, 3, seeded(5)), pseudo_views(clip, 3, seeded(5)))


def test_one_view_is_the_clip():
    clip = smooth_clip()
    assert torch.equal(pseudo_views(clip, 1, seeded(0)), clip[None])


def test_no_shift_leaves_every_view_as_it_is():
    clip = smooth_clip()
    views = pseudo_views(clip, 3, seeded(0), max_shift=0)
    assert views.shape == (3, *clip.shape) and torch.equal(views[0], clip)
    torch.testing.assert_close(views, clip.expand_as(views), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_view_0_equals_the_input(seed):
    clip = torch.rand(2, 3, 48, 64)
    H = homography_path(4, 48, 64, seeded(seed))
    top, left, height, width = common_window(H, 48, 64)
    views = pseudo_views(clip, 4, seeded(seed))
    assert views.shape == (4, 2, 3, height, width)
    assert torch.equal(views[0], clip[..., top : top + height, left : left + width])
    assert torch.equal(pseudo_views(clip, 4, seeded(seed), crop=False)[0], clip)


def test_the_homography_is_constant_over_time():
    views = pseudo_views(smooth_clip(T=1).expand(4, -1, -1, -1), 3, seeded(1))
    assert torch.equal(views, views[:, :1].expand_as(views)), "a clip that stands still stands still in every view"
    clip = smooth_clip(T=3)
    views = pseudo_views(clip, 3, seeded(1))
    for t in range(3):
        torch.testing.assert_close(views[:, t], pseudo_views(clip[t : t + 1], 3, seeded(1))[:, 0], rtol=0, atol=1e-6)


def test_warp_follows_the_definition():
    shift = torch.tensor([[1.0, 0, 5], [0, 1, 3], [0, 0, 1]])
    image = torch.rand(2, 3, 20, 30, dtype=torch.float64)
    moved = warp(image, shift)
    torch.testing.assert_close(moved[..., 3:, 5:], image[..., :-3, :-5])
    assert (moved[..., :2, :] == 0).all() and (moved[..., :4] == 0).all(), "what was outside the image is zero"
    torch.testing.assert_close(warp(image, shift, window=(4, 6, 7, 8)), moved[..., 4:11, 6:14])


@pytest.mark.parametrize("seed", range(4))
def test_warping_back_recovers_the_input(seed):
    clip = smooth_clip(height=96, width=128)
    H = homography_path(4, 96, 128, seeded(seed))
    views = pseudo_views(clip, 4, seeded(seed), crop=False)
    seen = warp(torch.ones(1, 1, 96, 128), H[3])
    for v in range(4):
        back = warp(views[v], torch.linalg.inv(H[v]))
        # Only where the way there and back stays inside the image: there, all four neighbours carry full weight.
        inside = warp((warp(torch.ones(1, 1, 96, 128), H[v]) > 0.999).float(), torch.linalg.inv(H[v])) > 0.999
        assert inside.float().mean() > 0.5
        assert ((back - clip).abs() * inside).max() < 2e-3
    assert (views[3] - clip)[..., seen[0, 0] > 0.999].abs().max() > 0.05, "the last view differs from the first"


@pytest.mark.parametrize("size", [None, (30, 40)])
@pytest.mark.parametrize("V", [2, 3, 8])
def test_no_border_is_visible(V, size):
    for seed in range(40):
        views = pseudo_views(torch.ones(1, 3, 48, 64), V, seeded(seed), size=size)
        assert (views - 1).abs().max() < 1e-5, seed


def test_the_window_is_not_needlessly_small():
    """One pixel more on each side would show a border, and the usual loss is a third of each side at most."""
    ones, kept = torch.ones(1, 48, 64), []
    for seed in range(20):
        H = homography_path(3, 48, 64, seeded(seed))
        top, left, height, width = common_window(H, 48, 64)
        assert 0 <= top and top + height <= 48 and 0 <= left and left + width <= 64
        larger = (top - 1, left - 1, height + 2, width + 2)
        assert min(warp(ones, h, window=larger).min() for h in H) < 0.999
        kept.append(height / 48)
    assert sum(kept) / len(kept) > 0.66


def test_size_sets_the_aspect_ratio():
    clip = smooth_clip(height=60, width=90)
    views = pseudo_views(clip, 3, seeded(2), size=(32, 32))
    assert views.shape == (3, 3, 3, 32, 32)
    H = homography_path(3, 60, 90, seeded(2))
    top, left, height, width = common_window(H, 60, 90, aspect=1.0)
    assert abs(height - width) <= 1
    cut = clip[..., top : top + height, left : left + width]
    resized = torch.nn.functional.interpolate(cut, size=(32, 32), mode="bilinear", antialias=True)
    assert torch.equal(views[0], resized)


def test_reversing_the_views_twice_is_the_identity():
    """The views reversed are what the reversed homographies give, so a reversed sample is as good as a drawn one."""
    clip = smooth_clip()
    H = homography_path(4, 40, 60, seeded(7))
    views = pseudo_views(clip, 4, seeded(7))
    reversed_views = pseudo_views(clip, 4, seeded(0), homographies=H.flip(0))
    assert torch.equal(reversed_views, views.flip(0)) and torch.equal(reversed_views.flip(0), views)


def test_on_the_bundled_clip():
    clip = read_video(bundled_clip(), max_frames=4, dtype=torch.float32).frames
    views = pseudo_views(clip, 4, seeded(0), size=(48, 64))
    assert views.shape == (4, 4, 3, 48, 64) and views.dtype == torch.float32
    assert 0 <= views.min() and views.max() <= 1
    near, far = (views[1] - views[0]).abs().mean(), (views[3] - views[0]).abs().mean()
    assert 0 < near < far, "views move away from the first one"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: homography_path(0, 8, 8, g), "V=0: expected at least 1 view"),
        (lambda g: homography_path(2, 1, 8, g), "height=1, width=8: expected at least 2 pixels"),
        (lambda g: homography_path(2, 8, 8, g, max_shift=0.25), r"max_shift=0\.25: expected 0 <= max_shift < 0\.25"),
        (lambda g: pseudo_views(torch.zeros(3, 8, 8), 2, g), r"shape \[3, 8, 8\]: expected floating \[T, 3, H, W\]"),
        (lambda g: pseudo_views(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2, g), r"torch\.uint8, shape"),
        (lambda g: pseudo_views(torch.zeros(1, 3, 8, 8), 2, g, crop=False, size=(4, 4)), "expected None with crop=False"),
        (lambda g: pseudo_views(torch.zeros(1, 3, 8, 8), 2, g, homographies=torch.eye(3)[None]), r"expected \[2, 3, 3\]"),
        (lambda g: warp(torch.zeros(8, 8, dtype=torch.int32), torch.eye(3)), "expected floating"),
        (lambda g: warp(torch.zeros(8, 8), torch.eye(2)), r"H of shape \[2, 2\]: expected \[3, 3\]"),
        (
            lambda g: common_window(torch.tensor([[[1.0, 0, 9], [0, 1, 0], [0, 0, 1]], torch.eye(3).tolist()]), 8, 8),
            "height=8, width=8: too small, the 2 views have no pixel in common",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ViewsError, match=message) as error:
        call(seeded(0))
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
