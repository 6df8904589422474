"""Random scenes as a dataset for training."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidkern.data.scenes.clip import SceneClip
from vidkern.data.scenes.errors import SceneError, choice, image_size, whole
from vidkern.data.scenes.rendering import render, scene_names

SPLITS = ("train", "held_out")
ITEMS = 1 << 32  # scene seeds that one dataset seed owns in each split


class SceneDataset(Dataset):
    """Item i is a scene of its own: a dict of tensors that the default collate function of a `DataLoader` stacks.

    Keys: "rgb", "depth", "ids", "intrinsics", "world_to_camera" as in `SceneClip`, and "seed", the scene's. `clip(i)` gives the
    whole `SceneClip`, flow included. The same (seed, split, i) is the same scene, and scenes of the two splits never share a seed,
    nor do datasets of different seeds.

    Args:
        scene, views, times, size: as for `render`.
        seed: 0 <= seed < 2^30.
        split: "train" or "held_out".
        length: number of items, at most 2^32.
        static: share of the items in which nothing moves, 0..1.
        options: further arguments of `render`.

    Raises:
        SceneError: an argument out of range.
    """

    def __init__(self, scene: str, *, views: int = 4, times: int = 8, size=(48, 64), seed: int = 0, split: str = "train",
                 length: int = 1000, static: float = 0.0, **options):  # fmt: skip
        self.scene, self.split = choice("scene", scene, scene_names()), choice("split", split, SPLITS)
        if whole("seed", seed, 0) >= 1 << 30:
            raise SceneError(f"seed={seed}: expected less than 2^30")
        if whole("length", length, 1) > ITEMS:
            raise SceneError(f"length={length}: expected at most 2^32")
        if not 0 <= static <= 1:
            raise SceneError(f"static={static!r}: expected a share, 0 <= static <= 1")
        self.seed, self.length, self.static = seed, length, float(static)
        self.grid = {"views": whole("views", views, 1), "times": whole("times", times, 1), "size": image_size(size)}
        self.options = options

    def __len__(self) -> int:
        return self.length

    def scene_seed(self, index: int) -> int:
        """The seed that item ``index`` is rendered from: even in training, odd in the held-out split."""
        if not 0 <= index < self.length:
            raise IndexError(f"index={index}: expected 0 <= index < {self.length}")
        return 2 * (self.seed * ITEMS + index) + SPLITS.index(self.split)

    def clip(self, index: int) -> SceneClip:
        """Item ``index`` as a `SceneClip`."""
        seed = self.scene_seed(index)
        # A generator of its own: whether an item stands still must not change what it shows
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed ^ 0x5CE7E), dtype=torch.float64).item()
        return render(self.scene, seed=seed, static=draw < self.static, **self.grid, **self.options)

    def __getitem__(self, index: int) -> dict:
        clip = self.clip(index)
        tensors = {name: getattr(clip, name) for name in ("rgb", "depth", "ids", "intrinsics", "world_to_camera")}
        return {**tensors, "seed": clip.seed}

    def rgb(self, indices) -> Tensor:
        """Images of some items: float32 ``[n, V, T, 3, H, W]`` in 0..1."""
        return torch.stack([self.clip(int(index)).rgb for index in indices])
