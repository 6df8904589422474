"""Launcher of the forward for compute capability 9.0a (csrc/cuda/grid_attention_hopper*): which tiles, and with which parameters."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...cuda.tensor_map import PANEL, TensorMap, parameters
from ..forcing import Forced
from .cuda import _LOG2E, _NAMES, Strides, _addresses, _live, _strides, why_not
from .plan import Shape, Tiling, plan, work

__all__ = ["Config", "SOURCES", "candidates", "choose", "forced", "forward", "why_not"]

# Source below csrc/cuda -> what the names of its kernels begin with.
SOURCES = {f"grid_attention_hopper_{dim}": (f"grid_attention_hopper_forward_{dim}_",) for dim in (64, 96, 128)}
SHARE = 64  # rows of a consumer warpgroup
GROUPS, THREADS = 2, 384  # consumer warpgroups and threads of most blocks
NARROW = 48  # columns of an edge tile
# Consumer warpgroups of a block -> columns of a main tile, and the same where masks on the device hide keys. Three of them have registers
# for head dims up to 64.
WIDTHS = {GROUPS: (64, 80, 96, 112, 128, 144, 160, 176), 3: (64, 80, 96, 112, 128)}
LIVE_WIDTHS = {GROUPS: (96, 128)}  # three stages: a tile that threads bring is full when the next one's copies are under way
MEMORY, ALIGN = 232448, 1024  # bytes of shared memory of a block, and those that its barriers take
# Costs in columns of a main tile, each of two warpgroups: what a column of an edge tile is (nothing runs beside its exponentials in its
# warpgroup), what a tile takes beside its columns, and what share three warpgroups take, which load less for each row. Assumptions until
# a sweep on a GPU replaces them.
EDGE_COST, TILE_COST, SHARES = 2.0, 8, {GROUPS: 1.0, 3: 0.95}

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


def stages(dim: int, groups: int, width: int) -> int:
    """Stages of keys, and of values, that fit into shared memory beside the queries; rows take whole panels of 64 values."""
    row = -(-dim // PANEL) * PANEL * 2
    return min(4, (MEMORY - ALIGN - groups * SHARE * row) // (2 * width * row))


def shared_bytes(dim: int, groups: int, width: int) -> int:
    """Shared memory of a block."""
    return ALIGN + -(-dim // PANEL) * PANEL * 2 * (groups * SHARE + 2 * stages(dim, groups, width) * width)


class Choice(NamedTuple):
    """The tiles of a block, its consumer warpgroups, and its query heads: 1, or of a group as many as warpgroups, each of which has the
    same rows of another one."""

    tiles: Tiling
    groups: int
    together: int


@dataclass(frozen=True)
class Config:
    """What a sweep tries: columns of a main tile, and consumer warpgroups of 64 rows."""

    block_n: int
    groups: int = GROUPS


forced = Forced(("forward", "dq", "dkv"))  # for sweeps and tests; the backward's too


def candidates(head_dim: int, live: bool = False) -> list[Config]:
    """What a sweep tries of the forward, the widest tiles first. ``live``: where masks on the device hide keys."""
    found = (LIVE_WIDTHS if live else WIDTHS).items()
    return [Config(n, groups) for groups, widths in found if groups == GROUPS or head_dim <= 64 for n in reversed(widths)]


@functools.lru_cache(maxsize=256)
def choose(shape: Shape, dim: int, group: int = 1, live: bool = False, forced: Config | None = None) -> Choice:
    """What costs least, and of equals the widest; of ``forced``, where given.

    Args:
        shape: what the plan is made for.
        dim: of the kernels, :func:`padded`.
        group: query heads that share a key head.
        live: whether masks on the device hide keys.

    Raises:
        ValueError: there are no kernels of ``forced``.
    """

    def cost(choice: Choice) -> float:
        w = work(shape, choice.tiles)
        columns = w.main * (1 + TILE_COST / choice.tiles.block_n) + w.edge * (EDGE_COST + TILE_COST / NARROW)
        return columns * SHARES[choice.groups]

    choices = []
    for config in candidates(dim, live):
        if forced in (None, config):
            together = config.groups if group % config.groups == 0 else 1
            tiles = Tiling(SHARE * config.groups // together, config.block_n, NARROW, True)
            choices.append(Choice(tiles, config.groups, together))
    if not choices:
        raise ValueError(f"forced: {forced}, which no kernel of head dim {dim}{' with masks on the device' * live} has")
    return min(choices, key=cost)


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
    shape = Shape(pattern.key, frame_len, n_text, text_front and n_text > 0, False)
    dim = padded(q.shape[3])
    tiles, groups, together = choose(shape, dim, group, live is not None, forced.get("forward"))
    tables = _tables(shape, tiles, q.device)
    width = tiles.block_n
    given = Forward(
        _map(launch, q, SHARE), _map(launch, k, width), _map(launch, v, width),
        *_addresses(k, v, out, lse, *tables, live), *_strides(k, v, out, lse), live_step,
        tables.n_tiles, heads, group, together, q.shape[3], scale * _LOG2E,
    )  # fmt: skip
    name = f"grid_attention_hopper_forward_{dim}_{_NAMES[q.dtype]}_{groups * SHARE}x{width}{'_live' if live is not None else ''}"
    blocks = tables.n_tiles * batch * (heads // together)
    reads = [q, k, v, *tables, *([] if live is None else [live])]
    launch(name, given, blocks, 128 * (groups + 1), shared_bytes(dim, groups, width), reads, [out, lse])
