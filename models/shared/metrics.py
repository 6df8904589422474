"""Image metrics per frame: PSNR and SSIM."""

import torch
import torch.nn.functional as F


def psnr(image, truth):
    """Peak signal-to-noise ratio in dB over the last three axes (channels, height, width) of images in [0, 1]; at most 100 dB."""
    error = (image.double() - truth.double()).square().mean((-3, -2, -1))
    return (-10 * torch.log10(error.clamp_min(1e-10))).float()


def ssim(image, truth, *, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of images [..., C, H, W] in [0, 1]: Gaussian window, valid positions, mean per image.

    Constants K1 = 0.01, K2 = 0.03. H and W must be at least `window`.
    """
    *lead, C, H, W = image.shape
    if min(H, W) < window:
        raise ValueError(f"frame size {H}x{W}: expected at least the window, {window}x{window}")
    offset = torch.arange(window, dtype=torch.float64, device=image.device) - window // 2
    kernel = torch.exp(-offset.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()

    def blur(x):
        x = F.conv2d(x, kernel.view(1, 1, -1, 1))
        return F.conv2d(x, kernel.view(1, 1, 1, -1))

    x, y = (t.double().reshape(-1, 1, H, W) for t in (image, truth))
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.mean((-3, -2, -1)).view(*lead, C).mean(-1).float()


def frechet(a, b):
    """Fréchet distance of two sets of features [n, d], by their means and covariances, in float64 (as FID, arXiv 1706.08500).

    ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))``; the trace of the root is the sum of the roots of the eigenvalues of C^(1/2) C' C^(1/2).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: expected two of [n, d] with n >= 2")
    a, b = a.double(), b.double()
    one, other = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * shared)
