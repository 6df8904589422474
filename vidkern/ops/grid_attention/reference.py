"""Frame-sparse attention in plain torch: obviously right, any device, any dtype, differentiable, no L x L object.

Every backend is tested against this file in float64, and this file is tested against dense masked attention.
"""

from __future__ import annotations

import torch

from .patterns import FramePattern


def video_span(n_video: int, n_text: int, text_front: bool) -> slice:
    """Where the video tokens are."""
    return slice(n_text, n_text + n_video) if text_front else slice(0, n_video)


def text_span(n_video: int, n_text: int, text_front: bool) -> slice:
    """Where the text tokens are."""
    return slice(0, n_text) if text_front else slice(n_video, n_video + n_text)


def liveness(valid, kv_len, text_len, *, n_frames, frame_len, n_text, text_front, device):
    """Which tokens may be seen and which may see: bool keys [B or 1, L] and rows [B or 1, L].

    A dead frame (``valid`` False) is neither. Tokens at or beyond ``kv_len`` of their frame, or ``text_len`` of the text,
    are no keys but still see.
    """
    n_video = n_frames * frame_len
    rows = torch.ones(1, n_frames, dtype=torch.bool, device=device)
    if valid is not None:
        rows = valid.to(device=device, dtype=torch.bool).reshape(-1, n_frames)
    keys = rows[:, :, None].expand(-1, -1, frame_len)
    if kv_len is not None:
        inside = torch.arange(frame_len, device=device) < kv_len.to(device).reshape(-1, n_frames)[:, :, None]
        keys = keys & inside
    keys, rows = keys.flatten(1), rows.repeat_interleave(frame_len, 1)
    if n_text:
        batch = max(keys.shape[0], 1 if text_len is None else text_len.numel())
        text = torch.ones(batch, n_text, dtype=torch.bool, device=device)
        if text_len is not None:
            text = torch.arange(n_text, device=device) < text_len.to(device).reshape(-1, 1).expand(batch, 1)
        pair = [text, keys.expand(batch, n_video)]
        keys = torch.cat(pair if text_front else pair[::-1], 1)
        pair = [torch.ones(rows.shape[0], n_text, dtype=torch.bool, device=device), rows]
        rows = torch.cat(pair if text_front else pair[::-1], 1)
    return keys, rows


def _groups(pattern: FramePattern, frame_len: int, n_text: int, text_front: bool, device):
    """Rows that share their keys, as (row indices, key indices) pairs: one per query frame, one for the text."""
    n_video = pattern.n_frames * frame_len
    start = video_span(n_video, n_text, text_front).start
    token = torch.arange(frame_len, device=device)
    text = torch.arange(n_text, device=device) + text_span(n_video, n_text, text_front).start
    mask = torch.from_numpy(pattern.frame_mask().copy()).to(device)
    for f in range(pattern.n_frames):
        frames = mask[f].nonzero()
        cols = (start + frames * frame_len + token).flatten()
        yield start + f * frame_len + token, torch.cat([text, cols])
    if n_text:
        yield text, torch.arange(n_text + n_video, device=device)


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _visible(q, k, v, valid, kv_len, text_len, pattern, frame_len, n_text, text_front):
    """Working dtype, live keys and rows, and q, k, v in that dtype with every query head's own key head."""
    keys, rows = liveness(
        valid, kv_len, text_len, n_frames=pattern.n_frames, frame_len=frame_len, n_text=n_text, text_front=text_front,
        device=q.device,
    )
    math, group = _math_dtype(q.dtype), q.shape[1] // k.shape[1]
    # Hidden memory may hold anything: replace it before it meets a product, since 0 * NaN is NaN.
    qm = q.to(math).masked_fill(~rows[:, None, :, None], 0)
    km, vm = (t.to(math).masked_fill(~keys[:, None, :, None], 0).repeat_interleave(group, 1) for t in (k, v))
    return math, keys, rows, qm, km, vm


def forward(q, k, v, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale):
    """Output in q's dtype [B, Hq, L, D] and natural-log lse [B, Hq, L] (float32; float64 for float64 inputs)."""
    math, keys, rows, qm, km, vm = _visible(q, k, v, valid, kv_len, text_len, pattern, frame_len, n_text, text_front)
    order, outs, lses = [], [], []
    for i, j in _groups(pattern, frame_len, n_text, text_front, q.device):
        logits = scale * qm[:, :, i] @ km[:, :, j].transpose(-1, -2)
        seen = keys[:, None, None, j] & rows[:, None, i, None]
        empty = ~seen.any(-1, keepdim=True)
        logits = logits.masked_fill(~seen, -torch.inf).masked_fill(empty, 0)
        outs.append((logits.softmax(-1) @ vm[:, :, j]).masked_fill(empty, 0))
        lses.append(logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf))
        order.append(i)
    back = torch.argsort(torch.cat(order))
    return torch.cat(outs, 2)[:, :, back].to(q.dtype), torch.cat(lses, 2)[:, :, back]


def backward(dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale):
    """Gradients of q, k, v (in their dtypes) by the formulas of FlashAttention-2 with the lse's own gradient.

    Delta = rowsum(dO * O) - dLSE;  dS = P * (dP - Delta). ``dout`` or ``dlse`` may be None.
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    math, keys, rows, qm, km, vm = _visible(q, k, v, valid, kv_len, text_len, pattern, frame_len, n_text, text_front)
    alive = ~torch.isneginf(lse)
    go = torch.zeros_like(qm) if dout is None else dout.to(math).masked_fill(~alive[..., None], 0)
    delta = (go * out.to(math)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(math).masked_fill(~alive, 0)
    safe = lse.masked_fill(~alive, 0)
    dq, dk, dv = torch.zeros_like(qm), torch.zeros_like(km), torch.zeros_like(vm)
    for i, j in _groups(pattern, frame_len, n_text, text_front, q.device):
        seen = keys[:, None, None, j] & rows[:, None, i, None]
        logits = scale * qm[:, :, i] @ km[:, :, j].transpose(-1, -2)
        p = (logits - safe[:, :, i, None]).exp().masked_fill(~seen, 0)
        ds = p * (go[:, :, i] @ vm[:, :, j].transpose(-1, -2) - delta[:, :, i, None])
        dq[:, :, i] += scale * ds @ km[:, :, j]
        dk[:, :, j] += scale * ds.transpose(-1, -2) @ qm[:, :, i]
        dv[:, :, j] += p.transpose(-1, -2) @ go[:, :, i]

    def fold(g):
        return g.unflatten(1, (kv_heads, group)).sum(2)

    return dq.to(q.dtype), fold(dk).to(k.dtype), fold(dv).to(v.dtype)
