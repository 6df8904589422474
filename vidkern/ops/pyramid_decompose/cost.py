"""What decomposing costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import PYRAMIDS, Pyramid, filter_flops, value_counts


def forward_flops(sizes) -> int:
    return filter_flops(sizes) + sum(value_counts(sizes))


def backward_flops(sizes) -> int:
    return filter_flops(sizes) + sum(value_counts(sizes))


def forward_bytes(sizes, itemsize: int) -> int:
    """The volume read once, every level written once."""
    counts = value_counts(sizes)
    return (counts[-1] + sum(counts)) * itemsize


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_decompose``: a unit normal volume."""

    pyramid: Pyramid
    std: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        return self.pyramid.name + ("_std" if self.std else "")

    @property
    def flops(self) -> int:
        return forward_flops(self.pyramid.sizes)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        return self.pyramid.draw([self.pyramid.shape], dtype, device, seed)

    def call(self, x, **more):
        import vidkern

        return vidkern.pyramid_decompose(x, levels=self.pyramid.levels, std=self.std, **self.pyramid.options, **more)


SAMPLES = (*(Sample(p) for p in PYRAMIDS), Sample(PYRAMIDS[0], std=(0.5, 3.0)))
