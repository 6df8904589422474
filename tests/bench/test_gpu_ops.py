"""Stage ``ops`` and the CUDA part of stage ``build``, without a GPU; and the launch cost against a driver that does nothing."""

import dataclasses

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.bench import gpu, gpu_job, gpu_ops, gpu_report, gpu_time, launch_cost, peers
from vidkern.cuda import cubins, launcher
from vidkern.errors import UserError
from vidkern.verify import probes


def job(folder, **changes):
    return gpu_job.Job(**{"folder": folder, "device": "cpu", "stamp": {"version": 1}, "dry": True, **changes})


@pytest.fixture
def cheap(monkeypatch):
    limits = {"threads": 1, "peak_bfloat16": {1: 1e11}, "copy": {1: 1e10}}
    monkeypatch.setattr(gpu_ops.limits, "measure", lambda device, quick: limits)
    monkeypatch.setattr(gpu_ops, "OPS", {"pruned_linear": ("gather", "qkv_irregular"), "pyramid_flow_inputs": ("wan",)})


def nothing(what):
    pass


# ---- which blocks and rows --------------------------------------------------------------------------------------------
def test_the_table_names_shapes_of_suites_and_every_op():
    for op, shapes in gpu_ops.OPS.items():
        assert set(shapes) <= set(peers.load(op).shapes) and shapes, op
    assert set(gpu_ops.QUICK) <= set(gpu_ops.OPS)
    # Grid attention has a stage of its own, and these come with others of their family.
    assert set(peers.names()) - set(gpu_ops.OPS) == {"grid_attention", "merge_attention"}


def test_what_is_measured_in_which_run(tmp_path, cheap):
    whole = gpu_ops.plan(job(tmp_path, dry=False), gpu_ops.OPS)
    assert whole == [("pruned_linear", "gather", "fwd"), ("pruned_linear", "gather", "fwdbwd"), ("pruned_linear", "qkv_irregular", "fwd"),
                     ("pruned_linear", "qkv_irregular", "fwdbwd"), ("pyramid_flow_inputs", "wan", "fwd")]  # fmt: skip
    assert gpu_ops.plan(job(tmp_path, dry=False, quick=True), gpu_ops.OPS) == [whole[0], whole[4]]
    assert gpu_ops.plan(job(tmp_path), gpu_ops.OPS) == [("pruned_linear", "small", "fwd"), ("pyramid_flow_inputs", "small", "fwd")]


def test_every_backend_that_serves_has_a_row_and_a_rerun_measures_nothing(tmp_path, cheap, monkeypatch):
    said = []
    found = gpu_ops.run(job(tmp_path), nothing, said.append)
    assert [b["op"] for b in found] == ["pruned_linear", "pyramid_flow_inputs"] and said[0].startswith("pruned_linear small bfloat16 fwd, 3 rounds")
    for block in found:
        rows = {r["name"]: r for r in block["rows"]}
        assert [n for n in rows if n.startswith("vidkern ")] == [f"vidkern {b}" for b in gpu_ops.backends(block["op"])]
        assert rows["vidkern cpu"]["status"] == "timed" and rows["vidkern cpu"]["ratio"] == 1.0 and rows["vidkern cpu"]["of_limit"] > 0
        assert rows["vidkern triton"]["status"] == "not run" and rows["vidkern triton"]["reason"].startswith("tensors are on cpu, it")
        compiled = [r["reason"] for r in block["rows"] if "compile" in r["name"]]
        assert compiled == ["is compiled at first use, left out of a dry run"]
    # Why a backend does not serve is said once, under the first table.
    assert sum(text.count("tensors are on cpu, it serves cuda\n") for text in said) == 2
    assert "\nwithout a time, as said above: vidkern cuda; vidkern triton" in said[1] and "vidkern hopper" not in said[1]
    assert any(r["group"] == "torch" and r["status"] == "timed" for r in found[0]["rows"])
    (path,) = gpu_report.write(tmp_path)
    assert path.name == "ops-gpu.json"
    monkeypatch.setattr(gpu_ops, "measure", None)
    assert [b["op"] for b in gpu_ops.run(job(tmp_path), nothing, nothing)] == [b["op"] for b in found]
    with pytest.raises(gpu_job.OutOfTime):
        gpu_ops.run(job(tmp_path, dry=False, seconds=1), nothing, nothing)


def test_a_quick_run_says_so_where_it_leaves_out(tmp_path, cheap):
    rows = gpu_ops.measure(job(tmp_path, quick=True), "pyramid_flow_inputs", "small", "fwd", nothing)["rows"]
    assert [r["reason"] for r in rows if "compile" in r["name"]] == ["is compiled at first use, left out of a quick run"]


def test_a_row_runs_on_the_backend_it_is_named_after():
    """Also its backward, which no ``use`` is around."""
    suite = peers.load("pruned_linear")
    problem = suite.problem(suite.shapes[suite.quick], torch.float32, "cpu")
    op, ran = registry.ops()["pruned_linear"], []

    def watched(backend):
        run = lambda *args: ran.append(f"{backend.name} fwd") or backend.run(*args)  # noqa: E731
        run_backward = lambda *args: ran.append(f"{backend.name} bwd") or backend.run_backward(*args)  # noqa: E731
        return dataclasses.replace(backend, run=run, run_backward=run_backward)

    before = op._by_name
    op._by_name = {n: watched(b) for n, b in before.items()}
    try:
        inputs = [t.requires_grad_() for t in problem.inputs]
        torch.autograd.grad(gpu_ops.ours(suite, "reference").build(problem)(*inputs), inputs, problem.grad_out)
    finally:
        op._by_name = before
    assert ran == ["reference fwd", "reference bwd"]


def test_a_wrong_backend_is_not_timed(tmp_path, cheap):
    suite = peers.load("pyramid_flow_inputs")
    problem = suite.problem(suite.shapes["small"], torch.bfloat16, "cpu")
    wrong = dataclasses.replace(gpu_ops.ours(suite, "cpu"), build=lambda p: lambda x, t: ([x[:, :, :, ::2, ::2], x], [x[:, :, :, ::2, ::2], x]))
    block = gpu_ops.blocks.Block("pyramid_flow_inputs", "small", "bfloat16", "fwd")
    row, call = gpu_ops.prepare(wrong, block, suite, problem, suite.reference(problem, "fwd"))
    assert call is None and row["status"] == "wrong"


def test_grid_attention_has_a_row_for_the_cuda_kernels(monkeypatch):
    """They serve although they are not chosen without a record, which is what the comparison with Triton needs."""
    with torch._subclasses.FakeTensorMode():
        class OnGpu:
            shape = gpu_time.tiny(gpu_time.GRID["A"])
            inputs = [torch.empty(1, 2, 48, 16, dtype=torch.bfloat16, device="cuda") for _ in range(3)]

        assert vidkern.explain(vidkern.grid_attention, *OnGpu.inputs, grid=(3, 2)).chosen == "triton"
        assert gpu_time.our_backends(OnGpu) == ["hopper", "cuda", "triton"]


# ---- the build step ---------------------------------------------------------------------------------------------------
def test_the_build_stage_compiles_the_sources_and_tells_what_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (9, 0))
    asked = {}

    def make_ready(stems, capability):
        asked.update(stems=stems, capability=capability)
        return {"grid_attention": {"from": "NVRTC", "seconds": 4.21}, "amf": {"from": "nowhere", "seconds": 0.5, "reason": reason}}

    monkeypatch.setattr(cubins, "make_ready", make_ready)
    monkeypatch.setattr(registry, "ops", lambda: {})
    reason = "amf.cu: NVRTC 13.5 does not compile it for sm_90: error"
    monkeypatch.setattr(gpu, "machine_code", lambda device, real=gpu.machine_code: real("cuda"))
    assert gpu.run_stage("build", job(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "  grid_attention.cu: NVRTC, 4.2 s" in said and "  amf.cu: amf.cu: NVRTC 13.5 does not compile it for sm_90: error, 0.5 s" in said
    assert asked == {"stems": launcher.declared(), "capability": (9, 0)}
    # What is not installed is no failure of a kernel.
    reason = "amf.cu: no machine code for sm_90 came with the package, and cuda-python is not installed"
    assert gpu.run_stage("build", job(tmp_path, fresh=True)) == 0


def test_seconds_and_reasons_of_first_calls_are_kept_apart(tmp_path, monkeypatch, capsys):
    real = registry.ops()
    monkeypatch.setattr(registry, "ops", lambda: {"merge_attention": real["merge_attention"]})
    same_bits = probes.same_bits

    def broken(room, sample, dtype, backend, device):
        if backend == "cpu":
            raise RuntimeError("no such\ninstruction")
        return same_bits(room, sample, dtype, backend, device)

    monkeypatch.setattr(probes, "same_bits", broken)
    # A file of an earlier version, which had them in one table, is made anew.
    job(tmp_path).save("build", {"first_call_seconds": {"merge_attention cpu": "RuntimeError: old"}, "machine_code": {}})
    assert gpu.run_stage("build", job(tmp_path)) == 1
    found = job(tmp_path).done("build")
    assert list(found["first_call_seconds"]) == ["merge_attention reference"]
    assert found["first_call_failed"] == {"merge_attention cpu": "RuntimeError: no such instruction"}
    assert set(found["not_served"]) == {"merge_attention triton"}
    assert found["not_served"]["merge_attention triton"].startswith("tensors are on cpu")
    assert "  first call of merge_attention cpu: RuntimeError: no such instruction\n" in capsys.readouterr().out


# ---- launch cost ------------------------------------------------------------------------------------------------------
def test_launch_cost_against_a_driver_that_does_nothing():
    found = launch_cost.run(rounds=2)
    names = [row["name"] for row in found["rows"]]
    assert names == [
        "cuLaunchKernel of cuda.bindings", "the launch layer", "a tensor map that is kept", "a tensor map that is encoded",
        "grid attention's launcher", "the same for compute capability 9.0", "vidkern.grid_attention",
    ]  # fmt: skip
    assert found["launches"] > 100 and all(row["microseconds"] > 0 for row in found["rows"])
    # A tenth of a millisecond would be no cost of a launch: something is looked up or compiled at every call.
    assert found["rows"][1]["microseconds"] < 100


def test_launch_cost_says_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/nonexistent")
    with pytest.raises(UserError, match="with a C compiler, expected cc on the PATH or in CC"):
        launch_cost.build_driver(tmp_path)
    assert launch_cost.main([]) == 2
