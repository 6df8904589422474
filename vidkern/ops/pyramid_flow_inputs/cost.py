"""What making the inputs costs, and their named samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..pyramid.cost import LARGE as PYRAMIDS_LARGE
from ..pyramid.cost import PYRAMIDS, Pyramid, filter_flops, value_counts


def forward_flops(sizes, active: int) -> int:
    """The filters, and six operations per value of an active level; the noise is not counted."""
    return filter_flops(sizes) + 6 * sum(value_counts(sizes)[:active])


def backward_flops(sizes, active: int) -> int:
    """The adjoint of the filters, and the same operations per value."""
    return filter_flops(sizes) + 6 * sum(value_counts(sizes)[:active])


def forward_bytes(sizes, active: int, itemsize: int, *, noise: bool = False, target: bool = True) -> int:
    """The volume read once; z, v and the noise of the active levels moved once."""
    counts = value_counts(sizes)
    return (counts[-1] + (1 + target + noise) * sum(counts[:active])) * itemsize


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_flow_inputs``: a unit normal volume, made-up times, a fixed seed."""

    pyramid: Pyramid
    direction: str = "data"
    active: int | None = None
    masked: bool = False
    given_noise: bool = False
    given_levels: bool = False
    patch: tuple[int, int, int] | None = None
    inactive: str = "drop"
    std: tuple[float, ...] | None = None
    seed: int = 1234567890123

    @property
    def name(self) -> str:
        """What tests and reports call it."""
        extra = [self.direction] * (self.direction != "data") + [
            n for n in ("masked", "given_noise", "given_levels", "std") if getattr(self, n)
        ]
        extra += [f"active{self.active}"] * (self.active is not None) + ["tokens"] * bool(self.patch)
        extra += [self.inactive] * (self.inactive != "drop")
        return "_".join([self.pyramid.name, *extra])

    @property
    def flops(self) -> int:
        """Of the forward."""
        return forward_flops(self.pyramid.sizes, self.active or self.pyramid.levels)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The differentiable inputs."""
        shapes = self.pyramid.level_shapes() if self.given_levels else [self.pyramid.shape]
        return self.pyramid.draw(shapes, dtype, device, seed)

    def coefficients(self, device="cpu") -> torch.Tensor:
        """The table, float32 [B, S, 4]."""
        import vidkern

        return vidkern.flow_coefficients(self.pyramid.times(self.direction, device), direction=self.direction)

    def mask(self, device="cpu") -> torch.Tensor | None:
        """Level s of sample b takes part unless (s + b) is odd and s > 0; None without ``masked``."""
        if not self.masked:
            return None
        b, s = (torch.arange(n, device=device) for n in (self.pyramid.batch, self.pyramid.levels))
        return (s == 0) | ((b[:, None] + s) % 2 == 0)

    def noise(self, dtype, device="cpu"):
        """Smooth made-up values in place of noise (a fixed function of the index, so that tracing can see through it)."""
        if not self.given_noise:
            return None
        result = []
        for shape in self.pyramid.level_shapes()[: self.active or self.pyramid.levels]:
            n = torch.Size(shape).numel()
            result.append(torch.sin(torch.arange(n, dtype=torch.float32, device=device) * 1.7).view(shape).to(dtype))
        return result

    def call(self, *x, **more):
        """The op on ``tensors``."""
        import vidkern

        p, device = self.pyramid, x[0].device
        active = self.mask(device) if self.masked else self.active
        if self.patch:
            more = {"layout": "tokens", "patch": self.patch, **more}
        return vidkern.pyramid_flow_inputs(
            list(x) if self.given_levels else x[0], self.coefficients(device), levels=p.levels, seed=self.seed, offset=7,
            first_sample=3, noise=self.noise(x[0].dtype, device), active=active, std=self.std, inactive=self.inactive, **p.options, **more,
        )  # fmt: skip


_BY_NAME = {p.name: p for p in PYRAMIDS}
SAMPLES = (
    *(Sample(_BY_NAME[n]) for n in ("image", "video", "spacetime", "tiny", "odd", "haar_spacetime", "dct", "one_level")),
    Sample(_BY_NAME["video"], direction="noise", given_noise=True),
    Sample(_BY_NAME["video"], active=2),
    Sample(_BY_NAME["video"], active=1, inactive="zero"),
    Sample(_BY_NAME["video"], masked=True),
    Sample(_BY_NAME["spacetime"], masked=True, direction="noise", std=(0.5, 3.0)),
    Sample(_BY_NAME["odd"], given_levels=True, masked=True),
    Sample(_BY_NAME["odd"], given_levels=True, given_noise=True),
    Sample(_BY_NAME["image"], patch=(1, 1, 1)),
    Sample(_BY_NAME["video"], patch=(1, 2, 3), active=2, inactive="zero"),
    Sample(_BY_NAME["spacetime"], patch=(1, 2, 2), given_noise=True),
    Sample(replace(_BY_NAME["image"], name="image_wide", size=(8, 40)), patch=(1, 4, 5), masked=True),
)
LARGE = (
    *(Sample(p) for p in PYRAMIDS_LARGE),
    Sample(PYRAMIDS_LARGE[0], patch=(1, 1, 1), masked=True),
    Sample(PYRAMIDS_LARGE[2], direction="noise", given_noise=True, active=2),
)
