"""Problems that the pyramid suites share, and the pyramid as public code and as careful code write it in torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from vidkern.ops.pyramid import levels

from ..suite import Peer


@dataclass(frozen=True)
class PyramidShape:
    """A volume [batch, channels, time, height, width] with a laplacian pyramid of ``levels`` over rows and columns.

    ``noise``: made by the candidate ("inside") or handed to it ("given").
    """

    name: str
    batch: int
    channels: int
    size: tuple[int, int, int]
    levels: int = 2
    noise: str = "inside"
    about: str = ""

    def facts(self) -> dict:
        """For the record."""
        return asdict(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the volume."""
        return (self.batch, self.channels, *self.size)

    @property
    def sizes(self) -> list[int]:
        """Flattened sizes as the ops take them."""
        return levels.sizes_of(torch.empty(self.shape, device="meta"), self.levels, "laplacian", False)

    @property
    def level_shapes(self) -> list[tuple[int, ...]]:
        """[B, C, T, H, W] of every level."""
        return levels.shapes(self.sizes)

    @property
    def values(self) -> int:
        """Of all levels."""
        return levels.numel(self.sizes)


_SHAPES = (
    PyramidShape("cpu", 8, 16, (16, 64, 64), 3, about="three levels, 8.4 million values"),
    PyramidShape("in512", 32, 16, (1, 64, 64), about="ImageNet 512 latents"),
    PyramidShape("cogvideox", 1, 16, (13, 60, 90), about="49 frames, 480x720"),
    PyramidShape("wan", 1, 16, (21, 90, 160), about="81 frames, 720p"),
    PyramidShape("flux", 1, 16, (1, 128, 128), about="FLUX, 1024x1024"),
    PyramidShape("pixels", 8, 3, (1, 1024, 1024), about="1024x1024 pixels"),
    PyramidShape("pixels32", 32, 3, (1, 1024, 1024), about="1024x1024 pixels, batch 32"),
    PyramidShape("small", 2, 4, (1, 16, 16), about="a call this small measures overhead"),
)
SHAPES = {s.name: s for s in _SHAPES}
GIVEN = {f"{s.name}-given": replace(s, name=f"{s.name}-given", noise="given") for s in _SHAPES if s.name in ("cpu", "in512", "small")}
LARGEST = {"cpu": 1 << 25}


def scaled(shape: PyramidShape, device: str) -> tuple[PyramidShape, str]:
    """As many samples as fit the device's budget."""
    largest = LARGEST.get(device)
    sample = shape.values // shape.batch
    if largest is None or shape.values <= largest or shape.batch == 1:
        return shape, ""
    return replace(shape, batch=max(1, largest // sample)), f"batch cut to {largest:,} values on {device}"


def flattened(result) -> list[torch.Tensor]:
    """The tensors of a nested result, one list."""
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in flattened(part)]
    return [result]


def planes(x):
    """[B, C, T, H, W] as the [B, C T, H, W] that the 2-D functions take; a view."""
    return x.flatten(1, 2)


def decompose(x, number):
    """The pyramid by interpolation, as the public code makes it."""
    size, x = x.shape, planes(x)
    gaussian = [x]
    for _ in range(number - 1):
        gaussian.insert(0, F.interpolate(gaussian[0], scale_factor=0.5, mode="bilinear", align_corners=False))
    parts = [gaussian[0]] + [
        fine - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False) for coarse, fine in zip(gaussian, gaussian[1:])
    ]
    return [p.view(*size[:3], *p.shape[-2:]) for p in parts]


def careful_decompose(x, number):
    """The same with average pooling, which costs less than interpolating down."""
    size, x = x.shape, planes(x)
    gaussian = [x]
    for _ in range(number - 1):
        gaussian.insert(0, F.avg_pool2d(gaussian[0], 2))
    parts = [gaussian[0]] + [
        fine - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False) for coarse, fine in zip(gaussian, gaussian[1:])
    ]
    return [p.view(*size[:3], *p.shape[-2:]) for p in parts]


def forward_only(device: str) -> bool:
    """For ``Peer.backward``."""
    return False


def peer(name, build, group="torch", times=8, **more) -> Peer:
    """A peer that takes about ``times`` times its levels in memory."""
    return Peer(name, build, group=group, memory=lambda shape, itemsize, mode: times * shape.values * itemsize, **more)
