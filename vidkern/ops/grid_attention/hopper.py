"""Launcher of the forward for compute capability 9.0a (csrc/cuda/grid_attention_hopper*): which width of tiles, and with which parameters."""

from __future__ import annotations

import ctypes
import functools

import torch

from ...cuda.tensor_map import PANEL, TensorMap, parameters
from .cuda import _LOG2E, _NAMES, Strides, _addresses, _live, _strides, why_not
from .plan import Shape, Tiling, plan, work

__all__ = ["SOURCES", "forward", "tiling", "why_not"]

# Source below csrc/cuda -> what the names of its kernels begin with.
SOURCES = {f"grid_attention_hopper_{dim}": (f"grid_attention_hopper_forward_{dim}_",) for dim in (64, 96, 128)}
SHARE, GROUPS, THREADS = 64, 2, 384  # rows of a consumer warpgroup, such warpgroups of a block, and threads with the producer's
NARROW = 48  # columns of an edge tile
WIDTHS = (64, 80, 96, 112, 128, 144, 160, 176)  # columns of a main tile
LIVE_WIDTHS = (96, 144)  # the same where masks on the device hide keys
MEMORY, ALIGN = 232448, 1024  # bytes of shared memory of a block, and those that its barriers take
# What a column of an edge tile costs in columns of a main tile (nothing runs beside its exponentials in its warpgroup), and what a tile
# costs beside its columns. Assumptions until a sweep on a GPU replaces them.
EDGE_COST, TILE_COST = 2.0, 8

Forward = parameters(
    "Forward",
    [
        *((n, TensorMap) for n in ("q_map", "k_map", "v_map")),
        *((n, ctypes.c_void_p) for n in ("k", "v", "out", "lse", "tiles", "main", "edge", "live")),
        *((n, Strides) for n in ("k_step", "v_step", "out_step", "lse_step")),
        ("live_step", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("n_tiles", "heads", "group", "together", "dim")),
        ("scale_log2", ctypes.c_float),
    ],
)


def padded(head_dim: int) -> int:
    """The head dim of the kernels that serve this one."""
    return next(d for d in (64, 96, 128) if head_dim <= d)


def stages(dim: int, width: int) -> int:
    """Stages of keys, and of values, that fit into shared memory beside the queries; rows take whole panels of 64 values."""
    panels = -(-dim // PANEL)
    free = MEMORY - ALIGN - GROUPS * SHARE * panels * PANEL * 2
    return min(4, free // (2 * width * panels * PANEL * 2))


def shared_bytes(dim: int, width: int) -> int:
    """Shared memory of a block."""
    return ALIGN + -(-dim // PANEL) * PANEL * 2 * (GROUPS * SHARE + 2 * stages(dim, width) * width)


@functools.lru_cache(maxsize=256)
def tiling(shape: Shape, together: int = 1, live: bool = False) -> Tiling:
    """The tiles of a block: of the widths that there are, the one whose plan costs least, the widest of equals.

    Args:
        shape: what the plan is made for.
        together: query heads of a block, 1 or :data:`GROUPS`: of several, each warpgroup has the same rows of another one.
        live: whether masks on the device hide keys.
    """
    rows = SHARE * GROUPS // together

    def cost(width: int) -> float:
        w = work(shape, Tiling(rows, width, NARROW, True))
        return w.main * (1 + TILE_COST / width) + w.edge * (EDGE_COST + TILE_COST / NARROW)

    width = min(reversed(LIVE_WIDTHS if live else WIDTHS), key=cost)
    return Tiling(rows, width, NARROW, True)


@functools.lru_cache(maxsize=None)
def _tables(shape: Shape, tiles: Tiling, device: torch.device):
    return plan(shape, tiles, device)


def _map(launch, t: torch.Tensor, rows: int) -> TensorMap:
    """Of [B, H, L, D]: a box is ``rows`` tokens by a panel."""
    batch, heads, length, dim = t.shape
    # A stride over one element is never taken, but must be one that a map can have.
    strides = [s if n > 1 else dim for s, n in zip(t.stride()[2::-1], (length, heads, batch))]
    return launch.tensor_map(t, (dim, length, heads, batch), strides, (PANEL, rows, 1, 1))


def _mappable(t: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that repeats samples, heads or tokens (a stride of 0, which no map has)."""
    return t.contiguous() if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape)) else t


def forward(q, k, v, valid, kv_len, text_len, *, pattern, frame_len, n_text, text_front, scale, out, lse, launch) -> None:
    """Fill ``out`` and ``lse``; arguments as of the Triton launcher.

    Args:
        launch: as of :func:`vidkern.ops.grid_attention.cuda.forward`; ``launch.tensor_map(t, sizes, strides, box)`` makes the maps.
    """
    q, k, v = _mappable(q), _mappable(k), _mappable(v)
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    live, live_step = _live(q, valid, kv_len, text_len, pattern.n_frames, frame_len, n_text, text_front)
    together = GROUPS if group % GROUPS == 0 else 1
    shape = Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, False)
    tiles = tiling(shape, together, live is not None)
    tables = _tables(shape, tiles, q.device)
    width, dim = tiles.block_n, padded(q.shape[3])
    given = Forward(
        _map(launch, q, SHARE), _map(launch, k, width), _map(launch, v, width),
        *_addresses(k, v, out, lse, *tables, live), *_strides(k, v, out, lse), live_step,
        tables.n_tiles, heads, group, together, q.shape[3], scale * _LOG2E,
    )  # fmt: skip
    name = f"grid_attention_hopper_forward_{dim}_{_NAMES[q.dtype]}_{width}{'_live' if live is not None else ''}"
    blocks = tables.n_tiles * batch * (heads // together)
    reads = [q, k, v, *tables, *([] if live is None else [live])]
    launch(name, given, blocks, THREADS, shared_bytes(dim, width), reads, [out, lse])
