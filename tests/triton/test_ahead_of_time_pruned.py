"""What the pruned ops launch compiles for every architecture without spills, with matrix instructions; the record says so."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-aot makes its absence an error
from vidkern.bench import aot_pruned as aot
from vidkern.ops.pruned import configs

CASES = aot.cases()


def chosen(form, dtype, architecture):
    return next(c for c in CASES if (c.form, c.dtype, c.architecture) == (form, dtype, architecture))


def test_record_is_of_these_sources_and_within_the_limits():
    record = json.loads(aot.KIND.path.read_text())
    assert record["sources"] == aot.KIND.digest(), "the kernels changed: run python -m vidkern.bench.aot_pruned"
    assert set(record["built"]) == {c.name for c in CASES}
    assert not [fault for c in CASES if (fault := aot.KIND.fault_of(c, record["built"][c.name]))]
    assert {c.architecture for c in CASES} == {80, 89, 90, 100, 120}


def test_record_is_what_the_compiler_makes_now():
    """One case again: every number of the record."""
    case = chosen("grouped", "bf16", 90)
    rows = aot.build(case)
    assert [asdict(b) for b in rows] == json.loads(aot.KIND.path.read_text())["built"][case.name] and not aot.faults(case, rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_float16_builds_too():
    cases = [c for c in aot.cases((80, 90), ("fp16",))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        assert not [f for c, rows in zip(cases, pool.map(aot.build, cases)) for f in aot.faults(c, rows)]


def test_no_build_depends_on_a_layer_shape():
    """Widths of twenty pruned layers are run-time arguments: the product's constants are the same for all of them."""
    seen = set()
    for n in (3456, 3648, 3840, 4032, 4224, 5504, 5632, 5760, 5888, 6144):
        arguments = launched(n)
        kernel, values = arguments
        constants = [(k, v) for k, v in sorted(values.items()) if k.isupper() and isinstance(v, (bool, int, str))]
        seen.add(tuple(constants))
        never = {p.name for p in kernel.params if p.do_not_specialize}
        assert {"m_units", "n_units", "k_units"} <= never
    assert len(seen) == 1


def launched(n):
    """(kernel, arguments) of a packed layer with n outputs."""
    from unittest import mock

    import torch
    from vidkern.bench.aot_launch import Recorder
    from vidkern.ops.pruned import triton as kit

    log = []
    config = configs.shipped(2, False, "hopper")[0]
    with mock.patch.multiple(kit, product_kernel=Recorder(kit.product_kernel, log), _device=lambda d: ("hopper", 132)), configs.forced(config):
        a, b, out = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((1344, 2048), (n, 2048), (1344, n)))
        kit.product(kit.Source(a), kit.Source(b), out, 1344, n, 2048)
    return log[0][0], log[0][2]


def test_faults_are_found():
    case = chosen("main", "bf16", 90)
    good = aot.Built("product_kernel", 128, 0, 98304, {"HGMMA": 4})
    assert not aot.faults(case, [good])
    assert "spilled" in aot.faults(case, [aot.Built("product_kernel", 255, 8, 98304, {"HGMMA": 4})])[0]
    assert "no matrix instruction" in aot.faults(case, [aot.Built("product_kernel", 128, 0, 98304, {})])[0]
    assert "no HGMMA" in aot.faults(case, [aot.Built("product_kernel", 128, 0, 98304, {"HMMA": 4})])[0]
    assert "shared memory" in aot.faults(chosen("main", "bf16", 120), [aot.Built("product_kernel", 128, 0, 110_000, {"HMMA": 4})])[0]
    assert aot.KIND.fault_of(case, "CompilationError: x") == f"{case.name}: CompilationError: x"
