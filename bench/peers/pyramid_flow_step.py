"""One guided Euler step on all levels and the next model input: bound by memory.

The peers are a state in float64 with an operation for everything, as the public code has it, the same in the state's dtype, and
torch.compile of that.
"""

from __future__ import annotations

import torch

import vidkern
from vidkern.ops.pyramid_flow_step import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pyramid import SHAPES, PyramidShape, flattened, forward_only, peer, scaled

GUIDANCE, STEP = 1.5, 0.05


def problem(shape: PyramidShape, dtype: torch.dtype, device: str) -> Problem:
    """State in float32; velocities and the next input in ``dtype``."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, device=device)
    z = [draw(s) for s in shape.level_shapes]
    velocities = [draw(s).to(dtype) for _ in range(2) for s in shape.level_shapes]
    return Problem(shape, (*z, *velocities), velocities[0])


def _thirds(tensors):
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _public(*tensors):
    """The state in float64, conditional and unconditional halves in one batch."""
    state, given = [], []
    for z, c, u in zip(*_thirds(tensors)):
        both = torch.cat((c, u)).double()
        cond, uncond = both.chunk(2)
        new = z.double() + STEP * (uncond + GUIDANCE * (cond - uncond))
        state.append(new)
        given.append(new.to(c.dtype))
    return state, given


def _plain(*tensors):
    state, given = [], []
    for z, c, u in zip(*_thirds(tensors)):
        new = z + STEP * (u + GUIDANCE * (c - u))
        state.append(new)
        given.append(new.to(c.dtype))
    return state, given


def _numbers(p: Problem):
    """The step as plain numbers, which is what the peers have."""
    return {"dt": STEP, "guidance": GUIDANCE, "dtype": p.dtype}


def _ours(p: Problem):
    table = _numbers(p)

    def run(*tensors):
        z, c, u = _thirds(tensors)
        return vidkern.pyramid_flow_step(list(z), list(c), list(u), **table)

    return run


def _kept(p: Problem):
    table = _numbers(p)
    out = torch.zeros(p.shape.values, device=p.device), torch.zeros(p.shape.values, dtype=p.dtype, device=p.device)

    def run(*tensors):
        z, c, u = _thirds(tensors)
        return vidkern.pyramid_flow_step(list(z), list(c), list(u), out=out, **table)

    return run


def _backend(p: Problem) -> str:
    z, c, u = _thirds(p.inputs)
    return vidkern.explain(vidkern.pyramid_flow_step, list(z), list(c), list(u), **_numbers(p)).chosen


def _flat(result):
    return torch.cat([t.double().flatten() for t in flattened(result)])


def reference(p: Problem, mode: str) -> Reference:
    """Float64."""
    return Reference([_flat(_plain(*(t.double() for t in p.inputs)))], _flat)


def work(s: PyramidShape, itemsize: int, mode: str) -> Work:
    """State and velocities read, state and next input written."""
    return Work(cost.forward_flops(s.sizes, s.levels, True), cost.forward_bytes(s.sizes, s.levels, 4, model_itemsize=itemsize))


SUITE = Suite(
    op="pyramid_flow_step",
    shapes=SHAPES,
    default={"cpu": ("cpu", "in512", "flux", "pixels", "small"), "cuda": ("cpu", "in512", "flux", "pixels")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", times=3, backend=_backend, backward=forward_only),
    peers=(
        peer("vidkern, outputs kept", _kept, group="vidkern", times=3, backward=forward_only),
        peer("as the public code", lambda p: _public, times=12, backward=forward_only),
        peer("plain torch", lambda p: _plain, times=6, backward=forward_only),
        peer("torch.compile", lambda p: torch.compile(_plain, dynamic=False), compiles=True, backward=forward_only),
    ),
    targets=tuple(Target("fwd", d, "time", 1 / 1.2, ("plain torch",), shapes=("small",)) for d in ("float32", "bfloat16")),
)
