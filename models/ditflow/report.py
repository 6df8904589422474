"""What `vidkern demo ditflow` leaves behind: record.json, table.md, pictures, a video and a report.html that needs no other file."""

import html

import torch
from PIL import Image, ImageDraw, ImageFont

from vidkern._files import replacing
from vidkern.data import write_video

from ..shared.page import STYLE, data_uri, write_json
from . import pictures
from .runs import METHODS

HEAD = ("method", "AMF loss", "agreement", "moves the known way", "error of the motion", "motion fidelity")
MEASURES = {
    "loss": "mean squared error of the soft flow of the finished clip, read again at time 0, over the patches that move in the reference",
    "agreement": "uncentred correlation of its hard flow with the reference's, -1 to 1",
    "follows": "clips whose motion, tracked by block matching of their pixels, lies within the known motion's own length of it and has at least half of"
               " it along it; of the references of known motion",
    "error": "distance of the tracked motion from the known one, pixels a frame",
    "fidelity": "motion fidelity (arXiv 2311.17009) with block matching in place of CoTracker, -1 to 1; in brackets: clips where both move enough to tell",
}


def mean(values):
    """Mean of what is not None; None of nothing."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summary(record):
    """{method: {measure: mean over references, "follows": (count, of), "fidelity": (mean, of)}}."""
    found = {}
    for method in METHODS:
        rows = [row for row in record["rows"] if row["method"] == method]
        known = [row for row in rows if row["motion"] is not None]
        told = [row["fidelity"] for row in rows if row["fidelity"] is not None]
        found[method] = {"loss": mean(r["loss"] for r in rows), "agreement": mean(r["agreement"] for r in rows),
                         "follows": (sum(r["follows"] for r in known), len(known)), "error": mean(r["error"] for r in known),
                         "fidelity": (mean(told), len(told))}
    return found


def cells(record):
    """The table, row by row, as text."""
    for method, row in summary(record).items():
        fidelity = "" if row["fidelity"][0] is None else f"{row['fidelity'][0]:.2f} "
        yield (METHODS[method], f"{row['loss']:.2f}", f"{row['agreement']:.2f}", "{} of {}".format(*row["follows"]),
               "" if row["error"] is None else f"{row['error']:.1f}", f"{fidelity}({row['fidelity'][1]})")


def markdown(record):
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells(record)]) + "\n"


def verdict(record):
    """Plain sentences drawn from the numbers alone."""
    if record["quick"]:
        return "This was a --quick run: it checks the plumbing, the model has learned next to nothing and the order says nothing."
    rows = summary(record)
    base, ours = rows["backbone"], rows["latent"]
    best = max(METHODS, key=lambda m: rows[m]["follows"][0])
    said = [f"Without guidance {base['follows'][0]} of {base['follows'][1]} clips move the known way, with DiTFlow on the latent {ours['follows'][0]}; the "
            f"tracked motion is off by {base['error']:.1f} and {ours['error']:.1f} pixels a frame, the flows agree by {base['agreement']:.2f} and "
            f"{ours['agreement']:.2f}."]
    if rows[best]["follows"][0] > ours["follows"][0]:
        said.append(f"{METHODS[best]} moves more clips the known way: {rows[best]['follows'][0]}.")
    chosen = [s for s in record["scores"] if s["block"] in record["blocks"]]
    said.append(f"The flow of block{'s' * (len(chosen) > 1)} {', '.join(str(s['block']) for s in chosen)} correlates with known translations by "
                f"{', '.join(format(s['correlation'], '.2f') for s in chosen)}.")
    return " ".join(said)


def score_rows(record):
    """(block, correlation, soft, hits) as text."""
    for s in sorted(record["scores"], key=lambda s: s["block"]):
        yield (str(s["block"]) + (" (guides)" if s["block"] in record["blocks"] else ""), f"{s['correlation']:.2f}", f"{s['soft']:.2f}", f"{s['hits']:.0%}")


def montage(rows, path, *, side=(160, 128), fps=3, loops=4):
    """A silent mp4 of all clips side by side, and its frames below each other as a PNG beside it. rows: [(name, {title: clip in 0 .. 1})]."""
    font, gap, head = ImageFont.load_default(13), 6, 20
    titles, frames = list(rows[0][1]), len(next(iter(rows[0][1].values())))
    size = (gap + len(titles) * (side[0] + gap), head + len(rows) * (side[1] + gap + head))
    shown = []
    for f in range(frames):
        canvas = Image.new("RGB", size, pictures.PAPER)
        draw = ImageDraw.Draw(canvas)
        for x, title in enumerate(titles):
            draw.text((gap + x * (side[0] + gap), 2), title, font=font, fill=pictures.INK)
        for y, (name, clips) in enumerate(rows):
            top = head + y * (side[1] + gap + head)
            draw.text((gap, top), name, font=font, fill=pictures.MUTED)
            for x, title in enumerate(titles):
                canvas.paste(pictures.picture(clips[title][f]).resize(side, Image.Resampling.NEAREST), (gap + x * (side[0] + gap), top + head))
        shown.append(canvas)
    write_video(path, torch.stack([pictures.pixels(image) for image in shown] * loops), fps)
    ends = Image.new("RGB", (size[0], 2 * size[1]), pictures.PAPER)
    for y, image in enumerate((shown[0], shown[-1])):
        ends.paste(image, (0, y * size[1]))
    with replacing(path.with_suffix(".png")) as fresh:
        ends.save(fresh)


def write(out, record, clips, flows):
    """Write all result files into `out`. clips: [(name, {title: clip in 0 .. 1})]; flows: {file name: (frames in 0 .. 1, flow [F, F, h, w, 2], title)}."""
    for name, (frames, flow, title) in flows.items():
        pictures.sheet(frames, flow, out / f"{name}.png", title)
        pictures.movie(frames, flow, out / f"{name}.mp4")
        pictures.save_flow(out / f"{name}.npz", flow)
    montage(clips, out / "clips.mp4")
    write_json(out / "record.json", record)
    with replacing(out / "table.md") as fresh:
        fresh.write_text(markdown(record), encoding="utf-8")
    with replacing(out / "report.html") as fresh:
        fresh.write_text(page(out, record, flows), encoding="utf-8")


def _table(head, rows, mark=()):
    body = "".join(f"<tr{' class=us' if row[0] in mark else ''}>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{body}</table>"


def page(out, record, flows):
    """The report as one HTML string; pictures and videos are embedded."""
    settings = {**record["recipe"], "seed": record["seed"], **record["versions"], "seconds": record["seconds"], "CPU seconds": record["cpu_seconds"]}
    drawn = "".join(f'<h2>{html.escape(title)}</h2><img alt="{name}" src="{data_uri(out / f"{name}.png", "image/png")}">'
                    for name, (_, _, title) in flows.items())
    measures = "".join(f"<li><b>{HEAD[i]}</b>: {html.escape(text)}.</li>" for i, text in zip((1, 2, 3, 4, 5), MEASURES.values()))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>vidkern demo: ditflow</title><style>{STYLE}</style><main>
<h1>Motion from one clip, content from another</h1>
<p class="muted">DiTFlow (arXiv 2412.07776) on a toy video diffusion transformer: attention motion flow read from a clip guides the sampling of
another.</p>
<p class="verdict">{html.escape(verdict(record))}</p>
<h2>References and what was made from them, not chosen</h2>
<video autoplay loop muted controls src="{data_uri(out / 'clips.mp4', 'video/mp4')}"></video>
<p class="muted">Left: the reference. Every other column starts from the same noise and asks for the other clip's content.</p>
<h2>Measured</h2>
{_table(HEAD, cells(record), (METHODS['latent'],))}
<ul class="muted">{measures}</ul>
<p>A falling AMF loss is no evidence of transferred motion: the soft flow can be met by spreading attention, without moving any match. What the
pixels do is in the third and fourth columns; the flow columns are read by the model that was guided.</p>
{drawn}
<h2>Which block</h2>
{_table(("block", "correlation, hard flow", "soft flow", "within a patch"), score_rows(record))}
<p class="muted">Flow against known translations of held-out stills, by whole patches.</p>
<h2>Settings</h2>
<pre>{html.escape(record['command'])}</pre>
{_table(("setting", "value"), [(str(k), str(v)) for k, v in settings.items()])}
</main></html>
"""
