"""What the transition costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import value_counts


def forward_flops(sizes) -> int:
    """Block mean, difference, and the weighted sum; the noise is not counted."""
    return 5 * value_counts(sizes)[1]


def backward_flops(sizes) -> int:
    return 2 * value_counts(sizes)[1]


def forward_bytes(sizes, itemsize: int) -> int:
    """The coarse state read, the fine one written."""
    return sum(value_counts(sizes)) * itemsize


@dataclass(frozen=True)
class Sample:
    """Inputs of ``pyramid_stage_transition``: a unit normal state [B, C, *size]."""

    name: str
    size: tuple[int, ...]
    batch: int = 2
    channels: int = 3
    given_noise: bool = False
    per_sample: bool = False

    @property
    def shape(self):
        return (self.batch, self.channels, *self.size)

    @property
    def flops(self) -> int:
        b, c, t, h, w = (*self.shape[:2], *((1,) * (5 - len(self.shape))), *self.size)
        return forward_flops([b, c, t, h, w, t, 2 * h, 2 * w])

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(self.shape, generator=generator, device=device).to(dtype)]

    def call(self, z, **more):
        import vidkern

        stage = vidkern.pyramid_stages(3)[1]
        scale, spread, noise = stage.scale, stage.spread, None
        if self.per_sample:
            ramp = torch.arange(self.batch, dtype=torch.float32, device=z.device)
            scale, spread = 0.5 + ramp, 1 - 0.25 * ramp
        if self.given_noise:
            shape = (*z.shape[:-2], 2 * z.shape[-2], 2 * z.shape[-1])
            noise = torch.sin(torch.arange(4 * z.numel(), dtype=torch.float32, device=z.device) * 1.7).view(shape).to(z.dtype)
        return vidkern.pyramid_stage_transition(z, scale, spread, level=1, seed=5, offset=2, first_sample=1, noise=noise, **more)


SAMPLES = (
    Sample("image", (8, 8)),
    Sample("video", (2, 7, 20), per_sample=True),
    Sample("given_noise", (9, 33), given_noise=True),
    Sample("tiny", (1, 1), batch=1, channels=1),
    Sample("wide", (3, 515), batch=1, channels=2),
)
