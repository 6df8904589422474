"""Volumes whose sizes do not divide: repeat the last values before decomposing, cut them off after merging."""

from __future__ import annotations

import torch.nn.functional as F

from . import levels as checks

__all__ = ["pyramid_crop", "pyramid_pad"]


def pyramid_pad(x, *, levels=2, kind="laplacian", factor=(1, 2, 2)):
    """Repeat the last frame, row and column until every pooled axis divides.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W].
        levels, kind, factor: of the pyramid that is to follow.

    Returns:
        ``x`` itself when it divides already, else a larger tensor; :func:`pyramid_crop` undoes it.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    volume = checks.volume("x", x)
    need = checks.divisor(checks.count("levels", levels), kind)
    pool_time = checks.rules(kind, factor)
    t, h, w = ((-n) % need for n in volume.shape[2:])
    t = t if pool_time else 0
    if not (t or h or w):
        return x
    padded = F.pad(volume, (0, w, 0, h, 0, t), mode="replicate")
    return padded.squeeze(2) if x.dim() == 4 else padded


def pyramid_crop(x, size):
    """The first ``size`` values along the last axes: ``pyramid_crop(merged, original.shape[2:])``.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W].
        size: (H, W) or (T, H, W).

    Returns:
        a view of ``x``.

    Raises:
        ValueError: ``size`` has another number of axes or exceeds ``x``.
    """
    size = tuple(size)
    if len(size) != x.dim() - 2 or any(n > have or n < 1 for n, have in zip(size, x.shape[2:])):
        raise ValueError(f"size: {size!r}, expected {x.dim() - 2} numbers from 1 to those of {tuple(x.shape[2:])}")
    return x[(..., *(slice(n) for n in size))]
