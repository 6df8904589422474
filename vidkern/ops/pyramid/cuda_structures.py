"""The parameters of the CUDA kernels of the pyramid ops, field by field as csrc/cuda/pyramid*.{h,cu} declare them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from ..launch import unit_stride
from . import levels

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THREADS, RUN = 128, 8  # of a block; values that a thread has at a time
_N = levels.MAX_LEVELS
POINTER, I64, I32, U32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double


def _of(**fields) -> type[ctypes.Structure]:
    """A structure of fields, given as kinds and their names."""
    return type("Fields", (ctypes.Structure,), {"_fields_": [(name, kind) for name, kind in fields.items()]})


Size = _of(t=I32, h=I32, w=I32)
Shape = _of(level=Size * _N, count=I64 * _N, patch=I32 * 3, halves_time=I32, levels=I32)
Role = _of(at=POINTER * _N, batch=I64 * _N, row=I64, column=I32 * _N, type=I32 * _N, tokens=I32)
Volume = _of(at=POINTER, batch=I64, channel=I64, frame=I64, row=I64, type=I32)
Table = _of(at=POINTER, batch=I64, level=I64)
Alive = _of(mask=POINTER, batch=I64, active=I32)
Random = _of(key0=U32, key1=U32, offset=U32, first_sample=U32)
Mixing = _of(z=Role, v=Role, eps=Role, table=Table, alive=Alive, random=Random, scale=FLOAT * _N, mix=I32, has_v=I32, given=I32)
Unmixing = _of(dz=Role, dv=Role, table=Table, alive=Alive, scale=FLOAT * _N, has_z=I32, has_v=I32, has_table=I32)
Stepping = _of(z=Role, c=Role, u=Role, table=Table, scale=FLOAT * _N, step=I32, guided=I32)
Spreading = _of(dz=Role, dc=Role, du=Role, table=Table, step=I32, guided=I32)
Tiling = _of(
    first=I32 * _N, rows=I32 * _N, columns=I32 * _N, across=I32 * _N, down=I32 * _N, frames=I32 * _N, groups=I32, per_sample=I32
)
Blocks = _of(first=I32 * _N, levels=I32, per_sample=I32, tokens=I32)
Runs = _of(channels=I32, frames=I32, rows=I32, runs=I32, batch=I32)

Analysis = _of(x=Volume, mixing=Mixing, shape=Shape, tiling=Tiling, laplacian=I32, fine=I32)
AnalysisAdjoint = _of(
    dx=Role, unmixing=Unmixing, shape=Shape, tiling=Tiling, laplacian=I32, sums_at=U32, sums_bytes=U32
)  # fmt: skip
Synthesis = _of(out=Volume, stepping=Stepping, shape=Shape, tiling=Tiling, laplacian=I32, window_bytes=U32)
SynthesisAdjoint = _of(
    gradient=Volume, rest=Role, spreading=Spreading, shape=Shape, tiling=Tiling, scale=FLOAT * _N, level=I32, laplacian=I32
)
# In a field's name "in" is no word of Python's.
Filtering = type("Filtering", (ctypes.Structure,), {"_fields_": [
    ("in", Volume), ("base", Volume), ("out", Volume), ("to", Size), ("channels", I32), ("batch", I32), ("mode", I32), ("time", I32),
    ("up", FLOAT * 4 * 8), ("half", FLOAT),
]})  # fmt: skip
Mix = _of(x=Role, mixing=Mixing, shape=Shape, blocks=Blocks)
MixAdjoint = _of(dx=Role, unmixing=Unmixing, shape=Shape, blocks=Blocks)
Step = _of(state=Role, input=Role, stepping=Stepping, shape=Shape, blocks=Blocks, active=I32, upcoming=I32, kept=I32, given=I32)
StepAdjoint = _of(
    state=Role, input=Role, spreading=Spreading, shape=Shape, blocks=Blocks, scale=FLOAT * _N, active=I32, upcoming=I32,
    has_state=I32, has_input=I32,
)  # fmt: skip
Loss = _of(pred=Role, target=Role, alive=Alive, shape=Shape, blocks=Blocks, sums=POINTER, batch=I32)
LossSum = _of(
    sums=POINTER, loss=POINTER, means=POINTER, per_value=DOUBLE * _N, per_sample=DOUBLE, runs=I32 * _N, batch=I32,
    levels=I32,
)  # fmt: skip
LossAdjoint = _of(
    pred=Role, target=Role, dpred=Role, alive=Alive, shape=Shape, blocks=Blocks, dloss=POINTER, dmeans=POINTER, batch=I32
)
Stage = _of(
    x=Volume, eps=Volume, z=Volume, v=Volume, table=Table, random=Random, runs=Runs, height=I32, width=I32, level=I32, first=I32,
    given=I32,
)  # fmt: skip
StageAdjoint = _of(
    dx=Volume, dz=Volume, dv=Volume, table=Table, runs=Runs, height=I32, width=I32, first=I32, has_z=I32, has_v=I32
)
Transition = _of(
    z=Volume, eps=Volume, out=Volume, table=Table, random=Random, runs=Runs, height=I32, width=I32, level=I32, given=I32
)
TransitionAdjoint = _of(dz=Volume, gradient=Volume, table=Table, runs=Runs, width=I32)


def filled(kind, values: Sequence, rest=0):
    """An array for every level, ``rest`` where there are fewer."""
    return (kind * _N)(*values, *[rest] * (_N - len(values)))


def shape_of(sizes: Sequence[int], pool_time: bool, patch: Sequence[int] = (), first: int | None = None) -> Shape:
    """Sizes of the first ``first`` levels."""
    shapes = levels.shapes(sizes)[:first]
    return Shape(
        filled(Size, [Size(*s[2:]) for s in shapes], Size()), filled(I64, [math.prod(s[1:]) for s in shapes]),
        (I32 * 3)(*(patch or (1, 1, 1))), 2 if pool_time else 1, len(shapes),
    )  # fmt: skip


def listed(tensors: Sequence[torch.Tensor]) -> tuple[Role, list[torch.Tensor]]:
    """Levels in memory of their own, and the tensors to keep: samples that are not dense cost a copy."""
    tensors = [t if t[0].is_contiguous() else t.contiguous() for t in tensors]
    role = Role(
        filled(POINTER, [t.data_ptr() for t in tensors], None), filled(I64, [t.stride(0) for t in tensors]), 0, filled(I32, ()),
        filled(I32, [TYPES[t.dtype] for t in tensors]), 0,
    )  # fmt: skip
    return role, tensors


def laid_out(t: torch.Tensor, sizes: Sequence[int], first: int | None, patch: Sequence[int], pool_time: bool) -> tuple[Role, list]:
    """The first ``first`` levels of a flat tensor or, with a patch, of a token matrix; and the tensors to keep."""
    if not patch:
        return listed(levels.split(t if t.is_contiguous() else t.contiguous(), sizes, first))
    t = unit_stride(t)
    columns, at = [], 0
    for (_, channels, *_), p in zip(levels.shapes(sizes), levels.patches(tuple(patch), levels.level_count(sizes), pool_time)):
        columns.append(at)
        at += channels * math.prod(p)
    pointers = filled(POINTER, [t.data_ptr()] * _N)
    return Role(pointers, filled(I64, [t.stride(0)] * _N), t.stride(1), filled(I32, columns), filled(I32, [TYPES[t.dtype]] * _N), 1), [t]


def volume(t: torch.Tensor | None) -> Volume:
    """A tensor [B, C, T, H, W] whose last stride is 1, or nothing."""
    return Volume() if t is None else Volume(t.data_ptr(), *t.stride()[:4], TYPES[t.dtype])


def table_of(t: torch.Tensor | None) -> tuple[Table, list[torch.Tensor]]:
    """A table [B, S, columns] or [B, columns], or nothing; and the tensors to keep."""
    if t is None:
        return Table(), []
    t = unit_stride(t)
    return Table(t.data_ptr(), t.stride(0), t.stride(1) if t.dim() == 3 else 0), [t]


def alive_of(mask: torch.Tensor | None, active: int) -> tuple[Alive, list[torch.Tensor]]:
    """Which levels take part, and the tensors to keep."""
    if mask is None:
        return Alive(None, 0, active), []
    mask = mask.contiguous()
    return Alive(mask.data_ptr(), mask.stride(0), active), [mask]


def random_of(seed: int, offset: int, first_sample: int) -> Random:
    """The generator's key and what of its counter a call gives."""
    low = 0xFFFFFFFF
    return Random(seed & low, seed >> 32 & low, offset & low, first_sample & low)


def tiling(groups: Sequence[tuple[int, int, int]], channels: int, pool_time: bool) -> Tiling:
    """Tiles for each group, given the frames, rows and columns of its level. With what is read around them and the finer values there, they
    take 10 to 20 KB of shared memory, and those that pool time, which read neighbouring frames too, up to 60 KB."""
    positions, widest = (256, 32) if pool_time else (512, 64)
    rows, columns, across, down, frames, first = [], [], [], [], [], [0]
    for t, h, w in groups:
        c = min(widest, -(-w // RUN) * RUN)
        r = min(max(positions // c, 1), h)
        rows.append(r)
        columns.append(c)
        across.append(-(-w // c))
        down.append(-(-h // r))
        frames.append(t)
        first.append(first[-1] + across[-1] * down[-1] * t * channels)
    return Tiling(*(filled(I32, v) for v in (first[:-1], rows, columns, across, down, frames)), len(groups), first[-1])


def blocks(shape: Shape, turns: int = 1, tokens: bool = False) -> Blocks:
    """Blocks of runs over every level, each ``turns`` times as many values as it has threads and runs."""
    first = [0]
    for count, size in zip(shape.count[: shape.levels], shape.level):
        # A run of tokens ends with its row.
        runs = count // size.w * -(-size.w // RUN) if tokens else -(-count // RUN)
        first.append(first[-1] + -(-runs // (THREADS * turns)))
    return Blocks(filled(I32, first[:-1]), shape.levels, first[-1], tokens)
