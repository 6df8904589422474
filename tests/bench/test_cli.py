"""`vidkern bench` end to end, in processes of its own as a user runs it."""

import argparse
import csv
import json
import subprocess
import sys

import pytest

from vidkern.bench import cli
from vidkern.errors import UserError


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def test_quick_run_writes_table_json_csv_and_png(tmp_path):
    command = [sys.executable, "-m", "vidkern", "bench", "grid_attention", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "vidkern [" in done.stdout and "gather: SDPA per frame" in done.stdout and "targets" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["grid_attention", "grid_attention-H.png", "grid_attention.csv"]
    (path,) = (folder / "grid_attention").iterdir()
    record = json.loads(path.read_text())
    assert record["machine"]["device"] == folder.name and record["machine"]["versions"]["torch"]
    assert record["limits"]["mm_float32"][str(record["machine"]["threads"])] > 1e8
    assert record["limits"]["copy"] and record["rounds"] == 3 and record["work"]["flops"] > 0
    rows = {r["name"]: r for r in record["rows"]}
    assert rows["vidkern"]["status"] == "timed" and rows["vidkern"]["ratio"] == 1.0
    assert len(rows["vidkern"]["seconds"]["samples"]) == 3
    assert all("reason" in r for r in rows.values() if r["status"] != "timed")
    with open(folder / "grid_attention.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_blocks_cover_the_product_in_order():
    args = parse("grid_attention", "--shape", "cpu,H", "--peers", "none")
    found = cli.blocks(args, "grid_attention", "cpu")
    assert len(found) == 2 * 2 * 2 * 2 and len({b.title for b in found}) == 16
    assert found[0].title == "grid_attention cpu float32 fwd (memory default)"
    assert all(b.peers == [] for b in found)
    assert {b.memory for b in cli.blocks(args, "grid_attention", "cuda")} == {"default"}


def test_quick_is_one_block():
    (block,) = cli.blocks(parse("--quick"), "grid_attention", "cpu")
    assert (block.shape, block.dtype, block.mode, block.memory, block.quick) == ("H", "float32", "fwd", "default", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_op"], "op: 'no_such_op', expected one of attention_motion_flow, grid_attention"),
        (["grid_attention", "--shape", "Z"], "--shape: 'Z', expected one of A, B"),
        (["grid_attention", "--dtype", "int8"], "--dtype: 'int8', expected one of float32"),
        (["grid_attention", "--peers", "magic"], "--peers: 'magic', expected one of SDPA"),
        (["grid_attention", "--rounds", "0"], "--rounds: 0, expected at least 1"),
    ],
)
def test_bad_arguments(words, message):
    with pytest.raises(UserError, match=message):
        cli.run(parse(*words))


def test_peers_are_listed(capsys):
    assert cli.run(parse("grid_attention", "--peers", "list")) == 0
    assert "gather: SDPA per frame; " in capsys.readouterr().out


def test_memory_setting_reaches_the_measuring_process(monkeypatch):
    from vidkern.bench.block import MEMORY, Block, environment

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    block = Block("grid_attention", "H", "float32", "fwd")
    assert "MALLOC_TRIM_THRESHOLD_" not in environment(block)
    block.memory = "kept"
    assert MEMORY["kept"].items() <= environment(block).items()
