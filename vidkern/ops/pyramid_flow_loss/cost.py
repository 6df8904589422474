"""What the loss costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid import levels
from ..pyramid.cost import LARGE as PYRAMIDS_LARGE
from ..pyramid.cost import PYRAMIDS, Pyramid, value_counts


def value_counts_per_sample(sizes) -> list[int]:
    """Values of each level of one sample, coarse to fine."""
    return [n // sizes[0] for n in value_counts(sizes)]


def forward_flops(sizes, active: int) -> int:
    """Subtract, square, add."""
    return 3 * sum(value_counts(sizes)[:active])


def backward_flops(sizes, active: int) -> int:
    """Subtract, scale."""
    return 2 * sum(value_counts(sizes)[:active])


def forward_bytes(sizes, active: int, itemsize: int) -> int:
    """Prediction and target read once."""
    return 2 * sum(value_counts(sizes)[:active]) * itemsize


def backward_bytes(sizes, active: int, itemsize: int) -> int:
    """Prediction and target read, a gradient written."""
    return 3 * sum(value_counts(sizes)[:active]) * itemsize


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_flow_loss``: unit normal predictions; the targets are a smooth function of the index."""

    pyramid: Pyramid
    active: int | None = None
    masked: bool = False
    patch: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """What tests and reports call it."""
        extra = ["masked"] * self.masked + [f"active{self.active}"] * (self.active is not None) + ["tokens"] * bool(self.patch)
        return "_".join([self.pyramid.name, *extra])

    @property
    def flops(self) -> int:
        """Of the forward."""
        return forward_flops(self.pyramid.sizes, self.active or self.pyramid.levels)

    def _shapes(self):
        p = self.pyramid
        return [levels.token_shape(p.sizes, self.patch, p.pool_time)] if self.patch else p.level_shapes()

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The predictions."""
        return self.pyramid.draw(self._shapes(), dtype, device, seed)

    def targets(self, dtype, device="cpu") -> list[torch.Tensor]:
        """Smooth made-up targets."""
        result = []
        for shape in self._shapes():
            n = torch.Size(shape).numel()
            result.append(torch.cos(torch.arange(n, dtype=torch.float32, device=device) * 0.37).view(shape).to(dtype))
        return result

    def mask(self, device="cpu"):
        """Level s of sample b takes part unless (s + b) is odd and s > 0; None without ``masked``."""
        if not self.masked:
            return None
        b, s = (torch.arange(n, device=device) for n in (self.pyramid.batch, self.pyramid.levels))
        return (s == 0) | ((b[:, None] + s) % 2 == 0)

    def call(self, *pred, **more):
        """The op on ``tensors``, the means returned too."""
        import vidkern

        p, targets = self.pyramid, self.targets(pred[0].dtype, pred[0].device)
        active = self.mask(pred[0].device) if self.masked else self.active
        if self.patch:
            return vidkern.pyramid_flow_loss(
                pred[0], targets[0], active=active, return_levels=True, layout="tokens", patch=self.patch, shape=p.shape,
                levels=p.levels, factor=p.factor, **more,
            )  # fmt: skip
        return vidkern.pyramid_flow_loss(list(pred), targets, active=active, return_levels=True, **more)


_BY_NAME = {p.name: p for p in PYRAMIDS}
SAMPLES = (
    *(Sample(_BY_NAME[n]) for n in ("image", "video", "spacetime", "tiny", "odd", "wide", "one_level")),
    Sample(_BY_NAME["video"], active=2),
    Sample(_BY_NAME["video"], masked=True),
    Sample(_BY_NAME["image"], patch=(1, 2, 2)),
    Sample(_BY_NAME["spacetime"], patch=(1, 1, 2), masked=True),
)
LARGE = (*(Sample(p) for p in PYRAMIDS_LARGE[:3]), Sample(PYRAMIDS_LARGE[0], patch=(1, 1, 1), masked=True))
