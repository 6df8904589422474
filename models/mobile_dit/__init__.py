"""A pruned, four-step video diffusion transformer for phones (arXiv 2507.13343): prune a trained model in blocks, heads and FFN channels,
recover it by distillation, and distil it to four steps."""

import importlib

_HOMES = {
    "server": "config", "mobile": "config", "mobile_irregular": "config", "tiny_teacher": "config", "tiny_student": "config",
    "MobileDiT": "model", "parameter_count": "model", "on_meta": "model",
    "Keep": "keep", "KeepError": "keep", "Unit": "keep", "units": "keep", "masks_of": "keep", "unit_masks": "keep",
    "compact": "cutting", "expand": "cutting", "compact_config": "cutting", "pack": "cutting", "unpack": "cutting",
    "save": "checkpoint", "load": "checkpoint", "LayoutError": "checkpoint",
    "Calibration": "sensitivity", "distance": "sensitivity", "scores": "sensitivity",
    "ParameterCost": "allocation", "LatencyCost": "latency", "measure_latency": "latency", "allocate": "allocation", "select": "allocation",
    "BudgetError": "allocation", "prune": "pruning",
    "FlowLoss": "recovery", "DistillLoss": "recovery", "recover": "recovery",
    "Discriminator": "discriminator", "StepDistiller": "adversarial", "synthesise": "adversarial",
    "sample": "sampler", "times": "sampler", "forward_flops": "cost", "from_ltx": "ltx",
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
