"""The jump from one stage of Pyramidal Flow to the next at inference: upsample, and make the noise white again, in one pass.

Source: Pyramidal Flow Matching (arXiv 2410.05954), section 3.3, equations 13 to 15.
"""

from __future__ import annotations

import functools

import torch

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["pyramid_stage_transition"]

COLUMNS = ("scale", "spread")


def _allocate(z, noise, table, sizes, level, seed, offset, first_sample, impl):
    return (z.new_empty(levels.shapes(sizes)[1]),)


def _allocate_backward(grad, table, sizes, impl):
    return (grad.new_empty(levels.shapes(sizes)[0]),)


def _cpu(outputs, z, noise, table, sizes, level, seed, offset, first_sample, impl):
    from ..pyramid import cpu

    z, noise = backends.unit(z), backends.unit(noise)
    return cpu.launch(
        "pyramid_transition", sizes, kind="haar", volume=outputs[0], ins=[[z], None if noise is None else [noise]], table=table,
        philox=noise is None, seed=seed, offset=offset, first_sample=first_sample, level_index=level, written=outputs,
    )  # fmt: skip


def _cpu_backward(outputs, grad, table, sizes, impl):
    from ..pyramid import cpu

    return cpu.launch(
        "pyramid_transition_adjoint", sizes, kind="haar", volume=backends.unit(grad), outs=[[outputs[0]]], table=table, written=outputs
    )


def _reference(outputs, z, noise, table, sizes, level, seed, offset, first_sample, impl):
    outputs[0].copy_(
        reference.forward(z, noise, table, sizes=sizes, level=level, seed=seed, offset=offset, first_sample=first_sample)
    )


def _reference_backward(outputs, grad, table, sizes, impl):
    outputs[0].copy_(reference.backward(grad, table))


OP = plans.Op(
    "pyramid_stage_transition",
    "(Tensor z, Tensor? noise, Tensor table, SymInt[] sizes, int level, int seed, int offset, int first_sample, str impl) -> Tensor",
    allocate=_allocate,
    backends=backends.backends(
        lambda z, noise, *rest: backends.why_not_any(z, noise), _cpu, _cpu_backward, _reference, _reference_backward,
        triton="stage_transition",
    ),
    gradient=registry.Gradient(
        schema="(Tensor grad, Tensor table, SymInt[] sizes, str impl) -> Tensor",
        allocate=_allocate_backward,
        save=lambda args, outputs: (args[2],),
        call=lambda saved, args, grads: (grads[0], saved[0], args[3]),
        scatter=lambda outputs, args, grads: (outputs[0],),
        flops=lambda grad, table, sizes, impl: cost.backward_flops(sizes),
    ),
    flops=lambda z, noise, table, sizes, *rest: cost.forward_flops(sizes),
    out=True,
)


@plans.remembered
def _checked(tensors, level):
    z, scale, spread, noise = tensors
    b, c, t, h, w = levels.volume("z", z).shape
    sizes = [b, c, t, h, w, t, 2 * h, 2 * w]
    for name, value in (("scale", scale), ("spread", spread)):
        if value is None:
            continue
        if value.dtype is not torch.float32 or tuple(value.shape) != (b,) or value.device != z.device or value.requires_grad:
            raise ValueError(f"{name}: {tuple(value.shape)} {value.dtype} on {value.device}, expected float32 [B] = {(b,)} on {z.device}")
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < levels.MAX_LEVELS:
        raise ValueError(f"level: {level!r}, expected 0 to {levels.MAX_LEVELS - 1}")
    if noise is not None:
        levels.same_shapes("noise", [levels.volume("noise", noise)], [levels.shapes(sizes)[1]], "the new resolution,")
        if noise.dtype != z.dtype or noise.requires_grad:
            raise ValueError(f"noise: dtype {noise.dtype}, requires_grad {noise.requires_grad}, expected z's {z.dtype} and no gradient")
    return plans.Ready(sizes=sizes, level=level)


def _table(scale, spread, batch, device) -> torch.Tensor:
    """float32 [B, 2] of (scale, spread)."""
    for name, value in (("scale", scale), ("spread", spread)):
        if not isinstance(value, torch.Tensor) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name}: {value!r}, expected a number or a float32 tensor [B]")
    if not isinstance(scale, torch.Tensor) and not isinstance(spread, torch.Tensor):
        scale, spread = float(scale), float(spread)
        return _constant(scale, spread, batch, device) if plans.alone() else _constant.__wrapped__(scale, spread, batch, device)
    columns = (v if isinstance(v, torch.Tensor) else torch.full((batch,), float(v), device=device) for v in (scale, spread))
    return torch.stack(tuple(columns), -1)


@functools.lru_cache(maxsize=64)
def _constant(scale, spread, batch, device) -> torch.Tensor:
    """The same for numbers, kept: there are as many pairs as stages."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor([[scale, spread]], dtype=torch.float32, device=device).expand(batch, 2)


@by_batch
def pyramid_stage_transition(z, scale, spread, *, level=1, seed=0, offset=0, first_sample=0, noise=None, out=None, impl=None):
    """``scale * up(z) + spread * n`` with nearest upsampling and n of zero mean in every 2x2 block: variance 1, correlation -1/3.

    n is made as ``sqrt(4/3) (g - block mean of g)`` from white g, which has that (singular) covariance. With the pair of
    :func:`vidkern.pyramid_stages`, z's noise becomes white of the new stage's starting level. Differentiable in ``z``.

    Args:
        z: state at the end of a stage, [B, C, H, W] or [B, C, T, H, W].
        scale, spread: numbers, or float32 tensors [B] on z's device.
        level: number of the stage entered (the noise's level); seed, offset, first_sample: as in
            :func:`vidkern.pyramid_flow_inputs`.
        noise: g at the new resolution to use instead, in z's dtype.
        out: a tensor of the new resolution to write into (inference only).
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        the state at the start of the next stage, twice the height and width, in z's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    ready = _checked((z, *(v if isinstance(v, torch.Tensor) else None for v in (scale, spread)), noise), level)
    table = _table(scale, spread, ready.sizes[0], z.device)
    random = levels.random_of(seed, offset, first_sample, ready.sizes)
    tensors = [z, table] if noise is None else [z, noise, table]
    given = lambda: None if noise is None else levels.as_volumes((noise,))[0]
    build = lambda: (*levels.as_volumes((z,)), given(), table, ready.sizes, ready.level, *random)
    (result,) = OP.serve(ready, tensors, build, impl, None if out is None else [levels.volume("out", out)], random)
    if out is not None:
        return out
    return result.squeeze(2) if z.dim() == 4 else result
