"""vidkern: the performance core of video generation as PyTorch ops.

Importing it does no work: every public name is loaded at first use.
"""

import importlib as _importlib

__version__ = "0.1.0"

_HOMES = {
    "grid_attention": "vidkern.ops.grid_attention",
    "frame_sparse_attention": "vidkern.ops.grid_attention",
    "FramePattern": "vidkern.ops.grid_attention",
    "GridPattern": "vidkern.ops.grid_attention",
    "attention_mass": "vidkern.ops.grid_attention.statistics",
    "attention_entropy": "vidkern.ops.grid_attention.statistics",
    "merge_attention": "vidkern.ops.merge_attention",
    "attention_motion_flow": "vidkern.ops.attention_motion_flow",
    "amf_loss": "vidkern.ops.attention_motion_flow",
    "attention_motion_flow": "vidkern.ops.attention_motion_flow",
    "amf_loss": "vidkern.ops.attention_motion_flow",
    "pyramid_decompose": "vidkern.ops.pyramid_decompose",
    "pyramid_merge": "vidkern.ops.pyramid_merge",
    "pyramid_pad": "vidkern.ops.pyramid.padding",
    "pyramid_crop": "vidkern.ops.pyramid.padding",
    "pyramid_flow_inputs": "vidkern.ops.pyramid_flow_inputs",
    "flow_coefficients": "vidkern.ops.pyramid_flow_inputs",
    "pyramid_flow_loss": "vidkern.ops.pyramid_flow_loss",
    "pyramid_flow_step": "vidkern.ops.pyramid_flow_step",
    "pyramid_stages": "vidkern.ops.pyramid_stage_inputs",
    "pyramid_stage_inputs": "vidkern.ops.pyramid_stage_inputs",
    "pyramid_stage_transition": "vidkern.ops.pyramid_stage_transition",
    "pruned_linear": "vidkern.ops.pruned_linear",
    "pruned_ffn": "vidkern.ops.pruned_ffn",
    "pruned_linear_grouped": "vidkern.ops.pruned_linear_grouped",
    "ChannelIndex": "vidkern.ops.pruned.index",
    "BackendUnavailable": "vidkern.registry",
    "UnverifiedBackendWarning": "vidkern.registry",
    "explain": "vidkern.registry",
    "use": "vidkern.registry",
    "info": "vidkern.about",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vidkern' has no attribute {name!r}")
    value = getattr(_importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
