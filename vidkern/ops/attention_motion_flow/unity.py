"""What float16 gradients of logits are divided by."""

from __future__ import annotations

import torch


def unity_of(dmean, dlse, grid) -> torch.Tensor:
    """A power of two that no gradient of a logit is far above, float32 on the device: float16 would lose large and small ones. ``dmean`` or
    ``dlse`` may be None, not both."""
    largest = [g.abs().amax().float() * reach for g, reach in ((dmean, max(grid[1:])), (dlse, 1)) if g is not None]
    largest = torch.stack(largest).amax()
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where((largest > 0) & largest.isfinite(), power, 1.0)
