"""Named grid-attention problems, and how each is made to fit the device.

Tokens per frame and head dim are never scaled: they set the tiling problem. Heads, views and times are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from vidkern.ops.grid_attention import cost
from vidkern.ops.grid_attention.patterns import GridPattern


@dataclass(frozen=True)
class GridShape:
    """A grid-attention problem: every query sees the frames of its own view and of its own time."""

    name: str
    heads: int
    head_dim: int
    views: int
    times: int
    tokens: int
    batch: int = 1
    about: str = ""

    @property
    def length(self) -> int:
        """Tokens of the sequence, L."""
        return self.views * self.times * self.tokens

    @property
    def keys(self) -> int:
        """Visible keys of one query, K = (V + T - 1) N."""
        return (self.views + self.times - 1) * self.tokens

    def facts(self) -> dict:
        return {**asdict(self), "length": self.length, "keys": self.keys}


def _named(*shapes: GridShape) -> dict[str, GridShape]:
    return {s.name: s for s in shapes}


GRID = _named(
    GridShape("A", 32, 128, 8, 8, 144, about="training, 29 frames, 144x256"),
    GridShape("B", 32, 128, 8, 16, 144, about="training, 61 frames, 144x256"),
    GridShape("C", 32, 128, 8, 16, 576, about="288x512, 61 frames"),
    GridShape("D", 32, 128, 8, 16, 2304, about="288x512, 61 frames, without 2x2 patches"),
    GridShape("E", 40, 128, 8, 21, 1560, about="Wan 14B, 480x832, 81 frames"),
    GridShape("F", 48, 64, 8, 13, 1350, about="CogVideoX 5B, 480x720, 49 frames"),
    GridShape("G", 12, 128, 8, 21, 1560, about="Wan 1.3B, 480x832, 81 frames"),
    GridShape("H", 4, 32, 4, 4, 64, about="tiny"),
    GridShape("cpu", 8, 64, 4, 8, 256, about="two CPU cores, a second per call for the slowest peer"),
    GridShape("small", 2, 32, 2, 2, 16, about="a call this small measures overhead"),
)

# Needed forward FLOPs of one call. On a CPU it keeps the slowest peer at seconds; a GPU takes every shape as it is.
BUDGET = {"cpu": 60e9}


def forward_flops(s: GridShape) -> int:
    """Needed FLOPs of the forward: 4 B H D (visible pairs)."""
    return cost.forward_flops(s.batch, s.heads, s.head_dim, GridPattern(s.views, s.times), s.tokens)


def scaled(shape: GridShape, device: str) -> tuple[GridShape, str]:
    """The shape that fits the device's budget, and the rule in words ("" when nothing was changed)."""
    budget = BUDGET.get(device)
    if budget is None or forward_flops(shape) <= budget:
        return shape, ""
    small = replace(shape, batch=1, heads=min(shape.heads, 2))
    while forward_flops(small) > budget and max(small.views, small.times) > 2:
        if small.times >= small.views:
            small = replace(small, times=(small.times + 1) // 2)
        else:
            small = replace(small, views=(small.views + 1) // 2)
    small = replace(small, heads=min(shape.heads, max(1, int(small.heads * budget / forward_flops(small)))))
    rule = (
        f"scaled to {budget / 1e9:.0f} GFLOP forward on {device}: batch to 1, heads to 2, then the larger of views and "
        f"times halved (not below 2), then as many heads as fit; tokens per frame and head dim kept"
    )
    return small, rule
