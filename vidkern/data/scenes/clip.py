"""A rendered scene, and the exact correspondences between any two of its images."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vidkern.data.scenes.cameras import NEAR, pixel_grid, project, rigid_inverse, unproject
from vidkern.data.scenes.errors import SceneError
from vidkern.data.scenes.tracer import World, visible

TOLERANCE = 0.01  # share of the depth by which neighbouring pixels of one surface may differ beyond their own range


@dataclass(frozen=True, eq=False)
class SceneClip:
    """One scene seen by V synchronous cameras at T times. All tensors are on the CPU; conventions in `vidkern.data.scenes.cameras`.

    Attributes:
        rgb: float32 ``[V, T, 3, H, W]`` in 0..1.
        depth: float32 ``[V, T, H, W]``, along the camera's z axis at pixel centres, scene units, finite everywhere.
        ids: int64 ``[V, T, H, W]``, index into ``names``; 0 is the background, 1 the ground.
        intrinsics: float64 ``[V, T, 3, 3]``, pixels.
        world_to_camera: float64 ``[V, T, 4, 4]``.
        object_to_world: float64 ``[T, len(names), 4, 4]``, rigid.
        names: what each id is.
        scene, seed, step: the arguments of `render`; step is the time between two images, seconds.
    """

    rgb: Tensor
    depth: Tensor
    ids: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    object_to_world: Tensor
    names: tuple[str, ...]
    scene: str
    seed: int
    step: float
    world: World | None = field(default=None, repr=False)  # what rays are cast into; None: the depth maps say what is hidden

    @property
    def views(self) -> int:
        return self.rgb.shape[0]

    @property
    def times(self) -> int:
        return self.rgb.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return tuple(self.rgb.shape[-2:])

    @cached_property
    def _over_time(self) -> tuple[Tensor, Tensor]:
        v, t = torch.meshgrid(torch.arange(self.views), torch.arange(self.times - 1), indexing="ij")
        flow, mask = self._correspond(v.reshape(-1), t.reshape(-1), v.reshape(-1), t.reshape(-1) + 1)
        return flow.view(*v.shape, 2, *self.size), mask.view(*v.shape, *self.size)

    @property
    def flow_time(self) -> Tensor:
        """Where each surface point goes from t to t + 1 within a view: float32 ``[V, T - 1, 2, H, W]``, pixels (dx, dy)."""
        return self._over_time[0]

    @property
    def flow_time_mask(self) -> Tensor:
        """bool ``[V, T - 1, H, W]``: the point is inside the image at t + 1 and nothing hides it there."""
        return self._over_time[1]

    def flow_view(self, v: int, w: int) -> tuple[Tensor, Tensor]:
        """Where view w shows, at the same time, what view v shows: (float32 ``[T, 2, H, W]`` pixels, bool ``[T, H, W]`` seen by w).

        Raises:
            SceneError: v or w is no view of this clip.
        """
        t = torch.arange(self.times)
        v, w = self._index("v", v, self.views), self._index("w", w, self.views)
        return self._correspond(torch.full_like(t, v), t, torch.full_like(t, w), t)

    def flow(self, v: int, t: int, w: int, s: int) -> tuple[Tensor, Tensor]:
        """Where view w at time s shows what view v shows at time t: (float32 ``[2, H, W]`` pixels, bool ``[H, W]`` seen there).

        Raises:
            SceneError: an index is outside this clip.
        """
        indices = (("v", v, self.views), ("t", t, self.times), ("w", w, self.views), ("s", s, self.times))
        flow, mask = self._correspond(*(torch.tensor([self._index(*index)]) for index in indices))
        return flow[0], mask[0]

    @staticmethod
    def _index(name: str, value: int, count: int) -> int:
        if not 0 <= value < count:
            raise SceneError(f"{name}={value!r}: expected 0 <= {name} < {count}")
        return value

    def _correspond(self, v: Tensor, t: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(flow ``[n, 2, H, W]``, mask ``[n, H, W]``) from cells (v, t) to cells (w, s), index tensors ``[n]``."""
        n, (height, width) = len(v), self.size
        ids = self.ids[v, t].flatten(1)
        K, camera = self.intrinsics[v, t], self.world_to_camera[v, t]
        points = unproject(K, camera, pixel_grid(self.size).view(2, -1), self.depth[v, t].flatten(1).double())
        before, after = self.object_to_world[t], self.object_to_world[s]
        motion = (after @ rigid_inverse(before))[torch.arange(n)[:, None], ids]  # [n, pixels, 4, 4]
        moved = (motion[..., :3, :3] @ points.mT[..., None])[..., 0].mT + motion[..., :3, 3].mT
        # A pose times its inverse is the identity but for rounding; what stands still must not move at all.
        still = (before == after).all(-1).all(-1).gather(1, ids)
        moved = torch.where(still[:, None], points, moved)
        start, _ = project(K, camera, points)
        target, depth = project(self.intrinsics[w, s], self.world_to_camera[w, s], moved)
        edge = torch.tensor([[width], [height]], dtype=torch.float64) - 0.5
        mask = (depth > NEAR) & ((target > -0.5) & (target < edge)).all(1)
        target = torch.where((depth > NEAR)[:, None], target, start)
        if self.world is None:
            mask &= self._seen_in_depth_map(w, s, target, depth, ids)
        else:
            K, camera = self.intrinsics[w, s][None], self.world_to_camera[w, s][None]
            mask &= visible(self.world.at(s), K, camera, target[None], depth[None])[0]
        return (target - start).float().view(n, 2, height, width), mask.view(n, height, width)

    def _seen_in_depth_map(self, w: Tensor, s: Tensor, target: Tensor, depth: Tensor, ids: Tensor) -> Tensor:
        """Whether ``depth`` [n, pixels] at ``target`` [n, 2, pixels] fits what the four pixels around it show of the same id."""
        height, width = self.size
        corner = target.floor()
        nearest, farthest = torch.full_like(depth, math.inf), torch.zeros_like(depth)
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = (corner[:, 0] + dx).clamp(0, width - 1).long(), (corner[:, 1] + dy).clamp(0, height - 1).long()
            there = (w[:, None], s[:, None], y, x)
            same, found = self.ids[there] == ids, self.depth[there].double()
            nearest = torch.where(same, torch.minimum(nearest, found), nearest)
            farthest = torch.where(same, torch.maximum(farthest, found), farthest)
        return (depth > nearest * (1 - TOLERANCE)) & (depth < farthest * (1 + TOLERANCE))


def warp_back(target: Tensor, flow: Tensor) -> Tensor:
    """What ``target`` shows at every pixel moved by ``flow``: bilinear, edge pixels repeated. To compare with the source image.

    Args:
        target: ``[n, C, H, W]``, floating. flow: ``[n, 2, H, W]``, pixels (dx, dy), as `SceneClip` gives it.

    Returns:
        ``[n, C, H, W]``.

    Raises:
        SceneError: shapes that do not belong together.
    """
    if target.ndim != 4 or not target.is_floating_point() or flow.shape != (len(target), 2, *target.shape[-2:]):
        raise SceneError(
            f"target of {target.dtype} {list(target.shape)}, flow of {list(flow.shape)}: "
            "expected floating [n, C, H, W] and [n, 2, H, W]"
        )
    size = tuple(target.shape[-2:])
    where = pixel_grid(size).to(flow) + flow
    # grid_sample's own coordinates: -1 and 1 are the outer edges of the first and last pixel (align_corners=False)
    scale = torch.tensor([size[1], size[0]]).to(flow)[:, None, None]
    grid = ((2 * where + 1) / scale - 1).permute(0, 2, 3, 1).to(target)
    return torch.nn.functional.grid_sample(target, grid, mode="bilinear", padding_mode="border", align_corners=False)
