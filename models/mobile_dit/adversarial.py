"""Adversarial step distillation: from 40 guided steps to 4 without guidance.

The student estimates the data from noise at one of four fixed times. Real and estimated data are noised again, with the same time and the same
noise, and judged by `Discriminator`. A robust reconstruction term and the velocity of the guided teacher keep it on course.
"""

import dataclasses

import torch
import torch.nn.functional as F

from ..shared.flow import RectifiedFlow, logit_normal_sigma
from .model import x0_of
from .sampler import FEW, sample, times, velocity_of

FLOW = RectifiedFlow()


def hinge_discriminator(real, fake):
    """mean relu(1 - real) + mean relu(1 + fake)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake):
    """Minus the mean of what the discriminator says of generated clips."""
    return -fake.mean()


def pseudo_huber(x, wanted):
    """sqrt(|x - wanted|^2 + c^2) - c of every sample, c = 0.00054 sqrt(numbers in a sample); the mean over samples."""
    c = 0.00054 * x[0].numel() ** 0.5
    return ((x - wanted).flatten(1).square().sum(1) + c * c).sqrt().sub(c).mean()


def approximate_r1(discriminator, real, logits, sigma, text, generator, *, spread=0.01, weight=100.0):
    """weight * mean (D(r) - D(r + spread * n))^2: a penalty on the slope at real data without second derivatives."""
    noise = torch.randn(real.shape, generator=generator).to(real)
    return weight * (logits - discriminator(real + spread * noise, sigma, text)).square().mean()


def balance(first, second, parameter):
    """|gradient of first| / |gradient of second| at a parameter: what to scale `second` by so that both pull equally there."""
    norms = [torch.autograd.grad(term, parameter, retain_graph=True)[0].float().norm() for term in (first, second)]
    return (norms[0] / norms[1].clamp_min(1e-12)).detach()


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """steps, shift: of the few-step sampler. guidance: of the teacher, 6.0 at paper scale. rec, kd: weights of the reconstruction term (after
    balancing) and of the guided teacher's velocity. lr_student, lr_heads: rates. r1: weight of the gradient penalty. synthetic: share of
    teacher samples among the data."""

    steps: int = FEW
    shift: float = 1.0
    guidance: float = 6.0
    rec: float = 1.0
    kd: float = 0.5
    r1: float = 100.0
    lr_student: float = 1e-5
    lr_heads: float = 5e-5
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    synthetic: float = 0.5


def mix(real, real_text, pool, share, generator):
    """Real data [B, ...] with its text, in which every sample is replaced with probability `share` by one of the synthetic pool (data, text)."""
    if pool is None or share == 0.0:
        return real, real_text
    replaced = torch.rand(len(real), generator=generator) < share
    index = torch.randint(len(pool[0]), (len(real),), generator=generator)
    shape = (-1,) + (1,) * (real.ndim - 1)
    return (torch.where(replaced.to(real.device).reshape(shape), pool[0][index].to(real), real),
            torch.where(replaced.to(real.device)[:, None, None], pool[1][index].to(real_text), real_text))


class StepDistiller:
    """Trains a student (in place) and a discriminator's heads, one step of each in turn, with separate optimisers.

    ``step(x0, text, generator)`` -> numbers. teacher: frozen, guided. student: has its flow matched or distilled already. discriminator: on a
    frozen teacher, usually the same.
    """

    def __init__(self, student, teacher, discriminator, config=StepConfig()):
        self.student, self.teacher, self.discriminator, self.config = student, teacher.requires_grad_(False).eval(), discriminator, config
        self.times = times(config.steps, config.shift)
        common = {"betas": config.betas, "weight_decay": config.weight_decay}
        self.student_optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr_student, **common)
        self.head_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=config.lr_heads, **common)

    def draw(self, x0, generator):
        """(noised data, its time [B], velocity target) at one of the four times for each sample."""
        index = torch.randint(len(self.times), (len(x0),), generator=generator)
        sigma = torch.tensor(self.times)[index].to(x0)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        return FLOW.interpolate(x0, noise, sigma), sigma

    def judged(self, x0, estimate, generator):
        """(real, fake, time [B]): both noised with the same time and the same noise."""
        sigma = logit_normal_sigma(len(x0), generator, mean=-0.5).to(x0)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        return FLOW.interpolate(x0, noise, sigma), FLOW.interpolate(estimate, noise, sigma), sigma

    def discriminator_loss(self, real, fake, sigma, text, generator):
        """(hinge, gradient penalty); no gradient reaches what `fake` came from."""
        on_real, on_fake = self.discriminator(real, sigma, text), self.discriminator(fake.detach(), sigma, text)
        return hinge_discriminator(on_real, on_fake), approximate_r1(self.discriminator, real, on_real, sigma, text, generator, weight=self.config.r1)

    def student_terms(self, z, sigma, velocity, estimate, fake, judged_at, x0, text):
        """(adversarial, reconstruction, guided teacher) terms of the student."""
        with torch.no_grad():
            wanted = velocity_of(self.teacher, text, self.config.guidance)(z, sigma)
        return hinge_generator(self.discriminator(fake, judged_at, text)), pseudo_huber(estimate, x0), (velocity - wanted).square().mean()

    def step(self, x0, text, generator=None):
        config = self.config
        z, sigma = self.draw(x0, generator)
        velocity = self.student(z, sigma, text)
        estimate = x0_of(z, velocity, sigma)
        real, fake, judged_at = self.judged(x0, estimate, generator)

        self.discriminator.requires_grad_(True)
        hinge, penalty = self.discriminator_loss(real, fake, judged_at, text, generator)
        self.head_optimizer.zero_grad(set_to_none=True)
        (hinge + penalty).backward()
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), config.clip)
        self.head_optimizer.step()

        self.discriminator.requires_grad_(False)
        adversarial, reconstruction, match = self.student_terms(z, sigma, velocity, estimate, fake, judged_at, x0, text)
        weight = config.rec * balance(adversarial, reconstruction, self.student.final.linear.weight)
        total = adversarial + weight * reconstruction + config.kd * match
        self.student_optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self.student_optimizer.step()
        return {"discriminator": hinge.item(), "penalty": penalty.item(), "adversarial": adversarial.item(), "reconstruction": reconstruction.item(),
                "velocity": match.item(), "balance": float(weight)}

    def state(self):
        """Everything that a continued run needs but the generator."""
        return {"student": self.student.state_dict(), "heads": self.discriminator.state_dict(),
                "student_optimizer": self.student_optimizer.state_dict(), "head_optimizer": self.head_optimizer.state_dict()}

    def resume(self, state):
        self.student.load_state_dict(state["student"])
        self.discriminator.load_state_dict(state["heads"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.head_optimizer.load_state_dict(state["head_optimizer"])


@torch.no_grad()
def synthesise(teacher, text, shape, *, steps=40, guidance=6.0, shift=1.0, batch=64, generator=None, progress=False):
    """(samples, text): what the guided teacher makes of text [N, S, D] in many steps; shape: (C, T, H, W) of a sample."""
    parts = range(0, len(text), batch)
    if progress:
        from vidkern.errors import import_extra

        parts = import_extra("tqdm", "a progress bar").tqdm(parts, desc="teacher samples", leave=False)
    made = [sample(teacher, (len(text[i : i + batch]), *shape), text[i : i + batch], steps=steps, shift=shift, guidance=guidance, generator=generator)
            for i in parts]
    return torch.cat(made), text
