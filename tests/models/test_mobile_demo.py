"""`vidkern demo mobile`: a quick run end to end, its continuation and errors, the committed ablation, and the page that shows it."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vidkern.cli import main
from vidkern.models.mobile_dit import Keep, ParameterCost, ablation, report, runs
from vidkern.models.mobile_dit.data import COLOURS, DIRECTIONS, SHAPES, Codec, clips, open_clips, prompt, words
from vidkern.models.mobile_dit.quality import Measure, read
from vidkern.models.shared import Trainer, frechet, psnr

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "models/mobile_dit/records/ablation.json"
DEMO = ROOT / "models/mobile_dit/records/demo.json"
FILES = {"record.json", "table.md", "clips.png", "clips.gif", "kept.png", "report.html", "settings.json", "keep.json", "pool.pt", "teacher.pt",
         "recovered.pt", "distilled.pt", "hasty.pt"}


def quick(tmp_path, *options):
    return main(["demo", "mobile", "--quick", "--out", str(tmp_path), *options])


@pytest.fixture(scope="module")
def small_clips():
    return open_clips(train=128, held_out=128, channels=32)


# ---- data and figures ------------------------------------------------------------------------------------------------------------------
def test_clips_show_what_their_prompts_say(generator):
    said = words(64, generator)
    video = clips(said, generator)
    assert video.shape == (64, 3, 17, 32, 32) and -1 <= video.min() and video.max() <= 1
    colours, directions = read(video)
    assert torch.equal(colours, said[:, 0]) and torch.equal(directions, said[:, 2])
    assert read(torch.full((2, 3, 17, 32, 32), -0.84))[0].tolist() == [-1, -1]
    assert prompt((0, 1, 3)) == "red disc going down" and len(COLOURS) * len(SHAPES) * len(DIRECTIONS) == 60
    shapes = clips(torch.tensor([[4, s, 0] for s in range(3)]).repeat(8, 1), torch.Generator().manual_seed(0)).view(8, 3, 3, 17, 32, 32)
    area = (shapes[:, :, 0, 0] > 0).sum((-1, -2)).double().mean(0)
    assert area[0] != area[1] and area[2] < 0.9 * area[1]                          # a ring has a hole


def test_the_codec(small_clips):
    """More components, less error; latents of unit variance; the first frame does not see the others."""
    video = clips(small_clips.held_out_said[:32], torch.Generator().manual_seed(5))
    errors = []
    for channels in (4, 32):
        codec = Codec(video, channels)
        latents = codec.encode(video)
        assert latents.shape == (32, channels, 3, 4, 4)
        errors.append(psnr((codec.decode(latents).transpose(1, 2) + 1) / 2, (video.transpose(1, 2) + 1) / 2).mean().item())
    assert errors[0] + 3 < errors[1] and small_clips.train.std().item() == pytest.approx(1.0, abs=0.1)
    codec, changed = small_clips.codec, video.clone()
    changed[:, :, 5:] = 0.3
    assert torch.equal(codec.encode(video)[:, :, 0], codec.encode(changed)[:, :, 0])
    assert not torch.equal(codec.encode(video)[:, :, 1], codec.encode(changed)[:, :, 1])
    assert torch.equal(open_clips(train=128, held_out=128).train[:4], small_clips.train[:4])


def test_the_figures_see_what_is_wrong(generator):
    source = open_clips(train=1024, held_out=512)
    measure = Measure(source, 256)
    assert measure.floor["colour"] > 0.95 and measure.floor["direction"] > 0.95
    x, said = source.train[256:512], source.said[256:512]
    for wrong in (torch.randn(x.shape, generator=generator), 0.3 * x, x.flip(2)):
        assert measure(wrong, said)["distance"] > 2 * measure.floor["distance"]
    assert measure(x, said.roll(1, 0))["colour"] < 0.5 and measure(x, said.roll(1, 0))["direction"] < 0.5
    assert measure(x.flip(2), said)["direction"] < 0.3                             # the film runs backwards


def test_frechet_distances_of_known_sets(generator):
    x = torch.randn(500, 5, generator=generator).double()
    assert frechet(x, x) == pytest.approx(0, abs=1e-8) and frechet(x, x + 2) == pytest.approx(20, rel=1e-9)
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    assert frechet(white, 3 * white) == pytest.approx(20, rel=1e-9)
    for bad in (x[:, :4], x[:1], x[0]):
        with pytest.raises(ValueError, match="expected two of"):
            frechet(x, bad)


# ---- the demo ----------------------------------------------------------------------------------------------------------------------------
def test_a_quick_run_writes_every_file_and_can_be_repeated(tmp_path, capsys):
    assert quick(tmp_path) == 0
    assert set(os.listdir(tmp_path)) == FILES
    record = json.loads((tmp_path / "record.json").read_text())
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert report.markdown(record) in shown and report.verdict(record) in shown and "--quick</b> run" in page
    assert page.count('src="data:image/png') == 2 and page.count('src="data:image/gif') == 1 and "http:" not in page and "https:" not in page
    many = record["recipe"]["steps"]
    assert {(r["stage"], r["steps"]) for r in record["rows"]} == {(s, n) for s in ("teacher", "pruned", "recovered") for n in (many, 4)} | {
        ("hasty", 4), ("distilled", 4)}
    assert record["parameters"]["teacher"] > 2 * record["parameters"]["distilled"] == 2 * record["parameters"]["pruned"]
    assert all(value > 0 for part in record["latency"].values() for value in part.values())
    assert Image.open(tmp_path / "clips.gif").n_frames == 17
    config = runs.tiny_teacher(channels=record["recipe"]["channels"])
    assert Keep.load(tmp_path / "keep.json").to_dict() == record["keep"] == Keep.from_dict(record["keep"]).checked(config).to_dict()
    # Everything is there: nothing is trained again, and the same figures come out.
    times = {name: os.stat(tmp_path / name).st_mtime_ns for name in FILES if name.endswith(".pt")}
    (tmp_path / "distilled.pt").unlink()
    assert quick(tmp_path) == 0
    again = json.loads((tmp_path / "record.json").read_text())
    assert again["rows"] == record["rows"] and all(os.stat(tmp_path / n).st_mtime_ns == t for n, t in times.items() if n != "distilled.pt")
    capsys.readouterr()
    assert quick(tmp_path, "--seed", "1") == 2 and "holds a run with seed=0, this one has 1" in capsys.readouterr().err


def test_a_stopped_training_goes_on(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the teacher's training: exit status, the command that continues, and the same teacher in the end."""
    recipe = dataclasses.replace(runs.Recipe().quick(), teacher_steps=4)
    data = runs.open_data(recipe, 0)
    whole = runs.trained(runs.teacher_trainer(recipe, data, 0, progress=False), tmp_path / "whole.pt")
    step = Trainer.one_step

    def stopping(trainer):
        if trainer.step == 2:
            trainer.save()
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "one_step", stopping)
    assert quick(tmp_path / "out") == 130 and "continue with: vidkern demo mobile --quick" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        runs.trained(runs.teacher_trainer(recipe, data, 0, progress=False), tmp_path / "parts.pt")
    assert (tmp_path / "parts.checkpoint.pt").is_file()
    monkeypatch.undo()
    parts = runs.trained(runs.teacher_trainer(recipe, data, 0, progress=False), tmp_path / "parts.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    assert not (tmp_path / "parts.checkpoint.pt").exists()


@pytest.mark.parametrize("options, message", [
    (("--seeds", "2"), "--seeds 2: expected with --ablation"), (("--record", "r.json"), "--record r.json: expected with --ablation"),
    (("--ablation", "--seed", "1"), "--seed 1: expected without --ablation"), (("--ablation", "--seeds", "0"), "--seeds 0: expected at least 1"),
    (("--seed", "-1"), "--seed -1: expected at least 0"), (("--ablation", "--record", "/none/r.json"), "--record /none/r.json: its folder does not"),
])
def test_bad_options(tmp_path, capsys, options, message):
    assert quick(tmp_path, *options) == 2
    assert message in capsys.readouterr().err and not os.listdir(tmp_path)


# ---- the ablation --------------------------------------------------------------------------------------------------------------------------
def check_form(record):
    """What every record must have, and what must agree within it."""
    settings = record["settings"]
    assert record["command"].startswith("vidkern demo mobile --ablation") and record["ways"] == ablation.WAYS and record["cpu_seconds"] >= 0
    assert [(r["seed"], r["way"]) for r in record["runs"]] == [(s, w) for s in settings["seeds"] for w in ablation.WAYS]
    assert [r["seed"] for r in record["teachers"]] == [r["seed"] for r in record["scratch"]] == settings["seeds"]
    config = runs.tiny_teacher(channels=settings["recipe"]["channels"])
    for run in record["runs"]:
        teacher = next(t for t in record["teachers"] if t["seed"] == run["seed"])
        budget, cost = settings["recipe"]["budget"] * teacher["parameters"], ParameterCost(config)
        assert budget - cost.block(6, 6, 384) < run["parameters"] <= budget         # met within the greatest unit, a block
        keep = Keep.from_dict(run["keep"], config.group).checked(config)
        assert run["parameters"] == cost.total([(len(keep.heads[b]), len(keep.xheads[b]), len(keep.ffn[b]) * config.group) for b in keep.blocks])
        assert len(run["draws"]) == (ablation.DRAWS if run["way"] == "random" else 1) and run["draws"][0] == run["before"]
        assert all(np.isfinite(run[key]) and run[key] > 0 for key in ("before", "after", "error_before", "error_after"))


def test_the_committed_ablation():
    record = json.loads(RECORD.read_text())
    check_form(record)
    assert len(record["settings"]["seeds"]) >= 3 and not record["settings"]["quick"]
    assert record["command"] == f"vidkern demo mobile --ablation --record {RECORD.relative_to(ROOT)}"
    assert record["settings"]["recipe"] == json.loads(json.dumps(dataclasses.asdict(ablation.Settings().recipe)))
    for teacher in record["teachers"]:                                              # noise and data of unit variance: 2 untrained
        assert teacher["error"] < 0.8
    for run in record["runs"]:
        assert run["after"] < run["before"] and run["error_after"] < run["error_before"]


def test_the_ablation_can_be_made_again(tmp_path):
    """One seed and a few steps of the recorded recipe, from the command line's own function: the same form, budget and choice by chance."""
    record = json.loads(RECORD.read_text())
    recipe = dataclasses.replace(ablation.Settings().recipe.quick(), budget=record["settings"]["recipe"]["budget"])
    made = ablation.run_all(ablation.Settings(recipe=recipe, seeds=(0,), quick=True), tmp_path, record["command"], progress=False)
    check_form(made)
    ours, theirs = (next(r for r in rec["runs"] if (r["way"], r["seed"]) == ("random", 0)) for rec in (made, record))
    assert ours["keep"] == theirs["keep"] and ours["parameters"] == theirs["parameters"]
    assert made["teachers"][0]["parameters"] == record["teachers"][0]["parameters"]
    again = ablation.run_all(ablation.Settings(recipe=recipe, seeds=(0,), quick=True), tmp_path, record["command"], progress=False)
    assert {**again, "cpu_seconds": 0} == {**made, "cpu_seconds": 0}


def test_the_page_shows_the_record():
    record, page = json.loads(RECORD.read_text()), (ROOT / "docs/mobile.md").read_text()
    between = re.search(r"<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL).group(1)
    assert between == ablation.markdown(record)
    assert ablation.verdict(record) in " ".join(page.split()) and record["command"] in page


def test_the_pages_code_runs(tmp_path, monkeypatch):
    page, namespace = (ROOT / "docs/mobile.md").read_text(), {}
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert code
    for part in code:
        exec(compile(part, "docs/mobile.md", "exec"), namespace)


def test_the_committed_run():
    """The demo at its full length, one seed: as the code that ships makes it, and the page shows it to the letter."""
    record, page = json.loads(DEMO.read_text()), (ROOT / "docs/mobile.md").read_text()
    assert record["command"] == "vidkern demo mobile" and not record["quick"] and record["seed"] == 0
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(runs.Recipe())))
    assert re.search(r"<!-- demo table -->\n(.*)<!-- end demo -->", page, re.DOTALL).group(1) == report.markdown(record)
    assert report.verdict(record) in " ".join(page.split())
    rows = {(r["stage"], r["steps"], r["guidance"]): r for r in record["rows"]}
    assert {stage for stage, *_ in rows} == {"teacher", "pruned", "recovered", "hasty", "distilled"}
    assert len(rows) == len(record["rows"]) == 9


def test_the_verdict_follows_the_numbers():
    """Seeded: records in which the guided selection is ahead, behind, and neither."""
    def record(auto, other):
        rows = [{"way": way, "seed": s, "before": value, "after": value, "error_after": value, "draws": [value] * 5}
                for way in ablation.WAYS for s, value in enumerate(auto if way == "auto" else other)]
        return {"ways": ablation.WAYS, "runs": rows, "scratch": [{"seed": s, "error": 0.5} for s in range(2)],
                "teachers": [{"seed": s, "error": 0.1} for s in range(2)]}

    ours = ((0.1, 0.2), (0.6, 0.9), (0.1, 0.9))
    ahead, behind, neither = (ablation.verdict(record(pair, (0.3, 0.4))) for pair in ours)
    assert "is ahead of the one by magnitude: distance 0.1500 against 0.3500, ahead in 2 of 2" in ahead
    assert "is behind the one by magnitude: distance 0.7500 against 0.3500, ahead in 0 of 2" in behind
    assert "is not always ahead of the one by magnitude: distance 0.5000 against 0.3500, ahead in 1 of 2" in neither
    assert "below the median of 5 random selections in 2 of 2 seeds" in ahead and "from scratch in 0 of 2 seeds" in behind
    assert "| 0.1500 (0.1000 … 0.2000) |" in ablation.markdown(record((0.1, 0.2), (0.3, 0.4)))


def test_the_reports_verdict_follows_the_numbers():
    def record(recovered, hasty, distilled):
        rows = [{"stage": "teacher", "steps": 40, "guidance": 3.0, "distance": 1.0}]
        rows += [{"stage": s, "steps": 4, "guidance": 1.0, "distance": d} for s, d in
                 (("teacher", 9.0), ("recovered", recovered), ("hasty", hasty), ("distilled", distilled))]
        return {"rows": rows, "parameters": {"teacher": 100, "distilled": 45}, "latency": {"sample": {"teacher": 100.0, "distilled": 10.0}}}

    good, bad = report.verdict(record(3.0, 4.0, 2.0)), report.verdict(record(3.0, 1.0, 5.0))
    assert "45% of the teacher's parameters" in good and "10 times as long" in good
    assert "Step distillation helps at 4 steps: 2.00 with, 3.00 without." in good and "Recovery before it helps at 4 steps: 2.00 with, 4.00" in good
    assert "Step distillation does not help at 4 steps: 5.00 with, 3.00 without." in bad and "Recovery before it does not help" in bad
