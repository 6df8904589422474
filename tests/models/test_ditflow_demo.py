"""`vidkern demo ditflow` and `vidkern motion`: quick runs end to end, continuation, errors, the committed record and the page that shows it."""

import ast
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vidkern.cli import main
from vidkern.data import bundled_clip, write_video
from vidkern.errors import UserError
from vidkern.models.ditflow import data, probe, report, runs
from vidkern.models.ditflow.adapter import TinyAdapter

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "models/ditflow/records/demo.json"
FILES = {"record.json", "table.md", "report.html", "settings.json", "transfers", "clips.mp4", "clips.png"}
DRAWN = {f"{name}.{end}" for name in ("known_motion", "own_motion") for end in ("png", "mp4", "npz")}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The full recipe is a quick one, and the user's folder is the test's."""
    quick = runs.Recipe().quick()
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "Recipe", lambda **changes: dataclasses.replace(quick, **changes))
    return quick


def test_a_quick_run_writes_every_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main(["demo", "ditflow", "--quick", "--out", str(out)]) == 0
    recipe = runs.Recipe().quick()
    assert set(os.listdir(out)) == FILES | DRAWN | {recipe.name(0)}
    assert not (tmp_path / "cache").exists()      # what a quick run has trained is not kept for others
    record, shown = json.loads((out / "record.json").read_text()), capsys.readouterr().out
    check_form(record)
    assert record["quick"] and record["command"] == f"vidkern demo ditflow --quick --out {out}"
    assert report.markdown(record) in shown and "This was a --quick run" in shown
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2 and page.count("data:video/mp4") == 1 and "http:" not in page and "https:" not in page
    assert "no evidence of transferred motion" in page
    assert np.load(out / "known_motion.npz")["flow"].shape == (4, 4, 8, 10, 2)


def test_a_stopped_run_continues(tmp_path, monkeypatch, capsys):
    """Stopped in training and between transfers: the same rows, and no transfer done twice."""
    recipe, made = runs.Recipe().quick(), []

    def go(out):
        (tmp_path / out).mkdir(exist_ok=True)
        adapter = TinyAdapter(runs.model_of(recipe, 0, tmp_path / out, progress=False))
        return [row for row, _ in runs.transfers(adapter, recipe, 0, (1,), tmp_path / out, progress=False)]

    whole = go("whole")
    generate, step = runs.generate, runs.Trainer.one_step

    def stopping(trainer):
        if trainer.step == 5:
            trainer.save()
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(runs.Trainer, "one_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        go("parts")
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [recipe.name(0).replace(".pt", ".checkpoint.pt")]
    monkeypatch.setattr(runs.Trainer, "one_step", step)

    def counted(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args[2])
        return generate(*args)

    monkeypatch.setattr(runs, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        go("parts")
    assert len(list((tmp_path / "parts/transfers").iterdir())) == 3
    monkeypatch.setattr(runs, "generate", lambda *args: made.append(args[2]) or generate(*args))
    assert go("parts") == whole and len(made) == len(whole) == recipe.references * len(runs.METHODS)
    runs.check_folder(tmp_path / "parts", {"seed": 0})
    with pytest.raises(UserError, match="holds a run with seed=0, this one has 1; choose another folder"):
        runs.check_folder(tmp_path / "parts", {"seed": 1})


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys, small):
    monkeypatch.setattr(runs, "generate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "ditflow", "--seed", "3", "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1] == f"vidkern: stopped; continue with: vidkern demo ditflow --seed 3 --out {tmp_path / 'out'}"
    assert "is trained first" in said.out and small.name(3) in said.out
    assert main(["demo", "ditflow", "--seed", "3", "--out", str(tmp_path / "out")]) == 130
    assert "is there from an earlier run" in capsys.readouterr().out


def test_transfers_are_those_of_their_methods(randomise):
    """Every method has its own settings, the same noise and the same reference; without guidance nothing of the reference enters."""
    recipe = runs.Recipe().quick()
    adapter = TinyAdapter(randomise(recipe.model()))
    refs = runs.references(dataclasses.replace(recipe, references=6), 0)
    assert [r.motion is None for r in refs] == [False, False, True] * 2 and all(r.label != r.target for r in refs)
    assert len({r.motion for r in refs if r.motion}) == 4
    noise = runs.noise_of(recipe, 0, 0)
    made = {m: runs.generate(adapter, dataclasses.replace(refs[0], target=0), m, recipe, (1,), noise) for m in runs.METHODS}
    assert torch.equal(made["backbone"][0], runs.generate(adapter, dataclasses.replace(refs[1], target=0), "backbone", recipe, (1,), noise)[0])
    assert len({clip.sum().item() for clip, _ in made.values()}) == len(runs.METHODS)
    assert {m: len(steps) for m, (_, steps) in made.items()} == {"backbone": 0, "injection": 0, "latent": 3, "positions": 3, "smm": 3, "moft": 3}


def test_measures_know_a_transfer_from_none():
    """The reference itself scores full marks, another motion does not."""
    adapter = TinyAdapter(runs.trainer_of(runs.Recipe().quick(), 0, progress=False).averaged)
    refs = runs.references(runs.Recipe(), 0)
    same, other = (runs.measured(adapter, refs[i].clip, refs[0], (1,)) for i in (0, 1))
    assert same["agreement"] == pytest.approx(1) and same["follows"] and same["error"] == 0 and same["fidelity"] == pytest.approx(1, abs=1e-4)
    assert not other["follows"] and other["error"] > 4 and other["fidelity"] < 0.8
    still = runs.measured(adapter, refs[0].clip[:1].expand(4, -1, -1, -1), refs[0], (1,))
    assert not still["follows"] and still["error"] == 4 and still["fidelity"] is None


def check_form(record):
    recipe = record["recipe"]
    assert [(r["reference"], r["method"]) for r in record["rows"]] == [(i, m) for i in range(recipe["references"]) for m in runs.METHODS]
    assert sorted(s["block"] for s in record["scores"]) == list(range(recipe["blocks"])) and set(record["blocks"]) <= set(range(recipe["blocks"]))
    for row in record["rows"]:
        assert np.isfinite(row["loss"]) and -1 <= row["agreement"] <= 1 and (row["motion"] is None) == ("follows" not in row)
    assert record["measures"] == report.MEASURES


def test_the_verdict_follows_the_numbers():
    def row(method, follows):
        return {"reference": 0, "method": method, "motion": [4, 0], "loss": 1.0, "agreement": 0.5, "fidelity": None, "error": 2.0, "follows": follows}

    def record(*ahead):
        return {"quick": False, "blocks": [2], "scores": [{"block": 2, "correlation": 0.7, "soft": 0.6, "hits": 0.5}],
                "rows": [row(m, m in ahead) for m in runs.METHODS]}

    assert "0 of 1 clips move the known way, with DiTFlow on the latent 1;" in report.verdict(record("latent"))
    assert "MOFT moves more clips the known way: 1." in report.verdict(record("moft"))
    assert "more clips" not in report.verdict(record("latent", "moft"))
    assert "block 2 correlates with known translations by 0.70" in report.verdict(record())


# ---- the command -----------------------------------------------------------------------------------------------------------------------------
def test_the_command_draws_any_clip(tmp_path, capsys, small):
    out = tmp_path / "out"
    assert main(["motion", str(bundled_clip("bunny")), "--out", str(out), "--start", "20"]) == 0
    said = capsys.readouterr().out
    assert "training the tiny model once" in said and (tmp_path / "cache/models" / small.name(0)).is_file()
    assert sorted(os.listdir(out)) == ["motion.mp4", "motion.npz", "motion.png"]
    assert np.load(out / "motion.npz")["flow"].shape == (4, 4, 16, 20, 2) and len(re.findall(r"frame \d to \d: median", said)) == 3
    soft = ["motion", str(bundled_clip("bunny")), "--out", str(out), "--soft", "--block", "2", "--size", "32x40", "--frames", "3", "--tau", "8"]
    assert main(soft) == 0
    assert "training" not in capsys.readouterr().out
    flow = np.load(out / "motion.npz")["flow"]
    assert flow.shape == (3, 3, 8, 10, 2) and np.abs(flow - flow.round()).max() > 0.01


@pytest.mark.parametrize("options, part", [
    (["--frames", "1"], "--frames 1: expected at least 2"), (["--stride", "0"], "--stride 0"), (["--start", "-1"], "--start -1"),
    (["--tau", "0"], "--tau 0.0: expected a positive number"), (["--size", "64"], "--size 64: expected HEIGHTxWIDTH"),
    (["--size", "30x40"], "--size 30x40: expected multiples of 4"), (["--block", "-1"], "--block -1: expected at least 0"),
    (["--block", "4"], "--block 4: expected 0 to 3"), (["--size", "²x40"], "--size ²x40: expected HEIGHTxWIDTH"), (["--start", "120", "--stride", "9"], "expected 4; lower --frames or --stride"),
    (["--start", "900"], "start=900"), (["--out", "/proc/none"], "--out /proc/none: cannot be written")])
def test_bad_options_are_one_line_errors(tmp_path, capsys, small, options, part):
    torch.save(TinyAdapter(small.model()).model.state_dict(), runs.user_folder() / small.name(0))
    assert main(["motion", str(bundled_clip("bunny")), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("vidkern: error: ") and part in error[0]


def test_a_block_that_is_not_there_is_told_before_training(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(runs, "model_of", lambda *args: pytest.fail("trained"))
    assert main(["motion", str(bundled_clip("bunny")), "--out", str(tmp_path / "out"), "--block", "99"]) == 2
    told = capsys.readouterr()
    assert "--block 99: expected 0 to 3 for the tiny model" in told.err and "training" not in told.out


def test_clips_and_options_that_are_not_there(tmp_path, capsys, small):
    assert main(["motion", str(tmp_path / "none.mp4")]) == 2
    assert f"error: video {tmp_path / 'none.mp4'}: no such file, expected a video" in capsys.readouterr().err
    (tmp_path / "text.mp4").write_text("no video")
    assert main(["motion", str(tmp_path / "text.mp4"), "--out", str(tmp_path)]) == 2
    assert f"error: video {tmp_path / 'text.mp4'}: cannot be read as a video" in capsys.readouterr().err
    write_video(tmp_path / "short.mp4", torch.rand(2, 3, 64, 80), 8)
    assert main(["motion", str(tmp_path / "short.mp4"), "--out", str(tmp_path)]) == 2 and "2 frames from --start 0" in capsys.readouterr().err
    assert main(["demo", "ditflow", "--seed", "-1"]) == 2 and "--seed -1: expected at least 0" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told_at_once(tmp_path, capsys, monkeypatch):
    import huggingface_hub as hub

    asked = []

    class Unreachable:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("no route to host")

    monkeypatch.setattr(hub, "get_session", Unreachable)
    expected = "expected a folder with model_index.json, or the name of a pipeline on the Hugging Face hub"
    for model, reason in (("nobody/nope", "the hub, which may have it, cannot be reached (no route to host)"),
                          (str(tmp_path / "nope"), "no such folder, and no name that the hub could have"), (str(tmp_path), "a folder without model_index.json")):
        assert main(["motion", str(bundled_clip("bunny")), "--out", str(tmp_path / "out"), "--model", model]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"vidkern: error: --model {model}: ") and reason in error and expected in error and error.count("\n") == 1, error
    assert len(asked) == 1 and "nobody/nope" in asked[0]        # once, not six times over half a minute


# ---- the record ------------------------------------------------------------------------------------------------------------------------------
def test_the_committed_record():
    record = json.loads(RECORD.read_text())
    check_form(record)
    assert not record["quick"] and record["command"] == "vidkern demo ditflow"
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(runs.Recipe())))
    assert all(s["correlation"] >= probe.USABLE for s in record["scores"] if s["block"] in record["blocks"])      # they do follow translations


def test_the_page_shows_the_record():
    """docs/ditflow.md holds the table of the record to the letter, and its verdict."""
    record, page = json.loads(RECORD.read_text()), (ROOT / "docs/ditflow.md").read_text()
    assert re.search(r"<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL).group(1) == report.markdown(record)
    assert report.verdict(record) in " ".join(page.split())


def test_the_pages_code_runs(tmp_path, monkeypatch):
    page, namespace = (ROOT / "docs/ditflow.md").read_text(), {}
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(code) >= 3
    for part in code:
        if "from_pretrained" not in part:
            exec(compile(part, "docs/ditflow.md", "exec"), namespace)
            continue
        names = {node.id for node in ast.walk(ast.parse(part)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        given = {}
        exec("\n".join(line for line in part.splitlines() if line.startswith(("import ", "from "))), given)
        assert names - set(given) <= {"transfer", "reference"}      # not run: it fetches a model; it imports what it uses


def test_windows_of_probes_move_as_stated():
    for latents, motion in runs.probes(runs.Recipe(), 0):
        from vidkern.models.ditflow import tracking

        assert tracking.mean_motion((latents[0] + 1) / 2, radius=6).tolist() == pytest.approx([m * data.PATCH for m in motion], abs=0.01)
