"""Rectified flow (arXiv 2209.03003): a straight path from data to noise, its times, targets and estimates.

Time is the noise time sigma: 0 = data, 1 = noise. A paper that counts data time t (1 = data) uses sigma = 1 - t and the
opposite sign of the velocity. Every function takes sigma [B] (or anything that broadcasts from the left over x).
"""

import torch


def _like(sigma, x):
    return sigma.to(x.dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


class RectifiedFlow:
    """z_sigma = alpha * x0 + sigma * noise with alpha = 1 - sigma; the velocity is dz/dsigma = noise - x0."""

    @staticmethod
    def coefficients(sigma):
        """(alpha, sigma): the weights of data and noise on the path."""
        return 1 - sigma, sigma

    def interpolate(self, x0, noise, sigma):
        alpha, s = self.coefficients(_like(sigma, x0))
        return alpha * x0 + s * noise

    @staticmethod
    def velocity(x0, noise):
        """The training target, noise - x0."""
        return noise - x0

    @staticmethod
    def x0_from_velocity(z, velocity, sigma):
        return z - _like(sigma, z) * velocity

    @staticmethod
    def velocity_from_x0(z, x0, sigma, floor=0.0):
        """(z - x0) / sigma. floor: least divisor, so that a network that outputs x0 has a finite velocity near sigma = 0."""
        return (z - x0) / _like(sigma, z).clamp_min(floor)


def uniform_sigma(n, generator=None, device=None):
    """n noise times, uniform in (0, 1)."""
    return torch.rand(n, generator=generator, device=device)


def logit_normal_sigma(n, generator=None, mean=0.0, std=1.0, device=None):
    """sigmoid(mean + std * normal): the usual choice for flow models (arXiv 2403.03206, §3.1)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))


def shift_sigma(sigma, shift):
    """shift * s / (1 + (shift - 1) * s): more time near noise for shift > 1 (arXiv 2403.03206, §5.3.2). Tensors or floats."""
    if shift <= 0:
        raise ValueError(f"shift={shift}: expected a positive number")
    return shift * sigma / (1 + (shift - 1) * sigma)
