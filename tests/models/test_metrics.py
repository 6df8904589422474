"""PSNR and SSIM against plain loops."""

import math

import pytest
import torch

from vidkern.models.shared import psnr, ssim


def test_psnr():
    truth = torch.rand(2, 3, 8, 8)
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(truth, truth).tolist() == [100.0, 100.0]


def test_ssim_against_a_loop_over_windows():
    x, y = torch.rand(1, 13, 12, dtype=torch.float64), torch.rand(1, 13, 12, dtype=torch.float64)
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    w = torch.tensor(weights, dtype=torch.float64)
    w /= w.sum()
    scores = []
    for top in range(3):
        for left in range(2):
            a, b = x[0, top : top + 11, left : left + 11], y[0, top : top + 11, left : left + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            scores.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(torch.stack(scores).mean().item(), abs=1e-6)
    assert ssim(x, x).item() == pytest.approx(1.0) and ssim(torch.rand(2, 3, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match="8x16: expected at least the window"):
        ssim(torch.rand(1, 8, 16), torch.rand(1, 8, 16))
