"""What a group of pruned layers costs, and the named sample inputs that tests and benches share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..pruned_linear import cost


def forward_flops(sizes: Sequence[tuple[int, int, int]]) -> int:
    """2 M K N of every layer."""
    return sum(cost.forward_flops(*s) for s in sizes)


def backward_flops(sizes: Sequence[tuple[int, int, int]], inner: bool = True, outer: bool = True) -> int:
    """The sum of the layers' own; ``inner``: gradients of x, ``outer``: of weights."""
    return sum(cost.backward_flops(*s, inner, outer) for s in sizes)


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``pruned_linear_grouped``: (tokens, inputs, outputs) per layer, unit normal x, weights of variance 1 / inputs."""

    name: str
    sizes: tuple[tuple[int, int, int], ...]
    act: str = "none"
    bias: bool = True

    @property
    def flops(self) -> int:
        return forward_flops(self.sizes)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> tuple[list, list, list]:
        """Lists of x, weights and biases."""
        generator = torch.Generator(device).manual_seed(seed)
        draw = lambda *shape, scale=1.0: (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
        xs = [draw(m, k) for m, k, _ in self.sizes]
        weights = [draw(n, k, scale=k**-0.5) for _, k, n in self.sizes]
        return xs, weights, [draw(n) for *_, n in self.sizes] if self.bias else []

    def call(self, xs, weights, biases, **more):
        """Run the public function on this sample."""
        import vidkern

        return vidkern.pruned_linear_grouped(xs, weights, biases or None, act=self.act, **more)


SAMPLES = (
    Sample("query_and_text", ((37, 40, 24), (11, 33, 48))),
    Sample("three_widths", ((21, 48, 32), (21, 48, 27), (21, 48, 40)), act="gelu_tanh"),
    Sample("one", ((13, 71, 19),), act="silu", bias=False),
)
