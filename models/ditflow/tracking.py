"""What a video's motion is, measured on its pixels alone: block matching, and motion fidelity of one video to another.

The tracker is light on purpose: whole-pixel matches of small blocks, no learned features. It sees textured blocks that move by a few pixels.
"""

import torch
import torch.nn.functional as F

SHARP = 0.02       # standard deviation of a block's pixels, in 0 .. 1, below which it has nothing to match
MATCHED = 0.35     # greatest part of a block's variance that a match may leave unexplained


def block_flow(frames, block=8, radius=8, stride=4):
    """(flow [F - 1, n, 2], valid [F - 1, n]): displacement (x, y) in pixels of n blocks from each frame to the next.

    frames: [F, 3, H, W] in 0 .. 1. Blocks lie on a grid of `stride` pixels; the best match is the least mean squared difference, taken relative to
    each block's own mean, among displacements up to `radius` that stay in the picture; ties go to the shortest. valid: the block has texture, and
    the match is one.
    """
    if frames.ndim != 4 or min(frames.shape[-2:]) < block or len(frames) < 2:
        raise ValueError(f"frames: shape {tuple(frames.shape)}, expected at least two frames [F, 3, H, W] of {block} pixels or more")
    height, width = frames.shape[-2:]
    tops, lefts = (torch.arange(0, side - block + 1, stride) for side in (height, width))
    corners = torch.cartesian_prod(tops, lefts)
    moves = torch.cartesian_prod(torch.arange(-radius, radius + 1), torch.arange(-radius, radius + 1))
    moves = moves[moves.square().sum(-1).argsort(stable=True)]
    flows, valid = [], []
    windows = F.unfold(frames.float(), block).unflatten(1, (3, -1))
    windows = windows - windows.mean(2, keepdim=True)
    windows = windows.flatten(1, 2).transpose(1, 2).unflatten(1, (height - block + 1, width - block + 1))      # [F, y, x, 3 * block ** 2]
    to = corners[:, None] + moves[None]
    inside = (to >= 0).all(-1) & (to[..., 0] <= height - block) & (to[..., 1] <= width - block)
    to = to.clamp(min=0).minimum(torch.tensor([height - block, width - block]))
    for now, after in zip(windows[:-1], windows[1:]):
        own = now[corners[:, 0], corners[:, 1]]
        error = torch.stack([(after[t[:, 0], t[:, 1]] - mine).square().mean(-1) for t, mine in zip(to, own)])
        least, best = error.masked_fill(~inside, float("inf")).min(1)
        flows.append(moves[best].flip(-1).float())
        spread = own.square().mean(-1)
        valid.append((spread.sqrt() > SHARP) & (least < MATCHED * spread))
    return torch.stack(flows), torch.stack(valid)


def mean_motion(frames, **options):
    """Median displacement (x, y) over blocks with texture, averaged over time, in pixels a frame; None without texture."""
    flow, valid = block_flow(frames, **options)
    steps = [f[v].median(0).values for f, v in zip(flow, valid) if v.any()]
    return torch.stack(steps).mean(0) if steps else None


def fidelity(made, reference, **options):
    """Motion fidelity after arXiv 2311.17009 with this tracker: for every moving block of `made`, the greatest cosine, averaged over time, between
    its displacements and those of a block of `reference`; the mean over blocks, -1 .. 1. None where one of them does not move.

    A path here is a place of the grid over time, not a tracked point.
    """
    paths = []
    for frames in (made, reference):
        flow, valid = block_flow(frames, **options)
        keep = valid.all(0) & (flow.norm(dim=-1) > 0).any(0)
        paths.append(F.normalize(flow[:, keep], dim=-1))
    if 0 in (paths[0].shape[1], paths[1].shape[1]):
        return None
    return float(torch.einsum("tnc,tmc->nm", *paths).div(len(paths[0])).amax(1).mean())


def agreement(flow, reference, mask):
    """Correlation of two flows [..., 2] over the entries of mask [...]: mean product of both components over the product of their sizes, -1 .. 1.

    Uncentred: a field of the same direction everywhere has something to agree with. 0 where one of them is at rest.
    """
    a, b = flow[mask].double(), reference[mask].double()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)) if len(a) else 0.0
