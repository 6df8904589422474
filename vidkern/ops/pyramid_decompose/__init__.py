"""A volume into the residual levels of a multi-scale pyramid, in one pass.

Source: Decomposable Flow Matching (arXiv 2506.19839), section 3 and its Table 6 for the other filters.
"""

from __future__ import annotations

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.levels import as_volumes, flat_out, handed_out, numel
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["pyramid_decompose"]


def _allocate(x, sizes, kind, pool_time, scale, impl):
    return (x.new_empty(levels.numel(sizes)),)


def _allocate_backward(grad, sizes, kind, pool_time, scale, impl):
    return (grad.new_empty(levels.shapes(sizes)[-1]),)


def _cpu(outputs, x, sizes, kind, pool_time, scale, impl):
    from ..pyramid import cpu

    return cpu.launch(
        "pyramid_analysis", sizes, kind=kind, pool_time=pool_time, volume=backends.unit(x), scale=scale,
        outs=[cpu.flat(outputs[0], sizes)], written=outputs,
    )  # fmt: skip


def _cpu_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    from ..pyramid import cpu

    grad = backends.unit(grad)
    return cpu.launch(
        "pyramid_analysis_adjoint", sizes, kind=kind, pool_time=pool_time, volume=outputs[0], scale=scale, ins=[cpu.flat(grad, sizes)],
        written=outputs,
    )  # fmt: skip


def _reference(outputs, x, sizes, kind, pool_time, scale, impl):
    parts = reference.forward(x, levels.level_count(sizes), kind, pool_time, scale)
    for target, part in zip(levels.split(outputs[0], sizes), parts, strict=True):
        target.copy_(part)


def _reference_backward(outputs, grad, sizes, kind, pool_time, scale, impl):
    outputs[0].copy_(reference.backward(levels.split(grad, sizes), kind, pool_time, scale))


OP = plans.Op(
    "pyramid_decompose",
    "(Tensor x, SymInt[] sizes, str kind, bool pool_time, float[] scale, str impl) -> Tensor",
    allocate=_allocate,
    backends=backends.backends(
        lambda x, *rest: backends.why_not_any(x), _cpu, _cpu_backward, _reference, _reference_backward, triton="decompose"
    ),
    gradient=registry.Gradient(
        schema="(Tensor grad, SymInt[] sizes, str kind, bool pool_time, float[] scale, str impl) -> Tensor",
        allocate=_allocate_backward,
        save=lambda args, outputs: (),
        call=lambda saved, args, grads: (grads[0], *args[1:-1]),
        scatter=lambda outputs, args, grads: (outputs[0],),
        flops=lambda grad, sizes, *rest: cost.backward_flops(sizes),
    ),
    flops=lambda x, sizes, *rest: cost.forward_flops(sizes),
    out=True,
)


@plans.remembered
def _checked(tensors, number, kind, factor, std):
    volume = levels.volume("x", tensors[0])
    number, pool_time = levels.count("levels", number), levels.rules(kind, factor)
    sizes, scale = levels.sizes_of(volume, number, kind, pool_time), levels.scales_of(std, number, inverse=True)
    return plans.Ready(rest=(sizes, kind, pool_time, scale), places=levels.places(sizes, tensors[0].dim()), sizes=sizes)


@by_batch
def pyramid_decompose(x, *, levels=2, kind="laplacian", factor=(1, 2, 2), std=None, out=None, impl=None):
    """Split a volume into levels: ``X_1 = G_1``, ``X_s = G_s - up(G_{s-1})`` with ``G_S = x`` and ``G_{s-1} = down(G_s)``.

    :func:`vidkern.pyramid_merge` puts them together again, whatever the filters. Differentiable. One level of factor 4 is
    ``pyramid_decompose(x, levels=3)`` with its two finest levels merged.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W], floating point; any strides.
        levels: S, from 1 to 4.
        kind: ``"laplacian"`` (2x2 means down; bilinear up, half-pixel centres, edges repeated), ``"haar"`` (means down, repetition
            up) or ``"dct"`` (the low half of 8x8 block coefficients).
        factor: what halves from level to level: ``(1, 2, 2)`` rows and columns, ``(2, 2, 2)`` time as well.
        std: standard deviation of each level, coarse to fine, that it is divided by; None: left as it is.
        out: a 1-D tensor of as many values as the levels have together, in x's dtype, to write into (inference only); the levels
            returned are views of it. Keeping one avoids the page faults of fresh memory.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        list of S tensors, coarse to fine, with the rank and dtype of ``x``, one after the other in one piece of memory.

    Raises:
        TypeError, ValueError: an argument is wrong, or a pooled axis is no multiple of 2^(S-1) (4 times that for "dct").
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    ready = _checked((x,), levels, kind, factor, std)
    outs = None if out is None else (flat_out("out", out, numel(ready.sizes)),)
    (flat,) = OP.serve(ready, [x], lambda: (*as_volumes((x,)), *ready.rest), impl, outs)
    return handed_out(flat, ready.places)
