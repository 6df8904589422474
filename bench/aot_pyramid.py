"""Compile what the pyramid ops launch on a GPU ahead of time, without one: ``python -m vidkern.bench.aot_pyramid`` prints registers,
spilled bytes and memory instructions of every kernel at the sizes listed here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vidkern.ops.pyramid import levels

from . import aot_launch
from .aot_launch import Built

ARCHITECTURES = (80, 90, 100)
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Case:
    """An op at a size: ``size`` is [B, C, T, H, W] of the volume."""

    op: str
    size: tuple[int, ...] = (32, 16, 1, 64, 64)
    levels: int = 2
    kind: str = "laplacian"
    pool_time: bool = False
    dtype: torch.dtype = torch.float32
    tokens: bool = False
    noise: bool = False
    masked: bool = False

    @property
    def name(self) -> str:
        """What the report and tests call it."""
        flags = [n for n in ("pool_time", "tokens", "noise", "masked") if getattr(self, n)]
        return "-".join([self.op, *map(str, self.size), f"{self.levels}{self.kind}", _NAMES[self.dtype], *flags])


# The sizes of the method's own table first (latents of 512 pixels), then every filter, layout and number of levels once.
MAIN = tuple(
    Case(op, dtype=dtype)
    for op in ("decompose", "merge", "flow_inputs", "flow_step", "flow_loss", "stage_inputs", "stage_transition")
    for dtype in (torch.float32, torch.bfloat16)
)
_VIDEO = (1, 16, 12, 60, 88)
CASES = (
    *MAIN,
    Case("flow_inputs", tokens=True),
    Case("flow_inputs", noise=True),
    Case("flow_inputs", _VIDEO, masked=True),
    Case("flow_inputs", _VIDEO, 3),
    Case("flow_inputs", _VIDEO, 2, pool_time=True),
    Case("flow_inputs", (2, 3, 8, 64, 64), 4, "haar", True),
    Case("flow_inputs", (2, 3, 8, 64, 64), 3, "dct"),
    Case("flow_inputs", (1, 16, 5, 18, 38)),
    Case("flow_step", tokens=True),
    Case("flow_loss", tokens=True, masked=True),
    Case("merge", _VIDEO, 3),
    Case("merge", _VIDEO, 2, pool_time=True),
    Case("merge", (2, 3, 8, 64, 64), 4),
    Case("merge", (2, 3, 8, 64, 64), 4, "haar", True),
    Case("merge", (2, 3, 8, 64, 64), 2, "dct", True),
    Case("merge", (2, 3, 8, 64, 64), 3, pool_time=True),
    Case("decompose", (2, 3, 8, 64, 64), 3, pool_time=True),
    Case("decompose", (2, 3, 8, 64, 64), 4, pool_time=True),
    Case("decompose", (2, 3, 8, 64, 64), 4),
    Case("stage_inputs", _VIDEO, 3),
    Case("stage_transition", (1, 16, 5, 18, 38)),
)


def _calls(case: Case) -> list[tuple[str, tuple]]:
    """The launchers of a case and their arguments, on the meta device: nothing here has memory."""
    def empty(shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def flat(dtype=case.dtype):
        return empty(levels.token_shape(sizes, patch, case.pool_time) if patch else (levels.numel(sizes),), dtype)

    x, batch, n = empty(case.size), case.size[0], case.levels
    sizes = levels.sizes_of(x, n, case.kind, case.pool_time)
    patch = [1, 2, 2] if case.tokens else []
    parts = [empty(s) for s in levels.shapes(sizes)]
    mask = empty((batch, n), torch.bool) if case.masked else None
    scale, ones = [1.0] * n, ("laplacian", case.pool_time)
    table = empty((batch, n, 4), torch.float32)
    pyramid = (sizes, case.kind, case.pool_time, scale, "triton")
    if case.op == "decompose":
        return [("decompose", ((flat(),), x, *pyramid)), ("decompose_backward", ((x,), flat(), *pyramid))]
    if case.op == "merge":
        return [("merge", ((x,), parts, *pyramid)), ("merge_backward", ((flat(),), x, *pyramid))]
    if case.op == "flow_inputs":
        noise = parts if case.noise else []
        rest = (sizes, False, n, case.kind, case.pool_time, scale)
        return [
            ("flow_inputs", ((flat(), flat()), [x], table, mask, noise, *rest, 5, 0, 0, case.dtype, patch, False, True, "triton")),
            ("flow_inputs_backward", ((x,), flat(), flat(), table, mask, case.dtype, *rest, patch, False, "triton")),
        ]
    if case.op == "flow_step":
        z, low = [p.float() for p in parts], [p.bfloat16() for p in parts]
        rest, plain = (table[..., :2], sizes, n, n), flat(torch.float32).new_empty(levels.numel(sizes))
        return [
            ("flow_step", ((plain, flat(torch.bfloat16)), z, low, low, *rest, *ones, scale, torch.bfloat16, patch, False, False, "triton")),
            ("flow_step", ((x, x.new_empty(0)), z, low, low, *rest, *ones, scale, torch.bfloat16, [], False, True, "triton")),
        ]
    if case.op == "flow_loss":
        pred = [flat()] if patch else parts
        outputs = (empty((), torch.float32), empty((batch, n), torch.float32))
        rest = (pred, pred, mask, sizes, n, patch, case.pool_time, "triton")
        return [("flow_loss", (outputs, *rest)), ("flow_loss_backward", ((flat(),), *outputs, *rest))]
    table = empty((batch, 3), torch.float32)
    if case.op == "stage_inputs":
        return [
            ("stage_inputs", ((parts[n - 2], parts[n - 2]), x, None, table, sizes, n - 2, 5, 0, 0, case.dtype, "triton")),
            ("stage_inputs_backward", ((x,), parts[n - 1], None, table, case.dtype, sizes, n - 1, "triton")),
        ]
    return [
        ("stage_transition", ((x,), parts[n - 2], None, table, sizes, 1, 5, 0, 0, "triton")),
        ("stage_transition_backward", ((parts[n - 2],), x, table, sizes, "triton")),
    ]


def launches(case: Case) -> list[tuple[Callable, tuple, dict]]:
    """(kernel, grid, arguments) of everything that a case launches."""
    from vidkern.ops.pyramid import triton as launchers

    def call():
        for name, args in _calls(case):
            getattr(launchers, name)(*args)

    return aot_launch.launches(launchers, call)


def build(case: Case, architecture: int) -> list[Built]:
    """Compile everything that a case launches, each kernel and specialisation once."""
    return aot_launch.build(launches(case), architecture)


def rows(architectures=ARCHITECTURES, cases=CASES) -> Iterator[tuple[Case, int, list[Built]]]:
    """(case, architecture, what it compiles to), one after the other."""
    for case in cases:
        for architecture in architectures:
            yield case, architecture, build(case, architecture)


def main(argv=None) -> int:
    """The command line; exit status 1 when anything spills."""
    parser = argparse.ArgumentParser(prog="python -m vidkern.bench.aot_pyramid", description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90")
    args = parser.parse_args(argv)
    spilled = 0
    for case, architecture, built in rows(args.architectures):
        for b in built:
            spilled += b.spilled
            counts = " ".join(f"{n}:{c}" for n, c in b.instructions.items())
            print(f"{case.name} sm_{architecture} {b.kernel}: {b.registers} registers, {b.spilled} bytes spilled, {counts}", flush=True)
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
