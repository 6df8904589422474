"""Per-level masked mean squared error of velocity predictions, with a deterministic reduction.

Source: Decomposable Flow Matching (arXiv 2506.19839), equation 4: the mean over each level, summed over the levels.
"""

from __future__ import annotations

import torch

from ... import registry
from ..pyramid import backends, levels, plans
from ..pyramid.levels import as_volumes
from ..pyramid.sharded import by_batch
from . import cost, reference

__all__ = ["pyramid_flow_loss"]


def _allocate(pred, target, mask, sizes, active, patch, pool_time, impl):
    math = torch.promote_types(pred[0].dtype, torch.float32)
    return pred[0].new_empty((), dtype=math), pred[0].new_empty((sizes[0], levels.level_count(sizes)), dtype=math)


def _allocate_backward(dloss, dmeans, pred, target, mask, sizes, active, patch, pool_time, impl):
    shape = pred[0].shape if patch else (levels.numel(sizes, len(pred)),)
    return (pred[0].new_empty(shape),)


def _views(tensors, sizes, patch, pool_time):
    """Levels (last stride 1) as the launcher takes them."""
    from ..pyramid import cpu

    return cpu.tokens(tensors[0], sizes, patch, pool_time, levels.level_count(sizes)) if patch else tensors


def _total(means, batch):
    """Sum over levels of the mean over samples, in float64."""
    return means.double().sum() / batch


def _cpu(outputs, pred, target, mask, sizes, active, patch, pool_time, impl):
    from ..pyramid import cpu

    loss, means = outputs
    views = [_views(backends.unit(t), sizes, patch, pool_time) for t in (pred, target)]
    return cpu.launch("pyramid_loss", sizes, active=active, ins=views, mask=backends.dense(mask), table=means, loss=loss)


def _weights(dloss, dmeans, sizes, math):
    """2 (dloss / B + dmeans) / n for every sample and level: float [B, S, 1]."""
    counts = torch.tensor([float(n) for n in cost.value_counts_per_sample(sizes)], dtype=math)
    device = (dloss if dloss is not None else dmeans).device
    total = torch.zeros(sizes[0], len(counts), dtype=math, device=device)
    if dloss is not None:
        total = total + dloss.to(math) / sizes[0]
    if dmeans is not None:
        total = total + dmeans.to(math)
    return (2 * total / counts.to(device)).unsqueeze(2)


def _cpu_backward(outputs, dloss, dmeans, pred, target, mask, sizes, active, patch, pool_time, impl):
    from ..pyramid import cpu

    outs = _views([outputs[0]], sizes, patch, pool_time) if patch else cpu.flat(outputs[0], sizes, len(pred))
    views = [_views(backends.unit(t), sizes, patch, pool_time) for t in (pred, target)]
    return cpu.launch(
        "pyramid_loss_backward", sizes, active=active, ins=views, outs=[outs], mask=backends.dense(mask), table=dmeans, loss=dloss,
        written=outputs,
    )  # fmt: skip


def _parts(tensors, sizes, patch, pool_time):
    return levels.from_tokens(tensors[0], sizes, patch, pool_time) if patch else tensors


def _reference(outputs, pred, target, mask, sizes, active, patch, pool_time, impl):
    loss, means = outputs
    means.copy_(reference.means(_parts(pred, sizes, patch, pool_time), _parts(target, sizes, patch, pool_time), mask, active))
    loss.copy_(_total(means, sizes[0]))


def _reference_backward(outputs, dloss, dmeans, pred, target, mask, sizes, active, patch, pool_time, impl):
    math = backends.math_dtype(pred[0])
    grads = reference.backward(
        _weights(dloss, dmeans, sizes, math), _parts(pred, sizes, patch, pool_time), _parts(target, sizes, patch, pool_time), mask, active
    )
    if patch:
        outputs[0].copy_(levels.to_tokens([g.to(pred[0].dtype) for g in grads], patch, pool_time))
        return
    for to, g in zip(levels.split(outputs[0], sizes, len(pred)), grads, strict=True):
        to.copy_(g)


def _call(saved, args, grads):
    n, patch = len(args[0]), args[5]
    return (*grads, list(saved[1 : 1 + n]), list(saved[1 + n :]), saved[0], *args[3:-1])


def _scatter(outputs, args, grads):
    return (outputs[0],) if args[5] else tuple(levels.split(outputs[0], args[3], len(args[0])))


OP = plans.Op(
    "pyramid_flow_loss",
    "(Tensor[] pred, Tensor[] target, Tensor? mask, SymInt[] sizes, int active, SymInt[] patch, bool pool_time, str impl)"
    " -> (Tensor loss, Tensor means)",
    allocate=_allocate,
    backends=backends.backends(
        lambda pred, target, *rest: backends.why_not_any(*pred, *target), _cpu, _cpu_backward, _reference, _reference_backward,
        triton="flow_loss",
    ),
    gradient=registry.Gradient(
        schema="(Tensor? dloss, Tensor? dmeans, Tensor[] pred, Tensor[] target, Tensor? mask, SymInt[] sizes, int active, "
        "SymInt[] patch, bool pool_time, str impl) -> Tensor",
        allocate=_allocate_backward,
        save=lambda args, outputs: (args[2], *args[0], *args[1]),
        call=_call,
        scatter=_scatter,
        flops=lambda dloss, dmeans, pred, target, mask, sizes, active, *rest: cost.backward_flops(sizes, active),
    ),
    flops=lambda pred, target, mask, sizes, active, *rest: cost.forward_flops(sizes, active),
)


@plans.remembered
def _checked(tensors, layout, patch, shape, number, factor, active):
    pred, target, mask = tensors
    pool_time = levels.rules("laplacian", factor)
    if layout == "levels":
        preds, targets, cut = levels.level_list("pred", pred), levels.level_list("target", target), []
        if len(targets) != len(preds):
            raise ValueError(f"target: {len(targets)} levels, expected pred's {len(preds)}")
        levels.same_shapes("target", targets, preds, "pred's")
        sizes = levels.free_sizes(preds)
    elif layout == "tokens":
        preds, targets, sizes, cut = *_matrices(pred, target, patch, shape, number, pool_time), list(patch)
    else:
        raise ValueError(f'layout: {layout!r}, expected "levels" or "tokens"')
    number = levels.level_count(sizes)
    for i, t in enumerate(targets):
        if t.requires_grad:
            raise ValueError(f"target[{i}]: requires grad, expected a tensor that does not: only pred is differentiated")
        if t.device != preds[0].device:
            raise ValueError(f"target[{i}]: on device {t.device}, expected pred's {preds[0].device}")
    levels.mask_of("active", mask, sizes[0], number, preds[0].device)
    alive = number if mask is not None else levels.active_levels("active", active, number)
    return plans.Ready(rest=(sizes, alive, cut, pool_time), cut=cut)


@by_batch
def pyramid_flow_loss(
    pred, target, *, active=None, layout="levels", patch=(1, 1, 1), shape=None, levels=2, factor=(1, 2, 2), return_levels=False, impl=None
):
    """Mean squared error of every level, summed over the levels and averaged over the samples:

    ``loss = 1/B sum_b sum_s M_bs mean over C, T, H, W of (pred_s - target_s)^2``; every level counts the same, however small.

    Accumulated in float32 and float64 in an order that threads do not change; nothing but the inputs is kept for the backward.
    Differentiable in ``pred``.

    Args:
        pred, target: lists of levels, coarse to fine, each [B, C, H, W] or [B, C, T, H, W], shapes equal pairwise, dtypes free; any
            sizes. Only the ``active`` ones need be there. With layout "tokens": one matrix [B, tokens, K] each.
        active: as in :func:`vidkern.pyramid_flow_inputs`. What does not take part is never read; its gradient is 0.
        layout, patch: as in :func:`vidkern.pyramid_flow_inputs`.
        shape, levels, factor: for layout "tokens": shape of the volume, S, and what halves from level to level.
        return_levels: also return the means [B, S].
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        the loss, a float32 scalar, and with ``return_levels`` the means of every sample and level, float32 [B, S] (0 where masked);
        float64 for float64 predictions.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
    """
    mask = active if isinstance(active, torch.Tensor) else None
    shape = tuple(shape) if isinstance(shape, (list, torch.Size)) else shape
    ready = _checked((pred, target, mask), layout, patch, shape, levels, factor, None if mask is active else active)
    preds, targets = ([pred], [target]) if ready.cut else (pred, target)
    sides = lambda: ([*preds], [*targets]) if ready.cut else (as_volumes(preds), as_volumes(targets))
    tensors = [*preds, *targets] if mask is None else [*preds, *targets, mask]
    loss, means = OP.serve(ready, tensors, lambda: (*sides(), mask, *ready.rest), impl)
    return (loss, means) if return_levels else loss


def _matrices(pred, target, patch, shape, number, pool_time):
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) not in (4, 5):
        raise ValueError(f'shape: {shape!r}, expected the volume\'s [B, C, H, W] or [B, C, T, H, W] for layout "tokens"')
    volume = torch.empty(tuple(shape), device="meta")
    sizes = levels.sizes_of(levels.volume("shape", volume), levels.count("levels", number), "laplacian", pool_time, "shape")
    levels.patches(patch, number, pool_time)
    levels.check_patch(patch, sizes)
    wanted = levels.token_shape(sizes, patch, pool_time)
    for name, t in (("pred", pred), ("target", target)):
        levels.tensor(name, t)
        if tuple(t.shape) != wanted or not t.is_floating_point():
            raise ValueError(f"{name}: shape {tuple(t.shape)} {t.dtype}, expected floating-point [B, tokens, K] = {wanted}")
    return [pred], [target], sizes
