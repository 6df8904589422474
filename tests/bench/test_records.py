"""Records are written whole or not at all, and targets are read from them."""

import csv
import json

import pytest

from vidkern.bench import limits, machine, peers, records, roofline, table, targets


def make_record(ms=(10.0, 20.0), mode="fwd", dtype="float32", memory="kept", shape="cpu"):
    def row(name, group, t, **more):
        seconds = {"median": t * 1e-3, "min": t * 1e-3, "iqr": 0.0, "samples": [t * 1e-3]}
        numbers = {"gflops": 47.2 / t * 1e3, "of_limit": 5 / t, "ratio": t / ms[0], "error": 1e-7}
        return {"name": name, "group": group, "status": "timed", "seconds": seconds, **numbers, **more}

    return {
        "op": "grid_attention", "shape": {"name": shape, "length": 8192}, "scaling": "", "dtype": dtype, "mode": mode,
        "memory": memory, "rounds": 1, "block": {"device": "cpu"}, "floor_seconds": 5e-3, "others_share": 0.0,
        "machine": {"device": "some-cpu", "threads": 2, "versions": {"torch": "2.13.0"}, "date": "2026-01-01", "commit": None},
        "limits": {"threads": 2, "peak_float32": {"2": 4e11}, "peak_bfloat16": {"2": 8e11}, "mm_float32": {"2": 2e11},
                   "mm_bfloat16": {"2": 5e11}, "copy": {"2": 4e10}, "ceiling": "peak_float32", "ceiling_flops": 4e11},
        "work": {"flops": 47_200_000_000, "bytes": 67_000_000},
        "rows": [
            row("vidkern", "vidkern", ms[0], backend="cpu", peak_mib=16.0),
            row("gather: SDPA per frame", "torch", ms[1], peak_mib=64.0),
            {"name": "gather: zentorch_sdpa", "group": "zentorch", "status": "not run", "reason": "import zentorch: no"},
        ],
    }  # fmt: skip


def test_save_replaces_and_leaves_nothing_else(tmp_path):
    path = records.save(tmp_path, make_record())
    assert path == tmp_path / "some-cpu" / "grid_attention" / "cpu-float32-fwd-kept.json"
    records.save(tmp_path, make_record((11.0, 20.0)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["rows"][0]["seconds"]["median"] == 0.011
    assert records.load_all(tmp_path, "some-cpu", "grid_attention") == [json.loads(path.read_text())]


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    records.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), records.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_csv_has_a_row_per_candidate(tmp_path):
    records.save(tmp_path, make_record())
    records.save(tmp_path, make_record(mode="fwdbwd"))
    with open(records.save_csv(tmp_path, "some-cpu", "grid_attention"), newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6 and {r["mode"] for r in found} == {"fwd", "fwdbwd"}
    assert (found[0]["candidate"], float(found[0]["ms_median"]), found[0]["backend"]) == ("vidkern", 10.0, "cpu")
    assert (found[2]["status"], found[2]["reason"]) == ("not run", "import zentorch: no")


def test_targets_say_met_or_missed_and_by_how_much():
    found = [str(v) for v in targets.evaluate(make_record(), peers.load("grid_attention"))]
    assert found == [
        "MISSED   0.5 of the limit (peak_float32), target at least 0.6 (off by 17%)",
        "met      2 times as fast as gather: SDPA per frame, target at least 1.7",
        "unknown  time against gather: zentorch_sdpa: no such peer was timed",
        "met      16 MiB of extra memory, target at most 64",
    ]


def test_targets_of_other_shapes_do_not_apply():
    assert targets.evaluate(make_record(shape="C"), peers.load("grid_attention")) == []


def test_overhead_targets():
    record = make_record(shape="small")
    record["overheads"] = [{"name": "registered op", "microseconds": 9.0, "above_launcher": 6.0}]
    found = [str(v) for v in targets.evaluate(record, peers.load("grid_attention"))]
    assert "MISSED   6 us above the launcher, registered op, target at most 5 (off by 20%)" in found
    assert "unknown  overhead of registered op, gradients: not measured" in found


def test_table_shows_every_row_and_every_reason():
    record = make_record()
    text = table.render(record, targets.evaluate(record, peers.load("grid_attention")))
    assert "vidkern [cpu]" in text and "gather: zentorch_sdpa: not run: import zentorch: no" in text
    header, ours = (line for line in text.splitlines() if line.startswith(("candidate", "vidkern [cpu]")))
    assert len(header) == len(ours) and ours.split()[2] == "10.0"
    assert "DISTURBED" not in text
    assert "DISTURBED: other processes took 40%" in table.render({**record, "others_share": 0.4}, [])


def test_ceiling_prefers_the_register_loop_and_falls_back_to_matmul():
    measured = make_record()["limits"]
    assert limits.ceiling(measured, "float32") == (4e11, "peak_float32")
    assert limits.ceiling(measured, "bfloat16") == (8e11, "peak_bfloat16")
    assert limits.ceiling({**measured, "peak_bfloat16": {2: None}}, "bfloat16") == (4e11, "peak_float32")
    no_loop = {"threads": 2, "mm_float32": {2: 2e11}, "onednn_float32": {2: 3e11}, "mm_bfloat16": {2: 5e11}}
    assert limits.ceiling(no_loop, "float32") == (3e11, "onednn_float32")
    assert limits.ceiling(no_loop, "bfloat16") == (5e11, "mm_bfloat16")


def test_ceilings_measured_twice_keep_the_better(monkeypatch):
    counts = []

    def fake(seconds, size, copy_bytes, thread_counts):
        counts.append(thread_counts)
        rate = {1: 3.0, 2: 1.0} if len(counts) == 1 else {1: 4.0, 2: 2.0}
        return {"copy": {t: rate[t] for t in thread_counts}, "peak_bfloat16": {t: None for t in thread_counts}}

    monkeypatch.setattr(limits, "_cpu", fake)
    monkeypatch.setattr(limits.torch, "get_num_threads", lambda: 2)
    first = limits.measure("cpu")
    second = limits.measure("cpu", earlier=first)
    assert counts == [[1, 2], [2]]
    assert second == {"threads": 2, "copy": {1: 3.0, 2: 2.0}, "peak_bfloat16": {1: None, 2: None}}
    assert limits.measure("cpu", earlier={**second, "copy": {1: 3.0, 2: 9.0}})["copy"] == {1: 3.0, 2: 9.0}


def test_disturbance_is_a_share():
    with machine.Disturbance() as found:
        sum(range(200_000))
    assert found.share is None or 0 <= found.share <= 1


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.01, 1.02], [0.0, 0.01, 2.0, 2.01, 2.02, 5.0], [3.0] * 8, [-4.0, 9.0]])
def test_labels_do_not_overlap(values):
    placed = roofline.spread(values, 0.3, 0.0, 5.0)
    in_order = sorted(placed)
    assert all(b - a >= 0.3 - 1e-9 for a, b in zip(in_order, in_order[1:]))
    assert all(-1e-9 <= y <= 5.0 + 1e-9 for y in placed)
    assert sorted(range(len(values)), key=values.__getitem__) == sorted(range(len(values)), key=placed.__getitem__)


def test_roofline_draws(tmp_path):
    pytest.importorskip("matplotlib")
    blocks = [make_record(), make_record((30.0, 60.0), "fwdbwd"), make_record((5.0, 6.0), dtype="bfloat16")]
    for block in blocks:
        records.save(tmp_path, block)
    (path,) = roofline.draw_all(tmp_path, "some-cpu", "grid_attention")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000
