"""`vidkern demo dfm`: a quick run end to end, its continuation, its errors, the committed record, and the page that shows it."""

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
from vidkern.errors import UserError
from vidkern.models.dfm import report, runs
from vidkern.models.dfm.data import open_pictures
from vidkern.models.dfm.pictures import TITLE
from vidkern.models.dfm.quality import frechet

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "models/dfm/records/compare.json"
FILES = {"record.json", "table.md", "curves.png", "report.html", "settings.json", "runs"}


def quick(tmp_path, *options):
    return main(["demo", "dfm", "--quick", "--out", str(tmp_path), *options])


def test_a_quick_run_writes_every_file(tmp_path, capsys):
    assert quick(tmp_path, "--compare", "--record", str(tmp_path / "r.json")) == 0
    pictures = {f"{kind}_{name}.{end}" for name in ("digits", "clip") for kind, end in (("samples", "png"), ("previews", "gif"))}
    assert set(os.listdir(tmp_path)) == FILES | pictures | {"r.json"}
    record = report.load(tmp_path / "record.json")
    check_form(record)
    assert record == report.load(tmp_path / "r.json") and len(record["runs"]) == 4
    page, shown = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert page.count('src="data:image/png') == 3 and page.count('src="data:image/gif') == 2 and "This was a --quick run" in page
    assert record["command"] in page and "http:" not in page and "https:" not in page
    assert report.markdown(record) in shown and report.verdict(record) in shown
    gif = Image.open(tmp_path / "previews_digits.gif")
    assert gif.n_frames == sum(record["recipes"]["digits"]["sampling"]) and gif.info["loop"] == 0


def small(**changes):
    return dataclasses.replace(runs.Settings(data=("digits",), seeds=(0,), quick=True), **changes)


def timeless(record):
    return {**record, "cpu_seconds": 0, "runs": [{**run, "cpu_seconds": 0} for run in record["runs"]]}


def test_a_run_continues_where_it_stopped_and_is_repeatable(tmp_path, monkeypatch):
    """Stopped within a run and between runs: the same record, and nothing done twice but the steps since the last checkpoint."""
    def make(name, progress=False):
        (tmp_path / name).mkdir(exist_ok=True)
        return runs.run_all(small(), tmp_path / name, command="vidkern demo dfm", progress=progress)

    monkeypatch.setattr(runs, "SAVE_EVERY", 4)
    whole = make("whole")
    step, count = runs.Trainer.one_step, []

    def stopping(limit):
        def one(trainer):
            if len(count) == limit:
                raise KeyboardInterrupt
            count.append(trainer.step)
            return step(trainer)
        return one

    monkeypatch.setattr(runs.Trainer, "one_step", stopping(10))
    with pytest.raises(KeyboardInterrupt):
        make("parts")
    assert os.listdir(tmp_path / "parts/runs") == ["digits-dfm-0.checkpoint.pt"]
    monkeypatch.setattr(runs.Trainer, "one_step", stopping(10 + 4 + 5))
    with pytest.raises(KeyboardInterrupt):
        make("parts")
    assert count[10] == 8 and (tmp_path / "parts/runs/digits-dfm-0.json").is_file()
    monkeypatch.setattr(runs.Trainer, "one_step", step)
    assert timeless(make("parts")) == timeless(whole)
    assert sorted(os.listdir(tmp_path / "parts/runs")) == [f"digits-{m}-0.{end}" for m in ("dfm", "flow") for end in ("json", "pt")]
    with pytest.raises(UserError, match=r"holds runs with steps=None, these have 5; choose another folder"):
        runs.run_all(small(steps=5), tmp_path / "parts", command="", progress=False)


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_one", interrupted)
    assert quick(tmp_path, "--data", "digits") == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"vidkern: stopped; continue with: vidkern demo dfm --quick --data digits --out {tmp_path}"


def test_a_longer_run_says_up_front_how_long_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run_one", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "dfm", "--data", "digits", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert re.search(r"2 runs, \d+ training steps in all: about \d+\.\d minutes", said.out) and "step" in said.err      # the bar


@pytest.mark.parametrize("options, part", [
    (["--steps", "0"], "--steps 0: expected at least 1"), (["--compare", "--seeds", "0"], "--seeds 0: expected at least 1"),
    (["--seeds", "3"], "--seeds 3: expected with --compare"), (["--record", "x.json"], "--record x.json: expected with --compare"),
    (["--compare", "--seed", "1"], "--seed 1: expected without --compare"), (["--seed", "-1"], "--seed -1: expected at least 0"),
    (["--compare", "--record", "/nowhere/r.json"], "--record /nowhere/r.json: its folder does not exist")])
def test_options_that_do_not_fit_are_one_line_errors(tmp_path, capsys, options, part):
    assert main(["demo", "dfm", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("vidkern: error: ") and part in error[0]


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert quick(tmp_path / "file" / "below") == 2
    assert "--out" in capsys.readouterr().err


# ---- figures of quality ---------------------------------------------------------------------------------------------------------
def test_frechet_distance_of_gaussians():
    """Zero for the same set; |m|^2 for a shift; the closed form for scaled axes."""
    x = np.random.default_rng(0).normal(size=(4000, 5))
    assert frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)
    whitened = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    assert frechet(whitened, 3 * whitened) == pytest.approx(5 * (1 + 9 - 6), rel=1e-9)
    for bad in (x[:, :4], x[:1], x[0]):
        with pytest.raises(ValueError, match="expected two of"):
            frechet(x, bad)


def test_the_figures_see_what_is_wrong_with_pictures():
    """Held-out digits score like the training ones; blurred, permuted and noisy ones worse; wrong labels are seen."""
    source = open_pictures("digits")
    assert source.train.shape == (1200, 1, 8, 8) and source.held_out.shape == (597, 1, 8, 8) and source.classes == 10
    floor = source.measure.floor
    assert floor["distance"] < 2 and floor["agreement"] > 0.95
    blurred = torch.nn.functional.avg_pool2d(source.train, 3, 1, 1)
    for wrong in (blurred, source.train.flip(-1), source.train + 0.5 * torch.randn_like(source.train)):
        assert source.measure(wrong, source.labels)["distance"] > 3 * floor["distance"]
    assert source.measure(source.train, source.labels.roll(1))["agreement"] < 0.2
    same = open_pictures.__wrapped__("digits")
    assert torch.equal(same.train, source.train) and same.measure.floor == floor
    with pytest.raises(UserError, match="--data faces: expected one of digits, clip"):
        open_pictures("faces")


def test_the_figure_of_the_crops_sees_noise_blur_and_a_wrong_layout():
    source = open_pictures("clip", quick=True)
    assert source.train.shape == (512, 3, 32, 32) and source.labels is None and source.train.min() >= -1 and source.train.max() <= 1
    clean = source.measure.floor
    for wrong in (source.train + 0.1 * torch.randn_like(source.train), torch.nn.functional.avg_pool2d(source.train, 3, 1, 1)):
        found = source.measure(wrong)
        assert found["detail"] > 3 * clean["detail"] and found["distance"] > clean["distance"]
    assert source.measure(source.train.flip(-2))["coarse"] > 2 * clean["coarse"]


# ---- the record -----------------------------------------------------------------------------------------------------------------
def check_form(record):
    """What every record must have, and what must agree within it."""
    settings = record["settings"]
    assert record["command"].startswith("vidkern demo dfm --compare") and record["cpu_seconds"] >= 0
    assert [(r["seed"], r["data"], r["model"]) for r in record["runs"]] == [
        (seed, name, model) for seed in settings["seeds"] for name in settings["data"] for model in runs.MODELS]
    assert set(record["measures"]) == set(record["recipes"]) == set(settings["data"])
    for run in record["runs"]:
        recipe, curve = record["recipes"][run["data"]], run["curve"]
        twin = next(r for r in record["runs"] if (r["data"], r["seed"], r["model"]) == (run["data"], run["seed"], "flow"))
        assert run["training_flops"] == pytest.approx(run["steps"] * run["step_flops"], rel=1e-4)
        assert abs(run["training_flops"] - twin["training_flops"]) <= 0.5 * twin["step_flops"] * 1.01
        assert run["sampling_steps"] == sum(recipe["sampling"]) and (run["model"] == "flow" or run["steps"] == recipe["steps"])
        assert curve[0]["step"] == 0 and curve[-1]["step"] == run["steps"] and len(curve) == recipe["points"] + 1
        assert all(len(p["levels"]) == (recipe["levels"] if run["model"] == "dfm" else 1) for p in curve)
        for key, floor in record["measures"][run["data"]]["floor"].items():
            assert run[key] == curve[-1][key] and np.isfinite(run[key]) and np.isfinite(floor)


def test_the_committed_record():
    record = report.load(RECORD)
    check_form(record)
    assert len(record["settings"]["seeds"]) >= 3 and not record["settings"]["quick"] and set(record["settings"]["data"]) == {"digits", "clip"}
    assert record["command"] == f"vidkern demo dfm --compare --record {RECORD.relative_to(ROOT)}"
    for run in record["runs"]:      # every model has learned
        assert run["distance"] < run["curve"][1]["distance"] and all(a < b for a, b in zip(run["curve"][-1]["levels"], run["curve"][0]["levels"]))


def test_the_record_can_be_made_again(tmp_path):
    """A seed and a few steps of the recorded recipe: the same model, data and figure; the untrained error is that of the record."""
    record = report.load(RECORD)
    few = dataclasses.replace(runs.RECIPES["digits"], samples=60)
    assert json.loads(json.dumps(dataclasses.asdict(runs.RECIPES["digits"]))) == record["recipes"]["digits"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.RECIPES, "digits", few)
        made = runs.run_all(runs.Settings(data=("digits",), seeds=(0,), steps=9), tmp_path, command="", progress=False)
    floor = made["measures"]["digits"]["floor"]
    assert floor == pytest.approx(record["measures"]["digits"]["floor"], rel=0.05)
    for run in made["runs"]:
        same = next(r for r in record["runs"] if (r["data"], r["model"], r["seed"]) == ("digits", run["model"], 0))
        assert run["parameters"] == same["parameters"] and run["step_flops"] == pytest.approx(same["step_flops"], rel=1e-4)
        assert run["curve"][0]["levels"] == pytest.approx(same["curve"][0]["levels"], rel=1e-3)
        assert run["curve"][-1]["levels"][0] < run["curve"][0]["levels"][0]


def test_the_page_shows_the_record():
    """docs/dfm.md holds the table of the record, to the letter, and its verdict."""
    record, page = report.load(RECORD), (ROOT / "docs/dfm.md").read_text()
    between = re.search(r"<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL).group(1)
    assert between == report.markdown(record)
    assert report.verdict(record) in " ".join(page.split()) and record["command"] in page
    assert all(m["what"] in " ".join(page.split()) for m in record["measures"].values())


def test_the_pages_code_runs():
    page, namespace = (ROOT / "docs/dfm.md").read_text(), {}
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(code) >= 2
    for part in code:
        if "from_pretrained" not in part:
            exec(compile(part, "docs/dfm.md", "exec"), namespace)


def test_the_verdict_follows_the_numbers():
    """Seeded: records in which DFM is ahead, behind, and neither."""
    def record(*pairs):
        made = [{"data": "digits", "model": m, "seed": s, "parameters": 1, "step_flops": 1.0, "steps": 1, "distance": d}
                for s, pair in enumerate(pairs) for m, d in zip(("dfm", "flow"), pair)]
        return {"settings": {"quick": False}, "measures": {"digits": {"floor": {"distance": 0.0}}}, "runs": made}

    assert report.verdict(record((1.0, 4.0), (3.0, 4.0))) == (
        "On digits DFM is ahead of plain flow matching in 2 of 2 seeds: mean Fréchet distance 2.00 against 4.00, 50% lower.")
    assert report.verdict(record((4.0, 2.0), (6.0, 2.0))) == (
        "On digits plain flow matching is ahead of DFM in 2 of 2 seeds: mean Fréchet distance 5.00 against 2.00, 150% higher for DFM.")
    assert report.verdict(record((4.0, 2.0), (1.0, 2.0))) == (
        "On digits neither is ahead in every seed: mean Fréchet distance 2.50 against 2.00; DFM is ahead in 1 of 2.")
    assert f"| digits | {TITLE['dfm']} |" in report.markdown(record((1.0, 4.0)))
