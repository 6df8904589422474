"""Modules on vidkern's ops, and their checkpoints in both forms: packed, and dense with masks."""

from .pruned import PrunedFFN, PrunedLinear
from .state import load, load_masked_state, masked_state, save

__all__ = ["PrunedFFN", "PrunedLinear", "load", "load_masked_state", "masked_state", "save"]
