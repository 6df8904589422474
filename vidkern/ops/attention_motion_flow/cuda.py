"""Launchers of the hand-written CUDA kernels (csrc/cuda/amf*.cu): which kernel, over how many blocks, with which parameters.

Forward and vote write nothing but their results. The backward of one head per group with up to 128 channels runs in two kernels; wider ones
go through a slab, the gradients of the logits of one query frame, which two products read.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import torch

from ... import cuda as kernels
from . import triton_tables as tables
from .unity import unity_of

# Source -> prefixes of the names of its kernels.
SOURCES = {
    "amf": ("amf_forward_", "amf_vote_"), "amf_backward": ("amf_prepare", "amf_dq_", "amf_dk_"), "amf_slab": ("amf_slope_", "amf_slab_"),
}  # fmt: skip
THREADS, STEP, BLOCK = 128, 64, 64  # of a block; channels of a chunk; rows whose gradients are looked for together
ROWS, COLUMNS, HELD = 2 * BLOCK, 128, 128  # of a wide tile; channels of a group up to which queries stay in registers
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)
_LARGEST_FRAME = 2**22  # keys of a frame whose places are exact in float32
_LEAST_SCALE = 2.0**-126
_pointers = lambda names: ((n, ctypes.c_void_p) for n in names.split())  # noqa: E731
_ints = lambda names: ((n, ctypes.c_int32) for n in names.split())  # noqa: E731
_floats = lambda names: ((n, ctypes.c_float) for n in names.split())  # noqa: E731


class Strides(ctypes.Structure):
    """``vk::amf::Strides``: elements between samples, groups, heads and tokens."""

    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "group", "head", "token")]


class Frame(ctypes.Structure):
    """``vk::amf::Frame``: tokens; columns, and 1 / columns; how far the eighth key after another lies."""

    _fields_ = [*_ints("size"), *_floats("width inverse eight_x eight_y")]


class Forward(ctypes.Structure):
    """``vk::amf::Forward``."""

    _fields_ = [
        *_pointers("q k given mean index lse top entropy tiles members"), ("q_step", Strides), ("k_step", Strides), ("frame", Frame),
        *_ints("n_tiles n_pairs groups heads dim"), *_floats("scale_log2"), ("keep", ctypes.c_uint32), ("flip", ctypes.c_uint32),
    ]  # fmt: skip


class Prepare(ctypes.Structure):
    """``vk::amf::Prepare``."""

    _fields_ = [*_pointers("dmean dlse mean lse unity slopes flags"), *_ints("maps size blocks"), *_floats("centre_x centre_y")]


class Backward(ctypes.Structure):
    """``vk::amf::Backward``."""

    _fields_ = [
        *_pointers("q k slopes flags unity out tiles members"), ("q_step", Strides), ("k_step", Strides), ("out_step", Strides),
        ("frame", Frame), *_ints("n_tiles n_pairs groups blocks dim"), *_floats("centre_x centre_y scale"),
    ]  # fmt: skip


class Steps(ctypes.Structure):
    """``vk::amf::Steps``: elements between heads and tokens."""

    _fields_ = [(n, ctypes.c_int64) for n in ("head", "token")]


class Slab(ctypes.Structure):
    """``vk::amf::Slab``."""

    _fields_ = [
        *_pointers("q k slopes flags unity slab out sum slots shares"), ("q_step", Steps), ("k_step", Steps), ("out_step", Steps),
        ("frame", Frame), *_ints("slot n_slots query heads dim blocks padded"), *_floats("centre_x centre_y scale"),
    ]  # fmt: skip


def why_not(q, k, frames: int, height: int, width: int) -> str | None:
    """Why the kernels cannot serve q and k [B, G, Hg, N, d] of such a grid, or None."""
    if q.dtype not in _NAMES:
        return f"dtype is {q.dtype}, it serves torch.float16 and torch.bfloat16"
    if q.shape[4] % 8:
        return f"head_dim is {q.shape[4]}, it serves multiples of 8"
    if height * width >= _LARGEST_FRAME:
        return f"frames have {height * width} patches, it serves less than {_LARGEST_FRAME}"
    for name, t in (("q", q), ("k", k)):
        # With any other last stride a dense copy is made first.
        if t.stride(4) == 1 and (kernels.first_byte(t) % 16 or any(s % 8 for s, n in zip(t.stride()[:4], t.shape) if n > 1)):
            return f"{name}'s rows are not aligned to 16 bytes"
    return None


def _addresses(*tensors) -> list:
    return [None if t is None else t.data_ptr() for t in tensors]


def _present(*tensors) -> list:
    return [t for t in tensors if t is not None]


def _strides(*tensors) -> list[Strides]:
    return [Strides(*t.stride()[:4]) for t in tensors]


def _frame(grid) -> Frame:
    _, height, width = grid
    return Frame(height * width, width, 1.0 / width, 8 % width, 8 // width)


def _held(q) -> int:
    """64 or 128, the channels that a kernel keeps in registers, or 0 where they are too many."""
    heads, dim = q.shape[2], q.shape[4]
    return 0 if heads > 1 or dim > HELD else 64 if dim <= 64 else 128


def forward(q, k, pairs, *, grid, scale, mean, index, lse, top, entropy, launch) -> None:
    """Fill those of the results that are not None; arguments as of the Triton launcher.

    Args:
        launch: ``launch(kernel, parameters, blocks, threads, shared, reads, writes)`` runs a kernel by name; shared memory in bytes, and
            the tensors that it may read and write.
    """
    batch, groups, heads, _, dim = q.shape
    found = tables.across(pairs, grid[1] * grid[2], ROWS, q.device)
    n_tiles, held = found.tiles.shape[0], _held(q)
    given = Forward(
        *_addresses(q, k, None, mean, index, lse, top, entropy, *found), *_strides(q, k), _frame(grid), n_tiles, len(pairs), groups, heads,
        dim, max(abs(scale) * _LOG2E, _LEAST_SCALE), 0xFFFFFFFF if scale else 0, 0x80008000 if scale < 0 else 0,
    )  # fmt: skip
    full = "_full" if _present(index, top, entropy) else ""
    # The rows' own tile and two stages of keys, or two stages of chunks of both and the rows' tokens.
    shared = 2 * held * (ROWS + 2 * 64) if held else 4 * ROWS + 2 * 2 * STEP * (ROWS + COLUMNS)
    name = f"amf_forward_{_NAMES[q.dtype]}_{held or 'wide'}{full}"
    launch(name, given, n_tiles * batch * groups, THREADS, shared, [q, k, *found], _present(mean, index, lse, top, entropy))


def vote(q, k, lse, pairs, *, grid, scale, index, top, launch) -> None:
    """Fill ``index`` and ``top`` [B, 1, P, S], those that are not None; arguments as of the Triton launcher, ``launch`` as in
    :func:`forward`."""
    batch, groups, heads, _, dim = q.shape
    found, lse = tables.across(pairs, grid[1] * grid[2], BLOCK, q.device), lse.contiguous()
    n_tiles = found.tiles.shape[0]
    given = Forward(
        *_addresses(q, k, lse, None, index, None, top, None, *found), *_strides(q, k), _frame(grid), n_tiles, len(pairs), groups, heads,
        dim, scale * _LOG2E, 0, 0,
    )  # fmt: skip
    shared = 4 * BLOCK + 2 * 2 * STEP * (BLOCK + 64)
    launch(f"amf_vote_{_NAMES[q.dtype]}", given, n_tiles * batch, THREADS, shared, [q, k, lse, *found], _present(index, top))


def backward(dmean, dlse, q, k, mean, lse, pairs, *, grid, scale, dq, dk, launch) -> None:
    """Fill ``dq`` and ``dk``; arguments as of the Triton launcher, ``launch`` as in :func:`forward`. Deterministic.

    Workspace: 16 bytes per row and pair; for wide groups also [S, targets, S] of q's dtype for one query frame at a time, and a float32
    [N, channels] where a target has several query frames.
    """
    slopes, flags, unity, centre = _prepare(dmean, dlse, q, mean, lse, len(pairs), grid, launch)
    if _held(q):
        _fused(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch)
    else:
        _through_slabs(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch)


def _prepare(dmean, dlse, q, mean, lse, n_pairs: int, grid, launch):
    """What each row's gradient says of its logits, float32 [B, G, P, S, 4]; whether blocks of 64 rows have any, int32 [B, G, P, blocks];
    what gradients are divided by, or None; and the centre of a frame."""
    # Coordinates are relative to the centre of the frame, which halves the rounding of what is left of a slope.
    size, maps, centre = grid[1] * grid[2], (*q.shape[:2], n_pairs), ((grid[2] - 1) / 2, (grid[1] - 1) / 2)
    blocks = -(-size // BLOCK)
    slopes = q.new_empty((*maps, size, 4), dtype=torch.float32)
    flags = q.new_empty((*maps, blocks), dtype=torch.int32)
    given = [None if t is None else t.contiguous() for t in (dmean, dlse, None if dmean is None else mean, lse)]
    unity = unity_of(*given[:2], grid) if q.dtype == torch.float16 else None
    reads = [*given, unity]
    prepare = Prepare(*_addresses(*reads, slopes, flags), math.prod(maps), size, blocks, *centre)
    launch("amf_prepare", prepare, -(-math.prod(maps) * blocks // 4), THREADS, 0, _present(*reads), [slopes, flags])
    return slopes, flags, unity, centre


def _fused(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch) -> None:
    held = _held(q)
    for part, which, out in (("dq", 0, dq), ("dk", 1, dk)):
        found = tables.within(pairs, which, grid[1] * grid[2], BLOCK, grid[0], q.device)
        n_tiles = found.tiles.shape[0]
        given = Backward(
            *_addresses(q, k, slopes, flags, unity, out, *found), *_strides(q, k, out), _frame(grid), n_tiles, len(pairs), q.shape[1],
            flags.shape[-1], q.shape[4], *centre, scale,
        )  # fmt: skip
        reads = [q, k, slopes, flags, *_present(unity), *found]
        # The rows' own tile and two stages of tokens.
        blocks, shared = n_tiles * q.shape[0] * q.shape[1], 2 * held * 3 * BLOCK
        launch(f"amf_{part}_{_NAMES[q.dtype]}_{held}", given, blocks, THREADS, shared, reads, [out])


def _through_slabs(q, k, dq, dk, pairs, grid, scale, slopes, flags, unity, centre, launch) -> None:
    slots, slab, total, padded = _room(q, dq, dk, pairs, grid)
    heads, dim = q.shape[2], q.shape[4]
    down, columns = -(-grid[1] * grid[2] // ROWS), {"dq": -(-heads * dim // 64), "dk": -(-heads * dim // COLUMNS)}
    shared = {"dq": 2 * 2 * STEP * (ROWS + 64), "dk": 2 * 2 * STEP * (ROWS + COLUMNS)}  # two stages of the operands
    for b, g, (frame, slot, n) in itertools.product(range(q.shape[0]), range(q.shape[1]), slots.slabs):
        one = [t[b, g] for t in (q, k, slopes, flags)]
        _slope(*one, slab, slots.slots, slot, n, frame, grid=grid, scale=scale, centre=centre, padded=padded, launch=launch)
        for part, out, blocks, sums in (("dq", dq[b, g], down, []), ("dk", dk[b, g], down * n, _present(total))):
            given = Slab(
                *_addresses(*one, unity, slab, out, total, slots.slots, slots.shares), *_steps(*one[:2], out), _frame(grid), slot, n, frame,
                heads, dim, flags.shape[-1], padded, *centre, scale,
            )  # fmt: skip
            reads = [*one, *_present(unity), slots.slots, slots.shares, slab]
            launch(f"amf_slab_{part}_{_NAMES[q.dtype]}", given, blocks * columns[part], THREADS, shared[part], reads, [out, *sums])


def _room(q, dq, dk, pairs, grid):
    """The slabs' tables, room for the longest slab, float32 [N, channels] for dK where a target has several query frames, or None, and keys
    of a slab's row. Gradients of frames without pairs become zeros."""
    size = grid[1] * grid[2]
    slots = tables.slots(pairs, grid[0], q.device)
    for gradient, missing in ((dq, slots.no_query), (dk, slots.no_target)):
        for frame in missing:
            gradient[..., frame * size : (frame + 1) * size, :].zero_()
    padded = -(-size // 8) * 8
    slab = q.new_empty(size * max(s.count for s in slots.slabs) * padded)
    total = q.new_empty((q.shape[3], q.shape[2] * q.shape[4]), dtype=torch.float32) if slots.added else None
    return slots, slab, total, padded


def _slope(q, k, slopes, flags, slab, slots, slot, n, frame, *, grid, scale, centre, padded, launch) -> None:
    """Fill ``slab`` [S, n, padded], flat, with the gradients of the logits of query frame ``frame``, whose targets are ``slots`` from
    ``slot`` on; q and k [H, N, d], ``slopes`` and ``flags`` are those of one sample and group."""
    heads, _, dim = q.shape
    size = grid[1] * grid[2]
    given = Slab(
        *_addresses(q, k, slopes, flags, None, slab, None, None, slots, None), *_steps(q, k), Steps(), _frame(grid), slot, n, frame, heads,
        dim, flags.shape[-1], padded, *centre, scale,
    )  # fmt: skip
    blocks, shared = -(-size // ROWS) * -(-size // COLUMNS) * n, 2 * 2 * STEP * (ROWS + COLUMNS)
    launch(f"amf_slope_{_NAMES[q.dtype]}", given, blocks, THREADS, shared, [q, k, slopes, flags, slots], [slab])


def _steps(*tensors) -> list[Steps]:
    return [Steps(*t.stride()[:2]) for t in tensors]
