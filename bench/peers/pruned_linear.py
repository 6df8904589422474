"""A pruned linear layer against the dense one, the compact nn.Linear, and the chain that one writes around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.pruned_linear import cost

from ..suite import Problem, Reference, Suite, Target, Work
from ._pruned import SHAPES, LayerShape, kept, peer, scaled


def problem(shape: LayerShape, dtype: torch.dtype, device: str) -> Problem:
    """x, weight and, where the result goes into a stream, the stream."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device=device)
    x = draw(shape.tokens, shape.width or shape.inputs).to(dtype)
    weight = (draw(shape.outputs, shape.inputs) / shape.inputs**0.5).to(dtype)
    stream = (draw(shape.tokens, shape.into).to(dtype),) if shape.stream else ()
    return Problem(shape, (x, weight, *stream), draw(shape.tokens, shape.into or shape.outputs).to(dtype))


def _indices(s: LayerShape, device):
    lists = ((s.inputs, s.width, 1), (s.outputs, s.into, 2))
    return [kept(n, size, s.runs, seed).to(device) if size else None for n, size, seed in lists]


def _ours(p: Problem):
    in_index, out_index = _indices(p.shape, p.device)

    def run(x, weight, stream=None):
        return vidkern.pruned_linear(x, weight, in_index=in_index, out_index=out_index, residual=stream)

    return run


def _backend(p: Problem) -> str:
    return vidkern.explain(_ours(p), *p.inputs).chosen


def _chain(p: Problem, linear=F.linear):
    in_index, out_index = (i if i is None else i.long() for i in _indices(p.shape, p.device))

    def run(x, weight, stream=None):
        y = linear(x if in_index is None else x.index_select(1, in_index), weight)
        return y if stream is None else stream.index_add(1, out_index, y)

    return run


def _onednn(p: Problem):
    return _chain(p, lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))


def _dense_weight(p: Problem):
    """The layer before pruning, zero where it was pruned: the same result for the full work."""
    s = p.shape
    in_index, out_index = _indices(s, p.device)
    rows = torch.arange(s.outputs, device=p.device) if out_index is None else out_index.long()
    columns = torch.arange(s.inputs, device=p.device) if in_index is None else in_index.long()
    return rows, columns


def _dense(p: Problem):
    s = p.shape
    rows, columns = _dense_weight(p)
    wide = p.inputs[1].new_zeros(s.dense_out, s.dense_in)
    wide[rows[:, None], columns] = p.inputs[1]
    widened = lambda t, size: t if t.shape[1] == size else F.pad(t, (0, size - t.shape[1]))  # noqa: E731

    class Full(torch.autograd.Function):
        """The dense product, whose weight gradient has the kept part cut out: the dense layer does all of it."""

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return F.linear(widened(x, s.dense_in), wide)[:, : s.into or s.outputs]

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            g = widened(g, s.dense_out)
            # Cutting out is the checks' wish, not the layer's: in the quickest way.
            kept = (g.t() @ widened(x, s.dense_in)).index_select(0, rows).index_select(1, columns)
            return (g @ wide)[:, : x.shape[1]], kept

    return lambda x, weight, stream=None: Full.apply(x, weight) if stream is None else Full.apply(x, weight) + stream


def _grouped(p: Problem):
    """torch._grouped_mm with one group: what a grouped launch costs a single layer."""
    offsets = torch.tensor([p.shape.tokens], dtype=torch.int32, device=p.device)
    return _chain(p, lambda x, w: torch._grouped_mm(x, w.t().unsqueeze(0), offs=offsets))


def _no_grouped(device: str) -> str | None:
    return None if hasattr(torch, "_grouped_mm") else "this torch has no _grouped_mm"


def two_of_four(p: Problem) -> torch.Tensor:
    """Weight [dense_out, dense_in] of the dense layer, two of every four inputs 0; ValueError where other inputs are kept."""
    if p.shape.runs:
        raise ValueError(f"shape {p.shape.name}: its weight is not 2:4 sparse, expected two_of_four")
    _, columns = _dense_weight(p)
    wide = p.inputs[1].new_zeros(p.shape.dense_out, p.shape.dense_in)
    wide[:, columns] = p.inputs[1]
    return wide


def _sparse(p: Problem):
    """2:4 sparsity of the dense layer, whose weight has that form where two of every four inputs are kept."""
    from torch.sparse import to_sparse_semi_structured

    sparse = to_sparse_semi_structured(two_of_four(p))
    return lambda x, weight: F.linear(x, sparse)


def reference(p: Problem, mode: str) -> Reference:
    inputs = [t.double().requires_grad_(mode == "fwdbwd") for t in p.inputs]
    out = _chain(p)(*inputs)
    grads = torch.autograd.grad(out, inputs, p.grad_out.double()) if mode == "fwdbwd" else ()
    return Reference([out.detach(), *grads])


def work(s: LayerShape, itemsize: int, mode: str) -> Work:
    """Backward: both products read the gradient, and x or the weight, and write the other's gradient."""
    sizes = (s.tokens, s.inputs, s.outputs)
    forward = Work(cost.forward_flops(*sizes), cost.forward_bytes(*sizes, itemsize, itemsize if s.stream else 0))
    if mode == "fwd":
        return forward
    both = (2 * s.tokens * (s.inputs + s.outputs) + 2 * s.inputs * s.outputs) * itemsize
    return Work(forward.flops + cost.backward_flops(*sizes), forward.bytes + both)


CHAIN, COMPILED, ONEDNN, DENSE = "index_select, linear, index_add", "torch.compile of it", "the same on oneDNN", "dense layer"
_GATHERED = ("gather", "gather_runs", "gather_95")
SUITE = Suite(
    op="pruned_linear",
    shapes=SHAPES,
    default={"cpu": ("gather", "gather_95", "qkv_irregular", "out_irregular", "small"), "cuda": tuple(SHAPES)},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=peer("vidkern", _ours, group="vidkern", backend=_backend),
    peers=(
        peer(CHAIN, _chain),
        peer(COMPILED, lambda p: torch.compile(_chain(p), dynamic=False), compiles=True),
        peer(ONEDNN, _onednn, dtypes=("float32", "bfloat16"), devices=("cpu",), backward=lambda device: False),
        peer(DENSE, _dense),
        peer("2:4 sparse", _sparse, dtypes=("bfloat16", "float16"), devices=("cuda",), backward=lambda device: False),
        peer("torch._grouped_mm", _grouped, dtypes=("bfloat16",), missing=_no_grouped),
    ),
    targets=(
        *(Target(mode, "bfloat16", "time", 1.15, (COMPILED,), shapes=_GATHERED[:2]) for mode in ("fwd", "fwdbwd")),
        Target("fwd", "float32", "time", 1.1, (ONEDNN,), shapes=_GATHERED[:2]),
        *(Target(mode, d, "time", 1.0, (DENSE,), shapes=("gather_95",)) for mode in ("fwd", "fwdbwd") for d in ("float32", "bfloat16")),
        *(Target(mode, d, "time", 1 / 1.2, (CHAIN,), shapes=("small",)) for mode in ("fwd", "fwdbwd") for d in ("float32", "bfloat16")),
    ),
)
