"""The suites as pytest-benchmark tests: one test function per op, parametrised over peers, shapes, dtypes and modes."""

from __future__ import annotations

import functools

import pytest
import torch

from . import block as blocks
from . import peers
from .suite import DTYPES, MODES


@functools.lru_cache(maxsize=1)
def _prepared(op: str, shape: str, dtype: str, mode: str):
    """Problem and right answer, shared by the candidates of a case, which pytest runs one after the other."""
    suite = peers.load(op)
    fitted, _ = suite.scaled(suite.shapes[shape], "cpu")
    problem = suite.problem(fitted, DTYPES[dtype], "cpu")
    return suite, problem, suite.reference(problem, mode)


def parametrised(op: str, shapes: tuple[str, ...]):
    """A test function that checks and then times every candidate of ``op`` on the CPU; compare within a group."""
    suite = peers.load(op)
    cases = [
        pytest.param(peer, shape, dtype, mode, id=f"{shape}-{dtype}-{mode}-{peer.name}")
        for shape in shapes
        for dtype in ("float32", "bfloat16")
        for mode in MODES
        for peer in suite.candidates
    ]

    @pytest.mark.parametrize(("peer", "shape", "dtype", "mode"), cases)
    def test(benchmark, peer, shape, dtype, mode):
        block = blocks.Block(op, shape, dtype, mode)
        _, problem, right = _prepared(op, shape, dtype, mode)
        row, call = blocks.prepare(peer, block, suite, problem, right)
        if row["status"] == "not run":
            pytest.skip(row["reason"])
        assert call is not None, f"{peer.name}: {row['status']}: {row['reason']}"
        benchmark.group = f"{op} {shape} {dtype} {mode}"
        work = suite.work(problem.shape, DTYPES[dtype].itemsize, mode)
        benchmark.extra_info.update(row, flops=work.flops, bytes=work.bytes, threads=torch.get_num_threads())
        rounds = max(2, min(20, int(1e9 / max(work.flops, 1))))
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return test
