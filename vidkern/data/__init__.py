"""Reading and writing video, the bundled clips, pseudo-views made from ordinary clips, and rendered scenes with several cameras.

Names are imported on first use; PyAV is needed by the video functions alone (the extra "demo").
"""

import importlib

_HOME = {
    "Rig": "scenes",
    "SceneClip": "scenes",
    "SceneDataset": "scenes",
    "Video": "video",
    "read_video": "video",
    "write_video": "video",
    "bundled_clip": "clips",
    "bundled_clips": "clips",
    "homography_path": "views",
    "pseudo_views": "views",
    "render": "scenes",
    "scene_names": "scenes",
    "warp": "views",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
