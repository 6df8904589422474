"""Merge attention over disjoint key sets: partial outputs and their log-sum-exps become the whole.

Source: the log-sum-exp merge of blockwise and ring attention (arXiv 2310.01889); signed parts give the
inclusion-exclusion form of grid attention.
"""

from __future__ import annotations

import torch

from ... import registry
from ..launch import cpu_why_not, fill, triton_why_not, unit_stride
from . import cost, reference

__all__ = ["merge_attention"]

_CPU_PARTS = 64
_TRITON_PARTS, _TRITON_DIM = 8, 1024


def _allocate(outs, lses, signs, token_major, impl):
    batch, heads, length, dim = outs[0].shape
    if token_major:
        out = outs[0].new_empty((batch, length, heads, dim)).transpose(1, 2)
    else:
        out = torch.empty_like(outs[0], memory_format=torch.contiguous_format)
    return out, torch.empty_like(lses[0], memory_format=torch.contiguous_format)


def _allocate_backward(dout, dlse, outs, lses, signs, token_major, impl):
    n, (batch, heads, length, dim) = len(outs), outs[0].shape
    shape = (n, batch, length, heads, dim) if token_major else (n, batch, heads, length, dim)
    douts = outs[0].new_empty(shape)
    return (douts.transpose(2, 3) if token_major else douts), lses[0].new_empty((n, batch, heads, length))


def _run_with(launch):
    def run(outputs, outs, lses, signs, token_major, impl):
        out, lse = outputs
        launch([unit_stride(o) for o in outs], list(lses), signs=tuple(signs), out=out, lse=lse)

    return run


def _run_backward_with(launch):
    def run(outputs, dout, dlse, outs, lses, signs, token_major, impl):
        douts, dlses = (list(g.unbind(0)) for g in outputs)
        launch(unit_stride(dout), dlse, [unit_stride(o) for o in outs], list(lses), signs=tuple(signs), douts=douts,
               dlses=dlses)

    return run


def _cpu_forward(*args, **kwargs):
    from . import cpu

    cpu.forward(*args, **kwargs)


def _cpu_backward(*args, **kwargs):
    from . import cpu

    cpu.backward(*args, **kwargs)


def _cpu_why_not(outs, *rest) -> str | None:
    if len(outs) > _CPU_PARTS or outs[0].shape[3] % 8:
        return f"{len(outs)} parts of head_dim {outs[0].shape[3]}, it serves up to {_CPU_PARTS} and a multiple of 8"
    return cpu_why_not(outs[0])


def _triton_forward(*args, **kwargs):
    from . import triton

    triton.forward(*args, **kwargs)


def _triton_backward(*args, **kwargs):
    from . import triton

    triton.backward(*args, **kwargs)


def _triton_why_not(outs, *rest) -> str | None:
    if len(outs) > _TRITON_PARTS or outs[0].shape[3] > _TRITON_DIM:
        return f"{len(outs)} parts of head_dim {outs[0].shape[3]}, it serves up to {_TRITON_PARTS} parts and {_TRITON_DIM} dims"
    return triton_why_not(outs[0])


def _reference_forward(*args, out, lse, **kwargs):
    fill((out, lse), reference.forward(*args, **kwargs))


def _reference_backward(*args, douts, dlses, **kwargs):
    grads = reference.backward(*args, **kwargs)
    fill((*douts, *dlses), (*grads[0], *grads[1]))


def _flops(outs, lses, signs, token_major, impl):
    return cost.forward_flops(len(outs), *outs[0].shape)


def _backward_flops(dout, dlse, outs, *rest):
    return cost.backward_flops(len(outs), *outs[0].shape)


def _placements(tensors, returns):
    """Replicate, or shard any axis of [B, H, L]: rows are independent. ``returns`` holds each result's leading axes."""
    from torch.distributed.tensor import Replicate, Shard

    present = [t for t in tensors if t is not None]
    rules = [([Replicate()] * len(returns), [None if t is None else Replicate() for t in tensors])]
    for axis in registry.evenly_sharded(present, (0, 1, 2)):
        rules.append(([Shard(axis + lead) for lead in returns], [None if t is None else Shard(axis) for t in tensors]))
    return rules


def _shard(outs, lses, signs, token_major, impl):
    return _placements([*outs, *lses], (0, 0))


def _backward_shard(dout, dlse, outs, lses, signs, token_major, impl):
    return _placements([dout, dlse, *outs, *lses], (1, 1))


OP = registry.Op(
    "merge_attention",
    "(Tensor[] outs, Tensor[] lses, int[] signs, bool token_major, str impl) -> (Tensor out, Tensor lse)",
    allocate=_allocate,
    backends=(
        registry.Backend("cpu", _cpu_why_not, _run_with(_cpu_forward), _run_backward_with(_cpu_backward)),
        registry.Backend(
            "triton", _triton_why_not, _run_with(_triton_forward), _run_backward_with(_triton_backward),
            description="Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on",
            trust="warn", sources=("ops/merge_attention/triton.py",),
        ),
        registry.Backend(
            "reference", lambda *args: None, _run_with(_reference_forward), _run_backward_with(_reference_backward)
        ),
    ),
    gradient=registry.Gradient(
        # Stacked gradients: one allocation, and a schema without a list of results, which the fake would have to size.
        schema="(Tensor? dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, int[] signs, bool token_major, str impl) "
        "-> (Tensor douts, Tensor dlses)",
        allocate=_allocate_backward,
        save=lambda args, outputs: (*args[0], *args[1]),
        call=lambda saved, args, grads: (*grads, *_split(saved, args), *args[2:-1]),
        scatter=lambda outputs, args, grads: (*outputs[0].unbind(0), *outputs[1].unbind(0)),
        flops=_backward_flops,
        shard=_backward_shard,
    ),
    flops=_flops,
    shard=_shard,
    out=True,
)


def _split(saved, args):
    n = len(args[0])
    return list(saved[:n]), list(saved[n:])


def _check(outs, lses, layout) -> None:
    if layout not in ("bhld", "blhd"):
        raise ValueError(f'layout: {layout!r}, expected "bhld" or "blhd"')
    rank4 = "4 dimensions " + ("[B, H, L, D]" if layout == "bhld" else "[B, L, H, D]")
    for name, parts, dims, wanted in (("outs", outs, 4, rank4), ("lses", lses, 3, "3 dimensions [B, H, L]")):
        if not isinstance(parts, (list, tuple)) or not parts:
            what = "empty" if isinstance(parts, (list, tuple)) else type(parts).__name__
            raise TypeError(f"{name}: {what}, expected a non-empty list of tensors")
        for i, t in enumerate(parts):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name}[{i}]: {type(t).__name__}, expected a torch.Tensor")
            if t.dim() != dims:
                raise ValueError(f"{name}[{i}]: shape {tuple(t.shape)}, expected {wanted}")
            if t.numel() == 0:
                raise ValueError(f"{name}[{i}]: shape {tuple(t.shape)}, expected no empty dimension")
            for what in ("shape", "dtype", "device"):
                if getattr(t, what) != getattr(parts[0], what):
                    raise ValueError(f"{name}[{i}]: {what} {getattr(t, what)}, expected {getattr(parts[0], what)}")
    if len(lses) != len(outs):
        raise ValueError(f"lses: {len(lses)} of them, expected {len(outs)}, one per output")
    out, lse = outs[0], lses[0]
    if not out.is_floating_point():
        raise ValueError(f"outs[0]: dtype {out.dtype}, expected a floating-point dtype")
    wanted = torch.float64 if out.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise ValueError(f"lses[0]: dtype {lse.dtype}, expected {wanted}")
    if lse.device != out.device:
        raise ValueError(f"lses[0]: on device {lse.device}, expected {out.device}")
    rows = out.shape[:3] if layout == "bhld" else (out.shape[0], out.shape[2], out.shape[1])
    if tuple(lse.shape) != tuple(rows):
        raise ValueError(f"lses[0]: shape {tuple(lse.shape)}, expected [B, H, L] = {tuple(rows)}")


def merge_attention(outs, lses, *, signs=None, layout="bhld", return_lse=True, out=None, impl=None):
    """Merge partial attention results over disjoint key sets into attention over their union.

    ``O = sum_i s_i w_i O_i / Z`` with ``w_i = exp(lse_i - max)``, ``Z = sum_i s_i w_i``, ``lse = max + log Z``, in fp32.
    Differentiable in every out and lse. Uses: ring and two-phase context parallelism, parts of :func:`grid_attention`
    (``include=``), and with signs the inclusion-exclusion of overlapping dense attentions.

    Args:
        outs: partial outputs, each [B, H, L, D] or, for ``layout="blhd"``, [B, L, H, D]; one dtype and shape.
        lses: their natural-log log-sum-exps, each [B, H, L], float32 (float64 for float64 outs). A part that saw nothing
            has lse = -inf; its output is not read.
        signs: +1 or -1 per part, default all +1. Where signed weights cancel to nothing the row is empty.
        layout: ``"bhld"`` or ``"blhd"``.
        return_lse: also return the merged lse.
        out: a tensor shaped and typed like the outs to write into (inference only); with it, keeping one output
            across calls avoids the page faults of fresh memory. Under ``torch.compile`` only with layout "bhld": the
            compiler takes contiguous ``out`` tensors alone.
        impl: backend by name; None follows :func:`vidkern.use`.

    Returns:
        out like each of ``outs``, and with ``return_lse`` the merged lse [B, H, L]. Empty rows: out 0, lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: ``out`` was given while something requires grad, or on double backward.
    """
    _check(outs, lses, layout)
    if not isinstance(return_lse, bool):
        raise ValueError(f"return_lse: {return_lse!r}, expected True or False")
    signs = [1] * len(outs) if signs is None else list(signs)
    if len(signs) != len(outs) or any(s not in (1, -1) for s in signs):
        raise ValueError(f"signs: {signs!r}, expected {len(outs)} values +1 or -1")
    token_major = layout == "blhd"
    if token_major:
        outs = [o.transpose(1, 2) for o in outs]
    args = (list(outs), list(lses), signs, token_major, impl)
    if out is not None:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out: {type(out).__name__}, expected a torch.Tensor")
        lse = torch.empty(lses[0].shape, dtype=lses[0].dtype, device=lses[0].device)
        OP.call_out((out.transpose(1, 2) if token_major else out, lse), *args)
        merged = out
    else:
        merged, lse = OP(*args)
        merged = merged.transpose(1, 2) if token_major else merged
    return (merged, lse) if return_lse else merged
