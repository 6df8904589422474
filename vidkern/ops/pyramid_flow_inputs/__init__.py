"""Noisy levels and velocity targets of a multi-scale flow, in one pass over the data.

Source: Decomposable Flow Matching (arXiv 2506.19839), section 3, equation 3.
"""

from __future__ import annotations

import torch

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.levels import as_volumes, handed_out, random_of
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["flow_coefficients", "pyramid_flow_inputs"]

COLUMNS = ("alpha", "sigma", "d_alpha", "d_sigma")
_SCHEMA = (
    "SymInt[] sizes, bool given, int active, str kind, bool pool_time, float[] scale, int seed, int offset, "
    "int first_sample, ScalarType dtype, SymInt[] patch, bool zero, bool target, str impl)"
)


def _written(sizes, active, zero) -> int:
    """Levels in the outputs."""
    return levels.level_count(sizes) if zero else active


def _shape(sizes, active, pool_time, patch, zero):
    n = _written(sizes, active, zero)
    return levels.token_shape(sizes, patch, pool_time, n) if patch else (levels.numel(sizes, n),)


def _allocate(
    x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch, zero,
    target, impl,
):  # fmt: skip
    shape = _shape(sizes, active, pool_time, patch, zero)
    return x[0].new_empty(shape, dtype=dtype), x[0].new_empty(shape if target else (0,), dtype=dtype)


def _input_dtype_like(grads):
    return next(g for g in grads if g is not None)


def _allocate_backward(dz, dv, table, mask, x_dtype, sizes, given, active, kind, pool_time, scale, patch, zero, impl):
    like = _input_dtype_like((dz, dv))
    shape = (levels.numel(sizes),) if given else levels.shapes(sizes)[-1]
    return (like.new_empty(shape, dtype=x_dtype),)


def _views(t, sizes, active, pool_time, patch, zero):
    """Levels of an output or its gradient (last stride 1) as the launcher takes them."""
    from ..pyramid import cpu

    if t is None or t.numel() == 0:
        return None
    n = _written(sizes, active, zero)
    return cpu.tokens(t, sizes, patch, pool_time, n) if patch else cpu.flat(t, sizes, n)


def _cpu(
    outputs, x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch,
    zero, target, impl,
):  # fmt: skip
    from ..pyramid import cpu

    outs = [_views(t, sizes, active, pool_time, patch, zero) for t in outputs]
    x, noise = backends.unit(x), backends.unit(noise)
    shared = dict(
        kind=kind, pool_time=pool_time, active=active, table=table, mask=backends.dense(mask), scale=scale, outs=outs,
        philox=0 if noise else 1, seed=seed, offset=offset, first_sample=first_sample, written=outputs,
    )  # fmt: skip
    if given:
        return cpu.launch("pyramid_mix", sizes, ins=[x, noise], **shared)
    return cpu.launch("pyramid_analysis", sizes, volume=x[0], ins=[None, noise], **shared)


def _cpu_backward(outputs, dz, dv, table, mask, x_dtype, sizes, given, active, kind, pool_time, scale, patch, zero, impl):
    from ..pyramid import cpu

    ins = [_views(t, sizes, active, pool_time, patch, zero) for t in backends.unit([dz, dv])]
    shared = dict(
        kind=kind, pool_time=pool_time, active=active, table=table, mask=backends.dense(mask), scale=scale, ins=ins, written=outputs
    )
    if given:
        return cpu.launch("pyramid_mix_adjoint", sizes, outs=[cpu.flat(outputs[0], sizes)], **shared)
    return cpu.launch("pyramid_analysis_adjoint", sizes, volume=outputs[0], **shared)


def _cpu_why_not(
    x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch, zero,
    target, impl,
):  # fmt: skip
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {dtype}, it serves torch.float32 and torch.bfloat16"
    return backends.why_not_any(*x, *noise)


def _fill(outputs, results, sizes, pool_time, patch):
    for target, parts in zip(outputs, results):
        if target.numel() == 0:
            continue
        if patch:
            target.copy_(levels.to_tokens([p.to(target.dtype) for p in parts], patch, pool_time))
        else:
            for to, part in zip(levels.split(target, sizes, len(parts)), parts, strict=True):
                to.copy_(part)


def _reference(
    outputs, x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch,
    zero, target, impl,
):  # fmt: skip
    results = reference.forward(
        x, table, mask, noise, sizes=sizes, given=given, active=active, kind=kind, pool_time=pool_time, scale=scale, seed=seed,
        offset=offset, first_sample=first_sample, written=_written(sizes, active, zero),
    )  # fmt: skip
    _fill(outputs, results, sizes, pool_time, patch)


def _reference_backward(outputs, dz, dv, table, mask, x_dtype, sizes, given, active, kind, pool_time, scale, patch, zero, impl):
    n = _written(sizes, active, zero)

    def parts(t):
        if t is None:
            return None
        return levels.from_tokens(t, sizes, patch, pool_time, n) if patch else levels.split(t.contiguous(), sizes, n)

    grads = reference.backward(
        parts(dz), parts(dv), table, mask, sizes=sizes, given=given, active=active, kind=kind, pool_time=pool_time, scale=scale
    )
    for to, g in zip(levels.split(outputs[0], sizes) if given else outputs, grads, strict=True):
        to.copy_(g)


def _call(saved, args, grads):
    x, _, _, noise, sizes, given, active, kind, pool_time, scale, *_, patch, zero, target, impl = args
    table, mask, empty = saved
    return (*grads, table, mask, empty.dtype, sizes, given, active, kind, pool_time, scale, patch, zero)


def _scatter(outputs, args, grads):
    return tuple(levels.split(outputs[0], args[4])) if args[5] else (outputs[0],)


OP = plans.Op(
    "pyramid_flow_inputs",
    f"(Tensor[] x, Tensor table, Tensor? mask, Tensor[] noise, {_SCHEMA} -> (Tensor z, Tensor v)",
    allocate=_allocate,
    backends=backends.backends(_cpu_why_not, _cpu, _cpu_backward, _reference, _reference_backward, triton="flow_inputs"),
    gradient=registry.Gradient(
        schema="(Tensor? dz, Tensor? dv, Tensor table, Tensor? mask, ScalarType x_dtype, SymInt[] sizes, bool given, int active, "
        "str kind, bool pool_time, float[] scale, SymInt[] patch, bool zero, str impl) -> Tensor",
        allocate=_allocate_backward,
        # The empty tensor carries the dtype that the gradient has to have.
        save=lambda args, outputs: (args[1], args[2], args[0][0].new_empty(0)),
        call=_call,
        scatter=_scatter,
        flops=lambda dz, dv, table, mask, x_dtype, sizes, given, active, *rest: cost.backward_flops(sizes, active),
    ),
    flops=lambda x, table, mask, noise, sizes, given, active, *rest: cost.forward_flops(sizes, active),
    out=True,
)


def flow_coefficients(time, *, direction):
    """The table of a straight path for :func:`pyramid_flow_inputs` from one time per sample and level.

    Args:
        time: float tensor [B, S] (or [S] for all samples). Its values are not looked at, which would wait for a GPU: those outside 0..1
            go on along the straight line.
        direction: ``"data"``: data time t, 1 = data, z = t x + (1 - t) eps and the velocity is x - eps; ``"noise"``: noise time
            (sigma), 1 = noise, z = (1 - u) x + u eps and the velocity is eps - x.

    Returns:
        float32 [B, S, 4] with (alpha, sigma, d_alpha, d_sigma).

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    levels.tensor("time", time)
    if direction not in ("data", "noise"):
        raise ValueError(f'direction: {direction!r}, expected "data" (1 = data) or "noise" (1 = noise)')
    if time.dim() not in (1, 2) or not time.is_floating_point():
        raise ValueError(f"time: shape {tuple(time.shape)} {time.dtype}, expected floating-point [B, S] or [S]")
    t = time.float() if time.dim() == 2 else time.float()[None]
    one = torch.ones_like(t)
    rows = (t, 1 - t, one, -one) if direction == "data" else (1 - t, t, -one, one)
    return torch.stack(rows, -1)


@plans.remembered
def _checked(tensors, number, active, std, kind, factor, layout, patch, inactive, dtype, target):
    x, coefficients, noise, mask = tensors
    pool_time = levels.rules(kind, factor)
    given = isinstance(x, (list, tuple))
    if given:
        volumes = levels.level_list("x", x)
        number, sizes = len(volumes), levels.free_sizes(volumes)
    else:
        volumes, number = [levels.volume("x", x)], levels.count("levels", number)
        sizes = levels.sizes_of(volumes[0], number, kind, pool_time)
    batch, device = sizes[0], volumes[0].device
    levels.table_of("coefficients", coefficients, batch, number, COLUMNS, device)
    levels.mask_of("active", mask, batch, number, device)
    alive = number if mask is not None else levels.active_levels("active", active, number)
    if inactive not in ("drop", "zero"):
        raise ValueError(f'inactive: {inactive!r}, expected "drop" or "zero"')
    if layout not in ("levels", "tokens"):
        raise ValueError(f'layout: {layout!r}, expected "levels" or "tokens"')
    cut = []
    if layout == "tokens":
        grids = {tuple(n // p for n, p in zip(s[2:], q)) for s, q in zip(levels.shapes(sizes), levels.patches(patch, number, pool_time))}
        levels.check_patch(patch, sizes)
        if len(grids) > 1:
            raise ValueError(f"patch: {patch!r} gives the levels token grids {sorted(grids)}, expected the same for all")
        cut = list(patch)
    if noise is not None:
        _check_noises(noise, volumes[0].dtype, sizes, alive)
    dtype = volumes[0].dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype!r}, expected a floating-point torch.dtype")
    zero = inactive == "zero"
    return plans.Ready(
        sizes=sizes, given=given, cut=cut, before=(sizes, given, alive, kind, pool_time, levels.scales_of(std, number, inverse=True)),
        after=(dtype, cut, zero), places=levels.places(sizes, (x[0] if given else x).dim(), _written(sizes, alive, zero)),
        target=bool(target),
    )  # fmt: skip


@by_batch
def pyramid_flow_inputs(
    x, coefficients, *, levels=2, seed=0, offset=0, first_sample=0, noise=None, active=None, std=None, kind="laplacian",
    factor=(1, 2, 2), layout="levels", patch=(1, 1, 1), inactive="drop", target=True, dtype=None, out=None, impl=None,
):  # fmt: skip
    """Decompose, add noise and make the velocity target: for every level s of every sample, with X_s the level and eps_s its noise,

    ``z_s = alpha X_s + sigma eps_s`` and ``v_s = d_alpha X_s + d_sigma eps_s``.

    The noise of each level is independent and comes from Philox4x32-10: the same (seed, offset, sample, level, element) gives the same
    noise on every backend, however the batch is cut (``first_sample`` is the number of the first sample here). Differentiable in ``x``.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W], decomposed here; or a list of S levels, coarse to fine, taken as they are (any sizes).
        coefficients: float32 [B, S, 4] or [1, S, 4], on x's device: see :func:`vidkern.flow_coefficients`. Read in the kernel.
        levels: S, from 1 to 4 (for a list: its length counts).
        seed: 0 .. 2^63 - 1; offset: 0 .. 2^32 - 1, such as the training step; first_sample: 0 .. 2^32 - 1.
        noise: list of noise tensors to use instead, one per active level, like the levels in shape and dtype.
        active: the coarsest levels that take part: their number, S booleans without gaps, or a boolean tensor [B, S]; None is all of
            them. What does not take part is never read from: z and v are exactly 0 there.
        std: standard deviation that each level is divided by first.
        kind, factor: see :func:`vidkern.pyramid_decompose`.
        layout: ``"levels"``: lists of levels; ``"tokens"``: one matrix [B, tokens, K] each, where the patches of all levels lie side by
            side (level, channel, time, row, column), so that the sum of the levels' patch embeddings is one product.
        patch: (time, row, column) patch of the coarsest level; it doubles with every level along what ``factor`` pools.
        inactive: ``"drop"`` leaves levels beyond ``active`` out of the result, ``"zero"`` keeps them as zeros.
        target: also make v.
        dtype: of the outputs; None: x's.
        out: (z, v) to write into (z alone with ``target=False``), inference only: 1-D for layout "levels", the matrices for "tokens".
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        (z, v): lists of levels, coarse to fine, in one piece of memory each, or matrices; z alone with ``target=False``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    mask = active if isinstance(active, torch.Tensor) else None
    ready = _checked(
        (x, coefficients, noise, mask), levels, None if mask is active else active, std, kind, factor, layout, patch, inactive, dtype, target
    )
    random = random_of(seed, offset, first_sample, ready.sizes)
    table, volumes, noise = coefficients, list(x) if ready.given else [x], list(noise or ())
    if table.shape[0] != ready.sizes[0]:
        table = table.expand(ready.sizes[0], -1, -1)
    build = lambda: (as_volumes(volumes), table, mask, as_volumes(noise), *ready.before, *random, *ready.after, ready.target)
    tensors = [*volumes, table, *noise] if mask is None else [*volumes, table, mask, *noise]
    z, v = OP.serve(ready, tensors, build, impl, None if out is None else _outs(out, target), random)
    if not ready.cut:
        z, v = handed_out(z, ready.places), handed_out(v, ready.places) if target else None
    return (z, v) if target else z


def _check_noises(noise, dtype, sizes, alive) -> None:
    parts = levels.level_list("noise", noise, alive)
    levels.same_shapes("noise", parts, levels.shapes(sizes), "that of its level,")
    for i, n in enumerate(noise):
        if n.requires_grad:
            raise ValueError(f"noise[{i}]: requires grad, expected a tensor that does not")
        if n.dtype != dtype:
            raise ValueError(f"noise[{i}]: dtype {n.dtype}, expected x's {dtype}")


def _outs(out, target):
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    if len(outs) != (2 if target else 1):
        raise ValueError(f"out: {len(outs)} tensors, expected {'(z, v)' if target else 'z alone'}")
    for name, t in zip("zv", outs):
        levels.tensor(f"out {name}", t)
    return outs if target else [*outs, outs[0].new_empty(0)]
