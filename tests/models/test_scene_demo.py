"""`vidkern demo four-real --scene`: scenes with true cameras, the paper's recipe, held-out scenes, and the report."""

import dataclasses
import json
import os

import pytest

from vidkern.cli import main
from vidkern.models.four_real import References, config, demo
from vidkern.models.four_real.demo import DemoSettings, GridLoss


def test_a_scene_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    whole = config.demo()
    small = dataclasses.replace(whole, dit=dataclasses.replace(whole.dit, dim=32, heads=1, blocks=whole.dit.blocks[:1]))
    monkeypatch.setattr(config, "demo", lambda: small)
    monkeypatch.setattr(demo, "measure", lambda settings, model, loss, minutes: dataclasses.replace(settings, steps=3, autocast=False))
    command = ["demo", "four-real", "--scene", "bounce", "--recipe", "paper", "--quick", "--out", str(tmp_path)]
    assert main(command) == 0
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "grid.mp4", "grid.png", "metrics.json", "report.html", "train.jsonl"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scenes"] == {"scene": "bounce", "trained_on": 3, "held_out": 2, "seconds_per_time": 0.2} and "clip" not in metrics
    assert metrics["settings"]["recipe"] == "paper" and metrics["psnr"]["model"] > 5
    page = (tmp_path / "report.html").read_text()
    assert "other scenes, from seeds that training never used" in page and "homographies of one clip" not in page
    assert "mixed in as in the paper" in page and "margin" in capsys.readouterr().out
    with pytest.raises(AssertionError):  # seeded: another scene's checkpoint must not be continued
        assert main([*command[:3], "orbit", *command[4:], "--resume"]) == 0
    assert "--resume: the first run had --scene bounce, this one has orbit" in capsys.readouterr().err


class Watched:
    """A source that counts what is asked of it and gives grids of ones."""

    views, times, size, name = 4, 8, (48, 64), "watched"

    def train(self, n, generator):
        import torch

        return torch.ones(n, 4, 8, 3, 48, 64)


def test_the_recipe_lengthens_clips_and_mixes_modes(generator):
    loss = GridLoss(Watched(), DemoSettings(scene="watched", recipe="paper", steps=30, batch=16))
    early, late = (loss.draw(step, generator) for step in (0, 29))
    assert early[0].shape[2] == 4 and late[0].shape[2] == 8
    modes = early[1] + late[1]
    assert {"both", "none"} <= set(modes) and set(modes) <= {"both", "fixed_view", "freeze_time", "none"}
    static = [i for i, mode in enumerate(late[1]) if mode == "none"]
    assert not References.from_grid(late[0], late[1]).mask[static].any()
    plain = GridLoss(Watched(), DemoSettings(scene="watched", steps=30, batch=2)).draw(0, generator)
    assert plain[0].shape[2] == 8 and plain[1] == ["both", "both"]


def test_an_unknown_scene_and_two_sources_are_one_line_errors(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--scene", "nowhere"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vidkern: error: ") and "nowhere" in error and "bounce" in error
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path), "--scene", "bounce", "--video", "a.mp4"])
