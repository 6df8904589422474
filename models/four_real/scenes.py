"""Grids of procedural scenes with true cameras: rendered once into a pool, then cut and mirrored as training asks."""

import dataclasses

import torch

from vidkern.data.scenes import SceneDataset
from vidkern.errors import import_extra

HELD_OUT_SEED = 3_000_017


@dataclasses.dataclass(frozen=True)
class Pool:
    """Rendered scenes. frames: uint8 [n, V, T, 3, h, w]; cameras: float32 world-to-camera [n, V, T, 3, 4]."""

    frames: torch.Tensor
    cameras: torch.Tensor

    @classmethod
    def render(cls, scene, count, *, views, times, size, split, seed=0, progress=True, **options):
        """Render the first `count` scenes of a split. progress: a bar. options: for `vidkern.data.scenes.render`."""
        data = SceneDataset(scene, views=views, times=times, size=size, seed=seed, split=split, length=count, **options)
        items = range(count)
        if progress:
            items = import_extra("tqdm", "a progress bar").tqdm(items, desc=f"rendering {split.replace('_', '-')} scenes", leave=False)
        frames, cameras = [], []
        for i in items:
            item = data[i]
            frames.append((item["rgb"].clamp(0, 1) * 255).round().byte())
            cameras.append(item["world_to_camera"][..., :3, :].float())
        return cls(torch.stack(frames), torch.stack(cameras))


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Cuts grids out of pools of scenes, `train` and `held_out`, which share no scene.

    views, times: of a grid; pools may hold more, and a grid then takes evenly spaced views and times at a random offset and the widest
    spacing that fits. clip_times: frames of a clip, an ordinary video of one view or of one time. name: of the scene. Grids are float32
    in [-1, 1].
    """

    training: Pool
    testing: Pool
    views: int = 4
    times: int = 8
    clip_times: int = 8
    name: str = ""

    def __post_init__(self):
        for pool in (self.training, self.testing):
            V, T = pool.frames.shape[1:3]
            if V < self.views or T < self.times or max(V, T) < self.clip_times:
                raise ValueError(f"pool of {V} views and {T} times: expected at least {self.views} and {self.times}, "
                                 f"and {self.clip_times} of either")

    @property
    def size(self):
        """(height, width) of a frame."""
        return tuple(self.training.frames.shape[-2:])

    def identity(self):
        """What a checkpoint must agree on."""
        return {"pool": list(self.training.frames.shape)}

    def description(self, settings, fps):
        """What metrics.json says of the data; fps: times of a grid per second."""
        return {"scenes": {"scene": self.name, "trained_on": len(self.training.frames), "held_out": len(self.testing.frames),
                           "seconds_per_time": round(1 / fps, 3)}}

    def _cut(self, frames, i, generator):
        picked = []
        for have, want in zip(frames.shape[1:3], (self.views, self.times)):
            stride = (have - 1) // max(1, want - 1) if want > 1 else 1
            room = have - ((want - 1) * stride + 1)
            start = torch.randint(room + 1, (), generator=generator).item()
            picked.append(slice(start, start + (want - 1) * stride + 1, stride))
        return (slice(i, i + 1), *picked)

    def train(self, n, generator):
        """n training grids [n, V, T, 3, h, w], mirrored left-right and played backwards at random. Views keep their order."""
        grids = []
        for i in torch.randint(len(self.training.frames), (n,), generator=generator).tolist():
            grid = self.training.frames[self._cut(self.training.frames, i, generator)]
            for axis in (-1, 2):
                if torch.rand((), generator=generator) < 0.5:
                    grid = grid.flip(axis)
            grids.append(grid)
        return unit(torch.cat(grids))

    def clips(self, n, generator):
        """n videos [n, 1, clip_times, 3, h, w]: half of one fixed view over time, half of one frozen time over views."""
        clips = []
        for k, i in enumerate(torch.randint(len(self.training.frames), (n,), generator=generator).tolist()):
            scene = self.training.frames[i]
            scene = scene if k % 2 == 0 or scene.shape[0] < self.clip_times else scene.transpose(0, 1)
            line = scene[torch.randint(len(scene), (), generator=generator).item()]
            start = torch.randint(len(line) - self.clip_times + 1, (), generator=generator).item()
            clip = line[start : start + self.clip_times]
            clips.append(clip.flip(0) if torch.rand((), generator=generator) < 0.5 else clip)
        return unit(torch.stack(clips))[:, None]

    def held_out(self, n):
        """n grids of the first n testing scenes, the same on every call."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        return unit(torch.cat([self.testing.frames[self._cut(self.testing.frames, i, generator)] for i in range(n)]))


def unit(frames):
    """uint8 frames as float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1
