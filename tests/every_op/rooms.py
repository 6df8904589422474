"""What the tests of every op need to know about one: samples, how to call it, and the yardstick of its accuracy.

A new op is tested by being registered: :func:`room` fails for an op without an entry here, and the matrix test fails for an op
or a backend that expected_matrix.toml does not list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidkern.ops.grid_attention import cost as attention_cost
from vidkern.ops.grid_attention import reference as attention_reference
from vidkern.ops.merge_attention import cost as merge_cost


@dataclass(frozen=True)
class Room:
    """One op: ``inputs(sample, dtype, seed)`` -> flat differentiable tensors; ``call(sample, tensors, **more)`` -> tuple of
    outputs; ``yardstick(sample, tensors)`` -> the same outputs by the best-practice torch form in the same dtype.

    ``pairs`` lists which outputs' losses the yardstick is differentiable for.
    """

    samples: tuple
    inputs: object
    call: object
    yardstick: object
    names: tuple[str, ...]
    outputs: tuple[str, ...]


# ---- grid attention ---------------------------------------------------------------------------------------------------------
def attention_inputs(sample, dtype, seed):
    return sample.tensors(dtype, seed=seed)


def attention_call(sample, tensors, **more):
    return sample.call(*tensors, return_lse=True, **more)


def _rows_and_keys(sample, options):
    """Per batch sample and query frame (text last): row indices and visible key indices."""
    frames, n = sample.frames, sample.frame_len
    front = sample.text_position == "front"
    keys, rows = attention_reference.liveness(
        options.get("valid"), options.get("kv_len"), options.get("text_len"), n_frames=frames.n_frames, frame_len=n,
        n_text=sample.n_text, text_front=front, device=torch.device("cpu"),
    )
    n_text = sample.n_text if frames.text_visible else 0
    groups = list(attention_reference._groups(frames, n, sample.n_text, front, "cpu"))
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
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32)
    for b, i, j in _rows_and_keys(sample, sample.options()):
        if len(i) and len(j):
            out[b, :, i] = F.scaled_dot_product_attention(q[b : b + 1, :, i], k[b : b + 1, :, j], v[b : b + 1, :, j])[0]
            logits = q[b, :, i] @ k[b, :, j].transpose(-1, -2) / sample.dim**0.5
            lse[b, :, i] = logits.float().logsumexp(-1)
    return (out.transpose(1, 2) if sample.layout == "blhd" else out), lse


# ---- merge ------------------------------------------------------------------------------------------------------------------
def merge_inputs(sample, dtype, seed):
    outs, lses = sample.tensors(dtype, seed=seed)
    return (*outs, *(x.double() if dtype == torch.float64 else x for x in lses))


def merge_call(sample, tensors, **more):
    n = sample.parts
    return sample.call(list(tensors[:n]), list(tensors[n:]), **more)


def merge_yardstick(sample, tensors):
    """Weighted mean in float32, written the usual way: one part added after another by logaddexp."""
    n = sample.parts
    outs, lses = tensors[:n], tensors[n:]
    signs = sample.signs or (1,) * n
    total = None
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


ROOMS = {
    "grid_attention": Room(
        attention_cost.SAMPLES, attention_inputs, attention_call, attention_yardstick, ("q", "k", "v"), ("out", "lse")
    ),
    "merge_attention": Room(
        merge_cost.SAMPLES, merge_inputs, merge_call, merge_yardstick, ("outs and lses",), ("out", "lse")
    ),
}


def room(op: str) -> Room:
    assert op in ROOMS, f"op {op} has no entry in tests/every_op/rooms.py: add one, so that every test covers it"
    return ROOMS[op]
