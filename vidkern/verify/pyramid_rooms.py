"""What a check needs to know about the pyramid ops. The yardsticks are what one writes in torch: pooling, interpolation, and float32
Box-Muller on the same words of the generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..ops.pyramid import filters, levels, philox
from ..ops.pyramid_decompose import cost as decompose_cost
from ..ops.pyramid_flow_inputs import cost as inputs_cost
from ..ops.pyramid_flow_loss import cost as loss_cost
from ..ops.pyramid_flow_step import cost as step_cost
from ..ops.pyramid_merge import cost as merge_cost
from ..ops.pyramid_stage_inputs import cost as stage_cost
from ..ops.pyramid_stage_transition import cost as transition_cost


def _inputs(sample, dtype, seed, device="cpu"):
    return sample.tensors(dtype, device, seed)


def _row(parts):
    """Everything of a sample in one row: [B, values]."""
    return torch.cat([p.flatten(1) for p in parts], 1)


def _flat(result) -> list[torch.Tensor]:
    if isinstance(result, (list, tuple)):
        return [t for part in result for t in _flat(part)]
    return [] if result is None else [result]


def _one(sample, tensors, **more):
    return (_row(_flat(sample.call(*tensors, **more))),)


def _pair(sample, tensors, **more):
    return tuple(_row(_flat(part)) for part in sample.call(*tensors, **more))


def _folded(x, function, pool_time):
    """Apply a 2-D or 3-D function of torch to [B, C, T, H, W]."""
    if pool_time:
        return function(x)
    b, c, t = x.shape[:3]
    y = function(x.transpose(1, 2).flatten(0, 1))
    return y.view(b, t, *y.shape[1:]).transpose(1, 2)


def _down(x, kind, pool_time):
    if kind == "dct":
        return filters.down(x, kind, pool_time)
    if pool_time:  # avg_pool3d has no 16-bit kernels on the CPU
        return x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5, 7))
    return _folded(x, lambda y: F.avg_pool2d(y, 2), pool_time)


def _up(x, kind, pool_time):
    if kind == "dct":
        return filters.up(x, kind, pool_time)
    mode = "nearest" if kind == "haar" else "trilinear" if pool_time else "bilinear"
    corners = {} if kind == "haar" else {"align_corners": False}
    return _folded(x, lambda y: F.interpolate(y, scale_factor=2, mode=mode, **corners), pool_time)


def _decompose(x, p):
    gaussian = [x]
    for _ in range(p.levels - 1):
        gaussian.insert(0, _down(gaussian[0], p.kind, p.pool_time))
    return [gaussian[0], *(g - _up(c, p.kind, p.pool_time) for c, g in zip(gaussian, gaussian[1:]))]


def _merge(parts, p):
    result = parts[0]
    for part in parts[1:]:
        result = _up(result, p.kind, p.pool_time) + part
    return result


def _volume(x):
    return x.unsqueeze(2) if x.dim() == 4 else x


def _times(parts, std):
    return parts if std is None else [p * k for p, k in zip(parts, std)]


def _over(parts, std):
    return parts if std is None else [p / k for p, k in zip(parts, std)]


def _noise(shape, dtype, device, **key):
    """Box-Muller in float32 (float64 for float64), as torch's own generators do it."""
    math_dtype = torch.promote_types(dtype, torch.float32)
    n, first = math.prod(shape[1:]), key.pop("first_sample")
    rows = []
    for b in range(shape[0]):
        u, angle = philox.uniforms(philox.words(n + n % 2, sample=first + b, device=device, **key).view(-1, 2), math_dtype)
        radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * angle
        rows.append(torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten()[:n])
    return torch.stack(rows).view(shape).to(dtype)


def decompose_yardstick(sample, tensors):
    """Average pooling, interpolation and subtraction, in the inputs\' dtype."""
    return (_row(_over(_decompose(_volume(tensors[0]), sample.pyramid), sample.std)),)


def merge_yardstick(sample, tensors):
    """Interpolation and addition, in the inputs\' dtype."""
    return (_row([_merge(_times([_volume(t) for t in tensors], sample.std), sample.pyramid)]),)


def inputs_yardstick(sample, tensors):
    """Levels, noise and products, each an operation of its own, in the inputs\' dtype."""
    p, dtype, device = sample.pyramid, tensors[0].dtype, tensors[0].device
    parts = [_volume(t) for t in tensors] if sample.given_levels else _decompose(_volume(tensors[0]), p)
    parts, table, mask, noise = _over(parts, sample.std), sample.coefficients(device), sample.mask(device), sample.noise(dtype, device)
    active, zs, vs = sample.active or p.levels, [], []
    for s, (part, shape) in enumerate(zip(parts, levels.shapes(p.sizes))):
        if s >= active:
            if sample.inactive == "zero":
                zs.append(torch.zeros_like(part))
                vs.append(zs[-1])
            continue
        eps = _volume(noise[s]) if noise else _noise(shape, dtype, device, seed=sample.seed, level=s, offset=7, first_sample=3)
        alpha, sigma, da, ds = (table[:, s, i].to(dtype).view(-1, 1, 1, 1, 1) for i in range(4))
        alive = torch.ones(p.batch, dtype=torch.bool, device=device) if mask is None else mask[:, s]
        zero = torch.zeros_like(part)
        zs.append(torch.where(alive.view(-1, 1, 1, 1, 1), alpha * part + sigma * eps, zero))
        vs.append(torch.where(alive.view(-1, 1, 1, 1, 1), da * part + ds * eps, zero))
    if sample.patch:
        return tuple(levels.to_tokens(parts, sample.patch, p.pool_time).flatten(1) for parts in (zs, vs))
    return _row(zs), _row(vs)


def loss_call(sample, tensors, **more):
    """(means, loss as [1]): the loss last, whose gradient every sample has."""
    loss, means = sample.call(*tensors, **more)
    return means, loss.view(1)


def loss_yardstick(sample, tensors):
    """F.mse_loss of every level, in float32."""
    p, mask, targets = sample.pyramid, sample.mask(tensors[0].device), sample.targets(tensors[0].dtype, tensors[0].device)
    if sample.patch:
        tensors, targets = (levels.from_tokens(t[0], p.sizes, sample.patch, p.pool_time) for t in (tensors, targets))
    math_dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    means = []
    for s, (pred, target) in enumerate(zip(tensors, targets)):
        mean = F.mse_loss(pred.to(math_dtype), target.to(math_dtype), reduction="none").flatten(1).mean(1)
        alive = torch.full((p.batch,), s < (sample.active or p.levels), device=mean.device)
        means.append(torch.where(alive if mask is None else mask[:, s], mean, torch.zeros_like(mean)))
    means = torch.stack(means, 1)
    return means, means.sum(1).mean().view(1)


def step_yardstick(sample, tensors):
    """lerp for the guidance, then the step, then the merge or the next input, in the inputs\' dtype."""
    p, dtype = sample.pyramid, tensors[0].dtype
    n, m = p.levels, sample.moved
    z, cond, uncond = tensors[:n], tensors[n : n + m], tensors[n + m :]
    dt, guidance = (torch.as_tensor(t, dtype=torch.float32).expand(p.batch, n).to(dtype) for t in sample.table(z[0].device))
    state = []
    for s in range(n):
        part = _volume(z[s])
        if s < m:
            step, w = (t[:, s].view(-1, 1, 1, 1, 1) for t in (dt, guidance))
            v = _volume(cond[s])
            v = torch.lerp(_volume(uncond[s]), v, w) if sample.guided else v
            part = part + step * v
        state.append(part)
    if sample.merge:
        return (_row([_merge(_times(state, sample.std), p)]),)
    upcoming = m if sample.next_active is None else sample.next_active
    after = [part if s < upcoming else torch.zeros_like(part) for s, part in enumerate(state)]
    after = after if sample.inactive == "zero" else after[:upcoming]
    if sample.patch:
        after = [levels.to_tokens(after, sample.patch, p.pool_time)]
    return (_row([*state, *after]),)


def stage_yardstick(sample, tensors):
    """Pooling, repetition and weighted sums, in the inputs\' dtype."""
    x, p, k = _volume(tensors[0]), sample.pyramid, sample.stage
    noise = sample.noise(tensors[0])
    shape = tuple(x.shape)
    eps = _noise(shape, x.dtype, x.device, seed=99, level=p.levels - 1, offset=1, first_sample=2) if noise is None else _volume(noise)
    start, end, r = (t.to(x.dtype).view(-1, 1, 1, 1, 1) for t in sample.table(x.device).unbind(1))
    for _ in range(p.levels - 1 - k):
        x, eps = _down(x, "haar", False), 2 * _down(eps, "haar", False)
    first = start * eps
    if k:
        first = first + (1 - start) * _up(_down(x, "haar", False), "haar", False)
    last = end * eps + (1 - end) * x
    return _row([r * first + (1 - r) * last]), _row([first - last])


def transition_yardstick(sample, tensors):
    """White noise less its block means, in the inputs\' dtype."""
    import vidkern

    z, stage = _volume(tensors[0]), vidkern.pyramid_stages(3)[1]
    b, c, t, h, w = z.shape
    scale, spread = torch.full((b,), stage.scale), torch.full((b,), stage.spread)
    if sample.per_sample:
        scale, spread = 0.5 + torch.arange(b), 1 - 0.25 * torch.arange(b)
    if sample.given_noise:
        g = torch.sin(torch.arange(4 * z.numel(), dtype=torch.float32) * 1.7).to(z.dtype).view(b, c, t, 2 * h, 2 * w).to(z.device)
    else:
        g = _noise((b, c, t, 2 * h, 2 * w), z.dtype, z.device, seed=5, level=1, offset=2, first_sample=1)
    scale, spread = (v.to(z).view(-1, 1, 1, 1, 1) for v in (scale, spread))
    centred = g - _up(_down(g, "haar", False), "haar", False)
    return (_row([scale * _up(z, "haar", False) + spread * math.sqrt(4 / 3) * centred]),)


# Per op: samples, inputs, call, yardstick, names of inputs, names of outputs, samples for accelerators.
ROOMS = {
    "pyramid_decompose": (decompose_cost.SAMPLES, _inputs, _one, decompose_yardstick, ("x",), ("levels",), decompose_cost.LARGE),
    "pyramid_merge": (merge_cost.SAMPLES, _inputs, _one, merge_yardstick, ("levels",), ("volume",), merge_cost.LARGE),
    "pyramid_flow_inputs": (inputs_cost.SAMPLES, _inputs, _pair, inputs_yardstick, ("x",), ("z", "v"), inputs_cost.LARGE),
    "pyramid_flow_loss": (loss_cost.SAMPLES, _inputs, loss_call, loss_yardstick, ("pred",), ("means", "loss"), loss_cost.LARGE),
    "pyramid_flow_step": (step_cost.SAMPLES, _inputs, _one, step_yardstick, ("z, cond, uncond",), ("result",), step_cost.LARGE),
    "pyramid_stage_inputs": (stage_cost.SAMPLES, _inputs, _pair, stage_yardstick, ("x",), ("z", "v"), stage_cost.LARGE),
    "pyramid_stage_transition": (
        transition_cost.SAMPLES, _inputs, _one, transition_yardstick, ("z",), ("z",), transition_cost.LARGE
    ),
}
