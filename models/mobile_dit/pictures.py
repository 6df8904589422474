"""Pictures of a run: clips as a moving GIF and as a sheet of frames, and a map of what was kept."""

import torch
from PIL import Image, ImageDraw, ImageFont

from vidkern._files import replacing

from .data import FRAMES
from .keep import counts

INK, PAPER, MUTED, KEPT, GONE = (31, 35, 40), (255, 255, 255), (110, 118, 129), (59, 111, 182), (225, 228, 232)
SHOWN = (0, 4, 8, 12, 16)


def _image(frame, side):
    pixels = ((frame.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _rows(videos, prompts, side, columns, cell, draw_cell):
    """A canvas with a label per row (a model) and a heading per column (a prompt); draw_cell(canvas, video, x, y) fills a cell."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    label, top, band = 190, 40, side + 10
    canvas = Image.new("RGB", (label + columns * (cell + 8), top + len(videos) * band), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, words in enumerate(prompts[:columns]):
        for line, text in enumerate(_two_lines(words)):
            draw.text((label + i * (cell + 8), 6 + 14 * line), text, font=small, fill=MUTED)
    for row, (title, clips) in enumerate(videos.items()):
        for line, text in enumerate(title.split("\n")):
            draw.text((6, top + row * band + 4 + 20 * line), text, font=font if not line else small, fill=INK if not line else MUTED)
        for i in range(columns):
            draw_cell(canvas, clips[i], label + i * (cell + 8), top + row * band)
    return canvas


def _two_lines(words):
    first, _, rest = words.partition(" going ")
    return first, f"going {rest}"


def sheet(videos, prompts, path, *, columns=4, side=44):
    """videos: {title: [n, 3, 17, 32, 32]}; five frames of each clip, the same prompt in every row of a column."""
    def draw(canvas, video, x, y):
        for k, frame in enumerate(SHOWN):
            canvas.paste(_image(video[:, frame], side), (x + k * (side + 2), y))

    _save(_rows(videos, prompts, side, columns, len(SHOWN) * (side + 2), draw), path)


def movie(videos, prompts, path, *, columns=8, side=72):
    """The same clips as an endlessly running GIF."""
    frames = []
    for time in range(FRAMES):
        def draw(canvas, video, x, y, time=time):
            canvas.paste(_image(video[:, time], side), (x, y))

        frames.append(_rows(videos, prompts, side, columns, side, draw).quantize(128, dither=0))
    with replacing(path) as fresh:
        frames[0].save(fresh, save_all=True, append_images=frames[1:], duration=[90] * (FRAMES - 1) + [900], loop=0, optimize=True)


def kept_map(keep, config, path, *, cell=16):
    """One line per block of the teacher: heads, cross-attention heads and FFN groups, dark where they are kept."""
    keep, small = keep.checked(config, allow_no_heads=True), ImageFont.load_default(12)
    widest = {level: max(counts(spec, config.group)[level] for spec in config.blocks) for level in ("heads", "xheads", "ffn")}
    title = {"heads": "self-attention heads", "xheads": "cross-attention heads", "ffn": f"FFN, groups of {config.group} channels"}
    starts, x = {}, 70
    for level, n in widest.items():
        starts[level] = x
        x += max(n * (cell + 2), 8 * len(title[level])) + 24
    canvas = Image.new("RGB", (x, 26 + len(config.blocks) * (cell + 4)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for level, start in starts.items():
        draw.text((start, 4), title[level], font=small, fill=INK)
    for b, spec in enumerate(config.blocks):
        y = 26 + b * (cell + 4)
        draw.text((6, y), f"block {b}", font=small, fill=INK if b in keep.blocks else MUTED)
        for level, start in starts.items():
            kept = getattr(keep, level).get(b, ()) if b in keep.blocks else ()
            for i in range(counts(spec, config.group)[level]):
                draw.rectangle((start + i * (cell + 2), y, start + i * (cell + 2) + cell, y + cell), fill=KEPT if i in kept else GONE)
    _save(canvas, path)


def _save(image, path):
    with replacing(path) as fresh:
        image.quantize(200, dither=0).save(fresh, optimize=True)


def decoded(codec, latents):
    """Videos in -1 .. 1 of latents."""
    with torch.no_grad():
        return codec.decode(latents)
