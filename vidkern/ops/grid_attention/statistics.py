"""What frame-sparse attention attends to: the weight on every frame, and the entropy. No L x L object, any backend, with gradients.

Neither needs a kernel of its own. With indicator columns as values, attention gives the weight on each frame; with the keys themselves
as values it gives the expected key, hence the expected logit, and the entropy of a softmax is its log-sum-exp less the expected logit.
"""

from __future__ import annotations

import functools
import math

import torch

from . import frame_sparse_attention, reference
from .patterns import FramePattern, GridPattern

__all__ = ["attention_entropy", "attention_mass"]


@functools.lru_cache(maxsize=64)
def _full(n_frames: int) -> FramePattern:
    return FramePattern.from_mask(torch.ones(n_frames, n_frames, dtype=torch.bool))


def _pattern(pattern) -> FramePattern:
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        if pattern < 1:
            raise ValueError(f"pattern: {pattern} frames, expected at least 1")
        return _full(pattern)
    if not isinstance(pattern, FramePattern):
        raise TypeError(f"pattern: {type(pattern).__name__}, expected a vidkern.FramePattern, a GridPattern or a number of frames")
    return pattern


def _by_frame(mask, pattern):
    """A mask [B, V, T] or [V, T] as [B, F] or [F]; others as they are."""
    if isinstance(pattern, GridPattern) and isinstance(mask, torch.Tensor) and mask.shape[-2:] == (pattern.views, pattern.times):
        return mask.flatten(-2)
    return mask


def _columns(length, n_frames, n_text, text_front, device):
    """Column of every token: its frame, or ``n_frames`` for text."""
    n_video = length - n_text
    column = torch.empty(length, dtype=torch.long, device=device)
    column[reference.video_span(n_video, n_text, text_front)] = torch.arange(n_video, device=device) // (n_video // n_frames)
    column[reference.text_span(n_video, n_text, text_front)] = n_frames
    return column


def attention_mass(
    q, k, pattern, *, per="frame", layout="bhld", valid=None, kv_len=None, n_text=0, text_position="front", text_len=None, scale=None,
    impl=None,
):
    """How much of its attention every token, or every frame, gives to every frame: weights of the softmax summed over a frame's keys.

    Costs one :func:`frame_sparse_attention` per D columns and keeps O(L F) memory; differentiable in q and k. A masked or causal rule
    counts here exactly as it does there.

    Args:
        q, k: as in :func:`grid_attention`, n_text + F * N tokens.
        pattern: a :class:`FramePattern` or :class:`GridPattern` of F frames, or the int F when every frame sees every frame (plain
            attention, or the queries and keys given to :func:`attention_motion_flow`).
        per: ``"token"`` for the weights of every query, ``"frame"`` for their mean over the queries of a frame that see anything.
        layout, valid, kv_len, n_text, text_position, text_len, scale, impl: as in :func:`grid_attention`; masks by frame, [B, F] or [F],
            and for a grid also [B, V, T] or [V, T].

    Returns:
        ``per="token"``: [B, Hq, L, C] in the order of the tokens; ``per="frame"``: float32 [B, Hq, C, C], rows of frames that query.
        C = F, or F + 1 with text, whose row and column are the last. Rows sum to 1, or are 0 where nothing is seen.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`frame_sparse_attention`; an unknown ``per``.
    """
    if per not in ("frame", "token"):
        raise ValueError(f'per: {per!r}, expected "frame" or "token"')
    pattern = _pattern(pattern)
    attend = functools.partial(
        frame_sparse_attention, q, k, pattern=pattern, layout=layout, valid=_by_frame(valid, pattern), kv_len=_by_frame(kv_len, pattern),
        n_text=n_text, text_position=text_position, text_len=text_len, scale=scale, impl=impl,
    )
    if not isinstance(k, torch.Tensor) or k.dim() != 4:
        attend(v=k)  # says what is wrong
    dim, length, n_frames = k.shape[3], k.shape[2 if layout == "bhld" else 1], pattern.n_frames
    n_columns = n_frames + bool(n_text)
    if n_text >= length or (length - n_text) % n_frames:
        attend(v=k)
    column = _columns(length, n_frames, n_text, text_position == "front", k.device)
    parts = []
    for first in range(0, n_columns, dim):
        # The same indicator for every sample and head: strides of zero cost nothing.
        shown = (column[:, None] == first + torch.arange(dim, device=k.device)).to(k.dtype)
        values = (shown[None, None] if layout == "bhld" else shown[None, :, None]).expand(k.shape)
        out = attend(v=values)
        parts.append((out if layout == "bhld" else out.transpose(1, 2))[..., : n_columns - first])
    mass = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if per == "token":
        return mass
    mass = mass if mass.dtype == torch.float64 else mass.float()
    seeing = (mass.detach() > 0).any(-1).to(mass.dtype)
    sums = mass.new_zeros((*mass.shape[:2], n_columns, n_columns)).index_add(2, column, mass)
    counts = mass.new_zeros((*mass.shape[:2], n_columns)).index_add(2, column, seeing)
    return sums / counts.clamp(min=1)[..., None]


def attention_entropy(
    q, k, pattern, *, layout="bhld", valid=None, kv_len=None, n_text=0, text_position="front", text_len=None, scale=None, impl=None,
):
    """Entropy, in nats, of every query's attention: 0 where it looks at one key, ln n where it looks at n keys alike.

    Costs one :func:`frame_sparse_attention`, with the keys as values; differentiable in q and k. The expected key has the dtype of q:
    with 16-bit inputs the entropy is off by up to about 0.4 % of the largest logit (bfloat16; float16 an eighth of it). Cast q and k to
    float32 where that matters.

    Args:
        q, k, pattern, layout, valid, kv_len, n_text, text_position, text_len, scale, impl: as in :func:`attention_mass`.

    Returns:
        [B, Hq, L], float32 (float64 for float64 inputs), at least 0; 0 for queries that see nothing.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`frame_sparse_attention`.
    """
    pattern = _pattern(pattern)
    mean, lse = frame_sparse_attention(
        q, k, k, pattern, layout=layout, valid=_by_frame(valid, pattern), kv_len=_by_frame(kv_len, pattern), n_text=n_text,
        text_position=text_position, text_len=text_len, scale=scale, return_lse=True, impl=impl,
    )
    if layout == "blhd":
        q, mean = q.transpose(1, 2), mean.transpose(1, 2)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    expected = scale * (q.to(lse.dtype) * mean.to(lse.dtype)).sum(-1)
    # A query that sees nothing has lse = -inf and may hold anything.
    return torch.where(torch.isneginf(lse), 0.0, lse - expected).clamp(min=0)
