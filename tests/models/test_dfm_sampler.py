"""DFM's schedule and sampler, checked against exact Gaussian velocities: no training, no randomness."""

import dataclasses

import pytest
import torch

import vidkern
from vidkern.models.dfm import DFM, DFMConfig, join, sample, schedule, split, tiny
from vidkern.models.dfm import levels as pyramid
from vidkern.models.dfm import sampler

SIDE = 16


def gaussian():
    """Mean [16] and covariance of the data: a circulant with spectrum 1 / (1 + f^2), unit variance, mean from -1 to 1."""
    spectrum = 1 / (1 + (torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE) ** 2)
    row = torch.fft.ifft(spectrum).real
    index = (torch.arange(SIDE)[:, None] - torch.arange(SIDE)) % SIDE
    return torch.linspace(-1, 1, SIDE, dtype=torch.float64), (row / row[0])[index]


class Oracle(torch.nn.Module):
    """The exact velocity E[X - noise | z, t] of jointly Gaussian levels, in place of a network. Pictures are constant along their rows' axis."""

    def __init__(self, levels, direction="data"):
        super().__init__()
        self.pyramid = DFMConfig(levels=levels, direction=direction)
        mean, covariance = gaussian()
        rows = 2 ** (levels - 1)
        basis = torch.eye(SIDE, dtype=torch.float64)[:, None, None].expand(SIDE, 1, rows, SIDE)
        parts = split(basis, self.pyramid)
        self.widths = [p.shape[-1] for p in parts]
        A = torch.cat([p[:, 0, 0] for p in parts], -1).T
        self.mean, self.covariance = A @ mean, A @ covariance @ A.T

    def forward(self, levels, t, *, stage):
        sign = self.pyramid.sign
        n = sum(self.widths[: len(levels)])
        time = torch.cat([t[0, s].expand(w) for s, w in enumerate(self.widths)])[:n].double()
        C, m = self.covariance[:n, :n], self.mean[:n]
        D, N = torch.diag(time), torch.diag(1 - time)
        gain = (C @ D - N) @ torch.linalg.inv(D @ C @ D + N @ N)
        z = torch.cat([level[:, 0, 0] for level in levels], -1).double()
        v = m + (z - time * m) @ gain.T
        return [sign * part[:, None, None].expand_as(level) for part, level in zip(v.split(self.widths[: len(levels)], -1), levels)]


def errors(levels, steps, thresholds, direction="data"):
    """(relative error of the covariance, largest error of the mean) of what the real sampler makes of white noise: an affine map of it."""
    oracle = Oracle(levels, direction)
    total = sum(oracle.widths)
    unit = torch.cat((torch.zeros(1, total), torch.eye(total))).double()
    noise = [part[:, None, None].expand(-1, 1, 2**s, -1).contiguous() for s, part in enumerate(unit.split(oracle.widths, -1))]
    out = sample(oracle, (total + 1, 1, 2 ** (levels - 1), SIDE), steps=steps, thresholds=thresholds, noise=noise)[:, 0, 0].double()
    mean, covariance = gaussian()
    A = out[1:] - out[0]
    return (torch.linalg.norm(A.T @ A - covariance) / torch.linalg.norm(covariance)).item(), (out[0] - mean).abs().max().item()


@pytest.mark.parametrize("levels, steps, thresholds, printed", [
    (1, (40,), (), (0.0728, 0.0187, 0.0047)),
    (2, (30, 10), (0.9,), (0.0800, 0.0207, 0.0052)),
    (2, (30, 10), (0.7,), (0.0675, 0.0175, 0.0044)),
    (3, (20, 10, 10), (0.9, 0.9), (0.1141, 0.0300, 0.0076)),
])
def test_exact_velocities_give_the_data_distribution(levels, steps, thresholds, printed):
    """Errors as computed once by other means; they fall in proportion to the steps."""
    found = []
    for factor in (1, 4, 16):
        error, mean = errors(levels, [k * factor for k in steps], thresholds)
        found.append(error)
        assert mean < 2e-5
    assert found == pytest.approx(printed, abs=1.1e-4)
    assert found[0] / found[1] >= 3.5 and found[1] / found[2] >= 3.5


def test_velocities_of_the_other_sign():
    assert errors(2, (30, 10), (0.9,), "noise") == pytest.approx(errors(2, (30, 10), (0.9,)), rel=1e-5)


def test_coarse_heavy_steps_are_better():
    found = [errors(2, steps, (0.9,))[0] for steps in ((10, 30), (20, 20), (30, 10), (36, 4))]
    assert found == pytest.approx((0.212, 0.113, 0.080, 0.080), abs=1e-3)


def test_frozen_earlier_levels_would_not_converge(monkeypatch):
    """Seeded fault: earlier levels stay at their threshold."""
    def frozen(steps, thresholds=()):
        rows, hold = schedule(steps, thresholds), (0.9, 1.0)
        return tuple(dataclasses.replace(r, times=tuple(map(min, r.times, hold)), next_times=tuple(map(min, r.next_times, hold))) for r in rows)

    monkeypatch.setattr(sampler, "schedule", frozen)
    error, mean = errors(2, (480, 160), (0.9,))
    assert error > 0.15 and mean == pytest.approx(0.1, abs=0.01)


# ---- the schedule -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps, thresholds", [((7,), ()), ((30, 10), (0.9,)), ((20, 10, 5), (0.8, 0.9)), ((3, 1, 2, 4), (0.5, 0.9, 0.7))])
def test_schedule_moves_every_level_from_noise_to_data(steps, thresholds):
    rows = schedule(steps, thresholds)
    assert len(rows) == sum(steps) and rows[0].times == (0.0,) * len(steps) and rows[-1].next_times == (1.0,) * len(steps)
    for before, after in zip(rows, rows[1:]):
        assert before.next_times == after.times and before.active <= after.active
    for level in range(len(steps)):
        dts = [r.next_times[level] - r.times[level] for r in rows]
        assert sum(dts) == pytest.approx(1) and min(dts) >= 0
        assert all((dt > 0) == (level < r.active) for dt, r in zip(dts, rows))
        first = sum(steps[:level])
        assert rows[first].times[level] == 0.0 and rows[first].active == level + 1
        ends = (*thresholds, 1.0)
        assert rows[first + steps[level] - 1].next_times[level] == pytest.approx(ends[level])
        assert len({round(dt, 9) for dt in dts[first + steps[level] :]}) <= 1          # a straight line from there to 1


def test_schedule_of_two_levels_is_the_public_one():
    """Level 1 runs to the threshold alone, then both run to 1 evenly."""
    rows = schedule((3, 2), (0.9,))
    assert [r.times for r in rows] == [pytest.approx(t) for t in ((0, 0), (0.3, 0), (0.6, 0), (0.9, 0), (0.95, 0.5))]


@pytest.mark.parametrize("steps, thresholds, part", [
    ((0, 3), (0.9,), "steps=(0, 3)"), ((-1,), (), "steps=(-1,)"), ((2.0, 3), (0.9,), "steps=(2.0, 3)"), ((True, 3), (0.9,), "steps"),
    ((), (), "steps=()"), ((3, 3), (0.0,), "thresholds=(0.0,)"), ((3, 3), (1.0,), "thresholds=(1.0,)"), ((3, 3), (1.5,), "in (0, 1)"),
    ((3, 3), (float("nan"),), "in (0, 1)"),
    ((3, 3), (), "expected 1 for 2 levels"), ((3,), (0.9,), "expected 0 for 1 levels")])
def test_bad_schedules(steps, thresholds, part):
    with pytest.raises(ValueError) as error:
        schedule(steps, thresholds)
    assert part in str(error.value)


# ---- sampling with a network --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    made = DFM(tiny())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made.eval()


LABELS = torch.tensor([3, 7])


def draw(model, **changes):
    return sample(model, (2, 3, 16, 16), **{"steps": (3, 2), "thresholds": (0.9,), "labels": LABELS, **changes})


def test_guidance_ends(model):
    """Weight 1 is the conditional model, 0 the unconditional one, and an interval that no time meets is no guidance."""
    conditional = draw(model)
    null = draw(model, labels=torch.full((2,), 10))
    assert (conditional - null).abs().max() > 1e-3
    torch.testing.assert_close(draw(model, guidance=0.0), null, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(model, guidance=3.0, interval=(2.0, 3.0)), conditional)
    assert (draw(model, guidance=3.0) - draw(model, guidance=3.0, interval=(0.5, 1.0))).abs().max() > 1e-3


def test_previews_lead_to_the_sample(model):
    """One picture a step, at the size of its phase; the last, taken before the last step, is what that step gives."""
    seen = []
    out = draw(model, callback=lambda moment: seen.append((moment.index, moment.phase, moment.picture())))
    assert [(i, phase, *p.shape[-2:]) for i, phase, p in seen] == [(0, 1, 8, 8), (1, 1, 8, 8), (2, 1, 8, 8), (3, 2, 16, 16), (4, 2, 16, 16)]
    torch.testing.assert_close(seen[-1][2], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, draw(model), rtol=0, atol=0)                     # looking changes nothing, the seed says all
    assert (out - draw(model, seed=1)).abs().max() > 1e-3


def test_waiting_levels_are_not_looked_at(model):
    """What is in the finer level while it waits cannot matter to the coarse one, not even NaN."""
    noise = pyramid.noise_levels((2, 3, 16, 16), model.pyramid)
    spoilt = [noise[0], torch.full_like(noise[1], float("nan"))]
    pictures = [[], []]
    for kept, levels in zip(pictures, (noise, spoilt)):
        draw(model, noise=levels, callback=lambda moment: kept.append(moment.picture()) if moment.phase == 1 else None)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*pictures))


@pytest.mark.parametrize("changes", [{"standardise": True, "std": (0.5, 0.2)}, {"precond": True, "std": (0.5, 0.2)}, {"direction": "noise"},
                                     {"kind": "haar"}, {"levels": 3}, {"upsample": True, "patch": 2}])
def test_every_configuration_samples(changes):
    config = tiny(**{"levels": 2, **changes})
    torch.manual_seed(0)
    steps = (2,) * config.levels
    out = sample(DFM(config).eval(), (2, 3, 16, 16), steps=steps, thresholds=(0.9,) * (config.levels - 1), labels=LABELS)
    assert out.shape == (2, 3, 16, 16) and out.isfinite().all()
    if not config.precond:     # an untrained network's velocity is 0: the noise, joined
        torch.testing.assert_close(out, join(pyramid.noise_levels(out.shape, config), config), rtol=1e-4, atol=1e-5)


def test_video_is_pooled_in_time_if_asked():
    config = DFMConfig(dataclasses.replace(tiny().dit, channels=2), factor=(2, 2, 2))
    out = sample(DFM(config).eval(), (1, 2, 4, 8, 8), steps=(1, 1), thresholds=(0.5,))
    assert out.shape == (1, 2, 4, 8, 8)
    assert [tuple(z.shape) for z in pyramid.noise_levels(out.shape, config)] == [(1, 2, 2, 4, 4), (1, 2, 4, 8, 8)]


def test_low_precision_inputs_keep_a_float_state(model):
    out = draw(model, dtype=torch.bfloat16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, draw(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("changes, part", [
    ({"steps": (3,), "thresholds": ()}, "expected 2, one per level"), ({"labels": None, "guidance": 2.0}, "guidance=2.0"),
    ({"noise": [torch.zeros(2, 3, 8, 8)]}, "noise: shapes"), ({"thresholds": (1.2,)}, "thresholds=(1.2,)")])
def test_bad_arguments(model, changes, part):
    with pytest.raises(ValueError) as error:
        draw(model, **changes)
    assert part in str(error.value)


def test_sizes_that_do_not_divide(model):
    with pytest.raises(ValueError, match=r"expected sizes that divide by 2"):
        sample(model, (1, 3, 15, 16), steps=(1, 1), thresholds=(0.9,))
    padded = vidkern.pyramid_pad(torch.randn(1, 3, 15, 16), levels=2)
    assert (padded[0] if isinstance(padded, tuple) else padded).shape[-2:] == (16, 16)
