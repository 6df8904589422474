"""Levels back into a volume, forward and backward: bound by memory.

The peers are interpolation and addition level by level, and torch.compile of that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pyramid_merge import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import SHAPES, PyramidShape, forward_only, peer, planes, scaled


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """Unit normal levels and gradient."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, device=device).to(dtype)
    return Problem(shape, tuple(draw(s) for s in shape.level_shapes), draw(shape.shape))


def _plain(*parts):
    result = parts[0]
    for part in parts[1:]:
        up = F.interpolate(planes(result), scale_factor=2, mode="bilinear", align_corners=False)
        result = up.view(part.shape) + part
    return result


def _ours(p: Problem):
    return lambda *parts: vidkern.pyramid_merge(list(parts))


def _kept(p: Problem):
    """A volume that is kept from call to call."""
    out = torch.zeros(p.shape.shape, dtype=p.dtype, device=p.device)
    return lambda *parts: vidkern.pyramid_merge(list(parts), out=out)


def _backend(p: Problem) -> str:
    return vidkern.explain(vidkern.pyramid_merge, list(p.inputs)).chosen


def reference(p: Problem, mode: str) -> Reference:
    """Float64."""
    leaves = [t.double().requires_grad_() for t in p.inputs]
    merged = _plain(*leaves)
    grads = torch.autograd.grad(merged, leaves, p.grad_out.double()) if mode == "fwdbwd" else ()
    return Reference([merged.detach(), *grads])


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """Levels read and the volume written; the backward moves the same."""
    times = 2 if mode == "fwdbwd" else 1
    return Work(times * cost.forward_flops(s.sizes), times * cost.forward_bytes(s.sizes, itemsize))


SUITE = Suite(
    op="pyramid_merge",
    shapes=SHAPES,
    default={"cpu": ("cpu", "in512", "pixels", "small"), "cuda": ("cpu", "in512", "pixels")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend),
    peers=(
        peer("vidkern, outputs kept", _kept, group="vidkern", times=2, backward=forward_only),
        peer("plain torch", lambda p: _plain, times=4),
        peer("torch.compile", lambda p: torch.compile(_plain, dynamic=False), compiles=True),
    ),
    targets=(
        Target("fwd", "float32", "time", 2.0, ("torch.compile",), shapes=("cpu",)),
        *(Target("fwd", d, "time", 1 / 1.2, ("plain torch",), shapes=("small",)) for d in ("float32", "bfloat16")),
    ),
)
