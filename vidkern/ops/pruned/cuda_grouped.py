"""Launcher of the grouped CUDA kernel (csrc/cuda/pruned_grouped.cu): several layers of different sizes in one launch."""

from __future__ import annotations

import ctypes
import itertools
from typing import NamedTuple

from . import cuda

SOURCES = {"pruned_grouped": ("pruned_grouped",)}
LAYERS = 32  # of a launch


class Layer(ctypes.Structure):
    """``vk::pruned::Layer``."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "weight", "bias")), *((n, ctypes.c_int64) for n in ("start", "x_step", "weight_step")),
        *((n, ctypes.c_int32) for n in ("m", "n", "k", "first")),
    ]  # fmt: skip


class Grouped(ctypes.Structure):
    """``vk::pruned::Grouped``."""

    _fields_ = [("layers", Layer * LAYERS), ("out", ctypes.c_void_p), ("u", ctypes.c_void_p), ("count", ctypes.c_int32), ("act", ctypes.c_int32)]


class Layers(NamedTuple):
    """What launches take of the layers: inputs and weights as kernels can read them, float32 biases or None, (m, n, k), and where results
    begin; and which layers each launch takes, the deepest first, so that none is left alone at the end."""

    xs: list
    weights: list
    biases: list
    sizes: list[tuple[int, int, int]]
    starts: list[int]
    launches: list[list[int]]

    @classmethod
    def of(cls, xs, weights, biases, kit, fits, together: int) -> Layers:
        """``fits``: whether kernels can read a tensor where it lies; ``together``: layers of a launch."""
        sizes = [(x.shape[0], w.shape[0], x.shape[1]) for x, w in zip(xs, weights)]
        xs, weights = ([t if fits(t) else kit.gathered(t) for t in group] for group in (xs, weights))
        starts = list(itertools.accumulate((m * n for m, n, _ in sizes), initial=0))
        order = sorted(range(len(xs)), key=lambda i: -sizes[i][2])
        launches = [order[i : i + together] for i in range(0, len(order), together)]
        return cls(xs, weights, [b.float().contiguous() for b in biases] or [None] * len(xs), sizes, starts, launches)

    def bias(self, i: int) -> int | None:
        return None if self.biases[i] is None else self.biases[i].data_ptr()

    def read(self, launch: list[int]) -> list:
        """The tensors that these layers read."""
        return [t for i in launch for t in (self.xs[i], self.weights[i], self.biases[i]) if t is not None]


def forward(xs, weights, biases, act, out, u, *, launch) -> None:
    """Fill ``out`` and ``u`` (or None), one after the other's [m, n] in one flat tensor; ``launch`` as of :class:`.cuda.Kit`. One launch for
    every LAYERS layers."""
    layers = Layers.of(xs, weights, biases, cuda.Kit(launch), cuda.even, LAYERS)
    largest = max(layers.sizes, key=lambda s: s[0] * s[1] * s[2])
    c = cuda.tile_for(out.device, largest[0], sum(n for _, n, _ in layers.sizes))
    for chosen in layers.launches:
        given, blocks = Grouped(), 0
        for slot, i in enumerate(chosen):
            (m, n, k), x, weight = layers.sizes[i], layers.xs[i], layers.weights[i]
            given.layers[slot] = Layer(
                x.data_ptr(), weight.data_ptr(), layers.bias(i), layers.starts[i], x.stride(0), weight.stride(0), m, n, k, blocks
            )
            blocks += -(-m // c.block_m) * -(-n // c.block_n)
        given.out, given.u, given.count, given.act = out.data_ptr(), None if u is None else u.data_ptr(), len(chosen), cuda.ACTS[act]
        name = f"pruned_grouped_{cuda.NAMES[out.dtype]}_{c.block_m}"
        launch(name, given, blocks, 32 * c.warps, cuda.shared(c), layers.read(chosen), [out] if u is None else [out, u])
