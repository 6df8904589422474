"""Which frames a Triton kernel's programs work on, as tables on the device: built once for a list of pairs, frame size, tile and device."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Tiles int32 [n, 4] and members int32 [P, 2] of a kernel, whose docstring says what they hold."""

    tiles: torch.Tensor
    members: torch.Tensor


class Slab(NamedTuple):
    """A query frame, and where its entries in :class:`Slots` start and how many there are."""

    frame: int
    slot: int
    count: int


class Slots(NamedTuple):
    """Per query frame its targets: slots int32 [P, 2] (target, pair), shares int32 [P, 2] (first, last of that target); on the host, the
    slabs, whether any target has several shares, and the frames that are no query and those that are no target."""

    slots: torch.Tensor
    shares: torch.Tensor
    slabs: tuple[Slab, ...]
    added: bool
    no_query: tuple[int, ...]
    no_target: tuple[int, ...]


def _by(pairs, which: int) -> dict[int, list[tuple[int, int]]]:
    """Frame ``which`` of the pairs -> (the other frame, number of the pair), both in ascending order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for p, pair in enumerate(pairs):
        found.setdefault(pair[which], []).append((pair[1 - which], p))
    return {frame: sorted(found[frame]) for frame in sorted(found)}


def _on(device: torch.device, rows) -> torch.Tensor:
    """Rows as int32 on the device; a CUDA graph could not capture the copy."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"attention_motion_flow: first call for these frames on {device} inside a CUDA graph capture, expected a call before it: "
            "tables have to be copied to the device"
        )
    # In a thread of its own: what a CUDA-graph pool or inference mode is switched on for is the calling thread.
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(torch.tensor, rows, dtype=torch.int32, device=device).result()


# None of them is ever dropped: a captured CUDA graph goes on reading the tables.
@functools.lru_cache(maxsize=None)
def across(pairs, size: int, block: int, device: torch.device) -> Tiles:
    """Tiles of rows for the forward: the rows of all query frames that look at one target, end to end. Tiles of the same rows follow each
    other, so that they find these in the L2 cache, and all programs that run at one time read the same keys of a few targets."""
    tiles, members = [], []
    for target, queries in _by(pairs, 1).items():
        rows = len(queries) * size
        for first in range(0, rows, block):
            place = queries[first // size][0] * size + first % size
            tiles.append((place, target, len(members), first, rows))
        members += queries
    return Tiles(_on(device, [tile[1:] for tile in sorted(tiles)]), _on(device, members))


@functools.lru_cache(maxsize=None)
def within(pairs, which: int, size: int, block: int, frames: int, device: torch.device) -> Tiles:
    """Tiles of one frame each for the backward, of query frames (``which`` = 0) or of targets (1); the longest lists first."""
    tiles, members = [], []
    found = _by(pairs, which)
    for frame in range(frames):
        others = found.get(frame, [])
        for first in range(0, size, block):
            tiles.append((-len(others), frame, first, len(members), len(members) + len(others)))
        members += others
    return Tiles(_on(device, [tile[1:] for tile in sorted(tiles)]), _on(device, members))


@functools.lru_cache(maxsize=None)
def slots(pairs, frames: int, device: torch.device) -> Slots:
    """The slabs of query frames in ascending order, and what each adds to whose dK."""
    queries, targets = _by(pairs, 0), _by(pairs, 1)
    rows, shares, slabs = [], [], []
    for frame, found in queries.items():
        slabs.append(Slab(frame, len(rows), len(found)))
        for target, pair in found:
            rows.append((target, pair))
            shares.append((int(targets[target][0][1] == pair), int(targets[target][-1][1] == pair)))
    missing = [tuple(f for f in range(frames) if f not in found) for found in (queries, targets)]
    return Slots(_on(device, rows), _on(device, shares), tuple(slabs), any(len(t) > 1 for t in targets.values()), *missing)
