"""Launchers of the Triton kernels: NVIDIA GPUs of compute capability 8.0 on, or Triton's interpreter on the CPU.

Forward and vote write nothing but their results. The backward of one head per group with up to 128 channels runs in two kernels without
a workspace per pair of tokens; wider ones go through a slab of one query frame. All products are kernels of this package: they read heads
where they lie, add up in float32 in a fixed order, and skip rows without gradient, which a library's would not.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

from . import configs, triton_tables
from .triton_backward import ROWS, dk_kernel, dq_kernel, prepare_kernel
from .triton_forward import forward_kernel, vote_kernel
from .triton_slab import dk_product_kernel, dq_product_kernel, slope_kernel
from .unity import unity_of

# TRITON_INTERPRET=1 was set when the kernels were decorated: they run as Python on CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
_LOG2E = math.log2(math.e)
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_INT32 = 2**31
_LARGEST_FRAME = 2**22  # keys of a frame whose places are exact in float32
_MANY = 1 << 30  # channels that no table row for q in place holds
_BLOCK_ROWS = ROWS.value
_BLOCKS = 32  # blocks of rows that the kernel which looks for gradients holds at a time


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    """Family and number of processors."""
    if INTERPRETED:
        return "ampere", 4
    return configs.family(torch.cuda.get_device_capability(device)), torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _frame(grid) -> tuple[int, int, float, float]:
    """Frames, tokens of one, its width and 1 / width."""
    frames, height, width = grid
    if height * width >= _LARGEST_FRAME:
        raise ValueError(f"grid: {grid}, expected frames of less than {_LARGEST_FRAME} patches")
    return frames, height * width, float(width), 1.0 / width


class _Operands:
    """How the kernels read tensors [B, G, Hg, N, d] of one shape: heads that lie side by side in all of them are one wide head; strides of
    axes of length 1 do not matter; what strides and channels are divided by (the compiler knows 16-byte alignment from a factor of 8); whether
    an offset within one head leaves 32 bits, with room for a tile beyond the end; what a product's operands are cast to."""

    def __init__(self, *tensors):
        self.batch, self.groups, heads, self.tokens, dim = tensors[0].shape
        # Heads that lie side by side could be one long head, but sums would then go in another order than where they lie apart.
        self.heads, self.dim = heads, dim
        self.channels, self.itemsize = heads * dim, tensors[0].element_size()
        steps = [s for t in tensors for s in self._steps(t)]
        self.unit = 8 if all(s % 8 == 0 for s in (dim, *steps)) else 1
        self.wide = any((self.tokens + 256) * t.stride(3) + self.channels >= _INT32 for t in tensors)
        self.dot = tl.float32 if INTERPRETED else _DTYPES[tensors[0].dtype]
        # Channels of a head by which the configurations are listed.
        self.held = self.heads == 1 and self.dim <= configs.HELD_DIM
        self.listed = self.dim if self.held else _MANY

    def _steps(self, t):
        b, g, h, n = (0 if t.shape[i] == 1 else t.stride(i) for i in range(4))
        return b, g, 0 if self.heads == 1 else h, n

    def strides(self, t, axes="bghn") -> tuple[int, ...]:
        """Strides of the axes, divided by the unit."""
        return tuple(s // self.unit for axis, s in zip("bghn", self._steps(t)) if axis in axes)

    def config(self, kind, device, rows, columns, times, lean=True):
        """(configuration, its constants and options) of a kernel for ``times`` maps of rows x columns."""
        family, processors = _device(device)
        c = configs.choose(kind, self.itemsize, self.listed, family, rows, columns, times, processors, lean, self.unit == 8)
        return c, {
            "WIDE": self.wide, "UNIT": self.unit, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "DOT": self.dot, "num_warps": c.warps,
            "num_stages": c.stages, "maxnreg": c.registers,
        }  # fmt: skip

    def chunks(self, c) -> tuple[tuple[int, int, int], dict]:
        """((units of channels of a head, its chunks, chunks in all), constants) of a kernel that reads chunks of channels."""
        block = configs.padded_dim(self.dim)
        block = block if self.held or not c.block_k else min(block, c.block_k)
        per_head = triton.cdiv(self.dim, block)
        return (self.dim // self.unit, per_head, self.heads * per_head), {"BLOCK_K": block, "EVEN_K": self.dim % block == 0}


def _regular(t):
    """``t`` itself, or a dense copy of it in the order of its strides where its rows are not aligned to 16 bytes: one tile and one order of
    sums whatever the strides, hence the same bits."""
    steps = (s for s, n in zip(t.stride()[:4], t.shape) if n > 1)
    return t if all(s % 8 == 0 for s in steps) else t.clone(memory_format=torch.preserve_format)


def forward(q, k, pairs, *, grid, scale, mean, index, lse, top, entropy) -> None:
    """Fill those of the results that are not None.

    Args:
        q, k: [B, G, Hg, N, d], float16, bfloat16 or float32, last stride 1, any other strides; logits of a group are summed over Hg.
        pairs: tuple of (query frame, target frame), each once.
        grid: (frames, height, width) with N = their product; scale: of the logits.
        mean: float32 [B, G, P, S, 2], expected (x, y); index: int32 [B, G, P, S], place of the largest logit, the lowest of equals; lse
            (natural log), top (largest probability) and entropy (nats): float32 [B, G, P, S]. All contiguous.
    """
    frames, size, width, inverse = _frame(grid)
    q, k = _regular(q), _regular(k)
    x = _Operands(q, k)
    times = x.batch * x.groups
    lean = index is None and top is None and entropy is None
    c, constants = x.config("held" if x.held else "wide", q.device, len(pairs) * size, size, times, lean)
    sizes, chunked = x.chunks(c)
    tables = triton_tables.across(pairs, size, c.block_m, q.device)
    n_tiles = tables.tiles.shape[0]
    with _on(q.device):
        forward_kernel[(n_tiles * times,)](
            q, k, mean, index, lse, top, entropy, *tables, n_tiles, len(pairs), x.groups, size, *sizes, width, inverse,
            abs(scale) * _LOG2E if scale else 1.0, *x.strides(q), *x.strides(k), HELD=x.held, SIGN=(scale > 0) - (scale < 0),
            HAS_MEAN=mean is not None, HAS_INDEX=index is not None, HAS_LSE=lse is not None, HAS_TOP=top is not None,
            HAS_ENTROPY=entropy is not None, **chunked, **constants,
        )  # fmt: skip


def vote(q, k, lse, pairs, *, grid, scale, index, top) -> None:
    """Fill ``index`` int32 and ``top`` float32, contiguous [B, 1, P, S], those that are not None: place (the lowest of equals) and value of
    the largest probability, averaged over the groups. Other arguments as in :func:`forward`; ``lse`` is its result."""
    frames, size, _, _ = _frame(grid)
    q, k = _regular(q), _regular(k)
    x = _Operands(q, k)
    c, constants = x.config("vote", q.device, len(pairs) * size, size, x.batch)
    sizes, chunked = x.chunks(c)
    tables = triton_tables.across(pairs, size, c.block_m, q.device)
    n_tiles = tables.tiles.shape[0]
    with _on(q.device):
        vote_kernel[(n_tiles * x.batch,)](
            q, k, lse.contiguous(), index, top, *tables, n_tiles, len(pairs), x.groups, size, *sizes, scale * _LOG2E, *x.strides(q),
            *x.strides(k), HAS_INDEX=index is not None, HAS_TOP=top is not None, SINGLE=sizes[2] == 1, **chunked, **constants,
        )  # fmt: skip


def backward(dmean, dlse, q, k, mean, lse, pairs, *, grid, scale, dq, dk) -> None:
    """Fill ``dq`` and ``dk``, of any strides with the last one 1; ``dmean`` or ``dlse``, of any strides, may be None (zero). ``mean`` (needed
    with ``dmean``) and ``lse`` are results of :func:`forward`, whose arguments the others are.

    Always deterministic. Workspace: 16 bytes per row and pair; for more than 128 channels also [S, targets, S] of q's dtype for one
    query frame at a time, and for 16-bit q a float32 [N, channels] where a target has several query frames.
    """
    frames, size, width, inverse = _frame(grid)
    q, k = _regular(q), _regular(k)
    x = _Operands(q, k, dq, dk)
    blocks, n_pairs = triton.cdiv(size, _BLOCK_ROWS), len(pairs)
    maps = (x.batch, x.groups, n_pairs)
    with _on(q.device):
        coef = q.new_empty((4, *maps, size), dtype=torch.float32)
        flags, count = q.new_empty((*maps, blocks), dtype=torch.int32), q.new_empty(maps, dtype=torch.int32)
        live, bits = (q.new_empty(math.prod(maps) * blocks + 1, dtype=d) for d in (torch.int32, torch.int64))
        unity = unity_of(dmean, dlse, grid) if q.dtype == torch.float16 else None
        # Coordinates are relative to the centre of the frame.
        centre = ((grid[2] - 1) / 2, (grid[1] - 1) / 2)
        prepare_kernel[(math.prod(maps),)](
            dmean, dlse, None if dmean is None else mean.contiguous(), lse.contiguous(), unity, coef, flags, live, bits, count, x.groups,
            n_pairs, size, blocks, coef[0].numel(), *centre, *((0,) * 5 if dmean is None else dmean.stride()),
            *((0,) * 4 if dlse is None else dlse.stride()), HAS_MEAN=dmean is not None, HAS_LSE=dlse is not None,
            HAS_UNITY=unity is not None, BLOCK_R=min(_BLOCKS, triton.next_power_of_2(blocks)), num_warps=8,
        )  # fmt: skip
        found = (coef, flags, live, bits, count)
        place = (width, inverse, *centre)
        (_fused if x.held else _through_slabs)(x, q, k, dq, dk, pairs, frames, size, blocks, place, scale, unity, *found)


def _fused(x, q, k, dq, dk, pairs, frames, size, blocks, place, scale, unity, coef, flags, live, bits, count) -> None:
    times = x.batch * x.groups
    shared = {"HAS_UNITY": unity is not None, "BLOCK_D": configs.padded_dim(x.dim), "EVEN_K": x.dim == configs.padded_dim(x.dim)}
    sizes = (len(pairs), x.groups, size, x.dim // x.unit, blocks, coef[0].numel(), *place, scale, scale * _LOG2E)
    strides = (*x.strides(q, "bgn"), *x.strides(k, "bgn"))
    c, constants = x.config("dq", q.device, frames * size, len(pairs) * size // frames, times)
    tables = triton_tables.within(pairs, 0, size, c.block_m, frames, q.device)
    dq_kernel[(tables.tiles.shape[0] * times,)](
        q, k, coef, flags, unity, dq, *tables, tables.tiles.shape[0], *sizes, *strides, *x.strides(dq, "bgn"),
        ROW_BLOCKS=triton.cdiv(c.block_m, _BLOCK_ROWS), **shared, **constants,
    )  # fmt: skip
    c, constants = x.config("dk", q.device, frames * size, len(pairs) * size // frames, times)
    tables = triton_tables.within(pairs, 1, size, c.block_m, frames, q.device)
    dk_kernel[(tables.tiles.shape[0] * times,)](
        q, k, coef, live, bits, count, unity, dk, *tables, tables.tiles.shape[0], *sizes, *strides, *x.strides(dk, "bgn"),
        AHEAD=configs.ahead(_device(q.device)[0]), **shared, **constants,
    )  # fmt: skip


def _through_slabs(x, q, k, dq, dk, pairs, frames, size, blocks, place, scale, unity, coef, flags, live, bits, count) -> None:
    slots = triton_tables.slots(pairs, frames, q.device)
    for gradient, missing in ((dq, slots.no_query), (dk, slots.no_target)):
        for frame in missing:
            gradient[..., frame * size : (frame + 1) * size, :].zero_()
    padded = triton.cdiv(size, 8)
    slab = q.new_empty(size * max(s.count for s in slots.slabs) * padded * 8)
    # Shares of dK are added up in float32: in dK itself, or in rows of their own.
    rows = dk if q.dtype == torch.float32 else q.new_empty(x.tokens if slots.added else 1, x.heads, triton.cdiv(x.dim, 8) * 8, dtype=torch.float32)
    into = x.strides(dk, "hn") if q.dtype == torch.float32 else (rows.stride(1) // x.unit, rows.stride(0) // x.unit)
    keys, queries = x.strides(k, "hn"), x.strides(q, "hn")
    device, plane = q.device, coef[0].numel()

    def row_blocks(c):
        return {"ROW_BLOCKS": triton.cdiv(c.block_m, _BLOCK_ROWS)}

    for b in range(x.batch):
        for g in range(x.groups):
            one_q, one_k, one_dq, one_dk = (t[b, g] for t in (q, k, dq, dk))
            share = rows[b, g] if rows is dk else rows
            own = b * x.groups + g
            one_coef, one_flags, one_count = coef[0, b, g], flags[b, g], count[b, g]
            listed = slice(own * len(pairs) * blocks, None)
            for frame, slot, n in slots.slabs:
                c, constants = x.config("slope", device, size, size, n)
                sizes, chunked = x.chunks(c)
                slope_kernel[(triton.cdiv(size, c.block_m) * triton.cdiv(size, c.block_n) * n,)](
                    one_q, one_k, one_coef, one_flags, slab, slots.slots, slot, n, frame, size, *sizes, blocks, padded, plane, *place,
                    scale * _LOG2E, *queries, *keys, **row_blocks(c), **chunked, **constants,
                )  # fmt: skip
                sizes = (slot, n, frame, size, x.dim // x.unit, x.channels // x.unit, blocks, padded, scale)
                c, constants = x.config("dq_product", device, size, x.channels, 1)
                dq_product_kernel[(triton.cdiv(size, c.block_m) * triton.cdiv(x.channels, c.block_n),)](
                    slab, one_k, one_flags, unity, one_dq, slots.slots, *sizes, *keys, *x.strides(dq, "hn"), BLOCK_K=c.block_k,
                    HAS_UNITY=unity is not None, **row_blocks(c), **constants,
                )  # fmt: skip
                c, constants = x.config("dk_product", device, size, x.channels, n)
                dk_product_kernel[(triton.cdiv(size, c.block_m) * triton.cdiv(x.channels, c.block_n) * n,)](
                    slab, one_q, live[listed], bits[listed], one_count, unity, share, one_dk, slots.slots, slots.shares, *sizes, *queries,
                    *into, *x.strides(dk, "hn"), BLOCK_K=c.block_k, AHEAD=configs.ahead(_device(device)[0]), HAS_UNITY=unity is not None, **constants,
                )  # fmt: skip
