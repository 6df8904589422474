"""Shared by the tests of this folder."""

import pytest
import torch


@pytest.fixture
def randomise():
    """A function that gives every parameter a random value: AdaLN-zero models are the identity at init, which would hide what is tested."""
    return _randomise


def _randomise(module, seed=0, spread=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return module
