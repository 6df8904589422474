"""Launcher of the grouped kernel for compute capability 9.0 (csrc/cuda/pruned_hopper_grouped.cu), as cuda_grouped.py."""

from __future__ import annotations

import ctypes

from ...cuda.tensor_map import TensorMap, parameters
from . import configs, cuda, cuda_grouped, hopper

SOURCES = {"pruned_hopper_grouped": ("pruned_hopper_grouped",)}
LAYERS = 13  # of a launch


class Layer(ctypes.Structure):
    """``vk::pruned::BoxedLayer``."""

    _fields_ = [("bias", ctypes.c_void_p), ("start", ctypes.c_int64), *((n, ctypes.c_int32) for n in ("m", "n", "k", "first"))]


Group = parameters(
    "BoxedGroup",
    [
        ("x", TensorMap * LAYERS), ("weight", TensorMap * LAYERS), ("layers", Layer * LAYERS), ("out", ctypes.c_void_p), ("u", ctypes.c_void_p),
        *((n, ctypes.c_int32) for n in ("count", "act", "tiles", "blocks")),
    ],
)  # fmt: skip


def _tiles(c: configs.Config, m: int, n: int) -> int:
    return -(-m // c.block_m) * -(-n // c.block_n)


def tile_for(device, sizes) -> configs.Config:
    """The tile that is done soonest with layers of these (m, n, k)."""
    if configs._forced:
        return configs._forced[-1]

    def time(c: configs.Config) -> float:
        return hopper.waves(sum(_tiles(c, m, n) for m, n, _ in sizes), cuda.processors(device)) * c.block_m * c.block_n / c.rate

    return min(hopper.TILES, key=time)


def forward(xs, weights, biases, act, out, u, *, launch) -> None:
    """Fill ``out`` and ``u`` (or None), one after the other's [m, n] in one flat tensor; ``launch`` as of :class:`.hopper.Kit`. One launch
    for every LAYERS layers."""
    layers = cuda_grouped.Layers.of(xs, weights, biases, hopper.Kit(launch), hopper.boxed, LAYERS)
    c = tile_for(out.device, layers.sizes)
    for chosen in layers.launches:
        given = Group(out=out.data_ptr(), u=None if u is None else u.data_ptr(), count=len(chosen), act=cuda.ACTS[act])
        for slot, i in enumerate(chosen):
            m, n, k = layers.sizes[i]
            given.x[slot] = hopper.box_map(launch, layers.xs[i], m, k, c.block_m)
            given.weight[slot] = hopper.box_map(launch, layers.weights[i], n, k, c.block_n)
            given.layers[slot] = Layer(layers.bias(i), layers.starts[i], m, n, k, given.tiles)
            given.tiles += _tiles(c, m, n)
        given.blocks = min(given.tiles, cuda.processors(out.device))
        name = f"pruned_hopper_grouped_{cuda.NAMES[out.dtype]}_{c.block_n}"
        launch(name, given, given.blocks, 32 * c.warps, hopper.shared(c), layers.read(chosen), [out] if u is None else [out, u])
