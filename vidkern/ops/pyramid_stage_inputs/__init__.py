"""Training pairs of one stage of Pyramidal Flow: noise and data at the two ends of the stage, in one pass from the finest latent.

Source: Pyramidal Flow Matching (arXiv 2410.05954), section 3.2, equations 8 to 12.
"""

from __future__ import annotations

import torch

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.sharded import by_batch
from . import cost, reference
from .schedule import Stage, pyramid_stages

__all__ = ["Stage", "pyramid_stage_inputs", "pyramid_stages"]

COLUMNS = ("start_sigma", "end_sigma", "position")


def _stage_shape(sizes, stage):
    return levels.shapes(sizes)[stage]


def _kernel_sizes(sizes, stage):
    """Sizes from the resolution before the stage (its own for the first) to the finest, and the place of its own among them."""
    first = max(stage - 1, 0)
    return [*sizes[:2], *sizes[2 + 3 * first :]], stage - first


def _allocate(x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl):
    shape = _stage_shape(sizes, stage)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _allocate_backward(dz, dv, table, x_dtype, sizes, stage, impl):
    like = dz if dz is not None else dv
    return (like.new_empty(levels.shapes(sizes)[-1], dtype=x_dtype),)


def _cpu(outputs, x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl):
    from ..pyramid import cpu

    z, v = outputs
    top, noise = levels.level_count(sizes) - 1, backends.unit(noise)
    shape, own = _kernel_sizes(sizes, stage)
    return cpu.launch(
        "pyramid_stage", shape, kind="haar", active=own, volume=backends.unit(x), ins=[None if noise is None else [noise]],
        outs=[[z], [v]], table=table, philox=noise is None, seed=seed, offset=offset, first_sample=first_sample, level_index=top,
        written=outputs,
    )  # fmt: skip


def _cpu_backward(outputs, dz, dv, table, x_dtype, sizes, stage, impl):
    from ..pyramid import cpu

    shape, own = _kernel_sizes(sizes, stage)
    ins = [None if g is None else [backends.unit(g)] for g in (dz, dv)]
    return cpu.launch("pyramid_stage_adjoint", shape, kind="haar", active=own, volume=outputs[0], ins=ins, table=table, written=outputs)


def _cpu_why_not(x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl):
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {dtype}, it serves torch.float32 and torch.bfloat16"
    return backends.why_not_any(x, noise)


def _reference(outputs, x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl):
    results = reference.forward(x, noise, table, sizes=sizes, stage=stage, seed=seed, offset=offset, first_sample=first_sample)
    for to, value in zip(outputs, results, strict=True):
        to.copy_(value)


def _reference_backward(outputs, dz, dv, table, x_dtype, sizes, stage, impl):
    outputs[0].copy_(reference.backward(dz, dv, table, sizes=sizes, stage=stage))


OP = plans.Op(
    "pyramid_stage_inputs",
    "(Tensor x, Tensor? noise, Tensor table, SymInt[] sizes, int stage, int seed, int offset, int first_sample, ScalarType dtype, "
    "str impl) -> (Tensor z, Tensor v)",
    allocate=_allocate,
    backends=backends.backends(_cpu_why_not, _cpu, _cpu_backward, _reference, _reference_backward, triton="stage_inputs"),
    gradient=registry.Gradient(
        schema="(Tensor? dz, Tensor? dv, Tensor table, ScalarType x_dtype, SymInt[] sizes, int stage, str impl) -> Tensor",
        allocate=_allocate_backward,
        save=lambda args, outputs: (args[2], args[0].new_empty(0)),
        call=lambda saved, args, grads: (*grads, saved[0], saved[1].dtype, args[3], args[4]),
        scatter=lambda outputs, args, grads: (outputs[0],),
        flops=lambda dz, dv, table, x_dtype, sizes, stage, impl: cost.backward_flops(sizes, stage),
    ),
    flops=lambda x, noise, table, sizes, stage, *rest: cost.forward_flops(sizes, stage),
    out=True,
)


@plans.remembered
def _checked(tensors, stages, stage, dtype):
    x, table, noise = tensors
    volume = levels.volume("x", x)
    number = levels.count("stages", stages)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < number:
        raise ValueError(f"stage: {stage!r}, expected 0 to {number - 1}")
    sizes = levels.sizes_of(volume, number, "haar", False)
    levels.tensor("table", table)
    if table.dim() != 2:
        raise ValueError(f"table: shape {tuple(table.shape)}, expected [B, 3] with ({', '.join(COLUMNS)})")
    levels.table_of("table", table[:, None], sizes[0], 1, COLUMNS, volume.device)
    if noise is not None:
        levels.same_shapes("noise", [levels.volume("noise", noise)], [volume], "x's")
        if noise.dtype != x.dtype or noise.requires_grad:
            raise ValueError(f"noise: dtype {noise.dtype}, requires_grad {noise.requires_grad}, expected x's {x.dtype} and no gradient")
    dtype = x.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype!r}, expected a floating-point torch.dtype")
    return plans.Ready(sizes=sizes, stage=stage, dtype=dtype)


@by_batch
def pyramid_stage_inputs(
    x, table, *, stages=3, stage=0, seed=0, offset=0, first_sample=0, noise=None, dtype=None, out=None, impl=None
):
    """Points between the two ends of a stage, and the velocity between them. With x_k and eps_k the data and noise at the stage's
    resolution, (s, e, r) of the sample, and nearest upsampling:

    ``start = s eps_k + (1 - s) up(x_{k-1})``, ``end = e eps_k + (1 - e) x_k``, ``z = r start + (1 - r) end``, ``v = start - end``.

    r runs from 1 (start of the stage) to 0 (its end) in every stage: it is a position, no noise level. Coarse noise is made from the
    fine one, ``eps_{k-1} = 2 * mean of its 2x2 blocks``, which keeps its variance. Differentiable in ``x``.

    Args:
        x: clean latent [B, C, H, W] or [B, C, T, H, W] at the finest resolution; H and W multiples of 2^(stages-1).
        table: float32 [B, 3] with (s, e, r): :func:`vidkern.pyramid_stages` gives s and e.
        stages: number of stages K, 1 to 4; stage: which one, 0 is the coarsest (there is nothing before it: s must be 1).
        seed, offset, first_sample: of the noise, as in :func:`vidkern.pyramid_flow_inputs`; its level is K - 1, the finest.
        noise: noise at the finest resolution to use instead, like ``x``.
        dtype: of the outputs; None: x's.
        out: (z, v) to write into (inference only).
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        (z, v), each at the stage's resolution.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    ready = _checked((x, table, noise), stages, stage, dtype)
    random = levels.random_of(seed, offset, first_sample, ready.sizes)
    table = table if table.shape[0] == ready.sizes[0] else table.expand(ready.sizes[0], -1)
    tensors, rest = [x, table] if noise is None else [x, noise, table], (table, ready.sizes, ready.stage, *random, ready.dtype)
    build = lambda: (*levels.as_volumes((x,)), None if noise is None else levels.as_volumes((noise,))[0], *rest)
    if out is not None:
        if not isinstance(out, (list, tuple)) or len(out) != 2:
            raise TypeError("out: expected two tensors (z, v)")
        OP.serve(ready, tensors, build, impl, [levels.volume(f"out {n}", t) for n, t in zip("zv", out)], random)
        return tuple(out)
    z, v = OP.serve(ready, tensors, build, impl, None, random)
    return (z.squeeze(2), v.squeeze(2)) if x.dim() == 4 else (z, v)
