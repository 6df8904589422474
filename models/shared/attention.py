"""Self- and cross-attention modules: projections, QK-norm, RoPE, then one attention call. Token-major layout, no transposes."""

import torch
import torch.nn.functional as F
from torch import nn

import vidkern

from .rope import apply_rope

QK_NORMS = ("none", "head", "all")
PATTERNS = ("grid", "same_view", "same_time", "full", "sdpa")
PARTS = {"grid": ("self", "view", "time"), "same_view": ("self", "view"), "same_time": ("self", "time")}


def attend(q, k, v, pattern, grid, *, valid=None, scale=None, impl=None):
    """Attention over q, k, v [B, L, H, D] with the frames of `grid` = (V, T); returns [B, L, H, D].

    pattern: ``"grid"`` (own frame, same view, same time: `vidkern.grid_attention`), ``"same_view"`` or ``"same_time"`` (own frame and
    one of the two), ``"full"`` (every frame sees every frame, the same op with one long view), ``"sdpa"`` (the same function as full
    by torch's own attention, `valid` not supported), or a FramePattern for `vidkern.frame_sparse_attention`. valid: bool [B, V, T],
    dead frames. impl: backend name or None.
    """
    if isinstance(pattern, str):
        if pattern == "sdpa":
            if valid is not None:
                raise ValueError("valid: not supported with pattern='sdpa'; use pattern='full'")
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        if pattern not in PATTERNS:
            raise ValueError(f"pattern={pattern!r}: expected one of {PATTERNS} or a FramePattern")
        if pattern == "full":
            grid = (1, grid[0] * grid[1])
            valid = valid if valid is None else valid.reshape(valid.shape[0], 1, -1)
        return vidkern.grid_attention(q, k, v, grid=grid, layout="blhd", valid=valid, scale=scale, impl=impl,
                                      include=PARTS.get(pattern, PARTS["grid"]))
    valid = valid if valid is None else valid.flatten(-2)
    return vidkern.frame_sparse_attention(q, k, v, pattern, layout="blhd", valid=valid, scale=scale, impl=impl)


class QKNorm(nn.Module):
    """RMS norm of a query or key [B, L, H, D]: over each head's D channels ("head") or over all H * D channels ("all", as Wan, LTX).

    divisor: with "all", what the sum of squares is divided by instead of the number of channels, or None.
    """

    def __init__(self, kind, heads, head_dim, divisor=None, eps=1e-6):
        super().__init__()
        if kind not in QK_NORMS:
            raise ValueError(f"qk_norm={kind!r}: expected one of {QK_NORMS}")
        self.kind, self.divisor, self.eps = kind, divisor, eps
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(head_dim if kind == "head" else heads * head_dim))

    def forward(self, x, divisor=None):
        """divisor: in place of the module's own; a number or a tensor that broadcasts over [B, L, 1]."""
        if self.kind == "none":
            return x
        divisor = self.divisor if divisor is None else divisor
        if self.kind == "all" and divisor is not None:
            flat = x.flatten(2).float()
            flat = flat * torch.rsqrt(flat.square().sum(-1, keepdim=True) / divisor + self.eps)
            return (flat * self.weight.float()).to(x.dtype).view_as(x)
        # The weight follows x: under autocast x is bf16 while the weight is fp32, and mixed dtypes take a slow path.
        flat = x.flatten(2) if self.kind == "all" else x
        return F.rms_norm(flat, self.weight.shape, self.weight.to(x.dtype), self.eps).view_as(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the frames of a grid.

    dim = heads * head_dim channels; one fused qkv projection. `forward(x [B, L, dim], rope table, pattern, grid)` -> [B, L, dim].
    """

    def __init__(self, dim, heads, *, qk_norm="head", bias=True):
        super().__init__()
        if dim % heads or (dim // heads) % 8:
            raise ValueError(f"dim={dim}, heads={heads}: expected a head width that is a multiple of 8")
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.q_norm = QKNorm(qk_norm, heads, self.head_dim)
        self.k_norm = QKNorm(qk_norm, heads, self.head_dim)
        self.out = nn.Linear(dim, dim, bias=bias)

    def project(self, x, offset=None):
        """q, k, v [B, L, H, D] before their rotation; offset: added to the normed q and k, broadcast against them, or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if offset is None else (q + offset, k + offset, v)

    def forward(self, x, table, pattern, grid, *, offset=None, valid=None, impl=None, capture=None):
        """capture: a dict that receives "q" and "k" [B, L, H, D] as they enter the attention, or None. offset: see `project`."""
        q, k, v = self.project(x, offset)
        q, k = apply_rope(q, table), apply_rope(k, table)
        if capture is not None:
            capture.update(q=q, k=k)
        return self.out(attend(q, k, v, pattern, grid, valid=valid, impl=impl).flatten(2))


class CrossAttention(nn.Module):
    """Attention from tokens [B, L, dim] to a context [B, S, context_dim], usually text. mask: bool [B, S], True = may be seen."""

    def __init__(self, dim, heads, context_dim, *, qk_norm="none", bias=True):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.q_norm = QKNorm(qk_norm, heads, self.head_dim)
        self.k_norm = QKNorm(qk_norm, heads, self.head_dim)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, context, mask=None):
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, self.head_dim)))
        k, v = self.kv(context).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        q, k, v = q.transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        mask = None if mask is None else mask[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
