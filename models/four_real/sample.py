"""Sampling a grid: Euler on the rectified flow, with classifier-free guidance when the scale is not 1 (arXiv 2506.18839, sampling).

The paper finds guidance marginal with both references and essential with one; here: scale 1 and 5. The negative evaluation has null
text and keeps the references when the model takes text, and null references when it does not.
"""

import torch

from ..shared.guidance import cfg_weights, guided
from ..shared.sample import euler, schedule


def default_scale(mode):
    """Guidance scale for a reference mode: 1 with both references, 5 with a single one."""
    return 1.0 if mode == "both" else 5.0


def conditions(references, text=None, null_text=None):
    """The named evaluations of guidance, "cond" and "null", as keyword arguments of `FourRealVideo`."""
    cond = {"frames": references.frames, "mask": references.mask, "text": text}
    null = dict(cond)
    if text is not None:
        null["text"] = torch.zeros_like(text) if null_text is None else null_text
    else:
        dropped = references.dropped()
        null.update(frames=dropped.frames, mask=dropped.mask)
    return {"cond": cond, "null": null}


@torch.no_grad()
def generate(model, references, *, steps=40, scale=1.0, shift=1.0, text=None, null_text=None, generator=None, callback=None, progress=False,
           autocast=None, impl=None):
    """Generate latents z [B, V, T, C, H, W] of every cell, the reference cells included, from noise drawn from `generator`.

    autocast: None or a dtype such as torch.bfloat16 for the network's evaluations; the state stays fp32.
    """
    named, weights = conditions(references, text, null_text), cfg_weights(scale)
    device = references.frames.device

    def network(z, sigma, **condition):
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return model(z, sigma, impl=impl, **condition).float()

    def velocity(z, sigma):
        return guided(network, z, sigma, named, weights)

    z = torch.randn(references.frames.shape, generator=generator).to(device)
    return euler(velocity, z, schedule(steps, shift), callback=callback, progress=progress)
