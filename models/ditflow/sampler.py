"""The denoising loop with motion guidance, over an adapter and a sampler; the tiny model's sampler, Euler over a rectified flow."""

import math

import torch

from vidkern.errors import import_extra

from ..shared.sample import schedule


def dynamic_scale(scale, t, steps):
    """CogVideoX's dynamic guidance scale, as that model's own pipeline has it: t is the raw timestep although `steps` counts steps."""
    return 1 + scale * ((1 - math.cos(math.pi * ((steps - float(t)) / steps) ** 5.0)) / 2)


class FlowSampler:
    """Euler over z = (1 - sigma) x0 + sigma noise. timesteps: sigmas from 1 down, without the last one, 0."""

    def __init__(self, steps, shift=1.0):
        self.sigmas = schedule(steps, shift)
        self.timesteps = self.sigmas[:-1]

    @staticmethod
    def add_noise(x0, noise, sigma):
        return (1 - float(sigma)) * x0 + float(sigma) * noise

    def step(self, velocity, t, z):
        index = self.timesteps.index(float(t))
        return z + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


def transfer(guide, sampler, noise, *, condition=None, null=None, scale=1.0, dynamic=False, callback=None, progress=False, description="sampling"):
    """Generate a video under motion guidance.

    Args:
        guide: `MotionGuidance`, whose reference is extracted or that has tables. With ``share=0`` it samples plainly.
        sampler: has timesteps and ``step(prediction, t, z)``.
        noise: [1, ...], where sampling starts.
        condition, null: of the prompt and of no prompt, as the adapter takes them. scale: of classifier-free guidance, two passes a step; 1: none.
        dynamic: scale by `dynamic_scale` at every step.
        callback: called with (index, t, z) after every step.

    Returns:
        the latent at the end.
    """
    adapter, z, steps = guide.adapter, noise, len(sampler.timesteps)
    if scale != 1.0 and null is None:
        raise ValueError(f"scale={scale}: expected null, the condition of no prompt, for a scale other than 1")
    guide.begin(sampler.timesteps, noise=noise, condition=condition)
    each = enumerate(sampler.timesteps)
    if progress:
        each = import_extra("tqdm", "a progress bar").tqdm(each, total=steps, desc=description, leave=False)
    with guide, torch.no_grad():
        for index, t in each:
            z = guide.step(z, t)
            made = adapter.forward(z.to(adapter.dtype), t, condition).float()
            if null is not None and scale != 1.0:
                weight = dynamic_scale(scale, t, steps) if dynamic else scale
                plain = adapter.forward(z.to(adapter.dtype), t, null).float()
                made = plain + weight * (made - plain)
            z = sampler.step(made, t, z)
            if callback is not None:
                callback(index, t, z)
    return z
