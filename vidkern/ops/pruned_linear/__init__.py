"""A linear layer of which channels were pruned: kept inputs are gathered, kept outputs written back or added to a stream.

Source: the pruned, four-step mobile video diffusion transformer (arXiv 2507.13343) prunes blocks, heads and FFN channels; what
such layers ask of a matrix product (packed chains, subsets of a shared stream, un-repacked weights) is written out in
docs/pruned.md.
"""

from __future__ import annotations

import importlib

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import cpu_why_not, fill, triton_why_not
from ..pruned import checks, compose, cuda, hopper
from ..pruned.activations import width
from ..pruned.index import ChannelIndex, resolve
from ..pruned.plans import PlannedOp
from ..pruned.wants import INNER, OTHERS, OUTER, RESIDUAL, wanted
from . import cost, reference

__all__ = ["ChannelIndex", "pruned_linear"]


def _rows(weight, rows, slab):
    return weight.shape[0] if rows is None else rows.shape[0] * slab


def _columns(weight, columns, slab):
    return weight.shape[1] if columns is None else columns.shape[0] * slab


def _allocate(
    x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, slab, act, norm, eps, out_features, wants, impl
):
    like = x if residual is None else residual
    out = torch.empty((*x.shape[:-1], out_features), dtype=like.dtype, device=x.device)
    kept = wants & (INNER | OUTER | OTHERS) and reference.needs_u(act, gate, mask)
    return out, x.new_empty((*x.shape[:-1], _rows(weight, rows, slab)) if kept else (0,))


def _allocate_backward(
    dout, x, weight, bias, gate, mask, scale, shift, in_index, out_index, rows, columns, u, slab, act, norm, eps, wants, impl
):
    def like(t, wanted=True):
        return x.new_empty(0) if t is None or not wanted else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    inner, outer = wants & INNER, wants & OUTER
    return like(x, inner), like(weight, outer), like(bias, outer), like(gate), like(mask), like(scale, inner), like(shift, inner)


def _reference_forward(
    outputs, x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, slab, act, norm, eps, out_features,
    wants, impl,
):
    results = reference.forward(
        x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, slab=slab, act=act, norm=norm, eps=eps,
        out_features=out_features,
    )
    fill(outputs if outputs[1].dim() > 1 else outputs[:1], results if outputs[1].dim() > 1 else results[:1])


def _reference_backward(outputs, *args):
    *tensors, slab, act, norm, eps, wants, impl = args
    grads = reference.backward(
        *tensors, slab=slab, act=act, norm=norm, eps=eps, inner=bool(wants & INNER), outer=bool(wants & OUTER)
    )
    for target, grad in zip(outputs, grads, strict=True):
        if grad is not None:
            target.copy_(grad)


def _with(kit_name: str):
    """(run, run_backward) on the kernels of ops/pruned/<kit_name>.py, which is imported at the first call."""

    def kit():
        return importlib.import_module(f"vidkern.ops.pruned.{kit_name}")

    def run(outputs, *args):
        *tensors, slab, act, norm, eps, out_features, wants, impl = args
        compose.linear(kit(), *tensors, slab=slab, act=act, norm=norm, eps=eps, out=outputs[0], u=outputs[1])

    def run_backward(outputs, *args):
        *tensors, slab, act, norm, eps, wants, impl = args
        needs_u = reference.needs_u(act, tensors[4], tensors[5])
        options = dict(slab=slab, act=act, norm=norm, eps=eps, wants=wants, needs_u=needs_u)
        compose.linear_backward(kit(), *tensors, **options, grads=outputs)

    return run, run_backward


def _flops(
    x, weight, bias, gate, mask, residual, scale, shift, in_index, out_index, rows, columns, slab, *rest
):
    return cost.forward_flops(x.numel() // x.shape[-1], _columns(weight, columns, slab), _rows(weight, rows, slab))


def _backward_flops(
    dout, x, weight, bias, gate, mask, scale, shift, in_index, out_index, rows, columns, u, slab, act, norm, eps, wants, impl
):
    again = u is None and reference.needs_u(act, gate, mask)
    sizes = x.numel() // x.shape[-1], _columns(weight, columns, slab), _rows(weight, rows, slab)
    return cost.backward_flops(*sizes, bool(wants & INNER), bool(wants & OUTER), again)


def _call(saved, args, grads):
    *tensors, u = saved
    return (grads[0], *tensors, u if u.dim() > 1 else None, *args[12:16], args[17])


def _scatter(outputs, args, grads):
    # What was not asked for comes as an empty vector.
    dx, dweight, dbias, dgate, dmask, dscale, dshift = (g if g.numel() else None for g in outputs)
    return dx, dweight, dbias, dgate, dmask, grads[0] if args[17] & RESIDUAL else None, dscale, dshift


OP = PlannedOp(
    "pruned_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? mask, Tensor? residual, Tensor? scale, Tensor? shift, "
    "Tensor? in_index, Tensor? out_index, Tensor? rows, Tensor? columns, SymInt slab, str act, bool norm, float eps, "
    "SymInt out_features, int wants, str impl) -> (Tensor out, Tensor u)",
    allocate=_allocate,
    backends=(
        registry.Backend("cpu", lambda x, *rest: cpu_why_not(x), *_with("cpu")),
        registry.Backend(
            "hopper", lambda x, *rest: kernels.why_not_hopper(x) or hopper.why_not(x, rest[4]), *_with("hopper"), trust="require",
            sources=kernels.declare(hopper, cuda),
            description="CUDA kernels (TMA, wgmma) for float16 and bfloat16 on NVIDIA GPUs of compute capability 9.0 alone",
        ),
        registry.Backend(
            "cuda", lambda x, *rest: kernels.why_not(x) or cuda.why_not(x, rest[4]), *_with("cuda"), trust="require",
            sources=kernels.declare(cuda),
            description="CUDA kernels for float16 and bfloat16 on NVIDIA GPUs of compute capability 8.0 on",
        ),
        registry.Backend(
            "triton", lambda x, *rest: triton_why_not(x), *_with("triton"), trust="warn", sources=("ops/pruned/triton.py",),
            description="Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on",
        ),
        registry.Backend("reference", lambda *args: None, _reference_forward, _reference_backward),
    ),
    gradient=registry.Gradient(
        schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? mask, Tensor? scale, Tensor? shift, "
        "Tensor? in_index, Tensor? out_index, Tensor? rows, Tensor? columns, Tensor? u, SymInt slab, str act, bool norm, float eps, "
        "int wants, str impl) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dgate, Tensor dmask, Tensor dscale, Tensor dshift)",
        allocate=_allocate_backward,
        save=lambda args, outputs: (*args[:5], *args[6:12], outputs[1]),
        call=_call,
        scatter=_scatter,
        flops=_backward_flops,
    ),
    cast=(0, 1, 2),
    flops=_flops,
    out=True,
    tensors=8,
    residual=5,
    sliced=(),
)


def pruned_linear(
    x, weight, bias=None, *, in_index=None, out_index=None, act="none", gate=None, mask=None, residual=None, out_features=None, norm=None,
    scale=None, shift=None, eps=1e-6, rows=None, columns=None, slab=64, out=None, impl=None,
):
    """A linear layer on some of the channels of its input, written into or added to some of the channels of its output:

    ``U = P(x)[..., in_index] W^T + b``, ``Z = gate * mask * act(U)``, and then ``Z`` itself, or zeros with ``Z`` at ``out_index``, or
    ``residual`` with ``Z`` added (at ``out_index``). ``P`` is, for ``norm="rms"``, RMSNorm over **all** channels of x, kept or not, without
    weights, and then ``* (1 + scale) + shift`` where these are given; with neither ``P(x)`` is x. Sums are float32, with one rounding
    at the end; the residual is added before it. Nothing of x's width is gathered in memory on the way. Differentiable in every
    floating-point argument; the gradient of x is non-zero outside ``in_index`` where there is a norm.

    Args:
        x: [..., tokens, channels], at least two dimensions; float64 on the reference, float32, bfloat16, float16.
        weight: [out, in] as in nn.Linear, x's dtype, any row stride; its rows and columns are the *kept* channels.
        bias: [out] or None; x's dtype or float32, like ``gate``, ``mask``, ``scale`` and ``shift``.
        in_index: which channels of x the columns of ``weight`` are for: a :class:`ChannelIndex`, a sorted list, or a 1-D integer
            tensor, whose values are checked at the first call with it (which waits for a GPU). None: all of them.
        out_index: which channels of the result the layer writes; likewise.
        act: "none", "gelu_tanh", "silu", or "swiglu": silu(first half of U) * second half, half as many channels.
        gate: [rows, written channels]: one row for all tokens, or for each of equally long runs of tokens (adaLN: one per sample).
        mask: [slabs]: scales slabs of equally many written channels; for pruning, its gradient says what a slab contributes.
        residual: [..., tokens, C], x's dtype or float32: the stream that is added to.
        out_features: channels of the result where ``out_index`` is given without ``residual``; elsewhere what they have to be.
        norm: None (no norm, whether or not ``scale`` and ``shift`` are given) or "rms"; eps: inside its square root.
        scale, shift: [rows, channels of x], rows as in ``gate``; of the norm's result, or of x itself without a norm.
        rows, columns: numbers of the slabs of ``slab`` channels that are kept of a ``weight`` (and ``bias``) that was not repacked;
            None: all. Their gradients are full size, zero elsewhere.
        out: where the result goes, instead of new memory; may be ``residual`` itself. Inference only.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        [..., tokens, C], the residual's dtype where there is one, else x's: C is the residual's, ``out_features``, or the number of
        written channels.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: ``out`` was given while something requires grad, or on double backward.
    """
    tensors, asked = (x, weight, bias, gate, mask, residual, scale, shift), (in_index, out_index, rows, columns)
    key = OP.key(tensors, asked, (slab, act, norm, eps, out_features, impl)) if out is None else None
    if key is not None and (known := OP.known(key, tensors)) is not None:
        return known
    checks.inputs(x, {"weight": weight}, {"bias": bias, "gate": gate, "mask": mask, "residual": residual, "scale": scale, "shift": shift})
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [out, in]")
    device = x.device
    channels = x.shape[-1]
    if rows is not None or columns is not None:
        slab = checks.positive("slab", slab)
        for name, size in (("rows", weight.shape[0]), ("columns", weight.shape[1])):
            if (rows if name == "rows" else columns) is not None and size % slab:
                raise ValueError(f"slab: {slab}, expected a divisor of the weight's {size} {name}")
        rows = resolve("rows", rows, weight.shape[0] // slab, device)
        columns = resolve("columns", columns, weight.shape[1] // slab, device)
    else:
        slab = 1
    in_index = resolve("in_index", in_index, channels, device)
    n, k = _rows(weight, rows, slab), _columns(weight, columns, slab)
    kept = channels if in_index is None else in_index.shape[0]
    if k != kept:
        what = f"x's {channels} channels" if in_index is None else f"the {kept} channels of in_index"
        raise ValueError(f"weight: {k} input channels in shape {tuple(weight.shape)}, expected {what}")
    checks.activation(act, n)
    written = width(act, n)
    if bias is not None:
        checks.vector("bias", bias, weight.shape[0], "one value per row of the weight")
    checks.per_group("gate", gate, x, written)
    checks.slab_mask("mask", mask, written)
    checks.per_group("scale", scale, x, channels)
    checks.per_group("shift", shift, x, channels)
    if out_features is not None:
        checks.positive("out_features", out_features)
    checks.residual(residual, x, written if out_index is None else out_features)
    features = written
    if residual is not None:
        features = residual.shape[-1]
    elif out_index is not None:
        if out_features is None:
            raise ValueError("out_features: None, expected the result's number of channels: out_index is given without residual")
        features = out_features
    if out_features is not None and out_features != features:
        raise ValueError(f"out_features: {out_features}, expected {features}")
    out_index = resolve("out_index", out_index, features, device)
    if out_index is not None and out_index.shape[0] != written:
        raise ValueError(f"out_index: {out_index.shape[0]} channels, expected {written}, one per channel that the layer writes")
    norm = checks.norm_and_eps(norm, eps)
    grads = wanted((x, scale, shift), (weight, bias), (gate, mask), residual)
    lists, rest = (in_index, out_index, rows, columns), (slab, act, norm, float(eps), features)
    if out is None:
        return OP.serve(key, tensors, asked, lists, (*rest, grads, impl))
    checks.tensor("out", out)
    OP.call_out((out, x.new_empty(0)), *tensors, *lists, *rest, 0, impl)
    return out
