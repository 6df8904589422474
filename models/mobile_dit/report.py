"""What a run leaves behind: record.json, table.md, pictures and a report.html that needs no other file. All words follow the numbers."""

import html

import torch

from vidkern._files import replacing

from ..shared.page import STYLE, data_uri, write_json
from . import pictures
from .config import tiny_teacher
from .data import prompt
from .keep import Keep

HEAD = ("model", "parameters", "steps", "guidance", "evaluations", "Fréchet distance", "right colour", "right direction")
STAGES = {"teacher": "teacher", "pruned": "pruned", "recovered": "pruned, recovered", "hasty": "pruned, distilled without recovery",
          "distilled": "pruned, recovered, distilled"}


def cells(record):
    """The table of quality, row by row, as text."""
    for row in record["rows"]:
        guided = row["guidance"] != 1.0
        yield (STAGES[row["stage"]], f"{record['parameters'][row['stage']]:,}", str(row["steps"]), f"{row['guidance']:g}" if guided else "none",
               str(row["steps"] * (1 + guided)), f"{row['distance']:.2f}", f"{row['colour']:.0%}", f"{row['direction']:.0%}")
    floor = record["floor"]
    yield ("real clips", "", "", "", "", f"{floor['distance']:.2f}", f"{floor['colour']:.0%}", f"{floor['direction']:.0%}")


def markdown(record):
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells(record)]) + "\n"


def row_of(record, stage, steps):
    """The unguided 4-step or the guided many-step row of a stage."""
    return next(r for r in record["rows"] if r["stage"] == stage and r["steps"] == steps and (steps > 4 or r["guidance"] == 1.0))


def verdict(record):
    """Plain sentences drawn from the numbers alone."""
    many = max(r["steps"] for r in record["rows"])
    teacher, student = row_of(record, "teacher", many), row_of(record, "distilled", 4)
    undistilled, hasty = row_of(record, "recovered", 4), row_of(record, "hasty", 4)
    share, latency = record["parameters"]["distilled"] / record["parameters"]["teacher"], record["latency"]
    said = [f"The student has {share:.0%} of the teacher's parameters; a clip takes {latency['sample']['distilled']:.0f} ms in 4 evaluations, the "
            f"teacher's {latency['sample']['teacher']:.0f} ms in {2 * many}: {latency['sample']['teacher'] / latency['sample']['distilled']:.0f} "
            "times as long.",
            f"Its Fréchet distance is {student['distance']:.2f} against the teacher's {teacher['distance']:.2f}."]
    for other, name in ((undistilled, "step distillation"), (hasty, "recovery before it")):
        better = student["distance"] < other["distance"]
        said.append(f"{name[0].upper()}{name[1:]} {'helps' if better else 'does not help'} at 4 steps: {student['distance']:.2f} with, "
                    f"{other['distance']:.2f} without.")
    return " ".join(said)


def latency_rows(record):
    """(name, ms of an evaluation, ms of a clip) as text."""
    named = {"teacher": "teacher", "distilled": "student, plain layers", "packed": "student, packed layers"}
    for key, title in named.items():
        yield title, f"{record['latency']['evaluation'][key]:.2f}", f"{record['latency']['sample'][key]:.1f}"


def _title(stage, steps):
    """A row's label in the pictures: a line for the model, a line for how it was sampled."""
    how = f"{steps} steps, guided" if steps > 4 else f"{steps} steps"
    return {"hasty": f"pruned\ndistilled at once, {how}", "distilled": f"pruned, recovered\ndistilled, {how}"}.get(stage, f"{STAGES[stage]}\n{how}")


def write(out, record, kept, clips):
    """Write all result files into `out`. kept: {(stage, steps): latents} of the shown clips."""
    said = torch.tensor(record["prompts"])
    prompts = [prompt(row) for row in said]
    many = max(r["steps"] for r in record["rows"])
    order = [("teacher", many), ("teacher", 4), ("pruned", many), ("recovered", many), ("recovered", 4), ("hasty", 4), ("distilled", 4)]
    videos = {_title(stage, steps): pictures.decoded(clips.codec, kept[stage, steps]) for stage, steps in order}
    pictures.sheet(videos, prompts, out / "clips.png")
    pictures.movie(videos, prompts, out / "clips.gif")
    config = tiny_teacher(channels=clips.codec.channels)
    pictures.kept_map(Keep.from_dict(record["keep"], config.group), config, out / "kept.png")
    write_json(out / "record.json", record)
    with replacing(out / "table.md") as fresh:
        fresh.write_text(markdown(record), encoding="utf-8")
    with replacing(out / "report.html") as fresh:
        fresh.write_text(page(out, record), encoding="utf-8")


def _table(head, rows, mark=()):
    """rows of text; mark: first cells of rows to highlight."""
    body = "".join(f"<tr{' class=us' if row[0] in mark else ''}>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{body}</table>"


def page(out, record):
    """The report as one HTML string; pictures are embedded."""
    settings = {**record["recipe"], "seed": record["seed"], **record["versions"], "seconds": record["seconds"], "CPU seconds": record["cpu_seconds"]}
    losses = _table(("stage", "error of the velocity", "distance to the teacher"),
                    [(STAGES[s], f"{v['flow']:.4f}", f"{v['distance']:.4f}") for s, v in record["held_out"].items()])
    quick = "<p class=verdict>This was a <b>--quick</b> run: it checks the plumbing, the models have learned next to nothing.</p>"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>vidkern demo: mobile</title><style>{STYLE}</style><main>
<h1>A smaller model in four steps</h1>
<p class="muted">Pruning, recovery and step distillation of a video diffusion transformer (arXiv 2507.13343) at toy size.</p>
{quick if record['quick'] else ''}
<p class="verdict">{html.escape(verdict(record))}</p>
<h2>Clips, not chosen</h2>
<img alt="clips, moving" src="{data_uri(out / 'clips.gif', 'image/gif')}">
<img alt="frames of the clips" src="{data_uri(out / 'clips.png', 'image/png')}">
<p class="muted">The same prompts and noise in every row. All clips pass through the same codec, whose blur is not the models'.</p>
<h2>Quality at many and at four steps, with and without each stage</h2>
{_table(HEAD, cells(record), (STAGES['distilled'],))}
<p class="muted">{html.escape(record['measure'])}. Distances: lower is better; real clips set the floor.</p>
<h2>What was kept</h2>
<img alt="what was kept" src="{data_uri(out / 'kept.png', 'image/png')}">
<p>Blocks are scored by how far the velocity moves without them; heads and groups of FFN channels by the squared gradient of the loss in their
masks. Whatever costs least for the parameters that it saves goes first, and scores are taken again on the way.</p>
<h2>On held-out clips</h2>
{losses}
<h2>Time</h2>
{_table(("model", "one evaluation, ms", "one clip, ms"), latency_rows(record))}
<p class="muted">Medians, one clip at a time, the models in turn. The teacher's clip takes {2 * record['recipe']['steps']} evaluations, the
student's 4. Layers of this size are bound by the cost of a call, not by arithmetic.</p>
<h2>Settings</h2>
<pre>{html.escape(record['command'])}</pre>
{_table(("setting", "value"), [(str(k), str(v)) for k, v in settings.items()])}
</main></html>
"""
