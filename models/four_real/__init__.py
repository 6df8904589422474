"""4Real-Video-V2 (arXiv 2506.18839): grids of views x times by a video DiT with fused view-time attention."""

import importlib

_HOMES = {
    "FourRealConfig": "config", "tiny": "config", "paper": "config",
    "FourRealVideo": "model", "ReferenceEmbedding": "model", "on_meta": "model", "parameter_count": "model",
    "References": "conditioning", "reference_mask": "conditioning", "draw_modes": "conditioning",
    "encode_references": "conditioning", "latent_times": "conditioning",
    "ReferenceCodec": "codec", "FourRealLoss": "loss", "generate": "sample", "GridSource": "data", "SceneSource": "scenes",
    "DataMix": "mix", "Curriculum": "mix", "reversed_views": "mix", "static_grids": "mix",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
