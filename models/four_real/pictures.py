"""Pictures of a grid: a labelled contact sheet (PNG) and the grid playing over time (frames of a video)."""

import torch
from PIL import Image, ImageDraw, ImageFont

GIVEN, MADE, INK, PAPER, MUTED = (46, 160, 67), (219, 109, 40), (31, 35, 40), (255, 255, 255), (110, 118, 129)
ERROR_GAIN = 4


def to_image(frame, scale):
    """[3, h, w] in [0, 1] -> PIL image, enlarged by a whole factor."""
    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((frame.shape[2] * scale, frame.shape[1] * scale), Image.Resampling.BICUBIC)


def framed(canvas, image, corner, colour, width=3):
    """Paste `image` onto `canvas` at `corner` (x, y) with a coloured frame around it."""
    x, y = corner
    canvas.paste(colour, (x - width, y - width, x + image.width + width, y + image.height + width))
    canvas.paste(image, corner)


def panel(grid, mask, *, title, note, scale=2, gap=8, margin=34, top=50, colours=(GIVEN, MADE), note_below=False):
    """One grid [V, T, 3, h, w] as an image with view and time labels. Cells in mask [V, T] get the first frame colour, others the second.

    top: pixels above the cells. note_below: the note goes under the title, not beside it.
    """
    V, T, _, h, w = grid.shape
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    width, height = margin + T * (w * scale + gap) + gap, top + V * (h * scale + gap) + gap
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 4), title, font=font, fill=INK)
    draw.text((8, 27) if note_below else (8 + draw.textlength(title, font=font) + 12, 9), note, font=small, fill=MUTED)
    for t in range(T):
        draw.text((margin + t * (w * scale + gap) + gap, top - 19), f"time {t}", font=small, fill=MUTED)
    for v in range(V):
        y = top + v * (h * scale + gap) + gap // 2
        draw.text((8, y + h * scale // 2 - 8), f"v{v}", font=small, fill=MUTED)
        for t in range(T):
            corner = (margin + t * (w * scale + gap) + gap // 2, y)
            framed(canvas, to_image(grid[v, t], scale), corner, colours[0 if mask[v, t] else 1])
    return canvas


def stack(images):
    """Images below one another, left-aligned, as one image."""
    canvas = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), PAPER)
    y = 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height
    return canvas


def contact_sheet(model, truth, filled, mask, *, baseline, scores):
    """The sheet of grid.png: generated, truth, error of the model, the grid of the best baseline and its error.

    baseline: what that is, in words. scores: (model dB, baseline dB).
    """
    nothing = torch.zeros_like(mask)
    neutral = ((208, 215, 222),) * 2
    error, other = ((x - truth).abs().mean(2, keepdim=True).expand_as(truth) * ERROR_GAIN for x in (model, filled))
    return stack([
        panel(model, mask, title="Generated", note=f"green: given reference   orange: generated   {scores[0]:.1f} dB"),
        panel(truth, nothing, title="Truth", note="what the unseen cells really look like", colours=neutral),
        panel(error, nothing, title="Error of the model", note=f"absolute, {ERROR_GAIN} times amplified; black is right", colours=neutral),
        panel(filled, mask, title="Best simple fill", note=f"for comparison: {baseline}   {scores[1]:.1f} dB",
              colours=(GIVEN, neutral[0])),
        panel(other, nothing, title="Error of that fill", note="same scale", colours=neutral),
    ])


def playing(model, truth, baseline, mask, *, scale=3):
    """The grid over time, uint8 [T, 3, H, W]: one column per view; rows are the generated grid, the truth, and the best simple fill."""
    V, T, _, h, w = model.shape
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    label, gap, top = 92, 14, 30
    width, height = label + V * (w * scale + gap), top + 3 * (h * scale + gap)
    frames = []
    for t in range(T):
        canvas = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((8, 7), f"time {t}", font=small, fill=MUTED)
        for v in range(V):
            draw.text((label + v * (w * scale + gap), 7), f"view {v}" + ("  (given)" if mask[v, t] else ""), font=small,
                      fill=GIVEN if mask[v, t] else MADE)
        for row, (name, grid) in enumerate((("generated", model), ("truth", truth), ("simple fill", baseline))):
            y = top + row * (h * scale + gap)
            draw.text((8, y + h * scale // 2 - 10), name, font=font, fill=INK)
            for v in range(V):
                colour = GIVEN if mask[v, t] else (MADE if row == 0 else (208, 215, 222))
                framed(canvas, to_image(grid[v, t], scale), (label + v * (w * scale + gap), y), colour, width=4)
        pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
        frames.append(pixels.view(canvas.height, canvas.width, 3).permute(2, 0, 1))
    return torch.stack(frames)
