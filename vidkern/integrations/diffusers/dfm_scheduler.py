"""The sampler of Decomposable Flow Matching (arXiv 2506.19839) as a diffusers scheduler: a sigma per level and step, states as lists of levels."""

from dataclasses import dataclass

import torch

from ...errors import import_extra
from ...models.dfm.phases import schedule
from ...ops.pyramid_flow_inputs import flow_coefficients, pyramid_flow_inputs
from ...ops.pyramid_flow_step import pyramid_flow_step

import_extra("diffusers", "the DFM scheduler")
from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402


@dataclass
class DFMSchedulerOutput(BaseOutput):
    """prev_sample: the levels after the step, coarse to fine. pred_original_sample: clean estimates of the levels that moved."""

    prev_sample: list
    pred_original_sample: list


class DFMFlowMatchEulerScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps on all active levels of a pyramid, coarse to fine; models predict noise - data, as diffusers' flow models do.

    Sigmas are noise times, 1 = noise. ``sigmas`` is [steps + 1, S] and ``timesteps``, sigma * num_train_timesteps, [steps, S]: a pipeline's
    loop over ``timesteps`` gets one row at a time, a time for every level, and a sample is a list of S levels, coarse to fine.

    Args:
        num_train_timesteps: what sigma 1 is called as a timestep.
        steps_per_stage: steps of every phase, coarse to fine, for ``set_timesteps()``; their ratio serves ``set_timesteps(n)``.
        thresholds: sigma at which each phase but the last ends and the next level joins (the paper's tau is 1 - sigma).
    """

    _compatibles = []
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, steps_per_stage: tuple = (30, 10), thresholds: tuple = (0.1,)):
        if isinstance(num_train_timesteps, bool) or not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r}: expected a whole number of at least 1")
        self.set_timesteps()

    @property
    def levels(self):
        return len(self.config.steps_per_stage)

    @property
    def step_index(self):
        """Number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self):
        """First step, set by `set_begin_index`, or None."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        """Start at this step instead of looking the first timestep up."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps=None, device=None, *, steps_per_stage=None, thresholds=None):
        """Make the table of sigmas.

        Args:
            num_inference_steps: all steps, shared out over the phases like the configuration's; None: those of the configuration.
            device: of ``timesteps`` and ``sigmas``.
            steps_per_stage, thresholds: in place of the configuration's; the number of levels stays.

        Raises:
            ValueError: fewer steps than levels, steps below 1, thresholds outside (0, 1), or lists of another length.
        """
        if steps_per_stage is not None and num_inference_steps is not None:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: expected without steps_per_stage={steps_per_stage!r}")
        steps = tuple(self.config.steps_per_stage if steps_per_stage is None else steps_per_stage)
        ends = tuple(self.config.thresholds if thresholds is None else thresholds)
        if len(steps) != self.levels:
            raise ValueError(f"steps_per_stage={steps!r}: expected {self.levels} numbers, one per level")
        if num_inference_steps is not None:
            steps = shared_out(num_inference_steps, steps)
        if any(not 0 < s < 1 for s in ends):
            raise ValueError(f"thresholds={ends!r}: expected sigmas in (0, 1), 1 = noise")
        rows = schedule(steps, tuple(1 - s for s in ends))
        times = torch.tensor([row.times for row in rows] + [rows[-1].next_times], dtype=torch.float64)
        self.active = tuple(row.active for row in rows)
        self.num_inference_steps = len(rows)
        self.sigmas = (1 - times).float().to(device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._moves = (times[:-1] - times[1:]).float().to(device)
        self._step_index = self._begin_index = None

    def index_for_timestep(self, timestep) -> int:
        """Number of the step that has this row of times [S]; a scalar is looked up among the coarsest level's."""
        timestep = torch.as_tensor(timestep, device=self.timesteps.device)
        found = (self.timesteps == timestep).all(1) if timestep.dim() else self.timesteps[:, 0] == timestep
        if not found.any():
            raise ValueError(f"timestep: {timestep.tolist()}, expected a row of scheduler.timesteps")
        return int(found.nonzero()[0])

    def scale_model_input(self, sample, timestep=None):
        """The sample, unchanged."""
        return sample

    def scale_noise(self, sample, timestep, noise):
        """Levels noised to a row of timesteps [S] or one per sample [B, S]; noise: levels like the sample's. For training and image-to-image."""
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=sample[0].device) / self.config.num_train_timesteps
        sigma = sigma if sigma.dim() == 2 else sigma[None]
        return pyramid_flow_inputs(sample, flow_coefficients(sigma, direction="noise"), noise=noise, target=False)

    def step(self, model_output, timestep, sample, *, uncond_output=None, guidance_scale=1.0, return_dict=True):
        """One Euler step of the active levels.

        Args:
            model_output: list of the active levels' velocities noise - data, coarse to fine; more are not read.
            timestep: the row of ``timesteps`` of this step, as the loop gives it.
            sample: list of all S levels; it is not changed.
            uncond_output, guidance_scale: unconditional velocities, for guidance in the same pass over memory.

        Returns:
            `DFMSchedulerOutput`, or ``(prev_sample,)`` with ``return_dict=False``. Levels that wait are passed on as they are.

        Raises:
            ValueError: lists of the wrong length or shape, a timestep that is not of the schedule, or more steps than there are.
        """
        if not isinstance(sample, (list, tuple)) or len(sample) != self.levels:
            raise ValueError(f"sample: {type(sample).__name__}, expected a list of {self.levels} levels, coarse to fine")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        i = self._step_index
        if i >= self.num_inference_steps:
            raise ValueError(f"step: all {self.num_inference_steps} steps are done, expected set_timesteps() first")
        options = {"guidance": guidance_scale, "active": self.active[i], "next_active": 0}
        device = sample[0].device
        levels = [z.float() for z in sample]
        after, _ = pyramid_flow_step(levels, model_output, uncond_output, dt=self._moves[i].to(device), **options)
        self._step_index += 1
        if not return_dict:
            return (after,)
        clean, _ = pyramid_flow_step(levels, model_output, uncond_output, dt=-self.sigmas[i].to(device), **options)
        return DFMSchedulerOutput(prev_sample=after, pred_original_sample=clean[: self.active[i]])

    def __len__(self):
        return self.config.num_train_timesteps


def shared_out(total, weights):
    """`total` steps over phases in the ratio of `weights`, at least one each; the largest remainders get what rounding leaves."""
    if isinstance(total, bool) or not isinstance(total, int) or total < len(weights):
        raise ValueError(f"num_inference_steps={total!r}: expected a whole number of at least {len(weights)}, one step per level")
    exact = [total * w / sum(weights) for w in weights]
    steps = [max(1, int(e)) for e in exact]
    while sum(steps) != total:
        side = 1 if sum(steps) < total else -1
        best = max((i for i in range(len(steps)) if side > 0 or steps[i] > 1), key=lambda i: side * (exact[i] - steps[i]))
        steps[best] += side
    return tuple(steps)
