"""Pictures of the runs: samples beside real pictures, previews as an animation, and curves."""

import torch
from PIL import Image, ImageDraw, ImageFont

from vidkern._files import replacing
from vidkern.errors import import_extra

INK, PAPER, MUTED, FRAME = (31, 35, 40), (255, 255, 255), (110, 118, 129), (208, 215, 222)
COLOUR = {"dfm": "#dc6d28", "flow": "#3b6fb6"}
TITLE = {"dfm": "DFM", "flow": "plain flow matching"}
SIDE = 64  # pixels of a shown picture


def to_image(picture, side=SIDE):
    """[C, h, w] in -1 .. 1 as a PIL image of `side` x `side`; single pixels stay visible."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def grid(pictures, columns, title, note="", *, side=SIDE, gap=4):
    """Pictures [n, C, h, w] in rows of `columns` under a title."""
    rows = -(-len(pictures) // columns)
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, 48 + rows * (side + gap) + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 4), title, font=font, fill=INK)
    draw.text((gap, 27), note, font=small, fill=MUTED)
    for i, picture in enumerate(pictures):
        canvas.paste(to_image(picture, side), (gap + i % columns * (side + gap), 48 + i // columns * (side + gap)))
    return canvas


def beside(images, gap=20):
    """Images in a row, aligned at the top."""
    canvas = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), max(i.height for i in images)), PAPER)
    x = 0
    for image in images:
        canvas.paste(image, (x, 0))
        x += image.width + gap
    return canvas


def save(image, path):
    """Write a PIL image in 200 colours, complete or not at all; the ending of the path names the format."""
    with replacing(path) as fresh:
        image.quantize(200, dither=0).save(fresh, optimize=True)


def samples(real, shown, notes, path, *, columns=6):
    """real [n, C, H, W]; shown: {model: [n, C, H, W]}; notes: {"real" or model: text under the title}."""
    panels = [grid(real, columns, "real, held out", notes["real"])]
    save(beside(panels + [grid(shown[m], columns, TITLE[m], notes[m]) for m in shown]), path)


def previews(moments, path, *, side=SIDE, gap=4, hold=12):
    """Every sampling step as a frame of an endlessly running GIF. moments: {model: [(times, pictures)]}; the last frame stays longer."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    label, band, count = 190, side + gap, len(next(iter(moments.values()))[0][1])
    steps = max(len(m) for m in moments.values())
    frames = []
    for step in range(steps):
        canvas = Image.new("RGB", (label + count * (side + gap) + gap, 36 + len(moments) * (band + 8)), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((8, 8), f"expected picture at step {step + 1} of {steps}", font=font, fill=INK)
        for row, (model, kept) in enumerate(moments.items()):
            times, pictures = kept[min(step, len(kept) - 1)]
            y = 36 + row * (band + 8)
            draw.text((8, y + 2), TITLE[model], font=font, fill=COLOUR[model])
            for level, t in enumerate(times):
                name = f"level {level + 1}" if len(times) > 1 else "time"
                draw.text((8, y + 26 + 16 * level), f"{name}: {t:.2f}" + ("  (waits)" if level and t == 0 and _waiting(pictures, kept) else ""),
                          font=small, fill=MUTED)
            for i, picture in enumerate(pictures):
                canvas.paste(to_image(picture, side), (label + i * (side + gap), y))
        frames.append(canvas.quantize(128, dither=0))
    with replacing(path) as fresh:
        frames[0].save(fresh, save_all=True, append_images=frames[1:], duration=[220] * (steps - 1) + [220 * hold], loop=0, optimize=True)


def _waiting(pictures, kept):
    """These pictures are still smaller than the last ones."""
    return pictures.shape[-1] < kept[-1][1].shape[-1]


def curves(record, path):
    """Per data set: the figure of quality over training compute, and the error of every level; mean and range over seeds."""
    names = list(record["measures"])
    figure = import_extra("matplotlib.figure", "drawing curves").Figure(figsize=(12, 4.2 * len(names)))
    panels = figure.subplots(len(names), 2, squeeze=False)
    for (left, right), name in zip(panels, names):
        for model in TITLE:
            runs = [run for run in record["runs"] if (run["data"], run["model"]) == (name, model)]
            points = runs[0]["curve"]
            flops = [p["step"] * runs[0]["step_flops"] / 1e9 for p in points]
            _band(left, flops[1:], [[p["distance"] for p in run["curve"][1:]] for run in runs], COLOUR[model], TITLE[model], "-")
            for level in range(len(points[0]["levels"])):
                label = f"{TITLE[model]}, level {level + 1}" if len(points[0]["levels"]) > 1 else TITLE[model]
                relative = [[p["levels"][level] / run["curve"][0]["levels"][level] for p in run["curve"]] for run in runs]
                _band(right, flops, relative, COLOUR[model], label, ("-", "--", ":", "-.")[level])
        left.axhline(record["measures"][name]["floor"]["distance"], color="#8b949e", linestyle=":", label="training pictures")
        left.set_title(f"{name}: Fréchet distance (lower is better)", fontsize=11)
        left.set_yscale("log")
        right.set_title(f"{name}: error of the velocity, of held-out pictures, 1 = untrained", fontsize=11)
        for panel in (left, right):
            panel.set_xlabel("training compute, GFLOP")
            panel.grid(alpha=0.25, which="both")
            panel.legend(fontsize=9)
            panel.yaxis.set_major_formatter("{x:g}")
        low, high = left.get_ylim()
        left.yaxis.set_minor_formatter("{x:g}" if high < 8 * low else "")      # labels between the powers of ten where there is room
    figure.tight_layout()
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=100)


def _band(panel, x, values, colour, label, style):
    values = torch.tensor(values)
    panel.plot(x, values.mean(0), color=colour, label=label, linestyle=style, linewidth=2)
    panel.fill_between(x, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
