"""What stage inputs cost, and their named samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import LARGE as PYRAMIDS_LARGE
from ..pyramid.cost import PYRAMIDS, Pyramid, filter_flops, value_counts


def forward_flops(sizes, stage: int) -> int:
    """Halving data and noise, and ten operations per value of the stage."""
    return 2 * filter_flops(sizes) + 10 * value_counts(sizes)[stage]


def backward_flops(sizes, stage: int) -> int:
    """The adjoint of the filters, and the same operations per value."""
    return filter_flops(sizes) + 10 * value_counts(sizes)[stage]


def forward_bytes(sizes, stage: int, itemsize: int, *, noise: bool = False) -> int:
    """Data (and noise, if given) read once, z and v written."""
    counts = value_counts(sizes)
    return ((1 + noise) * counts[-1] + 2 * counts[stage]) * itemsize


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_stage_inputs``: a unit normal volume, made-up positions, a fixed seed."""

    pyramid: Pyramid
    stage: int
    given_noise: bool = False

    @property
    def name(self) -> str:
        """What tests and reports call it."""
        return f"{self.pyramid.name}_stage{self.stage}" + "_given_noise" * self.given_noise

    @property
    def flops(self) -> int:
        """Of the forward."""
        return forward_flops(self.pyramid.sizes, self.stage)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The differentiable inputs."""
        return self.pyramid.draw([self.pyramid.shape], dtype, device, seed)

    def table(self, device="cpu") -> torch.Tensor:
        """The table that the op reads."""
        import vidkern

        ends = vidkern.pyramid_stages(self.pyramid.levels)[self.stage]
        r = (torch.arange(self.pyramid.batch, dtype=torch.float32, device=device) + 0.4) / self.pyramid.batch
        return torch.stack((torch.full_like(r, ends.start), torch.full_like(r, ends.end), r), -1)

    def noise(self, x):
        """Smooth made-up values in place of noise, or None."""
        if not self.given_noise:
            return None
        return torch.sin(torch.arange(x.numel(), dtype=torch.float32, device=x.device) * 1.7).view(x.shape).to(x.dtype)

    def call(self, x, **more):
        """The op on ``tensors``."""
        import vidkern

        return vidkern.pyramid_stage_inputs(
            x, self.table(x.device), stages=self.pyramid.levels, stage=self.stage, seed=99, offset=1, first_sample=2,
            noise=self.noise(x), **more,
        )


_BY_NAME = {p.name: p for p in PYRAMIDS}
SAMPLES = (
    Sample(_BY_NAME["image"], 1),
    Sample(_BY_NAME["image"], 0),
    *(Sample(_BY_NAME["video"], k) for k in range(3)),
    Sample(_BY_NAME["odd"], 1, given_noise=True),
    Sample(_BY_NAME["wide"], 2),
    Sample(_BY_NAME["one_level"], 0),
    Sample(_BY_NAME["haar"], 1, given_noise=True),
)
LARGE = (
    Sample(PYRAMIDS_LARGE[0], 1),
    *(Sample(PYRAMIDS_LARGE[2], k) for k in range(3)),
    Sample(PYRAMIDS_LARGE[4], 1),
    Sample(PYRAMIDS_LARGE[1], 1, given_noise=True),
)
