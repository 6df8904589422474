"""Training pairs of the last stage of a Pyramidal Flow with three: bound by memory, and by the generator where the noise is made inside.

The peers halve data and noise by interpolation and take every product and sum as a pass of its own, as public code does; careful torch
(pooling, lerp); and torch.compile of the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pyramid_stage_inputs import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import GIVEN, SHAPES, PyramidShape, flattened, forward_only, peer, planes, scaled

_ALL = SHAPES | GIVEN


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """A clean volume, positions within the stage, and noise where the shape says so."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, device=device).to(dtype)
    x, r = draw(shape.shape), torch.rand(shape.batch, generator=generator, device=device)
    return Problem(shape, (x, r, *([draw(shape.shape)] if shape.noise == "given" else [])), x)


def _ends(number: int):
    stage = vidkern.pyramid_stages(number)[-1]
    return stage.start, stage.end


def _table(p: Problem, r):
    start, end = _ends(p.shape.levels)
    return torch.stack((torch.full_like(r, start), torch.full_like(r, end), r), -1)


def _before(x, down):
    """What the stage before ends at: half the size and back by repetition."""
    flat = planes(x)
    return F.interpolate(down(flat), scale_factor=2, mode="nearest").view(x.shape)


def _plain(x, r, *noise, number):
    eps = noise[0] if noise else torch.randn_like(x)
    s, e = _ends(number)
    r = r.to(x.dtype).view(-1, 1, 1, 1, 1)
    first = s * eps + (1 - s) * _before(x, lambda y: F.interpolate(y, scale_factor=0.5, mode="bilinear", align_corners=False))
    last = e * eps + (1 - e) * x
    return r * first + (1 - r) * last, first - last


def _careful(x, r, *noise, number):
    eps = noise[0] if noise else torch.randn_like(x)
    s, e = _ends(number)
    first = torch.lerp(_before(x, lambda y: F.avg_pool2d(y, 2)), eps, s)
    last = torch.lerp(x, eps, e)
    return torch.lerp(last, first, r.to(x.dtype).view(-1, 1, 1, 1, 1)), first - last


def _ours(p: Problem):
    table, n = _table(p, p.inputs[1]), p.shape.levels
    return lambda x, r, *noise: vidkern.pyramid_stage_inputs(x, table, stages=n, stage=n - 1, seed=1, noise=noise[0] if noise else None)


def _backend(p: Problem) -> str:
    table, n = _table(p, p.inputs[1]), p.shape.levels
    return vidkern.explain(vidkern.pyramid_stage_inputs, p.inputs[0], table, stages=n, stage=n - 1).chosen


def reference(p: Problem, mode: str) -> Reference:
    """Without noise of its own everything; else what does not depend on it: with z = r a + (1 - r) b and v = a - b of the two ends,
    b = z - r v and a = b + v, and e a - s b is free of the noise."""
    x, r = p.inputs[0].double(), p.inputs[1].double().view(-1, 1, 1, 1, 1)
    s, e = _ends(p.shape.levels)

    def pick(result):
        z, v = (t.double() for t in flattened(result))
        if p.shape.noise == "given":
            return torch.cat((z.flatten(), v.flatten()))
        end = z - r * v
        return e * (end + v) - s * end

    given = [t.double() for t in p.inputs[2:]]
    exact = _plain(x, p.inputs[1].double(), *(given or [torch.zeros_like(x)]), number=p.shape.levels)
    return Reference([pick(exact)], pick)


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """Data (and noise, if given) read, two results written."""
    stage = s.levels - 1
    return Work(cost.forward_flops(s.sizes, stage), cost.forward_bytes(s.sizes, stage, itemsize, noise=s.noise == "given"))


def _bound(function):
    return lambda p: lambda *inputs: function(*inputs, number=p.shape.levels)


SUITE = Suite(
    op="pyramid_stage_inputs",
    shapes=_ALL,
    default={"cpu": ("cpu", "cpu-given", "in512", "small"), "cuda": ("cpu", "in512", "wan")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend, backward=forward_only),
    peers=(
        peer("as the public code", _bound(_plain), backward=forward_only),
        peer("careful torch", _bound(_careful), backward=forward_only),
        peer("torch.compile", lambda p: torch.compile(_bound(_plain)(p), dynamic=False), compiles=True, backward=forward_only),
    ),
    targets=(
        Target("fwd", "float32", "time", 2.0, ("torch.compile",), shapes=("cpu-given",)),
        Target("fwd", "float32", "time", 10.0, ("torch.compile",), shapes=("cpu",)),
        *(Target("fwd", d, "time", 1 / 1.2, ("as the public code",), shapes=("small",)) for d in ("float32", "bfloat16")),
    ),
)
