"""Compile what attention motion flow launches on a GPU ahead of time, without one: ``python -m vidkern.bench.aot_amf`` writes registers,
spilled bytes, shared memory and matrix instructions of every kernel to ``bench/results/aot/amf.json``.

The videos are those of the paper (6 frames of 30 x 45 patches): 48 heads of 64 channels apart or side by side, single heads of 64 and 128
channels, heads that no block divides, and heads whose rows are not aligned."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from vidkern._files import replacing
from vidkern.ops.attention_motion_flow import configs

from . import aot_launch
from .aot_launch import Built, Recorder

RECORD = Path(__file__).parent / "results" / "aot" / "amf.json"
ARCHITECTURES = (80, 89, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SOURCES = ("ops/attention_motion_flow/triton.py",)
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDG.E.128", "STG.E.128", "STL", "LDL")
GRID = (6, 30, 45)
PAIRS = tuple((i, j) for i in range(GRID[0]) for j in range(GRID[0]))
# Name: (groups, heads of a group, channels of a head, whether the heads of a token lie side by side, which configurations).
SHAPES = {
    "apart": (1, 48, 64, False, "all"), "beside": (1, 48, 64, True, "first"), "heads64": (48, 1, 64, False, "all"),
    "heads128": (40, 1, 128, False, "all"), "odd": (3, 1, 24, False, "first"), "odd_apart": (1, 7, 24, False, "first"),
    "uneven": (3, 1, 20, False, "last"), "uneven_apart": (1, 7, 20, False, "last"),
}  # fmt: skip
# Kernel: the shapes it runs.
_HELD, _WIDE = ("heads64", "heads128", "odd", "uneven"), ("apart", "beside", "odd_apart", "uneven_apart")
KERNELS = {
    "held": _HELD, "wide": _WIDE, "vote": (*_HELD, "odd_apart"), "dq": _HELD, "dk": _HELD, "slope": _WIDE, "dq_product": _WIDE,
    "dk_product": _WIDE, "prepare": ("heads64",),
}  # fmt: skip
# Results asked for -> arguments of the forward.
OUTPUTS = {"soft": ("mean", "lse"), "hard": ("index",), "all": ("mean", "index", "lse", "top", "entropy")}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched for one shape, dtype and set of results, with one shipped configuration."""

    kind: str
    shape: str
    dtype: str
    architecture: int
    config: configs.Config | None = None
    results: str = "soft"

    @property
    def name(self) -> str:
        """What the record calls it."""
        c = self.config
        tile = f"-{c.block_m}x{c.block_n}x{c.block_k}-w{c.warps}s{c.stages}{f'r{c.registers}' if c.registers else ''}" if c else ""
        return f"{self.kind}-{self.results}-{self.shape}-{self.dtype}-sm{self.architecture}{tile}"

    @property
    def dim(self) -> int:
        """Channels by which configurations are listed."""
        _, heads, dim, *_ = SHAPES[self.shape]
        return dim if heads == 1 and dim <= configs.HELD_DIM else 1 << 30


def cases(architectures=ARCHITECTURES, dtypes=("bf16", "fp32")) -> list[Case]:
    """Every shipped configuration with the shapes it is meant for."""
    found = []
    for architecture in architectures:
        family = configs.family(divmod(architecture, 10))
        for dtype in dtypes:
            for kind, shapes in KERNELS.items():
                for shape in shapes:
                    one = Case(kind, shape, dtype, architecture)
                    for results in OUTPUTS if kind in ("held", "wide") and shape in ("heads64", "apart") else ("soft",):
                        listed = (None,)
                        if kind in configs.KINDS:
                            listed = configs.shipped(kind, DTYPES[dtype].itemsize, one.dim, family, results == "soft")
                            listed = {"all": listed, "first": listed[:1], "last": listed[-1:]}[SHAPES[shape][4]]
                        found += [Case(kind, shape, dtype, architecture, c, results) for c in listed]
    return found


def _run(case: Case) -> None:
    """Forward, vote or backward on the meta device: nothing has memory."""
    from vidkern.ops.attention_motion_flow import triton as launchers

    groups, heads, dim, beside, _ = SHAPES[case.shape]
    tokens = GRID[0] * GRID[1] * GRID[2]
    dtype = DTYPES[case.dtype]

    def operand():
        if beside:
            return torch.empty(1, tokens, groups, heads, dim, dtype=dtype, device="meta").permute(0, 2, 3, 1, 4)
        return torch.empty(1, groups, heads, tokens, dim, dtype=dtype, device="meta")

    q, k, dq, dk = (operand() for _ in range(4))
    rows = (1, groups, len(PAIRS), GRID[1] * GRID[2])
    lse, index = torch.empty(rows, device="meta"), torch.empty(rows, dtype=torch.int32, device="meta")
    mean = torch.empty(*rows, 2, device="meta")
    shared = {"grid": GRID, "scale": 0.25}
    if case.kind in ("held", "wide"):
        every = {"mean": mean, "index": index, "lse": lse, "top": lse, "entropy": lse}
        launchers.forward(q, k, PAIRS, **shared, **{n: t if n in OUTPUTS[case.results] else None for n, t in every.items()})
    elif case.kind == "vote":
        launchers.vote(q, k, lse, PAIRS, **shared, index=index, top=lse)
    else:
        launchers.backward(mean, lse, q, k, mean, lse, PAIRS, **shared, dq=dq, dk=dk)


def launches(case: Case) -> list[tuple[Callable, tuple, dict]]:
    """(kernel, grid, arguments) of the launches of a case's kernel."""
    from vidkern.ops.attention_motion_flow import triton as launchers

    log: list = []
    kernels = {name: Recorder(k, log) for name, k in vars(launchers).items() if name.endswith("_kernel")}
    family = configs.family(divmod(case.architecture, 10))
    forced = configs.forced(case.kind, case.config) if case.config else mock.patch.dict({})
    with mock.patch.multiple(launchers, **kernels, _device=lambda device: (family, 132)), forced:
        _run(case)
    wanted = {"held": "forward", "wide": "forward"}.get(case.kind, case.kind) + "_kernel"
    return [launch for launch in log if launch[0].__name__ == wanted]


def _counted(dump: str) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", dump)) for name in COUNTED}
    return {n: c for n, c in counts.items() if c}


def build(case: Case) -> list[Built]:
    """Compile a case's kernel, each specialisation once."""
    return aot_launch.build(launches(case), case.architecture, _counted)


def faults(case: Case, built: list[Built]) -> list[str]:
    """Which limits a case breaks: shared memory of the architecture, no spills, matrix instructions for 16-bit products, wgmma on sm_90."""
    found, limit = [], configs.shared_memory(divmod(case.architecture, 10))
    for b in built:
        if b.shared > limit:
            found.append(f"{case.name}: {b.shared} bytes of shared memory, expected at most {limit}")
        if b.spilled:
            found.append(f"{case.name}: {b.spilled} bytes spilled, expected none")
        if case.kind == "prepare" or case.dtype == "fp32":
            continue
        if not any(name.endswith("MMA") for name in b.instructions):
            found.append(f"{case.name}: no matrix instruction, expected some for 16-bit inputs")
        if case.architecture == 90 and not b.instructions.get("HGMMA"):
            found.append(f"{case.name}: no HGMMA, expected wgmma on sm_90")
    return found


def digest() -> str:
    """What a record is bound to: the kernels' sources, without comments."""
    from vidkern import verified

    return verified.digest(SOURCES)


def _measured(case: Case) -> tuple[str, list | str]:
    try:
        return case.name, [asdict(b) for b in build(case)]
    except Exception as error:  # whatever the compiler raises is the result
        return case.name, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def fault_of(case: Case, row: list | str) -> str | None:
    """The first limit that a row of the record breaks, or None."""
    if isinstance(row, str):
        return f"{case.name}: {row}"
    return next(iter(faults(case, [Built(**b) for b in row])), None)


def record(chosen: list[Case], path: Path, jobs: int) -> dict[str, list | str]:
    """Build ``chosen`` in ``jobs`` processes and write the record to ``path``; what an earlier, interrupted run with the same sources wrote
    there is kept."""
    import triton
    from tqdm import tqdm

    head = {"sources": digest(), "triton": triton.__version__, "command": "python -m vidkern.bench.aot_amf"}
    found = {}
    if path.is_file():
        before = json.loads(path.read_text())
        if {name: before.get(name) for name in head} == head:
            found = before["built"]
    todo = [c for c in chosen if c.name not in found]

    def write():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items()))
        with replacing(path) as temporary:
            temporary.write_text(f"{json.dumps(head, indent=1)[:-2]},\n \"built\": {{\n{rows}\n }}\n}}\n")

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, (name, row) in enumerate(tqdm(pool.map(_measured, todo), total=len(todo), unit="case", desc="compiling")):
            found[name] = row
            if i % 16 == 15:
                write()
    write()
    return found


def main(argv=None) -> int:
    """The command: compile, write the record, print what breaks a limit. Exit status 1 when anything does."""
    parser = argparse.ArgumentParser(prog="python -m vidkern.bench.aot_amf", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=("bf16", "fp32"))
    parser.add_argument("--out", type=Path, default=RECORD, help="the record to write (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    chosen = cases(args.architectures, args.dtypes)
    found = record(chosen, args.out, args.jobs)
    broken = [fault for c in chosen if (fault := fault_of(c, found[c.name]))]
    print(f"{len(chosen)} cases, {len(broken)} beyond the limits", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
