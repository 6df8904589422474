"""Noisy levels and velocity targets from a volume: bound by memory, and by the generator where the noise is made inside.

The peers are the public code's way (every product and sum a pass of its own, the pyramid by interpolation), careful torch (pooling, lerp,
one subtraction), and torch.compile of the first.
"""

from __future__ import annotations

import torch

import vidkern
from vidkern.ops.pyramid_flow_inputs import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import GIVEN, SHAPES, PyramidShape, careful_decompose, decompose, flattened, forward_only, peer, scaled


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """A volume, times, and noise where the shape says so."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, device=device).to(dtype)
    x = draw(shape.shape)
    t = torch.rand(shape.batch, shape.levels, generator=generator, device=device) * 0.5 + 0.25
    noise = [draw(s) for s in shape.level_shapes] if shape.noise == "given" else []
    return Problem(shape, (x, t, *noise), x)


def _spread(t, s, like):
    return t[:, s].to(like.dtype).view(-1, 1, 1, 1, 1)


def _plain(x, t, *noise, number):
    """As the public code: separate products and sums, all levels."""
    zs, vs = [], []
    for s, part in enumerate(decompose(x, number)):
        eps = noise[s] if noise else torch.randn_like(part)
        alpha = _spread(t, s, part)
        zs.append(alpha * part + (1 - alpha) * eps)
        vs.append(1.0 * part + -1.0 * eps)
    return zs, vs


def _careful(x, t, *noise, number):
    zs, vs = [], []
    for s, part in enumerate(careful_decompose(x, number)):
        eps = noise[s] if noise else torch.randn_like(part)
        zs.append(torch.lerp(eps, part, _spread(t, s, part)))
        vs.append(part - eps)
    return zs, vs


def _ours(p: Problem):
    table = vidkern.flow_coefficients(p.inputs[1], direction="data")
    number = p.shape.levels

    def run(x, t, *noise):
        return vidkern.pyramid_flow_inputs(x, table, levels=number, seed=1, noise=list(noise) or None)

    return run


def _kept(p: Problem):
    """Outputs that are kept from call to call."""
    table = vidkern.flow_coefficients(p.inputs[1], direction="data")
    out = tuple(torch.zeros(p.shape.values, dtype=p.dtype, device=p.device) for _ in range(2))

    def run(x, t, *noise):
        return vidkern.pyramid_flow_inputs(x, table, levels=p.shape.levels, seed=1, noise=list(noise) or None, out=out)

    return run


def _backend(p: Problem) -> str:
    table = vidkern.flow_coefficients(p.inputs[1], direction="data")
    return vidkern.explain(vidkern.pyramid_flow_inputs, p.inputs[0], table, levels=p.shape.levels).chosen


def reference(p: Problem, mode: str) -> Reference:
    """z + (1 - t) v is the level itself whatever the noise was, which is how candidates with noise of their own compare."""
    x, t = p.inputs[0].double(), p.inputs[1].double()
    parts = vidkern.pyramid_decompose(x, levels=p.shape.levels, impl="reference")

    def pick(result):
        tensors = flattened(result)
        zs, vs = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        found = [z.double() + (1 - t[:, s].view(-1, 1, 1, 1, 1)) * v.double() for s, (z, v) in enumerate(zip(zs, vs))]
        return torch.cat([f.flatten(1) for f in found], 1)

    return Reference([torch.cat([p.flatten(1) for p in parts], 1)], pick)


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """The volume (and the noise, if given) read, two results written."""
    flops = cost.forward_flops(s.sizes, s.levels)
    return Work(flops, cost.forward_bytes(s.sizes, s.levels, itemsize, noise=s.noise == "given"))


def _bound(function):
    return lambda p: lambda *inputs: function(*inputs, number=p.shape.levels)


SUITE = Suite(
    op="pyramid_flow_inputs",
    shapes=SHAPES | GIVEN,
    default={"cpu": ("cpu", "cpu-given", "in512", "cogvideox", "wan", "pixels", "small"), "cuda": ("cpu", "in512", "wan", "pixels32")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=2, backend=_backend, backward=forward_only),
    peers=(
        peer("vidkern, outputs kept", _kept, group="vidkern", times=2, backward=forward_only),
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
