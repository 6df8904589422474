"""What the transition costs, and its named sample inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pyramid.cost import value_counts


def forward_flops(sizes) -> int:
    """Block mean, difference, and the weighted sum; the noise is not counted."""
    return 5 * value_counts(sizes)[1]


def backward_flops(sizes) -> int:
    """The sum over every block, scaled."""
    return 2 * value_counts(sizes)[1]


def forward_bytes(sizes, itemsize: int, *, noise: bool = False) -> int:
    """The coarse state (and the noise, if given) read, the fine one written."""
    coarse, fine = value_counts(sizes)
    return (coarse + (1 + noise) * fine) * itemsize


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
        """Of the state."""
        return (self.batch, self.channels, *self.size)

    @property
    def flops(self) -> int:
        """Of the forward."""
        b, c, t, h, w = (*self.shape[:2], *((1,) * (5 - len(self.shape))), *self.size)
        return forward_flops([b, c, t, h, w, t, 2 * h, 2 * w])

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
        """The differentiable inputs."""
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(self.shape, generator=generator, device=device).to(dtype)]

    def call(self, z, **more):
        """The op on ``tensors``."""
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
LARGE = (
    Sample("latents_512", (32, 32), batch=8, channels=16),
    Sample("latents_81_frames", (21, 45, 80), batch=1, channels=16, per_sample=True),
    Sample("pixels_1024", (512, 512), batch=1, given_noise=True),
)
