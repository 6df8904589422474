"""Compile what attention motion flow launches on a GPU ahead of time, without one: ``python -m vidkern.bench.aot_amf`` writes registers,
spilled bytes, shared memory and matrix instructions of every kernel to ``bench/results/aot/amf.json``.

The videos are those of the paper (6 frames of 30 x 45 patches): 48 heads of 64 channels apart or side by side, single heads of 64 and 128
channels, heads that no block divides, and heads whose rows are not aligned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from vidkern.ops.attention_motion_flow import configs

from . import aot_launch
from .aot_launch import Built, Recorder
from .aot_record import ARCHITECTURES, COUNTED, FOLDER, Kind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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


KIND = Kind(FOLDER / "amf.json", "vidkern.bench.aot_amf", ("ops/attention_motion_flow/triton.py",), build, faults)

if __name__ == "__main__":
    raise SystemExit(KIND.main(cases, DTYPES, __doc__.splitlines()[0]))
