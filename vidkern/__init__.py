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
    "merge_attention": "vidkern.ops.merge_attention",
    "BackendUnavailable": "vidkern.registry",
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
