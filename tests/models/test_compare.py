"""`vidkern demo four-real --compare`: a small comparison end to end, its continuation, the committed record, and the page that shows it."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch

from vidkern.cli import main
from vidkern.errors import UserError
from vidkern.models.four_real import compare, compare_report
from vidkern.models.four_real.compare import ENTRIES, CompareSettings

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "models/four_real/records/compare.json"
QUICK = CompareSettings(data="toy", seeds=1, base_steps=3, steps=4, held_out=2, sampling_steps=1, eval_every=2, size=8, patch=2, dim=32, heads=2,
                        blocks=2, batch=1, base_batch=1)
FEW = (ENTRIES[0], ENTRIES[7], ENTRIES[13])  # fused, and parallel_soft in both comparisons


def make(out, settings=QUICK, entries=FEW):
    out.mkdir(exist_ok=True)
    return compare.compare(settings, out, command="vidkern demo four-real --compare", entries=entries, progress=False)


def timeless(record):
    """A record without its times."""
    return {**record, "cpu_seconds": 0, "runs": [{**run, "cpu_seconds": 0} for run in record["runs"]]}


def test_a_comparison_continues_where_it_stopped_and_is_repeatable(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    started = []
    one = compare.run_one

    def stop_at_the_second(entry, *args):
        started.append(entry.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return one(entry, *args)

    monkeypatch.setattr(compare, "run_one", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts")
    assert sorted(os.listdir(tmp_path / "parts/runs")) == ["parameters-fused-0.json", "parameters-fused-0.pt"]
    before = (tmp_path / "parts/runs/parameters-fused-0.json").read_bytes()
    monkeypatch.setattr(compare, "run_one", lambda entry, *args: started.append(entry.name) or one(entry, *args))
    parts = make(tmp_path / "parts")
    assert started == ["fused", "parallel_soft", "parallel_soft", "parallel_soft"]  # fused was not run again
    assert (tmp_path / "parts/runs/parameters-fused-0.json").read_bytes() == before and timeless(parts) == timeless(whole)
    with pytest.raises(UserError, match="holds a comparison with steps=4, this one has 5"):
        make(tmp_path / "parts", dataclasses.replace(QUICK, steps=5))


def test_both_comparisons_are_equal_in_what_they_say(tmp_path):
    """Trained parameters within 10 % (the hard sync has no natural form of that size: fewer), compute within half a step."""
    source, settings = compare.ToySource(), dataclasses.replace(CompareSettings(), batch=1)
    planned = compare.plan(ENTRIES, settings, source)
    fused = planned[0][1] * planned[0][2]
    for entry, flops, steps in planned:
        trained = sum(p.numel() for p in compare.prepared(entry, settings, None)[1])
        own = sum(p.numel() for p in compare.prepared(ENTRIES[0], settings, None)[1])
        if entry.budget == "parameters":
            assert steps == settings.steps
            assert 0.5 * own < trained < 0.75 * own if entry.name == "parallel_hard" else trained == pytest.approx(own, rel=0.1), entry.name
        else:
            assert abs(flops * steps - fused) <= 0.5 * flops, entry.name


def test_the_command_writes_every_file(tmp_path, capsys):
    arguments = ["demo", "four-real", "--compare", "--quick", "--scene", "bounce", "--out", str(tmp_path), "--record", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    names = {"compare.json", "table.md", "curves.png", "samples.png", "report.html", "settings.json", "r.json", "base-0.pt", "runs"}
    assert names <= set(os.listdir(tmp_path))
    record = compare_report.load(tmp_path / "compare.json")
    check_form(record)
    assert record == compare_report.load(tmp_path / "r.json") and len(record["runs"]) == len(ENTRIES)
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png') == 2 and all(entry.name in page for entry in ENTRIES) and record["command"] in page
    assert compare_report.markdown(record) in capsys.readouterr().out


@pytest.mark.parametrize("options, parts", [
    (["--video", "a.mp4"], ["--video a.mp4", "without --compare"]), (["--seeds", "0"], ["--seeds 0", "at least 1"]),
    (["--minutes", "2"], ["--minutes 2.0"]), (["--recipe", "paper"], ["--recipe paper"]), (["--scene", "no-scene"], ["no-scene"]),
    (["--record", "/nowhere/r.json"], ["--record /nowhere/r.json: its folder does not exist"])])
def test_options_that_do_not_fit_are_one_line_errors(tmp_path, capsys, options, parts):
    assert main(["demo", "--compare", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vidkern: error: ") and all(part in error for part in parts), error


def test_options_that_need_the_comparison(tmp_path, capsys):
    for options in (["--seeds", "2"], ["--record", "x.json"], ["--recipe", "paper"]):
        assert main(["demo", "--out", str(tmp_path), *options]) == 2
        assert f"{options[0]} {options[1]}: expected with --" in capsys.readouterr().err


def check_form(record):
    """What every record must have, and what must agree within it."""
    settings = CompareSettings(**record["settings"])
    assert record["command"].startswith("vidkern demo four-real --compare") and record["cpu_seconds"] >= 0
    assert [(run["name"], run["budget"], run["seed"]) for run in record["runs"]] == [
        (entry.name, entry.budget, seed) for seed in range(settings.seeds) for entry in ENTRIES]
    fused = next(run for run in record["runs"] if run["name"] == "fused")
    for run, entry in zip(record["runs"], list(ENTRIES) * settings.seeds):
        assert {key: run[key] for key in dataclasses.asdict(entry)} == dataclasses.asdict(entry)
        assert run["curve"][0] == [0, run["zero_shot"]] and run["curve"][-1] == [run["steps"], run["error"]]
        assert run["training_flops"] == run["steps"] * run["step_flops"]
        if run["budget"] == "compute":
            assert abs(run["training_flops"] - fused["training_flops"]) <= 0.5 * run["step_flops"] + 1
        else:
            assert run["steps"] == fused["steps"] == settings.steps
        assert all(torch.tensor(run[key]).isfinite() for key in ("psnr", "psnr_expected", "error"))
    assert set(record["baselines_psnr"]) == {"nearest", "same_time", "same_view", "mean", "weighted", "change"}


def test_the_committed_record():
    record = compare_report.load(RECORD)
    check_form(record)
    assert record["settings"]["seeds"] >= 3 and record["settings"]["data"] != "toy"
    assert f"--record {RECORD.relative_to(ROOT)}" in record["command"]


def test_the_page_shows_the_record():
    """docs/four_real.md holds the tables of the record, to the letter, and its verdict."""
    record, page = compare_report.load(RECORD), (ROOT / "docs/four_real.md").read_text()
    between = re.search(r"<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL).group(1)
    assert between == compare_report.markdown(record)
    assert compare_report.verdict(record) in " ".join(page.split()) and record["command"] in page


def test_the_record_can_be_made_again(tmp_path):
    """A seed and a few steps of the recorded settings on fewer scenes: the same parameters and FLOPs, and a model that learns."""
    record = compare_report.load(RECORD)
    settings = CompareSettings(**record["settings"])
    small = dataclasses.replace(settings, seeds=1, base_steps=2, base_batch=2, scenes=2, held_out=2, sampling_steps=1)
    few = make(tmp_path, dataclasses.replace(small, steps=6), entries=(ENTRIES[0], ENTRIES[4]))
    for run in few["runs"]:
        same = next(r for r in record["runs"] if (r["name"], r["budget"]) == (run["name"], run["budget"]))
        assert all(run[key] == same[key] for key in ("trained_parameters", "parameters", "forward_flops", "step_flops"))
        assert run["error"] < run["zero_shot"] and run["psnr"] > 10


def test_the_verdict_follows_the_numbers(tmp_path):
    """Seeded: the same record with fused made worse, better, and mixed."""
    record = make(tmp_path / "out")
    record["baselines_psnr"]["nearest"] = 99.0

    def said(*psnr):
        changed = json.loads(json.dumps(record))
        for run, value in zip(changed["runs"], psnr):
            run["psnr"] = value
        return compare_report.verdict(changed)

    assert "Equal trained parameters: fused reaches 10.00 dB; behind in every seed of parallel_soft." in said(10.0, 11.0, 9.0)
    assert "Equal training compute: fused reaches 10.00 dB; ahead in every seed of parallel_soft." in said(10.0, 11.0, 9.0)
    assert "(nearest) has 99.00 dB, so fused is below it" in said(10.0, 11.0, 9.0)
    record["runs"] += [{**run, "seed": 1} for run in json.loads(json.dumps(record["runs"]))]
    assert "undecided against parallel_soft" in said(10.0, 11.0, 9.0, 10.0, 9.0, 9.0)
