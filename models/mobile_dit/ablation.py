"""`vidkern demo mobile --ablation`: ways to choose what is pruned, at the same budget, over several seeds.

Every seed trains its own teacher. Each way chooses a keep-list at the same share of parameters; the cut models are compared before recovery (how far
their velocities are from the teacher's on held-out clips) and after the same short recovery. A network of the first way's shape trained from scratch
for as many steps shows what the teacher's weights are worth. Everything is written as soon as it exists; repeat the command to continue.
"""

import dataclasses
import json
import platform
import statistics
import time

import torch

import vidkern
from vidkern._files import replacing
from vidkern.errors import import_extra

from ..shared.page import rounded, write_json
from . import runs
from .cutting import compact_config
from .keep import Keep
from .model import parameter_count
from .sensitivity import distance

WAYS = {"auto": "distillation-guided (blocks exactly, else Fisher, measured again)", "exact": "distillation distance of every unit, measured once",
        "magnitude": "least magnitude", "random": "random"}
DRAWS = 5
HEAD = ("chosen by", "distance before recovery", "after recovery", "held-out error after", "guided is ahead")


@dataclasses.dataclass(frozen=True)
class Settings:
    """recipe: of every seed; its recover_steps are those of all ways and of the network from scratch."""

    recipe: runs.Recipe = dataclasses.replace(runs.Recipe(), teacher_steps=320, lr=2e-3, recover_steps=60, recover_flow=10)
    seeds: tuple = (0, 1, 2)
    quick: bool = False


def keep_of_way(way, teacher, recipe, clips, seed):
    """The keep-list that a way chooses."""
    return runs.pruned(teacher, recipe, clips, how=way, seed=1000 * seed, remeasure=way == "auto")


def one_way(way, teacher, recipe, clips, seed, folder, progress):
    """Choose, cut, recover: the figures of one way on one seed."""
    held_out = runs.held_out_of(recipe, clips)
    wanted = held_out.velocities(teacher)
    keep, cut = keep_of_way(way, teacher, recipe, clips, seed)
    before = distance(cut.eval(), wanted, held_out)
    drawn = [before]
    if way == "random":
        drawn += [distance(runs.pruned(teacher, recipe, clips, how="random", seed=1000 * seed + i)[1].eval(), wanted, held_out)
                  for i in range(1, DRAWS)]
    trainer = runs.recovery_trainer(cut, teacher, keep, recipe, clips, seed, progress=progress)
    recovered = runs.trained(trainer, folder / f"{way}-{seed}.pt")
    return {"way": way, "seed": seed, "keep": keep.to_dict(), "parameters": parameter_count(cut), "before": before, "draws": drawn,
            "after": distance(recovered, wanted, held_out), "error_before": runs.flow_error(cut, held_out),
            "error_after": runs.flow_error(recovered, held_out)}


def one_scratch(teacher, keep, recipe, clips, seed, folder, progress):
    """The guided way's network, from scratch for as many steps as recovery takes."""
    held_out = runs.held_out_of(recipe, clips)
    config = compact_config(teacher.config, keep)
    trainer = runs.teacher_trainer(recipe, clips, seed, config=config, steps=recipe.recover_steps, progress=progress)
    model = runs.trained(trainer, folder / f"scratch-{seed}.pt")
    return {"seed": seed, "error": runs.flow_error(model, held_out)}


def run_all(settings, out, command, *, progress=True):
    """Make or continue all runs in `out`; returns the record."""
    recipe, folder = settings.recipe, out / "runs"
    runs.check_folder(out, dataclasses.asdict(settings))
    folder.mkdir(exist_ok=True)
    bar = import_extra("tqdm", "a progress bar").tqdm(total=len(settings.seeds) * (2 + len(WAYS)), unit="run", disable=not progress)
    ledger, began = folder / "cpu_seconds.json", time.process_time()
    spent = json.loads(ledger.read_text()) if ledger.is_file() else 0.0
    results, teachers, scratch = [], [], []

    def made(name, make):
        path = folder / f"{name}.json"
        bar.set_description(name)
        if not path.is_file():
            write_json(path, rounded(make()))
        bar.update()
        return json.loads(path.read_text())

    try:
        with bar:
            for seed in settings.seeds:
                clips = runs.open_data(recipe, seed)
                teacher = runs.trained(runs.teacher_trainer(recipe, clips, seed, progress=progress), folder / f"teacher-{seed}.pt")
                teachers.append(made(f"teacher-{seed}", lambda: {"seed": seed, "parameters": parameter_count(teacher),
                                                                 "error": runs.flow_error(teacher, runs.held_out_of(recipe, clips))}))
                found = [made(f"{way}-{seed}", lambda way=way: one_way(way, teacher, recipe, clips, seed, folder, progress)) for way in WAYS]
                results += found
                keep = Keep.from_dict(found[0]["keep"], teacher.config.group)
                scratch.append(made(f"scratch-{seed}", lambda: one_scratch(teacher, keep, recipe, clips, seed, folder, progress)))
    finally:
        write_json(ledger, spent + time.process_time() - began)
    return {
        "what": "ways to choose what is pruned from a toy video diffusion transformer, at the same share of its parameters; on held-out clips",
        "command": command, "settings": json.loads(json.dumps(dataclasses.asdict(settings))), "ways": WAYS, "teachers": teachers, "runs": results,
        "scratch": scratch, "cpu_seconds": round(json.loads(ledger.read_text())),
        "versions": {"vidkern": vidkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "machine": platform.machine()},
    }


def by_way(record):
    """{way: its runs, by seed}."""
    return {way: sorted((r for r in record["runs"] if r["way"] == way), key=lambda r: r["seed"]) for way in record["ways"]}


def _within(values, form):
    return f"{statistics.mean(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def cells(record):
    """The table, row by row, as text: means over seeds, in brackets the least and the greatest."""
    found = by_way(record)
    for way, rows in found.items():
        ahead = [sum(a[key] < b[key] for a, b in zip(found["auto"], rows)) for key in ("before", "after")]
        yield (record["ways"][way], _within([r["before"] for r in rows], ".4f"), _within([r["after"] for r in rows], ".4f"),
               _within([r["error_after"] for r in rows], ".4f"),
               "" if way == "auto" else f"before {ahead[0]}, after {ahead[1]} of {len(rows)} seeds")
    yield "the same network from scratch", "", "", _within([r["error"] for r in record["scratch"]], ".4f"), ""
    yield "the teacher", "", "", _within([r["error"] for r in record["teachers"]], ".4f"), ""


def markdown(record):
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells(record)]) + "\n"


def verdict(record):
    """Plain sentences: where the guided selection is ahead and where it is not, from the numbers alone."""
    found, said = by_way(record), []
    for way in ("exact", "magnitude", "random"):
        for key, when in (("before", "Before"), ("after", "After")):
            ours, theirs = [r[key] for r in found["auto"]], [r[key] for r in found[way]]
            ahead, mean = sum(a < b for a, b in zip(ours, theirs)), (statistics.mean(ours), statistics.mean(theirs))
            word = "is ahead of" if ahead == len(ours) else "is behind" if ahead == 0 else "is not always ahead of"
            said.append(f"{when} recovery the guided selection {word} the one by {_short(way)}: distance {mean[0]:.4f} against {mean[1]:.4f}, "
                        f"ahead in {ahead} of {len(ours)} seeds.")
    medians = sum(r["before"] < statistics.median(q["draws"]) for r, q in zip(found["auto"], found["random"]))
    better = sum(r["error_after"] < s["error"] for r, s in zip(found["auto"], record["scratch"]))
    count = len(record["scratch"])
    said.append(f"It is below the median of {DRAWS} random selections in {medians} of {count} seeds.")
    said.append(f"Recovered, it has less error than the same network from scratch in {better} of {count} seeds.")
    return " ".join(said)


def _short(way):
    return {"exact": "exact distances measured once", "magnitude": "magnitude", "random": "chance"}[way]


def run(args, out, command):
    """The command line's part."""
    settings = Settings()
    if args.quick:
        settings = Settings(recipe=settings.recipe.quick(), seeds=(0,), quick=True)
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=tuple(range(args.seeds)))
    if not args.quick:
        print(f"{len(settings.seeds)} seeds, some four minutes each on one core. Ctrl-C stops; the same command continues.", flush=True)
    record = run_all(settings, out, command)
    write_json(out / "record.json", record)
    with replacing(out / "table.md") as fresh:
        fresh.write_text(markdown(record), encoding="utf-8")
    if args.record is not None:
        write_json(args.record, record)
    print(markdown(record))
    print(verdict(record))
    return 0
