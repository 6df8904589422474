"""References: which cells of a view x time grid are given, and with what content (arXiv 2506.18839, "conditioning").

A fixed-view video fills all times of view 0, a freeze-time video all views of time 0; "both" gives the union, "none" nothing.
"""

import dataclasses

import torch

MODES = ("fixed_view", "freeze_time", "both", "none")


def reference_mask(mode, views, times, device=None):
    """bool [V, T], True where the cell is a reference."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {MODES}")
    mask = torch.zeros(views, times, dtype=torch.bool, device=device)
    if mode in ("fixed_view", "both"):
        mask[0] = True
    if mode in ("freeze_time", "both"):
        mask[:, 0] = True
    return mask


def draw_modes(n, generator=None, probabilities=(0.2, 0.2, 0.6, 0.0)):
    """n mode names with the given probabilities of fixed_view, freeze_time, both, none (the mix is ours; the paper gives none)."""
    picks = torch.multinomial(torch.tensor(probabilities), n, replacement=True, generator=generator)
    return [MODES[i] for i in picks.tolist()]


@dataclasses.dataclass(frozen=True)
class References:
    """frames [B, V, T, C, H, W]: clean content, zero wherever the cell is not a reference. mask: bool [B, V, T]."""

    frames: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def from_grid(cls, grid, modes):
        """Take the references of a full grid [B, V, T, C, H, W]; modes: one name per sample, or one for all."""
        B, V, T = grid.shape[:3]
        modes = [modes] * B if isinstance(modes, str) else modes
        mask = torch.stack([reference_mask(mode, V, T, grid.device) for mode in modes])
        return cls(grid * mask[..., None, None, None], mask)

    def dropped(self):
        """Null references of the same shape, for classifier-free guidance."""
        return References(torch.zeros_like(self.frames), torch.zeros_like(self.mask))

    def spread(self):
        """Bring references to the cells that share their view or time: three (frames, mask) pairs, each shaped as the grid.

        They hold the frame of the same time in view 0, the frame of the same view at time 0, and the corner
        cell (0, 0). Where that frame is not a reference it is zero and its mask False.
        """
        corners = ((slice(0, 1), slice(None)), (slice(None), slice(0, 1)), (slice(0, 1), slice(0, 1)))
        return [(self.frames[:, v, t].expand_as(self.frames), self.mask[:, v, t].expand_as(self.mask)) for v, t in corners]
