"""What a sampler step costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import LARGE as PYRAMIDS_LARGE
from ..pyramid.cost import PYRAMIDS, Pyramid, value_counts


def forward_flops(sizes, active: int, guided: bool) -> int:
    """Guidance three operations, Euler two."""
    return (5 if guided else 2) * sum(value_counts(sizes)[:active])


def backward_flops(sizes, active: int) -> int:
    """The sum of the two gradients, and a product for each velocity."""
    return 6 * sum(value_counts(sizes)[:active])


def forward_bytes(sizes, active: int, itemsize: int, *, model_itemsize: int, guided: bool = True, merge: bool = False) -> int:
    """State read and written, velocities read, the next input written; with ``merge`` the volume is written instead."""
    moved = sum(value_counts(sizes)[:active])
    reads = itemsize + (2 if guided else 1) * model_itemsize
    return moved * reads + (value_counts(sizes)[-1] * itemsize if merge else moved * (itemsize + model_itemsize))


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_flow_step``: unit normal states and velocities, made-up steps."""

    pyramid: Pyramid
    active: int | None = None
    next_active: int | None = None
    guided: bool = True
    merge: bool = False
    patch: tuple[int, int, int] | None = None
    inactive: str = "drop"
    std: tuple[float, ...] | None = None
    per_sample: bool = True

    @property
    def name(self) -> str:
        """What tests and reports call it."""
        extra = [n for n in ("merge", "std") if getattr(self, n)] + ["unguided"] * (not self.guided)
        extra += [f"active{self.active}to{self.next_active}"] * (self.active is not None) + ["tokens"] * bool(self.patch)
        return "_".join([self.pyramid.name, *extra, *[self.inactive] * (self.inactive != "drop")])

    @property
    def moved(self) -> int:
        """How many levels move."""
        return self.active or self.pyramid.levels

    @property
    def flops(self) -> int:
        """Of the forward."""
        return forward_flops(self.pyramid.sizes, self.moved, self.guided)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The state of every level, then the conditional and the unconditional velocities of the active ones."""
        shapes = self.pyramid.level_shapes()
        return self.pyramid.draw([*shapes, *shapes[: self.moved] * (2 if self.guided else 1)], dtype, device, seed)

    def table(self, device="cpu"):
        """(dt, guidance): tensors [B, S], or lists of numbers."""
        p = self.pyramid
        if not self.per_sample:
            return [0.1 + 0.05 * s for s in range(p.levels)], [1.5 + s for s in range(p.levels)]
        return p.times(device=device) / 4, 1 + p.times(device=device)

    def call(self, *tensors, **more):
        """The op on ``tensors``."""
        import vidkern

        p = self.pyramid
        n, m = p.levels, self.moved
        z, cond, uncond = list(tensors[:n]), list(tensors[n : n + m]), list(tensors[n + m :]) or None
        dt, guidance = self.table(tensors[0].device)
        if self.patch:
            more = {"layout": "tokens", "patch": self.patch, **more}
        return vidkern.pyramid_flow_step(
            z, cond, uncond, dt=dt, guidance=guidance, active=self.active, next_active=self.next_active, inactive=self.inactive,
            merge=self.merge, std=self.std, **p.options, **more,
        )  # fmt: skip


_BY_NAME = {p.name: p for p in PYRAMIDS}
SAMPLES = (
    *(Sample(_BY_NAME[n]) for n in ("image", "video", "tiny", "one_level")),
    *(Sample(_BY_NAME[n], merge=True) for n in ("image", "spacetime", "odd", "haar", "dct")),
    Sample(_BY_NAME["image"], merge=True, std=(0.5, 3.0), guided=False),
    Sample(_BY_NAME["video"], active=1, next_active=2, guided=False),
    Sample(_BY_NAME["odd"], active=1, next_active=2, per_sample=False),
    Sample(_BY_NAME["video"], active=2, next_active=1, inactive="zero"),
    Sample(_BY_NAME["video"], patch=(1, 2, 3), active=1, next_active=2, inactive="zero"),
    Sample(_BY_NAME["spacetime"], patch=(1, 2, 2)),
)
LARGE = (
    *(Sample(p, merge=merge) for p in PYRAMIDS_LARGE[:3] for merge in (False, True)),
    *(Sample(p, merge=True) for p in PYRAMIDS_LARGE[3:]),
    Sample(PYRAMIDS_LARGE[0], patch=(1, 1, 1)),
)
