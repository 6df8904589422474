"""What a check needs to know about an op: samples, how to call it, and the yardstick of its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..ops.grid_attention import cost as attention_cost
from ..ops.grid_attention import reference as attention_reference
from ..ops.merge_attention import cost as merge_cost
from . import amf_rooms, probes, pruned_rooms, pyramid_rooms


@dataclass(frozen=True)
class Room:
    """One op.

    Args:
        samples: named inputs, smaller than a second's work on a CPU.
        large: more of them, for accelerators, with sizes of real models.
        inputs: ``inputs(sample, dtype, seed, device)`` -> flat differentiable tensors.
        call: ``call(sample, tensors, **more)`` -> tuple of outputs, on the tensors' device.
        yardstick: ``yardstick(sample, tensors)`` -> the same outputs by the best-practice torch form in the same dtype.
        names, outputs: what the inputs and the outputs are called.
        reproducible: what to pass to ``call`` to be promised the same bits from run to run.
        differentiable: False for an op without backward: only its outputs are compared.
        probes: name -> ``probe(dtype, backend, device)`` that raises :class:`CheckFailed`; expectations in closed form.
    """

    samples: tuple
    inputs: Callable
    call: Callable
    yardstick: Callable
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    large: tuple = ()
    reproducible: Mapping = field(default_factory=dict)
    differentiable: bool = True
    probes: Mapping[str, Callable] = field(default_factory=dict)


# ---- grid attention -------------------------------------------------------------------------------------------------
def attention_inputs(sample, dtype, seed, device="cpu"):
    return sample.tensors(dtype, device, seed)


def attention_call(sample, tensors, **more):
    return sample.call(*tensors, device=tensors[0].device, return_lse=True, **more)


def _rows_and_keys(sample, options, device):
    """Per batch sample and query frame (text last): row indices and visible key indices."""
    frames, n = sample.frames, sample.frame_len
    front = sample.text_position == "front"
    keys, rows = attention_reference.liveness(
        options.get("valid"), options.get("kv_len"), options.get("text_len"), n_frames=frames.n_frames, frame_len=n,
        n_text=sample.n_text, text_front=front, device=device,
    )
    n_text = sample.n_text if frames.text_visible else 0
    groups = list(attention_reference._groups(frames, n, sample.n_text, front, device))
    if sample.n_text and not n_text:
        text = groups.pop()[0]
        groups = [(i, j[sample.n_text:]) for i, j in groups] + [(text, text[:0])]
    for b in range(sample.batch):
        alive, seen = keys[b % keys.shape[0]], rows[b % rows.shape[0]]
        for i, j in groups:
            yield b, i[seen[i]], j[alive[j]]


def attention_yardstick(sample, tensors):
    """SDPA per frame over the gathered visible keys; the lse in the inputs' dtype by matmul and logsumexp."""
    q, k, v = (t.transpose(1, 2) if sample.layout == "blhd" else t for t in tensors)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    for b, i, j in _rows_and_keys(sample, sample.options(q.device), q.device):
        if len(i) and len(j):
            out[b, :, i] = F.scaled_dot_product_attention(q[b : b + 1, :, i], k[b : b + 1, :, j], v[b : b + 1, :, j])[0]
            logits = q[b, :, i] @ k[b, :, j].transpose(-1, -2) / sample.dim**0.5
            lse[b, :, i] = logits.float().logsumexp(-1)
    return (out.transpose(1, 2) if sample.layout == "blhd" else out), lse


_Attention = attention_cost.Sample
# Frame lengths of real models at head counts that leave room for the float64 gradients.
ATTENTION_LARGE = (
    _Attention("frames_144", 1, 2, 2, 128, (8, 8), 144),
    _Attention("frames_576", 1, 1, 1, 128, (4, 4), 576),
    _Attention("frames_1350", 1, 2, 1, 64, (2, 3), 1350, n_text=226),
    _Attention("frames_1560_causal", 1, 1, 1, 128, (2, 4), 1560, layout="blhd", rules={"causal_time": True}),
    _Attention("frames_799_masked", 2, 2, 2, 64, (3, 3), 799, with_valid=True, with_kv_len=True),
)
# Samples of the counting probe: no masks and no text, frames no more than head_dim.
ATTENTION_COUNTS = (
    _Attention("count", 1, 2, 1, 32, (3, 4), 9),
    _Attention("count_windows", 1, 1, 1, 32, (4, 6), 17, rules={"window_time": (2, 1), "window_view": 1}),
    _Attention("count_odd", 1, 2, 2, 64, (2, 5), 113),
)
ATTENTION_LARGE_COUNTS = (
    _Attention("count_144", 1, 2, 2, 64, (8, 8), 144),
    _Attention("count_576", 1, 1, 1, 128, (8, 16), 576),
    _Attention("count_1350", 1, 2, 1, 64, (3, 13), 1350),
)


def _counting(dtype, backend, device):
    for sample in ATTENTION_COUNTS + (ATTENTION_LARGE_COUNTS if torch.device(device).type != "cpu" else ()):
        probes.counting(sample, dtype, backend, device)


# ---- merge ----------------------------------------------------------------------------------------------------------
def merge_inputs(sample, dtype, seed, device="cpu"):
    outs, lses = sample.tensors(dtype, device, seed)
    return (*outs, *(x.double() if dtype == torch.float64 else x for x in lses))


def merge_call(sample, tensors, **more):
    n = sample.parts
    return sample.call(list(tensors[:n]), list(tensors[n:]), **more)


def merge_yardstick(sample, tensors):
    """Weighted mean in float32, written the usual way: one part added after another by logaddexp."""
    n = sample.parts
    outs, lses = tensors[:n], tensors[n:]
    signs = sample.signs or (1,) * n
    top = torch.stack(lses).amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    total = sum(s * torch.exp(x - top) for s, x in zip(signs, lses))
    lse = top + torch.log(total)
    safe = torch.where(lse == -torch.inf, 0, lse)
    result = 0
    for s, o, x in zip(signs, outs, lses):
        w = s * torch.exp(x - safe)
        w = w.transpose(1, 2) if sample.layout == "blhd" else w
        result = result + w[..., None] * o.float()
    return result.to(outs[0].dtype), lse


_Merge = merge_cost.Sample
MERGE_LARGE = (
    _Merge("three_large", 3, 1, 8, 9216, 128, signs=(1, 1, -1)),
    _Merge("two_large_token_major", 2, 1, 6, 14040, 64, layout="blhd", empty=True),
)

ROOMS = {
    "grid_attention": Room(
        attention_cost.SAMPLES, attention_inputs, attention_call, attention_yardstick, ("q", "k", "v"), ("out", "lse"),
        ATTENTION_LARGE, {"deterministic": True}, probes={"counting": _counting},
    ),
    "merge_attention": Room(
        merge_cost.SAMPLES, merge_inputs, merge_call, merge_yardstick, ("outs and lses",), ("out", "lse"), MERGE_LARGE
    ),
    **{op: Room(*parts) for op, parts in (pyramid_rooms.ROOMS | pruned_rooms.ROOMS).items()},
    **{op: Room(*parts, probes=amf_rooms.PROBES[op]) for op, parts in amf_rooms.ROOMS.items()},
}


def room(op: str) -> Room:
    """The :class:`Room` of an op.

    Raises:
        UserError: it has none, so that nothing can be said about its accuracy.
    """
    if op not in ROOMS:
        raise UserError(f"op: {op!r} has no entry in vidkern/verify/rooms.py, expected one of {', '.join(ROOMS)}")
    return ROOMS[op]
