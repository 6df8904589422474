"""Attention motion flow: the expected displacement of every patch towards another frame, for all ordered pairs of frames.

Peers are what a user of torch would write today; each gives the flow [1, maps, F * F, S, 2] in float32 from q and k [1, H, N, D]. One
map per head, or one of the logits averaged over the heads (which is one head of width H * D).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vidkern.ops.attention_motion_flow import cost

from ..suite import Peer, Problem, Reference, Suite, Target, Work, importable

TAU = 2.0


@dataclass(frozen=True)
class FlowShape:
    """``frames`` of ``height`` x ``width`` patches; ``joined``: one map of all heads, else one for each."""

    name: str
    heads: int
    head_dim: int
    frames: int
    height: int
    width: int
    joined: bool = True
    about: str = ""

    @property
    def size(self) -> int:
        """Tokens of a frame, S."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """Tokens of the video, N."""
        return self.frames * self.size

    @property
    def maps(self) -> int:
        return 1 if self.joined else self.heads

    @property
    def channels(self) -> int:
        """Channels of a logit."""
        return self.head_dim * (self.heads if self.joined else 1)

    @property
    def scale(self) -> float:
        """Factor on the summed logits."""
        return TAU / math.sqrt(self.head_dim) / (self.heads if self.joined else 1)

    def facts(self) -> dict:
        return {**asdict(self), "length": self.length}


SHAPES = {
    s.name: s
    for s in (
        FlowShape("cpu", 8, 64, 8, 20, 24, joined=False, about="8 frames of 320x384, a map per head"),
        FlowShape("cpu-joined", 8, 64, 8, 20, 24, about="the same, one map"),
        FlowShape("2b", 30, 64, 6, 30, 45, about="CogVideoX 2B, 24 frames 480x720"),
        FlowShape("5b", 48, 64, 6, 30, 45, about="CogVideoX 5B, 24 frames 480x720"),
        FlowShape("5b-49", 48, 64, 13, 30, 45, about="CogVideoX 5B, 49 frames 480x720"),
        FlowShape("wan", 12, 128, 21, 30, 52, about="Wan 1.3B, 81 frames 480x832"),
        FlowShape("small", 2, 32, 2, 4, 5, about="a call this small measures overhead"),
    )
}
BUDGET = {"cpu": 35e9}  # forward FLOPs: seconds for the slowest peer


def forward_flops(s: FlowShape) -> int:
    return cost.forward_flops(s.maps, s.frames**2, s.size, s.channels)


def scaled(shape: FlowShape, device: str) -> tuple[FlowShape, str]:
    """Tokens per frame and head dim stay; heads, then frames shrink."""
    budget, small = BUDGET.get(device), shape
    while budget and forward_flops(small) > budget:
        small = replace(small, heads=small.heads - 1) if small.heads > 4 else replace(small, frames=small.frames - 1)
    changed = f"heads {shape.heads} -> {small.heads}, frames {shape.frames} -> {small.frames}: {budget:.0e} FLOP on {device}" if budget else ""
    return small, changed if small != shape else ""


def problem(shape: FlowShape, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device=device).manual_seed(0)
    size = (1, shape.heads, shape.length, shape.head_dim)
    # Averaged over H heads logits are sqrt(H) times smaller: a wider spread keeps the maps as peaked as a head's.
    spread = shape.heads**0.25 if shape.joined else 1.0
    q, k = ((spread * torch.randn(size, generator=generator, device=device)).to(dtype) for _ in range(2))
    grad = torch.randn(1, shape.maps, shape.frames**2, shape.size, 2, generator=generator, device=device)
    return Problem(shape, (q, k), grad)


def _places(s: FlowShape, device, dtype=torch.float32) -> torch.Tensor:
    at = torch.arange(s.size, device=device)
    return torch.stack([at % s.width, torch.div(at, s.width, rounding_mode="floor")], -1).to(dtype)


def _maps(s: FlowShape, x: torch.Tensor) -> torch.Tensor:
    """[1, maps, N, channels]: heads side by side where their logits are averaged, which is the same thing."""
    return x.transpose(1, 2).flatten(2)[:, None] if s.joined else x


# ---- plain torch ------------------------------------------------------------------------------------------------------
def _everything(p: Problem):
    """As it is published: all logits of all heads, averaged, a softmax per target frame, the coordinates."""
    s, own = p.shape, _places(p.shape, p.device)

    def run(q, k):
        logits = q @ k.transpose(-1, -2) * (TAU / math.sqrt(s.head_dim))
        logits = logits.mean(1, keepdim=True) if s.joined else logits
        prob = logits.float().unflatten(-1, (s.frames, s.size)).softmax(-1)
        flow = (prob @ own).unflatten(2, (s.frames, s.size)).transpose(3, 4)
        return flow.flatten(2, 3) - own

    return run


def _loop(attend, slices):
    """One query frame at a time against ``slices`` of key frames at a time."""

    def build(p: Problem):
        s, own = p.shape, _places(p.shape, p.device)

        def run(q, k):
            q, k = (_maps(s, x).unflatten(2, (s.frames, s.size)) for x in (q, k))
            step = s.frames if slices == "all" else 1
            flows = [
                attend(q[:, :, i], k[:, :, j : j + step].flatten(2, 3), own, s) for i in range(s.frames)
                for j in range(0, s.frames, step)
            ]  # fmt: skip
            return torch.cat(flows, 2) - own

        return run

    return build


def _softmax_frames(q, k, own, s):
    """Flows towards the frames of k: [1, maps, frames of k, S, 2]."""
    logits = (q @ k.transpose(-1, -2)).float() * s.scale
    return (logits.unflatten(-1, (-1, s.size)).softmax(-1) @ own).transpose(2, 3)


def _compiled(p: Problem):
    return torch.compile(_loop(_softmax_frames, "all")(p), dynamic=False)


# ---- fused attention with coordinates as values -------------------------------------------------------------------------
def _as_values(attend):
    """The target frames as a batch axis, coordinates padded to the width of a key, ``attend(q, k, v, scale)``."""

    def build(p: Problem):
        s, own = p.shape, _places(p.shape, p.device)

        def run(q, k):
            q, k = (_maps(s, x)[0] for x in (q, k))
            values = F.pad(own, (0, s.channels - 2)).to(q.dtype).expand(s.frames, s.maps, -1, -1)
            keys = k.unflatten(1, (s.frames, s.size)).transpose(0, 1)
            out = attend(q.expand(s.frames, *q.shape), keys, values, s.scale)[..., :2].float()
            flow = out.unflatten(2, (s.frames, s.size)).permute(1, 2, 0, 3, 4).flatten(1, 2)[None]
            return flow - own

        return run

    return build


def _zentorch(q, k, v, scale):
    return torch.ops.zentorch.zentorch_sdpa((q * (scale * math.sqrt(q.shape[-1]))).contiguous(), k.contiguous(), v.contiguous())[0]


def _flex(p: Problem):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q, k, v, scale):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*flex_attention called without torch.compile.*")
            return compiled(q.contiguous(), k.contiguous(), v.contiguous(), scale=scale)

    return _as_values(attend)(p)


# ---- ours and the right answer --------------------------------------------------------------------------------------
def _options(s: FlowShape) -> dict:
    return {"grid": (s.frames, s.height, s.width), "tau": TAU, "heads": "logit_mean" if s.joined else "none"}


def _vidkern(p: Problem):
    import vidkern

    s = p.shape
    return lambda q, k: vidkern.attention_motion_flow(q, k, **_options(s)).view(1, s.maps, s.frames**2, s.size, 2)


def _backend(p: Problem) -> str:
    import vidkern

    return vidkern.explain(vidkern.attention_motion_flow, *p.inputs, **_options(p.shape)).chosen


def work(s: FlowShape, itemsize: int, mode: str) -> Work:
    sizes = (s.maps, s.frames**2, s.size, s.channels)
    bytes_of = (s.maps, s.frames**2, s.frames, s.size, s.channels, itemsize)
    forward = Work(cost.forward_flops(*sizes), cost.forward_bytes(*bytes_of))
    if mode == "fwd":
        return forward
    return Work(forward.flops + cost.backward_flops(*sizes), forward.bytes + cost.backward_bytes(*bytes_of))


def reference(p: Problem, mode: str) -> Reference:
    """The loop over query frames in float64, a map at a time. Of many maps, which are independent, the first and the last."""
    s = p.shape
    if s.joined:
        inputs = [x.double().requires_grad_(mode == "fwdbwd") for x in p.inputs]
        heads, pick = range(1), lambda x: x
    else:
        inputs, heads = p.inputs, (0, s.heads - 1)
        pick = lambda x: x[:, list(heads)]  # noqa: E731
    parts = []
    for h in heads:
        q, k = inputs if s.joined else (x[:, h : h + 1].double().requires_grad_(mode == "fwdbwd") for x in inputs)
        one, grad = replace(s, heads=s.heads if s.joined else 1), p.grad_out[:, h : h + 1].double()
        own = _places(s, p.device, torch.float64)
        qs, ks = (_maps(one, x).unflatten(2, (s.frames, s.size)) for x in (q, k))
        flows = []
        for i in range(s.frames):
            for j in range(s.frames):
                prob = ((qs[:, :, i] @ ks[:, :, j].transpose(-1, -2)) * s.scale).softmax(-1)
                flows.append(prob @ own - own)
        flow = torch.stack(flows, 2)
        parts.append((flow.detach(), *(torch.autograd.grad(flow, (q, k), grad) if mode == "fwdbwd" else ())))
    return Reference([torch.cat(tensors, 1) for tensors in zip(*parts)], pick)


# ---- memory, roughly: what each takes beyond its inputs -----------------------------------------------------------------
def _ours_memory(s: FlowShape, itemsize: int, mode: str) -> int:
    return (32 << 20) + 4 * s.heads * s.length * s.head_dim * 4


def _everything_memory(s: FlowShape, itemsize: int, mode: str) -> int:
    return s.length**2 * (2 * s.heads * itemsize + 3 * s.maps * 4) * (1 if mode == "fwd" else 2)


def _loop_memory(s: FlowShape, itemsize: int, mode: str) -> int:
    return 3 * s.maps * s.length * 4 * (s.size if mode == "fwd" else 2 * s.length)


def _values_memory(s: FlowShape, itemsize: int, mode: str) -> int:
    return s.frames * s.maps * s.length * s.channels * itemsize * (2 if mode == "fwd" else 5)


def _cuda_only(device: str) -> bool:
    return device == "cuda"


FAST = ("float32", "bfloat16")
EAGER = Peer("all logits", _everything, memory=_everything_memory)
VALUES = Peer("SDPA, coordinates as values", _as_values(lambda q, k, v, scale: sdpa(q, k, v, scale=scale)), memory=_values_memory)
ZENTORCH = Peer(
    "zentorch_sdpa, coordinates as values", _as_values(_zentorch), group="zentorch", dtypes=FAST, devices=("cpu",),
    backward=lambda device: False, missing=importable("zentorch"), memory=_values_memory,
)  # fmt: skip
PEERS = (
    EAGER,
    Peer("a query frame at a time", _loop(_softmax_frames, "all"), memory=_loop_memory),
    Peer("a pair of frames at a time", _loop(_softmax_frames, "one"), memory=_loop_memory),
    Peer("a query frame at a time: torch.compile", _compiled, memory=_loop_memory, compiles=True),
    VALUES,
    Peer("FlexAttention, coordinates as values", _flex, backward=_cuda_only, memory=_values_memory, compiles=True),
    ZENTORCH,
)


def _targets():
    cpu = {"shapes": ("cpu",)}
    yield Target("fwd", "float32", "time", 3.0, (VALUES.name,), **cpu)
    yield Target("fwd", "bfloat16", "time", 2.0, (ZENTORCH.name,), **cpu)
    yield Target("fwdbwd", "float32", "time", 3.0, ("torch",), **cpu)
    yield Target("fwdbwd", "bfloat16", "time", 1.8, ("torch",), **cpu)
    for dtype in FAST:
        for mode in ("fwd", "fwdbwd"):
            yield Target(mode, dtype, "memory", 10.0, (EAGER.name,), shapes=("cpu", "cpu-joined"))
            yield Target(mode, dtype, "time", 1 / 1.2, (EAGER.name,), shapes=("small",))
    for mode in ("fwd", "fwdbwd"):
        yield Target(mode, "bfloat16", "time", 5.0, (EAGER.name,), shapes=("2b", "5b"), device="cuda")
        yield Target(mode, "bfloat16", "memory", 100.0, (EAGER.name,), shapes=("2b", "5b"), device="cuda")


def overheads(device: str):
    """Two frames of one patch: the kernel's own work is next to nothing, the layers above it are what is left."""
    import vidkern

    q, k = (torch.randn(1, 1, 2, 8, device=device) for _ in range(2))
    call = lambda q, k: vidkern.attention_motion_flow(q, k, grid=(2, 1, 1))  # noqa: E731
    if device != "cpu" or vidkern.explain(call, q, k).chosen != "cpu":
        return {}
    from vidkern.ops.attention_motion_flow import MEAN, cpu
    from vidkern.ops.attention_motion_flow.pairs import pairs_of

    def launcher():
        mean, lse = torch.empty(1, 1, 4, 1, 2), torch.empty(1, 1, 4, 1)
        cpu.forward(
            q[:, None], k[:, None], pairs_of("all", 2), grid=(2, 1, 1), scale=0.5, mean=mean, index=None, lse=lse, top=None,
            entropy=None,
        )  # fmt: skip

    op = torch.ops.vidkern.attention_motion_flow
    rest = ("all", 2, 1, 1, 0.5, MEAN, "cpu")
    tracked = [x.clone().requires_grad_() for x in (q, k)]
    return {
        "launcher": launcher,
        "registered op": lambda: op(q[:, None], k[:, None], *rest),
        "registered op, gradients": lambda: op(tracked[0][:, None], tracked[1][:, None], *rest),
        "public function": lambda: call(q, k),
        "public function, gradients": lambda: call(*tracked),
    }


SUITE = Suite(
    op="attention_motion_flow",
    shapes=SHAPES,
    default={"cpu": ("cpu", "cpu-joined", "5b", "small"), "cuda": ("2b", "5b", "5b-49", "wan")},
    quick="small",
    scaled=scaled,
    problem=problem,
    reference=reference,
    work=work,
    ours=Peer("vidkern", _vidkern, group="vidkern", memory=_ours_memory, backend=_backend),
    peers=PEERS,
    targets=tuple(_targets()),
    small="small",
    overheads=overheads,
)
