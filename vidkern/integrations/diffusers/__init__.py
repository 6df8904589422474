"""diffusers transformers on vidkern: its attention (``enable_vidkern(transformer, pattern=...)``), models made of them, motion transfer.

Importing this package does not import diffusers.
"""

import importlib

_HOMES = {
    "VidkernAttnProcessor": "processors",
    "Frames": "frames",
    "VidkernHandle": "enable",
    "enable_vidkern": "enable",
    "FourRealTransformer": "four_real",
    "four_real_from_diffusers": "four_real",
    "DFMTransformer": "dfm",
    "dfm_from_diffusers": "dfm",
    "DFMFlowMatchEulerScheduler": "dfm_scheduler",
    "DFMSchedulerOutput": "dfm_scheduler",
    "MotionTransferPipeline": "motion_pipeline",
    "motion_adapter": "motion",
    "noise_function": "motion_pipeline",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
