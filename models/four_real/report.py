"""What a demo run leaves behind: grid.png, grid.mp4, metrics.json and a report.html that needs no other file."""

import html
import json

import torch

from vidkern._files import replacing
from vidkern.data import write_video

from ..shared.page import STYLE, data_uri, write_json
from . import pictures

BASELINE_TEXT = {
    "nearest": "the reference cell closest in the grid",
    "same_time": "the fixed-view frame of the same time: right moment, wrong view",
    "same_view": "the freeze-time frame of the same view: right view, wrong moment",
    "mean": "average of same_time and same_view",
    "weighted": "the same average, weighted by closeness in the grid",
    "change": "the same view's first frame plus what changed in view 0",
}


def is_quick(metrics):
    """Whether this was a run that checks the plumbing alone."""
    return metrics["settings"]["held_out_grids"] == 2


def headline(metrics):
    """One sentence: PSNR of the model, of the best simple fill, and the margin."""
    best = metrics["best_baseline"]
    return (f"unseen cells: model {metrics['psnr']['model']:.2f} dB PSNR, best simple fill ({best}) {metrics['psnr'][best]:.2f} dB, "
            f"margin {metrics['margin_db_over_best']:+.2f} dB; nearest reference {metrics['psnr']['nearest']:.2f} dB")


def write(out, result, metrics, fps):
    """Write all result files into the folder `out`; fps: grid times per second."""
    best, i = metrics["best_baseline"], metrics["shown_grid"]
    model, truth, fill, mask = result["model"][i], result["truth"][i], result["baselines"][best][i], result["mask"]
    scores = [_mean_psnr(grid, truth, mask) for grid in (model, fill)]
    sheet = pictures.contact_sheet(model, truth, fill, mask, baseline=f"{best}, {BASELINE_TEXT[best]}", scores=scores)
    with replacing(out / "grid.png") as fresh:
        # 160 colours: a third of the size, and no visible difference on a sheet of thumbnails.
        sheet.quantize(160, dither=0).save(fresh, optimize=True)
    movie = pictures.playing(model, truth, fill, mask)
    write_video(out / "grid.mp4", movie.repeat_interleave(2, 0).repeat(4, 1, 1, 1), 2 * min(fps, 6.0))
    write_json(out / "metrics.json", metrics)
    with replacing(out / "report.html") as fresh:
        fresh.write_text(page(out, metrics), encoding="utf-8")


def _mean_psnr(grid, truth, mask):
    error = (grid - truth).square().mean((-3, -2, -1))[~mask]
    return (-10 * torch.log10(error.clamp_min(1e-10))).mean().item()


def page(out, metrics):
    """The report as one HTML string; pictures are embedded."""
    m, best = metrics, metrics["best_baseline"]
    settings = m["settings"]
    margin = m["margin_db_over_best"]
    said = "This was a <b>--quick</b> run: it checks the plumbing, the model has learned next to nothing." if is_quick(m) else html.escape(verdict(m))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>vidkern demo: 4Real-Video-V2</title><style>{STYLE}</style><main>
<h1>A grid of views and times from one row and one column</h1>
<p class="muted">4Real-Video-V2 (arXiv 2506.18839) at toy size, trained from nothing on this machine in {_minutes(m['training_seconds'])}.</p>
<p class="verdict">{said}</p>
<div class="cards">
<div class="card"><b>{m['psnr']['model']:.2f} dB</b><span>PSNR of generated cells</span></div>
<div class="card"><b>{margin:+.2f} dB</b><span>against the best simple fill ({best})</span></div>
<div class="card"><b>{m['margin_db_over_nearest']:+.2f} dB</b><span>against the nearest reference</span></div>
<div class="card"><b>{m['ssim']['model']:.3f}</b><span>SSIM (best fill {m['ssim'][best]:.3f})</span></div>
</div>
<h2>The grid, playing</h2>
<p>Columns are views, time runs. View 0 and the first moment are given (green); everything framed in orange is generated.
This is the held-out grid with the median margin among {settings['held_out_grids']}, not the best one.</p>
<video controls loop autoplay muted playsinline src="{data_uri(out / 'grid.mp4', 'video/mp4')}"></video>
<h2>Every cell beside the truth</h2>
<img alt="contact sheet" src="{data_uri(out / 'grid.png', 'image/png')}">
<h2>Numbers on unseen cells</h2>
{_scores(m)}
<p class="muted">Means over {settings['held_out_grids']} held-out grids, {_unseen(m)} unseen cells each. Higher is better. All fills use the
same references as the model.</p>
<h2>Where it wins and loses</h2>
<p>PSNR of the model per cell, and in brackets the difference to the best fill. Rows are views, columns are times. Far from view 0 moving
things turn soft and may show the edges of the 8x8 patches. Margins of the single grids, in order of time:
{', '.join(f'{x:+.1f}' for x in m['margin_db_per_grid'])} dB; where hardly anything moves, a freeze-time frame is hard to beat.</p>
{_cells(m)}
<h2>What was held out</h2>
{_held_out(m)}
<h2>Training</h2>
{_curve(out / 'train.jsonl')}
<h2>How it works, and what is simplified</h2>
<p>One transformer denoises all cells together. Its self-attention lets a cell see its own frame, its view at all times, and its time in
all views, in one softmax (the paper's fused view-time attention, here <code>vidkern.grid_attention</code>). References enter as patch
embeddings added to the noised tokens. The sampler is Euler on the rectified flow, {settings['sampling_steps']} steps, shifted towards noise. Few
steps favour the expected picture over invented detail: soft edges rather than wrong ones.</p>
<p>Simplified against the paper: pixels instead of an autoencoder, coded as the difference to the mean of a cell's two references; each
cell also sees its own two references directly, and the output layer may choose, pixel by pixel, between them (the freeze-time frame, or
the fixed-view frame moved by a few pixels) before it adds its own correction; {_views(m)}; no text; the model has {m['model']['parameters'] / 1e6:.1f}M parameters, not 11B, and is trained from
nothing rather than fine-tuned.</p>
<h2>Which kernel ran</h2>
<pre>{html.escape(m['attention_backend'])}</pre>
<h2>Settings</h2>
{_table({**settings, **_data(m), **{'model ' + k: v for k, v in m['model'].items()}, **m['versions']})}
</main></html>
"""


def _held_out(m):
    """Where the training grids and the shown ones come from."""
    if "scenes" in m:
        s = m["scenes"]
        return f"""<p>Training grids are {s['trained_on']} procedural scenes ({html.escape(s['scene'])}), rendered from true cameras,
{s['seconds_per_time']} s between two times. The {s['held_out']} grids above are other scenes, from seeds that training never used: other objects,
other motions, other cameras.</p>"""
    clip = m["clip"]
    return f"""<p>The clip has {clip['frames']} frames. Training grids come from frames {clip['trained_on_frames'][0]} to {clip['trained_on_frames'][1]}
under random homographies; the grids above come from frames {clip['held_out_frames'][0]} to {clip['held_out_frames'][1]}, under homographies
drawn from seeds that training never used. They show the same scene as the training part, at moments and from views that the model has
not seen: this measures new moments and views, not new scenes.</p>"""


def _views(m):
    """What the training was given, against the paper."""
    given = ("single references, static scenes and homography videos are mixed in as in the paper" if m["settings"]["recipe"] == "paper"
             else "both references are always given")
    return given + ("" if "scenes" in m else "; views are homographies of one clip, not real cameras")


def _data(m):
    """Rows of the settings table about the data."""
    return {f"{kind} {k}": v for kind in ("clip", "scenes") for k, v in m.get(kind, {}).items()}


def verdict(m):
    """Plain words about the outcome, drawn from the numbers alone."""
    best, margin = m["best_baseline"], m["margin_db_over_best"]
    numbers = (f"{m['psnr']['model']:.1f} dB against {m['psnr'][best]:.1f} dB for the best simple fill from the references "
               f"({BASELINE_TEXT[best]})")
    wins = sum(x > 0 for x in m["margin_db_per_grid"])
    tail = f" It wins on {wins} of {len(m['margin_db_per_grid'])} held-out grids."
    if margin >= 1:
        return f"The generated cells are clearly closer to the truth than any simple fill: {numbers}." + tail
    if margin > 0.2:
        return f"The generated cells are somewhat closer to the truth than any simple fill: {numbers}." + tail
    if margin > -0.2:
        return f"The generated cells are about as close to the truth as the best simple fill: {numbers}." + tail
    return f"The generated cells are not as close to the truth as the best simple fill: {numbers}. Train longer (--minutes)." + tail


def _minutes(seconds):
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _unseen(m):
    return sum(cell is not None for row in m["psnr_per_cell"]["model"] for cell in row)


def _scores(m):
    rows = []
    for name in ["model", *sorted(BASELINE_TEXT, key=m["psnr"].get, reverse=True)]:
        rows.append(f"<tr{' class=us' if name == 'model' else ''}><td>{name}</td><td>{m['psnr'][name]:.2f}</td>"
                    f"<td>{m['ssim'][name]:.3f}</td><td class=note>{BASELINE_TEXT.get(name, 'generated')}</td></tr>")
    head = "<tr><th></th><th>PSNR, dB</th><th>SSIM</th><th style='text-align:left'>what it is</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _cells(m):
    ours, theirs = m["psnr_per_cell"]["model"], m["psnr_per_cell"][m["best_baseline"]]
    rows = []
    for v, row in enumerate(ours):
        cells = []
        for t, value in enumerate(row):
            if value is None:
                cells.append("<td style='background:#e6f4ea'>given</td>")
                continue
            gain = value - theirs[v][t]
            strength = min(1.0, abs(gain) / 4) * 0.45
            colour = f"rgba(46,160,67,{strength:.2f})" if gain > 0 else f"rgba(207,34,46,{strength:.2f})"
            cells.append(f"<td style='background:{colour}'>{value:.1f} ({gain:+.1f})</td>")
        rows.append(f"<tr><td>view {v}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>time {t}</th>" for t in range(len(ours[0])))
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _curve(log, width=960, height=260, left=64, bottom=36):
    """Loss over steps as an inline SVG: every step in grey, a running mean in colour, logarithmic axis."""
    loss = torch.tensor([json.loads(line)["loss"] for line in log.read_text().splitlines()], dtype=torch.float64)
    span = max(1, len(loss) // 40)
    mean = torch.stack([loss[max(0, i - span + 1) : i + 1].mean() for i in range(len(loss))])
    top, low = loss.log10().max().item(), loss.log10().min().item()
    x = left + torch.arange(len(loss)) / max(1, len(loss) - 1) * (width - left - 12)

    def height_of(value):
        return 12 + (top - value) / max(top - low, 1e-9) * (height - bottom - 12)

    def path(values, keep):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in list(zip(x.tolist(), height_of(values.log10()).tolist()))[::keep])

    keep = max(1, len(loss) // 600)
    marks = [v for e in range(-6, 3) for v in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= torch.tensor(v).log10() <= top]
    lines = "".join(
        f"<line x1={left} x2={width - 12} y1={y:.1f} y2={y:.1f} stroke='#e4e8ec'/>"
        f"<text x={left - 8} y={y + 4:.1f} text-anchor=end>{v:g}</text>"
        for v, y in ((v, height_of(torch.tensor(v).log10().item())) for v in marks))
    return f"""<svg viewBox="0 0 {width} {height}" width="{width}" font-size="13" fill="#59636e">{lines}
<polyline fill="none" stroke="#c8d1da" points="{path(loss, keep)}"/>
<polyline fill="none" stroke="#dc6d28" stroke-width="2.5" points="{path(mean, keep)}"/>
<text x="{left}" y="{height - 10}">step 1</text><text x="{width - 12}" y="{height - 10}" text-anchor="end">step {len(loss)}</text>
<text x="{width / 2}" y="{height - 10}" text-anchor="middle">training loss (mean of {span} in colour), logarithmic</text></svg>"""


def _table(values):
    rows = (f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"
