"""Decomposable Flow Matching (arXiv 2506.19839): one model, one flow per level of a pyramid, sampled coarse to fine."""

import importlib

_HOMES = {
    "DFMConfig": "config", "tiny": "config", "base": "config", "large": "config", "xlarge": "config", "flux": "config",
    "DFM": "model", "from_plain": "model",
    "split": "levels", "join": "levels", "level_std": "levels", "flow_inputs": "levels", "noise_levels": "levels",
    "draw_stage": "times", "draw_times": "times", "DFMLoss": "loss",
    "schedule": "phases", "Step": "phases", "sample": "sampler", "Moment": "sampler",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
