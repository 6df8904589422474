"""Block sizes of the Triton kernels as data, and the choice among them.

A table holds, per kernel, per class of shared memory and per (bytes per element, padded head dim), the configurations that are
shipped; nothing else is compiled. There is no autotuning at run time: it would need a GPU to build, and would time the user's first
steps. What a plan really computes is counted (plan.py) and weighed by each configuration's ``rate``, so that frame lengths which
no block divides pick the blocks that waste least.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from ..forcing import Forced
from . import plan

KINDS = ("forward", "dq", "dkv")
# A column of an edge tile costs more than one of a main tile: narrow products, masks, and a product that is added in a second
# step. An assumption until a sweep on a GPU replaces it.
EDGE_COST = 1.6


@dataclass(frozen=True)
class Config:
    """Tile rows, main and edge tile columns (of queries x keys; keys x queries for "dkv"), warps, pipeline stages.

    ``rate`` is the relative speed per score element, 1 for the best of its row of the table; ``straddle`` says whether it may run
    tiles that cross from frame to frame, which take more registers; ``registers`` is how many a thread may take where the
    assembler, left alone, spills in order to fit more blocks on a multiprocessor.
    """

    block_m: int
    block_n: int
    block_edge: int
    warps: int
    stages: int
    rate: float = 1.0
    straddle: bool = True
    registers: int | None = None


# Families of GPUs by what limits a configuration: 163 KB (sm_80, 87), 227 KB and wgmma (sm_90), 227 KB and tcgen05 (sm_100, 103,
# 110), and 99 KB of shared memory a block (sm_86, 89, 120, 121).
_FAMILIES = {
    (8, 0): "ampere", (8, 7): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell", (11, 0): "blackwell",
}
_SHARED = {"ampere": 163 * 1024, "hopper": 227 * 1024, "blackwell": 227 * 1024, "small": 99 * 1024}
C = Config
# (kind, bytes per element) -> padded head dim -> family, or "any" for those not named -> configurations. Smaller dims use the next
# larger row. Registers and spills of each are in bench/results/aot; the rates are assumptions until a sweep.
_TABLE: dict[tuple[str, int], dict[int, dict[str, tuple[Config, ...]]]] = {
    ("forward", 2): {
        64: {
            "any": (C(128, 64, 16, 8, 3), C(64, 64, 16, 4, 2, 0.85)),
            "hopper": (C(128, 128, 32, 8, 3), C(128, 64, 16, 8, 3, 0.95), C(64, 64, 16, 4, 3, 0.85)),
            "small": (C(128, 64, 16, 8, 3), C(64, 64, 16, 4, 3, 0.85)),
        },
        128: {
            "any": (C(128, 64, 16, 8, 3), C(64, 64, 16, 4, 2, 0.85)),
            "hopper": (C(128, 128, 32, 8, 3), C(128, 64, 16, 8, 3, 0.95), C(64, 64, 16, 4, 3, 0.85)),
            "blackwell": (C(128, 64, 16, 8, 3), C(64, 64, 16, 4, 2, 0.85, straddle=False)),
            "small": (C(128, 64, 16, 8, 2),),
        },
        256: {"any": (C(64, 32, 16, 8, 2),), "blackwell": (C(64, 32, 16, 8, 3),), "small": (C(32, 32, 16, 4, 1),)},
    },
    ("dq", 2): {
        64: {
            "any": (C(128, 64, 16, 8, 2), C(64, 64, 16, 4, 2, 0.85)),
            "blackwell": (C(128, 32, 16, 8, 2), C(64, 64, 16, 8, 2, 0.95)),
            "small": (C(128, 32, 16, 8, 2),),
        },
        128: {
            "any": (C(64, 64, 16, 8, 2),),
            "hopper": (C(128, 64, 16, 8, 3), C(64, 64, 16, 8, 3, 0.85)),
            "small": (C(64, 32, 16, 4, 2),),
        },
        256: {"any": (C(64, 32, 16, 8, 1),), "small": (C(32, 16, 16, 4, 1),)},
    },
    ("dkv", 2): {
        64: {
            "any": (C(128, 32, 16, 8, 2),),
            # Two blocks of four warps on a multiprocessor hide what one stage does not; a second stage spills with masks.
            "ampere": (C(64, 32, 16, 4, 1),),
            "small": (C(64, 32, 16, 8, 2),),
            "hopper": (C(128, 64, 16, 8, 3), C(64, 64, 16, 8, 3, 0.85)),
        },
        128: {
            "any": (C(64, 32, 16, 8, 2),),
            "hopper": (C(128, 32, 16, 8, 3, straddle=False), C(64, 32, 16, 8, 3, 0.85)),
            "blackwell": (C(64, 32, 16, 8, 1),),
        },
        256: {
            "any": (C(64, 16, 16, 8, 1),),
            # Triton 3.7 makes an empty kernel of the straddling form.
            "blackwell": (C(64, 16, 16, 8, 1, straddle=False),),
            "small": (C(32, 16, 16, 4, 1),),
        },
    },
    ("forward", 4): {
        64: {"any": (C(32, 32, 16, 4, 1),)},
        128: {"any": (C(16, 16, 16, 8, 1),)},
        256: {"any": (C(16, 16, 16, 8, 1),)},
    },
    ("dq", 4): {
        64: {"any": (C(32, 16, 16, 4, 1),)},
        128: {"any": (C(16, 16, 16, 8, 1),)},
        256: {"any": (C(16, 16, 16, 8, 1),)},
    },
    ("dkv", 4): {
        64: {"any": (C(32, 16, 16, 8, 1, registers=128),)},
        128: {"any": (C(16, 16, 16, 8, 1, registers=128),)},
        256: {"any": (C(16, 16, 16, 8, 1),)},
    },
}
forced = Forced(KINDS)  # for sweeps and tests


def padded_dim(dim: int) -> int:
    """Head dim as the kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def family(capability: tuple[int, int]) -> str:
    """The row of the table for an NVIDIA GPU of this compute capability."""
    return _FAMILIES.get(tuple(capability), "small")


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may take there."""
    return _SHARED[family(capability)]


def ahead(family: str) -> bool:
    """Whether the kernels read a tile's column a step early there; Triton 3.7 does not compile that for sm_100."""
    return family != "blackwell"


def shipped(kind: str, dim: int, itemsize: int, family: str) -> tuple[Config, ...]:
    """The configurations of ``kind`` for a head dim and element size in bytes on a family of GPUs."""
    rows = _TABLE[kind, itemsize]
    row = rows[min(d for d in rows if d >= dim)]
    return row.get(family, row["any"])


def candidates(kind: str, dim: int, itemsize: int, shared: int) -> list[Config]:
    """What a sweep tries: every combination whose tiles can fit ``shared`` bytes of shared memory."""
    width = padded_dim(dim) * itemsize
    found = []
    for m, n, edge, warps, stages in itertools.product((64, 128), (32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3, 4)):
        held = {"forward": m, "dq": 2 * m, "dkv": 2 * m}[kind]
        if edge <= n and (held + 2 * n * stages) * width <= shared and m * padded_dim(dim) // (32 * warps) <= 128:
            found.append(Config(m, n, edge, warps, stages))
    return found


def choose(
    kind: str, dim: int, itemsize: int, family: str, shape: plan.Shape, forced: Config | None = None
) -> tuple[Config, plan.Tiling]:
    """The configuration and tiling that compute ``shape`` soonest, by counted work over ``rate``; of ``forced``, where given."""
    return _best((forced,) if forced else shipped(kind, dim, itemsize, family), shape)


@functools.lru_cache(maxsize=1024)
def _best(configs: tuple[Config, ...], shape: plan.Shape) -> tuple[Config, plan.Tiling]:
    def time(pair):
        config, tiling = pair
        work = plan.work(shape, tiling)
        return (work.main + EDGE_COST * work.edge) / config.rate

    pairs = [
        (c, plan.Tiling(c.block_m, c.block_n, c.block_edge, straddle))
        for c in configs for straddle in (False, True) if c.straddle or not straddle
    ]
    return min(pairs, key=time)
