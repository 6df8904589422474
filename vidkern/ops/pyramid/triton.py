"""Launchers of the Triton kernels of the pyramid ops: for each op a function, and one for its backward, with the op's own arguments.

NVIDIA GPUs of compute capability 8.0 on, or Triton's interpreter on the CPU. Laplacian and Haar pyramids take one launch, but merging
more levels than a gather can reach (see ``_gathers``) takes one per level, through float32 levels in memory; so do block-DCT pyramids
and deep ones that pool time (see ``_by_filters``).
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton

from ..launch import unit_stride
from . import filters, levels
from .triton_analysis import analysis_adjoint_kernel, analysis_kernel
from .triton_flow import (
    loss_backward_kernel,
    loss_kernel,
    loss_sum_kernel,
    mix_adjoint_kernel,
    mix_kernel,
    step_adjoint_kernel,
    step_kernel,
)
from .triton_stage import stage_adjoint_kernel, stage_kernel, transition_adjoint_kernel, transition_kernel
from .triton_synthesis import filter_kernel, synthesis_adjoint_kernel, synthesis_kernel

# TRITON_INTERPRET=1 was set when the kernels were decorated: they run as Python on CPU tensors.
INTERPRETED = not isinstance(mix_kernel, triton.runtime.JITFunction)
# Values (or coarse positions) per program: 4 warps store 16 bytes a thread. In the interpreter every operation costs the same.
POSITIONS = 1024 if INTERPRETED else 256
VALUES = 2048 if INTERPRETED else 1024
LOSS_CHUNKS = 2 if INTERPRETED else 8
_INT32 = 2**31
_FILTERS = {"down": 0, "up": 1, "down_t": 2, "up_t": 3}
_SET, _SUBTRACT, _ADD = range(3)


def _on(t: torch.Tensor):
    """Triton launches on the current device."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def _signed(x: int) -> int:
    """The low 32 bits as a signed integer, so that the kernel's argument has one type."""
    x &= 0xFFFFFFFF
    return x - (x >> 31 << 32)


def _random(seed, offset, first_sample) -> dict:
    return {"key0": _signed(seed), "key1": _signed(seed >> 32), "offset": _signed(offset), "first_sample": _signed(first_sample)}


class _Shape:
    """Sizes of the first ``n`` levels as the kernels take them."""

    def __init__(self, sizes, n=None):
        self.shapes = levels.shapes(sizes)[:n]
        self.n, self.batch, self.channels = len(self.shapes), sizes[0], sizes[1]
        self.T, self.H, self.W = (tuple(s[i] for s in self.shapes) for i in (2, 3, 4))
        self.counts = tuple(math.prod(s[1:]) for s in self.shapes)

    @property
    def sizes(self) -> dict:
        """As keywords of a kernel."""
        return {"T": self.T, "H": self.H, "W": self.W}

    def first(self, per_program: int, chosen=None) -> tuple[int, ...]:
        """Where each level's programs of a sample begin, and how many there are."""
        result = [0]
        for count in self.counts if chosen is None else chosen:
            result.append(result[-1] + triton.cdiv(count, per_program))
        return tuple(result)


def _wide(*tensors) -> bool:
    """Whether an offset within one sample leaves 32 bits, with room for a program beyond the end."""
    reach = lambda t: sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:]))
    return any(t is not None and reach(t) + 65536 >= _INT32 for t in tensors)


def _dense(t: torch.Tensor) -> torch.Tensor:
    """Levels are read as runs: samples that are not dense cost a copy."""
    return t if t[0].is_contiguous() else t.contiguous()


class _Role:
    """Levels as a kernel takes them: tensors, steps between samples, and for a token matrix the step between rows and first columns."""

    def __init__(self, tensors, n, batches, row=0, columns=None):
        # What is never read or written still needs a tensor.
        fill = n - len(tensors)
        self.tensors = (*tensors, *[tensors[-1]] * fill)
        self.batches = (*batches, *[batches[-1]] * fill)
        self.row = row
        self.columns = columns or (0,) * n


def _listed(tensors, n) -> _Role:
    tensors = [_dense(t) for t in tensors]
    return _Role(tensors, n, [t.stride(0) for t in tensors])


def _laid_out(t, sizes, n, patch, pool_time, first=None) -> _Role:
    """The levels of a flat tensor or of a token matrix; ``first`` of them where fewer than n are there."""
    count = n if first is None else first
    if not patch:
        parts = levels.split(t if t.is_contiguous() else t.contiguous(), sizes, count)
        return _Role(parts, n, [p[0].numel() for p in parts])
    t = unit_stride(t)
    columns, at = [], 0
    for (_, channels, *_), p in zip(levels.shapes(sizes), levels.patches(tuple(patch), levels.level_count(sizes), pool_time)):
        columns.append(at)
        at += channels * math.prod(p)
    return _Role([t] * n, n, [t.stride(0)] * n, t.stride(1), tuple(columns[:n]))


def _patch(patch) -> dict:
    return dict(zip(("PT", "PH", "PW"), patch or (0, 0, 0)))


def _table(table):
    return table if table.stride(-1) == 1 else table.contiguous()


def _mask(mask, other):
    """A mask as bytes and its step, or any tensor where there is none."""
    if mask is None:
        return other, 0
    mask = mask.contiguous().view(torch.uint8)
    return mask, mask.stride(0)


def _ft(pool_time) -> int:
    return 2 if pool_time else 1


def _gathers(kind, pool_time, n) -> bool:
    """Whether merging n levels gathers all that a value needs: 5 reads a value for two levels, 21 for three; in time too 9."""
    return kind == "haar" or (kind == "laplacian" and n <= (2 if pool_time else 3))


def _by_filters(kind, pool_time, n) -> bool:
    """Whether taking n levels apart takes a launch per filter: block-DCT; and three or four laplacian levels in time too, where 27 means
    of 64 or 512 values meet in one value of the next level, more than registers hold."""
    return kind == "dct" or (kind == "laplacian" and pool_time and n > 2)


# ---- filters from level to level ----------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=16)
def _matrix(device: torch.device) -> torch.Tensor:
    return torch.tensor(filters.dct_up(), dtype=torch.float32, device=device)


def _filter(which, kind, pool_time, source, out, base=None, mode=_SET) -> None:
    """One launch: levels [B, C, T, H, W], any strides with a last one of 1."""
    if kind == "dct":
        taps = 4 if which in ("up", "down_t") else 8
    elif kind == "laplacian" and which in ("up", "up_t"):
        taps = 2 if which == "up" else 4
    else:
        taps = 1 if which in ("up", "down_t") else 2
    base = out if base is None else base
    count = out[0].numel()
    # Every value holds a row of taps, and the laplacian's four rows at once.
    block = VALUES if INTERPRETED else VALUES // (4 if taps == 8 or (taps == 4 and kind == "laplacian") else 1)
    blocks = triton.cdiv(count, block)
    filter_kernel[(blocks * out.shape[0],)](
        source, base, out, _matrix(out.device), *out.shape[2:], *source.shape[2:], *source.stride()[:4], *base.stride()[:4],
        *out.stride()[:4], count, blocks,
        FILTER=_FILTERS[which], KIND=levels.KINDS.index(kind), MODE=mode, TAPS=taps, POOL_TIME=pool_time,
        WIDE=_wide(source, base, out), BLOCK=block,
    )  # fmt: skip


def _workspace(like, sizes, n=None) -> torch.Tensor:
    return torch.empty(levels.numel(sizes, n), dtype=torch.float32, device=like.device)


def _taken_apart(x, sizes, kind, pool_time) -> list[torch.Tensor]:
    """Residual levels in float32, a launch per filter."""
    parts = levels.split(_workspace(x, sizes), sizes)
    gaussian = [*parts[:-1], x]
    for s in range(len(parts) - 2, -1, -1):
        _filter("down", kind, pool_time, gaussian[s + 1], parts[s])
    for s in range(len(parts) - 1, 0, -1):
        _filter("up", kind, pool_time, parts[s - 1], parts[s], gaussian[s], _SUBTRACT)
    return parts


# ---- decompose, and the inputs made from it -----------------------------------------------------------------------------------
def _analyse(outputs, x, noise, table, mask, sizes, kind, pool_time, scale, active, written, patch, random, given) -> None:
    """Levels of x (or, ``given``, x itself) into outputs[0], or with a table the mixtures into both."""
    number, mix = levels.level_count(sizes), table is not None
    z, v = outputs[0], outputs[1] if len(outputs) > 1 and outputs[1].numel() else None
    if not given and number == 1:
        given = True
    elif not given and _by_filters(kind, pool_time, number):
        x, given = _taken_apart(unit_stride(x[0]), sizes, kind, pool_time), True
    n = written
    with _on(z):
        z_role = _laid_out(z, sizes, n, patch, pool_time)
        v_role = z_role if v is None else _laid_out(v, sizes, n, patch, pool_time)
        eps = _listed(noise, n) if noise else z_role
        table = z if table is None else _table(table)
        strides = (table.stride(0), table.stride(1)) if mix else (0, 0)
        bytes_, mask_b = _mask(mask, z)
        flags = {
            "FT": _ft(pool_time), "MIX": mix, "HAS_V": v is not None, "HAS_MASK": mask is not None, "PHILOX": mix and not noise,
            **_patch(patch), **random, "active": active, "mask_b": mask_b,
        }  # fmt: skip
        if given:
            shape, source = _Shape(sizes, n), _listed(x[:n], n)
            first = shape.first(VALUES)
            mix_kernel[(first[-1] * shape.batch,)](
                source.tensors, z_role.tensors, v_role.tensors, eps.tensors, table, bytes_, **shape.sizes, x_b=source.batches,
                z_b=z_role.batches, v_b=v_role.batches, eps_b=eps.batches, columns=z_role.columns, scale=tuple(scale[:n]), first=first,
                z_r=z_role.row, v_r=v_role.row, table_b=strides[0], table_s=strides[1], counts=shape.counts, S=n,
                WIDE=_wide(*source.tensors, z if patch else None), BLOCK=VALUES, **flags,
            )  # fmt: skip
            return
        x = unit_stride(x[0])
        shape, groups = _Shape(sizes), max(n - 1, 1)
        # Block means over 8 x 8 values, or over frames too, fill the registers: half the positions a thread.
        block = POSITIONS // 2 if (pool_time or shape.n > 3) and not INTERPRETED else POSITIONS
        first = shape.first(block, shape.counts[:groups])
        analysis_kernel[(first[-1] * shape.batch,)](
            x, z_role.tensors, v_role.tensors, eps.tensors, table, bytes_, **shape.sizes, z_b=z_role.batches, v_b=v_role.batches,
            eps_b=eps.batches, columns=z_role.columns, scale=tuple(scale), first=first, x_b=x.stride(0), x_c=x.stride(1),
            x_t=x.stride(2), x_y=x.stride(3), z_r=z_role.row, v_r=v_role.row, table_b=strides[0], table_s=strides[1],
            counts=shape.counts, S=number, GROUPS=groups, FINE=n > 1, LAPLACIAN=kind == "laplacian",
            RUNS=all(w % 4 == 0 for w in shape.W[1:]), EVEN=all(s % 4 == 0 for s in x.stride()[:4]),
            WIDE=_wide(x, z if patch else None), BLOCK=block, **flags,
        )  # fmt: skip


def _analyse_adjoint(out, dz, dv, table, mask, sizes, kind, pool_time, scale, active, written, patch, given) -> None:
    """Gradients of what ``_analyse`` wrote into that of the volume, or (``given``) of the levels in one flat tensor."""
    number, mix = levels.level_count(sizes), table is not None
    roles = [None if t is None else _laid_out(t, sizes, number, patch, pool_time, None if patch else written) for t in (dz, dv)]
    z_role, v_role = (r or roles[1 - i] for i, r in enumerate(roles))
    if patch:
        # A matrix without the inactive levels has no columns for them, and they are not read.
        active = min(active, written)
    shape = _Shape(sizes)
    table = out if table is None else _table(table)
    strides = (table.stride(0), table.stride(1)) if mix else (0, 0)
    bytes_, mask_b = _mask(mask, out)
    shared = {
        **shape.sizes, "z_b": z_role.batches, "v_b": v_role.batches, "columns": z_role.columns, "scale": tuple(scale), "z_r": z_role.row,
        "v_r": v_role.row, "table_b": strides[0], "table_s": strides[1], "mask_b": mask_b, "counts": shape.counts, "active": active,
        "S": number, "FT": _ft(pool_time), "HAS_TABLE": mix, "HAS_Z": dz is not None, "HAS_V": dv is not None,
        "HAS_MASK": mask is not None, **_patch(patch),
    }  # fmt: skip
    with _on(out):
        if given or number == 1 or _by_filters(kind, pool_time, number):
            direct = given or number == 1
            target = out.view(-1) if direct else _workspace(out, sizes)
            parts = levels.split(target, sizes)
            first = shape.first(VALUES)
            mix_adjoint_kernel[(first[-1] * shape.batch,)](
                tuple(parts), z_role.tensors, v_role.tensors, table, bytes_, first=first, WIDE=_wide(*parts, dz if patch else None),
                BLOCK=VALUES, **shared,
            )
            if direct:
                return
            for s in range(number):
                if s + 1 < number:
                    _filter("up_t", kind, pool_time, parts[s + 1], parts[s], mode=_SUBTRACT)
                if s:
                    _filter("down_t", kind, pool_time, parts[s - 1], out if s + 1 == number else parts[s], parts[s], _ADD)
            return
        blocks = triton.cdiv(shape.counts[-2], POSITIONS)
        analysis_adjoint_kernel[(blocks * shape.batch,)](
            out, z_role.tensors, v_role.tensors, table, bytes_, x_b=shape.counts[-1], blocks=blocks,
            RUNS=shape.W[-1] % 4 == 0, LAPLACIAN=kind == "laplacian",
            WIDE=_wide(out, dz if patch else None, dv if patch else None), BLOCK=POSITIONS, **shared,
        )


_QUIET = {"key0": 0, "key1": 0, "offset": 0, "first_sample": 0}


def decompose(outputs, x, sizes, kind, pool_time, scale, impl):
    """Launcher of pyramid_decompose."""
    n = levels.level_count(sizes)
    _analyse(outputs, [x], [], None, None, sizes, kind, pool_time, scale, n, n, [], _QUIET, False)


def decompose_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    """Launcher of its backward."""
    n = levels.level_count(sizes)
    _analyse_adjoint(outputs[0], grad, None, None, None, sizes, kind, pool_time, scale, n, n, [], False)


def flow_inputs(
    outputs, x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch, zero,
    target, impl,
):  # fmt: skip
    """Launcher of pyramid_flow_inputs."""
    written = levels.level_count(sizes) if zero else active
    random = _random(seed, offset, first_sample)
    _analyse(outputs, x, noise, table, mask, sizes, kind, pool_time, scale, active, written, patch, random, given)


def flow_inputs_backward(outputs, dz, dv, table, mask, x_dtype, sizes, given, active, kind, pool_time, scale, patch, zero, impl):
    """Launcher of its backward."""
    written = levels.level_count(sizes) if zero else active
    dz, dv = (None if t is None or t.numel() == 0 else t for t in (dz, dv))
    _analyse_adjoint(outputs[0], dz, dv, table, mask, sizes, kind, pool_time, scale, active, written, patch, given)


# ---- merge, and the step before it --------------------------------------------------------------------------------------------
def _synthesise(out, z, cond, uncond, table, sizes, kind, pool_time, scale) -> None:
    """Levels (after a step along ``cond``) into a volume of any strides."""
    shape, n = _Shape(sizes), levels.level_count(sizes)
    z = _listed(z, n)
    c = _listed(cond, n) if cond else z
    u = _listed(uncond, n) if uncond else z
    table = out if table is None else _table(table)
    strides = (table.stride(0), table.stride(1)) if cond else (0, 0)
    flags = {"STEP": bool(cond), "GUIDED": bool(uncond), "FT": _ft(pool_time)}
    with _on(out):
        if _gathers(kind, pool_time, n) or n == 1:
            # Three levels gather 21 values for one.
            block = VALUES // 2 if n > 2 and kind == "laplacian" and not INTERPRETED else VALUES
            blocks = triton.cdiv(shape.counts[-1], block)
            synthesis_kernel[(blocks * shape.batch,)](
                out, z.tensors, c.tensors, u.tensors, table, shape.T, shape.H, shape.W, z.batches, c.batches, u.batches, tuple(scale),
                *out.stride()[:4], *strides, shape.counts, blocks, S=n, IS_LAPLACIAN=kind == "laplacian",
                WIDE=_wide(out, *z.tensors, *c.tensors, *u.tensors), BLOCK=block, **flags,
            )
            return
        # The step and the scales first, in float32; then from level to level.
        target = _workspace(out, sizes)
        state = _laid_out(target, sizes, n, [], pool_time)
        _step(z, c, u, state, state, table, strides, shape, scale, n, 0, n, 0, [], flags)
        parts = state.tensors
        for s in range(1, n):
            _filter("up", kind, pool_time, parts[s - 1], out if s + 1 == n else parts[s], parts[s], _ADD)


def _step(z, c, u, state, given, table, strides, shape, scale, active, upcoming, kept, n_given, patch, flags) -> None:
    first = shape.first(VALUES)
    step_kernel[(first[-1] * shape.batch,)](
        z.tensors, c.tensors, u.tensors, state.tensors, given.tensors, table, **shape.sizes, z_b=z.batches, c_b=c.batches, u_b=u.batches,
        state_b=state.batches, input_b=given.batches, columns=given.columns, scale=tuple(scale[: shape.n]), first=first,
        input_r=given.row, table_b=strides[0], table_s=strides[1], counts=shape.counts, active=active, upcoming=upcoming, kept=kept,
        given=n_given, S=shape.n, WIDE=_wide(*z.tensors, given.tensors[0] if patch else None), BLOCK=VALUES, **_patch(patch), **flags,
    )  # fmt: skip


def _synthesise_adjoint(outputs, grad, table, sizes, kind, pool_time, scale, guided) -> None:
    """Gradient of the volume into those of the levels and, with a table, of the velocities; outputs are flat."""
    n, shape, step = levels.level_count(sizes), _Shape(sizes), table is not None
    grad = unit_stride(grad)
    dz = _laid_out(outputs[0], sizes, n, [], pool_time)
    dc = _laid_out(outputs[1], sizes, n, [], pool_time) if step else dz
    du = _laid_out(outputs[2], sizes, n, [], pool_time) if guided else dz
    table = outputs[0] if table is None else _table(table)
    strides = (table.stride(0), table.stride(1)) if step else (0, 0)
    with _on(grad):
        if n == 2 and kind != "dct":
            blocks = triton.cdiv(shape.counts[0], POSITIONS)
            synthesis_adjoint_kernel[(blocks * shape.batch,)](
                grad, dz.tensors, dc.tensors, du.tensors, table, shape.T, shape.H, shape.W, tuple(scale), *grad.stride()[:4], *strides,
                shape.counts, blocks, IS_LAPLACIAN=kind == "laplacian", FT=_ft(pool_time), STEP=step, GUIDED=guided,
                WIDE=_wide(grad, *dz.tensors), BLOCK=POSITIONS,
            )
            return
        parts = [*(levels.split(_workspace(grad, sizes, n - 1), sizes, n - 1) if n > 1 else ()), grad]
        for s in range(n - 2, -1, -1):
            _filter("up_t", kind, pool_time, parts[s + 1], parts[s])
        source = _listed(parts, n)
        _spread(source, source, dz, dc, du, table, strides, shape, scale, n, n, True, False, step, guided, [], pool_time)


def _spread(state, given, dz, dc, du, table, strides, shape, scale, active, upcoming, has_state, has_given, step, guided, patch, pool_time):
    first = shape.first(VALUES)
    step_adjoint_kernel[(first[-1] * shape.batch,)](
        state.tensors, given.tensors, dz.tensors, dc.tensors, du.tensors, table, **shape.sizes, state_b=state.batches,
        input_b=given.batches, columns=given.columns, scale=tuple(scale[: shape.n]), first=first, input_r=given.row, table_b=strides[0],
        table_s=strides[1], counts=shape.counts, active=active, upcoming=upcoming, S=shape.n, FT=_ft(pool_time), HAS_STATE=has_state,
        HAS_INPUT=has_given, STEP=step, GUIDED=guided, WIDE=_wide(*dz.tensors, given.tensors[0] if patch else None), BLOCK=VALUES,
        **_patch(patch),
    )  # fmt: skip


def merge(outputs, parts, sizes, kind, pool_time, scale, impl):
    """Launcher of pyramid_merge."""
    _synthesise(outputs[0], parts, [], [], None, sizes, kind, pool_time, scale)


def merge_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    """Launcher of its backward."""
    _synthesise_adjoint(outputs, grad, None, sizes, kind, pool_time, scale, False)


def flow_step(outputs, z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl):
    """Launcher of pyramid_flow_step."""
    if merge:
        _synthesise(outputs[0], z, cond, uncond, table, sizes, kind, pool_time, scale)
        return
    state, model_input = outputs
    n_given = (levels.level_count(sizes) if zero else upcoming) if model_input.numel() else 0
    n = max(active, upcoming, n_given)
    table = _table(table)
    z_role, c = _listed(z[:n], n), _listed(cond, n)
    u = _listed(uncond, n) if uncond else c
    kept = _laid_out(state, sizes, n, [], pool_time, active)
    given = _laid_out(model_input, sizes, n, patch, pool_time, None if patch else n_given) if n_given else kept
    flags = {"STEP": True, "GUIDED": bool(uncond), "FT": _ft(pool_time)}
    with _on(state):
        _step(
            z_role, c, u, kept, given, table, table.stride()[:2], _Shape(sizes, n), (1.0,) * n, active, upcoming, active, n_given,
            patch if n_given else [], flags,
        )


def flow_step_backward(
    outputs, dstate, dinput, table, sizes, active, upcoming, guided, kind, pool_time, scale, z_dtype, v_dtype, patch, zero, merge, impl,
):  # fmt: skip
    """Launcher of its backward."""
    if merge:
        _synthesise_adjoint(outputs, dstate, table, sizes, kind, pool_time, scale, guided)
        return
    dinput = None if dinput is None or dinput.numel() == 0 else dinput
    n = max(active, upcoming)
    state = None if dstate is None else _laid_out(dstate, sizes, n, [], pool_time, active)
    given = None
    if dinput is not None:
        n_given = levels.level_count(sizes) if zero else upcoming
        given = _laid_out(dinput, sizes, max(n, n_given), patch, pool_time, None if patch else n_given)
        given = _Role(given.tensors[:n], n, given.batches[:n], given.row, given.columns[:n])
    dz = _laid_out(outputs[0], sizes, n, [], pool_time)
    dc = _laid_out(outputs[1], sizes, n, [], pool_time, active)
    du = _laid_out(outputs[2], sizes, n, [], pool_time, active) if guided else dc
    table = _table(table)
    with _on(outputs[0]):
        _spread(
            state or dz, given or dz, dz, dc, du, table, table.stride()[:2], _Shape(sizes, n), (1.0,) * n, active, upcoming,
            state is not None, given is not None, True, guided, patch if given else [], pool_time,
        )


# ---- loss -----------------------------------------------------------------------------------------------------------------------
def _sides(pred, target, sizes, n, patch, pool_time):
    if patch:
        return [_laid_out(t[0], sizes, n, patch, pool_time) for t in (pred, target)]
    return [_listed(t, n) for t in (pred, target)]


def flow_loss(outputs, pred, target, mask, sizes, active, patch, pool_time, impl):
    """Launcher of pyramid_flow_loss."""
    loss, means = outputs
    shape = _Shape(sizes)
    n, (p, t) = shape.n, _sides(pred, target, sizes, shape.n, patch, pool_time)
    first = shape.first(VALUES * LOSS_CHUNKS)
    runs = max(b - a for a, b in zip(first, first[1:]))
    bytes_, mask_b = _mask(mask, loss)
    with _on(loss):
        sums = torch.empty(runs * shape.batch * n, dtype=torch.float32, device=loss.device)
        loss_kernel[(first[-1] * shape.batch,)](
            p.tensors, t.tensors, bytes_, sums, **shape.sizes, p_b=p.batches, t_b=t.batches, columns=p.columns, first=first, p_r=p.row,
            t_r=t.row, mask_b=mask_b, counts=shape.counts, active=active, batch=shape.batch, S=n, FT=_ft(pool_time),
            HAS_MASK=mask is not None, WIDE=_wide(*p.tensors, *t.tensors), CHUNKS=LOSS_CHUNKS, BLOCK=VALUES, **_patch(patch),
        )
        pairs = triton.next_power_of_2(shape.batch * n)
        loss_sum_kernel[(1,)](
            sums, loss, means, first, shape.counts, shape.batch, S=n, PAIRS=pairs, RUNS=max(2048 // pairs, 1),
        )


def flow_loss_backward(outputs, dloss, dmeans, pred, target, mask, sizes, active, patch, pool_time, impl):
    """Launcher of its backward."""
    shape = _Shape(sizes)
    n, (p, t) = shape.n, _sides(pred, target, sizes, shape.n, patch, pool_time)
    d = _laid_out(outputs[0], sizes, n, patch, pool_time, None if patch else len(pred))
    first = shape.first(VALUES)
    bytes_, mask_b = _mask(mask, outputs[0])
    means = outputs[0] if dmeans is None else dmeans.contiguous()
    with _on(outputs[0]):
        loss_backward_kernel[(first[-1] * shape.batch,)](
            p.tensors, t.tensors, bytes_, outputs[0] if dloss is None else dloss, means, d.tensors, **shape.sizes, p_b=p.batches,
            t_b=t.batches, d_b=d.batches, columns=p.columns, first=first, p_r=p.row, t_r=t.row, d_r=d.row, mask_b=mask_b,
            counts=shape.counts, active=active, batch=shape.batch, S=n, FT=_ft(pool_time), HAS_MASK=mask is not None,
            HAS_LOSS=dloss is not None, HAS_MEANS=dmeans is not None, LEVELS=n, WIDE=_wide(*p.tensors, *t.tensors), BLOCK=VALUES,
            **_patch(patch),
        )


# ---- stages -----------------------------------------------------------------------------------------------------------------------
def stage_inputs(outputs, x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl):
    """Launcher of pyramid_stage_inputs."""
    z, v = outputs
    top = levels.level_count(sizes) - 1
    x, noise, table = unit_stride(x), unit_stride(noise), _table(table)
    eps = x if noise is None else noise
    count = z[0].numel()
    blocks = triton.cdiv(count, POSITIONS)
    with _on(z):
        stage_kernel[(blocks * z.shape[0],)](
            x, eps, z, v, table, *z.shape[2:], *x.stride()[:4], *eps.stride()[:4], *z.stride()[:4], *v.stride()[:4], table.stride(0),
            count, blocks, top, **_random(seed, offset, first_sample), Q=1 << (top - stage), FIRST=stage == 0, PHILOX=noise is None,
            WIDE=_wide(x, eps, z, v), BLOCK=POSITIONS,
        )


def stage_inputs_backward(outputs, dz, dv, table, x_dtype, sizes, stage, impl):
    """Launcher of its backward."""
    out, table = outputs[0], _table(table)
    top = levels.level_count(sizes) - 1
    dz, dv = (None if g is None else g.contiguous() for g in (dz, dv))
    like = dz if dz is not None else dv
    count = out[0].numel()
    blocks = triton.cdiv(count, VALUES)
    with _on(out):
        stage_adjoint_kernel[(blocks * out.shape[0],)](
            out, like if dz is None else dz, like if dv is None else dv, table, *like.shape[2:], table.stride(0), count, blocks,
            Q=1 << (top - stage), FIRST=stage == 0, HAS_Z=dz is not None, HAS_V=dv is not None, WIDE=_wide(out), BLOCK=VALUES,
        )


def stage_transition(outputs, z, noise, table, sizes, level, seed, offset, first_sample, impl):
    """Launcher of pyramid_stage_transition."""
    out = outputs[0]
    z, noise, table = unit_stride(z), unit_stride(noise), _table(table)
    eps = z if noise is None else noise
    count = z[0].numel()
    blocks = triton.cdiv(count, POSITIONS)
    with _on(out):
        transition_kernel[(blocks * z.shape[0],)](
            out, z, eps, table, *z.shape[2:], *z.stride()[:4], *eps.stride()[:4], *out.stride()[:4], table.stride(0), count, blocks, level,
            **_random(seed, offset, first_sample), PHILOX=noise is None, RUNS=out.shape[4] % 4 == 0, WIDE=_wide(out, eps),
            BLOCK=POSITIONS,
        )


def stage_transition_backward(outputs, grad, table, sizes, impl):
    """Launcher of its backward."""
    out, grad, table = outputs[0], unit_stride(grad), _table(table)
    count = out[0].numel()
    blocks = triton.cdiv(count, POSITIONS)
    with _on(out):
        transition_adjoint_kernel[(blocks * out.shape[0],)](
            out, grad, table, *out.shape[2:], *grad.stride()[:4], table.stride(0), count, blocks, WIDE=_wide(grad), BLOCK=POSITIONS,
        )
