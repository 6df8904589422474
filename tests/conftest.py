"""What every test has: fixed seeds, and the parts that VIDKERN_REQUIRE says must be there.

VIDKERN_REQUIRE is a comma list of parts. A named part that is missing stops the run before the first test, so that a green run
without it is impossible.

cpu               the compiled CPU kernels load, with a tier for every instruction set of this processor
triton-interpret  Triton is there, so that tests/triton can run its kernels in the interpreter
triton-aot        Triton brings the tools that compile and disassemble for GPUs without one
diffusers         diffusers and what its models need
scenes            PyBullet
nvcc              the CUDA compiler, for the machine code of the hand-written kernels
"""

import functools
import importlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from beside import REPORTS, Beside

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


def missing_modules(*names: str) -> str | None:
    """Why not all of these modules can be imported, or None."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name}: {error}"
    return None


def missing_tools() -> str | None:
    """Why Triton cannot compile for a GPU that is not here, or None."""
    if reason := missing_modules("triton"):
        return reason
    tools = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"
    return next((f"{tools / name} does not exist" for name in ("ptxas", "cuobjdump") if not (tools / name).exists()), None)


PARTS = {
    "cpu": missing_cpu,
    "triton-interpret": lambda: missing_modules("triton"),
    "triton-aot": missing_tools,
    "diffusers": lambda: missing_modules("diffusers", "transformers", "peft"),
    "scenes": lambda: missing_modules("pybullet", "pybullet_data"),
    "nvcc": lambda: None if shutil.which("nvcc") else "nvcc is not on the PATH",
}


def interpret_like_hardware() -> None:
    """Triton's interpreter makes bfloat16 of float32 by dropping bits, where GPUs round to nearest, ties to even; and its products
    are as exact as numpy's BLAS sums, which is not what the accuracy rule asks about: they are summed in float64."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    before = interpreter._convert_float

    def convert(data, source, target, rounding):
        pair = (str(source), str(target))
        if pair == ("fp32", "bf16"):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if pair == ("bf16", "fp32"):
            return data.astype(np.uint32) << 16
        return before(data, source, target, rounding)

    def dot(self, a, b, d, *precision):
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def pytest_configure(config):
    if path := os.environ.get(REPORTS):
        config.pluginmanager.register(Reporter(config, path))
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret_like_hardware()
    for name in filter(None, (part.strip() for part in os.environ.get("VIDKERN_REQUIRE", "").split(","))):
        if name not in PARTS:
            raise pytest.UsageError(f"VIDKERN_REQUIRE: unknown part {name!r}, expected {', '.join(PARTS)}")
        if reason := PARTS[name]():
            raise pytest.UsageError(f"VIDKERN_REQUIRE={name}: {reason}")


BESIDE = pytest.StashKey()


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        session.config.stash[BESIDE] = Beside(session.items, session.config.rootpath)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """In the place of a test that was run apart, its reports."""
    config = item.config
    reports = config.stash[BESIDE].reports(item)
    if reports is None:
        config.stash[BESIDE].share()
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what the tests before it had kept for it
    return True


class Reporter:
    """In a run of a module apart: writes its reports down."""

    def __init__(self, config, path):
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def pytest_sessionfinish(session):
    if BESIDE in session.config.stash:
        session.config.stash[BESIDE].end()


@pytest.fixture(scope="module")
def beside(request):
    """``beside(name)``: the result of what the module had begun beside the tests before (tests/beside.py)."""
    return functools.partial(request.config.stash[BESIDE].result, request.module.__name__)


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
