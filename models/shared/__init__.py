"""Parts that the methods share. Each can be taken alone: ``from vidkern.models.shared import VideoDiT``."""

import importlib

_HOMES = {
    "VideoDiT": "dit", "DiTConfig": "dit", "BlockSpec": "dit", "Block": "dit", "patchify": "dit", "unpatchify": "dit",
    "TableDiT": "table_dit", "TableConfig": "table_dit", "TableSpec": "table_dit", "TableBlock": "table_dit",
    "SelfAttention": "attention", "CrossAttention": "attention",
    "RotaryEmbedding": "rope", "FullWidthRope": "rope", "apply_rope": "rope", "apply_head_rope": "rope", "collapsed_time": "rope",
    "grid_positions": "rope", "split_head_dim": "rope",
    "RectifiedFlow": "flow", "uniform_sigma": "flow", "logit_normal_sigma": "flow", "shift_sigma": "flow",
    "combine": "guidance", "cfg_weights": "guidance", "guided": "guidance",
    "euler": "sample", "denoise": "sample", "schedule": "sample",
    "TrainConfig": "train", "Trainer": "train", "EMA": "train", "Interrupted": "train",
    "psnr": "metrics", "ssim": "metrics", "frechet": "metrics",
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
