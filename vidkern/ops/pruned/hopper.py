"""Launchers of the products for compute capability 9.0 (csrc/cuda/pruned_hopper*.cu), as cuda.py: :class:`Kit` around a callable that
launches a kernel by name, and, as this module itself, the kit that ops/pruned/compose.py takes, on the GPU. The passes over rows are cuda.py's.
"""

from __future__ import annotations

import ctypes

import torch

from ... import cuda as kernels
from ...cuda.tensor_map import PANEL, TensorMap, parameters
from . import configs, cuda
from .cuda import Prologue, Source, why_not

__all__ = ["Kit", "Prologue", "SOURCES", "Source", "normed_backward", "pair_rows", "product", "slope", "why_not"]

# Source in csrc/cuda -> how the names of its kernels start.
SOURCES = {
    "pruned_hopper": ("pruned_hopper_nt", "pruned_hopper_pairs", "pruned_hopper_cluster"),
    "pruned_hopper_backward": ("pruned_hopper_nn", "pruned_hopper_tn"),
}
# Rows, columns, depth, warps and stages of the tiles. Stages: what 227 KB hold beside 33 KB of sums and barriers; no tile is wider, as the
# sums of 256 columns take 128 of a thread's 216 registers. The rates are assumptions until a sweep on a GPU replaces them: a product of 64
# columns reads as much shared memory as it has time for, one of 256 little more than half of that.
TILES = (configs.Config(128, 256, 64, 12, 4), configs.Config(128, 128, 64, 12, 6, 0.9), configs.Config(128, 64, 64, 12, 8, 0.7))
BESIDE = 33 << 10  # bytes of shared memory beside the stages
BOXES, LINES, LISTED = range(3)  # vk::pruned::Way
CLUSTER = 2  # blocks that share the right operand

Boxed = parameters(
    "Boxed", [*((n, TensorMap) for n in "ab"), ("p", cuda.Product), *((n, ctypes.c_int32) for n in ("a_way", "b_way", "blocks"))]
)


def tile_for(device: torch.device, m: int, n: int) -> configs.Config:
    """The tile that is done soonest with m x n results."""
    return configs._forced[-1] if configs._forced else configs._choose(TILES, m, n, cuda.processors(device))


def shared(c: configs.Config) -> int:
    """Bytes of shared memory that a block of a product takes."""
    return BESIDE + cuda.shared(c)


def boxed(t: torch.Tensor) -> bool:
    """Whether boxes of ``t`` [rows, values] can be copied: rows on 16 bytes, which do not overlap."""
    return cuda.even(t) and (t.stride(0) >= t.shape[1] or t.shape[0] == 1)


def box_map(launch, t: torch.Tensor, rows: int, values: int, box_rows: int) -> TensorMap:
    """The map of a ``t`` [rows, values] that is :func:`boxed`, for boxes of ``box_rows`` rows of a panel; zeros outside of it."""
    step = t.stride(0) if rows > 1 else -(-values // 8) * 8
    return launch.tensor_map(t, (values, rows), (step,), (PANEL, box_rows))


def waves(tiles: int, places: int) -> int:
    """How often every place gets a tile."""
    return -(-tiles // places)


class Kit(cuda.Kit):
    """The kernels behind ``launch(kernel, parameters, blocks, threads, shared, reads, writes)`` and ``launch.tensor_map``."""

    @staticmethod
    def _way(t, rows, listed: bool) -> int:
        return LISTED if listed else BOXES if rows is None and boxed(t) else LINES

    def product(
        self, a: Source, b: Source, out, m, n, k, *, bias=None, gate=None, act="none", half=0, u=None, partial=None, residual=None,
        out_rows=None, out_cols=None, fill=0,
    ) -> None:
        """out[:, out_cols] = residual + gate * act(A B^T + partial + bias), as in cpu.py."""
        cuda._fill(out, residual, fill)
        pairs = act == "swiglu"
        c, processors = tile_for(out.device, m, 2 * n if pairs else n), cuda.processors(out.device)
        written = c.block_n // 2 if pairs else c.block_n
        rows, columns = -(-m // c.block_m), -(-n // written)
        (*memory_a, listed_a), (*memory_b, listed_b) = self._operand(a, columns > 1), self._operand(b, rows > 1)
        ta, tb = memory_a[0], memory_b[0]
        ways = self._way(*memory_a[:2], listed_a), self._way(*memory_b[:2], listed_b)
        form, tiles, step = cuda.form_of(a, b, pairs), rows * columns, 1
        if form == "nt" and c.block_n == 128 and rows > 1 and ways == (BOXES, BOXES) and processors >= CLUSTER:
            # Where an odd number of rows of tiles costs no wave.
            together = -(-rows // CLUSTER) * columns
            if waves(together, processors // CLUSTER) <= waves(tiles, processors):
                form, tiles, step, processors = "cluster", together, CLUSTER, processors // CLUSTER
        blocks = min(tiles, processors) * step
        product, reads = cuda._product(
            memory_a, memory_b, out, u, residual, bias, gate, partial, out_rows, out_cols, m, n, k, half, act, False
        )
        given = Boxed(p=product, a_way=ways[0], b_way=ways[1], blocks=blocks)
        if ways[0] == BOXES:
            given.a = box_map(self._launch, ta, k, m, PANEL) if a.across else box_map(self._launch, ta, m, k, c.block_m)
        if ways[1] == BOXES:
            given.b = box_map(self._launch, tb, k, n, PANEL) if b.across else box_map(self._launch, tb, half + n, k, written // step)
        name = f"pruned_hopper_{form}_{cuda.NAMES[ta.dtype]}_{c.block_n}"
        self._launch(name, given, blocks, 32 * c.warps, shared(c), reads, cuda._given(out, u))


_kit = Kit(kernels.launch)
pair_rows, product, slope, normed_backward = _kit.pair_rows, _kit.product, _kit.slope, _kit.normed_backward
