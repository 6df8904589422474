"""Compile what the pyramid ops launch on a GPU ahead of time, without one: ``python -m vidkern.bench.aot_pyramid`` prints registers,
spilled bytes and memory instructions of every kernel at the sizes listed here."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from vidkern.ops.pyramid import levels

from .aot import _tool

ARCHITECTURES = (80, 90, 100)
WARPS = 4
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


class _Recorder:
    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        return lambda *args, **given: self.log.append((self.kernel, grid, dict(zip(self.kernel.arg_names, args)) | given))


def launches(case: Case) -> list[tuple[Callable, tuple, dict]]:
    """(kernel, grid, arguments) of everything that a case launches."""
    from vidkern.ops.pyramid import triton as launchers

    log = []
    kernels = {n: _Recorder(k, log) for n, k in vars(launchers).items() if n.endswith("_kernel")}
    with mock.patch.multiple(launchers, **kernels):
        for name, args in _calls(case):
            getattr(launchers, name)(*args)
    return log


def _described(value, path, special, constants, attributes):
    """Type of an argument as Triton's launcher would specialise it."""
    if isinstance(value, tuple):
        return tuple(_described(v, (*path, i), True, constants, attributes) for i, v in enumerate(value))
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_NAMES[value.dtype]}"
    if value == 1 and special:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0 and special:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(kernel, arguments: dict, architecture: int):
    """The compiled kernel of a launch, every tensor aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", arguments[name]
        else:
            signature[name] = _described(arguments[name], (i,), not parameter.do_not_specialize, constants, attributes)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": WARPS})


@dataclass(frozen=True)
class Built:
    """Registers per thread, bytes spilled per thread, and how often each load and store stands in the machine code."""

    kernel: str
    registers: int
    spilled: int
    instructions: dict[str, int]


def build(case: Case, architecture: int) -> list[Built]:
    """Compile everything that a case launches, each kernel and specialisation once."""
    result, seen = [], set()
    for kernel, _, arguments in launches(case):
        binary = compiled(kernel, arguments, architecture)
        if binary.hash in seen:
            continue
        seen.add(binary.hash)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(binary.asm["cubin"])
            dump = subprocess.run([_tool("cuobjdump"), "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
        use = re.search(r"REG:(\d+) STACK:(\d+)", dump)
        counts: dict[str, int] = {}
        for name in re.findall(r"\b(?:LDG\.E|STG\.E|STL|LDL)[.\w]*", dump):
            name = re.sub(r"\.(EF|EL|LU|NA|STRONG|SYS|GPU|CONSTANT|U8|S8)\b", "", name)
            counts[name] = counts.get(name, 0) + 1
        result.append(Built(kernel.__name__, int(use[1]), int(use[2]) if "STL" in counts else 0, dict(sorted(counts.items()))))
    return result


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
