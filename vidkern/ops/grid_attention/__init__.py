"""Grid attention: attention over a grid of frames in which a token sees the frames of its view and of its time.

Source: 4Real-Video-V2 (arXiv 2506.18839), section 3 (fused view-time attention); kernels in the style of
FlashAttention-2 (arXiv 2307.08691), tiled along frames.
"""

from __future__ import annotations

import functools
import math

import torch

from ... import cuda as kernels
from ... import registry
from ..launch import cpu_why_not, fill, triton_why_not, unit_stride
from . import cost, cuda, hopper, hopper_backward, reference
from .patterns import PARTS, FramePattern, GridPattern, grid_key

__all__ = ["FramePattern", "GridPattern", "frame_sparse_attention", "grid_attention"]

MAX_DIM = 256


# ---- launch ---------------------------------------------------------------------------------------------------------
def _empty_like(t, token_major):
    """Dense and uninitialised, in [B, H, L, D] or in [B, L, H, D] order in memory."""
    if not token_major:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    batch, heads, length, dim = t.shape
    return t.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _allocate(q, k, v, valid, kv_len, text_len, frame_len, n_text, text_front, scale, token_major, *rest):
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_like(q, token_major), torch.empty(q.shape[:3], dtype=lse, device=q.device)


def _allocate_backward(dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, frame_len, n_text, text_front, scale,
                       token_major, *rest):
    return _empty_like(q, token_major), _empty_like(k, token_major), _empty_like(v, token_major)


def _geometry(q, frame_len, n_text, text_front, scale, pattern):
    """Pattern, keyword arguments of the launchers, and the token span that they work on."""
    pattern = FramePattern.from_key(pattern)
    shared = {"pattern": pattern, "frame_len": frame_len, "n_text": n_text, "text_front": text_front, "scale": scale}
    if n_text == 0 or pattern.text_visible:
        return shared, None
    # The text belongs to the "self" part. Without that part this is attention over the video tokens alone.
    n_video = pattern.n_frames * frame_len
    spans = reference.video_span(n_video, n_text, text_front), reference.text_span(n_video, n_text, text_front)
    return shared | {"n_text": 0}, spans


def _run_with(launch):
    def run(outputs, q, k, v, valid, kv_len, text_len, frame_len, n_text, text_front, scale, token_major,
            deterministic, pattern, impl):
        out, lse = outputs
        shared, spans = _geometry(q, frame_len, n_text, text_front, scale, pattern)
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        if spans is None:
            launch(q, k, v, valid, kv_len, text_len, out=out, lse=lse, **shared)
            return
        video, text = spans
        out[:, :, text], lse[:, :, text] = 0, -torch.inf
        launch(q[:, :, video], k[:, :, video], v[:, :, video], valid, kv_len, None, out=out[:, :, video],
               lse=lse[:, :, video], **shared)

    return run


def _run_backward_with(launch):
    def run(outputs, dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, frame_len, n_text, text_front, scale,
            token_major, deterministic, pattern, impl):
        shared, spans = _geometry(q, frame_len, n_text, text_front, scale, pattern)
        rows = [unit_stride(t) for t in (dout, q, k, v, out)]
        dout, q, k, v, out = rows
        if spans is None:
            grads = dict(zip(("dq", "dk", "dv"), outputs))
            launch(dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, **grads, **shared)
            return
        video, text = spans
        for grad in outputs:
            grad[:, :, text] = 0
        grads = {name: g[:, :, video] for name, g in zip(("dq", "dk", "dv"), outputs)}
        dout, dlse, q, k, v, out, lse = (t if t is None else t[:, :, video] for t in (dout, dlse, q, k, v, out, lse))
        launch(dout, dlse, q, k, v, out, lse, valid, kv_len, None, **grads, **shared)

    return run


@functools.lru_cache(maxsize=1)
def _cpu():
    """The launchers of the compiled part, imported at first use: it may be missing."""
    from . import cpu

    return cpu


def _cpu_forward(*args, **kwargs):
    _cpu().forward(*args, **kwargs)


def _cpu_backward(*args, **kwargs):
    _cpu().backward(*args, **kwargs)


def _cpu_why_not(q, *rest) -> str | None:
    return cpu_why_not(q)


@functools.lru_cache(maxsize=1)
def _triton():
    """The launchers of the Triton kernels, imported at first use."""
    from . import triton

    return triton


def _triton_forward(*args, **kwargs):
    _triton().forward(*args, **kwargs)


def _triton_backward(*args, **kwargs):
    _triton().backward(*args, **kwargs)


def _triton_why_not(q, *rest) -> str | None:
    return triton_why_not(q)


def _cuda_forward(*args, **kwargs):
    cuda.forward(*args, launch=kernels.launch, **kwargs)


def _cuda_backward(*args, **kwargs):
    cuda.backward(*args, launch=kernels.launch, **kwargs)


def _cuda_why_not(q, k, v, *rest) -> str | None:
    return kernels.why_not(q) or cuda.why_not(q, k, v)


def _hopper_forward(*args, **kwargs):
    hopper.forward(*args, launch=kernels.launch, **kwargs)


def _hopper_backward(*args, **kwargs):
    hopper_backward.backward(*args, launch=kernels.launch, **kwargs)


def _hopper_why_not(q, k, v, *rest) -> str | None:
    return kernels.why_not_hopper(q) or hopper.why_not(q, k, v)


def _reference_forward(*args, out, lse, **kwargs):
    fill((out, lse), reference.forward(*args, **kwargs))


def _reference_backward(*args, dq, dk, dv, **kwargs):
    fill((dq, dk, dv), reference.backward(*args, **kwargs))


# ---- rules ----------------------------------------------------------------------------------------------------------
def _flops(q, k, v, valid, kv_len, text_len, frame_len, n_text, text_front, scale, token_major, deterministic, pattern,
           impl):
    return cost.forward_flops(q.shape[0], q.shape[1], q.shape[3], FramePattern.from_key(pattern), frame_len, n_text)


def _backward_flops(dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, frame_len, n_text, text_front, scale,
                    token_major, deterministic, pattern, impl):
    return cost.backward_flops(q.shape[0], q.shape[1], q.shape[3], FramePattern.from_key(pattern), frame_len, n_text)


def _placements(tensors, masks, returns):
    """Replicate, shard the batch, or shard the heads (whole groups of query heads stay with their key/value head)."""
    from torch.distributed.tensor import Replicate, Shard

    def rule(placement):
        inputs = [None if t is None else placement for t in tensors]
        for m in masks:
            whole = placement != Shard(0) or (m is not None and m.shape[0] == 1)
            inputs.append(None if m is None else Replicate() if whole else placement)
        return [placement] * returns, inputs

    spec = [t for t in tensors if t is not None and len(t.shape) == 4]
    return [rule(Replicate()), *(rule(Shard(axis)) for axis in registry.evenly_sharded(spec, (0, 1)))]


def _shard(q, k, v, valid, kv_len, text_len, *rest):
    return _placements((q, k, v), (valid, kv_len, text_len), 2)


def _backward_shard(dout, dlse, q, k, v, out, lse, valid, kv_len, text_len, *rest):
    return _placements((dout, dlse, q, k, v, out, lse), (valid, kv_len, text_len), 3)


def _save(args, outputs):
    return (*args[:6], *outputs)


def _call(saved, args, grads):
    q, k, v, valid, kv_len, text_len, out, lse = saved
    return (*grads, q, k, v, out, lse, valid, kv_len, text_len, *args[6:-1])


_REST = (
    "Tensor? valid, Tensor? kv_len, Tensor? text_len, SymInt frame_len, SymInt n_text, bool text_front, float scale, "
    "bool token_major, bool deterministic, str pattern, str impl)"
)

OP = registry.Op(
    "grid_attention",
    f"(Tensor q, Tensor k, Tensor v, {_REST} -> (Tensor out, Tensor lse)",
    allocate=_allocate,
    backends=(
        registry.Backend("cpu", _cpu_why_not, _run_with(_cpu_forward), _run_backward_with(_cpu_backward)),
        registry.Backend(
            "hopper", _hopper_why_not, _run_with(_hopper_forward), _run_backward_with(_hopper_backward),
            description="CUDA kernels (TMA, wgmma) for float16 and bfloat16, head_dim up to 128, on NVIDIA GPUs of compute capability 9.0 alone",
            trust="require", sources=kernels.declare(hopper, hopper_backward, cuda),
        ),
        registry.Backend(
            "cuda", _cuda_why_not, _run_with(_cuda_forward), _run_backward_with(_cuda_backward),
            description="CUDA kernels for float16 and bfloat16, head_dim up to 128, on NVIDIA GPUs of compute capability 8.0 on",
            trust="require", sources=kernels.declare(cuda),
        ),
        registry.Backend(
            "triton", _triton_why_not, _run_with(_triton_forward), _run_backward_with(_triton_backward),
            description="Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 on",
            trust="warn", sources=("ops/grid_attention/triton.py",),
        ),
        registry.Backend(
            "reference", lambda *args: None, _run_with(_reference_forward), _run_backward_with(_reference_backward)
        ),
    ),
    gradient=registry.Gradient(
        schema=f"(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST} "
        "-> (Tensor dq, Tensor dk, Tensor dv)",
        allocate=_allocate_backward,
        save=_save,
        call=_call,
        scatter=lambda outputs, args, grads: outputs,
        flops=_backward_flops,
        shard=_backward_shard,
    ),
    cast=(0, 1, 2),
    flops=_flops,
    shard=_shard,
)


# ---- public ---------------------------------------------------------------------------------------------------------
def _in_order(q, k, v, head, token) -> bool:
    """Whether q, k, v are right; quick, because it runs on every call. :func:`_check` finds out what is wrong."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    qs, ks = q.shape, k.shape
    if len(qs) != 4 or len(ks) != 4 or ks != v.shape:
        return False
    dim, kv_heads = qs[3], ks[head]
    return (
        q.dtype is k.dtype is v.dtype
        and q.dtype.is_floating_point
        and q.layout is k.layout is v.layout is torch.strided
        and q.device == k.device == v.device
        and dim == ks[3]
        and dim % 8 == 0
        and 0 < dim <= MAX_DIM
        and 0 < qs[0] == ks[0]
        and 0 < qs[token] == ks[token]
        and kv_heads > 0 < qs[head]
        and qs[head] % kv_heads == 0
    )


def _check(q, k, v, layout) -> None:
    """Raise for the first thing wrong with q, k, v."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
        if t.dim() != 4:
            shape = "[B, H, L, D]" if layout == "bhld" else "[B, L, H, D]"
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected 4 dimensions {shape}")
        if not t.is_floating_point():
            raise ValueError(f"{name}: dtype {t.dtype}, expected a floating-point dtype")
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: layout {t.layout}, expected a dense tensor")
        if t.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected no empty dimension")
        # Under autocast mixed dtypes are usual (a norm in float32 before q), and lowered to one before the kernel.
        if t.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{name}: dtype {t.dtype}, expected q's dtype {q.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: on device {t.device}, expected q's device {q.device}")
    head, token = (1, 2) if layout == "bhld" else (2, 1)
    dim = q.shape[3]
    if dim % 8 or dim > MAX_DIM:
        raise ValueError(f"q: head_dim {dim}, expected a multiple of 8 up to {MAX_DIM}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected k's shape {tuple(k.shape)}")
    for axis, what in ((0, "batch"), (token, "length"), (3, "head_dim")):
        if k.shape[axis] != q.shape[axis]:
            raise ValueError(f"k: {what} {k.shape[axis]}, expected q's {q.shape[axis]}")
    if q.shape[head] % k.shape[head]:
        raise ValueError(f"k: {k.shape[head]} heads, expected a divisor of q's {q.shape[head]}")


def _check_mask(name, t, q, shapes, kinds, what):
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
    if t.dtype not in kinds:
        raise ValueError(f"{name}: dtype {t.dtype}, expected {what}")
    if not any(t.dim() == len(s) and all(a == b for a, b in zip(t.shape, s)) for s in shapes):
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected one of {', '.join(str(s) for s in shapes)}")
    if t.device != q.device:
        raise ValueError(f"{name}: on device {t.device}, expected q's device {q.device}")


_INTS = (torch.int32, torch.int64)


def _attend(q, k, v, pattern: str, shape, layout, valid, kv_len, n_text, text_position, text_len, scale, return_lse,
            deterministic, impl, grid_name):
    """Checks shared by both public functions; ``shape`` is the grid, (V, T) or (F,)."""
    if layout not in ("bhld", "blhd"):
        raise ValueError(f'layout: {layout!r}, expected "bhld" or "blhd"')
    token_major = layout == "blhd"
    if not _in_order(q, k, v, *((2, 1) if token_major else (1, 2))):
        _check(q, k, v, layout)
    if isinstance(n_text, bool) or not isinstance(n_text, (int, torch.SymInt)) or n_text < 0:
        raise ValueError(f"n_text: {n_text!r}, expected an integer >= 0")
    if text_position not in ("front", "back"):
        raise ValueError(f'text_position: {text_position!r}, expected "front" or "back"')
    batch, length, n_frames = q.shape[0], q.shape[1 if token_major else 2], math.prod(shape)
    n_video = length - n_text
    if n_video <= 0 or n_video % n_frames:
        raise ValueError(
            f"{grid_name}: {n_frames} frames of equal length cannot fill {n_video} video tokens (length {length} less "
            f"n_text {n_text}), expected a positive multiple of {n_frames}"
        )
    frame_len = n_video // n_frames
    masks = ((batch, *shape), tuple(shape))
    if valid is not None:
        _check_mask("valid", valid, q, masks, (torch.bool,), "torch.bool")
        valid = valid.reshape(-1, n_frames).contiguous()
    if kv_len is not None:
        _check_mask("kv_len", kv_len, q, masks, _INTS, "torch.int32 or torch.int64")
        kv_len = kv_len.reshape(-1, n_frames).clamp(0, frame_len).to(torch.int32).contiguous()
    if text_len is not None:
        _check_mask("text_len", text_len, q, ((batch,),), _INTS, "torch.int32 or torch.int64")
        if n_text == 0:
            raise ValueError("text_len: given with n_text 0, expected n_text > 0")
        text_len = text_len.clamp(0, n_text).to(torch.int32).contiguous()
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)) or not -math.inf < scale < math.inf:
        raise ValueError(f"scale: {scale!r}, expected a finite number")
    if not isinstance(return_lse, bool):
        raise ValueError(f"return_lse: {return_lse!r}, expected True or False")
    if not isinstance(deterministic, (bool, type(None))):
        raise ValueError(f"deterministic: {deterministic!r}, expected True, False or None")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if token_major:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = OP(q, k, v, valid, kv_len, text_len, frame_len, n_text, text_position == "front", scale * 1.0,
                  token_major, deterministic, pattern, impl)
    if token_major:
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


_KEYS: dict[tuple, str] = {}
_PLAIN_WINDOWS = (int, type(None))


def _cached_grid_key(grid, causal_time, window_time, window_view, cyclic_view, include) -> str:
    plain = (
        # 1, 1.0 and True are one key of a dict, but not one argument.
        type(grid) is tuple and len(grid) == 2 and type(grid[0]) is type(grid[1]) is int and type(include) is tuple
        and type(causal_time) is type(cyclic_view) is bool
        and type(window_time) in _PLAIN_WINDOWS and type(window_view) in _PLAIN_WINDOWS
    )
    if not plain:
        return grid_key(grid, causal_time, window_time, window_view, cyclic_view, None, include)
    rules = (grid, causal_time, window_time, window_view, cyclic_view, include)
    key = _KEYS.get(rules)
    if key is None:
        if len(_KEYS) > 4096:
            _KEYS.clear()
        key = _KEYS[rules] = grid_key(grid, causal_time, window_time, window_view, cyclic_view, None, include)
    return key


def grid_attention(
    q, k, v, *, grid, layout="bhld", causal_time=False, window_time=None, window_view=None, cyclic_view=False,
    anchors=None, valid=None, kv_len=None, n_text=0, text_position="front", text_len=None,
    include=("self", "view", "time"), scale=None, return_lse=False, deterministic=None, impl=None,
):
    """Attention over a views x times grid of frames: a token sees every token of its view and of its time.

    ``softmax(scale * q k^T) v`` with one denominator over all visible keys; the own frame counts once. No L x L object
    is formed; the cost is the dense one times (V + T - 1) / (V * T). Differentiable in q, k, v, also through the lse.
    Source: 4Real-Video-V2 (arXiv 2506.18839), section 3.

    Tokens are view-major: token ``(view * T + time) * N + n`` of ``L = V * T * N`` video tokens, with ``n_text`` text
    tokens before or after them. Frame length N follows from L.

    Args:
        q: [B, Hq, L, D], or [B, L, Hq, D] for ``layout="blhd"``; float32 or bfloat16, on GPUs also float16 (other floating
            dtypes run on the reference). Any strides; a last stride other than 1 costs one copy. D: a multiple of 8 up to 256.
        k, v: the same with Hkv heads, where Hkv divides Hq (grouped-query attention).
        grid: (V, T), the number of views and times.
        layout: ``"bhld"`` or ``"blhd"`` (what a fused QKV projection gives); neither is copied.
        causal_time: same-view keys must not lie later in time; the own frame stays bidirectional.
        window_time: None, w, or (back, ahead): same-view keys satisfy ``-back <= time_key - time_query <= ahead``.
        window_view: the same for the views of same-time keys.
        cyclic_view: view distances wrap around modulo V; needs ``window_view``.
        anchors: mapping with any of ``"views"``, ``"times"`` (lists of indices), ``"frames"`` (list of (view, time)): key
            frames that every query sees (reference row or column, attention sinks).
        valid: bool [B, V, T] or [V, T]; a False frame sends no keys, and its queries give zeros and lse = -inf.
        kv_len: int [B, V, T] or [V, T]: only the first kv_len tokens of a frame are keys (clamped to 0..N); all its
            queries run.
        n_text: text tokens (MMDiT). Every query sees them and their queries see everything.
        text_position: ``"front"`` or ``"back"`` of the sequence.
        text_len: int [B]: only the first text_len text tokens are keys (clamped to 0..n_text).
        include: which disjoint parts of the pattern to keep, see :class:`GridPattern`.
        scale: factor on the logits; default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp, e.g. for :func:`merge_attention`.
        deterministic: ask for a bitwise reproducible backward; None follows
            ``torch.use_deterministic_algorithms``. The CPU, CUDA and Triton backends always are.
        impl: backend by name (``"cpu"``, ``"hopper"``, ``"cuda"``, ``"triton"``, ``"reference"``); None follows :func:`vidkern.use`, by default
            the first that can, among the CUDA kernels only where a record of ``vidkern verify`` vouches for them.

    Returns:
        out, shaped, laid out and typed like q; with ``return_lse`` the pair (out, lse), where lse is the natural-log
        log-sum-exp [B, Hq, L], float32 (float64 for float64 inputs). A query without any visible key gives out = 0 and
        lse = -inf, and sends no gradient. Hidden keys and values may hold anything; a visible NaN or infinity may turn all
        that sees it into NaN.

    Raises:
        TypeError: q, k, v or a mask is no tensor.
        ValueError: a wrong rank, shape, dtype, device, head_dim or option, a grid that does not fill L, a pattern that
            hides everything (not looked at while compiling), an unknown ``impl``; the message names the argument, its value
            and what was expected.
        BackendUnavailable: the backend named cannot serve these arguments.
        RuntimeError: on double backward.
    """
    if torch.compiler.is_compiling() or anchors is not None:
        pattern = grid_key(grid, causal_time, window_time, window_view, cyclic_view, anchors, include)
    else:
        pattern = _cached_grid_key(grid, causal_time, window_time, window_view, cyclic_view, include)
    views, times = grid
    if "self" not in include and not torch.compiler.is_compiling() and FramePattern.from_key(pattern).pairs == 0:
        raise ValueError(
            f"include: {tuple(include)!r} with these rules hides everything on grid {tuple(grid)}, expected at least one "
            "visible pair of frames"
        )
    return _attend(q, k, v, pattern, (views, times), layout, valid, kv_len, n_text, text_position, text_len, scale,
                   return_lse, deterministic, impl, "grid")


def frame_sparse_attention(
    q, k, v, pattern, *, layout="bhld", valid=None, kv_len=None, n_text=0, text_position="front", text_len=None,
    scale=None, return_lse=False, deterministic=None, impl=None,
):
    """Attention over frames of equal length under any frame-level pattern: the general form of :func:`grid_attention`.

    Args:
        q, k, v: as in :func:`grid_attention`, with L = n_text + F * N tokens in frame order.
        pattern: a :class:`FramePattern` of F frames (or a :class:`GridPattern`).
        valid: bool [B, F] or [F].
        kv_len: int [B, F] or [F].
        layout, n_text, text_position, text_len, scale, return_lse, deterministic, impl: as in :func:`grid_attention`.

    Returns:
        as :func:`grid_attention`.

    Raises:
        as :func:`grid_attention`, naming ``pattern`` where that names ``grid``.
    """
    if not isinstance(pattern, FramePattern):
        raise TypeError(f"pattern: {type(pattern).__name__}, expected a vidkern.FramePattern or GridPattern")
    if not torch.compiler.is_compiling() and pattern.pairs == 0 and not (n_text and pattern.text_visible):
        raise ValueError(f"pattern: hides everything ({pattern.n_frames} frames, 0 visible pairs), expected at least one")
    return _attend(q, k, v, pattern.key, (pattern.n_frames,), layout, valid, kv_len, n_text, text_position, text_len,
                   scale, return_lse, deterministic, impl, "pattern")
