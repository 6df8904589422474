"""Rectified flow, schedules, Euler sampling (spec property 11) and guidance."""

import pytest
import torch

from vidkern.models.shared import (RectifiedFlow, cfg_weights, combine, euler, guided, logit_normal_sigma, schedule, shift_sigma,
                                   uniform_sigma)

flow = RectifiedFlow()


def test_path_target_and_estimates_agree():
    x0, noise, sigma = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.0, 0.3, 1.0])
    z = flow.interpolate(x0, noise, sigma)
    assert torch.equal(z[0], x0[0]) and torch.equal(z[2], noise[2])
    v = flow.velocity(x0, noise)
    torch.testing.assert_close(flow.x0_from_velocity(z, v, sigma), x0)
    torch.testing.assert_close(flow.velocity_from_x0(z, x0, sigma)[1:], v[1:])
    assert flow.velocity_from_x0(z + 1, x0, sigma, floor=0.05)[0].isfinite().all()


def test_time_samplers():
    draw = [s(20_000, torch.Generator().manual_seed(1)) for s in (uniform_sigma, logit_normal_sigma)]
    assert abs(draw[0].mean() - 0.5) < 0.01 and abs(draw[0].var() - 1 / 12) < 0.005
    assert abs(torch.logit(draw[1]).mean()) < 0.03 and abs(torch.logit(draw[1]).std() - 1) < 0.03
    assert torch.equal(draw[0], uniform_sigma(20_000, torch.Generator().manual_seed(1)))


def test_schedule_and_shift():
    assert schedule(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    shifted = schedule(10, shift=3.0)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0 and all(a > b for a, b in zip(shifted, shifted[1:]))
    assert shifted[5] == pytest.approx(0.75) and shift_sigma(0.4, 1.0) == 0.4
    with pytest.raises(ValueError, match="steps=0"):
        schedule(0)
    with pytest.raises(ValueError, match="shift=0"):
        shift_sigma(0.5, 0)


def test_one_step_of_a_constant_velocity_is_exact():
    x0, noise = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(euler(lambda z, sigma: noise - x0, noise, schedule(1)), x0)


def test_euler_error_falls_with_the_step():
    # Data ~ N(m, s^2): E[x0 | z] is linear in z, and the flow maps noise e to m + s e exactly.
    m, s = 0.7, 0.4

    def velocity(z, sigma):
        a, b = 1 - sigma[:, None], sigma[:, None]
        x0 = m + s * s * a / (a * a * s * s + b * b) * (z - a * m)
        return (z - x0) / b

    noise = torch.randn(64, 1, dtype=torch.float64)
    errors = [(euler(lambda z, t: velocity(z, t.double()), noise, schedule(n)) - (m + s * noise)).abs().mean().item() for n in (20, 40, 80, 160)]
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert all(1.7 < r < 2.3 for r in ratios), ratios


def test_callback_sees_states_and_estimates():
    seen = []
    x0, noise = torch.zeros(1, 2), torch.ones(1, 2)
    euler(lambda z, s: noise - x0, noise, schedule(2), callback=lambda i, sigma, z, x: seen.append((i, sigma, z.mean().item(), x.mean().item())))
    assert seen == [(0, 0.5, 0.5, 0.0), (1, 0.0, 0.0, 0.0)]


def model(z, sigma, shift=None):
    return z * sigma[:, None] + shift


def test_guidance_at_scale_one_is_the_model_itself_in_one_call():
    calls = []

    def counting(z, sigma, **kw):
        calls.append(len(z))
        return model(z, sigma, **kw)

    z, sigma = torch.randn(3, 4), torch.rand(3)
    named = {"cond": {"shift": torch.ones(3, 1)}, "null": {"shift": torch.zeros(3, 1)}}
    assert torch.equal(guided(counting, z, sigma, named, cfg_weights(1.0)), model(z, sigma, torch.ones(3, 1)))
    out = guided(counting, z, sigma, named, cfg_weights(5.0))
    assert calls == [3, 6]  # one batched call for both
    torch.testing.assert_close(out, z * sigma[:, None] + 5.0)


def test_guidance_names_and_mixed_none():
    with pytest.raises(ValueError, match=r"\['other'\]"):
        combine({"a": torch.zeros(1)}, {"other": 1.0})
    with pytest.raises(ValueError, match="'shift' is None for some"):
        guided(model, torch.zeros(1, 1), torch.zeros(1), {"cond": {"shift": torch.zeros(1, 1)}, "null": {"shift": None}}, cfg_weights(2.0))
    half = combine({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"a": 0.25, "b": 3.0})
    assert half.dtype == torch.bfloat16 and half.tolist() == [0.25, 0.25]
