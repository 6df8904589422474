"""What a comparison leaves behind: compare.json, table.md, curves.png, samples.png and a report.html that needs no other file.

Everything is drawn from the record alone (and the sampled grids), in the same words for whichever variant comes out ahead.
"""

import html
import json

import torch

from vidkern._files import replacing
from vidkern.errors import import_extra

from ..shared.page import STYLE, data_uri, write_json
from . import pictures
from .compare import ENTRIES, HeldOut, file_name, open_source

BUDGETS = {
    "parameters": "Equal trained parameters, equal steps",
    "compute": "Equal training compute, every variant in its natural form",
}
HEAD = ("variant", "trained / all parameters", "GFLOP a step", "steps", "error before", "error after", "PSNR, dB", "to fused, dB",
        "ahead of fused")


def load(path):
    """A record written by `write`."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def runs_of(record, name, budget):
    """The runs of one row, in order of seeds. In the comparison of equal compute, fused is the run that both comparisons share."""
    budget = "parameters" if name == ENTRIES[0].name else budget
    return sorted((run for run in record["runs"] if (run["name"], run["budget"]) == (name, budget)), key=lambda run: run["seed"])


def names_of(record, budget):
    """Rows of a comparison, in the order of the record; fused is first."""
    named = [run["name"] for run in record["runs"] if run["budget"] == budget]
    return list(dict.fromkeys([ENTRIES[0].name, *named]))


def spread(values):
    """(mean, least, greatest)."""
    return sum(values) / len(values), min(values), max(values)


def summary(record):
    """{budget: [row]}; a row has the numbers of one variant over its seeds, and its paired difference to fused in PSNR.

    "ahead": seeds in which its PSNR is above that of fused from the same base model.
    """
    tables = {}
    for budget in BUDGETS:
        fused = {run["seed"]: run["psnr"] for run in runs_of(record, ENTRIES[0].name, budget)}
        rows = []
        for name in names_of(record, budget):
            runs = runs_of(record, name, budget)
            gains = [run["psnr"] - fused[run["seed"]] for run in runs]
            rows.append({"name": name, **{key: runs[0][key] for key in ("trained_parameters", "parameters", "step_flops", "steps")},
                         **{key: spread([run[key] for run in runs]) for key in ("zero_shot", "error", "psnr", "psnr_expected")},
                         "gain": spread(gains), "ahead": sum(gain > 0 for gain in gains), "behind": sum(gain < 0 for gain in gains),
                         "seeds": len(runs)})
        tables[budget] = rows
    return tables


def _cells(row):
    def within(value, form):
        return f"{value[0]:{form}} ({value[1]:{form}} … {value[2]:{form}})"

    same = row["name"] == ENTRIES[0].name
    return (row["name"], f"{row['trained_parameters'] / 1e3:.1f}k / {row['parameters'] / 1e3:.0f}k", f"{row['step_flops'] / 1e9:.2f}",
            str(row["steps"]), f"{row['zero_shot'][0]:.3f}", within(row["error"], ".4f"), within(row["psnr"], ".2f"),
            "" if same else f"{row['gain'][0]:+.2f}", "" if same else f"{row['ahead']} of {row['seeds']} seeds")


def markdown(record):
    """Both tables as Markdown, with the simple blends below."""
    lines = []
    for budget, rows in summary(record).items():
        lines += [f"**{BUDGETS[budget]}**", "", "| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows] + [""]
    blends = sorted(record["baselines_psnr"].items(), key=lambda item: -item[1])
    lines += ["Simple blends of the references on the same cells, PSNR in dB: " + ", ".join(f"{k} {v:.2f}" for k, v in blends) + ".", ""]
    return "\n".join(lines)


def quoted(row):
    """A variant's name as a sentence takes it."""
    return row["name"].replace(", ", " with ")


def verdict(record):
    """Plain sentences about fused against the others, drawn from the numbers alone."""
    if "--quick" in record["command"].split():
        return "This was a --quick run: it checks the plumbing, the models have learned next to nothing and the order says nothing."
    best_blend, blend = max(record["baselines_psnr"].items(), key=lambda item: item[1])
    said = []
    for budget, rows in summary(record).items():
        fused, others = rows[0], rows[1:]
        below = [quoted(row) for row in others if row["behind"] == row["seeds"]]
        above = [quoted(row) for row in others if row["ahead"] == row["seeds"]]
        mixed = [quoted(row) for row in others if row["seeds"] not in (row["ahead"], row["behind"])]
        parts = [f"fused reaches {fused['psnr'][0]:.2f} dB"]
        parts += [f"ahead in every seed of {', '.join(below)}"] if below else []
        parts += [f"behind in every seed of {', '.join(above)}"] if above else []
        parts += [f"undecided against {', '.join(mixed)}"] if mixed else []
        said.append(f"{BUDGETS[budget].split(',')[0]}: " + "; ".join(parts) + ".")
    side = "above" if fused["psnr"][0] > blend else "below"
    return " ".join(said) + f" The best simple blend ({best_blend}) has {blend:.2f} dB, so fused is {side} it at this size and length."


def curves(record, path):
    """Error over training, mean and range over seeds, one panel per comparison."""
    colours = import_extra("matplotlib", "drawing curves").colormaps["tab10"]
    figure = import_extra("matplotlib.figure", "drawing curves").Figure(figsize=(14.5, 5.2))
    panels = figure.subplots(1, 2, sharey=True)
    colour = {name: colours(i) for i, name in enumerate(names_of(record, "parameters"))}
    for panel, budget in zip(panels, BUDGETS):
        for name in names_of(record, budget):
            runs = runs_of(record, name, budget)
            values = torch.tensor([[error for _, error in run["curve"]] for run in runs])
            per_step = 1 if budget == "parameters" else runs[0]["step_flops"] / 1e9
            x = [step * per_step for step, _ in runs[0]["curve"]]
            bold = name == ENTRIES[0].name
            panel.plot(x, values.mean(0), color=colour[name], label=name, linewidth=3 if bold else 1.6, zorder=3 if bold else 2)
            panel.fill_between(x, values.amin(0), values.amax(0), color=colour[name], alpha=0.15, linewidth=0)
        panel.set_title(BUDGETS[budget], fontsize=11)
        panel.set_xlabel("training steps" if budget == "parameters" else "training compute, GFLOP")
        panel.set_yscale("log")
        panel.grid(alpha=0.25, which="both")
    panels[1].legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    panels[0].set_ylabel("velocity error on held-out grids, unseen cells")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("{x:g}")
    figure.tight_layout()
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)


def samples(record, out, held_out, path):
    """The first held-out grid: truth, best simple blend, and what every variant of seed 0 makes of it."""
    from PIL import Image

    from .baselines import baselines
    from .conditioning import reference_mask

    truth = (held_out.grids[:1] + 1) / 2
    mask = reference_mask("both", *truth.shape[1:3])
    best = max(record["baselines_psnr"], key=record["baselines_psnr"].get)
    blend = (baselines(held_out.grids[:1])[best][0] + 1) / 2
    neutral = ((208, 215, 222),) * 2
    shown = [("truth", "", truth[0], None), (f"best blend: {best}", f"{record['baselines_psnr'][best]:.2f} dB", blend, mask)]
    for budget in BUDGETS:
        for run in (run for run in record["runs"] if run["budget"] == budget and run["seed"] == 0):
            grid = torch.load(out / "runs" / f"{file_name(_Named(run), 0)}.pt", weights_only=True)
            shown.append((run["name"], f"equal {budget}   {run['psnr']:.2f} dB", grid, mask))
    scale = max(1, 64 // truth.shape[-1])
    panels = [pictures.panel(grid, mask, title=title, note=note, scale=scale, top=66, note_below=True,
                             colours=neutral if m is None else (pictures.GIVEN, pictures.MADE)) for title, note, grid, m in shown]
    columns = 5
    width, height = panels[0].width + 8, panels[0].height + 8
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), pictures.PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * width, i // columns * height))
    with replacing(path) as fresh:
        sheet.quantize(200, dither=0).save(fresh, optimize=True)


class _Named:
    """The name and budget of a recorded run, as `file_name` asks for them."""

    def __init__(self, run):
        self.name, self.budget = run["name"], run["budget"]


def write(out, record, settings, record_path=None):
    """Write all result files into `out`, and the record to `record_path` too if that is given."""
    held_out = HeldOut(open_source(settings, out), settings)
    write_json(out / "compare.json", record)
    with replacing(out / "table.md") as fresh:
        fresh.write_text(markdown(record), encoding="utf-8")
    curves(record, out / "curves.png")
    samples(record, out, held_out, out / "samples.png")
    with replacing(out / "report.html") as fresh:
        fresh.write_text(page(out, record), encoding="utf-8")
    if record_path is not None:
        write_json(record_path, record)


def page(out, record):
    """The report as one HTML string; pictures are embedded."""
    tables = "".join(f"<h2>{BUDGETS[budget]}</h2>{_table(rows)}" for budget, rows in summary(record).items())
    blends = "".join(f"<tr><td>{k}</td><td>{v:.2f}</td></tr>" for k, v in sorted(record["baselines_psnr"].items(), key=lambda x: -x[1]))
    s = record["settings"]
    rest = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in {**s, **record["versions"]}.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>vidkern: 4Real-Video-V2 architectures</title><style>{STYLE}</style><main>
<h1>Ways to attend over views and times, compared</h1>
<p class="muted">The architectures of 4Real-Video-V2 (arXiv 2506.18839) at toy size: {s['views']} views x {s['times']} times of {s['size']}x{s['size']}
pixels, scenes "{html.escape(s['data'])}", {s['seeds']} seeds.</p>
<p class="verdict">{html.escape(verdict(record))}</p>
{tables}
<p class="muted">Means over seeds, in brackets the least and the greatest. Error: of the velocity, on unseen cells of {s['held_out']} held-out grids;
before is without any fine-tuning. PSNR: of cells sampled in {s['sampling_steps']} steps. "To fused": PSNR minus that of fused from the same base
model. All variants use the same learning rate, chosen for none of them.</p>
<h2>Error over training</h2>
<img alt="curves" src="{data_uri(out / 'curves.png', 'image/png')}">
<p class="muted">Bands span the seeds.</p>
<h2>The first held-out grid, as each variant completes it</h2>
<img alt="samples" src="{data_uri(out / 'samples.png', 'image/png')}">
<p class="muted">Green: given. Orange: generated. Seed 0; the figures are means over all held-out grids of that seed.</p>
<h2>Simple blends of the references</h2>
<table><tr><th></th><th>PSNR, dB</th></tr>{blends}</table>
<h2>Settings</h2>
<pre>{html.escape(record['command'])}</pre>
<table>{rest}</table>
</main></html>
"""


def _table(rows):
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
        body.append(f"<tr{' class=us' if row['name'] == ENTRIES[0].name else ''}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"
