"""Compile, without a GPU, exactly what a launcher launches: its kernels are swapped for recorders, and meta tensors stand for the data."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from .aot import _tool

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
          torch.uint8: "u8"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Built:
    """What the compiler made of a launch: registers per thread, bytes spilled per thread, bytes of shared memory per block, and how often
    each load, store and matrix instruction stands in the machine code."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


class Recorder:
    """Stands for a kernel: logs (kernel, grid, arguments) where that would be launched."""

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        return lambda *args, **given: self.log.append((self.kernel, grid, dict(zip(self.kernel.arg_names, args)) | given))


def launches(launchers, call: Callable[[], object]) -> list[tuple[Callable, tuple, dict]]:
    """(kernel, grid, arguments) of everything that ``call`` launches through the ``*_kernel`` names of module ``launchers``."""
    log = []
    kernels = {n: Recorder(k, log) for n, k in vars(launchers).items() if n.endswith("_kernel")}
    with mock.patch.multiple(launchers, **kernels):
        call()
    return log


def _described(value, path, special, constants, attributes):
    """Type of an argument as Triton's launcher would specialise it."""
    if isinstance(value, tuple):
        return tuple(_described(v, (*path, i), True, constants, attributes) for i, v in enumerate(value))
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TYPES[value.dtype]}"
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
    options = {k: arguments[k] for k in _OPTIONS if arguments.get(k) is not None}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def accesses(dump: str) -> dict[str, int]:
    """How often each load, store and matrix instruction stands in a listing, by width, without its cache hints."""
    counts: dict[str, int] = {}
    for name in re.findall(r"\b(?:LDG\.E|STG\.E|LDGSTS|LDSM|STL|LDL|HMMA|HGMMA|UTCHMMA)[.\w]*", dump):
        name = re.sub(r"\.(EF|EL|LU|NA|STRONG|SYS|GPU|CONSTANT|U8|S8)\b", "", name)
        name = name.split(".")[0] if "MMA" in name or name.startswith(("LDSM", "LDGSTS")) else name
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _built(kernel, binary, count) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        dump = subprocess.run([_tool("cuobjdump"), "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    use = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    # ptxas reports spills as STL/LDL; a stack without any local store holds none.
    spilled = int(use[2]) if re.search(r"\bSTL\b", dump) else 0
    return Built(kernel.__name__, int(use[1]), spilled, binary.metadata.shared, count(dump))


def build(launched, architecture: int, count: Callable[[str], dict[str, int]] = accesses) -> list[Built]:
    """Compile launches (of :func:`launches`) for an architecture such as 90, each specialisation once; ``count`` reads the listings."""
    result, seen = [], set()
    for kernel, _, arguments in launched:
        binary = compiled(kernel, arguments, architecture)
        if binary.hash not in seen:
            seen.add(binary.hash)
            result.append(_built(kernel, binary, count))
    return result
