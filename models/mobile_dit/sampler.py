"""Sampling: many Euler steps with guidance, or four without (arXiv 2507.13343; the few-step loop estimates the data and noises it again)."""

import torch

from ..shared.guidance import cfg_weights, guided
from ..shared.sample import denoise, schedule

FEW = 4


def times(steps=FEW, shift=1.0):
    """The noise times at which a few-step student is evaluated, from 1 down; without the 0 at the end."""
    return schedule(steps, shift)[:-1]


def velocity_of(model, text, guidance=1.0, text_mask=None):
    """A function (z, sigma) -> velocity: the model with its text, under classifier-free guidance unless guidance is 1."""
    if guidance == 1.0:
        return lambda z, sigma: model(z, sigma, text, text_mask=text_mask)
    conditions = {"cond": {"text": text, "text_mask": text_mask}, "null": {"text": torch.zeros_like(text), "text_mask": text_mask}}
    return lambda z, sigma: guided(model, z, sigma, conditions, cfg_weights(guidance))


@torch.no_grad()
def sample(model, shape, text, *, steps=FEW, shift=1.0, guidance=1.0, renoise=False, text_mask=None, generator=None, noise=None, callback=None,
           progress=False):
    """Latents of `shape` [B, C, T, H, W] for text [B, S, D].

    steps: 4 for a distilled student, which needs no guidance; 40 with guidance (6.0 at paper scale) for a model that is not distilled.
    renoise: fresh noise in every step instead of the noise that the current point implies; with the latter the loop is explicit Euler.
    noise: the starting point, else drawn from `generator`. callback(step, sigma, z, x0) after every step.
    """
    device = next(model.parameters()).device
    if noise is None:
        noise = torch.randn(shape, generator=generator, device=device)
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise: shape {tuple(noise.shape)}, expected {tuple(shape)}")
    return denoise(velocity_of(model, text, guidance, text_mask), noise, schedule(steps, shift), renoise=renoise, generator=generator,
                   callback=callback, progress=progress)
