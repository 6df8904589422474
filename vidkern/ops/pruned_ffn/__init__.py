"""A feed-forward network whose hidden tensor never exists as a whole: it is made, used and dropped a tile at a time.

Source: the tiled feed-forward product of the mobile video diffusion transformer (arXiv 2507.13343v2); the tiling over hidden
channels and the backward are ours.
"""

from __future__ import annotations

import importlib

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import cpu_why_not, fill, triton_why_not
from ..pruned import checks, cuda, hopper
from ..pruned.index import resolve
from ..pruned.plans import PlannedOp
from ..pruned.wants import INNER, OUTER, RESIDUAL, wanted
from . import cost, reference, tiles

__all__ = ["pruned_ffn"]


def _allocate(x, w1, b1, w2, b2, gate, mask, residual, scale, shift, keep, slab, tile, act, norm, eps, wants, impl):
    like = x if residual is None else residual
    return (torch.empty((*x.shape[:-1], w2.shape[0]), dtype=like.dtype, device=x.device),)


def _allocate_backward(dout, x, w1, b1, w2, b2, gate, mask, scale, shift, keep, slab, tile, act, norm, eps, wants, impl):
    def like(t, wanted=True):
        return x.new_empty(0) if t is None or not wanted else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    inner, outer = wants & INNER, wants & OUTER
    return (
        like(x, inner), *(like(t, outer) for t in (w1, b1, w2, b2)), like(gate), like(mask), like(scale, inner), like(shift, inner),
    )  # fmt: skip


def _reference_forward(outputs, *args):
    *tensors, slab, tile, act, norm, eps, wants, impl = args
    fill(outputs, (reference.forward(*tensors, slab=slab, tile=tile, act=act, norm=norm, eps=eps),))


def _reference_backward(outputs, *args):
    *tensors, slab, tile, act, norm, eps, wants, impl = args
    bits = {"inner": bool(wants & INNER), "outer": bool(wants & OUTER)}
    grads = reference.backward(*tensors, slab=slab, tile=tile, act=act, norm=norm, eps=eps, **bits)
    for target, grad in zip(outputs, grads, strict=True):
        if grad is not None:
            target.copy_(grad)


def _with(kit_name: str):
    """(run, run_backward) on the kernels of ops/pruned/<kit_name>.py, which is imported at the first call."""

    def kit():
        return importlib.import_module(f"vidkern.ops.pruned.{kit_name}")

    return lambda outputs, *args: tiles.forward(kit(), outputs, *args), lambda outputs, *args: tiles.backward(kit(), outputs, *args)


def _sizes(x, w2, keep, slab, act):
    hidden = w2.shape[1] if keep is None else keep.shape[0] * slab
    return x.numel() // x.shape[-1], x.shape[-1], hidden, w2.shape[0], act == "swiglu"


def _flops(x, w1, b1, w2, b2, gate, mask, residual, scale, shift, keep, slab, tile, act, *rest):
    return cost.forward_flops(*_sizes(x, w2, keep, slab, act))


def _backward_flops(dout, x, w1, b1, w2, b2, gate, mask, scale, shift, keep, slab, tile, act, norm, eps, wants, impl):
    return cost.backward_flops(*_sizes(x, w2, keep, slab, act), wants & INNER, wants & OUTER, gate is not None)


def _call(saved, args, grads):
    return (grads[0], *saved, *args[11:-1])


def _scatter(outputs, args, grads):
    # What was not asked for comes as an empty vector.
    *first, dscale, dshift = (g if g.numel() else None for g in outputs)
    return *first, grads[0] if args[16] & RESIDUAL else None, dscale, dshift


_REST = "Tensor? keep, SymInt slab, SymInt tile, str act, bool norm, float eps, int wants, str impl)"
OP = PlannedOp(
    "pruned_ffn",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? mask, Tensor? residual, Tensor? scale, "
    f"Tensor? shift, {_REST} -> Tensor",
    allocate=_allocate,
    backends=(
        registry.Backend("cpu", lambda x, *rest: cpu_why_not(x), *_with("cpu")),
        registry.Backend(
            "hopper", lambda x, *rest: kernels.why_not_hopper(x) or hopper.why_not(x, rest[6]), *_with("hopper"), trust="require",
            sources=kernels.declare(hopper, cuda),
            description="CUDA kernels (TMA, wgmma) for float16 and bfloat16 on NVIDIA GPUs of compute capability 9.0 alone",
        ),
        registry.Backend(
            "cuda", lambda x, *rest: kernels.why_not(x) or cuda.why_not(x, rest[6]), *_with("cuda"), trust="require",
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
        schema="(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? mask, Tensor? scale, "
        f"Tensor? shift, {_REST} -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgate, Tensor dmask, "
        "Tensor dscale, Tensor dshift)",
        allocate=_allocate_backward,
        save=lambda args, outputs: (*args[:7], *args[8:11]),
        call=_call,
        scatter=_scatter,
        flops=_backward_flops,
    ),
    cast=(0, 1, 2, 3, 4),
    flops=_flops,
    out=True,
    tensors=10,
    residual=7,
    sliced=(1, 2, 3, 6),
)


def pruned_ffn(
    x, w1, b1, w2, b2, *, tile=768, act="gelu_tanh", gate=None, mask=None, residual=None, norm=None, scale=None, shift=None, eps=1e-6,
    keep=None, slab=128, out=None, impl=None,
):
    """``residual + gate * ((act(P(x) W1^T + b1) * mask) W2^T + b2)`` without the hidden tensor: ``tile`` of its channels at a time.

    Partial sums are float32, whatever x is. The backward computes every tile again, and holds four of them: values, activations, and the slopes of both.
    Differentiable in every floating-point argument.

    Args:
        x: [..., tokens, channels].
        w1, b1: [hidden, channels] and [hidden] or None; twice as many rows for "swiglu", all gates before all values.
        w2, b2: [out, hidden] and [out] or None.
        tile: hidden channels that exist at a time; any number, the last tile may be shorter. 1344 tokens of 6144 bfloat16
            channels are 15.8 MiB, of 768 2 MiB.
        act, norm, scale, shift, eps, residual: as in :func:`vidkern.pruned_linear` (without ``norm`` P has no norm).
        gate: [rows, out], as in :func:`vidkern.pruned_linear`.
        mask: [slabs]: scales slabs of equally many (kept) hidden channels.
        keep: numbers of the slabs of ``slab`` hidden channels that are kept of weights that were not repacked; None: all.
        out: where the result goes, instead of new memory; may be ``residual`` itself. Inference only.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        [..., tokens, out], the residual's dtype where there is one, else x's.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: ``out`` was given while something requires grad, or on double backward.
    """
    tensors, asked = (x, w1, b1, w2, b2, gate, mask, residual, scale, shift), (keep,)
    key = OP.key(tensors, asked, (slab, tile, act, norm, eps, impl)) if out is None else None
    if key is not None and (known := OP.known(key, tensors)) is not None:
        return known
    high = {"b1": b1, "b2": b2, "gate": gate, "mask": mask, "residual": residual, "scale": scale, "shift": shift}
    checks.inputs(x, {"w1": w1, "w2": w2}, high)
    for name, w in (("w1", w1), ("w2", w2)):
        if w.dim() != 2:
            raise ValueError(f"{name}: shape {tuple(w.shape)}, expected [out, in]")
    checks.activation(act, w1.shape[0], "w1")
    pairs = 2 if act == "swiglu" else 1
    if w1.shape[1] != x.shape[-1]:
        raise ValueError(f"w1: {w1.shape[1]} input channels in shape {tuple(w1.shape)}, expected x's {x.shape[-1]}")
    if w1.shape[0] != pairs * w2.shape[1]:
        twice = ', and act "swiglu" takes two rows for each: gates, then values' if pairs == 2 else ""
        raise ValueError(f"w1: {w1.shape[0]} rows, expected {pairs * w2.shape[1]}: w2 has {w2.shape[1]} input channels{twice}")
    hidden, outputs = w2.shape[1], w2.shape[0]
    for name, b, size in (("b1", b1, w1.shape[0]), ("b2", b2, outputs)):
        if b is not None:
            checks.vector(name, b, size, f"one value per row of {name.replace('b', 'w')}")
    tile = checks.positive("tile", tile)
    if keep is not None:
        slab = checks.positive("slab", slab)
        if hidden % slab:
            raise ValueError(f"slab: {slab}, expected a divisor of w2's {hidden} input channels")
        if tile % slab:
            raise ValueError(f"tile: {tile}, expected a multiple of slab {slab} where keep is given")
        keep = resolve("keep", keep, hidden // slab, x.device)
        hidden = keep.shape[0] * slab
    else:
        slab = 1
    checks.per_group("gate", gate, x, outputs)
    checks.slab_mask("mask", mask, hidden)
    checks.per_group("scale", scale, x, x.shape[-1])
    checks.per_group("shift", shift, x, x.shape[-1])
    checks.residual(residual, x, outputs)
    norm = checks.norm_and_eps(norm, eps)
    grads = wanted((x, scale, shift), (w1, b1, w2, b2), (gate, mask), residual)
    rest = (slab, tile, act, norm, float(eps))
    if out is None:
        return OP.serve(key, tensors, asked, (keep,), (*rest, grads, impl))
    checks.tensor("out", out)
    OP.call_out((out,), *tensors, keep, *rest, 0, impl)
    return out
