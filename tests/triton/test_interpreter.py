"""The every-op tests on the Triton backends, in processes of their own that run Triton's interpreter on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-interpret makes its absence an error
pytestmark = pytest.mark.timeout(1500)  # each is a whole run of its own
ROOT = Path(__file__).parents[2]


def run(*arguments):
    """pytest in the interpreter's process; how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1200", *arguments]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VIDKERN_REQUIRE": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary and "failed" not in summary, summary
    return int(re.search(r"(\d+) passed", summary)[1])


@pytest.mark.parametrize(
    "files, chosen, at_least",
    [
        (["test_accuracy.py"], "triton or matrix", 32),
        (["test_memory.py"], "triton", 10),
        (["test_grid_attention.py", "test_torch.py"], "triton", 10),
    ],
    ids=["accuracy", "memory", "properties"],
)
def test_every_op_test_in_the_interpreter(files, chosen, at_least):
    assert run(*(f"tests/every_op/{f}" for f in files), "-k", chosen) >= at_least


@pytest.mark.slow
def test_the_rest_of_the_every_op_test_in_the_interpreter():
    """Every sample in every dtype, and what is marked slow."""
    assert run("tests/every_op", "-m", "slow", "-k", "triton") >= 50


def test_shipped_configurations_agree():
    """Every shipped configuration, at its own block sizes, within and across frames."""
    assert run("tests/triton/interpreted.py") >= 1


def test_pyramids_to_the_last_bits():
    """Noise exactly, values within 4 ulp of the reference, filters one by one, and what is masked is not read."""
    assert run("tests/triton/pyramid_interpreted.py") >= 15
