"""The toy experiment on architectures: its steps, its committed record, and (slow) the record's own run once more."""

import copy
import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from beside import process

from vidkern.models.four_real import FourRealVideo, toy
from vidkern.models.four_real.toy import CLAIMS, VARIANTS, ToySettings, ToySource

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "models/four_real/records/toy.json"
REPRODUCED = ("before: fused < parallel_soft", "after: fused < full")
QUICK = ToySettings(base_steps=12, steps=3, batch=2, warmup=1, held_out=4)


def recorded():
    return json.loads(RECORD.read_text())


def check_form(record):
    """What the record must have, and what must agree within it."""
    assert record["settings"] == json.loads(json.dumps(dataclasses.asdict(ToySettings())))
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    attention = 4 * (4 * 64 * 64 + 4 * 64 + 2 * 16)  # projections and QK norms
    sync = 4 * (128 * 128 + 128 + 4 * 64 + 4) + 2 * 64  # a linear and its modulation in every block, and the two contexts
    for run in record["runs"]:
        base, variants = run["base"], run["variants"]
        assert base["first_frame_given"] < 0.9 * base["first_frame_withheld"] < 0.5 * base["zero_velocity"]  # a base that has learnt
        assert {name: variant["trained_parameters"] for name, variant in variants.items()} == {
            name: sync if scope == "new" else attention for name, scope in VARIANTS.items()}
        assert all(0 < after < before < base["zero_velocity"] for before, after in (v["errors"] for v in variants.values()))
        assert run["holds"] == toy.holds({name: variant["errors"] for name, variant in variants.items()}) and run["cpu_seconds"] > 0


def test_the_committed_record():
    record = recorded()
    check_form(record)
    assert record["command"] == f"python -m vidkern.models.four_real.toy --record {RECORD.relative_to(ROOT)}"


@pytest.mark.parametrize("change", [
    lambda r: r["runs"].pop(), lambda r: r["settings"].update(steps=750), lambda r: r["runs"][1]["holds"].popitem(),
    lambda r: r["runs"][0]["variants"]["fused"].update(errors=[0.9, 0.0001]), lambda r: r["runs"][2]["variants"].pop("full"),
    lambda r: r["runs"][2]["variants"]["parallel_soft"].update(trained_parameters=133_000),
    lambda r: r["runs"][0]["base"].update(first_frame_given=r["runs"][0]["base"]["first_frame_withheld"])])
def test_a_changed_record_is_caught(change):
    record = copy.deepcopy(recorded())
    change(record)
    with pytest.raises((AssertionError, KeyError)):
        check_form(record)


def test_claims_follow_the_numbers():
    """Each claim is broken by one number, and by no other."""
    right = {"fused": [0.20, 0.10], "full": [0.19, 0.11], "sequential_interleave": [0.26, 0.09], "parallel_soft": [0.21, 0.11]}
    assert toy.holds(right) == dict.fromkeys(CLAIMS, True)
    for claim, (name, when, margin) in CLAIMS.items():
        wrong = copy.deepcopy(right)
        wrong[name][when] = right["fused"][when] + margin
        assert [c for c, kept in toy.holds(wrong).items() if not kept] == [claim]


def test_the_page_states_the_record():
    """docs/four_real.md gives every number of the record: errors before and after, seed by seed."""
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*\|[^|]*) \|$", (ROOT / "docs/four_real.md").read_text(), re.MULTILINE))
    for name in VARIANTS:
        errors = [run["variants"][name]["errors"] for run in recorded()["runs"]]
        assert rows[name] == " | ".join(" / ".join(f"{pair[when]:.3f}" for pair in errors) for when in (0, 1))


def test_what_trains_is_what_is_said(monkeypatch):
    """The base's reference embedding learns and then stays; fine-tuning changes its part alone; the same seed gives the same numbers."""
    base, errors, _ = toy.train_base(0, QUICK)
    assert toy.train_base(0, QUICK)[1] == errors and toy.train_base(1, QUICK)[1] != errors
    assert base.references.embeds[0].weight.abs().max() > 0 and all(b.attention == "full" for b in base.dit.config.blocks)
    made, from_base = [], FourRealVideo.from_base.__func__
    monkeypatch.setattr(FourRealVideo, "from_base", classmethod(lambda cls, *args: made.append(from_base(cls, *args)) or made[-1]))
    for name, part in (("fused", ".attention."), ("parallel_soft", "syncs.")):
        before, after = toy.fine_tune(name, 0, QUICK, base)["errors"]
        changed = {key for key, value in made[-1].state_dict().items()
                   if key not in base.state_dict() or not torch.equal(value, base.state_dict()[key])}
        assert before != after and changed and all(part in key or key == "dit.context" for key in changed)


def test_the_validation_counts_unknown_cells_alone(monkeypatch):
    grids = ToySource().held_out(2)
    unknown = toy.validation_error(None, grids, "both")
    elsewhere = grids.clone()
    elsewhere[:, 0] += 1
    assert toy.validation_error(None, elsewhere, "both") == unknown
    elsewhere[:, 1, 1] += 1
    assert toy.validation_error(None, elsewhere, "both") > unknown
    assert toy.validation_error(lambda z, sigma, frames, mask: torch.zeros_like(z), grids, "both") == pytest.approx(unknown)
    seen = []
    toy.validation_error(lambda z, sigma, frames, mask: seen.append(mask.sum().item()) or z, grids, "both")
    toy.validation_error(lambda z, sigma, frames, mask: seen.append(mask.sum().item()) or z, grids, "both", given=False)
    assert seen == [14, 0]


def test_the_command_writes_the_record(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(toy, "run", lambda *args: asked.append(args) or [])
    toy.main(["--record", str(tmp_path / "r.json"), "--seeds", "2", "--processes", "2"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert asked == [(range(2), 2, ToySettings())] and set(record) == set(recorded())
    with pytest.raises(SystemExit):
        toy.main(["--record", "r.json", "--seeds", "0"])
    assert "--seeds 0: expected at least 1" in capsys.readouterr().err


def test_what_is_claimed_is_what_every_seed_shows():
    assert REPRODUCED == tuple(claim for claim in CLAIMS if all(run["holds"][claim] for run in recorded()["runs"]))


def seed_0(folder):
    """The record's command for one seed, about three minutes on one thread."""
    command = [sys.executable, "-m", "vidkern.models.four_real.toy", "--record", folder / "toy.json", "--seeds", "1"]
    done = process(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "toy.json").read_text())["runs"]


def beside(items, folder):
    return {"seed 0": partial(seed_0, folder)} if any("beside" in item.fixturenames for item in items) else {}


@pytest.mark.slow
def test_toy_training_separates_what_the_record_says(beside):
    """Seed 0 once more: the claims that hold on every recorded seed, and numbers near the recorded ones."""
    (made,) = beside("seed 0")
    assert all(made["holds"][claim] for claim in REPRODUCED)
    for name, variant in recorded()["runs"][0]["variants"].items():
        assert made["variants"][name]["errors"] == pytest.approx(variant["errors"], rel=0.1), name
