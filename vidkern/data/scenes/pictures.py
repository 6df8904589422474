"""A contact sheet of a clip: images, depth, instances and motion."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from vidkern._files import replacing
from vidkern.data.scenes.clip import SceneClip
from vidkern.data.scenes.errors import SceneError
from vidkern.data.scenes.textures import hsv_to_rgb
from vidkern.errors import import_extra

GAP, LABEL = 4, 16  # pixels


def flow_colours(flow: Tensor, largest: float | None = None) -> Tensor:
    """Direction as hue (right red, down green-yellow), length as saturation: float32 ``[..., 3, H, W]`` of flow ``[..., 2, H, W]``.

    largest: the length, pixels, that is fully saturated; None: the longest in ``flow``. No motion is white.
    """
    dx, dy = flow.double().unbind(-3)
    length = torch.hypot(dx, dy)
    largest = float(length.max()) if largest is None else largest
    hue = torch.atan2(dy, dx) / (2 * math.pi) % 1
    return hsv_to_rgb(hue, (length / max(largest, 1e-9)).clamp(max=1), torch.ones_like(hue)).movedim(-1, -3).float()


def depth_colours(depth: Tensor) -> Tensor:
    """Near white, far black, by the inverse of depth: float32 ``[..., 3, H, W]`` of depth ``[..., H, W]``."""
    near = 1 / depth
    return (near / near.max()).unsqueeze(-3).expand(*depth.shape[:-2], 3, *depth.shape[-2:]).float()


def id_colours(ids: Tensor) -> Tensor:
    """One colour for each instance, background black, ground grey: float32 ``[..., 3, H, W]`` of ids ``[..., H, W]``."""
    count = int(ids.max()) + 1
    hue = torch.arange(count) * 0.618 % 1
    palette = hsv_to_rgb(hue, torch.full((count,), 0.75), torch.full((count,), 0.95)).float()
    palette[:2] = torch.tensor([[0.0] * 3, [0.45] * 3])[:count]
    return palette[ids].movedim(-1, -3)


def save_contact_sheet(clip: SceneClip, path: str | os.PathLike, *, scale: int = 2) -> Path:
    """Writes a PNG: the image of every view and time; below, for each view, depth, instances, flow to the next time and flow to the
    next view (grey where the point is not visible there), all at time 0 or between times 0 and 1.

    Args:
        clip: of `render`. path: the file, replaced if there. scale: enlargement, a whole factor.

    Raises:
        SceneError: the path does not end in .png, or its folder does not exist.
        MissingExtra: Pillow is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise SceneError(f"path={str(path)!r}: expected a .png file in a folder that exists")
    image, draw = import_extra("PIL.Image", "the contact sheet"), import_extra("PIL.ImageDraw", "the contact sheet")
    rows = [(f"view {v}: rgb over time", clip.rgb[v]) for v in range(clip.views)]
    rows += [("depth, every view at time 0", depth_colours(clip.depth[:, 0])), ("instances", id_colours(clip.ids[:, 0]))]
    if clip.times > 1:
        rows.append(_flow_row("flow to time 1", clip.flow_time[:, 0], clip.flow_time_mask[:, 0]))
    if clip.views > 1:
        pairs = [clip.flow(v, 0, v + 1, 0) for v in range(clip.views - 1)]
        rows.append(_flow_row("flow to the next view", *map(torch.stack, zip(*pairs))))
    height, width = (n * scale + GAP for n in clip.size)
    columns = max(clip.times, clip.views)
    sheet = image.new("RGB", (columns * width + GAP, len(rows) * (height + LABEL) + GAP), "white")
    pen = draw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows):
        top = row * (height + LABEL)
        pen.text((GAP, top + 2), label, fill=(60, 60, 60))
        for column, picture in enumerate(pictures):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            tile = image.fromarray(pixels).resize((width - GAP, height - GAP), image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * width, top + LABEL))
    with replacing(path) as fresh:
        sheet.save(fresh, format="PNG")
    return path


def _flow_row(label: str, flow: Tensor, mask: Tensor) -> tuple[str, Tensor]:
    largest = float(torch.linalg.vector_norm(flow, dim=1)[mask].max()) if bool(mask.any()) else 1.0
    colours = flow_colours(flow, largest)
    return f"{label} (up to {largest:.1f} pixels; grey: not visible there)", torch.where(mask[:, None], colours, 0.5)
