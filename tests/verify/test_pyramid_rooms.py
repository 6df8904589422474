"""The pyramid ops are verified at sizes of real models too."""

import pytest
import torch

from vidkern.verify import accuracy
from vidkern.verify.rooms import ROOMS

OPS = [op for op in ROOMS if op.startswith("pyramid")]


@pytest.mark.parametrize("op", OPS)
def test_large_samples_are_large(op):
    """Each has a hundred thousand values at least, and names tell samples apart."""
    assert ROOMS[op].large
    for sample in ROOMS[op].large:
        assert sum(t.numel() for t in sample.tensors(torch.float32, "cpu", 0)) >= 100_000
    names = [s.name for s in (*ROOMS[op].samples, *ROOMS[op].large)]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_large_samples_keep_the_rule_on_the_cpu(op):
    for sample in ROOMS[op].large:
        accuracy.check(op, sample, torch.float32, "cpu", seeds=range(1))
