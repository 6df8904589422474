"""Checks whose expectation is a closed form or the result itself: counting, and the same bits twice."""

from __future__ import annotations

import torch

from ..ops.grid_attention.cost import Sample


class CheckFailed(AssertionError):
    """A check found something wrong; the message says what, where, and by how much."""


def require(condition, message: str) -> None:
    """CheckFailed with ``message`` unless ``condition``."""
    if not condition:
        raise CheckFailed(message)


def finite(t: torch.Tensor) -> torch.Tensor:
    """-inf marks empty rows, which must agree exactly and carry no error."""
    return torch.where(torch.isinf(t), torch.zeros_like(t), t)


def visible_counts(sample: Sample) -> torch.Tensor:
    """Closed form: visible keys of each query row, float64 [F, F] per frame pair times N (no masks, no text)."""
    return torch.from_numpy(sample.frames.frame_mask().copy()).double() * sample.frame_len


def counting(sample: Sample, dtype, backend: str, device="cpu") -> None:
    """With q = 0 every visible key weighs the same: the lse counts the keys, one-hot values count them per key frame, and
    one-hot output gradients give dV in closed form. Needs F <= D and no masks.

    A flash kernel sums ones, exactly, so that what remains is the rounding of one division and of a hardware logarithm; dV sums
    n equal terms, each of which may round the same way. One token more or less is further off than either. (The plain form,
    which normalises before it sums, does not meet this for long frames.)

    Raises:
        CheckFailed: a count is off.
        ValueError: the sample has masks, text, another layout or more frames than head_dim.
    """
    f, n, d = sample.frames.n_frames, sample.frame_len, sample.dim
    if f > d or sample.n_text or sample.with_valid or sample.with_kv_len or sample.layout != "bhld":
        raise ValueError(f"sample: {sample.name!r} has masks or more frames than head_dim, expected a plain one")
    where = f"counting {sample.name} {str(dtype).removeprefix('torch.')} {backend}"
    counts = visible_counts(sample).to(device)
    total = counts.sum(1)
    frame = torch.arange(f * n, device=device) // n
    onehot = torch.nn.functional.one_hot(frame, d).to(dtype)
    q = torch.zeros(sample.batch, sample.heads, f * n, d, dtype=dtype, device=device)
    k = torch.randn(sample.batch, sample.kv_heads, f * n, d, device=device).to(dtype)
    v = onehot.expand(sample.batch, sample.kv_heads, -1, -1).clone().requires_grad_()
    out, lse = sample.call(q, k, v, device=device, return_lse=True, impl=backend)
    eps = torch.finfo(torch.float32).eps
    # A GPU's logarithm is an approximation, and its products add in the order of the hardware.
    gpu = torch.device(device).type == "cuda"
    want = total.log()[frame].expand_as(lse)
    require(torch.equal(torch.isneginf(want), torch.isneginf(lse)), f"{where}: lse: empty rows differ")
    error = (finite(lse.double()) - finite(want)).abs()
    right = (error <= (4 if gpu else 2) * eps * finite(want).abs().clamp_min(1)).all()
    require(right, f"{where}: lse: off log(count) by {error.max():.3e}")
    share = torch.where(total[:, None] > 0, counts / total[:, None].clamp_min(1), 0)
    want = torch.zeros(f, d, dtype=torch.float64, device=device)
    want[:, :f] = share
    ulp = torch.finfo(dtype).eps
    error = (out.double() - want[frame]).abs()
    right = (error <= (ulp / 2 + 3 * eps) * want[frame]).all()
    require(right, f"{where}: out: per-frame counts off by {error.max():.3e}")
    (dv,) = torch.autograd.grad(out, v, onehot.expand_as(out))
    group = sample.heads // sample.kv_heads
    # Rows of key frame g: sum over the n queries of frame f that see it of 1 / total(f), for each query head of the group.
    want = torch.zeros(f, d, dtype=torch.float64, device=device)
    want[:, :f] = torch.where(total[:, None] > 0, group * counts / total[:, None].clamp_min(1), 0).T
    error = (dv.double() - want[frame]).abs()
    # P is rounded to the inputs' dtype before the product, as in every flash backward.
    right = (error <= (2 * ulp + (20 + (n / 2 if gpu else 0)) * eps) * want[frame]).all()
    require(right, f"{where}: dv: per-frame counts off by {error.max():.3e}")


def same_bits(room, sample, dtype, backend: str, device="cpu", seed: int = 0) -> None:
    """Two runs of the reproducible form give the same bits, outputs and gradients.

    Raises:
        CheckFailed: they differ.
    """
    tensors = room.inputs(sample, dtype, seed, device)
    results = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_(room.differentiable) for t in tensors]
        outputs = room.call(sample, leaves, impl=backend, **room.reproducible)
        if not room.differentiable:
            results.append(list(outputs))
            continue
        generator = torch.Generator(device).manual_seed(seed + 1)
        weights = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
        results.append([*(o.detach() for o in outputs), *grads])
    for i, (a, b) in enumerate(zip(*results)):
        name = room.outputs[i] if i < len(room.outputs) else f"gradient {i - len(room.outputs)}"
        where = f"{sample.name} {str(dtype).removeprefix('torch.')} {backend}"
        require(torch.equal(a, b), f"same bits {where}: {name} differs between two runs on the same inputs")
