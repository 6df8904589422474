"""`render`: a named scene from a seed, by the tracer or by PyBullet."""

import torch
from torch import Tensor

from vidkern.data.scenes import bullet, definitions
from vidkern.data.scenes.cameras import Rig, pixel_grid
from vidkern.data.scenes.clip import SceneClip
from vidkern.data.scenes.errors import SceneError, choice, image_size, whole
from vidkern.data.scenes.tracer import World, cast, shade

BACKENDS = {"tracer": tuple(definitions.SCENES), "pybullet": tuple(bullet.SCENES)}
RAYS_AT_ONCE = 1 << 17  # a few planes of so many float32 stay in the cache
SEEDS = 1 << 63


def scene_names(backend: str | None = None) -> tuple[str, ...]:
    """The scenes that `render` knows, those of one backend ("tracer" or "pybullet") or all."""
    if backend is not None:
        return BACKENDS[choice("backend", backend, BACKENDS)]
    return tuple(name for names in BACKENDS.values() for name in names)


def render(
    scene: str,
    *,
    views: int = 4,
    times: int = 8,
    size: tuple[int, int] | int = (48, 64),
    seed: int = 0,
    static: bool = False,
    backend: str | None = None,
    step: float = 0.1,
    rig: Rig | None = None,
    samples: int = 2,
    shading: bool = True,
) -> SceneClip:
    """A random scene of one kind, seen by several cameras at several times.

    Args:
        scene: one of `scene_names`. "bounce": balls under gravity; "orbit": bodies circling one another; "boxes": turning and sliding
            boxes; "mixed": one of these three, by the seed; "robots" (PyBullet): a Kuka arm and R2D2 among falling things.
        views, times: numbers of cameras and of images of each.
        size: (height, width) in pixels, or one number for both.
        seed: 0 <= seed < 2^63. The same arguments give the same clip on the same machine; the scene does not depend on views,
            times, size, samples or shading.
        static: nothing moves; every time shows the first one.
        backend: "tracer" or "pybullet"; None: the one that has the scene.
        step: seconds between two times, above 0.
        rig: where the cameras stand; None: ``Rig()``.
        samples: rgb is the mean over samples x samples points of each pixel. depth, ids and flow are those at pixel centres.
        shading: False gives the colours of the surfaces without light and shadow.

    Returns:
        A `SceneClip`.

    Raises:
        SceneError: an unknown name or an argument out of range.
        MissingExtra: a PyBullet scene without PyBullet.
    """
    choice("scene", scene, scene_names())
    owner = next(name for name, scenes in BACKENDS.items() if scene in scenes)
    if backend is not None and choice("backend", backend, BACKENDS) != owner:
        raise SceneError(f"backend={backend!r}: expected {owner!r} with scene={scene!r}")
    views, times, samples = whole("views", views, 1), whole("times", times, 1), whole("samples", samples, 1)
    if whole("seed", seed, 0) >= SEEDS:
        raise SceneError(f"seed={seed}: expected less than 2^63")
    if not step > 0:
        raise SceneError(f"step={step!r}: expected a number of seconds above 0")
    if rig is not None and not isinstance(rig, Rig):
        raise SceneError(f"rig={rig!r}: expected a vidkern.data.scenes.Rig or None")
    size, rig = image_size(size), rig or Rig()
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.arange(times, dtype=torch.float64) * step
    moments = torch.zeros_like(seconds) if static else seconds
    if owner == "pybullet":
        return bullet.render(scene, views, moments, seconds, size, generator, seed, step, rig, samples, shading)
    world = definitions.build(scene, moments, generator)
    K, world_to_camera = rig.cameras(views, seconds, size, generator)
    # What stands still before cameras that do is traced once: faster, and equal over time to the last bit.
    traced = 1 if static and rig.sway == 0 else times
    seen = (world.at(torch.arange(traced)), K[:, :traced], world_to_camera[:, :traced], size)
    depth, ids = _centres(*seen)
    depth, ids, rgb = (x.expand(-1, times, *x.shape[2:]).contiguous() for x in (depth, ids, _colours(*seen, samples, shading)))
    names = tuple(body.name for body in world.bodies)
    return SceneClip(rgb, depth, ids, K, world_to_camera, world.poses, names, scene, seed, step, world)


def _centres(world: World, K: Tensor, world_to_camera: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(depth float32, ids) ``[V, T, H, W]`` at pixel centres, computed in float64."""
    parts = [cast(world, K, world_to_camera, part) for part in _split(pixel_grid(size).view(2, -1), K)]
    depth, ids = (torch.cat(found, -1).view(*K.shape[:2], *size) for found in zip(*parts))
    return depth.float(), ids


def _colours(world: World, K: Tensor, world_to_camera: Tensor, size: tuple[int, int], samples: int, light: bool) -> Tensor:
    """float32 ``[V, T, 3, H, W]`` in 0..1."""
    height, width = size
    fine = (pixel_grid((height * samples, width * samples)) + 0.5) / samples - 0.5
    # [samples^2, H, W]: the points of one pixel apart, so that their mean runs over whole planes
    fine = fine.view(2, height, samples, width, samples).permute(0, 2, 4, 1, 3).reshape(2, -1).float()
    parts = []
    for part in _split(fine, K):
        depth, ids = cast(world, K, world_to_camera, part)
        parts.append(shade(world, K, world_to_camera, part, depth, ids, light=light))
    return torch.cat(parts, -1).view(*K.shape[:2], 3, samples**2, height, width).mean(3).clamp(0, 1)


def _split(pixels: Tensor, K: Tensor) -> tuple[Tensor, ...]:
    return pixels.split(max(1, RAYS_AT_ONCE // (K.shape[0] * K.shape[1])), -1)
