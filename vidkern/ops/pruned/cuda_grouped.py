"""Launcher of the grouped CUDA kernel (csrc/cuda/pruned_grouped.cu): several layers of different sizes in one launch."""

from __future__ import annotations

import ctypes

import torch

from . import cuda

SOURCES = {"pruned_grouped": ("pruned_grouped",)}


class Grouped(ctypes.Structure):
    """``vk::pruned::Grouped``."""

    _fields_ = [*((n, ctypes.c_void_p) for n in ("layers", "tiles", "out", "u")), ("act", ctypes.c_int32)]


def forward(xs, weights, biases, act, out, u, *, launch) -> None:
    """Fill ``out`` and ``u`` (or None), one after the other's [m, n] in one flat tensor; ``launch`` as of :class:`.cuda.Kit`.

    The list of tiles is copied to the device at every call, so that it cannot be captured in a CUDA graph."""
    device, kit = out.device, cuda.Kit(launch)
    sizes = [(x.shape[0], w.shape[0], x.shape[1]) for x, w in zip(xs, weights)]
    largest = max(sizes, key=lambda s: s[0] * s[1] * s[2])
    c = cuda.tile_for(device, largest[0], sum(n for _, n, _ in sizes))
    biases = [b.float().contiguous() for b in biases]
    xs, weights = ([t if cuda.even(t) else kit.gathered(t) for t in group] for group in (xs, weights))
    layers, tiles, start = [], [], 0
    for i, (x, w, (m, n, k)) in enumerate(zip(xs, weights, sizes)):
        layers.append([x.data_ptr(), w.data_ptr(), biases[i].data_ptr() if biases else 0, start, m, n, k, x.stride(0), w.stride(0)])
        tiles += [[i, a, b] for b in range(-(-n // c.block_n)) for a in range(-(-m // c.block_m))]
        start += m * n
    # The longest layers first, so that none is left alone at the end.
    tiles.sort(key=lambda t: -sizes[t[0]][2])
    layers, order = torch.tensor(layers, device=device), torch.tensor(tiles, dtype=torch.int32, device=device)
    given = Grouped(layers.data_ptr(), order.data_ptr(), out.data_ptr(), None if u is None else u.data_ptr(), cuda.ACTS[act])
    launch(
        f"pruned_grouped_{cuda.NAMES[out.dtype]}_{c.block_m}", given, len(tiles), 32 * c.warps, cuda.shared(c),
        [layers, order, *xs, *weights, *biases], [out] if u is None else [out, u],
    )  # fmt: skip
