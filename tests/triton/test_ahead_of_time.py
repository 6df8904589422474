"""Shipped Triton configurations compile for every architecture within its limits, and the committed record says so truly."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from vidkern.bench import aot
from vidkern.ops.grid_attention.configs import Config

CASES = {case.name: case for case in aot.cases()}
RECORD = json.loads(aot.RECORD.read_text())
# One of each kernel, architecture and element size, with masks and straddling where there are registers to lose.
CHOSEN = [
    next(c for c in CASES.values() if (c.kind, c.dim, c.dtype, c.architecture, c.has_live) == wanted)
    for wanted in (
        ("forward", 128, "bf16", 90, False), ("forward", 64, "bf16", 80, True), ("forward", 128, "bf16", 100, True),
        ("dq", 128, "bf16", 90, True), ("dq", 64, "bf16", 120, False), ("dkv", 128, "bf16", 90, False),
        ("dkv", 64, "bf16", 89, True), ("dkv", 128, "bf16", 100, False), ("forward", 64, "fp32", 90, False),
        ("dkv", 64, "fp32", 80, True),
    )
]


def built(cases):
    """Build in processes of their own: a compiler that fails may take its process along."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(pool.map(aot._measured, cases))


def check(cases):
    import triton

    rows = built(cases)
    faults = {name: fault for name, row in rows.items() if (fault := aot.fault_of(CASES[name], row))}
    assert not faults
    if triton.__version__ == RECORD["triton"]:
        assert rows == {name: RECORD["built"][name] for name in rows}


def test_the_record_is_of_these_sources_and_whole():
    assert RECORD["sources"] == aot.digest(), f"the kernels have changed since: run {RECORD['command']}"
    assert sorted(RECORD["built"]) == sorted(CASES)
    assert {c.architecture for c in CASES.values()} == {80, 89, 90, 100, 120}


@pytest.mark.parametrize("name", CASES)
def test_recorded_build_keeps_the_limits(name):
    assert aot.fault_of(CASES[name], RECORD["built"][name]) is None


def test_chosen_builds():
    check(CHOSEN)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_third_of_the_16_bit_builds_of_data_centre_gpus():
    """Others whenever the kernels change: all of them take minutes, and the record, which is bound to the sources, has them."""
    cases = [c for c in CASES.values() if c.dim <= 128 and c.dtype == "bf16" and c.architecture in (80, 90)]
    cases.sort(key=lambda c: hashlib.sha256(f"{RECORD['sources']} {c.name}".encode()).digest())
    check(cases[: len(cases) // 3])


@pytest.mark.parametrize(
    "kind, given",
    [
        # What the launcher builds in when it meets it: a size or stride of 1, an absent tensor, a flag.
        # strides that are odd multiples of 8, as contiguous tensors of 72 dims have them
        ("forward", {"UNIT": 8, "D": 72}),
        ("forward", {"heads": 1, "group": 1, "n_tiles": 1, "stride_ql": 1, "WIDE": True, "NEGATIVE": True, "D": 72}),
        ("dq", {"heads": 1, "group": 1, "n_tiles": 1, "length": 1, "DOUT": None, "HAS_DOUT": False}),
        ("dkv", {"kv_heads": 1, "group": 1, "n_tiles": 1, "length": 1, "DOUT": None, "HAS_DOUT": False, "WIDE": True}),
        ("dkv", {"kv_heads": 1, "D": 72, "WIDE": True}),
        ("delta", {"D": 72, "BLOCK_D": 128, "BLOCK_M": 128, "HAS_DLSE": True, "heads": 1, "n_tiles": 1, "length": 1}),
        ("delta", {"BLOCK_M": 128, "HAS_DLSE": False, "DLSE": None, "UNIT": 8}),
        ("liveness", {"HAS_VALID": True, "HAS_KV_LEN": True, "HAS_TEXT_LEN": True, "BLOCK": 1024, "frame_len": 1, "n_frames": 1}),
        ("liveness", {"HAS_VALID": False, "HAS_KV_LEN": False, "HAS_TEXT_LEN": True, "BLOCK": 1024, "VALID": None, "KV_LEN": None}),
    ],
)
def test_specialised_builds(kind, given):
    case = aot.Case(kind, 128, "bf16", 90, Config(64, 32, 16, 8, 2), has_live=True, straddle=True)
    assert aot.compiled(case, **given).asm["cubin"]


def test_faults_are_found():
    """What breaks a limit is named: too much shared memory, spills, no matrix instructions, no wgmma, a failed build."""
    case = aot.Case("forward", 128, "bf16", 90, Config(128, 64, 32, 8, 3))
    good = {"registers": 200, "spilled": 0, "shared": 100_000, "in_flight": 2, "instructions": {"HGMMA": 8}}
    assert aot.fault_of(case, good) is None
    assert "shared memory" in aot.fault_of(case, good | {"shared": 240_000})
    assert "spilled" in aot.fault_of(case, good | {"spilled": 8})
    assert "prefetched" in aot.fault_of(case, good | {"in_flight": 0})
    assert "no HGMMA" in aot.fault_of(case, good | {"instructions": {"HMMA": 8}})
    assert "no matrix instruction" in aot.fault_of(case, good | {"instructions": {"LDGSTS": 8}})
    assert aot.fault_of(case, {"error": "RuntimeError: PassManager::run failed"}).startswith("RuntimeError")


def test_spills_are_seen():
    """A configuration that asks for more registers than there are shows as one that spills."""
    (row,) = built([aot.Case("dkv", 128, "bf16", 80, Config(128, 64, 16, 4, 2))]).values()
    assert row["spilled"] > 0
