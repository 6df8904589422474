"""Compile every shipped Triton configuration ahead of time, without a GPU, and record what the compiler made of it.

``python -m vidkern.bench.aot`` writes registers, spilled bytes, shared memory and instruction counts of each kernel,
configuration and architecture to ``bench/results/aot/triton.json``; the tests compare that record with the sources.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vidkern._files import replacing
from vidkern.ops.grid_attention import configs

RECORD = Path(__file__).parent / "results" / "aot" / "triton.json"
ARCHITECTURES = (80, 89, 90, 100, 120)
DIMS = (64, 128, 256)
DTYPES = {"bf16": 2, "fp32": 4}
SOURCES = ("ops/grid_attention/triton.py",)
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "LDSM", "LDG.E.128", "STG.E.128", "STL", "LDL")


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: its configuration, head dim, element type, architecture, and the flags of its build."""

    kind: str
    dim: int
    dtype: str
    architecture: int
    config: configs.Config
    has_live: bool = False
    straddle: bool = False

    @property
    def name(self) -> str:
        """What the record calls it."""
        c = self.config
        flags = ("-masked" if self.has_live else "") + ("-straddling" if self.straddle else "")
        return (
            f"{self.kind}-d{self.dim}-{self.dtype}-sm{self.architecture}-{c.block_m}x{c.block_n}x{c.block_edge}"
            f"-w{c.warps}s{c.stages}{f'r{c.registers}' if c.registers else ''}{flags}"
        )


@dataclass(frozen=True)
class Built:
    """What the compiler made of a case: registers per thread, bytes spilled per thread, bytes of shared memory per block, the
    most asynchronous copies that a loop leaves in flight when it waits, and how often each counted instruction stands in the
    machine code."""

    registers: int
    spilled: int
    shared: int
    in_flight: int
    instructions: dict[str, int]


def cases(architectures=ARCHITECTURES, dims=DIMS, dtypes=tuple(DTYPES)) -> Iterator[Case]:
    """Every kernel that the tables ship, for every architecture it is chosen on: with and without masks, tiles within frames
    and across them."""
    for kind, dim, dtype, architecture in itertools.product(configs.KINDS, dims, dtypes, architectures):
        for config in configs.shipped(kind, dim, DTYPES[dtype], configs.family(divmod(architecture, 10))):
            for live, straddle in itertools.product((False, True), (False, True) if config.straddle else (False,)):
                yield Case(kind, dim, dtype, architecture, config, live, straddle)


def _kernel(kind: str):
    from vidkern.ops.grid_attention import triton

    return getattr(triton, f"{kind}_kernel")


def compiled(case: Case, **constants_given):
    """The compiled kernel of a case, specialised as for contiguous tensors whose strides are multiples of 16.

    ``constants_given``: arguments to build in instead, such as ``WIDE=True``, ``heads=1`` or ``DOUT=None``.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, config = _kernel(case.kind), case.config
    flags = {
        "D": case.dim, "BLOCK_D": configs.padded_dim(case.dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_E": config.block_edge, "HAS_LIVE": case.has_live, "WIDE": False, "NEGATIVE": False, "HAS_DOUT": True,
        "STRADDLE": case.straddle, "UNIT": 1,
        "AHEAD": configs.ahead(configs.family(divmod(case.architecture, 10))), "DOT": {"bf16": tl.bfloat16, "fp32": tl.float32}[case.dtype],
    }
    plain = dict.fromkeys(("LSE", "DLSE", "DELTA"), "*fp32") | dict.fromkeys(("VALID", "LIVE"), "*u8")
    plain |= dict.fromkeys(("TILES", "MAIN", "EDGE", "KV_LEN", "TEXT_LEN"), "*i32")
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants_given:
            signature[name], constants[(i,)] = "constexpr", constants_given[name]
        elif name in flags:
            signature[name], constants[(i,)] = "constexpr", flags[name]
        elif name == "LIVE" and not case.has_live:
            signature[name], constants[(i,)] = "constexpr", None
        elif name == "stride_sl":
            signature[name], constants[(i,)] = "constexpr", 1
        elif name.isupper():
            signature[name] = plain.get(name, f"*{case.dtype}")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
            if name.startswith("stride") or name == "length":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", case.architecture, 32)
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
    return triton.compile(source, target=target, options=options)


@functools.lru_cache(maxsize=4)
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def build(case: Case) -> Built:
    """Compile a case and read its machine code."""
    kernel = compiled(case)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        dump = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    use = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", dump)) for name in COUNTED}
    # ptxas reports spills as STL/LDL; a stack without any local store holds none.
    spilled = int(use[2]) if counts["STL"] else 0
    waits = [int(n) for n in re.findall(r"async_wait .*?num = (\d+)", kernel.asm["ttgir"])]
    return Built(int(use[1]), spilled, kernel.metadata.shared, max(waits, default=0), {n: c for n, c in counts.items() if c})


def digest() -> str:
    """What a record is bound to: the kernels' sources and the table, without comments."""
    from vidkern import verified

    return verified.digest(SOURCES)


def _measured(case: Case) -> tuple[str, dict]:
    try:
        return case.name, asdict(build(case))
    except Exception as error:  # whatever the compiler raises is the result
        return case.name, {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def record(chosen: list[Case], path: Path, jobs: int) -> dict:
    """Build ``chosen`` in ``jobs`` processes and write the record to ``path``; what an earlier, interrupted run with the same
    sources wrote there is kept."""
    import triton
    from tqdm import tqdm

    head = {"sources": digest(), "triton": triton.__version__, "command": "python -m vidkern.bench.aot"}
    found = {}
    if path.is_file():
        before = json.loads(path.read_text())
        if {name: before.get(name) for name in head} == head:
            found = before["built"]
    todo = [c for c in {c.name: c for c in chosen}.values() if c.name not in found]

    def write():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items()))
        with replacing(path) as temporary:
            temporary.write_text(f"{json.dumps(head, indent=1)[:-2]},\n \"built\": {{\n{rows}\n }}\n}}\n")

    # Processes, not threads: a failing compiler assertion may end one.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, (name, row) in enumerate(tqdm(pool.map(_measured, todo), total=len(todo), unit="kernel", desc="compiling")):
            found[name] = row
            if i % 32 == 31:
                write()
    write()
    return head | {"built": found}


def main(argv=None) -> int:
    """The command: compile, write the record, print what breaks a limit. Exit status 1 when anything does."""
    parser = argparse.ArgumentParser(prog="python -m vidkern.bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="head dims")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record to write (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    chosen = list(cases(args.architectures, args.dims))
    built = record(chosen, args.out, args.jobs)["built"]
    faults = [f"{c.name}: {fault}" for c in chosen if (fault := fault_of(c, built[c.name]))]
    print(f"{len(chosen)} kernels, {len(faults)} beyond the limits", *faults, sep="\n")
    return 1 if faults else 0


def fault_of(case: Case, row: dict) -> str | None:
    """Which limit a row of the record breaks: it compiles, fits the shared memory, spills nothing up to 128 dims, prefetches, and
    multiplies 16-bit inputs with matrix instructions, wgmma on sm_90."""
    if "error" in row:
        return row["error"]
    built = Built(**row)
    limit = configs.shared_memory(divmod(case.architecture, 10))
    if built.shared > limit:
        return f"{built.shared} bytes of shared memory, expected at most {limit}"
    if case.dim <= 128 and built.spilled:
        return f"{built.spilled} bytes spilled, expected none up to 128 dims"
    if case.dtype == "bf16" and not any(name.endswith("MMA") for name in built.instructions):
        return "no matrix instruction, expected some for 16-bit inputs"
    deep = case.config.stages > 2 and configs.ahead(configs.family(divmod(case.architecture, 10)))
    if case.dtype == "bf16" and deep and not built.in_flight:
        return f"no copy in flight with {case.config.stages} stages, expected the main loop to be prefetched"
    if case.dtype == "bf16" and case.architecture == 90 and not built.instructions.get("HGMMA"):
        return "no HGMMA, expected wgmma for 16-bit inputs on sm_90"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
