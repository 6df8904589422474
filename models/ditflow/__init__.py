"""DiTFlow (arXiv 2412.07776): motion transfer between videos by the attention of a diffusion transformer, without training."""

import importlib

_HOMES = {
    "GuidanceConfig": "config", "cogvideox_5b": "config", "cogvideox_2b": "config", "wan_14b": "config", "wan_1_3b": "config", "smm": "config",
    "moft": "config",
    "Adapter": "adapter", "TinyAdapter": "adapter", "Taps": "taps", "Reached": "taps",
    "MotionGuidance": "guidance", "MotionReference": "guidance", "GuidanceStopped": "guidance", "load_tables": "guidance",
    "transfer": "sampler", "FlowSampler": "sampler", "dynamic_scale": "sampler",
    "score_blocks": "probe", "select_block": "probe", "BlockScore": "probe", "known_flow": "probe", "window": "probe",
    "TinyVideoDiT": "model", "TinyConfig": "model", "tiny": "model",
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
