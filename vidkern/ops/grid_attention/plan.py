"""Which tiles a GPU kernel visits: the pattern turned into row tiles and the column tiles that each one needs.

A plan covers every visible (row, column) pair of tokens exactly once, by tiles of two kinds:

* main tiles: ``block_n`` columns that every row of the tile sees: no mask at all in the kernel;
* edge tiles: the rest (tails of a run of frames, and what only some rows of a tile that straddles frames see), ``block_edge``
  columns with a mask.

Runs of frames that are neighbours in memory are cut as one, so that a frame's own view costs no tail per frame. Rows are
queries and columns keys; ``transposed`` swaps the roles for the gradient of keys and values. Text is one more "frame". Tiles are
ordered heaviest first (longest processing time first), which matters for causal rules, windows and text rows.

A plan is numpy work of tens of milliseconds, done once per pattern, sizes, blocks and device; masks that live on the device (``valid``,
``kv_len``, ``text_len``) never change it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from .patterns import FramePattern


class Shape(NamedTuple):
    """What a plan is made for: the pattern's key, tokens per frame, text tokens, where the text is, and the direction."""

    key: str
    frame_len: int
    n_text: int
    text_front: bool
    transposed: bool


class Tiling(NamedTuple):
    """Rows per tile, columns per main and per edge tile, and whether a row tile may cross from one frame into the next."""

    block_m: int
    block_n: int
    block_edge: int
    straddle: bool


class Plan(NamedTuple):
    """Tables that the kernels read; int32, contiguous.

    ``tiles`` [n_tiles, 6]: first row, end row, first entry of ``main``, main tiles, first entry of ``edge``, edge tiles.
    ``main`` [*]: first column of each main tile. ``edge`` [*, 4]: first column, end column (at most block_edge further), first row
    and end row of each edge tile.
    """

    tiles: torch.Tensor
    main: torch.Tensor
    edge: torch.Tensor

    @property
    def n_tiles(self) -> int:
        """Row tiles of one head of one sample."""
        return self.tiles.shape[0]


class Work(NamedTuple):
    """Score elements of one head of one sample: computed in main tiles, computed in edge tiles, and needed; heaviest tile's."""

    main: int
    edge: int
    needed: int
    heaviest: int


def _runs(flags: np.ndarray) -> np.ndarray:
    """Maximal runs of True as rows (first, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return edges.reshape(-1, 2)


def _units(shape: Shape) -> tuple[np.ndarray, np.ndarray, int | None]:
    """First token of each frame and of the end (text counts as a frame), who sees whom, and the text's index."""
    mask = FramePattern.from_key(shape.key).frame_mask()
    mask = mask.T if shape.transposed else mask
    lens = np.full(mask.shape[0], shape.frame_len, dtype=np.int64)
    text = None
    if shape.n_text:
        text = 0 if shape.text_front else mask.shape[0]
        lens = np.insert(lens, text, shape.n_text)
        mask = np.insert(np.insert(mask, text, True, axis=0), text, True, axis=1)
    return np.concatenate(([0], lens.cumsum())), mask, text


def _row_tiles(starts: np.ndarray, text: int | None, tiling: Tiling) -> np.ndarray:
    """(first row, end row) of every tile."""
    n = len(starts) - 1
    if tiling.straddle:
        bounds = {0, n} if text is None else {0, n, text, text + 1}
    else:
        bounds = set(range(n + 1))
    cuts = starts[sorted(bounds)]
    spans = zip(cuts[:-1], cuts[1:])
    first = np.concatenate([np.arange(a, b, tiling.block_m) for a, b in spans])
    end = np.minimum(first + tiling.block_m, cuts[np.searchsorted(cuts, first, "right")])
    return np.stack([first, end], 1)


def _segments(starts: np.ndarray, seen: np.ndarray, first_unit: int) -> tuple[list, list]:
    """Columns of a tile whose rows lie in the frames of ``seen`` [frames of the tile, all frames].

    Returns (first column, end column) of what all rows see, and (first column, end column, first row, end row) of the rest.
    """
    full = seen.all(0)
    whole = [(starts[a], starts[b]) for a, b in _runs(full)]
    partial = []
    rest = seen & ~full
    if rest.any():
        for rows in np.unique(rest[:, rest.any(0)], axis=1).T:
            columns = _runs((rest == rows[:, None]).all(0))
            for r0, r1 in _runs(rows):
                partial += [(starts[a], starts[b], starts[first_unit + r0], starts[first_unit + r1]) for a, b in columns]
    return whole, partial


class _Cut(NamedTuple):
    """A plan before its segments are cut: row tiles [n, 6] as in :class:`Plan`, main segments [*, 2] (first column, tiles) and edge
    segments [*, 4] (first column, end column, first row, end row)."""

    tiles: np.ndarray
    main: np.ndarray
    edge: np.ndarray


# The choice of blocks cuts every candidate, and the plan of the winner is built right after.
@functools.lru_cache(maxsize=32)
def _cut(shape: Shape, tiling: Tiling) -> _Cut:
    starts, mask, text = _units(shape)
    length, block_n, block_edge = starts[-1], tiling.block_n, tiling.block_edge
    rows = _row_tiles(starts, text, tiling)
    units = np.searchsorted(starts, np.stack([rows[:, 0], rows[:, 1] - 1], 1), "right") - 1
    # Tiles over the same frames share their columns.
    pairs, which = np.unique(units, axis=0, return_inverse=True)
    main, edge, heads, n_main, n_edge = [], [], [], 0, 0
    for a, b in pairs:
        whole, partial = _segments(starts, mask[a : b + 1], a)
        head = [n_main, 0, n_edge, 0]
        for c0, c1 in whole:
            tiles = (c1 - c0) // block_n
            if tiles:
                main.append((c0, tiles))
                head[1] += tiles
            if c0 + tiles * block_n < c1:
                partial.append((c0 + tiles * block_n, c1, 0, length))
        edge += partial
        head[3] = sum(-((c0 - c1) // block_edge) for c0, c1, _, _ in partial)
        n_main, n_edge = n_main + head[1], n_edge + head[3]
        heads.append(head)
    tiles = np.concatenate([rows, np.array(heads)[which.reshape(-1)]], 1)
    cost = tiles[:, 3] * block_n + tiles[:, 5] * block_edge
    return _Cut(
        tiles[np.argsort(-cost, kind="stable")],
        np.array(main, dtype=np.int64).reshape(-1, 2),
        np.array(edge, dtype=np.int64).reshape(-1, 4),
    )


def _steps(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _build(shape: Shape, tiling: Tiling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of a :class:`Plan` as arrays. A table of nothing still needs an address: each ends with one unused entry."""
    tiles, main, edge = _cut(shape, tiling)
    columns = np.repeat(main[:, 0], main[:, 1]) + _steps(main[:, 1]) * tiling.block_n
    counts = -((edge[:, 0] - edge[:, 1]) // tiling.block_edge)
    narrow = np.repeat(edge, counts, axis=0)
    narrow[:, 0] += _steps(counts) * tiling.block_edge
    narrow[:, 1] = np.minimum(narrow[:, 1], narrow[:, 0] + tiling.block_edge)
    tables = tiles, np.append(columns, 0), np.concatenate([narrow, np.zeros((1, 4), dtype=np.int64)])
    return tuple(np.ascontiguousarray(table, dtype=np.int32) for table in tables)


@functools.lru_cache(maxsize=256)
def work(shape: Shape, tiling: Tiling) -> Work:
    """How much a plan computes and how much is needed; what the choice of blocks and the tests count by."""
    starts, mask, _ = _units(shape)
    tiles = _cut(shape, tiling).tiles
    lens = np.diff(starts)
    per_tile = tiling.block_m * (tiles[:, 3] * tiling.block_n + tiles[:, 5] * tiling.block_edge)
    return Work(
        main=int(tiling.block_m * tiling.block_n * tiles[:, 3].sum()),
        edge=int(tiling.block_m * tiling.block_edge * tiles[:, 5].sum()),
        needed=int((mask * lens[:, None] * lens[None, :]).sum()),
        heaviest=int(per_tile.max()),
    )


# Never dropped: a captured CUDA graph goes on reading the tables.
@functools.lru_cache(maxsize=None)
def plan(shape: Shape, tiling: Tiling, device: torch.device) -> Plan:
    """The tables on ``device``; built and copied once."""
    return Plan(*(torch.from_numpy(a).to(device) for a in _build(shape, tiling)))
