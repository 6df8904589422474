"""Toy grids in which both references are needed: a drifting blob before a texture, seen with parallax.

View v moves the texture by v * parallax pixels and the blob by twice that; the blob also moves with time. The parallax can be seen in the
freeze-time frames alone and the motion in the fixed-view frames alone, so an unseen cell follows only from the two together.
"""

import dataclasses
import math

import torch

HELD_OUT_SEED = 2_000_003


@dataclasses.dataclass(frozen=True)
class ToySource:
    """views, times: of a grid. size: side of a frame in pixels. clip_times: frames of a clip. Made on the fly from the generator."""

    views: int = 4
    times: int = 4
    size: int = 8
    clip_times: int = 8

    def _frames(self, n, generator, view, time):
        """[n, *shape, 3, size, size] in [-1, 1] for indices `view`, `time` of one shape; all else is drawn per sample."""
        def draw(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        scale = self.size / 8
        parallax, start = draw(2, low=-0.8, high=0.8) * scale, draw(2, low=2.0, high=6.0) * scale
        velocity, colour = draw(2, low=-0.8, high=0.8) * scale, draw(3, low=-1.0)
        wave, phase, tint = draw(2, low=-1.0) * (2 * math.pi / (4 * scale)), draw(3, high=2 * math.pi), draw(3, low=0.2, high=0.6)
        per = (slice(None),) + (None,) * view.ndim
        view, time = view[None, ..., None], time[None, ..., None]
        shift = view * parallax[per]
        centre = start[per] + time * velocity[per] + 2 * shift
        y, x = torch.meshgrid(*(torch.arange(self.size, dtype=torch.float32),) * 2, indexing="ij")
        place = torch.stack((y, x), -1)
        at = place - shift[..., None, None, :]
        angle = (at * wave[per][..., None, None, :]).sum(-1)
        texture = tint[per][..., None, None] * torch.sin(angle[..., None, :, :] + phase[per][..., None, None])
        blob = torch.exp(-(place - centre[..., None, None, :]).square().sum(-1) / (2 * (1.2 * scale) ** 2))[..., None, :, :]
        return texture * (1 - blob) + colour[per][..., None, None] * blob

    def train(self, n, generator):
        """n grids [n, V, T, 3, size, size]."""
        view, time = torch.meshgrid(torch.arange(float(self.views)), torch.arange(float(self.times)), indexing="ij")
        return self._frames(n, generator, view, time)

    def clips(self, n, generator):
        """n ordinary videos [n, 1, clip_times, 3, size, size]: half of them with a fixed view, half with a frozen time."""
        moving, still = torch.arange(float(self.clip_times)), torch.zeros(self.clip_times)
        fixed, frozen = self._frames(n - n // 2, generator, still, moving), self._frames(n // 2, generator, moving, still)
        return torch.cat((fixed, frozen))[:, None]

    def held_out(self, n):
        """The same n grids on every call, from a seed of their own."""
        return self.train(n, torch.Generator().manual_seed(HELD_OUT_SEED))
