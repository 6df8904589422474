"""What the runs leave behind: record.json, table.md, pictures and a report.html that needs no other file. Drawn from the record alone (and
the kept samples), in the same words for whichever model comes out ahead."""

import html
import json

import torch

from vidkern._files import replacing

from ..shared.page import STYLE, data_uri, write_json
from . import pictures
from .data import open_pictures
from .quality import FLOOR

HEAD = ("data", "model", "parameters", "GFLOP a step", "steps", "Fréchet distance", "and", "ahead")


def load(path):
    """A record written by `write`."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def summary(record):
    """{data: {model: row}}: mean, least and greatest of every figure over the seeds, and in how many seeds the model is ahead."""
    tables = {}
    for name in record["measures"]:
        runs = {m: sorted((r for r in record["runs"] if (r["data"], r["model"]) == (name, m)), key=lambda r: r["seed"]) for m in ("dfm", "flow")}
        tables[name] = {}
        for model, other in (("dfm", "flow"), ("flow", "dfm")):
            row = {key: runs[model][0][key] for key in ("parameters", "step_flops", "steps")}
            for key in record["measures"][name]["floor"]:
                values = [run[key] for run in runs[model]]
                row[key] = (sum(values) / len(values), min(values), max(values))
            row["ahead"] = sum(a["distance"] < b["distance"] for a, b in zip(runs[model], runs[other], strict=True))
            row["seeds"] = len(runs[model])
            tables[name][model] = row
    return tables


def _cells(name, model, row):
    def within(value, form):
        spread = f" ({value[1]:{form}} … {value[2]:{form}})" if row["seeds"] > 1 else ""
        return f"{value[0]:{form}}{spread}"

    return (name, pictures.TITLE[model], f"{row['parameters'] / 1e3:.0f}k", f"{row['step_flops'] / 1e9:.3f}", str(row["steps"]),
            within(row["distance"], ".2f"), _more({k: v[0] for k, v in row.items() if k in ("agreement", "coarse", "detail")}),
            f"{row['ahead']} of {row['seeds']} seeds")


def _more(values):
    """The other figures of a data set, in words."""
    if "agreement" in values:
        return f"{values['agreement']:.1%} the right digit"
    return ", ".join(f"{key} {value:.2f}" for key, value in values.items())


def _floor_cells(name, floor):
    others = {key: value for key, value in floor.items() if key != "distance"}
    return (name, f"{FLOOR} real pictures", "", "", "", f"{floor['distance']:.2f}", _more(others), "")


def rows(record):
    """Cells of the table, row by row."""
    for name, models in summary(record).items():
        yield from (_cells(name, model, row) for model, row in models.items())
        yield _floor_cells(name, record["measures"][name]["floor"])


def markdown(record):
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows(record)]) + "\n"


def verdict(record):
    """Plain sentences about who is ahead and by how much, drawn from the numbers alone."""
    if record["settings"]["quick"]:
        return "This was a --quick run: it checks the plumbing, the models have learned next to nothing and the order says nothing."
    said = []
    for name, models in summary(record).items():
        a, b = models["dfm"], models["flow"]
        change = a["distance"][0] / b["distance"][0] - 1
        counts = f"in {max(a['ahead'], b['ahead'])} of {a['seeds']} seeds" if a["seeds"] > 1 else "in the one seed"
        numbers = f"mean Fréchet distance {a['distance'][0]:.2f} against {b['distance'][0]:.2f}"
        if a["ahead"] == a["seeds"]:
            said.append(f"On {name} DFM is ahead of plain flow matching {counts}: {numbers}, {-change:.0%} lower.")
        elif b["ahead"] == b["seeds"]:
            said.append(f"On {name} plain flow matching is ahead of DFM {counts}: {numbers}, {change:.0%} higher for DFM.")
        else:
            said.append(f"On {name} neither is ahead in every seed: {numbers}; DFM is ahead in {a['ahead']} of {a['seeds']}.")
    return " ".join(said)


def write(out, record, record_path=None):
    """Write all result files into `out`, and the record to `record_path` too if that is given."""
    seed = record["settings"]["seeds"][0]
    for name in record["measures"]:
        source = open_pictures(name, quick=record["settings"]["quick"])
        kept = {m: torch.load(out / "runs" / f"{name}-{m}-{seed}.pt", weights_only=True) for m in ("dfm", "flow")}
        values = {m: next(r for r in record["runs"] if (r["data"], r["model"], r["seed"]) == (name, m, seed)) for m in kept}
        notes = {m: f"distance {run['distance']:.2f}" + (f", {run['agreement']:.0%} the digit asked for" if "agreement" in run else "")
                 for m, run in values.items()}
        notes["real"] = f"as many training pictures: distance {record['measures'][name]['floor']['distance']:.2f}"
        pictures.samples(_real(source, len(kept["dfm"]["samples"])), {m: k["samples"] for m, k in kept.items()}, notes, out / f"samples_{name}.png")
        pictures.previews({m: k["previews"] for m, k in kept.items()}, out / f"previews_{name}.gif")
    write_json(out / "record.json", record)
    with replacing(out / "table.md") as fresh:
        fresh.write_text(markdown(record), encoding="utf-8")
    pictures.curves(record, out / "curves.png")
    with replacing(out / "report.html") as fresh:
        fresh.write_text(page(out, record), encoding="utf-8")
    if record_path is not None:
        write_json(record_path, record)


def _real(source, count):
    """Held-out pictures in the order in which the samples' labels run."""
    if source.labels is None:
        return source.held_out[:count]
    queues = [source.held_out[source.held_out_labels == c] for c in range(source.classes)]
    return torch.stack([queues[i % source.classes][i // source.classes] for i in range(count)])


def page(out, record):
    """The report as one HTML string; pictures are embedded."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = "".join(f"<tr{' class=us' if cells[1] == pictures.TITLE['dfm'] else ''}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells)}</tr>"
                   for cells in rows(record))
    parts = "".join(f"""<h2>{html.escape(name)}: every step of the samplers</h2>
<img alt="previews of {name}" src="{data_uri(out / f'previews_{name}.gif', 'image/gif')}">
<h2>{html.escape(name)}: samples, not chosen</h2>
<img alt="samples of {name}" src="{data_uri(out / f'samples_{name}.png', 'image/png')}">""" for name in record["measures"])
    measures = "".join(f"<p><b>{html.escape(name)}</b>: {html.escape(m['what'])}.</p>" for name, m in record["measures"].items())
    settings = {"seeds": record["settings"]["seeds"], **{f"{name} {k}": v for name, r in record["recipes"].items() for k, v in r.items()},
                **record["versions"], "CPU seconds of training": record["cpu_seconds"]}
    table = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>vidkern demo: DFM</title><style>{STYLE}</style><main>
<h1>Coarse to fine, with one model</h1>
<p class="muted">Decomposable Flow Matching (arXiv 2506.19839) at toy size, beside plain flow matching with the same network, seed and compute.</p>
<p class="verdict">{html.escape(verdict(record))}</p>
<table><tr>{head}</tr>{body}</table>
<p class="muted">Means over seeds, in brackets the least and the greatest. Lower distances are better; sampling noise sets the floor, the
distance of real training pictures. "ahead": seeds in which the distance is the smaller one.</p>
{parts}
<h2>Over training</h2>
<img alt="curves" src="{data_uri(out / 'curves.png', 'image/png')}">
<p class="muted">{'Bands span the seeds. ' if len(record['settings']['seeds']) > 1 else ''}The error of a level is taken while it is the current one; levels are different quantities, so each is
relative to an untrained model's.</p>
<h2>What is measured</h2>
{measures}
<h2>How it works</h2>
<p>A picture is split into a Laplacian pyramid; every level is a flow of its own, with its own time and noise. One transformer takes all
levels at once, as many tokens as for the picture alone. The sampler runs the coarsest level alone up to a time of 0.9, then the next one
joins and both reach 1 with the last step. Nothing is resampled in between.</p>
<h2>Settings</h2>
<pre>{html.escape(record['command'])}</pre>
<table>{table}</table>
</main></html>
"""
