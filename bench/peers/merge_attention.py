"""Merging partial attention outputs by their log-sum-exps: bound by memory, so bytes set the limit.

The peers are the two ways found in ring-attention code: all parts at once in plain torch, and two at a time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from vidkern.ops.merge_attention import cost

from ..suite import Peer, Problem, Reference, Suite, Target, Work


@dataclass(frozen=True)
class MergeShape:
    """``parts`` partial outputs [batch, heads, length, head_dim] with their lses."""

    name: str
    parts: int
    heads: int
    length: int
    head_dim: int
    batch: int = 1

    def facts(self) -> dict:
        return asdict(self)

    def sizes(self) -> tuple[int, ...]:
        return self.parts, self.batch, self.heads, self.length, self.head_dim


SHAPES = {
    s.name: s
    for s in (
        MergeShape("C", 3, 32, 73_728, 128),
        MergeShape("cpu", 3, 8, 8192, 64),
        MergeShape("small", 3, 2, 64, 32),
    )
}
LARGEST = {"cpu": 1 << 24}  # elements of one part


def scaled(shape: MergeShape, device: str) -> tuple[MergeShape, str]:
    largest = LARGEST.get(device)
    row = shape.head_dim * shape.heads * shape.batch
    if largest is None or row * shape.length <= largest:
        return shape, ""
    small = {**asdict(shape), "length": largest // row}
    return MergeShape(**small), f"length cut to {largest:,} elements a part on {device}"


def problem(shape: MergeShape, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device=device).manual_seed(0)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)

    def draw(size):
        return torch.randn(size, generator=generator, device=device)

    outs = tuple(draw(size).to(dtype) for _ in range(shape.parts))
    lses = tuple(draw(size[:3]) for _ in range(shape.parts))
    return Problem(shape, (*outs, *lses), draw(size).to(dtype))


def _halves(tensors):
    n = len(tensors) // 2
    return tensors[:n], tensors[n:]


def _plain(*tensors):
    outs, lses = _halves(tensors)
    weights = torch.softmax(torch.stack(lses), dim=0).unsqueeze(-1)
    return (weights * torch.stack(outs)).sum(0).to(outs[0].dtype)


def _pairwise(*tensors):
    outs, lses = _halves(tensors)
    out, lse = outs[0].float(), lses[0]
    for o, s in zip(outs[1:], lses[1:]):
        out = torch.lerp(out, o.float(), torch.sigmoid(s - lse).unsqueeze(-1))
        lse = torch.logaddexp(lse, s)
    return out.to(outs[0].dtype)


def _vidkern(p: Problem):
    import vidkern

    def run(*tensors):
        outs, lses = _halves(tensors)
        return vidkern.merge_attention(outs, lses, return_lse=False)

    return run


def _backend(p: Problem) -> str:
    import vidkern

    return vidkern.explain(vidkern.merge_attention, *_halves(p.inputs)).chosen


def reference(p: Problem, mode: str) -> Reference:
    inputs = [x.double().requires_grad_(mode == "fwdbwd") for x in p.inputs]
    out = _plain(*inputs)
    grads = torch.autograd.grad(out, inputs, p.grad_out.double()) if mode == "fwdbwd" else ()
    return Reference([out.detach(), *grads])


def work(s: MergeShape, itemsize: int, mode: str) -> Work:
    """Backward: each part, its lse, the output, its gradient and lse read; a gradient per part and lse written."""
    forward = Work(cost.forward_flops(*s.sizes()), cost.forward_bytes(*s.sizes(), itemsize))
    if mode == "fwd":
        return forward
    rows = s.batch * s.heads * s.length
    both = (2 * s.parts + 2) * rows * s.head_dim * itemsize + (2 * s.parts + 1) * rows * 4
    return Work(forward.flops + cost.backward_flops(*s.sizes()), forward.bytes + both)


def _parts_memory(s: MergeShape, itemsize: int, mode: str) -> int:
    return (3 * s.parts if mode == "fwd" else 8 * s.parts) * s.batch * s.heads * s.length * s.head_dim * 4


PLAIN = Peer("plain torch", lambda p: _plain, memory=_parts_memory)
SUITE = Suite(
    op="merge_attention",
    shapes=SHAPES,
    default={"cpu": ("cpu", "small"), "cuda": ("C",)},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=Peer("vidkern", _vidkern, group="vidkern", memory=_parts_memory, backend=_backend),
    peers=(
        PLAIN,
        Peer("two at a time", lambda p: _pairwise, memory=_parts_memory),
        Peer("torch.compile", lambda p: torch.compile(_plain, dynamic=False), memory=_parts_memory, compiles=True),
    ),
    targets=tuple(
        Target(mode, dtype, "time", 1 / 1.2, (PLAIN.name,), shapes=("small",))
        for dtype in ("float32", "bfloat16")
        for mode in ("fwd", "fwdbwd")
    ),
)
