"""The training loss: rectified flow on all cells of the grid at one noise time (arXiv 2506.18839, training; flow details are ours)."""

import dataclasses

import torch

from ..shared.flow import RectifiedFlow, logit_normal_sigma


@dataclasses.dataclass(frozen=True)
class FourRealLoss:
    """``loss(model, z0, references, generator)`` -> scalar.

    One noise time per sample, shared by all its cells: sigmoid(sigma_mean + sigma_std * normal). A velocity model is trained on the
    velocity, mean |f - (noise - z0)|^2; a model that outputs x0 on mean |f - z0|^2, which is the velocity error times sigma^2 (its
    velocity is (z - f) / sigma). reference_weight: weight of the cells that are given. drop: share of samples that lose their
    references, for classifier-free guidance.
    """

    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    reference_weight: float = 1.0
    drop: float = 0.0

    def __call__(self, model, z0, references, generator=None, **kwargs):
        B = z0.shape[0]
        sigma = logit_normal_sigma(B, generator, self.sigma_mean, self.sigma_std).to(z0.device)
        noise = torch.randn(z0.shape, generator=generator).to(z0)
        frames, mask = references.frames, references.mask
        if self.drop:
            kept = (torch.rand(B, generator=generator) >= self.drop).to(z0.device)
            frames, mask = frames * kept.view(-1, 1, 1, 1, 1, 1), mask & kept.view(-1, 1, 1)
        out = model.output(RectifiedFlow().interpolate(z0, noise, sigma), sigma, frames, mask, **kwargs).float()
        target = z0 if model.config.prediction == "x0" else RectifiedFlow.velocity(z0, noise)
        weight = torch.where(references.mask, self.reference_weight, 1.0)[..., None, None, None]
        return ((out - target).square() * weight).mean()
