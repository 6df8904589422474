"""Recovery by distillation, the discriminator, and step distillation to four steps."""

import copy
import math

import pytest
import torch

from vidkern.models.mobile_dit import (
    Calibration, Discriminator, DistillLoss, FlowLoss, Keep, MobileDiT, StepDistiller, compact, distance, masks_of, prune, recover, synthesise,
)
from vidkern.models.mobile_dit.adversarial import (
    StepConfig, approximate_r1, balance, hinge_discriminator, hinge_generator, mix, pseudo_huber,
)
from vidkern.models.mobile_dit.discriminator import Head, tapped_blocks
from vidkern.models.mobile_dit.model import drop_text, x0_of
from vidkern.models.mobile_dit.recovery import draw, feature_loss, feature_targets, without_extremes
from vidkern.models.mobile_dit.sampler import velocity_of
from vidkern.models.shared import TableConfig, TableSpec, TrainConfig

SMALL = TableConfig(channels=4, dim=48, heads=3, head_dim=16, group=16, text_dim=8, freq_dim=16, rope_axes=(8, 4, 4),
                    blocks=(TableSpec(heads=3, cross_heads=3, hidden=64),) * 4)
KEEP = Keep((0, 2, 3), {0: (1, 2)}, {0: (0, 1)}, {2: (0, 2)}, 16)


@pytest.fixture
def teacher(randomise):
    return randomise(MobileDiT(SMALL), spread=0.2)


@pytest.fixture
def batch(generator):
    return torch.randn(4, 4, 2, 2, 2, generator=generator), torch.randn(4, 3, 8, generator=generator)


# ---- recovery --------------------------------------------------------------------------------------------------------------------------
def test_features_are_matched_with_the_last_block_that_a_block_stands_for():
    assert feature_targets((0, 2, 3), 6) == (1, 2, 5)
    assert feature_targets(range(20), 28)[-1] == 27 and feature_targets(range(6), 6) == tuple(range(6))
    for bad in ((), (2, 1), (0, 6), (0, 0)):
        with pytest.raises(ValueError, match="blocks: .*, expected rising indices below 6"):
            feature_targets(bad, 6)


def test_extreme_entries_are_left_out_of_each_side():
    """A mask per side, over all tokens and channels of one sample: a spike in either counts only by what it covers in the other."""
    generator = torch.Generator().manual_seed(1)
    base = 2 * torch.rand(2, 6, 8, generator=generator) - 1              # within 1.8 standard deviations
    spiked = base.clone()
    spiked[0, 3, 5] = 1000.0
    assert without_extremes(base).ne(base).sum() == 0 and without_extremes(spiked)[0, 3, 5] == 0
    assert torch.equal(without_extremes(spiked)[1], spiked[1])                    # statistics of each sample alone
    assert feature_loss(spiked, base).item() == pytest.approx(base[0, 3, 5].item() ** 2 / base.numel(), rel=1e-5)
    assert feature_loss(spiked, spiked) == 0
    student, target = base.clone().requires_grad_(True), spiked.clone().requires_grad_(True)
    feature_loss(student, target).backward()
    assert target.grad is None and student.grad.abs().sum() > 0


def test_the_distillation_loss_is_the_sum_it_says(teacher, batch):
    student = compact(teacher, KEEP)
    loss = DistillLoss(teacher, KEEP.blocks, alpha=0.7, beta=0.3)
    total, parts = loss(student, *batch, torch.Generator().manual_seed(3))
    noised = draw(*batch, torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, theirs = teacher(noised.z, noised.sigma, noised.text, capture=["1.hidden", "2.hidden", "3.hidden"])
        velocity, ours = student(noised.z, noised.sigma, noised.text, capture=["0.hidden", "1.hidden", "2.hidden"])
        features = sum(feature_loss(ours[f"{k}.hidden"], theirs[f"{k + 1}.hidden"]) for k in range(3)) / 3
    flow, match = (velocity - (noised.noise - batch[0])).square().mean(), (velocity - wanted).square().mean()
    assert parts == pytest.approx({"flow": flow.item(), "velocity": match.item(), "features": features.item()}, rel=1e-4)
    assert total.item() == pytest.approx((0.3 * flow + 0.7 * match + 0.3 * features).item(), rel=1e-4)
    same, parts = DistillLoss(teacher, range(4))(teacher, *batch, torch.Generator().manual_seed(3))
    assert parts["velocity"] == 0 and parts["features"] == 0
    with pytest.raises(ValueError, match=r"student: 4 blocks, expected those that `blocks` names, \[0, 2, 3\]"):
        loss(teacher, *batch)


def test_teacher_and_student_see_the_same_text_dropout(teacher, batch):
    """Half of the texts dropped: both networks get bit for bit the same inputs."""
    seen, student = [], compact(teacher, KEEP)
    for module in (teacher, student):
        module.register_forward_pre_hook(lambda _, args: seen.append(args))
    loss = DistillLoss(teacher, KEEP.blocks, dropout=0.5)
    dropped = 0
    for seed in range(4):
        loss(student, *batch, torch.Generator().manual_seed(seed))
        (z, sigma, text), (z2, sigma2, text2) = seen[-2:]
        assert torch.equal(z, z2) and torch.equal(sigma, sigma2) and torch.equal(text, text2)
        dropped += int((text.flatten(1) == 0).all(1).sum())
    assert 2 <= dropped <= 14
    said = batch[1]
    assert torch.equal(drop_text(said, torch.tensor([True, False, False, True]))[1:3], said[1:3]) and drop_text(said, None) is said


def test_recovery_starts_with_flow_matching_and_then_distils(teacher, batch):
    stages, student = [], compact(teacher, KEEP)
    state = copy.deepcopy(teacher.state_dict())
    trainer = recover(student, teacher, KEEP.blocks, lambda g: batch, steps=5, flow_steps=2, run=False, progress=False)
    assert trainer.config.lr == 5e-5 and trainer.config.rate(10**6) == pytest.approx(5e-6) and trainer.config.ema == 0.9995
    while trainer.step < 5:
        stages.append(trainer.one_step())
    assert [s["stage"] for s in stages] == ["flow"] * 2 + ["distil"] * 3 and "features" in stages[2] and "features" not in stages[1]
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    flow = FlowLoss()(compact(teacher, KEEP), *batch, torch.Generator().manual_seed(trainer.config.seed))
    assert stages[0]["loss"] == pytest.approx(flow.item(), rel=1e-5)
    with pytest.raises(ValueError, match="flow_steps=300: expected 0 to steps=5"):
        recover(student, teacher, KEEP.blocks, lambda g: batch, steps=5, run=False)


def test_distillation_brings_the_student_back(teacher, batch):
    student = compact(teacher, KEEP)
    calibration = Calibration.of(*batch, times=4)
    before = distance(student, teacher, calibration)
    recovered = recover(student, teacher, KEEP.blocks, lambda g: batch, steps=30, flow_steps=2, progress=False,
                        config=TrainConfig(steps=30, lr=3e-3, warmup=3, ema=0.0))
    assert distance(recovered.eval(), teacher, calibration) < 0.7 * before


# ---- the discriminator -----------------------------------------------------------------------------------------------------------------
def test_tapped_blocks():
    assert tapped_blocks(28) == (21, (4, 9, 15, 20)) and tapped_blocks(6) == (5, (0, 1, 3, 4))
    assert tapped_blocks(4) == (3, (0, 1, 2)) and tapped_blocks(1) == (1, (0,))


def test_one_logit_per_latent_position(teacher, batch):
    discriminator = Discriminator(teacher, width=16)
    logits = discriminator(batch[0], torch.full((4,), 0.5), batch[1])
    assert logits.shape == (4, 3, 2, 2, 2) and discriminator.last == 3
    assert not any(name.startswith("_backbone") or "blocks" in name for name in discriminator.state_dict())
    head = Head(48, 8, width=16).double()
    tokens, pooled = torch.randn(2, 3 * 2 * 4, 48, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    out = head(tokens, pooled, (3, 2, 4))
    assert out.shape == (2, 3, 2, 4)
    # It looks along time at one place and around itself in one frame; not elsewhere.
    moved = tokens.clone().view(2, 3, 2, 4, 48)
    moved[0, 2, 1, 3] += torch.randn(48)
    changed = (head(moved.view(2, -1, 48), pooled, (3, 2, 4)) - out).abs() > 1e-9
    assert changed[0, 0, 1, 3] and changed[0, 2].any() and not changed[1].any()
    assert (head(tokens, pooled + 1, (3, 2, 4)) - out).abs().max() > 1e-3


def test_the_discriminator_step_changes_heads_alone(teacher, batch, generator):
    """The backbone stays bit-identical over ten steps; in a discriminator step the student gets no gradient."""
    student = compact(teacher, KEEP)
    discriminator = Discriminator(teacher, width=16)
    work = StepDistiller(student, teacher, discriminator, StepConfig(lr_heads=1e-3, lr_student=1e-3))
    z, sigma = work.draw(batch[0], generator)
    velocity = student(z, sigma, batch[1])
    real, fake, at = work.judged(batch[0], x0_of(z, velocity, sigma), generator)
    hinge, penalty = work.discriminator_loss(real, fake, at, batch[1], generator)
    (hinge + penalty).backward()
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())
    discriminator.zero_grad()
    before = [copy.deepcopy(m.state_dict()) for m in (teacher, discriminator, student)]
    for _ in range(10):
        parts = work.step(*batch, generator)
        assert all(math.isfinite(value) for value in parts.values())
    same = [[torch.equal(old[name], value) for name, value in m.state_dict().items()] for old, m in zip(before, (teacher, discriminator, student))]
    assert all(same[0]) and not any(same[1]) and sum(same[2]) < 0.2 * len(same[2])


def test_the_student_learns_through_the_discriminator(teacher, batch, generator):
    student = compact(teacher, KEEP)
    work = StepDistiller(student, teacher, Discriminator(teacher, width=16))
    z, sigma = work.draw(batch[0], generator)
    velocity = student(z, sigma, batch[1])
    estimate = x0_of(z, velocity, sigma)
    _, fake, at = work.judged(batch[0], estimate, generator)
    adversarial, _, _ = work.student_terms(z, sigma, velocity, estimate, fake, at, *batch)
    grads = torch.autograd.grad(adversarial, list(student.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0 and all(p.grad is None for p in teacher.parameters())


def test_both_sides_get_the_same_time_and_noise(teacher, batch, generator):
    """With a perfect estimate the two inputs are the same, and the hinge is 2 or more, exactly 2 where |D| <= 1."""
    work = StepDistiller(compact(teacher, KEEP), teacher, Discriminator(teacher, width=16))
    real, fake, at = work.judged(batch[0], batch[0].clone(), generator)
    assert torch.equal(real, fake) and len(set(at.tolist())) == 4
    hinge, _ = work.discriminator_loss(real, fake, at, batch[1], generator)
    logits = work.discriminator(real, at, batch[1])
    by_hand = (torch.relu(1 - logits) + torch.relu(1 + logits)).mean()
    assert hinge.item() == pytest.approx(by_hand.item(), rel=1e-6) and hinge.item() >= 2 - 1e-6
    inside, outside = torch.tensor([-1.0, 0.3, 1.0]), torch.tensor([0.3, 1.7])
    assert hinge_discriminator(inside, inside) == 2 and hinge_discriminator(outside, outside) > 2
    assert hinge_generator(outside).item() == pytest.approx(-1.0)
    _, other, _ = work.judged(batch[0], batch[0] + 1.0, torch.Generator().manual_seed(0))
    real, _, at = work.judged(batch[0], batch[0] + 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(other - real, (1 - at)[:, None, None, None, None].expand_as(real))


def test_the_terms_of_the_student(teacher, batch, generator):
    x, y = torch.randn(3, 4, 2, generator=generator), torch.randn(3, 4, 2, generator=generator)
    c = 0.00054 * math.sqrt(8)
    assert pseudo_huber(x, y).item() == pytest.approx(((x - y).flatten(1).norm(dim=1).square() + c * c).sqrt().sub(c).mean().item(), rel=1e-6)
    assert pseudo_huber(x, x) == 0
    weight = torch.nn.Parameter(torch.ones(3))
    first, second = (weight * torch.tensor([3.0, 0.0, 4.0])).sum(), (10 * weight).sum()
    scale = balance(first, second, weight)
    assert scale.item() == pytest.approx(5 / (10 * 3**0.5)) and not scale.requires_grad
    flat = approximate_r1(lambda z, *_: torch.ones(len(z)), x, torch.ones(3), None, None, generator)
    steep = approximate_r1(lambda z, *_: 2 * z, x, 2 * x, None, None, generator)
    assert flat == 0 and steep.item() == pytest.approx(100 * 4 * 1e-4, rel=0.8)
    # The teacher is guided, with the student's own text.
    work = StepDistiller(compact(teacher, KEEP), teacher, Discriminator(teacher, width=16), StepConfig(guidance=3.0))
    z, sigma = work.draw(batch[0], generator)
    assert set(sigma.tolist()) <= {1.0, 0.75, 0.5, 0.25}
    with torch.no_grad():
        null = teacher(z, sigma, torch.zeros_like(batch[1]))
        wanted = null + 3.0 * (teacher(z, sigma, batch[1]) - null)
        torch.testing.assert_close(velocity_of(teacher, batch[1], 3.0)(z, sigma), wanted, rtol=1e-4, atol=1e-4)
        velocity = work.student(z, sigma, batch[1])
    estimate = x0_of(z, velocity, sigma)
    _, fake, at = work.judged(batch[0], estimate, generator)
    _, reconstruction, match = work.student_terms(z, sigma, velocity, estimate, fake, at, *batch)
    assert match.item() == pytest.approx((velocity - wanted).square().mean().item(), rel=1e-3)
    assert reconstruction.item() == pytest.approx(pseudo_huber(estimate, batch[0]).item())


def test_a_step_of_the_student_is_its_sum(teacher, batch):
    """Adversarial + balanced reconstruction + kd * velocity: the balanced terms pull equally at the last layer."""
    student = compact(teacher, KEEP)
    work = StepDistiller(student, teacher, Discriminator(teacher, width=16), StepConfig(rec=2.0, lr_heads=0.0, weight_decay=0.0))
    seen = {}
    terms = work.student_terms

    def spy(*args):
        values = terms(*args)
        last = student.final.linear.weight
        seen["norms"] = [torch.autograd.grad(v, last, retain_graph=True)[0].norm().item() for v in values[:2]]
        return values

    work.student_terms = spy
    parts = work.step(*batch, torch.Generator().manual_seed(0))
    assert parts["balance"] == pytest.approx(2.0 * seen["norms"][0] / seen["norms"][1], rel=1e-3)


def test_real_and_synthetic_data_are_mixed_with_their_text(generator):
    real, text = torch.zeros(400, 2), torch.zeros(400, 3, 5)
    pool = torch.arange(1.0, 9.0)[:, None].expand(8, 2), torch.arange(1.0, 9.0)[:, None, None].expand(8, 3, 5)
    data, said = mix(real, text, pool, 0.5, generator)
    assert 0.4 < (data[:, 0] > 0).double().mean() < 0.6 and torch.equal(data[:, 0], said[:, 0, 0]) and len(set(data[:, 0].tolist())) == 9
    assert mix(real, text, None, 0.5, generator)[0] is real and mix(real, text, pool, 0.0, generator)[0] is real


def test_the_pool_is_what_the_guided_teacher_makes(teacher, batch):
    made, text = synthesise(teacher, batch[1], (4, 2, 2, 2), steps=3, guidance=2.0, batch=3, generator=torch.Generator().manual_seed(0))
    assert made.shape == batch[0].shape and torch.equal(text, batch[1]) and made.isfinite().all()
    again, _ = synthesise(teacher, batch[1], (4, 2, 2, 2), steps=3, guidance=2.0, batch=3, generator=torch.Generator().manual_seed(0))
    other, _ = synthesise(teacher, batch[1], (4, 2, 2, 2), steps=3, guidance=4.0, batch=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made, again) and not torch.equal(made, other)


def test_step_distillation_continues(teacher, batch):
    def work():
        torch.manual_seed(0)
        return StepDistiller(compact(teacher, KEEP), teacher, Discriminator(teacher, width=16), StepConfig(lr_heads=1e-3, lr_student=1e-3))

    whole, first, generator = work(), work(), torch.Generator().manual_seed(0)
    for _ in range(4):
        whole.step(*batch, generator)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        first.step(*batch, generator)
    second = work()
    second.resume(copy.deepcopy(first.state()))
    for _ in range(2):
        second.step(*batch, generator)
    assert all(torch.equal(a, b) for a, b in zip(whole.student.state_dict().values(), second.student.state_dict().values()))


def test_packed_students_can_be_recovered_and_distilled(teacher, batch, generator):
    student = compact(teacher, KEEP, packed=True)
    loss, _ = DistillLoss(teacher, KEEP.blocks)(student, *batch, generator)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    work = StepDistiller(student, teacher, Discriminator(teacher, width=16))
    assert all(math.isfinite(value) for value in work.step(*batch, generator).values())


@pytest.mark.slow
def test_toy_recovery(generator):
    """Seed 0 of the committed ablation again: the guided choice is nearer to the teacher than the median of five random ones, and recovery
    leaves less error than as many steps from scratch. Not a law: of another teacher, trained faster, the random median was nearer."""
    from vidkern.models.mobile_dit import ablation, runs

    recipe = ablation.Settings().recipe
    clips = runs.open_data(recipe, 0)
    teacher = runs.teacher_trainer(recipe, clips, 0, progress=False).run().eval()
    held_out = runs.held_out_of(recipe, clips)
    wanted = held_out.velocities(teacher)
    keep, cut = runs.pruned(teacher, recipe, clips)
    chance = sorted(distance(runs.pruned(teacher, recipe, clips, how="random", seed=s)[1].eval(), wanted, held_out) for s in range(5))
    assert distance(cut.eval(), wanted, held_out) < chance[2]
    recovered = runs.recovery_trainer(cut, teacher, keep, recipe, clips, 0, progress=False).run()
    scratch = runs.teacher_trainer(recipe, clips, 0, config=cut.config, steps=recipe.recover_steps, progress=False).run()
    assert runs.flow_error(recovered, held_out) < runs.flow_error(scratch, held_out)


def test_masked_models_distil_too(teacher, batch, generator):
    """The search form: masks in place of a cut give the same velocities, so a distance may be taken before anything is cut."""
    calibration = Calibration.of(*batch, times=2)
    keep = prune(teacher, budget=0.6, calibration=calibration, how="fisher")
    assert distance(teacher, teacher, calibration, masks=masks_of(keep, SMALL)) == pytest.approx(
        distance(compact(teacher, keep), teacher, calibration), rel=1e-4)
