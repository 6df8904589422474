"""Block sizes of the Triton product as data, and the choice among them.

Sizes of a layer are run-time arguments: twenty pruned widths run one build. What is chosen by shape is only which of the shipped tiles
fills the GPU's last wave best; there is no autotuning at run time. The rates are assumptions until a sweep on a GPU replaces them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of a tile, warps, pipeline stages; ``rate`` is the relative speed per multiply-add in a full wave."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    rate: float = 1.0


C = Config
_FAMILIES = {
    (8, 0): "ampere", (8, 7): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell", (11, 0): "blackwell",
}  # fmt: skip
_SHARED = {"ampere": 163 * 1024, "hopper": 227 * 1024, "blackwell": 227 * 1024, "small": 99 * 1024}
# (bytes per element, pairs) -> family, or "any" for those not named -> configurations. Pairs hold two accumulators.
_TABLE: dict[tuple[int, bool], dict[str, tuple[Config, ...]]] = {
    (2, False): {
        "any": (C(128, 128, 32, 8, 3), C(64, 128, 32, 4, 3, 0.9), C(64, 64, 32, 4, 3, 0.75)),
        "hopper": (C(128, 128, 64, 8, 4), C(64, 128, 64, 4, 4, 0.9), C(64, 64, 64, 4, 4, 0.75)),
    },
    (2, True): {"any": (C(128, 64, 32, 8, 3), C(64, 64, 32, 4, 3, 0.85)), "hopper": (C(128, 64, 64, 8, 4), C(64, 64, 64, 4, 4, 0.85))},
    (4, False): {"any": (C(64, 64, 16, 8, 2), C(32, 64, 16, 4, 2, 0.9))},
    (4, True): {"any": (C(32, 64, 16, 8, 2), C(32, 32, 16, 4, 2, 0.9))},
}
_forced: list[Config] = []


def family(capability: tuple[int, int]) -> str:
    """The row of the table for an NVIDIA GPU of this compute capability."""
    return _FAMILIES.get(tuple(capability), "small")


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may take there."""
    return _SHARED[family(capability)]


def shipped(itemsize: int, pairs: bool, family: str, even: bool = True) -> tuple[Config, ...]:
    """The configurations for operands of so many bytes per element. Not ``even``: a size or stride is no multiple of 8, so that every
    element has an address and a mask of its own, which only the smallest tile has registers for."""
    row = _TABLE[itemsize, pairs]
    found = row.get(family, row["any"])
    return found if even else found[-1:]


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Run every product with ``config`` whatever the table says: for sweeps and tests."""
    _forced.append(config)
    try:
        yield
    finally:
        _forced.pop()


def choose(itemsize: int, pairs: bool, family: str, m: int, n: int, processors: int, even: bool = True) -> Config:
    """The configuration that is done soonest with m x n results (of each half, for pairs): whole waves over ``rate``."""
    return _forced[-1] if _forced else _choose(shipped(itemsize, pairs, family, even), m, n, processors)


@functools.lru_cache(maxsize=4096)
def _choose(configs: tuple[Config, ...], m: int, n: int, processors: int) -> Config:
    def time(c: Config) -> float:
        tiles = -(-m // c.block_m) * -(-n // c.block_n)
        return -(-tiles // processors) * c.block_m * c.block_n / c.rate

    return min(configs, key=time)
