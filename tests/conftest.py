"""What every test has: fixed seeds, and the parts that VIDKERN_REQUIRE says must be there.

VIDKERN_REQUIRE is a comma list of parts. A named part that is missing stops the run before the first test, so that a green run
without it is impossible.

cpu  the compiled CPU kernels load, with a tier for every instruction set of this processor
"""

import importlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

# /proc/cpuinfo's names of what each compiled tier uses.
TIER_FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"},
}


def processor_flags() -> set[str]:
    """The processor's features as Linux names them; empty where there is no /proc/cpuinfo or on another architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def missing_cpu() -> str | None:
    """Why the compiled CPU part does not count as there, or None."""
    try:
        module = importlib.import_module("vidkern._cpu")
    except ImportError as error:
        return f"vidkern._cpu: {error}"
    expected = {tier for tier, needed in TIER_FLAGS.items() if needed <= processor_flags()}
    absent = sorted(expected - set(module.isas()))
    return f"this processor runs the tiers {', '.join(absent)}, which vidkern._cpu does not have" if absent else None


PARTS = {"cpu": missing_cpu}


def pytest_configure(config):
    for name in filter(None, (part.strip() for part in os.environ.get("VIDKERN_REQUIRE", "").split(","))):
        if name not in PARTS:
            raise pytest.UsageError(f"VIDKERN_REQUIRE: unknown part {name!r}, expected {', '.join(PARTS)}")
        if reason := PARTS[name]():
            raise pytest.UsageError(f"VIDKERN_REQUIRE={name}: {reason}")


def pytest_report_header(config):
    return f"VIDKERN_REQUIRE: {os.environ.get('VIDKERN_REQUIRE') or 'nothing'}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return 0


@pytest.fixture
def generator(seed) -> torch.Generator:
    """A CPU generator of the test's own."""
    return torch.Generator().manual_seed(seed)
