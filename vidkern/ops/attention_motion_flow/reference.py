"""Attention motion flow in plain torch: any device, any dtype, one pair of frames at a time, nothing of size N x N.

Every backend is tested against this file in float64, and this file against a dense oracle.
"""

from __future__ import annotations

import torch


def coordinates(height: int, width: int, device, dtype) -> torch.Tensor:
    """(x, y) of every patch of a frame, row-major, [S, 2]."""
    at = torch.arange(height * width, device=device)
    return torch.stack([at % width, torch.div(at, width, rounding_mode="floor")], -1).to(dtype)


def _frames(x, frame: int, size: int, math) -> torch.Tensor:
    """Tokens of one frame with the heads of a group side by side: [..., S, Hg * d] of [..., Hg, N, d]."""
    part = x[..., frame * size : (frame + 1) * size, :].to(math)
    return part.transpose(-2, -3).flatten(-2)


def _chunks(q, frames: int):
    """(batch index, slice of groups) so that the scores of a pair of frames stay below one query frame against all tokens."""
    for b in range(q.shape[0]):
        for g in range(0, q.shape[1], frames):
            yield b, slice(g, min(g + frames, q.shape[1]))


def _math(q) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def forward(q, k, pairs, *, grid, scale, mean, index, lse, top, entropy) -> None:
    """Fill those of ``mean`` [B, G, P, S, 2], ``index``, ``lse``, ``top`` and ``entropy`` [B, G, P, S] that are not None."""
    frames, height, width = grid
    size, math = height * width, _math(q)
    c = coordinates(height, width, q.device, math)
    for b, g in _chunks(q, frames):
        for p, (i, j) in enumerate(pairs):
            raw = _frames(q[b, g], i, size, math) @ _frames(k[b, g], j, size, math).transpose(-1, -2)
            # The largest logit does not depend on the size of the scale; argmax returns the first of equals.
            if index is not None:
                index[b, g, p] = (raw * ((scale > 0) - (scale < 0))).argmax(-1)
            if mean is None and lse is None and top is None and entropy is None:
                continue
            logits = raw * scale
            total = logits.logsumexp(-1)
            prob = logits.softmax(-1)
            for out, value in (
                (mean, lambda: prob @ c), (lse, lambda: total), (top, lambda: prob.amax(-1)),
                (entropy, lambda: (prob * (total[..., None] - logits)).sum(-1)),
            ):
                if out is not None:
                    out[b, g, p] = value()


def vote(q, k, lse, pairs, *, grid, scale, index, top) -> None:
    """Fill ``index`` and ``top`` [B, 1, P, S]: place and value of the largest probability, averaged over the groups."""
    frames, height, width = grid
    size, math = height * width, _math(q)
    for b in range(q.shape[0]):
        for p, (i, j) in enumerate(pairs):
            mass = 0
            for g in range(q.shape[1]):
                logits = scale * (_frames(q[b, g], i, size, math) @ _frames(k[b, g], j, size, math).transpose(-1, -2))
                mass = mass + (logits - lse[b, g, p, :, None]).exp()
            best, place = mass.max(-1)
            for out, value in ((index, place), (top, best / q.shape[1])):
                if out is not None:
                    out[b, 0, p] = value


def backward(dmean, dlse, q, k, mean, lse, pairs, *, grid, scale, dq, dk) -> None:
    """Fill ``dq`` and ``dk``; ``dmean`` or ``dlse`` may be None (zero).

    With l the logits, p their softmax over the frame, G = dmean and m = mean: dl_ij = p_ij (<G_i, c_j - m_i> + dlse_i). Rows
    whose gradient is zero contribute nothing, whatever they hold.
    """
    frames, height, width = grid
    size, math = height * width, _math(q)
    c = coordinates(height, width, q.device, math)
    heads, dim = q.shape[2], q.shape[4]
    for b, g in _chunks(q, frames):
        dq_sum, dk_sum = (torch.zeros(q[b, g].shape, dtype=math, device=q.device) for _ in range(2))
        for p, (i, j) in enumerate(pairs):
            qi, kj = _frames(q[b, g], i, size, math), _frames(k[b, g], j, size, math)
            slope = torch.zeros((), dtype=math, device=q.device)
            live = torch.zeros((), dtype=torch.bool, device=q.device)
            if dmean is not None:
                grad = dmean[b, g, p].to(math)
                # Differences first: products of coordinates far from the origin would cancel.
                apart = [c[:, a] - mean[b, g, p, :, a, None] for a in (0, 1)]
                slope = grad[..., 0, None] * apart[0] + grad[..., 1, None] * apart[1]
                live = live | (grad != 0).any(-1)
            if dlse is not None:
                slope = slope + dlse[b, g, p, :, None].to(math)
                live = live | (dlse[b, g, p] != 0)
            # A softmax of its own: with the rounding of the saved lse it would not sum to one.
            prob = (scale * (qi @ kj.transpose(-1, -2))).softmax(-1)
            dl = scale * torch.where(live[..., None], prob * slope, 0)
            # A row times zero is zero even where it holds NaN; where it counts, dl is NaN already.
            safe = [torch.where(x.isfinite().all(-1, keepdim=True), x, 0) for x in (qi, kj)]
            for sums, f, value in ((dq_sum, i, dl @ safe[1]), (dk_sum, j, dl.transpose(-1, -2) @ safe[0])):
                sums[..., f * size : (f + 1) * size, :] += value.unflatten(-1, (heads, dim)).transpose(-2, -3)
        dq[b, g], dk[b, g] = dq_sum.to(q.dtype), dk_sum.to(k.dtype)
