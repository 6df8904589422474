"""Block-DCT pyramids on the CUDA kernels: a launch per filter, through float32 levels in memory."""

from __future__ import annotations

import torch

from . import cuda_structures as c
from . import filters, levels

_SET, _SUBTRACT, _ADD = range(3)


def _filter(which, pool_time, source, out, launch, base=None, mode=_SET) -> None:
    """One launch: levels [B, C, T, H, W], any strides with a last one of 1. Without ``base`` that of ``mode`` is ``out``."""
    base = out if base is None else base
    batch, channels, t, h, w = out.shape
    finer = which in ("up", "down_t")
    parameters = c.Filtering(
        c.volume(source), c.volume(base), c.volume(out), c.Size(t, h, w), channels, batch, mode, pool_time,
        (c.FLOAT * 4 * 8)(*((c.FLOAT * 4)(*row) for row in filters.dct_up())), 0.5 if which in ("down", "down_t") else 1.0,
    )  # fmt: skip
    threads = out.numel() // (8 if finer else 4)
    reads = [source] if base is out else [source, base]
    name = f"pyramid_filter_{'finer' if finer else 'coarser'}"
    launch(name, parameters, -(-threads // c.THREADS), c.THREADS, 0, reads, [out])


def taken_apart(x: torch.Tensor, sizes, pool_time: bool, launch) -> list[torch.Tensor]:
    """Residual levels of a volume, float32."""
    parts = levels.split(x.new_empty(levels.numel(sizes), dtype=torch.float32), sizes)
    gaussian = [*parts[:-1], x]
    for s in range(len(parts) - 2, -1, -1):
        _filter("down", pool_time, gaussian[s + 1], parts[s], launch)
    for s in range(len(parts) - 1, 0, -1):
        _filter("up", pool_time, parts[s - 1], parts[s], launch, gaussian[s], _SUBTRACT)
    return parts


def taken_apart_adjoint(out: torch.Tensor, parts: list[torch.Tensor], pool_time: bool, launch) -> None:
    """Gradients of the levels, float32 and overwritten, into that of the volume."""
    for s in range(len(parts)):
        if s + 1 < len(parts):
            _filter("up_t", pool_time, parts[s + 1], parts[s], launch, mode=_SUBTRACT)
        if s:
            _filter("down_t", pool_time, parts[s - 1], out if s + 1 == len(parts) else parts[s], launch, parts[s], _ADD)


def put_together(out: torch.Tensor, parts: list[torch.Tensor], pool_time: bool, launch) -> None:
    """Levels, float32 and overwritten, into a volume."""
    for s in range(1, len(parts)):
        _filter("up", pool_time, parts[s - 1], out if s + 1 == len(parts) else parts[s], launch, parts[s], _ADD)


def put_together_adjoint(grad: torch.Tensor, sizes, pool_time: bool, launch) -> list[torch.Tensor]:
    """Gradient of the volume -> those of the levels, of which the finest is ``grad`` itself."""
    n = levels.level_count(sizes) - 1
    parts = [*levels.split(grad.new_empty(levels.numel(sizes, n), dtype=torch.float32), sizes, n), grad]
    for s in range(n - 1, -1, -1):
        _filter("up_t", pool_time, parts[s + 1], parts[s], launch)
    return parts
