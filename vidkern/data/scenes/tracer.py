"""An analytic ray tracer: spheres and boxes that move rigidly, on a ground plane, inside a sky sphere. Depth is exact.

Everything is vectorised over rays. Rays of one camera leave one point, so the camera is moved into the axes of each object: what is
left per ray and object is a 3x3 product and a closed-form intersection.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidkern.data.scenes.cameras import NEAR, pixel_rays, rigid_inverse
from vidkern.data.scenes.textures import Texture

SKY_RADIUS = 40.0
GROUND_CELL = 2.0  # scene units per texture unit of the ground
AMBIENT = 0.5


@dataclass(frozen=True)
class Body:
    """shape: "sphere", "box", "ground" (the plane z = 0) or "sky" (a sphere seen from inside, not lit). half: float64 [3], half extents
    along its own axes, scene units (a sphere's are its radius). pose: float64 [T, 4, 4], object to world."""

    name: str
    shape: str
    half: Tensor
    texture: Texture
    pose: Tensor


@dataclass(frozen=True)
class World:
    """bodies: those of one scene; index = instance id, 0 is the sky, 1 the ground. light: float64 [3], unit, towards the light."""

    bodies: tuple[Body, ...]
    light: Tensor

    @property
    def poses(self) -> Tensor:
        """``[T, bodies, 4, 4]``."""
        return torch.stack([body.pose for body in self.bodies], 1)

    def at(self, times: Tensor) -> "World":
        """The same bodies at other times: index ``times`` [n] into the pose tracks."""
        return replace(self, bodies=tuple(replace(body, pose=body.pose[times]) for body in self.bodies))


def hit_sphere(origin: Tensor, direction: Tensor, half: Tensor) -> Tensor:
    """Ray parameter of the first hit, ``inf`` where there is none. origin [..., 3, 1], direction [..., 3, n] -> [..., n]."""
    a, b = (direction * direction).sum(-2), (origin * direction).sum(-2)
    c = (origin * origin).sum(-2) - half[0] ** 2
    discriminant = b * b - a * c
    s = (-b - discriminant.clamp(min=0).sqrt()) / a
    return s.masked_fill((discriminant < 0) | (s < NEAR), math.inf)


def hit_box(origin: Tensor, direction: Tensor, half: Tensor) -> Tensor:
    """As :func:`hit_sphere`, for a box with half extents ``half`` [3]."""
    # A ray parallel to a slab divides by 0 and gets ±inf, which is right; 0 / 0 only where it starts exactly on a face.
    first, last = (-half[:, None] - origin) / direction, (half[:, None] - origin) / direction
    enter, leave = torch.minimum(first, last).amax(-2), torch.maximum(first, last).amin(-2)
    return enter.masked_fill((enter > leave) | (enter < NEAR) | enter.isnan(), math.inf)


def hit_ground(origin: Tensor, direction: Tensor, half: Tensor) -> Tensor:
    """As :func:`hit_sphere`, for the plane z = 0."""
    s = -origin[..., 2, :] / direction[..., 2, :]
    return s.masked_fill((s < NEAR) | s.isnan(), math.inf)


def hit_sky(origin: Tensor, direction: Tensor, half: Tensor) -> Tensor:
    """As :func:`hit_sphere`, for the inside of a sphere of radius ``half[0]`` around the origin."""
    a, b = (direction * direction).sum(-2), (origin * direction).sum(-2)
    c = (origin * origin).sum(-2) - half[0] ** 2
    return (-b + (b * b - a * c).sqrt()) / a


HIT = {"sphere": hit_sphere, "box": hit_box, "ground": hit_ground, "sky": hit_sky}


def cast(world: World, K: Tensor, world_to_camera: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What rays through image points hit first.

    Args:
        world: its poses have T times.
        K, world_to_camera: ``[V, T, 3, 3]`` and ``[V, T, 4, 4]``.
        pixels: ``[2, n]`` or ``[V, T, 2, n]``, (x, y); need not be whole. Its dtype is the one that is computed in.

    Returns:
        (depth ``[V, T, n]`` along the camera's axis, ids ``[V, T, n]`` int64).
    """
    rays = pixel_rays(K.to(pixels), pixels)
    camera_to_world = rigid_inverse(world_to_camera)
    depth = ids = None
    for index, body in enumerate(world.bodies):
        camera_to_body = (rigid_inverse(body.pose) @ camera_to_world).to(pixels)
        s = HIT[body.shape](camera_to_body[..., :3, 3:], camera_to_body[..., :3, :3] @ rays, body.half.to(pixels))
        if depth is None:
            depth, ids = s, torch.zeros(s.shape, dtype=torch.int64)
        else:
            nearer = s < depth
            depth = torch.where(nearer, s, depth)
            ids.masked_fill_(nearer, index)
    return depth, ids


def shade(world: World, K: Tensor, world_to_camera: Tensor, pixels: Tensor, depth: Tensor, ids: Tensor, *, light: bool) -> Tensor:
    """Colours ``[V, T, 3, n]`` in 0..1 of what `cast` found. light: Lambert, ambient light and shadows; False: the texture alone."""
    V, T, n = depth.shape
    camera_points = pixel_rays(K.to(pixels), pixels) * depth[..., None, :]
    to_world = rigid_inverse(world_to_camera).to(pixels)
    points = to_world[..., :3, :3] @ camera_points + to_world[..., :3, 3:]
    colours, lit = torch.empty_like(points), torch.ones_like(depth)
    shadow = torch.zeros(depth.shape, dtype=torch.bool)
    for index, body in enumerate(world.bodies):
        inverse = rigid_inverse(body.pose)
        local = inverse[:, :3, :3].to(points) @ points + inverse[:, :3, 3:].to(points)
        towards_light = (inverse[:, :3, :3] @ world.light).to(points)
        mine = ids == index
        if light and body.shape in ("sphere", "box"):
            # The bodies are convex: from a point of its own surface a body is entered at 0, before NEAR, so no offset is needed.
            shadow |= HIT[body.shape](local, towards_light[..., None], body.half.to(local)).isfinite()
        frame, pixel = mine.view(V * T, n).nonzero(as_tuple=True)
        surface = local.view(V * T, 3, n)[frame, :, pixel].mT
        colours.view(V * T, 3, n)[frame, :, pixel] = body.texture(surface / texture_scale(body).to(surface)).mT
        if light and body.shape != "sky":
            cosine = (outward(body, surface) * towards_light[frame % T].mT).sum(0)
            lit.view(V * T, n)[frame, pixel] = AMBIENT + (1 - AMBIENT) * cosine.clamp(min=0)
    if light:
        colours *= torch.where(shadow & (ids > 0), lit.clamp(max=AMBIENT), lit)[..., None, :]
    return colours


def texture_scale(body: Body) -> Tensor:
    """Scene units per texture unit ``[3, 1]``."""
    return torch.full((3, 1), GROUND_CELL, dtype=torch.float64) if body.shape == "ground" else body.half[:, None]


def outward(body: Body, surface: Tensor) -> Tensor:
    """Unit normals ``[3, n]`` at surface points ``[3, n]``, both in the body's axes."""
    if body.shape == "sphere":
        return surface / body.half.to(surface)[0]
    normal = torch.zeros_like(surface)
    if body.shape == "ground":
        normal[2] = 1
        return normal
    scaled = surface / body.half.to(surface)[:, None]
    face = scaled.abs().argmax(0, keepdim=True)
    return normal.scatter_(0, face, scaled.gather(0, face).sign())


def visible(world: World, K: Tensor, world_to_camera: Tensor, pixels: Tensor, depth: Tensor) -> Tensor:
    """Whether nothing is before the points at ``pixels`` [V, T, 2, n] and ``depth`` [V, T, n]: bool ``[V, T, n]``."""
    first, _ = cast(world, K, world_to_camera, pixels)
    # depth comes from a float32 map seen from elsewhere; surfaces closer together than this count as one
    return first >= depth * (1 - 1e-4)
