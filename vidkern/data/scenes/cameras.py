"""Pinhole cameras and the rigs they stand on.

World: right-handed, z up, in scene units. Camera: x right, y down, z forward (OpenCV). Pixels: (x, y), integers at pixel centres, as
in `vidkern.data.views`; so an image ``w`` wide spans x from -0.5 to w - 0.5 and its middle is (w - 1) / 2.

``world_to_camera`` [4, 4] maps a homogeneous world point to camera axes, ``intrinsics`` [3, 3] maps a camera point to
``depth * (x, y, 1)``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkern.data.scenes.errors import SceneError, choice, whole

NEAR = 1e-3  # scene units; what is closer to a camera, or behind it, is not seen


@dataclass(frozen=True)
class Rig:
    """Where the cameras stand. All of them look at ``target``.

    kind: "arc", neighbours ``baseline`` apart on a circle around the target, or "ring", evenly around the whole circle.
    baseline: distance of neighbouring cameras, scene units; for "arc" alone (0.8 where None).
    radius: horizontal distance to the target. height: of the cameras above the ground.
    focal: focal length over the longer image side (1: 53 degrees across it; 1.3: 42).
    azimuth: degrees around z of the middle of the arc, or of camera 0 of the ring; 0 is on the -y side of the target.
    jitter: every camera moves by up to this much along each axis, scene units, drawn from the scene's seed.
    sway: amplitude, scene units, of a slow sideways motion of the whole rig over time. 0: the cameras stand still.
    """

    kind: str = "arc"
    baseline: float | None = None
    radius: float = 5.0
    height: float = 2.2
    focal: float = 1.3
    target: tuple[float, float, float] = (0.0, 0.0, 0.9)
    azimuth: float = 0.0
    jitter: float = 0.0
    sway: float = 0.0

    def __post_init__(self):
        choice("kind", self.kind, ("arc", "ring"))
        for name in ("radius", "height", "focal"):
            if not getattr(self, name) > 0:
                raise SceneError(f"{name}={getattr(self, name)!r}: expected a number above 0")
        for name in ("jitter", "sway"):
            if not 0 <= getattr(self, name) < self.radius / 4:
                raise SceneError(f"{name}={getattr(self, name)!r}: expected 0 <= {name} < a quarter of radius={self.radius}")
        if self.jitter >= self.height:
            raise SceneError(f"jitter={self.jitter}: expected less than height={self.height}, or a camera may sink into the ground")
        if self.kind == "ring" and self.baseline is not None:
            raise SceneError(f"baseline={self.baseline}: expected None with kind='ring', which spreads its cameras evenly")
        if self.kind == "arc" and not 0 <= self._baseline <= 2 * self.radius:
            raise SceneError(f"baseline={self.baseline}: expected 0 <= baseline <= twice radius={self.radius}")

    @property
    def _baseline(self) -> float:
        return 0.8 if self.baseline is None else self.baseline

    def angles(self, views: int) -> Tensor:
        """Azimuth of every camera in radians, ``[views]`` float64."""
        v = torch.arange(views, dtype=torch.float64)
        if self.kind == "ring":
            return math.radians(self.azimuth) + v * (2 * math.pi / views)
        between = 2 * math.asin(self._baseline / (2 * self.radius))
        if between * (views - 1) >= 2 * math.pi:
            raise SceneError(f"views={views}: expected fewer, at baseline={self._baseline} the arc closes, radius={self.radius}")
        return math.radians(self.azimuth) + (v - (views - 1) / 2) * between

    def centres(self, views: int, seconds: Tensor, generator: torch.Generator) -> Tensor:
        """Camera centres ``[views, times, 3]`` float64 at times ``seconds`` [times]."""
        whole("views", views, 1)
        angle = self.angles(views)
        target = torch.tensor(self.target, dtype=torch.float64)
        around = torch.stack([angle.sin(), -angle.cos(), torch.zeros_like(angle)], -1)
        centre = target * torch.tensor([1.0, 1, 0]) + self.radius * around + torch.tensor([0, 0, self.height])
        phase = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)
        jitter = (2 * torch.rand(views, 3, generator=generator, dtype=torch.float64) - 1) * self.jitter
        sideways = torch.tensor([math.cos(math.radians(self.azimuth)), math.sin(math.radians(self.azimuth)), 0])
        sway = self.sway * (2.0 * seconds + phase).sin()[:, None] * sideways
        return (centre + jitter)[:, None] + sway

    def cameras(self, views: int, seconds: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(intrinsics ``[views, times, 3, 3]``, world_to_camera ``[views, times, 4, 4]``), float64. size: (height, width)."""
        centres = self.centres(views, seconds, generator)
        K = intrinsics(size, self.focal * max(size))
        return K.expand(*centres.shape[:2], 3, 3).clone(), look_at(centres, torch.tensor(self.target, dtype=torch.float64))


def intrinsics(size: tuple[int, int], focal: float) -> Tensor:
    """``[3, 3]`` float64 of square pixels with the principal point in the middle. focal: pixels. size: (height, width)."""
    height, width = size
    return torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=torch.float64)


def look_at(centre: Tensor, target: Tensor) -> Tensor:
    """world_to_camera ``[..., 4, 4]`` of cameras at ``centre`` [..., 3] that look at ``target`` [3] and keep world z upright."""
    z = torch.nn.functional.normalize(target - centre, dim=-1)
    up = torch.tensor([0, 0, 1.0], dtype=centre.dtype).expand_as(z)
    x = torch.nn.functional.normalize(torch.linalg.cross(z, up), dim=-1)
    if not bool((x.norm(dim=-1) > 0.5).all()):
        raise SceneError("target: a camera stands straight above or below it, expected it to look at an angle")
    R = torch.stack([x, torch.linalg.cross(z, x), z], -2)
    return rigid(R, -(R @ centre[..., None])[..., 0])


def rigid(R: Tensor, t: Tensor) -> Tensor:
    """``[..., 4, 4]`` from rotations ``[..., 3, 3]`` and translations ``[..., 3]``."""
    top = torch.cat([R, t[..., None]], -1)
    bottom = torch.tensor([0, 0, 0, 1.0], dtype=R.dtype).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def rigid_inverse(M: Tensor) -> Tensor:
    """Inverse of rigid motions ``[..., 4, 4]``."""
    R = M[..., :3, :3].mT
    return rigid(R, -(R @ M[..., :3, 3:])[..., 0])


def pixel_grid(size: tuple[int, int]) -> Tensor:
    """Pixel centres ``[2, H, W]`` (x, y), float64."""
    height, width = size
    x, y = torch.arange(width, dtype=torch.float64), torch.arange(height, dtype=torch.float64)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def pixel_rays(K: Tensor, pixels: Tensor) -> Tensor:
    """Camera-axes directions of depth 1: ``[..., 3, n]`` for pixels ``[..., 2, n]`` and intrinsics ``[..., 3, 3]`` without skew."""
    focal, middle = K.diagonal(dim1=-2, dim2=-1)[..., :2, None], K[..., :2, 2:]
    xy = (pixels - middle) / focal
    return torch.cat([xy, torch.ones_like(xy[..., :1, :])], -2)


def unproject(K: Tensor, world_to_camera: Tensor, pixels: Tensor, depth: Tensor) -> Tensor:
    """World points ``[..., 3, n]`` at pixels ``[..., 2, n]`` and depths ``[..., n]``."""
    R, t = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3:]
    return R.mT @ (pixel_rays(K, pixels) * depth[..., None, :] - t)


def project(K: Tensor, world_to_camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """(pixels ``[..., 2, n]``, depths ``[..., n]``) of world points ``[..., 3, n]``; pixels mean something only at depth > 0."""
    camera = world_to_camera[..., :3, :3] @ points + world_to_camera[..., :3, 3:]
    image = K @ camera
    return image[..., :2, :] / image[..., 2:, :], camera[..., 2, :]
