"""The GPU bench without a GPU: every stage's code, what survives a cut, what the sanitizers' and the targets' verdicts rest on."""

import csv
import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from vidkern.bench import gpu, gpu_job, gpu_machine, gpu_ops, gpu_report, gpu_small, gpu_sweep, gpu_time, machine, targets
from vidkern.bench.peers import _grid_attention_gpu as gpu_peers
from vidkern.bench.peers import grid_attention as suite_of
from vidkern.bench.shapes import GRID, forward_flops
from vidkern.errors import UserError
from vidkern.verify import command, warm


def job(folder, **changes):
    return gpu_job.Job(**{"folder": folder, "device": "cpu", "stamp": {"version": 1}, "dry": True, **changes})


def nothing(what):
    pass


@pytest.fixture
def cheap(monkeypatch):
    """Measuring the machine and the memory once is enough: the dry run below does both."""
    monkeypatch.setattr(gpu_time.harness, "peak_extra_memory", lambda call, device: 1 << 20)
    limits = {"threads": 1, "peak_bfloat16": {1: 1e11}, "copy": {1: 1e10}}
    monkeypatch.setattr(gpu_time.limits, "measure", lambda device, quick: limits)


def one_op(monkeypatch):
    """The verify stage looks at merge_attention alone, and stage ops at a small one, which takes no time."""
    plan = command.plan
    monkeypatch.setattr(gpu_ops, "OPS", {"pyramid_merge": ("wan",)})
    monkeypatch.setattr(command, "plan", lambda device, ops, backends, seed: plan(device, ["merge_attention"], ["cpu"], seed))


# ---- a whole dry run ----------------------------------------------------------------------------------------------------
def test_dry_run_walks_through_every_stage(tmp_path, capsys, monkeypatch):
    one_op(monkeypatch)
    words = ["--dry-run", "--stage", ",".join(gpu.STAGES), "--shape", "A", "--out", str(tmp_path / "new" / "place")]
    tmp_path = tmp_path / "new" / "place"
    assert gpu.main(words) == 0, capsys.readouterr()
    folder = tmp_path / machine.slug("cpu")
    said = capsys.readouterr().out
    assert all(f"{name}: complete" in said for name in gpu.STAGES)
    assert said.startswith("a dry run: ")
    assert "\n--shape A is for time, sweep; machine, build, verify, sanitize, ops, profile run as without it\n" in said
    assert gpu_sweep.STAND_IN in said and ", 0 useful" not in said and "a dry run, a stand-in for A: nothing is judged" in said
    assert "left out of a dry run" in said and "quick run" not in said and "BackendUnavailable" not in said
    report = json.loads((folder / "grid_attention-gpu.json").read_text())
    assert set(report) >= {"machine", "build", "verify", "sanitize", "time", "sweep", "profile", "targets"}
    assert report["machine"]["limits"]["copy"] and report["machine"]["versions"]["torch"] == torch.__version__
    assert {u["state"] for u in report["verify"]["units"]} == {"passed"}
    assert {s["state"] for s in report["sanitize"].values()} == {"skipped"} and all(s["reason"] for s in report["sanitize"].values())
    assert [(b["shape"]["name"], b["mode"]) for b in report["time"]] == [("A", "bwd"), ("A", "fwd")]
    for block in report["time"]:
        rows = {r["name"]: r for r in block["rows"]}
        assert rows["vidkern cpu"]["status"] == rows["three dense calls merged"]["status"] == rows["dense SDPA"]["status"] == "timed"
        assert rows["vidkern cpu"]["ratio"] == 1.0 and rows["vidkern cpu"]["host_us"] > 0 and len(rows["vidkern cpu"]["seconds"]["samples"]) == 3
        assert ("vidkern cpu, with lse" in rows) == (block["mode"] == "fwd") != ("vidkern cpu, deterministic" in rows)
        assert rows["dense SDPA"]["useful_tflops"] < rows["dense SDPA"]["tflops"]
    assert report["time"][1]["new_grid"]["later_ms"] > 0
    # Everything that it leaves says what it is.
    assert report["dry"] and all(b["dry"] for b in report["time"]) and report["machine"]["dry"] and report["targets"] == {}
    assert report["sweep"]["dry"] and report["sweep"]["heads"] == {"A": 2} and set(report["sweep"]["about"]) == {"rate", "dry"}
    together = report["sweep"]["best"]["cpu"]["dkv"]["16"]["together"]
    assert report["sweep"]["counts"] == {"timed": 12, "failed": 0, "wrong": 0} and {"block_m", "block_n", "rate"} <= set(together[0])
    with open(folder / "grid_attention-gpu.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == sum(len(b["rows"]) for b in report["time"]) and float(found[0]["ms_median"]) > 0
    assert {row["dry"] for row in found} == {"True"}
    assert (folder / "grid_attention-gpu.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.rglob("verified.json")), "a dry run verifies nothing"
    ops = json.loads((folder / "ops-gpu.json").read_text())
    assert [(b["op"], b["shape"]["name"], b["mode"]) for b in ops["ops"]] == [("pyramid_merge", "small", "fwd")]
    assert ops["dry"] and ops["machine"]["limits"] and report["build"]["machine_code"] == {} and report["build"]["cuda"]["kept in"]
    build = report["build"]
    assert {type(s) for s in build["first_call_seconds"].values()} == {float} and build["first_call_failed"] == {}
    assert build["not_served"]["grid_attention hopper"] == "tensors are on cpu, it serves cuda"

    # The same command again finds everything there and measures nothing.
    monkeypatch.setattr(gpu_time, "measure", None)
    monkeypatch.setattr(gpu_ops, "measure", None)
    monkeypatch.setattr(gpu_sweep, "measure", None)
    assert gpu.main(words) == 0


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--stage", "time"]) == 2
    assert "finds no CUDA device on this machine; --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stage", "magic"], "--stage: 'magic'"), (["--shape", "Z"], "--shape: 'Z'"), (["--minutes", "0"], "--minutes: 0.0"),
        (["--stage", "sweep", "--shape", "A,"], "--shape: '', expected some of A, B"),
        (["--stage", "ops", "--shape", "C"], "--shape: 'C' with --stage ops, expected a stage that takes shapes: time or sweep"),
    ],
)  # fmt: skip
def test_bad_arguments(words, message, capsys):
    assert gpu.main(["--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_before_the_first_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_stage", None)
    a_file = tmp_path / "file"
    a_file.write_text("kept")
    for out in (a_file, a_file / "below"):
        assert gpu.main(["--dry-run", "--out", str(out)]) == 2
        said = capsys.readouterr()
        expected = f"vidkern: error: --out: '{out}', expected a folder that can be made and written to ("
        assert said.out == "" and said.err.startswith(expected) and said.err.count("\n") == 1
    assert a_file.read_text() == "kept"
    monkeypatch.setenv("XDG_DATA_HOME", str(a_file))
    assert gpu.main(["--dry-run"]) == 2
    assert "--out: not given, its default '" in capsys.readouterr().err


def test_help_tells_the_shapes_of_a_stage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    default = f"A to G for time, {', '.join(gpu.SWEEP_SHAPES)} for sweep and with --quick"
    assert f"for stages time and sweep, the other stages take none (default: {default})" in said
    assert sorted(gpu_time.SHAPES) == list("ABCDEFG") and gpu.SWEEP_SHAPES == gpu_time.QUICK_SHAPES


# ---- cuts ---------------------------------------------------------------------------------------------------------------
def test_a_rerun_goes_on_where_a_cut_run_stopped(tmp_path, monkeypatch, cheap):
    measured, real = [], gpu_time.measure

    def counted(job, name, mode, tick):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((name, mode))
        return real(job, name, mode, tick)

    monkeypatch.setattr(gpu_time, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        gpu_time.run(job(tmp_path), ["A", "C"], nothing, nothing)
    assert measured == [("A", "fwd"), ("A", "bwd"), ("C", "fwd")]
    assert len(gpu_report.time_blocks(tmp_path)) == 3
    measured[:] = [None]
    gpu_time.run(job(tmp_path), ["A", "C"], nothing, nothing)
    assert measured == [None, ("C", "bwd")]
    # Other sources, other results.
    measured[:] = [None, None]
    with pytest.raises(KeyboardInterrupt):
        gpu_time.run(dataclasses.replace(job(tmp_path), stamp={"version": 2}), ["A", "C"], nothing, nothing)
    assert measured[2] == ("A", "fwd")


def test_a_sweep_goes_on_after_a_cut_and_a_torn_line(tmp_path, monkeypatch):
    real, count = gpu_sweep.measure, []

    def cut(*args):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gpu_sweep, "measure", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu_sweep.run(job(tmp_path), ["A"], nothing, nothing)
    path = tmp_path / "gpu" / "sweep" / "A-dq-cpu.jsonl"
    path.write_text(path.read_text() + '{"config": {"block_m"')
    count.clear()
    monkeypatch.setattr(gpu_sweep, "measure", lambda *args: count.append(1) or real(*args))
    best = gpu_sweep.run(job(tmp_path), ["A"], nothing, nothing)
    assert len(count) == 12 - 5 and best["counts"]["timed"] >= 11


def test_a_sweep_of_one_shape_leaves_the_others_their_answers(tmp_path, capsys):
    words = ["--dry-run", "--stage", "sweep", "--out", str(tmp_path), "--shape"]
    path = tmp_path / machine.slug("cpu") / "gpu" / "sweep.json"
    best = {}
    for shapes, counted in (("A, F", 24), ("B", 36), ("A", 36), ("H,H", 48)):  # every shape can be swept
        assert gpu.main([*words, shapes]) == 0
        best = json.loads(path.read_text())
        assert best["counts"] == {"timed": counted, "failed": 0, "wrong": 0}, capsys.readouterr()
    assert list(best["heads"]) == ["A", "B", "F", "H"] and set(best["best"]["cpu"]["dq"]["16"]) == {"together", "A", "B", "F", "H"}
    assert "48 timed, 0 failed, 0 wrong, on A, B, F, H\n" in capsys.readouterr().out
    # Measured anew is the shape that is named; a run without time for a row leaves what there is.
    one = path.with_name("sweep") / "F-dq-cpu.jsonl"
    before = one.read_text()
    assert gpu.main([*words, "A", "--fresh"]) == 0 and one.read_text() == before
    assert json.loads(path.read_text())["counts"]["timed"] == 48
    other = job(path.parent.parent, stamp={"version": 2}, seconds=0)
    before = path.read_text()
    with pytest.raises(gpu_job.OutOfTime):
        gpu_sweep.run(other, ["A"], nothing, nothing)
    assert path.read_text() == before


def test_a_sweep_that_is_cut_sums_up_what_it_has(tmp_path, monkeypatch):
    real = gpu_sweep._one
    monkeypatch.setattr(gpu_sweep, "_one", lambda *args: 1 / 0 if args[3] == "dkv" else real(*args))
    with pytest.raises(ZeroDivisionError):
        gpu_sweep.run(job(tmp_path), ["C"], nothing, nothing)
    assert set(gpu_job.load(tmp_path / "gpu" / "sweep.json")["best"]["cpu"]) == {"forward", "dq"}


def test_every_shape_is_cut_to_calls_of_milliseconds_for_the_sweep():
    assert all(gpu_time.GRID[n].heads % h == 0 for n, h in gpu_sweep.HEADS.items())
    assert max(forward_flops(gpu_sweep.shape_of(n, False)) for n in GRID) < 10e12
    assert gpu_sweep.shape_of("H", False) == GRID["H"] and gpu_sweep.shape_of("E", False).heads == 1


def test_when_time_runs_short_what_is_prepared_is_timed(tmp_path, cheap):
    short = job(tmp_path, seconds=gpu_time.RESERVE - 1)
    block = gpu_time.measure(short, "A", "fwd", nothing)
    states = {r["name"]: r.get("reason", "") for r in block["rows"]}
    assert block["cut"] and states["vidkern cpu"] == "" and states["three dense calls merged"] == "out of time"
    short.save("time/A-bfloat16-fwd", block)
    assert short.done("time/A-bfloat16-fwd") is None, "a block that was cut is measured anew"


def test_a_stage_without_time_is_cut_and_one_that_crashes_fails(tmp_path, monkeypatch, capsys):
    assert gpu.run_stage("time", job(tmp_path, seconds=0), ["A"]) == gpu.CUT
    assert "0 s left of 0" in capsys.readouterr().out
    monkeypatch.setattr(gpu_time, "run", lambda *args: 1 / 0)
    assert gpu.run_stage("time", job(tmp_path), ["A"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_fresh_forgets_the_stage_alone(tmp_path):
    first = job(tmp_path)
    first.save("verify/x", {}), first.save("verify", {}), first.save("machine", {})
    dataclasses.replace(first, fresh=True).forget("verify")
    assert first.done("verify") is None and first.done("verify/x") is None and first.done("machine") is not None


def test_a_damaged_result_is_measured_again(tmp_path):
    first = job(tmp_path)
    first.save("machine", {"a": 1})
    first.path("machine.json").write_text('{"a":')
    assert first.done("machine") is None and gpu_report.write(tmp_path) == []


# ---- the machine's tools --------------------------------------------------------------------------------------------------
def tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return path


def test_nvidia_smi_is_asked_and_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_machine.query() == {} and command.driver() == "unknown"
    tool(tmp_path, "nvidia-smi", "fields = sys.argv[1].partition('=')[2].split(',')\nprint(', '.join(f.upper() for f in fields))")
    found = gpu_machine.query()
    assert found["clocks.max.sm"] == "CLOCKS.MAX.SM" and set(found) == set(gpu_machine.QUERY)
    assert command.driver() == "DRIVER_VERSION" and set(gpu_machine.clocks()) >= {"power.draw", "clocks.sm"}
    tool(tmp_path, "nvidia-smi", "raise SystemExit(9)")
    assert gpu_machine.query() == {}


def test_sanitizers_run_each_on_the_small_script(tmp_path, monkeypatch):
    log = tmp_path / "log"
    said = f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\nprint('========= ERROR SUMMARY: 0 errors')"
    path = tool(tmp_path, "compute-sanitizer", said)
    monkeypatch.setattr(gpu_machine, "find_sanitizer", lambda: str(path))
    states = gpu_machine.sanitize(job(tmp_path, device="cuda"))
    assert {n: s["state"] for n, s in states.items()} == dict.fromkeys(gpu_machine.TOOLS, "clean")
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and all(f"--tool {n} " in line and "vidkern.bench.gpu_small" in line for n, line in zip(gpu_machine.TOOLS, lines))
    gpu_machine.sanitize(job(tmp_path, device="cuda"))
    assert len(log.read_text().splitlines()) == 3, "what ran does not run again"


def test_several_stages_are_processes_of_their_own(tmp_path, monkeypatch, capsys):
    asked, answers = [], iter([(0, ""), (None, ""), (-11, "")])

    def in_group(command, seconds):
        asked.append((command[3:], seconds))
        return next(answers)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.machine, "slug", lambda device: "some-gpu")
    monkeypatch.setattr(gpu_machine, "in_group", in_group)
    assert gpu.main(["--stage", "machine,time,sweep", "--out", str(tmp_path), "--minutes", "2", "--quick", "--shape", "C"]) == 1
    assert asked[1] == (["--stage", "time", "--minutes", "2.0", "--shape", "C", "--out", str(tmp_path), "--quick"], 160)
    assert asked[0][0] == ["--stage", "machine", "--minutes", "2.0", "--out", str(tmp_path), "--quick"], "no stage gets what it refuses"
    said = capsys.readouterr().out
    assert "machine: complete; time: cut by time, run again to go on; sweep: ended with -11" in said


# ---- candidates -----------------------------------------------------------------------------------------------------------
def test_candidates_on_a_gpu_are_the_ones_promised(monkeypatch):
    """What would run on a GPU, by a problem that claims to be on one."""
    class OnGpu:
        shape, device = GRID["A"], torch.device("cuda")

    monkeypatch.setattr(gpu_time, "our_backends", lambda problem: ["triton"])
    names = [p.name for p in gpu_time.candidates(OnGpu, "fwd", False)]
    assert names[:2] == ["vidkern triton", "vidkern triton, with lse"]
    assert {"FlexAttention, block 128", "FlexAttention, block 64", "three dense calls merged", gpu_peers.THREE_FLASH3.name} <= set(names)
    assert suite_of.DENSE_MASK.name in names
    OnGpu.shape = GRID["C"]
    assert suite_of.DENSE_MASK.name not in [p.name for p in gpu_time.candidates(OnGpu, "bwd", False)]
    known = set(names) | {d.name for d in gpu_peers.DENSE}
    assert {n for t in targets.GPU for n in t.against} | {targets.DENSE_FIRST} <= known


def test_a_wrong_backend_is_not_timed(monkeypatch):
    problem = suite_of.problem(gpu_time.tiny(GRID["A"]), torch.bfloat16, "cpu")
    right = suite_of.reference(problem, "fwd")
    wrong = dataclasses.replace(gpu_time.ours("cpu"), build=lambda p: torch.nn.functional.scaled_dot_product_attention)
    row, call = gpu_time.prepare(wrong, problem, "fwd", right)
    assert call is None and row["status"] == "wrong" and "largest error" in row["reason"]
    broken = dataclasses.replace(wrong, build=lambda p: 1 / 0)
    assert gpu_time.prepare(broken, problem, "fwd", right)[0]["reason"].startswith("ZeroDivisionError")


def test_three_dense_calls_by_flash_attention_3(monkeypatch):
    """The folding and merging, with a stand-in for the package."""
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (logits.softmax(-1) @ v).transpose(1, 2).contiguous(), logits.logsumexp(-1)

    monkeypatch.setattr(gpu_peers, "_flash_attention", lambda version: attend)
    shape = dataclasses.replace(gpu_time.tiny(GRID["A"]), batch=2)
    problem = suite_of.problem(shape, torch.float32, "cpu")
    out = gpu_peers.THREE_FLASH3.build(problem)(*problem.inputs)
    torch.testing.assert_close(out.double(), suite_of.reference(problem, "fwd").values[0], atol=1e-5, rtol=0)


def test_dense_shapes_keep_their_rate():
    small = gpu_peers.dense_shape(GRID["E"])
    assert small.heads == 1 and small.length == GRID["E"].length
    assert gpu_peers.dense_shape(GRID["A"]) == GRID["A"]
    assert gpu_peers.dense_flops(GRID["C"]) * 1e-12 == pytest.approx(89.1, rel=0.01)


def test_small_script_of_the_sanitizers_runs_every_compiled_backend():
    ran = gpu_small.run("cpu")
    assert "grid_attention cpu bfloat16 gqa" in ran and "merge_attention cpu float32 signed" in ran and len(ran) >= 14


def test_a_sweep_rejects_what_is_wrong_or_fails():
    right = (torch.ones(4),)
    row = gpu_sweep.measure(lambda: (torch.ones(4) * 1.1,), gpu_sweep.StandIn(64, 64), "dq", right, gpu_sweep.DryConfigs, None)
    assert row["status"] == "wrong" and "0.1 of the largest" in row["reason"]
    row = gpu_sweep.measure(lambda: 1 / 0, gpu_sweep.StandIn(64, 64), "dq", right, gpu_sweep.DryConfigs, None)
    assert row["status"] == "failed"
    nan = gpu_sweep.measure(lambda: (torch.full((4,), torch.nan),), gpu_sweep.StandIn(1, 1), "dq", right, gpu_sweep.DryConfigs, None)
    assert nan["status"] == "wrong"


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("kind", gpu_sweep.KINDS)
def test_the_sweep_fits_the_tables(backend, kind):
    configs = gpu_sweep.tables(backend)
    found = configs.candidates(kind, 128, 2, 227 << 10)
    assert len({gpu_sweep.key_of(c) for c in found}) == len(found) > {"triton": 8, "hopper": 1}[backend]
    if backend == "triton":
        assert set(gpu_sweep.KINDS) == set(configs.KINDS)
    with configs.forced(kind, found[0]):
        pass


def test_both_kinds_of_kernels_are_swept(tmp_path, monkeypatch):
    """What would run on a GPU that Hopper's kernels serve, by stand-ins for the GPU and its clock."""
    monkeypatch.setattr(gpu_time, "our_backends", lambda problem: ["hopper", "cuda", "triton"])
    monkeypatch.setattr(gpu_sweep, "shape_of", lambda name, dry: gpu_time.tiny(GRID[name]))
    monkeypatch.setattr(gpu_sweep, "runner", lambda problem, kind, backend: lambda: (torch.ones(1),))
    monkeypatch.setattr(gpu_sweep, "_warm_all", lambda *args: 0.0)
    monkeypatch.setattr(gpu_time, "timer_for", lambda device: lambda call, calls: 1e-3)
    best = gpu_sweep.run(job(tmp_path, dry=False, quick=True), ["C", "F"], nothing, nothing)["best"]
    assert set(best) == {"hopper", "triton"} and all(set(kinds) == set(gpu_sweep.KINDS) for kinds in best.values())
    assert {(c["block_n"], c["groups"]) for c in best["hopper"]["dq"]["16"]["together"]} == {(96, 2), (48, 2)}


def test_kernels_are_compiled_ahead_by_shares_that_cover_every_case():
    units = ["merge_attention/cpu/float32", "merge_attention/cpu/bfloat16"]
    everything = warm.cases(units)
    assert len({(c[2], c[3].name) for c in everything}) == len(everything) > 10
    small = [c for c in everything if "large" not in c[3].name]
    parts = len(everything)
    assert sum(warm.run(units, 1, everything.index(c), parts, "cpu") for c in small[:3]) == 3
    assert warm.run(["merge_attention/no_such/float32"], 1, 0, 1, "cpu") == 0
    assert command.compile_ahead([], torch.device("cpu"), 1) == 0


# ---- verdicts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code, output, state, reason",
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "clean", ""),
        (77, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n", "errors", "3, first: Invalid __global__"),
        (77, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", "errors", "2, first"),
        (1, "========= Error: Device not supported. Please refer to\n", "skipped", "Device not supported"),
        (1, "Traceback\nImportError: no torch\n", "skipped", "exit status 1 and no summary: ImportError: no torch"),
        (1, "========= ERROR SUMMARY: 0 errors\n", "errors", "the script itself failed with 1"),
    ],
)
def test_what_a_sanitizer_says(code, output, state, reason):
    found = gpu_machine.judge(code, output)
    assert found[0] == state and reason in found[1]


def test_a_process_that_does_not_end_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_machine.in_group([sys.executable, "-c", parent], 0.7) == (None, "")
    time.sleep(1.5)
    assert not mark.exists()
    said = gpu_machine.in_group([sys.executable, "-c", "print(7); raise SystemExit(3)"], 20, stdout=subprocess.PIPE, text=True)
    assert said == (3, "7\n")


def block(mode="fwd", shape="C", **rows):
    def row(name, group, tflops, ms):
        return {"name": name, "group": group, "status": "timed", "tflops": tflops, "seconds": {"median": ms * 1e-3}}

    made = [row("vidkern triton", "vidkern", 400.0, 40.0), row("vidkern triton, deterministic", "vidkern", 390.0, 41.0)]
    made += [row("FlexAttention, block 128", "torch", 200.0, 80.0), row("three dense calls merged", "torch", 250.0, 64.0)]
    made += [row("dense SDPA, cuDNN", "dense", 600.0, 100.0), row("dense SDPA, flash", "dense", 350.0, 170.0)]
    return {"mode": mode, "shape": {"name": shape}, "rows": made, "new_grid": {"first_ms": 1.5, "later_ms": 1.49}}


def test_targets_of_the_triton_tier():
    assert [str(v) for v in targets.evaluate_gpu(block())] == [
        "met      0.667 of the rate of dense SDPA, cuDNN, vidkern triton, target at least 0.6, goal 0.75 not reached",
        "met      2 times as fast as FlexAttention, block 128, vidkern triton, target at least 1.7",
        "MISSED   1.6 times as fast as three dense calls merged, vidkern triton, target at least 1.8 (off by 11%)",
        "unknown  time against three dense calls merged, FlashAttention-3: not timed",
        "met      0.01 host ms more for a grid not met before, target at most 0.02",
    ]
    backward = [str(v) for v in targets.evaluate_gpu(block("bwd"))]
    assert backward[0].startswith("met      0.667 of the rate") and "goal 0.6 reached" in backward[0]
    assert "met      0.975 of the rate, deterministic backward, vidkern triton, target at least 0.65" in backward
    with_flash3 = block()
    with_flash3["rows"].append({**with_flash3["rows"][4], "name": targets.DENSE_FIRST, "tflops": 700.0})
    assert str(targets.evaluate_gpu(with_flash3)[0]).startswith("MISSED   0.571 of the rate of dense FlashAttention-3")


def test_targets_of_hopper_kernels_apply_to_their_shapes():
    assert not any("useful TFLOP/s" in v.text for v in targets.evaluate_gpu(block()))
    found = block()
    found["rows"][0]["name"] = "vidkern hopper"
    assert "MISSED   400 useful TFLOP/s, vidkern hopper, target at least 560 (off by 29%)" in map(str, targets.evaluate_gpu(found))
    found["shape"]["name"] = "G"
    assert not any("useful TFLOP/s" in v.text for v in targets.evaluate_gpu(found))


# ---- the picture ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dry", [False, True])
def test_the_picture_can_be_read(tmp_path, monkeypatch, dry):
    """On a GPU as in a dry run, whose values are a thousandth of their ceiling: bars that fill their panel, values in one notation."""
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, format: drawn.append(self))
    blocks = []
    for name in "AB":
        made = block(shape=name)
        made["shape"] |= GRID[name].facts()
        made["rows"][-1]["useful_tflops"] = 0.37
        made |= {"dtype": "bfloat16", "dry": dry, "ceiling": {"name": "mm_bfloat16", "tflops": 750.0}}
        if dry:
            made["ceiling"]["name"] = "peak_bfloat16"
            for row in made["rows"]:
                row |= {key: row[key] * 1e-5 for key in ("tflops", "useful_tflops") if key in row}
        blocks.append(made)
    gpu_report.draw(blocks, {"device": "some-gpu"}, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    said = [t.get_text().strip() for t in axes.texts]
    width = drawn[0].get_figwidth() * drawn[0].dpi
    assert len(drawn[0].axes) == 2 and width < 1600 and max(b.get_width() for b in axes.patches) > 0.6 * axes.get_xlim()[1]
    title = drawn[0].get_suptitle()
    if dry:
        assert title.startswith("DRY RUN of grid attention") and axes.get_title(loc="left") == "stand-in for A, forward"
        assert "off to the right: bf16 dot, registers, " in axes.get_xlabel() and not axes.lines
    else:
        assert "DRY" not in title and axes.get_title(loc="left") == "A: V8 T8 N144 H32 D128, forward"
        assert axes.get_xlabel() == "useful TFLOP/s (line: torch.mm bf16, 750.0)" and len(axes.lines) == 1
        assert said[:2] == ["0.4", "200.0"]
    assert len({len(t.partition(".")[2]) for t in said}) == 1 and not any("e" in t for t in said)


def test_a_rate_below_one_keeps_its_digits():
    made = block()
    made |= {"dtype": "bfloat16", "rounds": 3, "ceiling": {"name": "mm_bfloat16", "tflops": 750.0}}
    made["shape"] |= GRID["C"].facts()
    for row in made["rows"]:
        row |= {"of_ceiling": 0.5, "heads": 2, "useful_tflops": 0.00716}
    assert "dense SDPA, flash (2 heads; dense FLOPs, 0.00716 useful)" in gpu_time.render(made)


def test_bad_op_has_no_suite():
    with pytest.raises(UserError):
        gpu._shapes("nonsense", ["time"])
