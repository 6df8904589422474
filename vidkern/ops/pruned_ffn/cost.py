"""What a tiled feed-forward network costs, and the named sample inputs that tests and benches share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def forward_flops(tokens: int, inputs: int, hidden: int, outputs: int, pairs: bool = False) -> int:
    """Two products: 2 M F (d_in + d_out), and d_in twice where hidden channels are pairs."""
    return 2 * tokens * hidden * (inputs * (2 if pairs else 1) + outputs)


def backward_flops(tokens: int, inputs: int, hidden: int, outputs: int, pairs: bool = False, inner=True, outer=True, gate=False) -> int:
    """The first product again (with a gate both), dZ, and per product the gradients of weight and input."""
    first = 2 * tokens * hidden * inputs * (2 if pairs else 1)
    second = 2 * tokens * hidden * outputs
    return (1 + bool(inner) + bool(outer)) * first + (1 + bool(outer) + bool(gate)) * second


def forward_bytes(tokens: int, inputs: int, hidden: int, outputs: int, itemsize: int, pairs: bool = False, residual: int = 0) -> int:
    """x and the weights read once, the result written, a residual of ``residual`` bytes an element read; no hidden tensor."""
    weights = hidden * (inputs * (2 if pairs else 1) + outputs)
    return (tokens * (inputs + outputs) + weights) * itemsize + tokens * outputs * residual


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``pruned_ffn``; ``hidden`` channels are kept, every other slab of twice as many with ``slab``."""

    name: str
    shape: tuple[int, ...]
    inputs: int
    hidden: int
    tile: int
    outputs: int | None = None
    act: str = "gelu_tanh"
    bias: bool = True
    gate: int = 0
    mask: int = 0
    residual: bool = False
    wide_residual: bool = False
    norm: bool = False
    modulate: int = 0
    slab: int = 0

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def sizes(self) -> tuple:
        return self.tokens, self.inputs, self.hidden, self.outputs or self.inputs, self.act == "swiglu"

    @property
    def flops(self) -> int:
        return forward_flops(*self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the differentiable arguments, in the order of :meth:`tensors`."""
        given = {
            "b1": self.bias, "b2": self.bias, "gate": self.gate, "mask": self.mask, "scale": self.modulate, "shift": self.modulate,
            "residual": self.residual,
        }  # fmt: skip
        return ("x", "w1", "w2", *(name for name, there in given.items() if there))

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> dict[str, torch.Tensor]:
        """Differentiable arguments by name."""
        generator = torch.Generator(device).manual_seed(seed)
        hidden, outputs = self.hidden * (2 if self.slab else 1), self.outputs or self.inputs

        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(shape, generator=generator, device=device) * scale).to(to)

        rows = hidden * (2 if self.act == "swiglu" else 1)
        found = {
            "x": draw(*self.shape, self.inputs),
            "w1": draw(rows, self.inputs, scale=self.inputs**-0.5),
            "w2": draw(outputs, hidden, scale=self.hidden**-0.5),
        }
        if self.bias:
            found |= {"b1": draw(rows), "b2": draw(outputs)}
        if self.gate:
            found["gate"] = draw(self.gate, outputs)
        if self.mask:
            found["mask"] = 1 + draw(self.mask) / 4
        if self.modulate:
            found |= {name: draw(self.modulate, self.inputs, scale=0.5) for name in ("scale", "shift")}
        if self.residual:
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            found["residual"] = draw(*self.shape, outputs, to=wide if self.wide_residual else dtype)
        return found

    def call(self, tensors: dict, **more):
        """Run the public function on this sample."""
        import vidkern

        device = tensors["x"].device
        slabs = {"keep": torch.arange(0, 2 * self.hidden // self.slab, 2, device=device), "slab": self.slab} if self.slab else {}
        norm = {"norm": "rms"} if self.norm else {}
        tensors = {"b1": None, "b2": None} | dict(tensors)
        first = [tensors.pop(n) for n in ("x", "w1", "b1", "w2", "b2")]
        return vidkern.pruned_ffn(*first, **tensors, **slabs, **norm, tile=self.tile, act=self.act, **more)


SAMPLES = (
    Sample("two_tiles", (2, 19), 40, 64, 32),
    Sample("short_last_tile", (1, 33), 24, 83, 32, act="silu", gate=1, residual=True),
    Sample("one_tile", (2, 12), 32, 48, 768, bias=False),
    Sample("modulated", (2, 4, 10), 40, 96, 40, gate=4, residual=True, wide_residual=True, norm=True, modulate=2),
    Sample("pairs", (3, 17), 33, 54, 32, outputs=21, act="swiglu", mask=3),
    Sample("slabs", (1, 21), 24, 64, 32, slab=16, mask=4, gate=1),
    Sample("slabs_of_pairs", (1, 37), 24, 48, 32, slab=16, act="swiglu", norm=True, residual=True),
)
