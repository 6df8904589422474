"""An output layer for toy sizes: part of x0 is a per-pixel mixture of the cell's two references, chosen by the network.

A few minutes of training do not teach a small transformer to redraw every pixel, but they do teach it *where* to look: the cell's own
freeze-time frame is right wherever nothing moved, its fixed-view frame, moved a little, wherever something did. The network therefore
outputs, beside x0's own channels, one logit per pixel for the freeze-time frame and one for each of a few shifts of the fixed-view
frame. It remains a prediction of x0 by the denoising network; only the last layer's form is fixed.
"""

import math

import torch
import torch.nn.functional as F

SHIFTS = ((0, 0),) + tuple((dy, dx) for dy in (-4, -2, 0, 2, 4) for dx in (-6, -3, 0, 3, 6) if dy or dx)
GAIN = 4.0  # logits are the output of a zero-initialised layer: a gain lets small weights make a decision


def shifted(frames, shifts):
    """frames [..., H, W] moved by each (dy, dx) pixels, edges repeated: the pixel at (y, x) shows what was at (y + dy, x + dx)."""
    pad = max(max(abs(dy), abs(dx)) for dy, dx in shifts)
    H, W = frames.shape[-2:]
    padded = F.pad(frames.reshape(-1, 1, H, W), (pad,) * 4, mode="replicate").view(*frames.shape[:-2], H + 2 * pad, W + 2 * pad)
    return [padded[..., pad + dy : pad + dy + H, pad + dx : pad + dx + W] for dy, dx in shifts]


def mixture(logits, references, shifts):
    """Mixture of references, and where it is defined.

    logits [B, V, T, 1 + len(shifts), H, W]; zero logits give half the freeze-time frame and half the mean of the shifted fixed-view
    frames. Returns (pixels [B, V, T, C, H, W], bool [B, V, T]: cells that are no reference and have both).
    """
    (row, has_row), (column, has_column), _ = references.spread()
    prior = torch.zeros(1 + len(shifts), device=logits.device)
    prior[0] = math.log(len(shifts))
    weights = (GAIN * logits.float() + prior[:, None, None]).softmax(3)
    pixels = weights[:, :, :, :1] * column
    for i, candidate in enumerate(shifted(row[:, :1], shifts), start=1):
        pixels = pixels + weights[:, :, :, i : i + 1] * candidate
    return pixels, has_row & has_column & ~references.mask
