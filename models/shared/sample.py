"""Euler sampling of a flow over a schedule kept on the host (no device sync per step)."""

import torch

from vidkern.errors import import_extra

from .flow import shift_sigma


def schedule(steps, shift=1.0):
    """steps + 1 noise times from 1 down to 0, evenly spaced and then shifted (`flow.shift_sigma`); a tuple of floats."""
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    return tuple(shift_sigma(1 - i / steps, shift) for i in range(steps + 1))


def euler(velocity, z, sigmas, *, callback=None, progress=False, description="sampling"):
    """Integrate dz/dsigma = velocity(z, sigma [B]) along `sigmas`, a sequence of floats (1 = noise, 0 = data).

    callback(step, sigma, z, x0): called after every step with the new state and the estimate of the data before it, for
    previews; what it returns is ignored. Returns the state at the last sigma, in z's dtype.
    """
    steps = list(zip(sigmas[:-1], sigmas[1:]))
    if progress:
        steps = import_extra("tqdm", "a progress bar").tqdm(steps, desc=description, leave=False)
    for index, (now, after) in enumerate(steps):
        v = velocity(z, torch.full((z.shape[0],), now, device=z.device))
        estimate = z - now * v if callback is not None else None
        z = z + (after - now) * v
        if callback is not None:
            callback(index, after, z, estimate)
    return z


def denoise(velocity, z, sigmas, *, renoise=False, generator=None, callback=None, progress=False, description="sampling"):
    """Estimate the data and noise it to the next time, along `sigmas` (floats, 1 = noise, the last one 0).

    The noise is the one that the current point implies, ``(z - (1 - sigma) * x0) / sigma``, which makes this explicit Euler; with `renoise` it
    is drawn anew in every step from `generator` (few-step students). callback: as in `euler`. Returns the last estimate, in z's dtype.
    """
    if min(sigmas[:-1]) <= 0 or sigmas[-1] != 0:
        raise ValueError(f"sigmas={tuple(sigmas)}: expected positive times and a 0 at the end")
    steps = list(zip(sigmas[:-1], sigmas[1:]))
    if progress:
        steps = import_extra("tqdm", "a progress bar").tqdm(steps, desc=description, leave=False)
    for index, (now, after) in enumerate(steps):
        x0 = z - now * velocity(z, torch.full((z.shape[0],), now, device=z.device))
        if renoise:
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        else:
            noise = (z - (1 - now) * x0) / now
        z = (1 - after) * x0 + after * noise
        if callback is not None:
            callback(index, after, z, x0)
    return z
