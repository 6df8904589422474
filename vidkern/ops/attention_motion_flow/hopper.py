"""Launchers of the CUDA kernels for compute capability 9.0 (csrc/cuda/amf_hopper*.cu): which kernel, over how many blocks, with which
parameters. What a backward prepares from its gradients, a kernel of :mod:`.cuda` does, which runs there as well.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math

import torch

from ...cuda.tensor_map import TensorMap, parameters
from . import cuda
from . import triton_tables as tables

# Source -> prefixes of the names of its kernels.
SOURCES = {
    "amf_hopper": ("amf_hopper_forward_", "amf_hopper_vote_"), "amf_hopper_backward": ("amf_hopper_dq_", "amf_hopper_dk_"),
    "amf_hopper_slope": ("amf_hopper_slope_",), "amf_hopper_slab": ("amf_hopper_slab_",),
}  # fmt: skip
THREADS, STEP = 384, 64  # of a block; channels of a chunk
ROWS, PIECE, COLUMNS = 128, 16, 128  # of a block; of a warp, all in one frame; keys of a product
STAGES, SHARE, CLUSTER = 4, 64, 2  # of the ring; keys of a box where two blocks share them; those blocks
KEYS, QUERIES = {64: 128, 128: 64}, 64  # of a stage of dQ, by channels, and of dK
DEPTH, WIDTH = 64, 256  # of the slab's products: keys or rows of a stage; channels of a block
HEAD = 1024  # bytes of the barriers, rounded up to where panels may begin
_LOG2E = math.log2(math.e)


# ``vk::amf::Forward`` of amf_hopper.cu.
Forward = parameters(
    "Forward",
    [
        ("q", TensorMap), ("k", TensorMap), *((n, ctypes.c_void_p) for n in "given mean index lse top entropy pieces".split()),
        ("frame", cuda.Frame), *((n, ctypes.c_int32) for n in "n_tiles n_pairs groups heads dim".split()),
        *((n, ctypes.c_float) for n in ("scale_log2", "sign")), *((n, ctypes.c_uint32) for n in ("keep", "flip")),
    ],
)  # fmt: skip

# ``vk::amf::Backward`` of amf_hopper_backward.cu.
Backward = parameters(
    "Backward",
    [
        ("rows", TensorMap), ("tokens", TensorMap), *((n, ctypes.c_void_p) for n in "q slopes flags unity out tiles members".split()),
        *((n, ctypes.c_int64) for n in "q_group q_token out_group out_token".split()), ("frame", cuda.Frame),
        *((n, ctypes.c_int32) for n in "n_tiles n_pairs blocks dim".split()), *((n, ctypes.c_float) for n in "centre_x centre_y scale".split()),
    ],
)  # fmt: skip

# ``vk::amf::SlabSlope`` of amf_hopper_slope.cu.
SlabSlope = parameters(
    "SlabSlope",
    [
        ("q", TensorMap), ("k", TensorMap), *((n, ctypes.c_void_p) for n in "slopes flags slab slots".split()), ("frame", cuda.Frame),
        *((n, ctypes.c_int32) for n in "slot n_slots query heads dim blocks padded".split()),
        *((n, ctypes.c_float) for n in "centre_x centre_y scale".split()),
    ],
)  # fmt: skip

# ``vk::amf::Products`` of amf_hopper_slab.cu.
Products = parameters(
    "Products",
    [
        ("slab", TensorMap), ("tokens", TensorMap), *((n, ctypes.c_void_p) for n in "q slopes flags unity out sum slots shares".split()),
        *((n, ctypes.c_int64) for n in "q_head q_token out_head out_token".split()),
        *((n, ctypes.c_int32) for n in "size slot n_slots query heads dim blocks".split()), ("scale", ctypes.c_float),
    ],
)  # fmt: skip


def why_not(q, k, frames: int, height: int, width: int) -> str | None:
    """Why the kernels cannot serve q and k [B, G, Hg, N, d] of such a grid, or None."""
    if q.shape[1] > 1 and q.shape[2] > 1:
        return f"there are {q.shape[1]} groups of {q.shape[2]} heads, it serves groups of one head or one group"
    for name, t in (("q", q), ("k", k)):
        if any(s == 0 for s, n in zip(t.stride(), t.shape) if n > 1):
            return f"{name} repeats what it holds (strides {t.stride()}), it serves positive strides"
    return cuda.why_not(q, k, frames, height, width)


@functools.lru_cache(maxsize=None)  # as in triton_tables: captured CUDA graphs read them
def pieces(pairs, frames: int, size: int, together: int, device: torch.device) -> torch.Tensor:
    """Rows of blocks, int32 [tiles, ROWS / PIECE, 4]: up to 16 rows of one query frame each, by their first token, their first entry of
    [P, S], how many there are and the target, one for all of a block's. Tiles of the same rows follow each other, ``together`` of one target
    at a time; what is left over has no rows, and a token past the last one."""
    per_tile, tiles = ROWS // PIECE, []
    for target, queries in tables._by(pairs, 1).items():
        rows = [(f * size + at, p * size + at, min(PIECE, size - at), target) for f, p in queries for at in range(0, size, PIECE)]
        rows += [(frames * size, 0, 0, target)] * (-len(rows) % (per_tile * together))
        tiles += [rows[i : i + per_tile * together] for i in range(0, len(rows), per_tile * together)]
    return tables._on(device, sorted(tiles)).view(-1, per_tile, 4)


def _boxes(launch, t, sizes, strides, tokens: int) -> TensorMap:
    """Boxes of 64 channels by ``tokens`` tokens."""
    # Strides of dimensions of one element do not count, but must be in order.
    return launch.tensor_map(t, sizes, [s if n > 1 else sizes[0] for n, s in zip(sizes[1:], strides)], (STEP, tokens, 1, 1))


def _sequences(launch, t, tokens: int) -> TensorMap:
    """Of t [B, G, Hg, N, d], of which G or Hg is 1."""
    batch, groups, heads, n, dim = t.shape
    return _boxes(launch, t, (dim, n, groups * heads, batch), (t.stride(3), t.stride(1 if groups > 1 else 2), t.stride(0)), tokens)


def _frames(launch, t, grid, tokens: int) -> TensorMap:
    """Of t [G, 1, N, d]; tokens past the end of a frame are zeros."""
    size, step = grid[1] * grid[2], t.stride(2)
    return _boxes(launch, t, (t.shape[3], size, grid[0], t.shape[0]), (step, size * step, t.stride(0)), tokens)


def forward(q, k, pairs, *, grid, scale, mean, index, lse, top, entropy, launch) -> None:
    """Fill those of the results that are not None; arguments as of the Triton launcher.

    Args:
        launch: as of :func:`.cuda.forward`; ``launch.tensor_map`` makes tensor maps.
    """
    batch, groups, heads, tokens, dim = q.shape
    held = cuda._held(q)
    found = pieces(pairs, grid[0], tokens // grid[0], 1 if held else CLUSTER, q.device)
    results, n_tiles = (mean, index, lse, top, entropy), found.shape[0]
    given = Forward(
        _sequences(launch, q, PIECE), _sequences(launch, k, COLUMNS if held else SHARE), *cuda._addresses(None, *results, found),
        cuda._frame(grid), n_tiles, len(pairs), groups, heads, dim, max(abs(scale) * _LOG2E, cuda._LEAST_SCALE), float((scale > 0) - (scale < 0)),
        0xFFFFFFFF if scale else 0, 0x80008000 if scale < 0 else 0,
    )  # fmt: skip
    # The rows and a ring of tiles of keys, or a ring of chunks of both.
    shared = HEAD + 2 * (held * (ROWS + STAGES * COLUMNS) if held else STAGES * STEP * (ROWS + 2 * COLUMNS))
    name = f"amf_hopper_forward_{cuda._NAMES[q.dtype]}_{held or 'wide'}" + "_full" * bool(cuda._present(index, top, entropy))
    launch(name, given, n_tiles * batch * groups, THREADS, shared, [q, k, found], cuda._present(*results))


def vote(q, k, lse, pairs, *, grid, scale, index, top, launch) -> None:
    """Fill ``index`` and ``top`` [B, 1, P, S], those that are not None; arguments as of the Triton launcher, ``launch`` as in
    :func:`forward`."""
    batch, groups, heads, tokens, dim = q.shape
    found, lse = pieces(pairs, grid[0], tokens // grid[0], CLUSTER, q.device), lse.contiguous()
    n_tiles = found.shape[0]
    given = Forward(
        _sequences(launch, q, PIECE), _sequences(launch, k, SHARE), *cuda._addresses(lse, None, index, None, top, None, found),
        cuda._frame(grid), n_tiles, len(pairs), groups, heads, dim, scale * _LOG2E, 1.0, 0, 0,
    )  # fmt: skip
    shared = HEAD + 2 * STAGES * STEP * (ROWS + COLUMNS)
    launch(f"amf_hopper_vote_{cuda._NAMES[q.dtype]}", given, n_tiles * batch, THREADS, shared, [q, k, lse, found], cuda._present(index, top))


def backward(dmean, dlse, q, k, mean, lse, pairs, *, grid, scale, dq, dk, launch) -> None:
    """Fill ``dq`` and ``dk``; arguments as of the Triton launcher, ``launch`` as in :func:`forward`. Deterministic.

    Workspace: as of :func:`.cuda.backward`.
    """
    held = cuda._held(q)
    slopes, flags, unity, centre = cuda._prepare(dmean, dlse, q, mean, lse, len(pairs), grid, launch)
    if not held:
        return _through_slabs(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch)
    for part, which, rows, tokens, out in (("dq", 0, q, k, dq), ("dk", 1, k, q, dk)):
        found = tables.within(pairs, which, grid[1] * grid[2], ROWS, grid[0], q.device)
        n_tiles, step, box = found.tiles.shape[0], *((KEYS[held],) * 2 if part == "dq" else (QUERIES, PIECE))
        # The rows, and a ring of tokens with what the gradients of queries say.
        shared = HEAD + 2 * held * (ROWS + STAGES * step) + 16 * STAGES * step * (part == "dk")
        for b in range(q.shape[0]):
            ours = [q[b], slopes[b], flags[b], unity, out[b], *found]
            given = Backward(
                _frames(launch, rows[b], grid, cuda.BLOCK), _frames(launch, tokens[b], grid, box),
                *cuda._addresses(*ours), q.stride(1), q.stride(3), out.stride(1), out.stride(3), cuda._frame(grid), n_tiles, len(pairs),
                flags.shape[-1], q.shape[4], *centre, scale,
            )  # fmt: skip
            reads = [rows[b], tokens[b], slopes[b], flags[b], *cuda._present(unity), *found]
            launch(f"amf_hopper_{part}_{cuda._NAMES[q.dtype]}_{held}", given, n_tiles * q.shape[1], THREADS, shared, reads, [out[b]])


def _through_slabs(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch) -> None:
    slots, slab, total, padded = cuda._room(q, dq, dk, pairs, grid)
    size, heads, dim = grid[1] * grid[2], q.shape[2], q.shape[4]
    across, down = -(-heads * -(-dim // STEP) * STEP // WIDTH), -(-size // ROWS)
    # A ring of stages of both operands, and a place for each warp's rows that leave, 64 channels at a time.
    shared = HEAD + 2 * (STAGES * DEPTH * (ROWS + WIDTH) + ROWS * STEP)
    for b, g, (frame, slot, n) in itertools.product(range(q.shape[0]), range(q.shape[1]), slots.slabs):
        one = [t[b, g] for t in (q, k, slopes, flags)]
        _slope(*one, slab, slots.slots, slot, n, frame, grid=grid, scale=scale, centre=centre, padded=padded, launch=launch)
        gradients = _boxes(launch, slab, (padded, size, n, 1), (n * padded, padded, 0), cuda.BLOCK)
        for part, which, box, out, tiles, sums in (
            ("dq", 1, DEPTH, dq[b, g], down, []), ("dk", 0, PIECE, dk[b, g], down * n, cuda._present(total)),
        ):  # fmt: skip
            given = Products(
                gradients, _frames(launch, one[which][:, None], grid, box),
                *cuda._addresses(one[0], *one[2:], unity, out, total, slots.slots, slots.shares), *one[0].stride()[:2], *out.stride()[:2],
                size, slot, n, frame, heads, dim, flags.shape[-1], scale,
            )  # fmt: skip
            reads = [slab, one[which], *one[2:], *cuda._present(unity), slots.slots, slots.shares]
            launch(f"amf_hopper_slab_{part}_{cuda._NAMES[q.dtype]}", given, tiles * across, THREADS, shared, reads, [out, *sums])


def _slope(q, k, slopes, flags, slab, slots, slot, n, frame, *, grid, scale, centre, padded, launch) -> None:
    """Fill ``slab``, [S, n, padded], with the gradients of the logits of a query frame; arguments as of :func:`.cuda._slope`. Blocks of 64
    rows without gradient are left out."""
    heads, _, dim = q.shape
    size = grid[1] * grid[2]
    sizes, boxes = (dim, size, heads, grid[0]), ((q, cuda.BLOCK), (k, SHARE))
    given = SlabSlope(
        *(_boxes(launch, t, sizes, (t.stride(1), t.stride(0), size * t.stride(1)), box) for t, box in boxes),
        *cuda._addresses(slopes, flags, slab, slots), cuda._frame(grid), slot, n, frame, heads, dim, flags.shape[-1], padded, *centre, scale,
    )  # fmt: skip
    tiles = -(-size // (CLUSTER * ROWS)) * CLUSTER * -(-size // (2 * COLUMNS)) * n
    # A ring of chunks of both, and the rows that leave.
    shared = HEAD + 2 * (STAGES * STEP * (ROWS + 2 * COLUMNS) + ROWS * COLUMNS)
    launch(f"amf_hopper_slope_{cuda._NAMES[q.dtype]}", given, tiles, THREADS, shared, [q, k, slopes, flags, slots], [slab])
