"""Grid attention: a query sees the frames of its own view and of its own time.

Peers are what a user of torch would write today, each on the same [B, H, L, D] tensors in view-major order.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vidkern.ops.grid_attention import cost

from ..shapes import GRID, GridShape, forward_flops, scaled
from ..suite import Peer, Problem, Reference, Suite, Target, Work, importable

REFERENCE_FLOPS = 60e9  # float64 work spent on the right answer; heads are left out beyond it


def problem(shape: GridShape, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device=device).manual_seed(0)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    q, k, v, grad = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
    return Problem(shape, (q, k, v), grad)


# ---- gathers ----------------------------------------------------------------------------------------------------
def _split(x: torch.Tensor, s: GridShape) -> torch.Tensor:
    return x.unflatten(2, (s.views, s.times, s.tokens))


def _seen(x: torch.Tensor, view: int, time: int) -> torch.Tensor:
    """What frame (view, time) sees of x [B, H, V, T, N, D]: its view's run of frames, then its time in the others."""
    others = [x[:, :, u, time] for u in range(x.shape[2]) if u != view]
    return torch.cat([x[:, :, view].flatten(2, 3), *others], dim=2)


def _per_frame(attend):
    """A loop over frames: gather the visible keys and values of one frame, then ``attend(q, k, v)``."""

    def build(p: Problem):
        s = p.shape

        def run(q, k, v):
            q, k, v = (_split(x, s) for x in (q, k, v))
            frames = [(a, b) for a in range(s.views) for b in range(s.times)]
            return torch.cat([attend(q[:, :, a, b], _seen(k, a, b), _seen(v, a, b)) for a, b in frames], dim=2)

        return run

    return build


def _matmul_softmax(q, k, v):
    # Scaling q rather than the logits is cheaper, and torch.compile does not take it for SDPA and put that in its place.
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1) @ v


def _zentorch_sdpa(q, k, v):
    return torch.ops.zentorch.zentorch_sdpa(q, k, v)[0]


def _batched_gather(p: Problem):
    """All frames at once: K and V are copied V + T - 1 times and one batched call does the rest."""
    s = p.shape
    token = torch.arange(s.length, device=p.device).view(1, 1, s.views, s.times, s.tokens, 1)
    frames = [_seen(token, a, b).flatten() for a in range(s.views) for b in range(s.times)]
    index = torch.cat(frames)

    def run(q, k, v):
        def gather(x):
            return x.index_select(2, index).view(s.batch, s.heads * len(frames), s.keys, s.head_dim)

        q = q.reshape(s.batch, s.heads * len(frames), s.tokens, s.head_dim)
        return sdpa(q, gather(k), gather(v)).view(s.batch, s.heads, s.length, s.head_dim)

    return run


def _compiled_gather(p: Problem):
    return torch.compile(_per_frame(_matmul_softmax)(p), dynamic=False)


# ---- masks ------------------------------------------------------------------------------------------------------
def _dense_mask(p: Problem):
    s = p.shape
    token = torch.arange(s.length, device=p.device) // s.tokens
    view, time = token // s.times, token % s.times
    mask = (view[:, None] == view) | (time[:, None] == time)
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask)


def _flex(block: int):
    def build(p: Problem):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        s = p.shape
        row = s.times * s.tokens

        def visible(b, h, i, j):
            return (i // row == j // row) | ((i // s.tokens) % s.times == (j // s.tokens) % s.times)

        make = create_block_mask if s.length <= 16384 else torch.compile(create_block_mask)
        mask = make(visible, None, None, s.length, s.length, device=str(p.device), BLOCK_SIZE=block)
        # A compiled flex_attention that meets an earlier failure runs unfused, 20 times slower, and only warns.
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        # Its own tiles are up to 128 wide and have to divide the mask's blocks.
        tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = dict.fromkeys(tiles, block) if block < 128 and p.device.type == "cuda" else None

        def run(q, k, v):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*flex_attention called without torch.compile.*")
                return compiled(q, k, v, block_mask=mask, kernel_options=options)

        return run

    return build


# ---- three dense calls --------------------------------------------------------------------------------------------
def _dense_forward(q, k, v):
    """Dense attention with its log-sum-exp, and what the backward of the same kernel wants besides."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse, ()
    out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse, tuple(rest[:6])


def _dense_backward(grad, q, k, v, out, lse, rest):
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    lengths, state = rest[:4], rest[4:]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, False, *state
    )


def _cudnn_forward(q, k, v):
    """The same by cuDNN, which is the fastest dense attention that torch itself has on Hopper."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.reshape(out.shape[:3]), ()


def three_dense(p: Problem, dense_forward=_dense_forward):
    """Inclusion and exclusion: same view + same time - own frame, each dense, merged by log-sum-exp.

    The backward hands each dense backward the merged output and log-sum-exp: its probabilities are then the right ones,
    and the three gradients add up with the signs +, +, -.
    """
    s = p.shape
    b, h, v, t, n = s.batch, s.heads, s.views, s.times, s.tokens

    def by_view(x):
        return x.reshape(b, h * v, t * n, *x.shape[3:])

    def by_time(x):
        return x.unflatten(2, (v, t, n)).transpose(2, 3).reshape(b, h * t, v * n, *x.shape[3:])

    def from_time(x):
        return x.unflatten(1, (h, t)).unflatten(3, (v, n)).transpose(2, 3).reshape(b, h, v * t * n, *x.shape[3:])

    def by_frame(x):
        return x.reshape(b, h * v * t, n, *x.shape[3:])

    def whole(x):
        return x.reshape(b, h, v * t * n, *x.shape[3:])

    parts = ((by_view, whole, 1), (by_time, from_time, 1), (by_frame, whole, -1))

    class ThreeDense(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            done = [dense_forward(*(to(x) for x in (q, k, v))) for to, _, _ in parts]
            lses = [back(lse) for (_, lse, _), (_, back, _) in zip(done, parts)]
            top = torch.maximum(lses[0], lses[1])
            weights = [sign * torch.exp(lse - top) for lse, (_, _, sign) in zip(lses, parts)]
            total = weights[0] + weights[1] + weights[2]
            out = sum((w / total).unsqueeze(-1) * back(o) for w, (o, _, _), (_, back, _) in zip(weights, done, parts))
            out = out.to(q.dtype)
            ctx.save_for_backward(q, k, v, out, top + torch.log(total))
            ctx.rests = [rest for _, _, rest in done]
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, lse = ctx.saved_tensors
            sums = None
            for (to, back, sign), rest in zip(parts, ctx.rests):
                grads = _dense_backward(*(to(x) for x in (grad, q, k, v, out)), to(lse).contiguous(), rest)
                grads = [back(g) for g in grads]
                sums = grads if sums is None else [torch.add(a, g, alpha=sign) for a, g in zip(sums, grads)]
            return tuple(sums)

    return ThreeDense.apply


# ---- ours and the right answer --------------------------------------------------------------------------------------
def _vidkern(p: Problem):
    import vidkern

    grid = (p.shape.views, p.shape.times)
    return lambda q, k, v: vidkern.grid_attention(q, k, v, grid=grid)


def _backend(p: Problem) -> str:
    import vidkern

    return vidkern.explain(vidkern.grid_attention, *p.inputs, grid=(p.shape.views, p.shape.times)).chosen


def work(s: GridShape, itemsize: int, mode: str) -> Work:
    """Needed work, from the op's own formulas; a backward costs 2.5 forwards."""
    tensors = (s.batch, s.heads, s.heads, s.length, s.head_dim, itemsize)
    forward = Work(forward_flops(s), cost.forward_bytes(*tensors))
    if mode == "fwd":
        return forward
    return Work(int(3.5 * forward.flops), forward.bytes + cost.backward_bytes(*tensors))


def reference(p: Problem, mode: str) -> Reference:
    """The gather in float64. Heads are independent: where all of them would take too long, the first and last stand in."""
    s = p.shape
    heads = range(s.heads)
    if forward_flops(s) > REFERENCE_FLOPS and s.heads > 2:
        heads = (0, s.heads - 1)

    def pick(x):
        return x[:, list(heads)]

    values = []
    for head in heads:  # a head and a frame at a time: float64 probabilities then take less memory than the peers do
        q, k, v = (x[:, head : head + 1].double().requires_grad_(mode == "fwdbwd") for x in p.inputs)
        grad = _split(p.grad_out[:, head : head + 1].double(), s)
        frames = []
        for a in range(s.views):
            for b in range(s.times):
                out = _matmul_softmax(*(_split(q, s)[:, :, a, b], *(_seen(_split(x, s), a, b) for x in (k, v))))
                if mode == "fwdbwd":
                    out.backward(grad[:, :, a, b])
                frames.append(out.detach())
        values.append((torch.cat(frames, dim=2), *(x.grad for x in (q, k, v) if x.grad is not None)))
    return Reference([torch.cat(parts, dim=1) for parts in zip(*values)], pick)


# ---- memory, roughly: what each takes beyond its inputs -----------------------------------------------------------
def _tensor(s: GridShape, itemsize: int) -> int:
    return s.batch * s.heads * s.length * s.head_dim * itemsize


def _gather_memory(s: GridShape, itemsize: int, mode: str) -> int:
    one = 2 * s.batch * s.heads * s.keys * s.head_dim * itemsize
    return 2 * _tensor(s, itemsize) + one * (2 if mode == "fwd" else s.views * s.times)


def _matmul_memory(s: GridShape, itemsize: int, mode: str) -> int:
    scores = s.batch * s.heads * s.tokens * s.keys * itemsize
    kept = 3 if mode == "fwd" else 3 + s.views * s.times
    return _gather_memory(s, itemsize, mode) + kept * scores


def _batched_memory(s: GridShape, itemsize: int, mode: str) -> int:
    copies = 2 * s.views * s.times * s.batch * s.heads * s.keys * s.head_dim * itemsize
    return 2 * _tensor(s, itemsize) + copies * (1 if mode == "fwd" else 3)


def _mask_memory(s: GridShape, itemsize: int, mode: str) -> int:
    return s.length**2 * (1 + itemsize) + _tensor(s, itemsize) * (2 if mode == "fwd" else 8)


def _flex_memory(s: GridShape, itemsize: int, mode: str) -> int:
    build = s.length**2 if s.length <= 16384 else 0
    return build + _tensor(s, itemsize) * (2 if mode == "fwd" else 8)


def _three_memory(s: GridShape, itemsize: int, mode: str) -> int:
    return _tensor(s, itemsize) * (10 if mode == "fwd" else 20) + 3 * _tensor(s, 4)


def _cuda_only(device: str) -> bool:
    return device == "cuda"


FAST = ("float32", "bfloat16")
DENSE_MASK = Peer("SDPA, dense bool mask", _dense_mask, memory=_mask_memory)
GATHER_SDPA = Peer("gather: SDPA per frame", _per_frame(sdpa), memory=_gather_memory)
COMPILED = Peer("gather: torch.compile", _compiled_gather, memory=_matmul_memory, compiles=True)
ZENTORCH = Peer(
    "gather: zentorch_sdpa",
    _per_frame(_zentorch_sdpa),
    group="zentorch",
    dtypes=FAST,
    devices=("cpu",),
    backward=lambda device: False,
    missing=importable("zentorch"),  # adds its own ops and changes none of torch's: it may share the process
    memory=_gather_memory,
)
PEERS = (
    DENSE_MASK,
    GATHER_SDPA,
    Peer("gather: one batched SDPA", _batched_gather, memory=_batched_memory),
    Peer("gather: matmul, softmax, matmul", _per_frame(_matmul_softmax), memory=_matmul_memory),
    COMPILED,
    Peer("FlexAttention, block 128", _flex(128), backward=_cuda_only, memory=_flex_memory, compiles=True),
    Peer("FlexAttention, block 64", _flex(64), devices=("cuda",), memory=_flex_memory, compiles=True),
    Peer("three dense calls merged", three_dense, memory=_three_memory),
    Peer(
        "three dense calls merged, cuDNN", lambda p: three_dense(p, _cudnn_forward), devices=("cuda",), dtypes=("bfloat16", "float16"),
        backward=lambda device: False, memory=_three_memory,
    ),
    ZENTORCH,
)
FLEX = ("FlexAttention, block 128", "FlexAttention, block 64")
THREE = ("three dense calls merged", "three dense calls merged, cuDNN")


def _no_square(s: GridShape) -> int:
    """Bytes below which no L x L table of any kind can have been made."""
    return s.length**2


def _targets():
    cpu = {"shapes": ("cpu",)}
    yield Target("fwd", "float32", "limit", 0.60, **cpu)
    yield Target("fwd", "float32", "time", 1.7, ("torch",), **cpu)
    yield Target("fwd", "float32", "time", 1.2, (ZENTORCH.name,), **cpu)
    yield Target("fwd", "bfloat16", "limit", 0.55, **cpu)
    yield Target("fwd", "bfloat16", "time", 1.3, (ZENTORCH.name,), **cpu)
    yield Target("fwd", "bfloat16", "error", 1.0, (ZENTORCH.name,), **cpu)
    yield Target("fwdbwd", "float32", "time", 2.0, ("torch",), **cpu)
    yield Target("fwdbwd", "bfloat16", "time", 1.3, (COMPILED.name,), **cpu)
    yield Target("fwdbwd", "bfloat16", "time", 4.0, (GATHER_SDPA.name,), **cpu)
    yield Target("fwdbwd", "bfloat16", "error", 1.0, (GATHER_SDPA.name,), **cpu)
    for dtype in FAST:
        yield Target("fwd", dtype, "bytes", _no_square, **cpu)
        yield Target("fwdbwd", dtype, "memory", 5.0, ("torch",), **cpu)
        for mode in ("fwd", "fwdbwd"):
            yield Target(mode, dtype, "time", 1 / 1.2, (DENSE_MASK.name,), shapes=("small", "H"))
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    for shapes, forward, both in ((("C", "D", "E"), 560, 452), (("A", "B"), 400, 323), (("F",), 450, 357)):
        # Forward and backward together take 2 + 5 parts of work at the two rates asked for: 420, 300 and 330 backward.
        yield Target("fwd", measure="tflops", value=forward, shapes=shapes, **gpu)
        yield Target("fwdbwd", measure="tflops", value=both, shapes=shapes, **gpu)
    for calls, microseconds in (("registered op", 5.0), ("registered op, gradients", 12.0)):
        yield Target("fwd", "float32", "launcher", microseconds, (calls,), shapes=("small",))
    large = ("A", "B", "C", "D", "E", "F")
    yield Target("fwd", measure="time", value=1.7, against=FLEX, shapes=large, **gpu)
    yield Target("fwdbwd", measure="time", value=1.84, against=FLEX, shapes=large, **gpu)
    yield Target("fwd", measure="time", value=1.8, against=THREE, shapes=large, **gpu)


def overheads(device: str):
    """One frame of eight tokens: the kernel's own work is next to nothing, the layers above it are what is left."""
    import vidkern

    q, k, v = (torch.randn(1, 1, 8, 8, device=device) for _ in range(3))
    if device != "cpu" or vidkern.explain(vidkern.grid_attention, q, k, v, grid=(1, 1)).chosen != "cpu":
        return {}
    from vidkern.ops.grid_attention import cpu

    pattern = vidkern.GridPattern(1, 1)
    fixed = {"pattern": pattern, "frame_len": 8, "n_text": 0, "text_front": True, "scale": 1 / math.sqrt(8)}

    def launcher():
        out, lse = torch.empty(1, 1, 8, 8), torch.empty(1, 1, 8)
        cpu.forward(q, k, v, None, None, None, out=out, lse=lse, **fixed)

    op = torch.ops.vidkern.grid_attention
    rest = (None, None, None, 8, 0, True, fixed["scale"], False, False, pattern.key, "cpu")
    tracked = [x.clone().requires_grad_() for x in (q, k, v)]
    return {
        "launcher": launcher,
        "registered op": lambda: op(q, k, v, *rest),
        "registered op, gradients": lambda: op(*tracked, *rest),
        "public function": lambda: vidkern.grid_attention(q, k, v, grid=(1, 1)),
        "public function, gradients": lambda: vidkern.grid_attention(*tracked, grid=(1, 1)),
    }


SUITE = Suite(
    op="grid_attention",
    shapes=GRID,
    default={"cpu": ("cpu", "H", "small"), "cuda": ("A", "B", "C", "E", "F")},
    quick="H",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=Peer("vidkern", _vidkern, group="vidkern", memory=_three_memory, backend=_backend),
    peers=PEERS,
    targets=tuple(_targets()),
    small="small",
    overheads=overheads,
)
