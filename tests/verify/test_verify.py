"""The command: what it runs, what it notices, what it writes."""

import argparse
import dataclasses
import time

import pytest
import torch

from vidkern import cli, registry, verified
from vidkern.errors import UserError
from vidkern.ops import merge_attention as merge_room
from vidkern.ops.merge_attention import reference
from vidkern.verify import accuracy, command, probes
from vidkern.verify.rooms import ROOMS, room


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    verified.forget()
    yield tmp_path
    verified.forget()


@pytest.fixture
def small(monkeypatch):
    """Two samples of merge_attention, so that a run takes no time."""
    monkeypatch.setitem(ROOMS, "merge_attention", dataclasses.replace(room("merge_attention"), samples=room("merge_attention").samples[2:4]))


def faulty(change):
    """merge_attention's "cpu" backend replaced by the reference with ``change(outputs)`` applied to the forward's."""
    def launch(*args, out, lse, **kwargs):
        for target, value in zip((out, lse), change(*reference.forward(*args, **kwargs))):
            target.copy_(value)

    plain = registry.ops()["merge_attention"]._by_name["reference"]
    return dataclasses.replace(plain, name="cpu", run=merge_room._run_with(launch))


def verify(*words):
    return cli.main(["verify", "--device", "cpu", "--minutes", "0", *words])


def test_what_passes_is_recorded(small, cache, capsys):
    assert verify("--op", "merge_attention", "--seed", "5") == 0
    said = capsys.readouterr().out
    (path,) = cache.rglob(verified.FILE)
    assert "seed 5" in said and str(path) in said and "merge_attention  cpu        bfloat16  passed" in said
    found = {r.backend: r for r in verified.read(path)}
    assert set(found) == {"cpu", "reference"}
    assert found["cpu"].dtypes == ("float32", "bfloat16") and found["cpu"].seed == 5 and found["cpu"].cases > 4
    assert 0 < found["cpu"].worst_max <= accuracy.RATIO_MAX and 0 < found["cpu"].worst_rms <= accuracy.RATIO_RMS
    assert found["reference"].dtypes == ("float32", "bfloat16", "float16")
    assert found["cpu"].versions["torch"] == torch.__version__ and found["cpu"].date


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out, lse: (out * 1.02, lse), "times the yardstick's, expected at most"),
        (lambda out, lse: (out, lse * 1.4427), "times the yardstick's"),
        (lambda out, lse: (torch.where(torch.arange(out.shape[2])[:, None] == 1, torch.nan, out), lse), "not finite"),
        (lambda out, lse: (out + 1e-3 * torch.randn_like(out), lse), "times the yardstick's"),
    ],
    ids=["scaled", "log2 lse", "unwritten row", "noise"],
)
def test_a_wrong_backend_fails_and_is_not_recorded(small, cache, capsys, monkeypatch, change, message):
    verify("--op", "merge_attention", "--backend", "cpu")
    (path,) = cache.rglob(verified.FILE)
    assert [r.backend for r in verified.read(path)] == ["cpu"]
    monkeypatch.setitem(registry.ops()["merge_attention"]._by_name, "cpu", faulty(change))
    monkeypatch.setattr(merge_room.OP, "_by_name", registry.ops()["merge_attention"]._by_name)
    assert verify("--op", "merge_attention") == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and message in said and "merge_attention one float32 cpu" in said
    assert [r.backend for r in verified.read(path)] == ["reference"], "the record of what fails now is withdrawn"


def test_memory_that_is_never_written_is_noticed(small, monkeypatch):
    """Outputs start as NaN: a kernel that leaves a row alone is caught although fresh memory often holds zeros."""
    def launch(*args, out, lse, **kwargs):
        values = reference.forward(*args, **kwargs)
        out[..., 1:, :].copy_(values[0][..., 1:, :])
        lse.copy_(values[1])

    plain = registry.ops()["merge_attention"]._by_name["reference"]
    monkeypatch.setitem(merge_room.OP._by_name, "cpu", dataclasses.replace(plain, name="cpu", run=merge_room._run_with(launch)))
    (unit,) = [u for u in command.plan("cpu", ["merge_attention"], ["cpu"], 1) if u.dtype == "float32"]
    command.verify([unit], 1, 0, quiet=True)
    assert unit.state == "FAILED" and "out: not finite" in unit.failed[0]


def test_results_that_change_from_run_to_run_are_noticed(small, monkeypatch):
    ticks = iter(range(1000))
    racy = faulty(lambda out, lse: (out + 1e-9 * next(ticks), lse + 1e-7 * next(ticks)))
    monkeypatch.setitem(merge_room.OP._by_name, "cpu", racy)
    with pytest.raises(probes.CheckFailed, match="differs between two runs"):
        probes.same_bits(room("merge_attention"), room("merge_attention").samples[1], torch.float32, "cpu")


def test_counting_notices_a_missing_token(monkeypatch):
    op = registry.ops()["grid_attention"]
    plain = op._by_name["reference"]

    def run(outputs, q, k, v, *rest):
        plain.run(outputs, q, k.roll(-1, 2), v.roll(-1, 2), *rest)

    monkeypatch.setitem(op._by_name, "cpu", dataclasses.replace(plain, name="cpu", run=run))
    with pytest.raises(probes.CheckFailed, match="per-frame counts off"):
        ROOMS["grid_attention"].probes["counting"](torch.float32, "cpu", "cpu")


def test_a_backend_that_raises_is_a_failure_and_the_others_still_run(small, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no kernel image\nand a long story")

    plain = registry.ops()["merge_attention"]._by_name["reference"]
    monkeypatch.setitem(merge_room.OP._by_name, "cpu", dataclasses.replace(plain, name="cpu", run=broken))
    assert verify("--op", "merge_attention") == 1
    said = capsys.readouterr().out
    assert "first call: RuntimeError: no kernel image" in said and "merge_attention  reference  float32   passed" in said


def test_a_lost_device_ends_the_run(small, monkeypatch, capsys, cache):
    def broken(outputs, outs, *args):
        if outs[0].shape[-1] == 40:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        plain.run(outputs, outs, *args)

    plain = registry.ops()["merge_attention"]._by_name["reference"]
    monkeypatch.setitem(merge_room.OP._by_name, "cpu", dataclasses.replace(plain, name="cpu", run=broken))
    assert verify("--op", "merge_attention") == 1
    said = capsys.readouterr().out
    assert "stopped: merge_attention cpu float32 five: RuntimeError: CUDA error" in said and "not finished" in said
    assert not list(cache.rglob(verified.FILE))


def test_what_a_deadline_cuts_is_not_recorded(small):
    units = command.plan("cpu", ["merge_attention"], None, 1)
    assert command.verify(units, 1, 0, deadline=time.monotonic() - 1, quiet=True) is None
    assert {u.state for u in units} == {"not finished"} and all(u.done == 0 for u in units)


def test_time_left_goes_into_fresh_inputs(small, monkeypatch):
    seeds = set()
    monkeypatch.setattr(command, "_run", lambda unit, name, step, seed: seeds.add(seed) or setattr(unit, "done", unit.done + 1))
    units = command.plan("cpu", ["merge_attention"], ["cpu"], 1)
    command.verify(units, 1, 0.02, quiet=True)
    assert all(u.done > 3 * len(u.steps) for u in units) and len(seeds) > 3 * len(units[0].steps)


def test_bad_luck_is_told_from_a_fault(monkeypatch):
    """A failing case is looked at again with more draws, among them those that failed."""
    asked = []

    def check(*args, seeds, **kwargs):
        asked.append(list(seeds))
        if len(asked) == 1:
            raise probes.CheckFailed("once")
        return {"max": 1.0, "rms": 1.0}

    monkeypatch.setattr(accuracy, "check", check)
    unit = command.Unit("merge_attention", "cpu", "float32")
    command._accuracy(unit, 70, sample=room("merge_attention").samples[0], dtype=torch.float32, device=torch.device("cpu"))
    assert len(asked[1]) == 4 * len(asked[0]) and set(asked[0]) <= set(asked[1]) and unit.worst == {"max": 1.0, "rms": 1.0}


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["verify"]) == 2
    assert "finds no CUDA device on this machine; `vidkern verify --device cpu`" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [(["--op", "nonsense"], "--op: 'nonsense'"), (["--backend", "magic"], "--backend: 'magic'")])
def test_bad_arguments(words, message):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        command.run(parser.parse_args(["--device", "cpu", *words]))


@pytest.mark.parametrize("words, message", [(["--op", "foo"], "--op: 'foo'"), (["--minutes", "-3"], "--minutes: -3.0"),
                                            (["--backend", "magic"], "--backend: 'magic'")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mistake_is_told_before_anything_else(words, message, device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["verify", "--device", device, *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out


def test_every_op_can_be_verified():
    for name in registry.ops():
        assert room(name).samples
    assert room("grid_attention").large and room("grid_attention").probes
    with pytest.raises(UserError, match="nonsense"):
        room("nonsense")


def test_an_op_without_backward_is_judged_by_its_outputs(monkeypatch):
    monkeypatch.setitem(ROOMS, "merge_attention", dataclasses.replace(room("merge_attention"), differentiable=False))
    sample = room("merge_attention").samples[0]
    assert accuracy.check("merge_attention", sample, torch.float32, "cpu", seeds=[1, 2])["max"] > 0
    probes.same_bits(room("merge_attention"), sample, torch.float32, "cpu")
    monkeypatch.setitem(merge_room.OP._by_name, "cpu", faulty(lambda out, lse: (out, lse + 0.01)))
    with pytest.raises(probes.CheckFailed, match="cpu lse: max error"):
        accuracy.check("merge_attention", sample, torch.float32, "cpu", seeds=[1, 2])


def test_poison_is_taken_away_again():
    with accuracy.poisoned():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
