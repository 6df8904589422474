"""What an op hands to the bench: its problems, its peers, its reference and its targets, all as data.

One file in ``peers/`` defines one :class:`Suite`; nothing else has to know the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("fwd", "fwdbwd")


class Work(NamedTuple):
    """The work a problem needs, whoever does it: FLOPs, and the fewest bytes that must cross the memory bus."""

    flops: int
    bytes: int


@dataclass
class Problem:
    """Inputs of one measurement: ``inputs`` are positional tensors, ``grad_out`` is the gradient of the output."""

    shape: Any
    inputs: tuple[torch.Tensor, ...]
    grad_out: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.grad_out.device

    @property
    def dtype(self) -> torch.dtype:
        return self.grad_out.dtype


@dataclass
class Reference:
    """Right answers in float64. ``pick`` cuts from an output or gradient the part that ``values`` cover."""

    values: list[torch.Tensor]
    pick: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


@dataclass(frozen=True)
class Peer:
    """One way to compute the op.

    Args:
        name: as printed and as ``--peers`` takes it.
        build: ``build(problem)`` -> ``fn(*inputs) -> output``; the plan (masks, index tables) is made here, untimed.
        group: "vidkern", "torch" or the package it comes from.
        dtypes, devices, backward: what it can do.
        missing: ``missing(device)`` -> None, or why it cannot run here.
        memory: ``memory(shape, itemsize, mode)`` -> bytes it takes beyond its inputs, roughly; more than the machine has
            free means it is skipped and the record says so.
        compiles: it is compiled at first use; left out by ``--quick``.
        backend: ``backend(problem)`` -> which of its implementations serves this problem, for the record.
    """

    name: str
    build: Callable[[Problem], Callable[..., torch.Tensor]]
    group: str = "torch"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward: Callable[[str], bool] = lambda device: True
    missing: Callable[[str], str | None] = lambda device: None
    memory: Callable[[Any, int, str], int] = lambda shape, itemsize, mode: 0
    compiles: bool = False
    backend: Callable[[Problem], str] | None = None


@dataclass(frozen=True)
class Target:
    """A goal, checked against a record and reported; it never fails anything.

    Args:
        measure: "time" (peer's time / ours), "limit" (fraction of the arithmetic ceiling), "tflops" (useful TFLOP/s),
            "memory" (peer's extra memory / ours), "bytes" (our extra memory must stay below ``value(shape)``) or "error"
            (ours / peer's must stay below ``value``), "launcher" (microseconds above it, for the row named).
        against: names of peers, or a group such as "torch"; the fastest of them counts.
    """

    mode: str
    dtype: str
    measure: str
    value: float | Callable[[Any], float]
    against: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True)
class Suite:
    """Everything the bench needs to know about an op.

    Args:
        shapes: all named shapes; ``default[device]`` and ``quick`` name those that run unasked.
        scaled: ``scaled(shape, device)`` -> (shape that fits the device, the rule that was applied or "").
        problem: ``problem(shape, dtype, device)`` -> :class:`Problem`, the same bits on every call.
        reference: ``reference(problem, mode)`` -> :class:`Reference`: output first, then gradients of the inputs.
        work: ``work(shape, itemsize, mode)`` -> :class:`Work`.
        ours: what ratios refer to.
        small: the shape whose float32 forward block also measures ``overheads(device)`` -> name -> call: the cost of the
            layers above the kernel's launcher, which comes first.
        tolerance: largest error, relative to the largest right value, that still counts as computing the same thing.
    """

    op: str
    shapes: dict[str, Any]
    default: dict[str, tuple[str, ...]]
    quick: str
    scaled: Callable
    problem: Callable[..., Problem]
    reference: Callable[[Problem, str], Reference]
    work: Callable[[Any, int, str], Work]
    ours: Peer
    peers: tuple[Peer, ...]
    targets: tuple[Target, ...] = ()
    small: str | None = None
    overheads: Callable[[str], dict[str, Callable[[], Any]]] | None = None
    tolerance: dict[str, float] = field(
        default_factory=lambda: {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
    )

    @property
    def candidates(self) -> tuple[Peer, ...]:
        return (self.ours, *self.peers)


def importable(module: str) -> Callable[[str], str | None]:
    """A ``missing`` for peers that live in a package: says so when it is not installed or fails to import."""

    def missing(device: str) -> str | None:
        import importlib

        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package fails in its own ways; every one of them is a reason
            return f"import {module}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return None

    return missing
