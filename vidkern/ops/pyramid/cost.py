"""What the pyramid ops cost, and the shapes of the named samples that their tests and benches share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import levels


def value_counts(sizes) -> list[int]:
    """Values of each level, coarse to fine."""
    return [math.prod(shape) for shape in levels.shapes(sizes)]


def filter_flops(sizes) -> int:
    """One addition per value that is pooled and three operations per value that is interpolated and subtracted or added."""
    return 4 * sum(value_counts(sizes)[1:])


def pass_flops(sizes) -> int:
    """Of taking a volume apart or putting it together, or of the adjoint of either: the filters, and a factor per value of the levels."""
    return filter_flops(sizes) + sum(value_counts(sizes))


def pass_bytes(sizes, itemsize: int) -> int:
    """The volume and every level moved once."""
    counts = value_counts(sizes)
    return (counts[-1] + sum(counts)) * itemsize


@dataclass(frozen=True)
class Pyramid:
    """The shape of a sample: a volume [batch, channels, *size] and the pyramid over it. ``size`` has two axes for images."""

    name: str
    size: tuple[int, ...]
    levels: int = 2
    kind: str = "laplacian"
    factor: tuple[int, int, int] = (1, 2, 2)
    batch: int = 2
    channels: int = 3

    @property
    def sizes(self) -> list[int]:
        """Flattened sizes as the ops take them."""
        return levels.sizes_of(torch.empty(self.shape5, device="meta"), self.levels, self.kind, self.pool_time)

    @property
    def pool_time(self) -> bool:
        """Whether time halves too."""
        return self.factor[0] == 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the volume as it is given."""
        return (self.batch, self.channels, *self.size)

    @property
    def shape5(self) -> tuple[int, ...]:
        """Of the volume as [B, C, T, H, W]."""
        return (self.batch, self.channels, *((1, *self.size) if len(self.size) == 2 else self.size))

    @property
    def options(self) -> dict:
        """Keywords that name the pyramid."""
        return {"kind": self.kind, "factor": self.factor}

    def level_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the levels with the rank of the volume."""
        return [tuple(s if len(self.size) == 3 else (*s[:2], *s[3:])) for s in levels.shapes(self.sizes)]

    def draw(self, shapes, dtype, device, seed) -> list[torch.Tensor]:
        """Unit normal tensors of these shapes."""
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

    def times(self, direction: str = "data", device="cpu") -> torch.Tensor:
        """Made-up times [B, S], all different, none at an end."""
        step = torch.arange(self.batch * self.levels, dtype=torch.float32, device=device).view(self.batch, self.levels)
        t = (step + 0.7) / (self.batch * self.levels + 1)
        return t if direction == "data" else 1 - t


@dataclass(frozen=True)
class FilterSample:
    """Inputs of an op that only filters: a pyramid, and the levels' standard deviations."""

    pyramid: Pyramid
    std: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What tests and reports call it."""
        return self.pyramid.name + ("_std" if self.std else "")

    @property
    def flops(self) -> int:
        """Of the forward."""
        return pass_flops(self.pyramid.sizes)


# Odd sizes, one value per level, widths around the vector length, rows that are no multiple of four, every filter and factor.
PYRAMIDS = (
    Pyramid("image", (16, 16)),
    Pyramid("video", (2, 16, 24), levels=3),
    Pyramid("spacetime", (4, 8, 20), factor=(2, 2, 2)),
    Pyramid("tiny", (2, 2), batch=1, channels=1),
    Pyramid("odd", (3, 18, 38), channels=2),
    Pyramid("wide", (8, 264), levels=4, batch=1, channels=1),
    Pyramid("haar", (2, 24, 40), levels=3, kind="haar"),
    Pyramid("haar_spacetime", (8, 12, 36), levels=3, kind="haar", factor=(2, 2, 2), batch=1),
    Pyramid("dct", (1, 16, 40), kind="dct"),
    Pyramid("dct_three", (32, 48), levels=3, kind="dct", batch=1, channels=2),
    Pyramid("dct_spacetime", (8, 8, 16), kind="dct", factor=(2, 2, 2), batch=1, channels=2),
    Pyramid("deep_spacetime", (8, 8, 24), levels=4, factor=(2, 2, 2), batch=1, channels=1),
    Pyramid("one_level", (5, 7), levels=1),
)
# Latents and pixels of real models, for accelerators.
LARGE = (
    Pyramid("latents_512", (64, 64), batch=8, channels=16),
    Pyramid("latents_49_frames", (13, 60, 90), batch=1, channels=16),
    Pyramid("latents_81_frames", (20, 88, 160), levels=3, batch=1, channels=16),
    Pyramid("latents_in_time", (16, 64, 96), levels=3, factor=(2, 2, 2), batch=1, channels=8),
    Pyramid("pixels_1024", (1024, 1024), levels=4, batch=1, channels=3),
    Pyramid("pixels_dct", (512, 768), levels=3, kind="dct", batch=1, channels=3),
)
