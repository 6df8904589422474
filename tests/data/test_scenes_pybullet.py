"""The PyBullet scene: its depth, poses and cameras are exact, so that the flow made of them is."""

import dataclasses

import pytest
import torch

pytest.importorskip("pybullet")

from vidkern.data.scenes import Rig, SceneDataset, bullet, render, warp_back
from vidkern.data.scenes.cameras import pixel_grid, pixel_rays, rigid_inverse


@pytest.fixture(scope="module")
def clip():
    return render("robots", views=3, times=4, size=(96, 128), seed=2, samples=1, shading=False)


def warped(clip, source, target, flow, mask):
    """(error of each pixel when warped back, where to judge it: seen, moving, inside one surface)."""
    inside = ((warp_back(clip.ids.float()[target][:, None], flow) - clip.ids[source][:, None]).abs() < 1e-3)[:, 0]
    where = mask & inside & (torch.linalg.vector_norm(flow, dim=1) > 0.5)
    assert where.sum() > 500
    return lambda f: (warp_back(clip.rgb[target], f) - clip.rgb[source]).abs().amax(1)[where].mean().item()


def test_what_a_robots_clip_holds(clip):
    assert clip.rgb.shape == (3, 4, 3, 96, 128) and clip.depth.shape == clip.ids.shape == (3, 4, 96, 128)
    assert clip.rgb.dtype == clip.depth.dtype == torch.float32 and clip.ids.dtype == torch.int64
    assert 0 <= clip.rgb.min() and clip.rgb.max() <= 1 and 1 < clip.depth.min() and clip.depth.max() < 30
    assert clip.object_to_world.shape == (4, len(clip.names), 4, 4) and len(set(clip.names)) == len(clip.names)
    assert {"background", "ground", "arm lbr_iiwa_link_7", "droid head", "ball 1", "cube 2"} <= set(clip.names)
    seen = {clip.names[i] for i in clip.ids.unique()}
    assert {"background", "ground", "arm", "droid"} <= seen and len(seen) > 12
    R = clip.object_to_world[..., :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=torch.float64).expand_as(R))


def test_ground_depth_is_that_of_the_plane(clip):
    """z = 0 in closed form, at pixel centres; a half-pixel error of the renderer's grid would be a percent."""
    rays = pixel_rays(clip.intrinsics, pixel_grid(clip.size).view(2, -1))
    to_world = rigid_inverse(clip.world_to_camera)
    expected = (-to_world[..., 2, 3:] / (to_world[..., 2:3, :3] @ rays)[..., 0, :]).view(3, 4, 96, 128)
    ground = clip.ids == 1
    assert ground.float().mean() > 0.3
    assert (clip.depth / expected - 1).abs()[ground].max() < 1e-4


def test_balls_are_round(clip):
    """A ball's visible points are its radius away from its centre (up to how coarse its mesh is)."""
    index = clip.names.index("ball 1")
    v, t, y, x = (clip.ids == index).nonzero().T
    pixels, depth = torch.stack([x, y]).double(), clip.depth[v, t, y, x].double()
    K, to_world = clip.intrinsics[v, t], rigid_inverse(clip.world_to_camera[v, t])
    points = pixel_rays(K, pixels.T[..., None]) * depth[:, None, None]
    points = (to_world[:, :3, :3] @ points)[..., 0] + to_world[:, :3, 3]
    distance = (points - clip.object_to_world[t, index, :3, 3]).norm(dim=1)
    assert len(v) > 200 and distance.std() < 0.02 * distance.mean()


@pytest.mark.parametrize("kind", ["time", "view"])
def test_warped_robots_agree(clip, kind):
    if kind == "time":
        source, target = (1, slice(0, 3)), (1, slice(1, 4))
        flow, mask = clip.flow_time[1], clip.flow_time_mask[1]
    else:
        source, target = (0, slice(None)), (2, slice(None))
        flow, mask = clip.flow_view(0, 2)
    error = warped(clip, source, target, flow, mask)
    assert error(flow) < 0.06  # the textures have sharp edges
    half = torch.tensor([0.5, 0.5])[:, None, None]
    faults = {"none": 0 * flow, "half a pixel off": flow + half, "other way": -flow, "x and y swapped": flow.flip(1)}
    for name, wrong in faults.items():
        assert error(wrong) > 1.15 * error(flow), name


def test_every_link_moves_by_its_own_pose(clip):
    moved = (clip.object_to_world[0] != clip.object_to_world[3]).flatten(1).any(1)
    moving = {name for name, flag in zip(clip.names, moved) if flag}
    assert {"droid head", "ball 1", "cube 2", "arm lbr_iiwa_link_7"} <= moving and not {"background", "ground"} & moving
    turned = (clip.object_to_world[0, :, :3, :3] - clip.object_to_world[3, :, :3, :3]).abs().amax((1, 2))
    for name in ("arm lbr_iiwa_link_5", "arm lbr_iiwa_link_7", "droid head", "cube 2"):
        assert turned[clip.names.index(name)] > 0.02, name
    still = clip.flow_time[(clip.ids[:, :-1] < 2)[:, :, None].expand_as(clip.flow_time)]
    assert (still == 0).all()
    frozen = dataclasses.replace(clip, object_to_world=clip.object_to_world[:1].expand_as(clip.object_to_world))
    assert (frozen.flow_time == 0).all()


def test_static_robots():
    clip = render("robots", views=2, times=3, size=(24, 32), seed=1, static=True)
    assert torch.equal(clip.rgb, clip.rgb[:, :1].expand_as(clip.rgb))
    assert (clip.flow_time == 0).all() and clip.flow_time_mask.all()
    assert torch.equal(clip.rgb[:, 0], render("robots", views=2, times=1, size=(24, 32), seed=1).rgb[:, 0])


def test_robots_are_deterministic():
    options = {"views": 2, "size": (24, 32), "samples": 1}
    one, two, other = (render("robots", times=4, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(one.rgb, two.rgb) and torch.equal(one.depth, two.depth)
    assert torch.equal(one.object_to_world, two.object_to_world)
    assert (one.rgb - other.rgb).abs().mean() > 0.02
    assert torch.equal(one.rgb[:, :2], render("robots", times=2, seed=3, **options).rgb)


def test_samples_are_averaged():
    """A finer image, averaged, lies over the coarse one and not half a pixel beside it."""
    coarse, fine = (render("robots", views=1, times=1, size=(48, 64), seed=1, samples=n).rgb[0, 0] for n in (1, 4))
    here = (coarse - fine).abs().mean()
    for dims, shift in ((-1, 1), (-1, -1), (-2, 1), (-2, -1)):
        assert (coarse.roll(shift, dims) - fine).abs().mean() > 1.5 * here
    assert here < 0.05


def test_a_dataset_of_robots():
    data = SceneDataset("robots", views=2, times=2, size=(16, 24), length=2, samples=1, rig=Rig("ring"))
    assert data[1]["rgb"].shape == (2, 2, 3, 16, 24) and data.clip(1).world is None and bullet.SCENES.keys() == {"robots"}
