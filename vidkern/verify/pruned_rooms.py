"""What a check needs to know about the pruned ops. The yardsticks are the chain that one writes in torch, in the inputs' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops.pruned import activations
from ..ops.pruned_ffn import cost as ffn_cost
from ..ops.pruned_linear import cost as linear_cost
from ..ops.pruned_linear_grouped import cost as grouped_cost
from ..ops.pruned_linear.reference import channels, chosen

_MATRICES, _VECTORS = ("weight", "w1", "w2"), ("bias", "b1", "b2", "mask")


def _inputs(sample, dtype, seed, device="cpu"):
    """Every tensor with at least three dimensions, so that it can be given any strides."""
    named = sample.tensors(dtype, device, seed)
    return tuple(t[None] if n in _MATRICES or t.dim() == 2 else t[None, None] if n in _VECTORS else t for n, t in named.items())


def _named(sample, tensors) -> dict[str, torch.Tensor]:
    named = dict(zip(sample.names, tensors, strict=True))
    return {n: t[0] if n in _MATRICES else t[0, 0] if n in _VECTORS else t for n, t in named.items()}


def _call(sample, tensors, **more):
    return (sample.call(_named(sample, tensors), **more),)


def _rows(t, x):
    """One row per token of x."""
    t = t.reshape(-1, t.shape[-1])
    return t.repeat_interleave(x.numel() // x.shape[-1] // t.shape[0], 0).view(*x.shape[:-1], -1)


def _normed(sample, t):
    x = t["x"]
    h = F.rms_norm(x, x.shape[-1:], eps=1e-6) if sample.norm else x
    return h * (1 + _rows(t["scale"], x)) + _rows(t["shift"], x) if sample.modulate else h


def _finished(sample, t, y, index=None):
    """Gate and residual."""
    y = y * _rows(t["gate"], y) if "gate" in t else y
    if index is None:
        return t["residual"] + y if "residual" in t else y
    base = t["residual"] if "residual" in t else y.new_zeros(*y.shape[:-1], sample.into)
    return base.index_add(-1, index, y.to(base.dtype))


def _spread_mask(t, z):
    return z * t["mask"].repeat_interleave(z.shape[-1] // t["mask"].numel()) if "mask" in t else z


def _linear_yardstick(sample, tensors):
    t = _named(sample, tensors)
    found = sample.indices(tensors[0].device)
    h = _normed(sample, t)
    h = h.index_select(-1, found["in_index"]) if "in_index" in found else h
    weight, bias = chosen(t["weight"], t.get("bias"), found.get("rows"), found.get("columns"), sample.slab)
    z = _spread_mask(t, activations.forward(F.linear(h, weight, bias), sample.act))
    return (_finished(sample, t, z, found.get("out_index")),)


def _ffn_yardstick(sample, tensors):
    t = _named(sample, tensors)
    w1, b1, w2 = t["w1"], t.get("b1"), t["w2"]
    if sample.slab:
        kept = channels(torch.arange(0, 2 * sample.hidden // sample.slab, 2, device=w1.device), sample.slab)
        rows = torch.cat([kept, kept + w2.shape[1]]) if sample.act == "swiglu" else kept
        w1, b1, w2 = w1[rows], b1[rows], w2[:, kept]
    z = _spread_mask(t, activations.forward(F.linear(_normed(sample, t), w1, b1), sample.act))
    return (_finished(sample, t, F.linear(z, w2, t.get("b2"))),)


def _grouped_inputs(sample, dtype, seed, device="cpu"):
    xs, weights, biases = sample.tensors(dtype, device, seed)
    return tuple(t[None, None] if t.dim() == 1 else t[None] for t in (*xs, *weights, *biases))


def _lists(sample, tensors):
    n = len(sample.sizes)
    return list(tensors[:n]), [t[0] for t in tensors[n : 2 * n]], [t[0, 0] for t in tensors[2 * n :]]


def _grouped_call(sample, tensors, **more):
    return (torch.cat([t.flatten() for t in sample.call(*_lists(sample, tensors), **more)])[None],)


def _grouped_yardstick(sample, tensors):
    xs, weights, biases = _lists(sample, tensors)
    found = [activations.forward(F.linear(x, w, biases[i] if biases else None), sample.act) for i, (x, w) in enumerate(zip(xs, weights))]
    return (torch.cat([t.flatten() for t in found])[None],)


_Linear, _FFN = linear_cost.Sample, ffn_cost.Sample
LINEAR_LARGE = (
    _Linear("out_1216", (1, 1344), 1216, 2048, gate=1, residual=True),
    _Linear("up_5888", (1, 1344), 2048, 5888, act="gelu_tanh", norm=True, modulate=1),
    _Linear("gather_1232", (1, 1344), 1232, 1232, width=2048, into=2048, residual=True),
    _Linear("single_channels", (1, 1344), 1021, 1371, width=2048, into=2048, residual=True, act="silu"),
)
FFN_LARGE = (
    _FFN("tile_768", (1, 1344), 2048, 5888, 768, gate=1, residual=True, norm=True, modulate=1),
    _FFN("pairs_1500", (2, 333), 1024, 3001, 1500, act="swiglu"),
)

GROUPED_LARGE = (grouped_cost.Sample("cross_attention", ((1344, 2048, 1216), (77, 2048, 2432)), act="none"),)

# op -> positional arguments of vidkern.verify.rooms.Room
ROOMS = {
    "pruned_linear": (linear_cost.SAMPLES, _inputs, _call, _linear_yardstick, ("arguments",), ("out",), LINEAR_LARGE),
    "pruned_ffn": (ffn_cost.SAMPLES, _inputs, _call, _ffn_yardstick, ("arguments",), ("out",), FFN_LARGE),
    "pruned_linear_grouped": (
        grouped_cost.SAMPLES, _grouped_inputs, _grouped_call, _grouped_yardstick, ("arguments",), ("out",), GROUPED_LARGE,
    ),
}
