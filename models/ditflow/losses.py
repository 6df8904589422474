"""How far the motion of a pass is from the reference's: attention motion flow, and the feature losses that DiTFlow is compared with."""

import torch
import torch.nn.functional as F

import vidkern

EPS = 1e-8


def flow_of(q, k, config, grid, *, mode="hard", n_text=0, text_position="front"):
    """Attention motion flow [P, S, 2] (x, y in patches) of queries and keys [B, L, H, D], of the last sample; by the settings of `config`."""
    return vidkern.attention_motion_flow(q, k, grid=grid, layout="blhd", tau=config.tau, heads=config.heads, mode=mode, pairs=config.pairs,
                                         n_text=n_text, text_position=text_position)


def amf(q, k, reference, config, grid, *, n_text=0, text_position="front"):
    """Mean squared error of the soft flow over the patches that move in `reference` [P, S, 2], or over all without `config.threshold`.

    Half of the squared distance per (pair, patch); 0 where nothing moves. The hard flow of the reference, the soft one of the pass (section 3.2).
    """
    mask = None if config.threshold else torch.ones(reference.shape[:-1], dtype=torch.bool, device=reference.device)
    return vidkern.amf_loss(q, k, reference, mask, grid=grid, layout="blhd", tau=config.tau, heads=config.heads, pairs=config.pairs,
                            n_text=n_text, text_position=text_position)


def frames_of(hidden, grid):
    """Block outputs [B, N, D] of the last sample as [F, h * w, D] in fp32."""
    return hidden[-1].float().unflatten(0, (grid[0], grid[1] * grid[2]))


def smm(hidden, reference, config, grid):
    """Space-time feature loss (arXiv 2311.17009): differences of the frames' mean features, to every frame in turn, compared by cosine.

    hidden, reference: [B, N, D]. Published: cosine over channels, both videos relative to their own anchor frame. ``compat="ditflow"``: cosine over
    frames, both relative to the reference's anchor, as in the comparison of DiTFlow's code.
    """
    made, wanted = (frames_of(x, grid).mean(1) for x in (hidden, reference))
    ditflow = config.compat == "ditflow"
    anchors = wanted if ditflow else made
    made, wanted = made[None] - anchors[:, None], wanted[None] - wanted[:, None]
    return (1 - F.cosine_similarity(made, wanted, dim=1 if ditflow else 2, eps=EPS)).mean()


def motion_channels(reference, share, grid):
    """Indices of the ``int(share * D)`` channels that carry most of the first principal direction of motion, of block outputs [B, N, D]."""
    x = frames_of(reference, grid)
    count = int(share * x.shape[-1])
    if count < 1:
        raise ValueError(f"channels={share}: keeps none of {x.shape[-1]} channels, expected at least 1")
    x = (x - x.mean(0)).flatten(0, 1)
    direction = torch.linalg.eigh(x.T @ x)[1][:, -1]
    return direction.abs().topk(count).indices


def moft(hidden, reference, config, grid, channels):
    """Motion feature loss (arXiv 2405.14864): features less their mean over time, in the motion channels, compared by cosine patch by patch."""
    made, wanted = (x - x.mean(0) for x in (frames_of(hidden, grid), frames_of(reference, grid)))
    return (1 - F.cosine_similarity(made[..., channels], wanted[..., channels], dim=-1, eps=EPS)).mean()
