"""Launcher of the backward for compute capability 9.0a (csrc/cuda/grid_attention_hopper_backward*): which tiles, which parameters."""

from __future__ import annotations

import ctypes
import functools

import torch

from ...cuda.tensor_map import PANEL, TensorMap, parameters
from .cuda import _NAMES, Delta, Strides, _addresses, _live, _strides, why_not
from .hopper import ALIGN, GROUPS, MEMORY, SHARE, THREADS, Config, _map, _mappable, forced, padded
from .plan import Shape, Tiling, plan, work

__all__ = ["SOURCES", "backward", "candidates", "tiling", "why_not"]

# Source below csrc/cuda -> what the names of its kernels begin with. Delta's kernel is that of the other GPUs.
SOURCES = {
    f"grid_attention_hopper_backward_{dim}": tuple(f"grid_attention_hopper_{part}_{dim}_" for part in ("dq", "dkv"))
    for dim in (64, 96, 128)
}
ROWS = SHARE * GROUPS  # of a block
# Columns of a tile: 48 divides many frame lengths, the other is the widest at which the sums of both products of shared memory, their
# operands, and dQ or dK and dV stay in registers.
WIDTHS = {(part, dim): (48, 64 if (part, dim) == ("dkv", 128) else 96) for part in ("dq", "dkv") for dim in (64, 96, 128)}
# What a column of an edge tile costs in columns of a main tile (masks, and sums of its own), and what a tile costs beside its columns.
# Assumptions until a sweep on a GPU replaces them.
EDGE_COST, TILE_COST = 1.5, 8

Backward = parameters(
    "Backward",
    [
        *((n, TensorMap) for n in ("first_own", "second_own", "first_column", "second_column")),
        *((n, ctypes.c_void_p) for n in ("first", "second", "lse", "delta", "one", "two", "tiles", "main", "edge", "live")),
        *((f"{n}_step", Strides) for n in ("first", "second", "lse", "delta", "one", "two")),
        ("live_step", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("n_tiles", "heads", "group", "dim")),
        ("scale", ctypes.c_float),
    ],
)


def shared_bytes(dim: int, width: int) -> int:
    """Shared memory of a block: barriers, the rows' two tiles, up to four stages of the columns' two and of notes on the columns."""
    row = -(-dim // PANEL) * PANEL * 2
    own, stage = ALIGN + 2 * ROWS * row, 2 * width * row + 8 * width + 16
    return own + min(4, (MEMORY - own) // stage) * stage


def candidates(part: str, head_dim: int) -> list[Config]:
    """What a sweep tries of "dq" or "dkv", the widest tiles first."""
    return [Config(width) for width in reversed(WIDTHS[part, padded(head_dim)])]


@functools.lru_cache(maxsize=256)
def tiling(shape: Shape, part: str, dim: int, forced: Config | None = None) -> Tiling:
    """The tiles of a block: of the widths that there are, the one whose plan costs least, the widest of equals; of ``forced``, where given.

    Raises:
        ValueError: there is no kernel of ``forced``.
    """

    def cost(width: int) -> float:
        w = work(shape, Tiling(ROWS, width, width, True))
        return (w.main + w.edge * EDGE_COST) * (1 + TILE_COST / width)

    widths = [c.block_n for c in candidates(part, dim) if forced in (None, c)]
    if not widths:
        raise ValueError(f"forced: {forced}, which no kernel {part} of head dim {dim} has")
    width = min(widths, key=cost)
    return Tiling(ROWS, width, width, True)


@functools.lru_cache(maxsize=None)
def _tables(shape: Shape, tiles: Tiling, device: torch.device):
    return plan(shape, tiles, device)


def backward(
    dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, dq, dk, dv, launch
) -> None:
    """Fill ``dq``, ``dk``, ``dv``; arguments as of the Triton launcher, ``launch`` as in :func:`.hopper.forward`. Deterministic."""
    batch, heads, length, head_dim = q.shape
    group = heads // k.shape[1]
    if dout is None:
        dout = torch.zeros_like(q)
    elif why_not(dout, dout, dout) is not None:
        dout = dout.contiguous()  # a gradient cut out of a larger tensor
    dout, q, k, v = _mappable(dout), _mappable(q), _mappable(k), _mappable(v)
    dtype = _NAMES[q.dtype]
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    rows = batch * heads * length
    given = Delta(*_addresses(dout, out, dlse, delta), *_strides(dout, out, dlse), rows, heads, length, head_dim)
    launch(f"grid_attention_delta_{dtype}", given, -(-rows // 4), 128, 0, [t for t in (dout, out, dlse) if t is not None], [delta])

    live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
    dim = padded(head_dim)
    for part, own, columns, grads in (("dq", (q, dout), (k, v), (dq, None)), ("dkv", (k, v), (q, dout), (dk, dv))):
        shape = Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, part == "dkv")
        tiles = tiling(shape, part, dim, forced.get(part))
        tables = _tables(shape, tiles, q.device)
        of, width = own[0].shape[1], tiles.block_n
        given = Backward(
            *(_map(launch, t, ROWS) for t in own), *(_map(launch, t, width) for t in columns),
            *_addresses(*columns, lse, delta, *grads, *tables, live), *_strides(*columns, lse, delta, *grads), live_step,
            tables.n_tiles, of, group, head_dim, scale,
        )  # fmt: skip
        reads = [*own, *columns, lse, delta, *tables, *([] if live is None else [live])]
        writes = [g for g in grads if g is not None]
        name, blocks = f"grid_attention_hopper_{part}_{dim}_{dtype}_{width}", tables.n_tiles * batch * of
        launch(name, given, blocks, THREADS, shared_bytes(dim, width), reads, writes)
