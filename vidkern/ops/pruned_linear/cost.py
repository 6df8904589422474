"""What a pruned linear layer costs, and the named sample inputs that tests and benches share."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def forward_flops(tokens: int, inputs: int, outputs: int) -> int:
    """One multiply-add per token and kept weight: 2 M K N."""
    return 2 * tokens * inputs * outputs


def backward_flops(tokens: int, inputs: int, outputs: int, inner: bool = True, outer: bool = True, again: bool = False) -> int:
    """A product for the gradient of the inputs, one for that of the weight, and one more where the pre-activation is computed
    again."""
    return (inner + outer + again) * forward_flops(tokens, inputs, outputs)


def forward_bytes(tokens: int, inputs: int, outputs: int, itemsize: int, residual: int = 0) -> int:
    """Kept inputs and weights read once, the result written, and of a residual the kept columns read (``residual``: its bytes per
    element)."""
    return (tokens * inputs + inputs * outputs + tokens * outputs) * itemsize + tokens * outputs * residual


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``pruned_linear``: unit normal x, weights of variance 1 / inputs.

    ``inputs`` of ``width`` channels are kept, ``outputs`` are the weight's rows; ``spread`` of them are written into ``into``
    channels. ``runs``: kept channels come in runs of this many.
    """

    name: str
    shape: tuple[int, ...]  # leading shape of x
    inputs: int
    outputs: int
    width: int | None = None
    into: int | None = None
    runs: int = 1
    act: str = "none"
    bias: bool = True
    gate: int = 0  # rows
    mask: int = 0  # slabs
    residual: bool = False
    wide_residual: bool = False  # float32 whatever x is
    norm: bool = False
    modulate: int = 0  # rows of scale and shift
    slab: int = 0  # un-repacked: every other slab of a weight twice as large in the two directions

    @property
    def tokens(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def flops(self) -> int:
        return forward_flops(self.tokens, self.inputs, self.outputs)

    @property
    def written(self) -> int:
        """Channels after the activation."""
        return self.outputs // 2 if self.act == "swiglu" else self.outputs

    @property
    def names(self) -> tuple[str, ...]:
        """Of the differentiable arguments, in the order of :meth:`tensors`."""
        given = {"bias": self.bias, "gate": self.gate, "mask": self.mask, "scale": self.modulate, "shift": self.modulate, "residual": self.residual}
        return ("x", "weight", *(name for name, there in given.items() if there))

    def indices(self, device="cpu") -> dict:
        """Index arguments: the last runs of every group of channels are kept, so that the first and the last are not both."""
        found = {}
        if self.width:
            found["in_index"] = _spread(self.inputs, self.width, self.runs, device)
        if self.into:
            found["out_index"] = _spread(self.written, self.into, self.runs, device)
        if self.slab:
            found |= {
                "rows": torch.arange(1, 2 * self.outputs // self.slab, 2, device=device),
                "columns": torch.arange(0, 2 * self.inputs // self.slab, 2, device=device), "slab": self.slab,
            }
        return found

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> dict[str, torch.Tensor]:
        """Differentiable arguments by name."""
        generator = torch.Generator(device).manual_seed(seed)
        times = 2 if self.slab else 1

        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(shape, generator=generator, device=device) * scale).to(to)

        found = {
            "x": draw(*self.shape, self.width or self.inputs),
            "weight": draw(times * self.outputs, times * self.inputs, scale=self.inputs**-0.5),
        }
        if self.bias:
            found["bias"] = draw(times * self.outputs)
        if self.gate:
            found["gate"] = draw(self.gate, self.written)
        if self.mask:
            found["mask"] = 1 + draw(self.mask) / 4
        if self.modulate:
            found |= {name: draw(self.modulate, self.width or self.inputs, scale=0.5) for name in ("scale", "shift")}
        if self.residual:
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            found["residual"] = draw(*self.shape, self.into or self.written, to=wide if self.wide_residual else dtype)
        return found

    def call(self, tensors: dict, **more):
        """Run the public function on this sample."""
        import vidkern

        device = tensors["x"].device
        into = {} if self.residual or not self.into else {"out_features": self.into}
        norm = {"norm": "rms"} if self.norm else {}
        return vidkern.pruned_linear(**tensors, **self.indices(device), **into, **norm, act=self.act, **more)


def _spread(kept: int, size: int, runs: int, device) -> torch.Tensor:
    """``kept`` of ``size`` channels, evenly spread runs of ``runs``, the last one included."""
    count, places = kept // runs, size // runs
    first = torch.div((torch.arange(count, device=device) + 1) * places, count, rounding_mode="floor") - 1
    return (first[:, None] * runs + torch.arange(runs, device=device)).flatten().to(torch.int32)


SAMPLES = (
    Sample("gather_scatter", (2, 19), 40, 24, width=100, into=77, residual=True),
    Sample("packed", (2, 33), 64, 48, act="gelu_tanh"),
    Sample("modulated", (2, 12), 24, 40, width=56, norm=True, modulate=2, act="silu"),
    Sample("one_token", (1, 1), 113, 7, act="gelu_tanh", gate=1),
    Sample("gated_residual", (2, 4, 10), 48, 33, gate=4, residual=True, wide_residual=True),
    Sample("pairs", (3, 17), 40, 54, act="swiglu", mask=3, gate=3),
    Sample("slabs", (1, 21), 48, 32, slab=16, act="gelu_tanh", mask=2),
    Sample("runs_into_zeros", (1, 37), 64, 32, width=160, into=96, runs=16, bias=False),
    Sample("every_part", (2, 65), 72, 46, width=113, into=59, act="swiglu", gate=2, mask=23, residual=True, norm=True, modulate=1),
    Sample("uneven", (1, 103), 135, 79, norm=True),
)
