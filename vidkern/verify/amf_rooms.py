"""What a check needs to know about attention motion flow: the dense form as yardstick, and closed forms at every size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..ops.attention_motion_flow import cost
from ..ops.attention_motion_flow.pairs import pairs_key, pairs_of
from ..ops.attention_motion_flow.reference import coordinates
from . import probes


def _inputs(sample, dtype, seed, device="cpu"):
    return sample.tensors(dtype, device, seed)


def _call(sample, tensors, **more):
    return tuple(sample.call(*tensors, return_lse=True, **more))


def _maps(sample, tensors):
    """q and k of the video tokens, one map per [B, G], heads of a map side by side, and the factor on the logits."""
    frames, size = sample.grid[0], sample.size
    q, k = (t.transpose(1, 2) if sample.layout == "blhd" else t for t in tensors)
    if sample.batch_index is not None:
        q, k = q[sample.batch_index][None], k[sample.batch_index][None]
    start = sample.n_text if sample.text_position == "front" else 0
    q, k = (t[:, :, start : start + frames * size] for t in (q, k))
    scale = sample.rules.get("scale", sample.dim**-0.5) * sample.rules.get("tau", 2.0)
    if sample.combine == "logit_mean":
        return *(t.transpose(1, 2).flatten(2)[:, None] for t in (q, k)), scale / sample.heads
    if sample.combine == "qk_mean":
        return q.mean(1, keepdim=True), k.mean(1, keepdim=True), scale
    return q, k, scale


def _yardstick(sample, tensors):
    """In float32 SDPA with coordinates as values, the fused form that torch has. Its 16-bit outputs would put hundredths of a patch
    of error into the flow, so there all logits by one product, and softmax and coordinates in float32."""
    frames, height, width = sample.grid
    q, k, scale = _maps(sample, tensors)
    working = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(-1, -2)).to(working) * scale
    pairs = pairs_of(pairs_key(sample.pairs, frames), frames)
    i, j = torch.tensor(pairs, device=q.device).T
    q, k = (t.unflatten(2, (frames, sample.size)) for t in (q, k))
    logits = logits.unflatten(-1, (frames, sample.size)).unflatten(-3, (frames, sample.size))
    logits = logits[:, :, i, :, j].permute(1, 2, 0, 3, 4)
    own = coordinates(height, width, q.device, working)
    if q.dtype == torch.float32:
        values = F.pad(own, (0, q.shape[-1] - 2)).expand(*q.shape[:2], -1, -1)
        flows = [F.scaled_dot_product_attention(q[:, :, a], k[:, :, b], values, scale=scale) for a, b in pairs]
        flow = torch.stack(flows, 2)[..., :2]
    else:
        flow = logits.softmax(-1) @ own
    lse = logits.logsumexp(-1)
    if sample.combine == "prob_mean":
        flow = flow.mean(1)
    elif sample.combine != "none":
        flow, lse = flow[:, 0], lse[:, 0]
    flow = flow - own
    return (flow, lse) if sample.batch_index is None else (flow[0], lse[0])


_Flow = cost.Sample
# Frames of real models at few heads: the float64 expectation is dense.
LARGE = (
    _Flow("frames_1350", 1, 4, 64, (3, 30, 45), spread=2.0, n_text=226),
    _Flow("frames_1560", 1, 2, 128, (2, 30, 52), "none"),
    _Flow("frames_480", 1, 8, 64, (4, 20, 24), "prob_mean", layout="blhd"),
)
COUNTS = (_Flow("count", 1, 2, 32, (3, 4, 6), "none"), _Flow("count_113", 2, 2, 16, (2, 113, 1)), _Flow("count_odd", 1, 1, 64, (1, 17, 47)))
LARGE_COUNTS = (_Flow("count_1350", 1, 4, 64, (13, 30, 45)), _Flow("count_1560", 1, 2, 128, (21, 30, 52), "none"))


def counting(sample, dtype, backend: str, device="cpu") -> None:
    """With q = 0 all patches of a frame weigh the same: the flow points to the middle of the frame, the lse and the entropy count the
    patches, the first patch is the hard one; and with the coordinates as keys the gradient of q is their variance.

    Raises:
        CheckFailed: one of them is off.
    """
    (frames, height, width), size = sample.grid, sample.size
    where = f"counting {sample.name} {str(dtype).removeprefix('torch.')} {backend}"
    eps = torch.finfo(torch.float32).eps
    own = coordinates(height, width, device, torch.float64)
    q, k = (torch.zeros_like(t).requires_grad_() for t in sample.tensors(dtype, device))
    with torch.no_grad():
        # Halved coordinates: below 2^7 with at most 8 bits, they are exact in bfloat16 too.
        tokens = k.transpose(1, 2) if sample.layout == "bhld" else k
        tokens[..., :2] = ((own - own.mean(0)) / 2)[None].repeat(1, frames, 1)[:, :, None].to(dtype)
    found = sample.call(
        q, k, impl=backend, return_index=True, return_lse=True, return_conf=True, return_entropy=True, n_text=0
    )  # fmt: skip
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64, device=device)

    def near(name, value, want, ulps):
        error = (value.double() - want).abs().max().item()
        bound = ulps * eps * max(1.0, abs(want) if isinstance(want, float) else want.abs().max().item())
        probes.require(error <= bound, f"{where}: {name} off by {error:.3e}, expected at most {bound:.3e}")

    # Sums of integers below 2^24 are exact: what remains is the rounding of a division and of a hardware logarithm.
    near("flow", found.flow, (middle - own).expand(found.flow.shape), 4)
    near("lse", found.lse, math.log(size), 4)
    near("entropy", found.entropy, math.log(size), 8)
    near("conf", found.conf * size, 1.0, 4)
    probes.require(bool((found.index == 0).all()), f"{where}: index of equal logits, expected the first")
    weight = torch.randint(-2, 3, found.flow.shape, device=device).to(torch.float64)
    dq, dk = torch.autograd.grad((found.flow.double() * weight).sum(), (q, k))
    probes.require(bool((dk == 0).all()), f"{where}: dk of zero queries, expected 0")
    heads = sample.heads if sample.combine == "logit_mean" else 1
    factor = 2.0 / (heads * math.sqrt(sample.dim))
    variance = torch.tensor([(width**2 - 1) / 12, (height**2 - 1) / 12], dtype=torch.float64, device=device)
    pairs = pairs_of(pairs_key(sample.pairs, frames), frames)
    weight = weight if sample.combine == "none" else weight[None].expand(sample.heads, -1, -1, -1)
    want = torch.zeros(sample.heads, frames, size, 2, dtype=torch.float64, device=device)
    for p, (i, _) in enumerate(pairs):
        want[:, i] += factor / 2 * weight[:, p] * variance
    got = (dq if sample.layout == "bhld" else dq.transpose(1, 2))[-1].double().unflatten(1, (frames, size))
    # dl is rounded to the inputs' dtype before the product; sums of equal size in float32 otherwise.
    bound = (2 * torch.finfo(dtype).eps + 8 * eps) * want.abs().max().item()
    error = (got[..., :2] - want).abs().max().item()
    probes.require(error <= bound, f"{where}: dq off the variance of the coordinates by {error:.3e}, expected at most {bound:.3e}")


def _counting(dtype, backend, device):
    for sample in COUNTS + (LARGE_COUNTS if torch.device(device).type != "cpu" else ()):
        counting(sample, dtype, backend, device)


# op -> positional arguments of vidkern.verify.rooms.Room, and its probes
ROOMS = {
    "attention_motion_flow": (cost.SAMPLES, _inputs, _call, _yardstick, ("q", "k"), ("flow", "lse"), LARGE),
}
PROBES = {"attention_motion_flow": {"counting": _counting}}
