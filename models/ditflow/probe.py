"""Which block of a transformer carries motion: its attention motion flow compared with translations that are known."""

import dataclasses

import torch

from . import losses
from .config import GuidanceConfig
from .taps import QK
from .tracking import agreement

GOOD, USABLE = 0.6, 0.3      # correlations: alone; in a group of blocks


@dataclasses.dataclass(frozen=True)
class BlockScore:
    """correlation: of the hard flow with the true displacements, patches that stay in the picture, all pairs of different frames. soft: of the soft
    flow. hits: share of hard flows within a patch of the truth."""

    block: int
    correlation: float
    soft: float
    hits: float


def check_frames(name, latents, grid):
    """Raise ValueError unless latents of this grid (F, h, w) have frames to move between."""
    if grid[0] < 2:
        raise ValueError(f"{name}: shape {tuple(latents.shape)} has {grid[0]} frames of patches, expected at least 2")


def known_flow(grid, motion):
    """(flow [F * F, S, 2], inside [F * F, S]) of content that moves by motion = (x, y) patches from each frame to the next; inside: where it can be
    seen in both frames, pairs (i, i) left out."""
    frames, height, width = grid
    own = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).float().view(-1, 2)
    flows, inside = [], []
    for i in range(frames):
        for j in range(frames):
            move = torch.tensor([float(m) * (j - i) for m in motion])
            to = own + move
            flows.append(move.expand_as(own))
            inside.append(((to >= 0) & (to <= torch.tensor([width - 1, height - 1]))).all(-1) & (i != j))
    return torch.stack(flows), torch.stack(inside)


@torch.no_grad()
def score_blocks(adapter, clips, *, condition=None, t=0, config=GuidanceConfig(), blocks=None):
    """Compare the flow of blocks with known translations.

    Args:
        adapter: an `Adapter`. clips: pairs (clean latent [1, ...], motion (x, y) in patches from each latent frame to the next); pan a window over a
            still picture to make them (`window` does), by whole patches, in several directions.
        condition, t: of the passes. config: its tau and heads. blocks: which ones; None: all. One pass per clip serves them all.

    Returns:
        a list of `BlockScore`, best correlation first.

    Raises:
        ValueError: blocks that do not exist, or clips that do not move or have one frame of patches.
    """
    blocks = tuple(range(adapter.n_blocks)) if blocks is None else tuple(blocks)
    adapter.check_blocks("blocks", blocks)
    if not clips or all(tuple(motion) == (0, 0) for _, motion in clips):
        raise ValueError("clips: none of them moves, expected pairs (latent, (x, y)) with a motion")
    config = dataclasses.replace(config, pairs="all")
    found = {block: ([], [], [], []) for block in blocks}
    for latents, motion in clips:
        grid = adapter.grid(latents)
        check_frames("clips", latents, grid)
        truth, inside = known_flow(grid, motion)
        taps = adapter.features(latents, t, condition, {block: (QK,) for block in blocks})
        for (block, _), pair in taps.items():
            both = losses.flow_of(*pair, config, grid, mode="both", n_text=adapter.n_text(condition), text_position=adapter.text_position)
            for kept, x in zip(found[block], (*both, truth, inside)):
                kept.append(x.cpu())
    scores = []
    for block, kept in found.items():
        soft, hard, truth, inside = (torch.cat([x.flatten(0, 1) for x in parts]) for parts in kept)
        hits = ((hard - truth).norm(dim=-1) <= 1.0 + 1e-6)[inside].float().mean()
        scores.append(BlockScore(block, agreement(hard, truth, inside), agreement(soft, truth, inside), float(hits)))
    return sorted(scores, key=lambda s: -s.correlation)


def select_block(scores):
    """Guidance blocks for `GuidanceConfig`: the best one if its correlation is at least 0.6, else all with at least 0.3, else ValueError."""
    best = max(scores, key=lambda s: s.correlation)
    if best.correlation >= GOOD:
        return (best.block,)
    usable = tuple(sorted(s.block for s in scores if s.correlation >= USABLE))
    if not usable:
        raise ValueError(f"scores: best correlation {best.correlation:.2f} (block {best.block}), expected at least {USABLE}: no block carries motion")
    return usable


def window(picture, corner, motion, *, frames, size):
    """A clip [frames, C, h, w] of known motion from a still picture [C, H, W]: content moves by motion = (x, y) whole pixels a frame.

    corner: (x, y), top left of the window in the first frame; it moves the other way.
    """
    cut = []
    for f in range(frames):
        x, y = (c - f * m for c, m in zip(corner, motion))
        if x < 0 or y < 0 or x + size[1] > picture.shape[-1] or y + size[0] > picture.shape[-2]:
            raise ValueError(f"corner={tuple(corner)}, motion={tuple(motion)}: frame {f} leaves the picture of {tuple(picture.shape[-2:])} pixels")
        cut.append(picture[..., y : y + size[0], x : x + size[1]])
    return torch.stack(cut)
