"""Attention motion flow (AMF): where each patch of a frame attends to in another frame, as a displacement.

Source: DiTFlow (arXiv 2412.07776), section 4; the streaming softmax with coordinates is our own.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections import namedtuple

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import cpu_why_not, triton_why_not, unit_stride
from . import cost, cuda, hopper, plans, reference
from .pairs import pairs_key, pairs_of

__all__ = ["amf_loss", "attention_motion_flow"]

# What a call of the op asks for. LSE comes with MEAN, whose gradient needs it, and with VOTE, which builds on it.
MEAN, INDEX, LSE, TOP, ENTROPY, VOTE = 1, 2, 4, 8, 16, 32
HEADS = ("logit_mean", "prob_mean", "qk_mean", "none")
MODES = ("soft", "hard", "both")


# ---- launch ---------------------------------------------------------------------------------------------------------
def _allocate(q, k, pairs, frames, height, width, scale, wants, impl):
    rows = (*q.shape[:2], len(pairs_of(pairs, int(frames))), height * width)
    voted = (rows[0], 1, *rows[2:]) if wants & VOTE else rows
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32

    def new(flag, shape, dtype=kind):
        return torch.empty(shape if wants & flag else (0,), dtype=dtype, device=q.device)

    return (
        new(MEAN, (*rows, 2)), new(INDEX, voted, torch.int32), new(LSE | MEAN | VOTE, rows), new(TOP, voted), new(ENTROPY, rows),
    )  # fmt: skip


def _allocate_backward(dmean, dlse, q, k, *rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))


def _present(t):
    return t if t is not None and t.numel() else None


def _run_with(launch):
    def run(outputs, q, k, pairs, frames, height, width, scale, wants, impl):
        mean, index, lse, top, entropy = (_present(t) for t in outputs)
        listed, shared = pairs_of(pairs, frames), {"grid": (frames, height, width), "scale": scale}
        q, k = unit_stride(q), unit_stride(k)
        voted = wants & VOTE
        own = {"index": None, "top": None} if voted else {"index": index, "top": top}
        launch("forward")(q, k, listed, mean=mean, lse=lse, entropy=entropy, **own, **shared)
        if voted:
            launch("vote")(q, k, lse, listed, index=index, top=top, **shared)

    return run


def _run_backward_with(launch):
    def run(outputs, dmean, dlse, q, k, mean, lse, pairs, frames, height, width, scale, impl):
        dq, dk = outputs
        if dmean is None and dlse is None:
            dq.zero_(), dk.zero_()
            return
        dmean, dlse = (t if t is None else t.contiguous() for t in (dmean, dlse))
        launch("backward")(
            dmean, dlse, unit_stride(q), unit_stride(k), _present(mean), lse, pairs_of(pairs, frames),
            grid=(frames, height, width), scale=scale, dq=dq, dk=dk,
        )  # fmt: skip

    return run


@functools.lru_cache(maxsize=1)
def _cpu():
    """The launchers of the compiled part, imported at first use: it may be missing."""
    from . import cpu

    return cpu


@functools.lru_cache(maxsize=1)
def _triton():
    """The launchers of the Triton kernels, imported at first use."""
    from . import triton

    return triton


def _cuda_why_not(q, k, pairs, frames, height, width, *rest) -> str | None:
    return kernels.why_not(q) or cuda.why_not(q, k, frames, height, width)


def _cuda_launch(kind):
    return functools.partial(getattr(cuda, kind), launch=kernels.launch)


def _hopper_why_not(q, k, pairs, frames, height, width, *rest) -> str | None:
    return kernels.why_not_hopper(q) or hopper.why_not(q, k, frames, height, width)


def _hopper_launch(kind):
    return functools.partial(getattr(hopper, kind), launch=kernels.launch)


def _backend(name, why_not, module, **more):
    launch = lambda kind: getattr(module(), kind)  # noqa: E731
    return registry.Backend(name, lambda q, *rest: why_not(q), _run_with(launch), _run_backward_with(launch), **more)


# ---- rules ----------------------------------------------------------------------------------------------------------
def _sizes(q, pairs, frames, height, width):
    """Groups, pairs, tokens of a frame and channels, as :mod:`cost` takes them."""
    return q.shape[0] * q.shape[1], len(pairs_of(pairs, int(frames))), height * width, q.shape[2] * q.shape[4]


def _flops(q, k, pairs, frames, height, width, scale, wants, impl):
    sizes = _sizes(q, pairs, frames, height, width)
    return cost.forward_flops(*sizes) + (cost.vote_flops(*sizes) if wants & VOTE else 0)


def _backward_flops(dmean, dlse, q, k, mean, lse, pairs, frames, height, width, scale, impl):
    return cost.backward_flops(*_sizes(q, pairs, frames, height, width))


def _placements(q, tensors, axes, returns):
    """Replicate, or shard batch or groups: every logit map is computed alone. Empty tensors have no axis to shard."""
    from torch.distributed.tensor import Replicate, Shard

    rules = [([Replicate() for _ in returns], [None if t is None else Replicate() for t in tensors])]
    for axis in registry.evenly_sharded([q], axes):
        place = {True: Shard(axis), False: Replicate()}
        given = [None if t is None else place[len(t.shape) > 1] for t in tensors]
        rules.append(([place[bool(there)] for there in returns], given))
    return rules


def _shard(q, k, pairs, frames, height, width, scale, wants, impl):
    returns = (wants & MEAN, wants & INDEX, wants & (LSE | MEAN | VOTE), wants & TOP, wants & ENTROPY)
    # A vote goes over all groups.
    return _placements(q, (q, k), (0,) if wants & VOTE else (0, 1), returns)


def _backward_shard(dmean, dlse, q, k, mean, lse, *rest):
    return _placements(q, (dmean, dlse, q, k, mean, lse), (0, 1), (True, True))


def _call(saved, args, grads):
    q, k, mean, lse = saved
    dmean, _, dlse, dtop, dentropy = (_present(t) for t in grads)
    if dtop is not None or dentropy is not None:
        raise RuntimeError("attention_motion_flow: top and entropy have no gradient, expected a loss on mean and lse only")
    return (dmean, dlse, q, k, mean, lse, *args[2:7])


_REST = "str pairs, SymInt frames, SymInt height, SymInt width, float scale"

OP = registry.Op(
    "attention_motion_flow",
    f"(Tensor q, Tensor k, {_REST}, int wants, str impl) "
    "-> (Tensor mean, Tensor index, Tensor lse, Tensor top, Tensor entropy)",
    allocate=_allocate,
    backends=(
        _backend("cpu", cpu_why_not, _cpu),
        registry.Backend(
            "hopper", _hopper_why_not, _run_with(_hopper_launch), _run_backward_with(_hopper_launch),
            description="CUDA kernels (TMA, wgmma) for float16 and bfloat16 on NVIDIA GPUs of compute capability 9.0 alone",
            trust="require", sources=kernels.declare(hopper, cuda),
        ),
        registry.Backend(
            "cuda", _cuda_why_not, _run_with(_cuda_launch), _run_backward_with(_cuda_launch),
            description="CUDA kernels for float16 and bfloat16 on NVIDIA GPUs of compute capability 8.0 on",
            trust="require", sources=kernels.declare(cuda),
        ),
        _backend(
            "triton", triton_why_not, _triton, trust="warn", sources=("ops/attention_motion_flow/triton.py",),
            description="Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on",
        ),
        _backend("reference", lambda q: None, lambda: reference),
    ),
    gradient=registry.Gradient(
        schema=f"(Tensor? dmean, Tensor? dlse, Tensor q, Tensor k, Tensor mean, Tensor lse, {_REST}, str impl) "
        "-> (Tensor dq, Tensor dk)",
        allocate=_allocate_backward,
        save=lambda args, outputs: (*args[:2], outputs[0], outputs[2]),
        call=_call,
        scatter=lambda outputs, args, grads: outputs,
        flops=_backward_flops,
        shard=_backward_shard,
    ),
    cast=(0, 1),
    flops=_flops,
    shard=_shard,
)


# ---- checks ---------------------------------------------------------------------------------------------------------
def _check(q, k) -> None:
    """Raise for the first thing wrong with q and k."""
    for name, t in (("q", q), ("k", k)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
        if t.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected 4 dimensions")
        if not t.is_floating_point():
            raise ValueError(f"{name}: dtype {t.dtype}, expected a floating-point dtype")
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: layout {t.layout}, expected a dense tensor")
        if t.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected no empty dimension")
        if t.shape != q.shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected q's shape {tuple(q.shape)}")
        # Under autocast mixed dtypes are usual, and lowered to one before the kernel.
        if t.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{name}: dtype {t.dtype}, expected q's dtype {q.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: on device {t.device}, expected q's device {q.device}")
    if q.shape[3] % 8:
        raise ValueError(f"q: head_dim {q.shape[3]}, expected a multiple of 8")


def _whole(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _number(value) -> bool:
    return isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _one_of(name, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(repr(a) for a in allowed)}")


def _prepare(q, k, grid, layout, tau, scale, heads, n_text, text_position, batch_index):
    """Checked q and k [B, G, Hg, N, d] of the video tokens, the grid, and the factor on the summed logits."""
    _one_of("layout", layout, ("bhld", "blhd"))
    _one_of("heads", heads, HEADS)
    _one_of("text_position", text_position, ("front", "back"))
    _check(q, k)
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or not all(_whole(n) and n >= 1 for n in grid):
        raise ValueError(f"grid: {grid!r}, expected (frames, height, width), each an integer >= 1")
    if not _whole(n_text) or n_text < 0:
        raise ValueError(f"n_text: {n_text!r}, expected an integer >= 0")
    if not _number(tau) or tau <= 0:
        raise ValueError(f"tau: {tau!r}, expected a number > 0")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    elif not _number(scale):
        raise ValueError(f"scale: {scale!r}, expected a finite number")
    if layout == "blhd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    batch, length = q.shape[0], q.shape[2]
    n_video = math.prod(grid)
    if length - n_text != n_video:
        raise ValueError(
            f"grid: {tuple(grid)} has {n_video} tokens, expected the {length - n_text} video tokens of q (length {length} "
            f"less n_text {n_text})"
        )
    if batch_index is not None:
        if not _whole(batch_index) or not -batch <= batch_index < batch:
            raise ValueError(f"batch_index: {batch_index!r}, expected None or an integer in {-batch}..{batch - 1}")
        at = batch_index % batch
        q, k = q[at : at + 1], k[at : at + 1]
    if n_text:
        start = n_text if text_position == "front" else 0
        q, k = q[:, :, start : start + n_video], k[:, :, start : start + n_video]
    scale = scale * tau
    if heads == "logit_mean":
        return q[:, None], k[:, None], scale / q.shape[1]
    if heads == "qk_mean":
        return q.mean(1)[:, None, None], k.mean(1)[:, None, None], scale
    return q[:, :, None], k[:, :, None], scale


@functools.lru_cache(maxsize=64)
def _kept_coordinates(height, width, dtype):
    with torch.inference_mode(False):
        return reference.coordinates(height, width, torch.device("cpu"), dtype)


def _coordinates(height, width, like):
    """(x, y) of every patch [S, 2]. Small calls on a CPU would spend a tenth of their time on making it; elsewhere it may be part of a
    captured graph, and while compiling or under a mode it is not a tensor to keep."""
    plain = not torch.compiler.is_compiling() and type(like) is torch.Tensor and like.device.type == "cpu"
    if plain and not torch._C._are_functorch_transforms_active():
        return _kept_coordinates(height, width, like.dtype)
    return reference.coordinates(height, width, like.device, like.dtype)


def _minus(t, own):
    """``t - own``, where a DTensor takes a plain ``own`` as replicated."""
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(t, module.DTensor):
        return t - own
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        return t - own


# ---- public ---------------------------------------------------------------------------------------------------------
_EXTRAS = ("index", "lse", "conf", "entropy")
# One type for every choice of results: unpacking gives what was asked for, and each part has its name.
_RESULTS = {
    names: namedtuple("MotionFlow", names, module=__name__)
    for flows in (("flow",), ("flow", "hard"))
    for n in range(len(_EXTRAS) + 1)
    for extras in itertools.combinations(_EXTRAS, n)
    for names in [(*flows, *extras)]
    if len(names) > 1
}


def _result(names, values):
    return _RESULTS[names](*values)


for _kind in _RESULTS.values():
    # They have one name and no place in this module: pickle and copy find them by their fields.
    _kind.__reduce__ = lambda self: (_result, (self._fields, tuple(self)))


def attention_motion_flow(
    q, k, *, grid, layout="bhld", tau=2.0, scale=None, heads="logit_mean", mode="soft", pairs="all", n_text=0,
    text_position="front", batch_index=-1, return_index=False, return_lse=False, return_conf=False, return_entropy=False,
    impl=None,
):
    """Displacement of every patch of one frame towards the patches of another that it attends to.

    For query patch i of one frame and the patches j of another, with ``c`` their coordinates in patches (x, the column, first):
    ``l_ij = tau * scale * <q_i, k_j>``, a softmax over the patches of that one frame, and then the expected displacement
    ``sum_j p_ij c_j - c_i`` (soft) or that of the most probable patch (hard). Text takes no part. Nothing of size N x N is
    ever stored. Soft flow and lse are differentiable in q and k; everything else has no gradient.

    Args:
        q, k: [B, H, L, D] or, for ``layout="blhd"``, [B, L, H, D], as attention takes them (after norms and rotary
            embedding); L = n_text + F * h * w, frame after frame, each row by row. D a multiple of 8. float32, bfloat16,
            float16 or float64; sums are in float32 (float64).
        grid: (F, h, w): frames, and rows and columns of patches in each.
        layout: ``"bhld"`` or ``"blhd"``.
        tau: factor on the logits, > 0: the larger, the sharper. It does not change the hard flow, but for ``"prob_mean"``.
        scale: factor on the dot products of one head; default ``1 / sqrt(D)``.
        heads: ``"logit_mean"``: one map from the logits averaged over the heads; ``"prob_mean"``: one softmax per head, maps
            averaged; ``"qk_mean"``: q and k averaged first, which is not the same (products across heads), and rounded to their
            dtype; ``"none"``: a flow for every head.
        mode: ``"soft"``, ``"hard"`` (the lowest row-major index wins ties) or ``"both"``.
        pairs: ordered pairs (query frame, key frame), one result row each: ``"all"`` F * F of them, row f1 * F + f2;
            ``"upper"`` those with f1 < f2; ``{"max_dt": n}`` those with \\|f1 - f2\\| <= n, equal frames among them; or
            a list or tensor [P, 2] (a tensor is read on the host).
        n_text: text tokens (MMDiT), left out.
        text_position: ``"front"`` or ``"back"`` of the sequence.
        batch_index: the sample to look at, by default the last (the conditional one of classifier-free guidance); None for all.
        return_index: also the row-major index of the hard flow's patch, int32.
        return_lse: also the log-sum-exp of the logits over the frame; for ``"prob_mean"`` one for every head.
        return_conf: also the largest probability in the frame.
        return_entropy: also the entropy of the softmax over the frame, in nats; for ``"prob_mean"`` the mean over the heads.
        impl: backend by name (``"cpu"``, ``"hopper"``, ``"cuda"``, ``"triton"``, ``"reference"``); None follows :func:`vidkern.use`.

    Returns:
        the flow [P, S, 2] with S = h * w, float32 (float64 for float64 inputs). Of several results a named tuple, in this
        order: ``flow``, ``hard`` (``mode="both"``), ``index``, ``lse``, ``conf``, ``entropy``, those [P, S].
        ``heads="none"`` puts H before P (as does the lse of ``"prob_mean"``), ``batch_index=None`` B in front of all.

    Raises:
        TypeError: q or k is no tensor.
        ValueError: a wrong shape, dtype, device or option, or a grid that is not the video's; the message names the
            argument, its value and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: on double backward.
    """
    plain = mode == "soft" and return_index is return_lse is return_conf is return_entropy is False
    options = (layout, tau, scale, heads, n_text, text_position, batch_index)
    key = plans.key_of(q, k, grid, pairs, options, impl) if plain else None
    plan = key and plans.find(key)
    if plan:
        return plans.flow(OP, plan, q, k)
    _one_of("mode", mode, MODES)
    for name, value in (
        ("return_index", return_index), ("return_lse", return_lse), ("return_conf", return_conf),
        ("return_entropy", return_entropy),
    ):
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r}, expected True or False")
    given = q, k
    q, k, factor = _prepare(q, k, grid, *options)
    frames, height, width = grid
    pairs = pairs_key(pairs, int(frames))

    soft, hard, average = mode != "hard", mode != "soft", heads == "prob_mean"
    wants = (MEAN if soft else 0) | (LSE if return_lse else 0) | (ENTROPY if return_entropy else 0)
    wants |= (INDEX if hard or return_index else 0) | (TOP if return_conf else 0)
    if average and wants & (INDEX | TOP):
        wants |= VOTE
    if not wants & (MEAN | LSE):
        q, k = q.detach(), k.detach()  # nothing of what is left has a gradient
    mean, index, lse, top, entropy = OP(q, k, pairs, int(frames), height, width, float(factor), wants, impl)

    one_map = heads in ("logit_mean", "qk_mean")
    own = _coordinates(height, width, mean)

    def shaped(t, groups_first=True):
        t = t.squeeze(1) if not groups_first else t
        return t if batch_index is None else t.squeeze(0)

    values = {}
    if soft:
        values["flow"] = shaped(_minus(mean.mean(1, keepdim=True) if average else mean, own), heads == "none")
    if hard:
        at = torch.stack([index % width, torch.div(index, width, rounding_mode="floor")], -1).to(mean.dtype)
        values["hard" if soft else "flow"] = shaped(_minus(at, own), heads == "none")
    if return_index:
        values["index"] = shaped(index, heads == "none")
    if return_lse:
        values["lse"] = shaped(lse, not one_map)
    if return_conf:
        values["conf"] = shaped(top.detach(), heads == "none")
    if return_entropy:
        entropy = entropy.detach()
        values["entropy"] = shaped(entropy.mean(1, keepdim=True) if average else entropy, heads == "none")
    if key and not plans.known(key):
        dense = torch.empty_like(given[0], memory_format=torch.contiguous_format, requires_grad=False)
        like, _, _ = _prepare(dense, dense, grid, *options)
        rest = (pairs, frames, height, width, float(factor), wants)
        views = [(q, given[0]), (k, given[1]), (like, dense)]
        plans.make(key, OP, views, dense.shape, rest, pairs_of(pairs, frames), None if average else values["flow"].shape, own)
    if len(values) == 1:
        return values["flow"]
    return _RESULTS[tuple(values)](*values.values())


def amf_loss(
    q, k, flow_ref, mask=None, *, grid, layout="bhld", tau=2.0, scale=None, heads="logit_mean", pairs="all", n_text=0,
    text_position="front", batch_index=-1, impl=None,
):
    """Mean squared distance of the soft flow from a reference flow, over the patches that count.

    ``1 / (2 M) * sum over the mask of |u - u_ref|^2`` with M the number of masked (pair, patch) entries; 0 with zero gradients
    where M is 0. Entries outside the mask cost no work in the backward where whole blocks of them are, and may hold anything.

    Args:
        q, k, grid, layout, tau, scale, heads, pairs, n_text, text_position, batch_index, impl: as in
            :func:`attention_motion_flow`.
        flow_ref: reference flow, [P, S, 2] or the shape of the flow; usually the hard flow of a reference video. Without
            leading axes it holds for every head and sample.
        mask: bool [P, S] (or with the flow's leading axes): entries that count. None: those with a reference flow other
            than zero, the patches that move.

    Returns:
        scalar float32 (float64 for float64 inputs).

    Raises:
        as :func:`attention_motion_flow`, and for a ``flow_ref`` or ``mask`` of a wrong type, shape, dtype or device.
    """
    flow = attention_motion_flow(
        q, k, grid=grid, layout=layout, tau=tau, scale=scale, heads=heads, pairs=pairs, n_text=n_text,
        text_position=text_position, batch_index=batch_index, impl=impl,
    )  # fmt: skip
    for name, t, shape in (("flow_ref", flow_ref, flow.shape), ("mask", mask, flow.shape[:-1])):
        if t is None and name == "mask":
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
        least = 3 if name == "flow_ref" else 2
        if not least <= t.dim() <= len(shape) or tuple(t.shape) != tuple(shape[len(shape) - t.dim() :]):
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)} or its last {least} axes")
        if t.device != flow.device:
            raise ValueError(f"{name}: on device {t.device}, expected q's device {flow.device}")
    if not flow_ref.is_floating_point():
        raise ValueError(f"flow_ref: dtype {flow_ref.dtype}, expected a floating-point dtype")
    if mask is None:
        mask = (flow_ref != 0).any(-1)
    elif mask.dtype is not torch.bool:
        raise ValueError(f"mask: dtype {mask.dtype}, expected torch.bool")
    mask = mask.expand(flow.shape[:-1])
    apart = torch.where(mask[..., None], flow - flow_ref.to(flow.dtype), 0)
    return apart.square().sum() / (2 * mask.sum()).clamp_min(1)
