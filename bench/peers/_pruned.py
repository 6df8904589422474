"""Problems that the pruned suites share: the paper's layers, 1344 tokens of 2048 channels, packed, uneven and gathered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from ..suite import Peer


@dataclass(frozen=True)
class LayerShape:
    """``inputs`` of ``width`` channels are kept (0: x is packed), ``outputs`` of ``into`` are written (0: packed) and added to a stream.

    ``dense_in``, ``dense_out``: the layer before pruning. ``runs``: kept channels come in runs of this many; 0: two of every four.
    """

    name: str
    tokens: int
    inputs: int
    outputs: int
    dense_in: int
    dense_out: int
    width: int = 0
    into: int = 0
    runs: int = 1
    about: str = ""

    def facts(self) -> dict:
        return asdict(self)

    @property
    def stream(self) -> bool:
        return bool(self.into)


_SHAPES = (
    LayerShape("gather", 4096, 1232, 1232, 2048, 2048, 2048, 2048, about="1232 kept in and out of a stream of 2048"),
    LayerShape("gather_runs", 4096, 1232, 1232, 2048, 2048, 2048, 2048, 8, about="the same in runs of eight"),
    LayerShape("gather_95", 4096, 1944, 1944, 2048, 2048, 2048, 2048, about="five per cent pruned"),
    LayerShape("two_of_four", 4096, 1024, 2048, 2048, 2048, 2048, runs=0, about="half of the inputs, as 2:4 sparsity can have it"),
    LayerShape("qkv", 1344, 2048, 3840, 2048, 6144, about="20 of 32 heads"),
    LayerShape("qkv_irregular", 1344, 2048, 3648, 2048, 6144, about="19 heads"),
    LayerShape("out", 1344, 1280, 2048, 2048, 2048),
    LayerShape("out_irregular", 1344, 1216, 2048, 2048, 2048),
    LayerShape("up", 1344, 2048, 6144, 2048, 8192),
    LayerShape("up_irregular", 1344, 2048, 5888, 2048, 8192),
    LayerShape("down", 1344, 6144, 2048, 8192, 2048),
    LayerShape("small", 32, 48, 40, 64, 64, 64, 64, about="a call this small measures overhead"),
)
SHAPES = {s.name: s for s in _SHAPES}
BUDGET = {"cpu": 20e9}


def flops(shape: LayerShape) -> int:
    return 2 * shape.tokens * shape.inputs * shape.outputs


def scaled(shape: LayerShape, device: str) -> tuple[LayerShape, str]:
    """As many tokens as fit the device's budget; widths are never scaled."""
    budget = BUDGET.get(device)
    if budget is None or flops(shape) <= budget:
        return shape, ""
    tokens = int(shape.tokens * budget / flops(shape)) // 64 * 64
    return replace(shape, tokens=tokens), f"tokens cut to {budget / 1e9:.0f} GFLOP forward on {device}"


def kept(count: int, size: int, runs: int, seed: int) -> torch.Tensor:
    """Sorted channel numbers in aligned runs (or two of every four), int32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    if not runs:
        picks = torch.rand(size // 4, 4, generator=generator).argsort(1)[:, :2].sort(1).values
        return (picks + 4 * torch.arange(size // 4)[:, None]).flatten().to(torch.int32)
    first = torch.randperm(size // runs, generator=generator)[: count // runs].sort().values
    return (first[:, None] * runs + torch.arange(runs)).flatten().to(torch.int32)


def peer(name, build, group="torch", **more) -> Peer:
    """A peer that copies x and the result a few times."""
    memory = lambda s, itemsize, mode: 4 * s.tokens * (s.dense_in + s.dense_out) * itemsize + 3 * s.dense_in * s.dense_out * itemsize
    return Peer(name, build, group=group, memory=memory, **more)
