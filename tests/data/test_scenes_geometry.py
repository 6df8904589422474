"""Cameras, closed-form motion and the tracer, against numbers worked out by hand and oracles that share no code with them."""

import math

import pytest
import torch

from vidkern.data.scenes import Rig, SceneError, definitions, scene_names
from vidkern.data.scenes.cameras import intrinsics, look_at, pixel_grid, project, rigid, rigid_inverse, unproject
from vidkern.data.scenes.textures import PATTERNS, Texture, random_texture
from vidkern.data.scenes.tracer import AMBIENT, Body, World, cast, shade

SIZE = (49, 65)  # odd: the middle is a pixel
WHITE = Texture("plain", torch.ones(2, 3, dtype=torch.float64), 1.0, torch.zeros(1, 3), torch.zeros(1))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def still(name, shape, half, xyz=(0, 0, 0), T=1, texture=WHITE):
    return Body(name, shape, double(*half), texture, rigid(torch.eye(3, dtype=torch.float64), double(*xyz)).expand(T, 4, 4))


def world_of(*bodies, light=(0, 0, 1), T=1):
    return World((still("sky", "sky", (40, 40, 40), T=T), still("ground", "ground", (1, 1, 1), T=T), *bodies), double(*light))


def horizontal_camera(focal=50.0):
    """At (0, -5, 1), looking along +y: (K, world_to_camera), both with axes for views and times."""
    return intrinsics(SIZE, focal)[None, None], look_at(double(0, -5, 1), double(0, 0, 1))[None, None]


def depth_and_ids(world):
    depth, ids = cast(world, *horizontal_camera(), pixel_grid(SIZE).view(2, -1))
    return depth.view(SIZE), ids.view(SIZE)


def test_the_camera_convention_by_hand():
    """x right, y down, z forward; a camera on the -y side sees world x to the right and world z upwards."""
    camera = look_at(double(0, -5, 1), double(0, 0, 1))
    points = double([0, 0, 1], [1, 0, 1], [0, 0, 2], [0, 5, 1]).T
    seen = camera[:3, :3] @ points + camera[:3, 3:]
    torch.testing.assert_close(seen.T, double([0, 0, 5], [1, 0, 5], [0, -1, 5], [0, 0, 10]))
    pixels, depth = project(intrinsics((48, 64), 100.0), camera, points)
    torch.testing.assert_close(pixels.T, double([31.5, 23.5], [51.5, 23.5], [31.5, 3.5], [31.5, 23.5]))
    torch.testing.assert_close(depth, double(5, 5, 5, 10))


def test_unprojecting_undoes_projecting():
    K, camera = Rig(jitter=0.3).cameras(3, double(0, 0.1), (48, 64), torch.Generator().manual_seed(0))
    points = torch.randn(3, 2, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(unproject(K, camera, *project(K, camera, points)), points)
    torch.testing.assert_close(rigid_inverse(camera), torch.linalg.inv(camera))
    torch.testing.assert_close(torch.linalg.det(camera[..., :3, :3]), torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("rig", [Rig(), Rig(baseline=0.4, radius=3.0, height=1.0, azimuth=70.0, target=(1, 2, 0.5)), Rig("ring")],
                         ids=["arc", "turned", "ring"])  # fmt: skip
def test_where_the_rig_stands(rig):
    K, camera = rig.cameras(4, double(0, 1), (48, 64), torch.Generator())
    centre = rigid_inverse(camera)[..., :3, 3]
    neighbours = (centre[1:] - centre[:-1])[:, 0].norm(dim=-1)
    expected = math.sqrt(2) * rig.radius if rig.kind == "ring" else {None: 0.8}.get(rig.baseline, rig.baseline)
    torch.testing.assert_close(neighbours, double(expected, expected, expected))
    torch.testing.assert_close(centre[..., 2], torch.full((4, 2), rig.height, dtype=torch.float64))
    assert torch.equal(camera[:, 0], camera[:, 1]), "without sway the cameras stand still"
    pixels, _ = project(K, camera, double(*rig.target)[:, None])
    torch.testing.assert_close(pixels[..., 0], double(31.5, 23.5).expand(4, 2, 2))
    assert (K[..., 0, 0] == rig.focal * 64).all() and (K[..., 1, 1] == rig.focal * 64).all()


def test_the_views_go_from_left_to_right():
    _, camera = Rig().cameras(3, double(0), (48, 64), torch.Generator())
    centre = rigid_inverse(camera)[:, 0, :3, 3]
    assert centre[0, 0] < -0.7 and centre[1, 0].abs() < 1e-12 and centre[2, 0] > 0.7 and centre[1, 1] == pytest.approx(-5)


def test_jitter_and_sway_move_the_cameras():
    quiet = Rig().centres(3, double(0, 0.5), torch.Generator().manual_seed(1))
    shaken = Rig(jitter=0.2).centres(3, double(0, 0.5), torch.Generator().manual_seed(1))
    assert 0.01 < (shaken - quiet).abs().max() <= 0.2 and torch.equal(shaken[:, 0], shaken[:, 1])
    swaying = Rig(sway=0.2).centres(3, double(0, 0.5), torch.Generator().manual_seed(1))
    assert 0.01 < (swaying[:, 0] - swaying[:, 1]).norm(dim=-1).min() <= 0.4 and torch.equal(swaying[..., 2], quiet[..., 2])


def test_depth_of_sphere_box_and_ground_by_hand():
    """Depth is along the camera's axis, not along the ray."""
    depth, ids = depth_and_ids(world_of(still("ball", "sphere", (0.7, 0.7, 0.7), (0, 0, 1))))
    assert ids[24, 32] == 2 and depth[24, 32] == pytest.approx(5 - 0.7, abs=1e-12)
    depth, ids = depth_and_ids(world_of(still("box", "box", (0.6, 0.5, 0.4), (0, 0, 1))))
    box = ids == 2
    torch.testing.assert_close(depth[box], torch.full_like(depth[box], 4.5))
    # The front face spans 50 px * (2 * 0.6) / 4.5 = 13.3 by 50 * (2 * 0.4) / 4.5 = 8.9 around the middle pixel
    assert box.any(0).sum() == 13 and box.any(1).sum() == 9
    depth, ids = depth_and_ids(world_of())
    for row in (25, 30, 48):  # the horizon is row 24; 1 unit above the ground, focal length 50
        expected = 50 / (row - 24)
        assert (ids[row] == (1 if expected < 40 else 0)).all() or row == 25
        if expected < 30:
            torch.testing.assert_close(depth[row], torch.full((65,), expected, dtype=torch.float64))
    assert (ids[:25] == 0).all()
    assert depth[24, 32] == pytest.approx(5 + math.sqrt(40**2 - 1), abs=1e-9), "the sky is a sphere of radius 40 about the origin"


@pytest.mark.parametrize("scene", ["bounce", "orbit", "boxes"])
def test_hits_lie_on_the_first_surface_of_their_ray(scene):
    """An oracle without intersections: implicit functions of the bodies, at the hit and at points before it."""
    world = definitions.build(scene, torch.arange(3, dtype=torch.float64) * 0.3, torch.Generator().manual_seed(4))
    K, camera = Rig(height=1.5).cameras(2, double(0, 0.3, 0.6), (24, 32), torch.Generator())
    pixels = pixel_grid((24, 32)).view(2, -1)
    depth, ids = cast(world, K, camera, pixels)
    assert len(ids.unique()) == len(world.bodies), "everything is seen somewhere"

    def outside(body, points):
        """Above 0 outside the body, 0 on its surface."""
        local = rigid_inverse(body.pose)[:, :3, :3] @ points + rigid_inverse(body.pose)[:, :3, 3:]
        distance = {
            "sky": lambda: 40 - local.norm(dim=2),
            "ground": lambda: local[:, :, 2],
            "sphere": lambda: local.norm(dim=2) - body.half[0],
            "box": lambda: (local.abs() - body.half[:, None]).amax(2),
        }
        return distance[body.shape]()

    at = unproject(K, camera, pixels, depth)
    residual = torch.stack([outside(body, at) for body in world.bodies]).gather(0, ids[None])[0]
    assert residual.abs().max() < 1e-9
    for share in torch.linspace(0.02, 0.995, 60, dtype=torch.float64):
        before = unproject(K, camera, pixels, depth * share)
        for body in world.bodies:
            assert outside(body, before).min() > -1e-9, body.name


def test_light_and_shadow():
    ball = still("ball", "sphere", (0.5, 0.5, 0.5), (0, 0, 1.5))
    world = world_of(ball, light=(0, 0, 1))
    K, camera = horizontal_camera()
    for point, expected in (((0, 0, 0), AMBIENT), ((0.4, 0.2, 0), AMBIENT), ((0.6, 0, 0), 1.0), ((0, -0.5, 1.5), AMBIENT)):
        pixel, _ = project(K, camera, double(*point)[:, None])
        depth, ids = cast(world, K, camera, pixel)
        colour = shade(world, K, camera, pixel, depth, ids, light=True)
        torch.testing.assert_close(colour.flatten(), torch.full((3,), expected, dtype=torch.float64), rtol=0, atol=1e-6)
        assert (shade(world, K, camera, pixel, depth, ids, light=False) == 1).all()
    # On the ball's side to the camera the normal is (0, -1, 0): lit from the front by its cosine 0.6, from behind not at all.
    pixel, _ = project(K, camera, double(0, -0.5, 1.5)[:, None])
    for y, expected in ((-0.6, AMBIENT + (1 - AMBIENT) * 0.6), (0.6, AMBIENT)):
        slanted = World(world.bodies, double(0, y, 0.8))
        depth, ids = cast(slanted, K, camera, pixel)
        colour = shade(slanted, K, camera, pixel, depth, ids, light=True)
        torch.testing.assert_close(colour.flatten(), torch.full((3,), expected, dtype=torch.float64))


def test_rotations_turn_right_handed():
    up = double(0, 0, 1)
    quarter = definitions.rotation(up, double(0, math.pi / 2))
    torch.testing.assert_close(quarter[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(quarter[1] @ double(1, 0, 0), double(0, 1, 0))
    torch.testing.assert_close(definitions.turned(double([1], [0]), math.pi / 2), double([0], [1]))


def test_bouncing_agrees_with_a_simulation():
    drop, restitution, dt = 1.5, 0.8, 1e-5
    z, speed, simulated = drop, 0.0, []
    for index in range(600_000):
        if index % 20_000 == 0:
            simulated.append(z)
        z, speed = z + speed * dt - definitions.GRAVITY / 2 * dt * dt, speed - definitions.GRAVITY * dt
        if z < 0 and speed < 0:
            z, speed = -z * restitution, -speed * restitution
    closed = definitions.bouncing_height(torch.arange(30, dtype=torch.float64) * 0.2, drop, restitution)
    torch.testing.assert_close(closed, double(*simulated), rtol=0, atol=2e-3)
    late = definitions.bouncing_height(torch.linspace(0, 60, 6001, dtype=torch.float64), drop, restitution)
    assert (late >= 0).all() and late[-1] == 0 and late.max() == drop and late.isfinite().all()


def test_folding_a_line():
    s = double(-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4)
    torch.testing.assert_close(definitions.triangle_wave(s, 1.0), double(0, -1, -0.5, 0, 0.5, 1, 0.5, 0, -1, 0))


@pytest.mark.parametrize("scene", ["bounce", "orbit", "boxes"])
def test_bodies_stay_apart_and_above_the_ground(scene):
    for seed in range(40):
        world = definitions.build(scene, torch.linspace(0, 8, 81, dtype=torch.float64), torch.Generator().manual_seed(seed))
        found = world.bodies[2:]
        assert len(found) >= 3
        for index, one in enumerate(found):
            lowest = one.half[0] if one.shape == "sphere" else (one.pose[:, 2, :3].abs() * one.half).sum(-1)
            assert (one.pose[:, 2, 3] - lowest).min() > -1e-9, (seed, one.name)
            for other in found[:index]:
                between = one.pose[:, :3, 3] - other.pose[:, :3, 3]
                # boxes that stand on the ground turn about z alone: the circles around their ground plans are apart
                axes = 2 if scene == "boxes" else 3
                reach = around(one, axes) + around(other, axes)
                assert (between[:, :axes].norm(dim=1) - reach).min() > -1e-6, (seed, one.name, other.name)


def around(body, axes):
    """Radius of the sphere (axes 3) or of the circle on the ground (axes 2) around a body."""
    return body.half[0] if body.shape == "sphere" else body.half[:axes].norm()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_textures_are_continuous_and_in_range(pattern, generator):
    texture = random_texture(generator, pattern, 2)
    u = torch.rand(3, 4000, dtype=torch.float64) * 2 - 1
    colour = texture(u)
    assert colour.shape == (3, 4000) and colour.min() >= 0 and colour.max() <= 1
    step = 1e-5 * torch.randn(3, 4000, dtype=torch.float64)
    assert (texture(u + step) - colour).abs().max() < 100 * step.norm(dim=0).max()
    if pattern != "plain":
        low, high = texture.colours.amin(0), texture.colours.amax(0)
        assert (colour.amax(1) - colour.amin(1) > 0.5 * (high - low)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rig(kind="line"), "kind='line': expected one of arc, ring"),
        (lambda: Rig(radius=0), "radius=0: expected a number above 0"),
        (lambda: Rig(focal=-1.0), r"focal=-1\.0: expected a number above 0"),
        (lambda: Rig(jitter=2), r"jitter=2: expected 0 <= jitter < a quarter of radius=5\.0"),
        (lambda: Rig(height=0.5, jitter=0.6), r"jitter=0\.6: expected less than height=0\.5"),
        (lambda: Rig(sway=-0.1), r"sway=-0\.1: expected 0 <= sway"),
        (lambda: Rig(kind="ring", baseline=1.0), r"baseline=1\.0: expected None with kind='ring'"),
        (lambda: Rig(baseline=11.0), r"baseline=11\.0: expected 0 <= baseline <= twice radius=5\.0"),
        (lambda: Rig(baseline=5.0).angles(7), r"views=7: expected fewer, at baseline=5\.0 the arc closes"),
        (lambda: look_at(double(0, 0, 2), double(0, 0, 0)), "target: a camera stands straight above or below it"),
        (lambda: scene_names("opengl"), "backend='opengl': expected one of tracer, pybullet"),
    ],
)
def test_geometry_errors(call, message):
    with pytest.raises(SceneError, match=message) as error:
        call()
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
