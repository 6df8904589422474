"""The tiled feed-forward network against the two layers with the whole hidden tensor between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pruned_ffn import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pruned import BUDGET, peer


@dataclass(frozen=True)
class FFNShape:
    """``tokens`` of ``dim`` channels, ``hidden`` kept of ``dense_hidden`` hidden channels, ``tile`` at a time."""

    name: str
    tokens: int
    dim: int
    hidden: int
    dense_hidden: int
    tile: int = 768
    about: str = ""

    dense_in = property(lambda self: self.dim)
    dense_out = property(lambda self: self.dense_hidden)

    def facts(self) -> dict:
        return asdict(self)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.dim, self.hidden, self.dim


SHAPES = {
    s.name: s
    for s in (
        FFNShape("mobile", 1344, 2048, 6144, 8192),
        FFNShape("irregular", 1344, 2048, 5888, 8192, about="a block of mobile_irregular"),
        FFNShape("cpu", 512, 1024, 3072, 4096, 384, about="two CPU cores"),
        FFNShape("small", 32, 32, 64, 96, 64, about="a call this small measures overhead"),
    )
}


def scaled(shape: FFNShape, device: str) -> tuple[FFNShape, str]:
    """As many tokens as fit the device's budget; widths are never scaled."""
    budget = BUDGET.get(device)
    if budget is None or cost.forward_flops(*shape.sizes) <= budget:
        return shape, ""
    tokens = int(shape.tokens * budget / cost.forward_flops(*shape.sizes)) // 64 * 64
    return replace(shape, tokens=tokens), f"tokens cut to {budget / 1e9:.0f} GFLOP forward on {device}"


def problem(shape: FFNShape, dtype: torch.dtype, device: str) -> Problem:
    """x, both weights and biases, and the stream."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda *size, scale=1.0: (torch.randn(size, generator=generator, device=device) * scale).to(dtype)
    dim, hidden = shape.dim, shape.hidden
    inputs = (
        draw(shape.tokens, dim), draw(hidden, dim, scale=dim**-0.5), draw(hidden), draw(dim, hidden, scale=hidden**-0.5), draw(dim),
        draw(shape.tokens, dim),
    )  # fmt: skip
    return Problem(shape, inputs, draw(shape.tokens, dim))


def _plain(x, w1, b1, w2, b2, stream):
    return stream + F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _ours(p: Problem):
    return lambda x, w1, b1, w2, b2, stream: vidkern.pruned_ffn(x, w1, b1, w2, b2, tile=p.shape.tile, residual=stream)


def _whole(p: Problem):
    return lambda x, w1, b1, w2, b2, stream: vidkern.pruned_ffn(x, w1, b1, w2, b2, tile=p.shape.hidden, residual=stream)


def _backend(p: Problem) -> str:
    return vidkern.explain(_ours(p), *p.inputs).chosen


def _tiled(p: Problem):
    """The tiling in plain torch."""

    def run(x, w1, b1, w2, b2, stream):
        out = stream + b2
        for w, b, v in zip(w1.split(p.shape.tile), b1.split(p.shape.tile), w2.split(p.shape.tile, 1)):
            out = out + F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v)
        return out

    return run


def reference(p: Problem, mode: str) -> Reference:
    inputs = [t.double().requires_grad_(mode == "fwdbwd") for t in p.inputs]
    out = _plain(*inputs)
    grads = torch.autograd.grad(out, inputs, p.grad_out.double()) if mode == "fwdbwd" else ()
    return Reference([out.detach(), *grads])


def work(s: FFNShape, itemsize: int, mode: str) -> Work:
    """What is needed, so without computing tiles again: four products in the backward."""
    forward = Work(cost.forward_flops(*s.sizes), cost.forward_bytes(*s.sizes, itemsize, residual=itemsize))
    if mode == "fwd":
        return forward
    return Work(3 * forward.flops, forward.bytes + (3 * s.tokens * s.dim + 4 * s.dim * s.hidden) * itemsize)


SUITE = Suite(
    op="pruned_ffn",
    shapes=SHAPES,
    default={"cpu": ("cpu", "mobile", "small"), "cuda": ("mobile", "irregular", "small")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", backend=_backend),
    peers=(
        peer("vidkern, one tile", _whole, group="vidkern whole"),
        peer("two nn.Linear", lambda p: _plain),
        peer("torch.compile of them", lambda p: torch.compile(_plain, dynamic=False), compiles=True),
        peer("tiled in torch", _tiled),
    ),
    targets=(
        *(Target("fwd", d, "time", 1.0, ("two nn.Linear",), shapes=("cpu", "mobile")) for d in ("float32", "bfloat16")),
        *(Target(mode, d, "time", 1 / 1.2, ("two nn.Linear",), shapes=("small",)) for mode in ("fwd", "fwdbwd") for d in ("float32", "bfloat16")),
    ),
)
