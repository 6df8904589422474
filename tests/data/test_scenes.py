"""Scenes: images, depth, cameras and flow agree with one another, and the data set gives what training relies on.

The agreement is tested through colours: whatever is wrong in a depth map, a camera or a flow moves a texture away from where it is.
"""

import dataclasses
import pickle
import sys

import pytest
import torch
from PIL import Image

from vidkern import errors
from vidkern.data import SceneDataset as exported
from vidkern.data.scenes import Rig, SceneDataset, SceneError, flow_colours, id_colours, render, save_contact_sheet
from vidkern.data.scenes import scene_names, warp_back
from vidkern.data.scenes.cameras import pixel_grid, rigid_inverse
from vidkern.data.scenes.tracer import cast, shade

TRACED = scene_names("tracer")


def small(scene="bounce", **options):
    return render(scene, **{"views": 3, "times": 3, "size": (24, 32), "seed": 3, "samples": 1, **options})


@pytest.fixture(scope="module", params=["bounce", "orbit", "boxes"])
def unlit(request):
    """Larger, without light: a surface point has one colour for ever."""
    return render(request.param, views=3, times=3, size=(96, 128), seed=3, samples=1, shading=False)


def same(one, two):
    """Equal but for rounding, which depends on how many images are traced at once, and for a sample on an edge."""
    difference = (one - two).abs()
    return difference.median() < 1e-6 and (difference < 1e-4).float().mean() > 0.999


def pairs(clip, kind):
    """(source, target, flow, where) with one image an entry: over time in every view, or between views at every time.

    where: seen in the target, in motion, and away from silhouettes, across which bilinear interpolation mixes two surfaces.
    """
    if kind == "time":
        cells = (clip.rgb, clip.ids.float()[:, :, None])
        (source, id_there), (target, id_here) = ([x[:, part].flatten(0, 1) for x in cells] for part in (slice(-1), slice(1, None)))
        flow, mask = clip.flow_time.flatten(0, 1), clip.flow_time_mask.flatten(0, 1)
    else:
        source, target, (id_there, id_here) = clip.rgb[0], clip.rgb[2], clip.ids.float()[::2, :, None]
        flow, mask = clip.flow_view(0, 2)
    inside = ((warp_back(id_here, flow) - id_there).abs() < 1e-3)[:, 0]
    where = mask & inside & (torch.linalg.vector_norm(flow, dim=1) > 0.5)
    assert where.sum() > 500
    return source, target, flow, where


def colour_error(source, target, flow, where):
    """Mean error of the target warped back."""
    return (warp_back(target, flow) - source).abs().amax(1)[where].mean().item()


@pytest.mark.parametrize("scene", TRACED)
def test_what_a_clip_holds(scene):
    clip = render(scene, views=2, times=3, size=(20, 30), seed=5)
    assert clip.rgb.shape == (2, 3, 3, 20, 30) and clip.rgb.dtype == torch.float32
    assert 0 <= clip.rgb.min() and clip.rgb.max() <= 1 and clip.rgb.std() > 0.05
    assert clip.depth.shape == clip.ids.shape == (2, 3, 20, 30)
    assert clip.depth.dtype == torch.float32 and clip.ids.dtype == torch.int64
    assert clip.depth.isfinite().all() and clip.depth.min() > 1
    assert clip.intrinsics.shape == (2, 3, 3, 3) and clip.world_to_camera.shape == (2, 3, 4, 4)
    assert clip.object_to_world.shape == (3, len(clip.names), 4, 4) and clip.names[:2] == ("background", "ground")
    assert clip.ids.min() >= 0 and clip.ids.max() < len(clip.names) and (clip.views, clip.times, clip.size) == (2, 3, (20, 30))
    assert clip.flow_time.shape == (2, 2, 2, 20, 30) and clip.flow_time.dtype == torch.float32 and clip.flow_time.isfinite().all()
    assert clip.flow_time_mask.shape == (2, 2, 20, 30) and clip.flow_time_mask.dtype == torch.bool
    flow, mask = clip.flow_view(0, 1)
    assert flow.shape == (3, 2, 20, 30) and mask.shape == (3, 20, 30)
    one, seen = clip.flow(0, 1, 1, 1)
    assert torch.equal(one, flow[1]) and torch.equal(seen, mask[1])
    assert (render(scene, size=16, views=1, times=1).flow_time.shape) == (1, 0, 2, 16, 16)
    assert (clip.rgb[:, 0] - clip.rgb[:, 2]).abs().max() > 0.1, "something moves"


@pytest.mark.parametrize("kind", ["time", "view"])
def test_warped_images_agree(unlit, kind):
    source, target, flow, where = pairs(unlit, kind)
    right = colour_error(source, target, flow, where)
    assert right < 0.05  # what is left is interpolation across the edges of textures
    half = torch.tensor([0.5, 0.5])[:, None, None]
    for name, wrong in {"half a pixel off": flow + half, "other way": -flow, "x and y swapped": flow.flip(1)}.items():
        assert colour_error(source, target, wrong, where) > 1.5 * right, name


@pytest.mark.parametrize("kind", ["time", "view"])
def test_colours_agree_exactly_without_interpolation(unlit, kind):
    """The target's ray through the very point that flow names, not its nearest pixels, shows the source's colour."""
    v, t, w, s = (0, 0, 0, 1) if kind == "time" else (0, 1, 2, 1)
    flow, mask = unlit.flow(v, t, w, s)
    there = unlit.world.at(torch.tensor([s]))
    K, camera = unlit.intrinsics[w, s][None, None], unlit.world_to_camera[w, s][None, None]
    pixels = (pixel_grid(unlit.size) + flow).view(2, -1)
    colour = shade(there, K, camera, pixels, *cast(there, K, camera, pixels), light=False).view(3, *unlit.size)
    error = (colour - unlit.rgb[v, t]).abs().amax(0)[mask]
    # The mask says "visible" within a relative depth of 1e-4, so a silhouette's pixel in a thousand may see past it.
    assert error.median() < 1e-6 and error.quantile(0.999) < 1e-3
    assert 0.5 < mask.float().mean() < 1


def test_light_looks_alike_from_every_view():
    clip = render("bounce", views=3, times=2, size=(96, 128), seed=1, samples=1)
    assert colour_error(*pairs(clip, "view")) < 0.03


def test_wrong_cameras_are_seen():
    """Extrinsics that map camera to world, or cameras of other views, give flow that colours contradict."""
    clip = render("boxes", views=3, times=2, size=(96, 128), seed=3, samples=1, shading=False)
    right = colour_error(*pairs(clip, "view"))
    for camera in (rigid_inverse(clip.world_to_camera), clip.world_to_camera.flip(0)):
        flow, mask = dataclasses.replace(clip, world_to_camera=camera).flow_view(0, 2)
        seen = mask & (torch.linalg.vector_norm(flow, dim=1) > 0.5)
        error = (warp_back(clip.rgb[2], flow) - clip.rgb[0]).abs().amax(1)
        assert seen.float().mean() < 0.05 or error[seen].mean() > 3 * right


def test_flow_of_a_body_by_hand():
    """A point that moves by d along x at depth z moves by focal * d / z pixels; its id, pose and flow say the same."""
    clip = render("bounce", views=1, times=2, size=(48, 64), seed=3)
    body = 2
    K, camera = clip.intrinsics[0, 0], clip.world_to_camera[0, 0]
    y, x = (clip.ids[0, 0] == body).nonzero()[7].tolist()
    z = clip.depth[0, 0, y, x].double()
    point = camera[:3, :3].T @ (torch.stack([(x - K[0, 2]) / K[0, 0] * z, (y - K[1, 2]) / K[1, 1] * z, z]) - camera[:3, 3])
    point = torch.cat([point, torch.ones(1)])
    moved = clip.object_to_world[1, body] @ torch.linalg.inv(clip.object_to_world[0, body]) @ point
    seen = (camera @ moved)[:3]
    expected = (K @ seen)[:2] / seen[2] - torch.tensor([x, y])
    torch.testing.assert_close(clip.flow_time[0, 0, :, y, x].double(), expected, rtol=0, atol=1e-4)
    assert expected.norm() > 1


def test_static_scenes_have_no_flow():
    for scene in TRACED:
        clip = small(scene, static=True)
        assert (clip.flow_time == 0).all() and clip.flow_time_mask.all()
        assert torch.equal(clip.rgb, clip.rgb[:, :1].expand_as(clip.rgb))
        assert same(clip.rgb[:, 0], small(scene).rgb[:, 0]), "a static scene shows the first time"
    swaying = small(static=True, rig=Rig(sway=0.5), step=0.4, shading=False, size=(96, 128))
    assert (torch.linalg.vector_norm(swaying.flow_time, dim=2) > 0.5).float().mean() > 0.9
    assert colour_error(*pairs(swaying, "time")) < 0.03
    ground = small().flow_time.norm(dim=2)[small().ids[:, :-1] < 2]
    assert (ground == 0).all(), "what stands still has no flow in a moving scene either"


def test_epipolar_constraint(unlit):
    """Corresponding points of two views lie on each other's epipolar lines; they would not if one were off along it alone."""
    flow, _ = unlit.flow_view(0, 2)
    K, camera = unlit.intrinsics, unlit.world_to_camera
    relative = camera[2, 0] @ torch.linalg.inv(camera[0, 0])
    x, y, z = relative[:3, 3].tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    F = torch.linalg.inv(K[2, 0]).T @ cross @ relative[:3, :3] @ torch.linalg.inv(K[0, 0])
    source = torch.cat([pixel_grid(unlit.size), torch.ones(1, *unlit.size, dtype=torch.float64)]).view(3, -1)
    lines = F @ source
    for t in range(unlit.times):
        target = source.clone()
        target[:2] += flow[t].view(2, -1).double()
        distance = (target * lines).sum(0) / lines[:2].norm(dim=0)
        assert distance.abs().max() < 1e-3
    assert ((source * lines).sum(0) / lines[:2].norm(dim=0)).abs().median() > 0.5, "without the flow they do not"


def test_flow_there_and_back(unlit):
    there, seen = unlit.flow_view(0, 1)
    back, _ = unlit.flow_view(1, 0)
    returned = there + warp_back(back, there)
    error = torch.linalg.vector_norm(returned, dim=1)[seen]
    assert error.quantile(0.9) < 0.2 and error.median() < 0.01  # interpolating across an edge mixes two motions


def test_masks_agree_with_the_depth_maps(unlit):
    """Rays and the comparison of depth maps are two ways to say what is hidden; they differ at edges alone."""
    for mask, other in (
        (unlit.flow_time_mask, dataclasses.replace(unlit, world=None).flow_time_mask),
        (unlit.flow_view(2, 0)[1], dataclasses.replace(unlit, world=None).flow_view(2, 0)[1]),
    ):
        assert (mask == other).float().mean() > 0.97
        assert 0.001 < (~mask).float().mean() < 0.6


def test_same_seed_same_clip():
    for scene in TRACED:
        one, two, other = small(scene), small(scene), small(scene, seed=4)
        assert torch.equal(one.rgb, two.rgb) and torch.equal(one.depth, two.depth) and torch.equal(one.ids, two.ids)
        assert (one.rgb - other.rgb).abs().mean() > 0.02


def test_the_scene_does_not_depend_on_how_it_is_seen():
    clip = small()
    assert same(clip.rgb[:, :2], small(times=2).rgb)
    assert torch.equal(clip.object_to_world, small(views=1, size=(8, 8), samples=3).object_to_world)
    assert torch.equal(clip.depth, small(samples=3, shading=False).depth)
    finer = render("bounce", views=3, times=3, size=(72, 96), seed=3, samples=1).rgb
    pooled = torch.nn.functional.avg_pool2d(finer.flatten(0, 1), 3).view(3, 3, 3, 24, 32)
    assert (small(samples=3).rgb - pooled).abs().max() < 2e-3


def test_mixed_is_one_of_the_others():
    kinds = {small("mixed", seed=seed, views=1, times=1).names[2].split()[0] for seed in range(12)}
    assert kinds == {"ball", "centre", "box"}


def test_the_splits_are_disjoint():
    seeds = [
        {SceneDataset("bounce", seed=seed, split=split, length=50).scene_seed(i) for i in range(50)}
        for seed in (0, 1, 7)
        for split in ("train", "held_out")
    ]
    assert sum(map(len, seeds)) == len(set().union(*seeds)) == 300
    assert SceneDataset("bounce", seed=(1 << 30) - 1, length=1 << 32, split="held_out").scene_seed((1 << 32) - 1) < 1 << 63


def test_dataset_items():
    data = SceneDataset("mixed", views=2, times=3, size=(16, 24), length=6, samples=1)
    assert exported is SceneDataset and len(data) == 6 and len(list(data)) == 6
    item, clip = data[4], data.clip(4)
    assert item["seed"] == clip.seed == data.scene_seed(4)
    for name in ("rgb", "depth", "ids", "intrinsics", "world_to_camera"):
        assert torch.equal(item[name], getattr(clip, name))
    assert torch.equal(data.rgb([4, 0])[0], clip.rgb) and data.rgb(torch.tensor([0, 1, 2])).shape == (3, 2, 3, 3, 16, 24)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert batch["rgb"].shape == (3, 2, 3, 3, 16, 24) and batch["world_to_camera"].shape == (3, 2, 3, 4, 4)
    assert not torch.equal(batch["rgb"][0], batch["rgb"][1])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[4]["rgb"], clip.rgb)
    assert torch.equal(pickle.loads(pickle.dumps(clip)).flow_time, clip.flow_time)


def test_share_of_static_items():
    options = {"views": 1, "times": 2, "size": (16, 24), "length": 40, "samples": 1}
    moving, some = SceneDataset("orbit", **options), SceneDataset("orbit", static=0.3, **options)
    stands = [torch.equal(clip[0, 0], clip[0, 1]) for clip in some.rgb(range(40))]
    assert 5 <= sum(stands) <= 20
    assert not any(torch.equal(clip[0, 0], clip[0, 1]) for clip in moving.rgb(range(8)))
    assert same(some.rgb(range(8))[:, :, 0], moving.rgb(range(8))[:, :, 0]), "standing still changes nothing else"
    assert same(SceneDataset("orbit", static=1.0, **options)[0]["rgb"][:, 0], moving[0]["rgb"][:, 0])


def test_warp_back_by_hand():
    target = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0], flow[:, 1] = 1.0, 0.5  # one to the right, half down: 1 + 0.5 * 4 more
    torch.testing.assert_close(warp_back(target, flow)[0, 0, :2, :3], target[0, 0, :2, :3] + 3)


def test_colours_of_flow_and_ids():
    flow = torch.tensor([[0.0, 2, 0, -2, 1], [0, 0, 2, 0, 0]]).view(2, 1, 5)
    # still, right, down, left, half as far right
    expected = torch.tensor([[1, 1, 1], [1, 0, 0], [0.5, 1, 0], [0, 1, 1], [1, 0.5, 0.5]])
    torch.testing.assert_close(flow_colours(flow)[:, 0].T, expected)
    colours = id_colours(torch.tensor([[0, 1, 2, 3]]))
    assert colours.shape == (3, 1, 4) and len({tuple(c) for c in colours[:, 0].T.tolist()}) == 4


def test_contact_sheet(tmp_path):
    path = save_contact_sheet(small(size=(24, 32)), tmp_path / "sheet.png", scale=2)
    sheet = Image.open(path)
    assert sheet.size == (3 * (64 + 4) + 4, 7 * (48 + 4 + 16) + 4) and [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    first = torch.tensor(sheet.crop((4, 16, 4 + 64, 16 + 48)).resize((32, 24), Image.Resampling.NEAREST).get_flattened_data())
    torch.testing.assert_close(first.view(24, 32, 3).permute(2, 0, 1) / 255, small().rgb[0, 0], rtol=0, atol=0.003)
    save_contact_sheet(small(views=1, times=1), path)
    assert Image.open(path).size[1] == 3 * (48 + 4 + 16) + 4


def test_without_pybullet(monkeypatch):
    monkeypatch.setitem(errors.EXTRA_OF, "pybullet", "scenes")
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(errors.MissingExtra, match=r"scene 'robots' needs pybullet, .* it comes with vidkern's extra \"scenes\""):
        render("robots")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render("cats"), "scene='cats': expected one of bounce, orbit, boxes, mixed, robots"),
        (lambda: render("bounce", backend="pybullet"), "backend='pybullet': expected 'tracer' with scene='bounce'"),
        (lambda: render("robots", backend="tracer"), "backend='tracer': expected 'pybullet' with scene='robots'"),
        (lambda: render("bounce", backend="gl"), "backend='gl': expected one of tracer, pybullet"),
        (lambda: render("bounce", views=0), "views=0: expected an integer of at least 1"),
        (lambda: render("bounce", times=2.0), r"times=2\.0: expected an integer of at least 1"),
        (lambda: render("bounce", samples=True), "samples=True: expected an integer of at least 1"),
        (lambda: render("bounce", size=(1, 8)), r"size=\(1, 8\): expected \(height, width\) or one integer"),
        (lambda: render("bounce", size="big"), "size='big': expected"),
        (lambda: render("bounce", seed=-1), "seed=-1: expected an integer of at least 0"),
        (lambda: render("bounce", seed=1 << 63), "seed=9223372036854775808: expected less than 2"),
        (lambda: render("bounce", step=0), "step=0: expected a number of seconds above 0"),
        (lambda: small().flow_view(0, 3), "w=3: expected 0 <= w < 3"),
        (lambda: small().flow(0, -1, 1, 0), "t=-1: expected 0 <= t < 3"),
        (lambda: warp_back(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 5)), r"3, 4, 4\], flow of \[1, 2, 4, 5\]: expected"),
        (lambda: SceneDataset("bounce", split="test"), "split='test': expected one of train, held_out"),
        (lambda: SceneDataset("bounce", seed=1 << 30), "seed=1073741824: expected less than 2"),
        (lambda: SceneDataset("bounce", length=0), "length=0: expected an integer of at least 1"),
        (lambda: SceneDataset("bounce", static=2), "static=2: expected a share, 0 <= static <= 1"),
        (lambda: SceneDataset("bounce", size=(4,)), r"size=\(4,\): expected"),
    ],
)
def test_scene_errors(call, message):
    with pytest.raises(SceneError, match=message) as error:
        call()
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


def test_no_item_outside_the_dataset():
    with pytest.raises(IndexError, match="index=3: expected 0 <= index < 3"):
        SceneDataset("bounce", length=3)[3]
