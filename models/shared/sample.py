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
