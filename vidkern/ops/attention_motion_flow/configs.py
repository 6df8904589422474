"""Block sizes of the Triton kernels as data, and the choice among them.

Frames, sizes and channels are run-time arguments: one build serves every video. What is chosen by shape is only which of the shipped
tiles fills the GPU's last wave best; there is no autotuning at run time. The rates are assumptions until a sweep on a GPU replaces them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..forcing import Forced

# "held": forward with all of q's channels in place; "wide": forward over chunks of channels; "vote"; "dq", "dk": backward of one head per
# group; "slope", "dq_product", "dk_product": backward through the slab.
KINDS = ("held", "wide", "vote", "dq", "dk", "slope", "dq_product", "dk_product")
_TILED = ("slope", "dq_product", "dk_product")
HELD_DIM = 128  # channels of a group up to which q stays in place, and dQ and dK in registers


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of a tile, warps, pipeline stages; depth 0 is all channels. ``rate`` is the relative speed per multiply-add in a
    full wave; ``lean`` says that it has registers for the mean and the log-sum-exp alone; ``registers`` is how many a thread may take where
    the assembler, left alone, spills."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    rate: float = 1.0
    lean: bool = False
    registers: int | None = None


C = Config
_FAMILIES = {
    (8, 0): "ampere", (8, 7): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell", (11, 0): "blackwell",
}  # fmt: skip
_SHARED = {"ampere": 163 * 1024, "hopper": 227 * 1024, "blackwell": 227 * 1024, "small": 99 * 1024}
# (kind, bytes per element) -> channels of a head up to which (0: any) -> family, or "any" for those not named -> configurations. Registers and
# spills of each are in bench/results/aot/amf.json; the rates are assumptions until a sweep.
_TABLE: dict[tuple[str, int], dict[int, dict[str, tuple[Config, ...]]]] = {
    ("held", 2): {
        64: {"any": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 3, 0.85))},
        128: {"any": (C(128, 64, 0, 8, 2), C(64, 64, 0, 4, 2, 0.85)), "hopper": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 3, 0.85))},
    },
    ("wide", 2): {
        0: {
            "any": (C(128, 128, 32, 8, 3), C(64, 64, 32, 4, 3, 0.75, registers=255)),
            "hopper": (C(128, 256, 64, 8, 3, lean=True), C(128, 128, 64, 8, 4, 0.85), C(64, 64, 64, 4, 4, 0.6)),
        }
    },
    ("vote", 2): {
        64: {"any": (C(64, 64, 0, 4, 3),), "hopper": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 3, 0.85))},
        128: {"any": (C(64, 64, 0, 8, 2),), "hopper": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 3, 0.85))},
        0: {"any": (C(64, 64, 32, 4, 3),)},
    },
    ("dq", 2): {
        64: {
            "any": (C(64, 64, 0, 4, 2), C(64, 32, 0, 4, 2, 0.9)),
            "hopper": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 3, 0.85)),
            "small": (C(64, 32, 0, 4, 2, registers=255),),
        },
        128: {"any": (C(64, 32, 0, 4, 2),), "hopper": (C(128, 64, 0, 8, 3), C(64, 64, 0, 4, 2, 0.85))},
    },
    ("dk", 2): {
        64: {"any": (C(64, 32, 0, 4, 2, registers=255),), "hopper": (C(64, 64, 0, 4, 2),)},
        128: {"any": (C(64, 32, 0, 8, 2),), "hopper": (C(128, 32, 0, 8, 2), C(64, 32, 0, 4, 2, 0.85))},
    },
    ("slope", 2): {
        0: {
            "any": (C(128, 128, 32, 8, 3), C(64, 64, 32, 4, 3, 0.75, registers=255)),
            "hopper": (C(128, 128, 64, 8, 4), C(64, 64, 64, 4, 4, 0.7)),
        }
    },
    ("dq_product", 2): {
        0: {
            "any": (C(128, 128, 32, 8, 3), C(64, 64, 32, 4, 3, 0.75)),
            "hopper": (C(128, 256, 64, 8, 3), C(128, 128, 64, 8, 4, 0.85), C(64, 64, 64, 4, 4, 0.6)),
        }
    },
    ("dk_product", 2): {
        0: {"any": (C(128, 128, 32, 8, 3), C(64, 64, 32, 4, 3, 0.75)), "hopper": (C(128, 128, 64, 8, 4), C(64, 64, 64, 4, 4, 0.7))}
    },
    ("held", 4): {64: {"any": (C(32, 32, 0, 4, 1),)}, 128: {"any": (C(16, 32, 0, 4, 1),)}},
    ("wide", 4): {0: {"any": (C(64, 64, 16, 8, 2), C(32, 64, 16, 4, 2, 0.9, registers=255))}},
    ("vote", 4): {
        64: {"any": (C(32, 32, 0, 4, 1, registers=255),)},
        128: {"any": (C(16, 32, 0, 4, 1, registers=255),)},
        0: {"any": (C(32, 32, 16, 4, 2, registers=255),)},
    },
    ("dq", 4): {64: {"any": (C(32, 16, 0, 4, 1, registers=128),)}, 128: {"any": (C(16, 16, 0, 8, 1, registers=128),)}},
    ("dk", 4): {64: {"any": (C(32, 16, 0, 4, 1, registers=128),)}, 128: {"any": (C(16, 16, 0, 8, 1, registers=128),)}},
    ("slope", 4): {0: {"any": (C(64, 64, 16, 8, 2), C(32, 64, 16, 4, 2, 0.9))}},
    ("dq_product", 4): {0: {"any": (C(64, 64, 16, 8, 2, registers=128), C(32, 64, 16, 4, 2, 0.9))}},
    ("dk_product", 4): {0: {"any": (C(64, 64, 16, 8, 2), C(32, 64, 16, 4, 2, 0.9))}},
}
forced = Forced(KINDS)  # for sweeps and tests


def padded_dim(dim: int) -> int:
    """Channels as the kernels hold them: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def family(capability: tuple[int, int]) -> str:
    """The row of the table for an NVIDIA GPU of this compute capability."""
    return _FAMILIES.get(tuple(capability), "small")


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may take there."""
    return _SHARED[family(capability)]


def ahead(family: str) -> bool:
    """Whether the kernels read what they visit next a step early there; Triton 3.7 does not compile that for sm_100."""
    return family != "blackwell"


def shipped(kind: str, itemsize: int, dim: int, family: str, lean: bool = True, even: bool = True) -> tuple[Config, ...]:
    """The configurations of ``kind`` for elements of so many bytes and heads of so many channels on a family of GPUs. Not ``lean``: those that
    have registers for every result. Not ``even``: a stride or head is no multiple of 8, so that every element has an address and a mask of
    its own, which only the smallest tile has registers for."""
    rows = _TABLE[kind, itemsize]
    row = rows[min((d for d in rows if d >= dim), default=0)]
    found = tuple(c for c in row.get(family, row["any"]) if lean or not c.lean)
    return found if even else found[-1:]


def choose(
    kind: str, itemsize: int, dim: int, family: str, rows: int, columns: int, times: int, processors: int, lean: bool = True, even: bool = True
) -> Config:
    """The configuration that is done soonest with ``times`` maps of rows x columns, of which a program takes block_m rows and, in kernels of
    single tiles, block_n columns: whole waves over ``rate``."""
    return forced.get(kind) or _choose(shipped(kind, itemsize, dim, family, lean, even), kind in _TILED, rows, columns, times, processors)


@functools.lru_cache(maxsize=4096)
def _choose(configs: tuple[Config, ...], tiled: bool, rows: int, columns: int, times: int, processors: int) -> Config:
    def time(c: Config) -> float:
        programs = -(-rows // c.block_m) * times * (-(-columns // c.block_n) if tiled else 1)
        work = c.block_m * (c.block_n if tiled else -(-columns // c.block_n) * c.block_n)
        return -(-programs // processors) * work / c.rate

    return min(configs, key=time)
