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


def latent_times(frames, stride=4):
    """Latent times of a causal video autoencoder: the first frame alone, then groups of `stride` frames. 29 -> 8, 61 -> 16."""
    if frames < 1 or (frames - 1) % stride:
        raise ValueError(f"frames={frames}: expected 1 plus a multiple of {stride}")
    return 1 + (frames - 1) // stride


def encode_references(encode, *, fixed_view=None, freeze_time=None, views=None, times=None):
    """`References` in an autoencoder's latents.

    encode: a causal video encoder [B, F, 3, H, W] -> [B, T, C, h, w]. fixed_view [B, F, 3, H, W]: encoded as one video, it fills view 0.
    freeze_time [B, V, 3, H, W]: every frame is encoded as a video of its own length 1, for a latent of several frames cannot hold one
    moment; it fills time 0. Where both are given their common cell comes from the video; a causal encoder gives both the same.
    views, times: size of the grid (in latent times) along the axis that no reference shows.
    """
    if fixed_view is None and freeze_time is None:
        raise ValueError("fixed_view, freeze_time: both None, expected at least one reference")
    row = None if fixed_view is None else encode(fixed_view)
    column = None if freeze_time is None else torch.stack([encode(frame[:, None])[:, 0] for frame in freeze_time.unbind(1)], 1)
    views = column.shape[1] if column is not None else views
    times = row.shape[1] if row is not None else times
    if views is None or times is None:
        name = "views" if views is None else "times"
        raise ValueError(f"{name}: None, expected the size of the grid where only one reference is given")
    some = column if row is None else row
    frames = some.new_zeros(some.shape[0], views, times, *some.shape[2:])
    if column is not None:
        frames[:, :, 0] = column
    if row is not None:
        frames[:, 0] = row
    mode = "both" if row is not None and column is not None else "fixed_view" if column is None else "freeze_time"
    mask = reference_mask(mode, views, times, some.device)
    return References(frames, mask.expand(some.shape[0], -1, -1))
