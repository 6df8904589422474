"""The jump between two stages of Pyramidal Flow: bound by memory, and by the generator where the noise is made inside.

The peers write the blockwise noise as white noise less its block means, which is far faster than the public code's draw from a
multivariate normal block by block; torch.compile of that.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pyramid_stage_transition import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import GIVEN, SHAPES, PyramidShape, forward_only, peer, planes, scaled

_STAGE = vidkern.pyramid_stages(3)[1]


def _two(shape: PyramidShape) -> list[int]:
    """Sizes of the jump: half the rows and columns, and all of them."""
    b, c, (t, h, w) = shape.batch, shape.channels, shape.size
    return [b, c, t, h // 2, w // 2, t, h, w]


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """The state at half the size, and white noise at the full one where the shape says so."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, device=device).to(dtype)
    z = draw(_two(shape)[:5])
    return Problem(shape, (z, *([draw(shape.shape)] if shape.noise == "given" else [])), z)


def _plain(z, *noise):
    up = F.interpolate(planes(z), scale_factor=2, mode="nearest")
    g = planes(noise[0]) if noise else torch.randn_like(up)
    mean = F.interpolate(F.avg_pool2d(g, 2), scale_factor=2, mode="nearest")
    out = _STAGE.scale * up + _STAGE.spread * (math.sqrt(4 / 3) * (g - mean))
    return out.view(*z.shape[:3], *out.shape[-2:])


def _ours(p: Problem):
    return lambda z, *noise: vidkern.pyramid_stage_transition(z, _STAGE.scale, _STAGE.spread, seed=1, noise=noise[0] if noise else None)


def _backend(p: Problem) -> str:
    return vidkern.explain(vidkern.pyramid_stage_transition, p.inputs[0], _STAGE.scale, _STAGE.spread).chosen


def reference(p: Problem, mode: str) -> Reference:
    """With noise of its own only the block means count, which it does not change."""
    given = p.shape.noise == "given"
    pick = lambda out: out.double() if given else F.avg_pool2d(planes(out.double()), 2)
    zero = torch.zeros(p.shape.shape, dtype=torch.float64, device=p.device)
    noise = p.inputs[1].double() if given else zero
    return Reference([pick(_plain(p.inputs[0].double(), noise))], pick)


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """A quarter (and the noise, if given) read, the whole written."""
    sizes = _two(s)
    return Work(cost.forward_flops(sizes), cost.forward_bytes(sizes, itemsize, noise=s.noise == "given"))


SUITE = Suite(
    op="pyramid_stage_transition",
    shapes=SHAPES | GIVEN,
    default={"cpu": ("cpu", "cpu-given", "in512", "small"), "cuda": ("cpu", "in512", "wan")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend, backward=forward_only),
    peers=(
        peer("plain torch", lambda p: _plain, backward=forward_only),
        peer("torch.compile", lambda p: torch.compile(_plain, dynamic=False), compiles=True, backward=forward_only),
    ),
    targets=(
        Target("fwd", "float32", "time", 2.0, ("torch.compile",), shapes=("cpu-given",)),
        Target("fwd", "float32", "time", 10.0, ("torch.compile",), shapes=("cpu",)),
        *(Target("fwd", d, "time", 1 / 1.2, ("plain torch",), shapes=("small",)) for d in ("float32", "bfloat16")),
    ),
)
