"""Compile what the pruned ops launch on a GPU ahead of time, without one: ``python -m vidkern.bench.aot_pruned`` writes registers,
spilled bytes, shared memory and matrix instructions of every kernel to ``bench/results/aot/pruned.json``.

The layers are those of the paper (1344 tokens, 2048 channels), packed, un-repacked, gathered and uneven, forward and backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from vidkern.ops.pruned import compose, configs
from vidkern.ops.pruned.wants import INNER, OUTER

from . import aot_launch
from .aot_launch import Built, Recorder
from .aot_record import ARCHITECTURES, COUNTED, FOLDER, Kind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 1344
# Forms of the layer: keyword -> what is special. "main" is what a packed network runs all day.
FORMS = ("main", "gated", "scatter", "gather", "pairs", "slabs", "uneven", "grouped")


@dataclass(frozen=True)
class Case:
    """One form of the layer, in one dtype, with one shipped configuration."""

    form: str
    dtype: str
    architecture: int
    config: configs.Config

    @property
    def name(self) -> str:
        """What the record calls it."""
        c = self.config
        return f"{self.form}-{self.dtype}-sm{self.architecture}-{c.block_m}x{c.block_n}x{c.block_k}-w{c.warps}s{c.stages}"


def cases(architectures=ARCHITECTURES, dtypes=("bf16", "fp32")) -> list[Case]:
    """Every shipped configuration with the main form (pairs have their own), every other form with the first one."""
    found = []
    for architecture in architectures:
        family = configs.family(divmod(architecture, 10))
        for dtype in dtypes:
            for form in FORMS:
                shipped = configs.shipped(DTYPES[dtype].itemsize, form == "pairs", family, form != "uneven")
                found += [Case(form, dtype, architecture, c) for c in (shipped if form in ("main", "pairs") else shipped[:1])]
    return found


def _run(case: Case) -> None:
    """Forward and backward of the form on the meta device: nothing has memory."""
    from vidkern.ops.pruned import triton as kit
    from vidkern.ops.pruned import triton_grouped

    dtype = DTYPES[case.dtype]
    empty = lambda *shape, to=dtype: torch.empty(shape, dtype=to, device="meta")
    if case.form == "grouped":
        xs, weights = [empty(TOKENS, 2048), empty(77, 2048)], [empty(1216, 2048), empty(2432, 2048)]
        biases = [empty(w.shape[0]) for w in weights]
        out = empty(sum(x.shape[0] * w.shape[0] for x, w in zip(xs, weights)))
        triton_grouped.forward(xs, weights, biases, "gelu_tanh", out, out)
        return
    ints = lambda n: torch.empty(n, dtype=torch.int32, device="meta")
    k, n, act = 2048, 6144, "none"
    gate = residual = scale = in_index = out_index = rows = columns = None
    norm = False
    if case.form == "main":
        act, norm, scale = "gelu_tanh", True, empty(1, k)
    elif case.form == "gated":
        k, n = 6144, 2048
        gate, residual = empty(1, n), empty(TOKENS, n, to=torch.float32)
    elif case.form in ("scatter", "gather"):
        k = n = 1232
        in_index, out_index, residual = ints(k), ints(n), empty(TOKENS, 2048)
    elif case.form == "pairs":
        act = "swiglu"
    elif case.form == "slabs":
        n, rows, columns = 3648, ints(57), ints(32)
    else:
        k, n, act = 1021, 5891, "silu"
    x = empty(TOKENS, 2048 if in_index is not None else k)
    weight = empty(6144, 4096) if rows is not None else empty(n, k)
    bias = empty(weight.shape[0])
    written = residual.shape[1] if residual is not None else n // 2 if act == "swiglu" else n
    out, u = empty(TOKENS, written, to=dtype if residual is None else residual.dtype), empty(TOKENS, n)
    tensors = (in_index, out_index, rows, columns)
    shared = {"slab": 64, "act": act, "norm": norm, "eps": 1e-6}
    with mock.patch.object(kit.index, "in_runs", lambda index: index is not None and case.form == "gather"):
        compose.linear(kit, x, weight, bias, gate, None, residual, scale, scale, *tensors, **shared, out=out, u=u)
        grads = tuple(empty(*t.shape) if t is not None else empty(0) for t in (x, weight, bias, gate, None, scale, scale))
        compose.linear_backward(
            kit, out, x, weight, bias, gate, None, scale, scale, *tensors, u, **shared, wants=INNER | OUTER, grads=grads,
            needs_u=act != "none" or gate is not None,
        )


def launches(case: Case) -> list[tuple[Callable, tuple, dict]]:
    """(kernel, grid, arguments) of everything that a case launches."""
    from vidkern.ops.pruned import triton as kit
    from vidkern.ops.pruned import triton_grouped

    log: list = []
    kernels = {name: Recorder(k, log) for name, k in vars(kit).items() if name.endswith("_kernel")}
    family = configs.family(divmod(case.architecture, 10))
    grouped = mock.patch.object(triton_grouped, "grouped_kernel", Recorder(triton_grouped.grouped_kernel, log))
    with mock.patch.multiple(kit, **kernels, _device=lambda device: (family, 132)), grouped, configs.forced(case.config):
        _run(case)
    return log


def _counted(dump: str) -> dict[str, int]:
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", dump)) for name in COUNTED}
    return {n: c for n, c in counts.items() if c}


def build(case: Case) -> list[Built]:
    """Compile everything that a case launches, each kernel and specialisation once."""
    return aot_launch.build(launches(case), case.architecture, _counted)


def faults(case: Case, built: list[Built]) -> list[str]:
    """Which limits a case breaks: shared memory of the architecture, no spills, matrix instructions for 16-bit products, wgmma on sm_90."""
    found, limit = [], configs.shared_memory(divmod(case.architecture, 10))
    for b in built:
        where = f"{case.name} {b.kernel}"
        if b.shared > limit:
            found.append(f"{where}: {b.shared} bytes of shared memory, expected at most {limit}")
        if b.spilled:
            found.append(f"{where}: {b.spilled} bytes spilled, expected none")
        if b.kernel not in ("product_kernel", "grouped_kernel") or case.dtype == "fp32":
            continue
        if not any(name.endswith("MMA") for name in b.instructions):
            found.append(f"{where}: no matrix instruction, expected some for 16-bit inputs")
        if case.architecture == 90 and not b.instructions.get("HGMMA"):
            found.append(f"{where}: no HGMMA, expected wgmma on sm_90")
    return found


KIND = Kind(FOLDER / "pruned.json", "vidkern.bench.aot_pruned", ("ops/pruned/triton.py", "ops/pruned/triton_grouped.py"), build, faults)

if __name__ == "__main__":
    raise SystemExit(KIND.main(cases, DTYPES, __doc__.splitlines()[0]))
