"""Launcher of the compiled pyramid kernels: turns tensors into the flat fields that csrc/cpu/bindings.cpp reads."""

from __future__ import annotations

import torch

from vidkern import _cpu

from .levels import KINDS, level_count, patches, shapes
from .plans import Launch, Place

_NO_VIEW = (0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1)
# Outputs beyond this many bytes go past the caches: they would push out everything before anybody reads them.
STREAM_BYTES = 8 << 20


def level(t: torch.Tensor | None) -> tuple[int, ...]:
    """A level or volume [B, C, T, H, W] with last stride 1, or None."""
    if t is None:
        return _NO_VIEW
    b, c, y, x, _ = t.stride()
    return (Place(t), t.dtype is torch.bfloat16, b, c, y, x, 0, 0, 0, 1, 1, t.shape[4])


def flat(t: torch.Tensor, sizes, first: int | None = None) -> list[tuple[int, ...]]:
    """The levels that lie one after the other in a 1-D tensor; a few integers, where views of it would cost microseconds."""
    views, at, size, bf16 = [], 0, t.element_size(), t.dtype is torch.bfloat16
    for _, channels, frames, height, width in shapes(sizes)[:first]:
        plane = height * width
        views.append((Place(t, at), bf16, channels * frames * plane, frames * plane, plane, width, 0, 0, 0, 1, 1, width))
        at += sizes[0] * channels * frames * plane * size
    return views


def tokens(t: torch.Tensor, sizes, patch, pool_time: bool, first: int) -> list[tuple[int, ...]]:
    """The first ``first`` levels as columns of a token matrix [B, tokens, K] with last stride 1."""
    views, at, (batch, row, _) = [], 0, t.stride()
    for (_, channels, _, height, width), (pt, ph, pw) in zip(shapes(sizes)[:first], patches(tuple(patch), level_count(sizes), pool_time)):
        across, down = width // pw, height // ph
        views.append(
            (
                Place(t, at * t.element_size()), t.dtype is torch.bfloat16, batch, pt * ph * pw, down * across * row,
                across * row, row, ph * pw, pw, pt, ph, pw,
            )
        )  # fmt: skip
        at += channels * pt * ph * pw
    return views


def fields(
    sizes, *, kind="laplacian", pool_time=False, active=None, volume=None, ins=(), outs=(), table=None, mask=None, philox=0, seed=0,
    offset=0, first_sample=0, level_index=None, loss=None, written=(), tile=(0, 0),
) -> tuple:
    """The fields of a kernel. ``ins`` and ``outs`` are lists (one entry per role) of lists of views or tensors, None where absent."""
    n = level_count(sizes)
    stream = sum(t.numel() * t.element_size() for t in written) > STREAM_BYTES
    head = [
        torch.get_num_threads(), stream, KINDS.index(kind), 2 if pool_time else 1, n, n if active is None else active, *sizes, *tile
    ]
    present, views = 0, []
    if volume is not None:
        present, views = 1, [*level(volume)]
    for base, roles in ((1, ins), (4, outs)):
        for role, parts in enumerate(roles):
            if parts is None or not len(parts):
                continue
            present |= 1 << (base + role)
            for i in range(n):
                part = parts[i] if i < len(parts) else None
                views += part if isinstance(part, tuple) else level(part)
    if table is None:
        strides = (0, 0, level_index or 0)
    else:
        # A table with one row per sample has no level stride; its field then tells the noise's level.
        strides = (Place(table), table.stride(0), table.stride(1) if level_index is None else level_index)
    masked = (0, 0) if mask is None else (Place(mask), mask.stride(0))
    random = (philox, seed & 0xFFFFFFFF, seed >> 32, offset, first_sample)
    return (*head, present, *views, *strides, *masked, 0 if loss is None else Place(loss), *random)


def launch(name: str, sizes, *, scale=None, **given) -> Launch:
    """A kernel of the tier in use, to be run; ``given``: see :func:`fields`."""
    table = given.get("table")
    if table is not None and table.stride(-1) != 1:
        given["table"] = table.contiguous()
    return Launch(getattr(_cpu, name), fields(sizes, **given), tuple(scale or (1.0,) * level_count(sizes)))


def normals(shape, *, seed, level, offset=0, first_sample=0, raw=False) -> torch.Tensor:
    """Noise [B, C, T, H, W] of one level, float32; ``raw``: the generator's words instead, int32."""
    out = torch.empty(shape)
    launch(
        "pyramid_normals", list(shape), outs=[[out]], philox=2 if raw else 1, seed=seed, offset=offset, first_sample=first_sample,
        level_index=level,
    ).run()  # fmt: skip
    return out.view(torch.int32) if raw else out
