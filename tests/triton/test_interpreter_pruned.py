"""The pruned ops on Triton's interpreter: every part and every shipped tile, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-interpret makes its absence an error
ROOT = Path(__file__).parents[2]


def test_every_part_and_every_tile():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/pruned_interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VIDKERN_REQUIRE": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 17
