"""Training and held-out grids: one clip seen through random homographies (arXiv 2506.18839, "2D transformed videos")."""

import dataclasses
import math

import torch

from vidkern.data import pseudo_views, read_video
from vidkern.data.video import VideoFileError, VideoValueError
from vidkern.errors import UserError

TRAIN_SHARE = 0.7
HELD_OUT_SEED = 1_000_003


@dataclasses.dataclass(frozen=True)
class GridSource:
    """Cuts grids out of a clip. frames: uint8 [n, 3, H, W], larger than `size` so that views can be cropped.

    views, times, size (height, width): of a grid. stride: frames of the clip between two times. A training grid starts at a random
    frame of the first 70 % of the clip and stays inside it; a held-out grid stays inside the last 30 %.
    """

    frames: torch.Tensor
    stride: int
    views: int = 4
    times: int = 8
    size: tuple = (48, 64)

    @property
    def split(self):
        """First frame of the held-out part."""
        return int(len(self.frames) * TRAIN_SHARE)

    @property
    def span(self):
        """Frames of the clip that one grid covers."""
        return (self.times - 1) * self.stride + 1

    def identity(self):
        """What a checkpoint must agree on."""
        return {"stride": self.stride, "frames": len(self.frames)}

    def description(self, settings, fps):
        """What metrics.json says of the data; fps: times of a grid per second."""
        last = len(self.frames) - 1
        return {"clip": {"file": settings.video or "bundled", "frames": last + 1, "fps": round(fps * self.stride, 3), "stride": self.stride,
                         "trained_on_frames": [0, self.split - 1], "held_out_frames": [self.split, last]}}

    def grid(self, start, generator):
        """float32 [V, T, 3, h, w] in [-1, 1], with the homographies that `generator` draws; view 0 is the clip itself, cropped."""
        clip = self.frames[start : start + self.span : self.stride].float() / 127.5 - 1
        return pseudo_views(clip, self.views, generator, size=self.size)

    def train(self, n, generator):
        """n training grids [n, V, T, 3, h, w], randomly mirrored."""
        starts = torch.randint(self.split - self.span + 1, (n,), generator=generator).tolist()
        return torch.stack([flipped(self.grid(start, generator), generator) for start in starts])

    def held_out(self, n):
        """The same n grids on every call, evenly spread over the held-out part; their homographies are drawn from seeds of their own."""
        room = len(self.frames) - self.span - self.split
        starts = [self.split + round(room * i / max(1, n - 1)) for i in range(n)]
        seeded = [torch.Generator().manual_seed(HELD_OUT_SEED + i) for i in range(n)]
        return torch.stack([self.grid(start, generator) for start, generator in zip(starts, seeded)])


def flipped(grid, generator):
    """Mirror a grid [V, T, 3, h, w] at random: left-right, up-down, backwards in time, each with probability 1/2."""
    for axis in (-1, -2, 1):
        if torch.rand((), generator=generator) < 0.5:
            grid = grid.flip(axis)
    return grid


def shortest(times):
    """Frames that a clip needs so that both parts hold a grid of `times` frames at stride 1."""
    return next(n for n in range(times, 100 * times) if min(int(n * TRAIN_SHARE), n - int(n * TRAIN_SHARE)) >= times)


def open_clip(path, *, seconds_per_time, views=4, times=8, size=(48, 64), max_frames=400):
    """Read a video into a `GridSource`; returns (source, frames per second).

    seconds_per_time: wanted seconds between two times of a grid; the stride is the nearest whole number of frames that still lets a
    grid fit into the held-out part. Raises UserError when it cannot be read or even neighbouring frames do not fit.
    """
    try:
        video = read_video(path, size=(2 * size[0], 2 * size[1]), max_frames=max_frames)
    except (VideoFileError, VideoValueError) as error:
        raise UserError(f"--video {error}, expected a video file") from error
    n = len(video.frames)
    if n < shortest(times):
        raise UserError(f"--video {path}: has {n} frames, expected at least {shortest(times)} (to learn from 70 % and test on the rest)")
    room = n - int(n * TRAIN_SHARE)
    # A quarter of the held-out part is left free, so that held-out grids can start at different frames.
    fits = max(1, math.floor((0.75 * room - 1) / (times - 1)))
    stride = max(1, min(round(float(video.fps) * seconds_per_time), fits))
    return GridSource(video.frames, stride, views, times, size), float(video.fps)
