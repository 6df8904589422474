"""One sampler step on all active levels: guidance, Euler, the next model input, and on the last step the merge.

Sources: Decomposable Flow Matching (arXiv 2506.19839), section 3.3; classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

import functools

import torch

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["pyramid_flow_step"]

COLUMNS = ("dt", "guidance")


def _allocate(z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl):
    if merge:
        return z[0].new_empty(levels.shapes(sizes)[-1]), z[0].new_empty(0)
    n = levels.level_count(sizes) if zero else upcoming
    shape = levels.token_shape(sizes, patch, pool_time, n) if patch else (levels.numel(sizes, n),)
    return z[0].new_empty(levels.numel(sizes, active)), z[0].new_empty(shape if upcoming else (0,), dtype=dtype)


def _allocate_backward(
    dstate, dinput, table, sizes, active, upcoming, guided, kind, pool_time, scale, z_dtype, v_dtype, patch, zero, merge, impl,
):  # fmt: skip
    like = dstate if dstate is not None else dinput
    joined = levels.numel(sizes) if merge else levels.numel(sizes, max(active, upcoming))
    moved = levels.numel(sizes, active)
    return (
        like.new_empty(joined, dtype=z_dtype), like.new_empty(moved, dtype=v_dtype), like.new_empty(moved if guided else 0, dtype=v_dtype)
    )


def _input_views(t, sizes, upcoming, pool_time, patch, zero):
    """Levels of the model input or its gradient (last stride 1)."""
    from ..pyramid import cpu

    if t is None or t.numel() == 0:
        return None
    n = levels.level_count(sizes) if zero else upcoming
    return cpu.tokens(t, sizes, patch, pool_time, n) if patch else cpu.flat(t, sizes, n)


def _cpu(outputs, z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl):
    from ..pyramid import cpu

    z, cond, uncond = (backends.unit(t) for t in (z, cond, uncond))
    if merge:
        return cpu.launch(
            "pyramid_synthesis", sizes, kind=kind, pool_time=pool_time, active=active, volume=outputs[0], scale=scale,
            ins=[z, cond, uncond], table=table, written=outputs,
        )  # fmt: skip
    used = max(active, upcoming)
    outs = [cpu.flat(outputs[0], sizes, active), _input_views(outputs[1], sizes, upcoming, pool_time, patch, zero)]
    return cpu.launch("pyramid_step", sizes, active=upcoming, ins=[z[:used], cond, uncond], outs=outs, table=table, written=outputs)


def _cpu_backward(
    outputs, dstate, dinput, table, sizes, active, upcoming, guided, kind, pool_time, scale, z_dtype, v_dtype, patch, zero,
    merge, impl,
):  # fmt: skip
    from ..pyramid import cpu

    dz, dcond, duncond = outputs
    dstate, dinput = backends.unit(dstate), backends.unit(dinput)
    outs = [cpu.flat(dcond, sizes, active), cpu.flat(duncond, sizes, active) if guided else None]
    if merge:
        return cpu.launch(
            "pyramid_synthesis_adjoint", sizes, kind=kind, pool_time=pool_time, volume=dstate, scale=scale,
            outs=[cpu.flat(dz, sizes), *outs], table=table, written=outputs,
        )  # fmt: skip
    n = max(active, upcoming)
    ins = [
        None if dstate is None else cpu.flat(dstate, sizes, active),
        _cut(_input_views(dinput, sizes, upcoming, pool_time, patch, zero), upcoming),
    ]
    return cpu.launch(
        "pyramid_step_adjoint", sizes, active=active, ins=ins, outs=[cpu.flat(dz, sizes, n), *outs], table=table, written=outputs
    )


def _cut(views, n):
    """Levels that are kept as zeros have no gradient."""
    return None if views is None else views[:n]


def _cpu_why_not(z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, *rest):
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {dtype}, it serves torch.float32 and torch.bfloat16"
    return backends.why_not_any(*z, *cond, *uncond)


def _reference(
    outputs, z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl,
):  # fmt: skip
    state = reference.forward(z, cond, uncond, table, active)
    if merge:
        outputs[0].copy_(reference.merged(state, kind, pool_time, scale))
        return
    for to, part in zip(levels.split(outputs[0], sizes, active), state):
        to.copy_(part)
    if outputs[1].numel() == 0:
        return
    n = levels.level_count(sizes) if zero else upcoming
    parts = [p if s < upcoming else torch.zeros_like(p) for s, p in enumerate(state[:n])]
    parts += [parts[0].new_zeros(shape) for shape in levels.shapes(sizes)[len(parts) : n]]
    if patch:
        outputs[1].copy_(levels.to_tokens([p.to(dtype) for p in parts], patch, pool_time))
        return
    for to, part in zip(levels.split(outputs[1], sizes, n), parts, strict=True):
        to.copy_(part)


def _reference_backward(
    outputs, dstate, dinput, table, sizes, active, upcoming, guided, kind, pool_time, scale, z_dtype, v_dtype, patch, zero,
    merge, impl,
):  # fmt: skip
    if merge:
        grads = reference.merged_backward(dstate, levels.level_count(sizes), kind, pool_time, scale)
    else:
        n = levels.level_count(sizes) if zero else upcoming
        states = None if dstate is None else levels.split(dstate.contiguous(), sizes, active)
        inputs = None
        if dinput is not None and dinput.numel():
            inputs = levels.from_tokens(dinput, sizes, patch, pool_time, n) if patch else levels.split(dinput.contiguous(), sizes, n)
        grads = reference.joined(states, inputs, levels.shapes(sizes)[: max(active, upcoming)], active, upcoming)
    dz, dcond, duncond = reference.backward(grads, table, active, guided)
    for target, parts in zip(outputs, (dz, dcond, duncond)):
        for to, part in zip(levels.split(target, sizes, len(parts)), parts, strict=True):
            to.copy_(part)


def _call(saved, args, grads):
    z, cond, uncond, _, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl = args
    table, z_like, v_like = saved
    dstate, dinput = grads
    return (
        dstate, dinput, table, sizes, active, upcoming, bool(uncond), kind, pool_time, scale, z_like.dtype, v_like.dtype, patch, zero,
        merge,
    )  # fmt: skip


def _scatter(outputs, args, grads):
    z, cond, uncond, _, sizes, active, upcoming, *_, merge, impl = args
    dz, dcond, duncond = outputs
    joined = levels.split(dz, sizes, None if merge else max(active, upcoming))
    return (
        *joined, *(None,) * (len(z) - len(joined)), *levels.split(dcond, sizes, active),
        *(levels.split(duncond, sizes, active) if uncond else ()),
    )


_SCHEMA = "Tensor table, SymInt[] sizes, int active, int upcoming, "
OP = plans.Op(
    "pyramid_flow_step",
    f"(Tensor[] z, Tensor[] cond, Tensor[] uncond, {_SCHEMA}str kind, bool pool_time, float[] scale, ScalarType dtype, "
    "SymInt[] patch, bool zero, bool merge, str impl) -> (Tensor state, Tensor model_input)",
    allocate=_allocate,
    backends=backends.backends(_cpu_why_not, _cpu, _cpu_backward, _reference, _reference_backward, triton="flow_step"),
    gradient=registry.Gradient(
        schema=f"(Tensor? dstate, Tensor? dinput, {_SCHEMA}bool guided, str kind, bool pool_time, float[] scale, ScalarType z_dtype, "
        "ScalarType v_dtype, SymInt[] patch, bool zero, bool merge, str impl) -> (Tensor dz, Tensor dcond, Tensor duncond)",
        allocate=_allocate_backward,
        # The empty tensors carry the dtypes that the gradients have to have.
        save=lambda args, outputs: (args[3], args[0][0].new_empty(0), args[1][0].new_empty(0)),
        call=_call,
        scatter=_scatter,
        flops=lambda dstate, dinput, table, sizes, active, *rest: cost.backward_flops(sizes, active),
    ),
    flops=lambda z, cond, uncond, table, sizes, active, *rest: cost.forward_flops(sizes, active, bool(uncond)),
    out=True,
)


@plans.remembered
def _checked(tensors, active, next_active, dtype, layout, patch, inactive, merge, std, kind, factor):
    z, cond, uncond = tensors
    pool_time = levels.rules(kind, factor)
    states = levels.level_list("z", z)
    number = len(states)
    sizes = levels.sizes_of_levels("z", states, kind, pool_time) if merge else levels.free_sizes(states)
    alive = levels.active_levels("active", active, number)
    if merge and alive != number:
        raise ValueError(f"active: {active!r}, expected all {number} levels to be active on the last step (merge=True)")
    upcoming = 0 if merge else _upcoming(next_active, alive, number)
    if cond is None:
        raise TypeError("cond: NoneType, expected a non-empty list of level tensors, coarse to fine")
    velocity = _check_velocities("cond", cond, states, alive)
    if uncond is not None and _check_velocities("uncond", uncond, states, alive) != velocity:
        raise ValueError(f"uncond[0]: dtype {uncond[0].dtype}, expected cond's {velocity}")
    if inactive not in ("drop", "zero"):
        raise ValueError(f'inactive: {inactive!r}, expected "drop" or "zero"')
    if layout not in ("levels", "tokens"):
        raise ValueError(f'layout: {layout!r}, expected "levels" or "tokens"')
    cut = []
    if layout == "tokens" and upcoming:
        levels.sizes_of_levels("z", states, "laplacian", pool_time)
        levels.patches(patch, number, pool_time)
        levels.check_patch(patch, sizes)
        cut = list(patch)
    dtype = z[0].dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype!r}, expected a floating-point torch.dtype")
    zero, rank, scale = inactive == "zero", z[0].dim(), levels.scales_of(std, number, inverse=False)
    return plans.Ready(
        sizes=sizes, alive=alive, upcoming=upcoming, cut=cut, moved=levels.places(sizes, rank, alive),
        given=levels.places(sizes, rank, number if zero else upcoming),
        rest=(sizes, alive, upcoming, kind, pool_time, scale, dtype, cut, zero, bool(merge)),
    )


@by_batch
def pyramid_flow_step(
    z, cond, uncond=None, *, dt, guidance=1.0, active=None, next_active=None, dtype=None, layout="levels", patch=(1, 1, 1),
    inactive="drop", merge=False, std=None, kind="laplacian", factor=(1, 2, 2), out=None, impl=None,
):  # fmt: skip
    """One Euler step on the active levels: ``z_s += dt_s (u_s + w_s (c_s - u_s))`` with conditional and unconditional velocities c, u.

    The sign of ``dt`` follows the time direction of the velocities: positive toward data for data time, negative for noise time.
    Nothing is read back from the device: ``active`` and the like are plain numbers. Differentiable in z, cond and uncond.

    Args:
        z: list of S levels, coarse to fine, the state; each [B, C, H, W] or [B, C, T, H, W]; keep it in float32.
        cond, uncond: lists of velocities of the ``active`` levels (more are not read), one dtype for both; ``uncond`` may be None
            (no guidance).
        dt, guidance: step of the time and guidance weight of each level: a number, S numbers, or float32 tensors [S] or [B, S] on
            z's device (rows of a table made once for the whole schedule, so that no step copies anything to the device).
        active: how many of the coarsest levels move (or S booleans without gaps); None: all.
        next_active: how many levels the next model call takes; None: ``active``; 0: make no model input.
        dtype: of the next model input; None: that of z.
        layout, patch, inactive: of the next model input, as in :func:`vidkern.pyramid_flow_inputs`.
        merge: last step: return the merged volume instead; all levels must be active. The last state is never stored.
        std: with ``merge``: standard deviation that each level is multiplied by before merging.
        kind, factor: with ``merge``: those of the pyramid.
        out: (state, model input) to write into (inference only), 1-D each (the model input a matrix for "tokens"); the state may be the
            very memory of z's active levels, which are then updated in place. With ``merge``: a tensor like the finest level.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        (z, model_input): the new levels (levels beyond ``active`` are the ones given) and the next model input, a list of levels or
        a matrix; model_input is None for ``next_active=0``. With ``merge``: the volume, shaped and typed like the finest level.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    ready = _checked((z, cond, uncond), active, next_active, dtype, layout, patch, inactive, merge, std, kind, factor)
    if uncond is None and not isinstance(guidance, torch.Tensor) and guidance != 1 and any(w != 1 for w in _listed(guidance)):
        raise ValueError(f"guidance: {guidance!r} without uncond, expected 1, or the unconditional velocities")
    alive = ready.alive
    velocities = cond[:alive], uncond[:alive] if uncond else []
    quiet = plans.alone()
    table = _table(dt, guidance, ready.sizes[0], len(z), z[0].device, quiet)
    build = lambda: (levels.as_volumes(z), *map(levels.as_volumes, velocities), table, *ready.rest)
    outs = None if out is None else _outs(out, merge, ready.upcoming, z)
    state, model_input = OP.serve(ready, [*z, *velocities[0], *velocities[1], table], build, impl, outs, quiet=quiet)
    if merge:
        return state.squeeze(2) if z[0].dim() == 4 else state
    result = [*levels.handed_out(state, ready.moved), *z[alive:]]
    if not ready.upcoming:
        return result, None
    return result, model_input if ready.cut else levels.handed_out(model_input, ready.given)


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _outs(out, merge, upcoming, states):
    if merge:
        levels.tensor("out", out)
        return (out.unsqueeze(2) if out.dim() == 4 else out), states[0].new_empty(0)
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    if len(outs) != (2 if upcoming else 1):
        raise ValueError(f"out: {len(outs)} tensors, expected {'(state, model input)' if upcoming else 'the state alone'}")
    for name, t in zip(("state", "model input"), outs):
        levels.tensor(f"out {name}", t)
    return outs if upcoming else (outs[0], states[0].new_empty(0))


def _upcoming(next_active, alive, number) -> int:
    if isinstance(next_active, int) and not isinstance(next_active, bool) and next_active == 0:
        return 0
    return levels.active_levels("next_active", alive if next_active is None else next_active, number)


def _check_velocities(name, given, states, alive) -> torch.dtype:
    parts = levels.level_list(name, given)
    if len(parts) < alive:
        raise ValueError(f"{name}: {len(parts)} levels, expected the {alive} active ones")
    parts = parts[:alive]
    levels.same_shapes(name, parts, states, "z's")
    if parts[0].device != states[0].device:
        raise ValueError(f"{name}[0]: on device {parts[0].device}, expected z's {states[0].device}")
    return parts[0].dtype


def _table(dt, guidance, batch, number, device, quiet) -> torch.Tensor:
    """float32 [B, S, 2] of (dt, guidance); kept for numbers where ``quiet``."""
    numbers = tuple(tuple(v) if isinstance(v, list) else v for v in (dt, guidance))
    if quiet and all(isinstance(v, (int, float, tuple)) for v in numbers):
        return _constant(numbers, tuple(map(type, numbers)), batch, number, device)
    return _rows(dt, guidance, batch, number, device)


def _rows(dt, guidance, batch, number, device) -> torch.Tensor:
    rows = [_per_level(name, value, batch, number, device) for name, value in (("dt", dt), ("guidance", guidance))]
    if rows[0].dim() != rows[1].dim():
        rows = [r.expand(batch, number) for r in rows]
    return torch.stack(rows, -1).expand(batch, number, 2)


@functools.lru_cache(maxsize=256)
def _constant(values, kinds, batch, number, device) -> torch.Tensor:
    """The same for numbers, kept: a schedule comes back with every picture, and a copy to the device at every step would be waited for.
    ``kinds`` tells numbers apart that compare equal."""
    with torch.inference_mode(False), torch.no_grad():
        return _rows(*values, batch, number, device)


def _per_level(name, value, batch, number, device):
    """A number, S numbers or a tensor as float32 [S] or [B, S]."""
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.float32 or tuple(value.shape) not in ((number,), (batch, number)) or value.device != device:
            raise ValueError(
                f"{name}: {tuple(value.shape)} {value.dtype} on {value.device}, expected torch.float32 [S] = {(number,)} or [B, S] = "
                f"{(batch, number)} on {device}"
            )
        if value.requires_grad:
            raise ValueError(f"{name}: requires grad, expected a tensor that does not")
        return value
    values = list(value) if isinstance(value, (list, tuple)) else [value] * number
    if len(values) != number or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name}: {list(value) if isinstance(value, tuple) else value!r}, expected a number, {number} numbers, or a float32 tensor [S] or [B, S]")
    return torch.tensor(values, dtype=torch.float32, device=device)
