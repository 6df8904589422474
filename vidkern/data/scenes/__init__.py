"""Procedural dynamic scenes seen by synchronous cameras, with depth, instances, cameras and exact flow over time and between views.

The tracer needs torch alone; the scene "robots" is rendered by PyBullet (the extra "scenes"). See docs/scenes.md.
"""

from vidkern.data.scenes.cameras import Rig
from vidkern.data.scenes.clip import SceneClip, warp_back
from vidkern.data.scenes.dataset import SceneDataset
from vidkern.data.scenes.errors import SceneError
from vidkern.data.scenes.pictures import depth_colours, flow_colours, id_colours, save_contact_sheet
from vidkern.data.scenes.rendering import render, scene_names

__all__ = [
    "Rig",
    "SceneClip",
    "SceneDataset",
    "SceneError",
    "depth_colours",
    "flow_colours",
    "id_colours",
    "render",
    "save_contact_sheet",
    "scene_names",
    "warp_back",
]
