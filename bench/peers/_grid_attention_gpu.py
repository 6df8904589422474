"""What only a GPU has to compare with: dense attention as the reference of what attention can reach, and three dense calls by
FlashAttention-3.

Dense attention computes something else (every pair of tokens), so it is no peer. Its rate over its own FLOPs is what an
attention kernel reaches on this device when nothing is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..shapes import GridShape
from ..suite import Peer, Problem, importable

DENSE_FLOPS = 60e12  # forward FLOPs of a dense call: heads are left out beyond it, which does not change the rate


def dense_flops(s: GridShape) -> int:
    """Forward FLOPs of dense attention at the same length."""
    return 4 * s.batch * s.heads * s.head_dim * s.length**2


def dense_shape(s: GridShape) -> GridShape:
    """``s`` with as many heads as :data:`DENSE_FLOPS` allow, at least one."""
    return replace(s, heads=max(1, min(s.heads, int(s.heads * DENSE_FLOPS / dense_flops(s)))))


@dataclass(frozen=True)
class Dense:
    """A dense attention: ``build(problem)`` -> ``fn(q, k, v) -> out`` on [B, H, L, D]; ``missing(device)`` as in Peer."""

    name: str
    build: Callable[[Problem], Callable]
    devices: tuple[str, ...] = ("cuda",)
    missing: Callable[[str], str | None] = lambda device: None


def _sdpa(backend: str | None):
    def build(p: Problem):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend = torch.nn.functional.scaled_dot_product_attention
        if backend is None:
            return attend
        kernel = getattr(SDPBackend, backend)

        def run(q, k, v):
            with sdpa_kernel(kernel):
                return attend(q, k, v)

        return run

    return build


@functools.lru_cache(maxsize=2)
def _flash_attention(version: int):
    """``fn(q, k, v) -> (out, lse)`` on [B, L, H, D]."""
    if version == 4:
        from flash_attn.cute import flash_attn_func

        def run(q, k, v):
            out = flash_attn_func(q, k, v)
            return out if isinstance(out, tuple) else (out, None)

        return run
    from flash_attn_interface import flash_attn_func as attend

    def run3(q, k, v):
        try:
            out = attend(q, k, v, return_attn_probs=True)  # releases differ in whether the lse comes unasked
        except TypeError:
            out = attend(q, k, v)
        return out[:2] if isinstance(out, tuple) else (out, None)

    return run3


def _flash(version: int):
    def build(p: Problem):
        attend = _flash_attention(version)
        return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)

    return build


DENSE = (
    Dense("dense FlashAttention-3", _flash(3), missing=importable("flash_attn_interface")),
    Dense("dense FlashAttention-4", _flash(4), missing=importable("flash_attn.cute")),
    Dense("dense SDPA, cuDNN", _sdpa("CUDNN_ATTENTION")),
    Dense("dense SDPA, flash", _sdpa("FLASH_ATTENTION")),
    Dense("dense SDPA", _sdpa(None), devices=("cpu",)),
)


def _three_dense_flash3(p: Problem):
    """Same view + same time - own frame by FlashAttention-3, merged with vidkern.merge_attention; forward."""
    import vidkern

    attend = _flash_attention(3)
    s = p.shape
    b, h, v, t, n, d = s.batch, s.heads, s.views, s.times, s.tokens, s.head_dim

    def part(x, order):
        """[B, H, V T N, D] as sequences [groups, length, H, D] of one view, one time or one frame."""
        x = x.unflatten(2, (v, t, n))
        if order == "view":
            return x.permute(0, 2, 3, 4, 1, 5).reshape(b * v, t * n, h, d)
        if order == "time":
            return x.permute(0, 3, 2, 4, 1, 5).reshape(b * t, v * n, h, d)
        return x.permute(0, 2, 3, 4, 1, 5).reshape(b * v * t, n, h, d)

    def whole(x, lse, order):
        """Back to [B, H, L, D] and [B, H, L]."""
        if order == "time":
            x = x.view(b, t, v, n, h, d).permute(0, 4, 2, 1, 3, 5)
            lse = lse.view(b, t, h, v, n).permute(0, 2, 3, 1, 4)
        elif order == "view":
            x = x.view(b, v, t, n, h, d).permute(0, 4, 1, 2, 3, 5)
            lse = lse.view(b, v, h, t, n).permute(0, 2, 1, 3, 4)
        else:
            x = x.view(b, v, t, n, h, d).permute(0, 4, 1, 2, 3, 5)
            lse = lse.view(b, v, t, h, n).permute(0, 3, 1, 2, 4)
        return x.reshape(b, h, v * t * n, d), lse.reshape(b, h, v * t * n).float().contiguous()

    def run(q, k, val):
        outs, lses = [], []
        for order in ("view", "time", "frame"):
            out, lse = whole(*attend(*(part(x, order) for x in (q, k, val))), order)
            outs.append(out)
            lses.append(lse)
        return vidkern.merge_attention(outs, lses, signs=(1, 1, -1), return_lse=False)

    return run


THREE_FLASH3 = Peer(
    "three dense calls merged, FlashAttention-3",
    _three_dense_flash3,
    group="flash-attn",
    dtypes=("bfloat16", "float16"),
    devices=("cuda",),
    backward=lambda device: False,
    missing=importable("flash_attn_interface"),
)
