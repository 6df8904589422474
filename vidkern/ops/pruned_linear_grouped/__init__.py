"""Several pruned layers of different sizes at once: one launch over a list of tiles on a GPU.

Pruned widths differ from layer to layer; where layers do not wait for each other (the query and the text keys of cross-attention, the
candidates of a search) small ones fill the gaps of large ones.
"""

from __future__ import annotations

import importlib
import math

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import cpu_why_not, triton_why_not
from ..pruned import checks, cuda, cuda_grouped, hopper, hopper_grouped
from ..pruned.compose import FLOAT, flat, vector
from ..pruned.wants import INNER, OUTER, wanted
from . import cost, reference

__all__ = ["pruned_linear_grouped"]


def _triples(sizes):
    return [tuple(sizes[i : i + 3]) for i in range(0, len(sizes), 3)]


def _split(whole, shapes) -> list[torch.Tensor]:
    """Consecutive views of a flat tensor."""
    found, at = [], 0
    for shape in shapes:
        n = math.prod(shape)
        found.append(whole[at : at + n].view(shape))
        at += n
    return found


def _results(whole, sizes):
    return _split(whole, [(m, n) for m, _, n in _triples(sizes)])


def _allocate(x, weight, bias, sizes, act, wants, impl):
    total = sum(m * n for m, _, n in _triples(sizes))
    return x[0].new_empty(total), x[0].new_empty(total if wants and act != "none" else 0)


def _allocate_backward(dout, x, weight, bias, u, sizes, act, wants, impl):
    t = _triples(sizes)
    totals = (
        sum(m * k for m, k, _ in t) if wants & INNER else 0, sum(n * k for _, k, n in t) if wants & OUTER else 0,
        sum(n for *_, n in t) if wants & OUTER and bias else 0,
    )  # fmt: skip
    wide = x[0].dtype if not any(b.dtype is FLOAT for b in bias) else FLOAT
    return tuple(x[0].new_empty(total, dtype=kind) for total, kind in zip(totals, (x[0].dtype, x[0].dtype, wide)))


def _reference(outputs, x, weight, bias, sizes, act, wants, impl):
    for i, found in enumerate(zip(*reference.forward(x, weight, bias, act))):
        if outputs[i].numel():
            for to, part in zip(_results(outputs[i], sizes), found):
                to.copy_(part)


def _reference_backward(outputs, dout, x, weight, bias, u, sizes, act, wants, impl):
    us = _results(u, sizes) if u.numel() else None
    grads = reference.backward(_results(dout, sizes), x, weight, bias, us, act)
    for to, parts in zip(_gradients(outputs, sizes), zip(*grads)):
        for target, part in zip(to or (), parts):
            target.copy_(part)


def _gradients(outputs, sizes):
    """Views of the flat gradients of x, weight and bias; None for what was not asked for."""
    t = _triples(sizes)
    shapes = ([(m, k) for m, k, _ in t], [(n, k) for _, k, n in t], [(n,) for *_, n in t])
    return [_split(whole, s) if whole.numel() else None for whole, s in zip(outputs, shapes)]


def _kit(name):
    return importlib.import_module(f"vidkern.ops.pruned.{name}")


def _cpu(outputs, x, weight, bias, sizes, act, wants, impl):
    kit, us = _kit("cpu"), _results(outputs[1], sizes) if outputs[1].numel() else None
    for i, (m, k, n) in enumerate(_triples(sizes)):
        out, b = _results(outputs[0], sizes)[i], vector(bias[i]) if bias else None
        kit.product(kit.Source(flat(x[i])), kit.Source(flat(weight[i])), out, m, n, k, bias=b, act=act, u=us and us[i])


def _triton(outputs, x, weight, bias, sizes, act, wants, impl):
    u = outputs[1] if outputs[1].numel() else None
    _kit("triton_grouped").forward([flat(t) for t in x], [flat(t) for t in weight], bias, act, outputs[0], u)


def _launched(module):
    """The forward by a module's grouped kernel."""

    def run(outputs, x, weight, bias, sizes, act, wants, impl):
        u = outputs[1] if outputs[1].numel() else None
        rows, weights = [flat(t) for t in x], [flat(t) for t in weight]
        module.forward(rows, weights, bias, act, outputs[0], u, launch=kernels.launch)

    return run


def _backward_with(name):
    """The products of the gradients, one layer after the other."""

    def run(outputs, dout, x, weight, bias, u, sizes, act, wants, impl):
        kit = _kit(name)
        dxs, dweights, dbiases = _gradients(outputs, sizes)
        douts, us = _results(dout.contiguous(), sizes), _results(u, sizes) if u.numel() else None
        for i, (m, k, n) in enumerate(_triples(sizes)):
            du, sums = douts[i], None if dbiases is None else x[i].new_zeros(n, dtype=FLOAT)
            if us is not None or sums is not None:
                du = x[i].new_empty(m, n) if us is not None else douts[i]
                kit.slope(douts[i], us and us[i], None, None, act, n, None if us is None else du, sums, None)
            if sums is not None:
                dbiases[i].copy_(sums)
            if dweights is not None:
                kit.product(kit.Source(du, across=True), kit.Source(flat(x[i]), across=True), dweights[i], n, k, m)
            if dxs is not None:
                kit.product(kit.Source(du), kit.Source(flat(weight[i]), across=True), dxs[i], m, k, n)

    return run


def _call(saved, args, grads):
    count = len(args[0])
    *tensors, u = saved
    return (grads[0], tensors[:count], tensors[count : 2 * count], tensors[2 * count :], u, *args[3:-1])


def _scatter(outputs, args, grads):
    dxs, dweights, dbiases = _gradients(outputs, args[3])
    count = len(args[0])
    none = [None] * count
    # An absent list of biases is one argument, not none.
    return (*(dxs or none), *(dweights or none), *((dbiases or none) if args[2] else (None,)))


OP = registry.Op(
    "pruned_linear_grouped",
    "(Tensor[] x, Tensor[] weight, Tensor[] bias, SymInt[] sizes, str act, int wants, str impl) -> (Tensor out, Tensor u)",
    allocate=_allocate,
    backends=(
        registry.Backend("cpu", lambda x, *rest: cpu_why_not(x[0]), _cpu, _backward_with("cpu")),
        registry.Backend(
            "hopper", lambda x, *rest: kernels.why_not_hopper(x[0]) or hopper.why_not(x[0]), _launched(hopper_grouped),
            _backward_with("hopper"), trust="require", sources=kernels.declare(hopper, hopper_grouped, cuda),
            description="CUDA kernels (TMA, wgmma) for float16 and bfloat16 on NVIDIA GPUs of compute capability 9.0 alone",
        ),
        registry.Backend(
            "cuda", lambda x, *rest: kernels.why_not(x[0]) or cuda.why_not(x[0]), _launched(cuda_grouped), _backward_with("cuda"),
            trust="require", sources=kernels.declare(cuda, cuda_grouped),
            description="CUDA kernels for float16 and bfloat16 on NVIDIA GPUs of compute capability 8.0 on",
        ),
        registry.Backend(
            "triton", lambda x, *rest: triton_why_not(x[0]), _triton, _backward_with("triton"), trust="warn",
            sources=("ops/pruned/triton.py", "ops/pruned/triton_grouped.py"),
            description="Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on",
        ),
        registry.Backend("reference", lambda *args: None, _reference, _reference_backward),
    ),
    gradient=registry.Gradient(
        schema="(Tensor dout, Tensor[] x, Tensor[] weight, Tensor[] bias, Tensor u, SymInt[] sizes, str act, int wants, str impl) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)",
        allocate=_allocate_backward,
        save=lambda args, outputs: (*args[0], *args[1], *args[2], outputs[1]),
        call=_call,
        scatter=_scatter,
        flops=lambda dout, x, weight, bias, u, sizes, act, wants, impl: cost.backward_flops(
            _triples(sizes), bool(wants & INNER), bool(wants & OUTER)
        ),
    ),
    cast=(0, 1, 2),
    flops=lambda x, weight, bias, sizes, *rest: cost.forward_flops(_triples(sizes)),
)


def pruned_linear_grouped(xs, weights, biases=None, *, act="none", impl=None):
    """``[act(x W^T + b) for x, W, b in zip(xs, weights, biases)]``, one launch on a GPU whatever the sizes.

    Args:
        xs: list of [..., tokens, in]; sizes differ freely, and one tensor may be there several times.
        weights: list of [out, in], x's dtype; biases: list of [out], x's dtype or float32, or None.
        act: "none", "gelu_tanh" or "silu", for all.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        list of [..., tokens, out] in x's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: on double backward.
    """
    for name, group in (("xs", xs), ("weights", weights), *((("biases", biases),) if biases is not None else ())):
        if not isinstance(group, (list, tuple)) or not group:
            raise TypeError(f"{name}: {type(group).__name__}, expected a non-empty list of tensors")
        if len(group) != len(xs):
            raise ValueError(f"{name}: {len(group)} of them, expected {len(xs)}, one per x")
    if act not in ("none", "gelu_tanh", "silu"):
        raise ValueError(f"act: {act!r}, expected 'none', 'gelu_tanh' or 'silu'")
    rows, sizes = [], []
    for i, (x, weight) in enumerate(zip(xs, weights)):
        bias = None if biases is None else biases[i]
        if biases is not None and bias is None:
            raise TypeError(f"layer {i}: bias: None, expected a tensor in each layer, or biases=None for none at all")
        try:
            tokens = checks.inputs(x, {"weight": weight}, {"bias": bias})
            if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
                raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [out, {x.shape[-1]}]")
            if bias is not None:
                checks.vector("bias", bias, weight.shape[0], "one value per row of the weight")
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None
        if x.dtype != xs[0].dtype or x.device != xs[0].device:
            raise ValueError(f"layer {i}: x: {x.dtype} on {x.device}, expected {xs[0].dtype} on {xs[0].device}")
        rows.append(x.reshape(-1, x.shape[-1]))
        sizes += [tokens, x.shape[-1], weight.shape[0]]
    biases = [] if biases is None else list(biases)
    grads = wanted(xs, [*weights, *biases], (), None)
    out, _ = OP(rows, list(weights), biases, sizes, act, grads, impl)
    return [part.view(*x.shape[:-1], -1) for x, part in zip(xs, _results(out, sizes))]
