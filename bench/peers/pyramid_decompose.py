"""A volume into its levels: bound by memory.

The peers are the pyramid by interpolation, as public code makes it, by average pooling, and torch.compile of the first.
"""

from __future__ import annotations

import torch

import vidkern
from vidkern.ops.pyramid_decompose import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import SHAPES, PyramidShape, careful_decompose, decompose, flattened, forward_only, peer, scaled


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """A unit normal volume."""
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(shape.shape, generator=generator, device=device).to(dtype)
    return Problem(shape, (x,), x)


def _bound(function):
    return lambda p: lambda x: function(x, p.shape.levels)


def _ours(p: Problem):
    return lambda x: vidkern.pyramid_decompose(x, levels=p.shape.levels)


def _kept(p: Problem):
    """Levels that are kept from call to call."""
    out = torch.zeros(p.shape.values, dtype=p.dtype, device=p.device)
    return lambda x: vidkern.pyramid_decompose(x, levels=p.shape.levels, out=out)


def _backend(p: Problem) -> str:
    return vidkern.explain(vidkern.pyramid_decompose, p.inputs[0], levels=p.shape.levels).chosen


def _flat(result):
    return torch.cat([t.double().flatten() for t in flattened(result)])


def reference(p: Problem, mode: str) -> Reference:
    """Float64."""
    return Reference([_flat(vidkern.pyramid_decompose(p.inputs[0].double(), levels=p.shape.levels, impl="reference"))], _flat)


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """The volume read, every level written."""
    return Work(cost.forward_flops(s.sizes), cost.forward_bytes(s.sizes, itemsize))


SUITE = Suite(
    op="pyramid_decompose",
    shapes=SHAPES,
    default={"cpu": ("cpu", "in512", "pixels", "small"), "cuda": ("cpu", "in512", "pixels")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend, backward=forward_only),
    peers=(
        peer("vidkern, outputs kept", _kept, group="vidkern", times=2, backward=forward_only),
        peer("as the public code", _bound(decompose), backward=forward_only),
        peer("average pooling", _bound(careful_decompose), backward=forward_only),
        peer("torch.compile", lambda p: torch.compile(_bound(decompose)(p), dynamic=False), compiles=True, backward=forward_only),
    ),
    targets=(
        Target("fwd", "float32", "time", 2.0, ("torch.compile",), shapes=("cpu",)),
        *(Target("fwd", d, "time", 1 / 1.2, ("as the public code",), shapes=("small",)) for d in ("float32", "bfloat16")),
    ),
)
