"""The training loop: exact resume, interruption, averaging, schedule, log."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from vidkern.models.shared import EMA, Interrupted, TrainConfig, Trainer


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))


class Loss:
    """Regression on random points. interrupt_at: the step in which Ctrl-C is pressed."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at

    def __call__(self, model, step, generator):
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        x = torch.randn(8, 4, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {"marker": step}


def trainer(folder, loss, **changes):
    config = TrainConfig(**{"steps": 9, "warmup": 3, "save_every": 4, "ema": 0.9, **changes})
    return Trainer(make_model(), loss, config, checkpoint=folder / "c.pt", log=folder / "log.jsonl", settings={"name": "a"}, progress=False)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def lines(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("at", [0, 5])
def test_resume_after_ctrl_c_is_bit_exact(tmp_path, at):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trainer(tmp_path / "whole", Loss())
    whole.run()
    first = trainer(tmp_path / "parts", Loss(interrupt_at=at))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        first.run()
    assert stop.value.step == at + 1 and signal.getsignal(signal.SIGINT) is handler
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write('{"step": 99, "loss": 1}\n{"step": 7, "lo')  # lines from after the checkpoint, the last one torn
    torch.manual_seed(123)  # another process has another state
    second = trainer(tmp_path / "parts", Loss())
    second.resume(tmp_path / "parts/c.pt")
    second.run()
    a, b = whole.state(), second.state()
    del a["seconds"], b["seconds"]
    assert same(a, b) and lines(tmp_path / "whole/log.jsonl") == lines(tmp_path / "parts/log.jsonl")
    assert sorted(os.listdir(tmp_path / "parts")) == ["c.pt", "log.jsonl"]


def test_resume_refuses_other_settings(tmp_path):
    trainer(tmp_path, Loss()).run()
    with pytest.raises(ValueError, match="made with lr=0.001, this run has 0.01"):
        trainer(tmp_path, Loss(), lr=0.01).resume(tmp_path / "c.pt")


def test_average_follows_its_formula():
    model = make_model()
    ema = EMA(model, 0.9)
    value = expected = model[0].weight.detach().clone()
    for n in range(15):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        value = value + 1.0
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, final_lr=0.1)
    rates = [config.rate(i) for i in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rates[55] == pytest.approx(0.55)


def test_clip_frozen_parameters_and_no_average(tmp_path):
    t = trainer(tmp_path, Loss(), clip=1e-9, ema=0.0, lr=0.1, weight_decay=0.0)
    t.model[0].requires_grad_(False)
    t = Trainer(t.model, Loss(), t.config, progress=False)
    frozen = t.model[0].weight.clone()
    assert t.run() is t.model and torch.equal(frozen, t.model[0].weight)
    assert not (tmp_path / "c.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        trainer(tmp_path, lambda model, step, generator: (model(torch.ones(1, 4)).sum() * float("nan"), {})).run()
    assert not (tmp_path / "c.pt").exists()
