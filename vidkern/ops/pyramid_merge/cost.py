"""What merging costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import LARGE as PYRAMIDS_LARGE
from ..pyramid.cost import PYRAMIDS, FilterSample, pass_bytes, pass_flops

forward_flops = backward_flops = pass_flops
forward_bytes = pass_bytes


@dataclass(frozen=True)
class Sample(FilterSample):
    """Inputs of ``pyramid_merge``: unit normal levels."""

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The levels, coarse to fine."""
        return self.pyramid.draw(self.pyramid.level_shapes(), dtype, device, seed)

    def call(self, *parts, **more):
        """The op on ``tensors``."""
        import vidkern

        return vidkern.pyramid_merge(list(parts), std=self.std, **self.pyramid.options, **more)


SAMPLES = (*(Sample(p) for p in PYRAMIDS), Sample(PYRAMIDS[0], std=(0.5, 3.0)))
LARGE = tuple(Sample(p) for p in PYRAMIDS_LARGE)
