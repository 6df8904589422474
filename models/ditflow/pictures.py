"""Attention motion flow as pictures: arrows and colours over frames, paths chained over time, as PNG and mp4; and as a file of numbers."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from vidkern._files import replacing
from vidkern.data import write_video

INK, PAPER, MUTED, RULE = (31, 35, 40), (255, 255, 255), (110, 118, 129), (208, 212, 218)
STILL = 0.25      # patches: shorter arrows are dots
DENSE = 18        # pixels between arrows, at least


def square(flow, frames):
    """Flow [F * F, S, 2] of all pairs as [F, F, h, w, 2]; frames: (F, h, w)."""
    count, height, width = frames
    if flow.shape != (count * count, height * width, 2):
        raise ValueError(f"flow: shape {tuple(flow.shape)}, expected {(count * count, height * width, 2)}, all pairs of {count} frames")
    return flow.view(count, count, height, width, 2)


def save_flow(path, flow):
    """Write flow [F, F, h, w, 2] as ``flow`` of an .npz file: [f1, f2, y, x] is the displacement (x, y) from frame f1 to f2, in patches, fp32."""
    with replacing(path) as fresh, open(fresh, "wb") as file:
        np.savez_compressed(file, flow=flow.detach().cpu().float().numpy())


def colours(flow, top):
    """RGB [..., 3] in 0 .. 1 of displacements [..., 2] (x right, y down): hue is the direction (right red, down yellow-green, left cyan, up
    violet), saturation the length up to `top`; at rest is white."""
    x, y = flow.unbind(-1)
    strength = (torch.hypot(x, y) / max(top, 1e-6)).clamp(max=1)
    hue = (torch.atan2(y, x) / (2 * math.pi)) % 1
    shift = torch.tensor([0.0, 4.0, 2.0], device=flow.device)
    pure = ((hue[..., None] * 6 + shift) % 6 - 3).abs().sub(1).clamp(0, 1)
    return 1 - strength[..., None] * (1 - pure)


def chain(flow):
    """Paths [F, h, w, 2] of the patches of frame 0, in patches (x, y): the flows to the next frame of [F, F, h, w, 2], one after the other.

    Flows are read bilinearly where a path has come to. A path that leaves the picture by more than half a patch is NaN from there on.
    """
    count, _, height, width, _ = flow.shape
    own = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).to(flow)
    limit, path = own.new_tensor([width - 1, height - 1]), [own]
    for f in range(count - 1):
        at = path[-1] / limit.clamp(min=1) * 2 - 1
        move = F.grid_sample(flow[f, f + 1].permute(2, 0, 1)[None], at.nan_to_num()[None], mode="bilinear", padding_mode="border",
                             align_corners=True)
        to = path[-1] + move[0].permute(1, 2, 0)
        inside = ((to >= -0.5) & (to <= limit + 0.5)).all(-1, keepdim=True)
        path.append(to.masked_fill(~inside, float("nan")))
    return torch.stack(path)


def _top(flow):
    """The length that is drawn at full colour: the 98th percentile, at least a patch."""
    return max(1.0, float(torch.quantile(flow.flatten(0, -2).norm(dim=-1).float()[:100_000], 0.98)))


def pixels(image):
    """A PIL image as uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def picture(x):
    """[3, H, W] in 0 .. 1 as a PIL image."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def _frame(frame, size, pale=0.0):
    return Image.blend(picture(frame).resize(size, Image.Resampling.BICUBIC), Image.new("RGB", size, PAPER), pale)


def _ink(move):
    """The colour of a direction [2], dark enough for a line."""
    return tuple(int(255 * c * 0.8) for c in colours(move, float(move.norm())).tolist())


def wheel(side):
    """The colours of all directions, strongest at the rim."""
    axis = torch.linspace(-1, 1, side)
    at = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    rgb = torch.where((at.norm(dim=-1) <= 1)[..., None], colours(at, 1.0), torch.ones(3))
    image = picture(rgb.permute(2, 0, 1))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, side - 1, side - 1), outline=MUTED)
    return image


def arrows(frame, flow, size):
    """A frame [3, H, W] of `size` (width, height) pixels with an arrow from every patch of flow [h, w, 2] to where it goes; a dot: it stays."""
    image = _frame(frame, size, 0.35)
    draw, (height, width) = ImageDraw.Draw(image), flow.shape[:2]
    cell = size[0] / width, size[1] / height
    step = _step(cell)
    for y in range(step // 2, height, step):
        for x in range(step // 2, width, step):
            start = ((x + 0.5) * cell[0], (y + 0.5) * cell[1])
            dx, dy = float(flow[y, x, 0]) * cell[0], float(flow[y, x, 1]) * cell[1]
            _arrow(draw, start, (start[0] + dx, start[1] + dy), _ink(flow[y, x]), float(flow[y, x].norm()) < STILL)
    return image


def _arrow(draw, start, end, ink, still):
    if still:
        draw.ellipse((start[0] - 1.5, start[1] - 1.5, start[0] + 1.5, start[1] + 1.5), fill=MUTED)
        return
    draw.line((*start, *end), fill=PAPER, width=4)
    draw.line((*start, *end), fill=ink, width=2)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    head = [(end[0] - 8 * math.cos(angle + turn), end[1] - 8 * math.sin(angle + turn)) for turn in (0.55, -0.55)]
    draw.polygon((end, *head), fill=ink, outline=PAPER)


def field(flow, size, top):
    """Flow [h, w, 2] as colours, one block a patch, in a frame: at rest is white."""
    image = picture(colours(flow, top).permute(2, 0, 1)).resize(size, Image.Resampling.NEAREST)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=RULE)
    return image


def _step(cell):
    """Arrows and paths begin at every so many patches of `cell` (width, height) pixels."""
    return max(1, math.ceil(DENSE / min(cell)))


def trails(frame, paths, size):
    """A frame with the paths [f, h, w, 2] (`chain`) that lead to it from the patches of the first frame, coloured by where they lead in all."""
    image = _frame(frame, size, 0.35)
    draw, (height, width) = ImageDraw.Draw(image), paths.shape[1:3]
    cell = size[0] / width, size[1] / height
    step = _step(cell)
    for y in range(step // 2, height, step):
        for x in range(step // 2, width, step):
            path = paths[:, y, x]
            path = path[~path.isnan().any(-1)]
            points = [((px + 0.5) * cell[0], (py + 0.5) * cell[1]) for px, py in path.tolist()]
            move = path[-1] - path[0]
            still = float(move.norm()) < STILL
            if not still:
                draw.line(points, fill=PAPER, width=4, joint="curve")
                draw.line(points, fill=_ink(move), width=2, joint="curve")
            px, py = points[-1]
            if len(path) == len(paths):
                draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=MUTED if still else _ink(move), outline=PAPER)
    return image


def _size(frame, width=240):
    return width, max(2, round(width * frame.shape[1] / frame.shape[2] / 2) * 2)


def sheet(frames, flow, path, title=""):
    """A PNG: arrows and colours from every frame to the next, the paths over all frames, the colours of all pairs, and what they mean.

    frames: [F, 3, H, W] in 0 .. 1, the pictures of the latent frames. flow: [F, F, h, w, 2] in patches.
    """
    check(frames, flow)
    count, size = len(frames), _size(frames[0])
    after = [(f, min(f + 1, count - 1)) for f in range(max(1, count - 1))]
    top, top_all = _top(torch.stack([flow[pair] for pair in after])), _top(flow)
    font, small, gap, head = ImageFont.load_default(18), ImageFont.load_default(13), 8, 44
    small_size = tuple(max(16, side // 3) for side in size)
    pairs = count * (small_size[0] + 4) + 20, count * (small_size[1] + 4) + 18
    wide = max((len(after) + 1) * (size[0] + gap) + gap, pairs[0] + 2 * gap)
    canvas = Image.new("RGB", (wide, head + 2 * (size[1] + gap + 18) + 26 + pairs[1] + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), title, font=font, fill=INK)
    step = _step((size[0] / flow.shape[3], size[1] / flow.shape[2]))
    y, lower = head, head + size[1] + gap + 36
    if step > 1:
        draw.text((gap, lower - 18), f"every patch (above: one in {step**2})", font=small, fill=MUTED)
    for (f, to), x in zip(after, range(gap, wide, size[0] + gap)):
        draw.text((x, y), f"frame {f} to {to}", font=small, fill=MUTED)
        canvas.paste(arrows(frames[f], flow[f, to], size), (x, y + 18))
        canvas.paste(field(flow[f, to], size, top), (x, lower))
    x = gap + len(after) * (size[0] + gap)
    draw.text((x, y), f"paths from frame 0 to {count - 1}", font=small, fill=MUTED)
    canvas.paste(trails(frames[-1], chain(flow), size), (x, y + 18))
    side = min(size) - 12
    canvas.paste(wheel(side), (x + (size[0] - side) // 2, lower))
    draw.text((x, lower - 18), f"rim: {top:.1f} patches or more (below: {top_all:.1f})", font=small, fill=MUTED)
    y = head + 2 * (size[1] + gap + 18) + 4
    draw.text((gap, y), "all pairs: from the row's frame to the column's; to itself: the mean match", font=small, fill=MUTED)
    for a in range(count):
        draw.text((gap, y + 38 + a * (small_size[1] + 4) + small_size[1] // 2 - 8), str(a), font=small, fill=MUTED)
        draw.text((gap + 20 + a * (small_size[0] + 4) + small_size[0] // 2 - 4, y + 20), str(a), font=small, fill=MUTED)
        for b in range(count):
            at = gap + 20 + b * (small_size[0] + 4), y + 38 + a * (small_size[1] + 4)
            canvas.paste(field(flow[a, b], small_size, top_all), at)
    with replacing(path) as fresh:
        canvas.save(fresh)


def movie(frames, flow, path, *, fps=2, loops=3):
    """An mp4: every frame with arrows to the next one, and beside it the growing paths; the clip repeats `loops` times."""
    check(frames, flow)
    size, paths, made = _size(frames[0], 320), chain(flow), []
    for f in range(len(frames)):
        canvas = Image.new("RGB", (2 * size[0] + 8, size[1]), PAPER)
        to = min(f + 1, len(frames) - 1)
        canvas.paste(arrows(frames[f], flow[f, to], size), (0, 0))
        canvas.paste(trails(frames[f], paths[: f + 1], size), (size[0] + 8, 0))
        made.append(pixels(canvas))
    write_video(path, torch.stack(made * loops), fps)


def check(frames, flow):
    """ValueError unless frames and flow belong together."""
    if flow.ndim != 5 or flow.shape[0] != flow.shape[1] or flow.shape[-1] != 2:
        raise ValueError(f"flow: shape {tuple(flow.shape)}, expected [F, F, h, w, 2]")
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) != len(flow):
        raise ValueError(f"frames: shape {tuple(frames.shape)}, expected [{len(flow)}, 3, H, W]")
