"""`vidkern demo` from the command line: one whole quick run with a real Ctrl-C in it, and every error a person can make."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch

from beside import process, started

from vidkern.cli import main
from vidkern.data import read_video, write_video


def interrupted_and_resumed(out):
    """What two processes did, the first one interrupted, and what it had left."""
    command = [sys.executable, "-m", "vidkern", "demo", "--quick", "--out", out]
    log, deadline = out / "train.jsonl", time.monotonic() + 240
    with started(command) as first:
        while first.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=240)
    left = sorted(os.listdir(out))
    return first.returncode, errors, left, process([*command, "--resume"])


def beside(items, folder):
    chosen = any("beside" in item.fixturenames for item in items)
    return {"demo": lambda: (folder / "out", *interrupted_and_resumed(folder / "out"))} if chosen else {}


def test_interrupt_resume_and_results(beside):
    out, status, errors, left, done = beside("demo")
    assert status == 130 and "Traceback" not in errors
    last = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("vidkern: stopped after ") and last.endswith(f"vidkern demo --out {out} --resume")
    assert left == ["checkpoint.pt", "train.jsonl"]

    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "grid.mp4", "grid.png", "metrics.json", "report.html", "train.jsonl"]
    log = out / "train.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 21))
    metrics = json.loads((out / "metrics.json").read_text())
    best = metrics["best_baseline"]
    assert metrics["psnr"][best] == max(v for k, v in metrics["psnr"].items() if k != "model")
    assert metrics["margin_db_over_best"] == pytest.approx(metrics["psnr"]["model"] - metrics["psnr"][best], abs=2e-3)
    assert [[cell is None for cell in row] for row in metrics["psnr_per_cell"]["model"]] == [[True] * 8] + [[True] + [False] * 7] * 3
    assert len(read_video(out / "grid.mp4").frames) >= 8
    page = (out / "report.html").read_text()
    assert page.count("src=\"data:") == 2 and "grid_attention" in page
    # Nothing is loaded from elsewhere; base64 may spell anything.
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page).replace("http://www.w3.org", "")
    assert f"margin {metrics['margin_db_over_best']:+.2f} dB" in done.stdout
    # Three of the six are reference frames as they are.
    assert f"best simple fill ({best})" in done.stdout and "blend" not in re.sub(r'src="data:[^"]*"', "", page)


def one_line_error(capsys, arguments, *parts):
    assert main(["demo", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vidkern: error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a video")
    short = tmp_path / "short.mp4"
    write_video(short, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), 10)
    out = ["--out", tmp_path / "out"]
    one_line_error(capsys, ["--out", tmp_path / "file" / "below"], "--out", "cannot be written")
    one_line_error(capsys, [*out, "--video", tmp_path / "missing.mp4"], f"--video {tmp_path / 'missing.mp4'}: no such file, expected a video file")
    one_line_error(capsys, [*out, "--video", tmp_path / "file"], f"--video {tmp_path / 'file'}: cannot be read as a video")
    one_line_error(capsys, [*out, "--video", short], "has 5 frames, expected at least 24")
    one_line_error(capsys, [*out, "--resume"], "--resume", "does not exist")
    for more in ([], ["--compare"]):
        one_line_error(capsys, ["--out", tmp_path / "none", "--scene", "foo", *more], "--scene foo: expected one of bounce, orbit")
    assert not (tmp_path / "none").exists()
    one_line_error(capsys, [*out, "--steps", 0], "--steps 0: expected at least 1")
    one_line_error(capsys, [*out, "--minutes", -1], "--minutes -1.0: expected a positive number")
    one_line_error(capsys, [*out, "--device", "nowhere"], "--device nowhere")
    (tmp_path / "out/checkpoint.pt").write_text("torn")
    one_line_error(capsys, [*out, "--resume"], "cannot be read", "expected a checkpoint")
    assert os.listdir(tmp_path / "out") == ["checkpoint.pt"]
