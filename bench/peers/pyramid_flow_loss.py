"""Per-level mean squared error, forward and backward, against torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pyramid_flow_loss import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import SHAPES, PyramidShape, peer, scaled


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """Predictions, then targets."""
    generator = torch.Generator(device=device).manual_seed(0)
    tensors = [torch.randn(s, generator=generator, device=device).to(dtype) for _ in range(2) for s in shape.level_shapes]
    return Problem(shape, tuple(tensors), torch.ones((), dtype=torch.float32, device=device))


def _halves(tensors):
    n = len(tensors) // 2
    # The targets carry no gradient; what a bench hands over as an input does.
    return tensors[:n], [t.detach() for t in tensors[n:]]


def _keep(loss, tensors):
    """Joins the targets to the graph with a gradient of nothing, since every input of a bench gets one."""
    n = len(tensors) // 2
    return _Joined.apply(loss, *tensors[n:]) if loss.requires_grad else loss


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, *targets):
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in targets]
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros((), dtype=d, device=v).expand(s) for s, d, v in ctx.shapes)


def _plain(*tensors):
    pred, target = _halves(tensors)
    return _keep(sum(F.mse_loss(p.float(), t.float()) for p, t in zip(pred, target)), tensors)


def _written_out(*tensors):
    pred, target = _halves(tensors)
    return _keep(sum((p.float() - t.float()).square().flatten(1).mean(1).mean() for p, t in zip(pred, target)), tensors)


def _ours(p: Problem):
    def run(*tensors):
        pred, target = _halves(tensors)
        return _keep(vidkern.pyramid_flow_loss(list(pred), target), tensors)

    return run


def _backend(p: Problem) -> str:
    pred, target = _halves(p.inputs)
    return vidkern.explain(vidkern.pyramid_flow_loss, list(pred), target).chosen


def _compiled(p: Problem):
    def loss(pred, target):
        return sum((a.float() - b.float()).square().flatten(1).mean(1).mean() for a, b in zip(pred, target))

    fast = torch.compile(loss, dynamic=False)

    def run(*tensors):
        pred, target = _halves(tensors)
        return _keep(fast(list(pred), list(target)), tensors)

    return run


def reference(p: Problem, mode: str) -> Reference:
    """Float64."""
    n = len(p.inputs) // 2
    leaves = [t.double().requires_grad_() for t in p.inputs[:n]]
    loss = sum(F.mse_loss(a, b.double()) for a, b in zip(leaves, p.inputs[n:]))
    grads = torch.autograd.grad(loss, leaves) if mode == "fwdbwd" else ()
    return Reference([loss.detach(), *grads, *(torch.zeros_like(g) for g in grads)])


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """Both read; the backward reads them again and writes a gradient."""
    forward = Work(cost.forward_flops(s.sizes, s.levels), cost.forward_bytes(s.sizes, s.levels, itemsize))
    if mode == "fwd":
        return forward
    return Work(
        forward.flops + cost.backward_flops(s.sizes, s.levels), forward.bytes + cost.backward_bytes(s.sizes, s.levels, itemsize)
    )


SUITE = Suite(
    op="pyramid_flow_loss",
    shapes=SHAPES,
    default={"cpu": ("cpu", "in512", "small"), "cuda": ("cpu", "in512", "pixels")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend),
    peers=(
        peer("F.mse_loss per level", lambda p: _plain),
        peer("written out", lambda p: _written_out),
        peer("torch.compile", _compiled, compiles=True),
    ),
    targets=tuple(
        Target(mode, d, "time", 1 / 1.2, ("F.mse_loss per level",), shapes=("small",))
        for d in ("float32", "bfloat16")
        for mode in ("fwd", "fwdbwd")
    ),
)
