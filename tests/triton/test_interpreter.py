"""The every-op tests on the Triton backends, in processes of their own that run Triton's interpreter on the CPU."""

import functools
import re
import sys
from pathlib import Path

import pytest

from beside import ENVIRONMENT, process

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-interpret makes its absence an error
pytestmark = pytest.mark.timeout(1500)  # each is a whole run of its own
ROOT = Path(__file__).parents[2]
EVERY_OP = "tests/every_op/"
# name: (arguments of pytest, tests that must pass at least). The longest first.
RUNS = {
    "attention accuracy": ((EVERY_OP + "test_accuracy.py", "-k", "triton and grid_attention"), 22),
    "accuracy": ((EVERY_OP + "test_accuracy.py", "-k", "(triton and not grid_attention) or matrix"), 72),
    "properties": ((EVERY_OP + "test_grid_attention.py", EVERY_OP + "test_torch.py", "-k", "triton"), 10),
    "memory": ((EVERY_OP + "test_memory.py", "-k", "triton"), 10),
    # Every shipped configuration, at its own block sizes, within and across frames.
    "configurations": (("tests/triton/interpreted.py",), 1),
    # Noise exactly, values within 4 ulp of the reference, filters one by one, and what is masked is not read.
    "pyramids": (("tests/triton/pyramid_interpreted.py",), 15),
    # Every part of the pruned ops and every shipped tile.
    "pruned": (("tests/triton/pruned_interpreted.py",), 17),
    # Attention motion flow: every form against the reference.
    "motion": (("tests/triton/amf_interpreted.py", "-k", "not without_gradient and not every_shipped"), 31),
}
# Every sample in every dtype, and what is marked slow.
SLOW_RUNS = {
    "the rest": (("tests/every_op", "-m", "slow", "-k", "triton"), 150),
    # Every shipped tile, and what a user sees of it; ties have a quicker test of their own.
    "motion, whole": (
        ("tests/triton/amf_interpreted.py", EVERY_OP + "test_motion.py", "-k", "(amf_interpreted and (without_gradient or every_shipped)) "
         "or (test_motion and triton and not ties)"), 61,
    ),
}  # fmt: skip


def run(arguments):
    """pytest in the interpreter's process; (exit status, what it printed, its last line)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1200", *arguments]
    env = ENVIRONMENT | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VIDKERN_REQUIRE": ""}
    done = process(command, cwd=ROOT, env=env)
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:], done.stdout.strip().splitlines()[-1]


def beside(items, folder):
    """Each run takes one processor for up to minutes."""
    chosen = [item.callspec.params["name"] for item in items if hasattr(item, "callspec")]
    return {name: functools.partial(run, (RUNS | SLOW_RUNS)[name][0]) for name in chosen}


def check(result, at_least):
    status, output, summary = result
    assert status == 0, output
    assert "skipped" not in summary and "failed" not in summary, summary
    assert int(re.search(r"(\d+) passed", summary)[1]) >= at_least


@pytest.mark.parametrize("name", RUNS)
def test_in_the_interpreter(beside, name):
    check(beside(name), RUNS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_RUNS)
def test_the_rest_in_the_interpreter(beside, name):
    check(beside(name), SLOW_RUNS[name][1])


def test_a_run_that_fails_is_seen():
    check((0, "", "3 passed in 1s"), 3)
    for wrong in ((1, "", "3 passed in 1s"), (0, "", "2 passed in 1s"), (0, "", "3 passed, 1 skipped in 1s")):
        with pytest.raises(AssertionError):
            check(wrong, 3)
