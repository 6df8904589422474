"""Launcher of the grouped CUDA kernel (csrc/cuda/pruned_grouped.cu): several layers of different sizes in one launch."""

from __future__ import annotations

import ctypes

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


def forward(xs, weights, biases, act, out, u, *, launch) -> None:
    """Fill ``out`` and ``u`` (or None), one after the other's [m, n] in one flat tensor; ``launch`` as of :class:`.cuda.Kit`. One launch for
    every LAYERS layers."""
    kit = cuda.Kit(launch)
    sizes = [(x.shape[0], w.shape[0], x.shape[1]) for x, w in zip(xs, weights)]
    largest = max(sizes, key=lambda s: s[0] * s[1] * s[2])
    c = cuda.tile_for(out.device, largest[0], sum(n for _, n, _ in sizes))
    biases = [b.float().contiguous() for b in biases] or [None] * len(xs)
    xs, weights = ([t if cuda.even(t) else kit.gathered(t) for t in group] for group in (xs, weights))
    starts = [0]
    for m, n, _ in sizes:
        starts.append(starts[-1] + m * n)
    # The deepest layers first, so that none is left alone at the end.
    order = sorted(range(len(xs)), key=lambda i: -sizes[i][2])
    for first in range(0, len(order), LAYERS):
        chosen = order[first : first + LAYERS]
        given, blocks = Grouped(), 0
        for slot, i in enumerate(chosen):
            m, n, k = sizes[i]
            bias = None if biases[i] is None else biases[i].data_ptr()
            given.layers[slot] = Layer(
                xs[i].data_ptr(), weights[i].data_ptr(), bias, starts[i], xs[i].stride(0), weights[i].stride(0), m, n, k, blocks
            )
            blocks += -(-m // c.block_m) * -(-n // c.block_n)
        given.out, given.u, given.count, given.act = out.data_ptr(), None if u is None else u.data_ptr(), len(chosen), cuda.ACTS[act]
        reads = [t for i in chosen for t in (xs[i], weights[i], biases[i]) if t is not None]
        name = f"pruned_grouped_{cuda.NAMES[out.dtype]}_{c.block_m}"
        launch(name, given, blocks, 32 * c.warps, cuda.shared(c), reads, [out] if u is None else [out, u])
