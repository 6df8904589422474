"""Parametrisation over the registry, and the record of the worst accuracy ratios."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from vidkern import compiled

from . import checks

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

EXPECTED = tomllib.loads(Path(__file__).with_name("expected_matrix.toml").read_text())
TIERS = EXPECTED.pop("tiers")


@pytest.fixture(autouse=True)
def one_thread():
    """Expectations are thousands of small torch calls, which a second thread only slows; on a busy machine tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def backend_runs(op: str) -> list[tuple[str, str]]:
    """(backend, tier) pairs of an op: the cpu backend once per tier of this processor."""
    module = compiled.cpu()
    tiers = module.isas() if module else ["missing"]
    return [(b, t) for b in EXPECTED[op] for t in (tiers if b == "cpu" else [""])]


@pytest.fixture
def tier(request):
    """Force an instruction tier for one test; give it by indirect parametrisation, "" for none."""
    name = getattr(request, "param", "")
    if not name:
        yield name
        return
    assert compiled.cpu() is not None, f"the compiled CPU part {compiled.cpu_missing()}"
    before = compiled.cpu().isa()
    compiled.cpu().set_isa(name)
    yield name
    compiled.cpu().set_isa(before)


@contextlib.contextmanager
def poisoned():
    """Fresh memory is NaN: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_terminal_summary(terminalreporter):
    if not checks.WORST:
        return
    terminalreporter.section("worst error against best-practice torch (limits: max 2, RMS 1.3)")
    for key, ratios in sorted(checks.WORST.items()):
        terminalreporter.line(f"{' '.join(key):<45} max {ratios['max']:.2f}  RMS {ratios['rms']:.2f}")
    build = Path(__file__).parents[2] / "build"
    build.mkdir(exist_ok=True)
    rows = [dict(zip(("op", "backend", "dtype"), key)) | ratios for key, ratios in sorted(checks.WORST.items())]
    (build / "accuracy.json").write_text(json.dumps(rows, indent=1))
