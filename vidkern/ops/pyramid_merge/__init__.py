"""Residual levels of a pyramid back into a volume, in one pass.

Source: Decomposable Flow Matching (arXiv 2506.19839), section 3.
"""

from __future__ import annotations

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["pyramid_merge"]


def _allocate(parts, sizes, kind, pool_time, scale, impl):
    return (parts[0].new_empty(levels.shapes(sizes)[-1]),)


def _allocate_backward(grad, sizes, kind, pool_time, scale, impl):
    return (grad.new_empty(levels.numel(sizes)),)


def _cpu(outputs, parts, sizes, kind, pool_time, scale, impl):
    from ..pyramid import cpu

    return cpu.launch(
        "pyramid_synthesis", sizes, kind=kind, pool_time=pool_time, volume=outputs[0], scale=scale, ins=[backends.unit(parts)],
        written=outputs,
    )  # fmt: skip


def _cpu_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    from ..pyramid import cpu

    return cpu.launch(
        "pyramid_synthesis_adjoint", sizes, kind=kind, pool_time=pool_time, volume=backends.unit(grad), scale=scale,
        outs=[cpu.flat(outputs[0], sizes)], written=outputs,
    )  # fmt: skip


def _reference(outputs, parts, sizes, kind, pool_time, scale, impl):
    outputs[0].copy_(reference.forward(parts, kind, pool_time, scale))


def _reference_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    grads = reference.backward(grad, levels.level_count(sizes), kind, pool_time, scale)
    for target, g in zip(levels.split(outputs[0], sizes), grads, strict=True):
        target.copy_(g)


OP = plans.Op(
    "pyramid_merge",
    "(Tensor[] parts, SymInt[] sizes, str kind, bool pool_time, float[] scale, str impl) -> Tensor",
    allocate=_allocate,
    backends=backends.backends(
        lambda parts, *rest: backends.why_not_any(*parts), _cpu, _cpu_backward, _reference, _reference_backward, triton="merge"
    ),
    gradient=registry.Gradient(
        schema="(Tensor grad, SymInt[] sizes, str kind, bool pool_time, float[] scale, str impl) -> Tensor",
        allocate=_allocate_backward,
        save=lambda args, outputs: (),
        call=lambda saved, args, grads: (grads[0], *args[1:-1]),
        scatter=lambda outputs, args, grads: tuple(levels.split(outputs[0], args[1])),
        flops=lambda grad, sizes, *rest: cost.backward_flops(sizes),
    ),
    flops=lambda parts, sizes, *rest: cost.forward_flops(sizes),
    out=True,
)


@plans.remembered
def _checked(tensors, kind, factor, std):
    pool_time = levels.rules(kind, factor)
    volumes = levels.level_list("parts", tensors[0])
    sizes, scale = levels.sizes_of_levels("parts", volumes, kind, pool_time), levels.scales_of(std, len(volumes), inverse=False)
    return plans.Ready(rest=(sizes, kind, pool_time, scale))


@by_batch
def pyramid_merge(parts, *, kind="laplacian", factor=(1, 2, 2), std=None, out=None, impl=None):
    """Put levels together: ``R_1 = X_1``, ``R_s = up(R_{s-1}) + X_s``; the result is ``R_S``.

    The inverse of :func:`vidkern.pyramid_decompose`. The first levels alone give the picture at their resolution. Differentiable.

    Args:
        parts: list of levels, coarse to fine, each [B, C, H, W] or [B, C, T, H, W] and twice the one before along every pooled axis;
            one dtype; any strides.
        kind, factor: those of the decomposition.
        std: standard deviation of each level that it is multiplied by first; None: left as it is.
        out: a tensor like the finest level to write into (inference only).
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        a tensor shaped like the finest level.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    ready = _checked((parts,), kind, factor, std)
    outs = None if out is None else levels.as_volumes([levels.tensor("out", out)])
    (merged,) = OP.serve(ready, list(parts), lambda: (levels.as_volumes(parts), *ready.rest), impl, outs)
    if out is not None:
        return out
    return merged.squeeze(2) if parts[0].dim() == 4 else merged
