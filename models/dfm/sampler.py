"""The sampler of DFM: Euler with a time per level, coarse to fine (arXiv 2506.19839, section 3.3). Nothing is read back from the device."""

import dataclasses

import torch

import vidkern
from vidkern.errors import import_extra

from . import levels as pyramid
from .phases import schedule


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a callback gets after the velocities of a step are known: index of the step, phase 1 .. S, data times, and the picture."""

    index: int
    phase: int
    times: tuple
    _estimate: object

    def picture(self):
        """The expected picture so far, at the resolution of the phase: clean estimates of the active levels, joined."""
        return self._estimate()


def weights_at(step, guidance, interval):
    """Guidance weight of every level: 1 where the level's own time lies outside the interval."""
    low, high = interval
    return [guidance if low <= t <= high else 1.0 for t in step.times]


@torch.no_grad()
def sample(model, shape, *, steps, thresholds=(), labels=None, text=None, null_text=None, guidance=1.0, interval=(0.0, 1.0), seed=0, offset=0,
           noise=None, dtype=None, callback=None, progress=False, impl=None):
    """Generate pictures or videos.

    Args:
        model: `DFM`, or anything with its call and a `pyramid` configuration.
        shape: [B, C, H, W] or [B, C, T, H, W] of the result.
        steps, thresholds: of `schedule`. labels: int64 [B]. text, null_text: tokens for models with cross-attention.
        guidance: weight w of u + w (c - u), with the unconditional velocity u of the null label or text; 1: no guidance, one evaluation a step.
        interval: data times between which guidance acts, for every level by its own time.
        seed, offset: of the noise; noise: list of levels to use instead. dtype: of the model's inputs; None: float32.
        callback: called with a `Moment` at every step.

    Returns:
        a float32 tensor of this shape.

    Raises:
        ValueError: sizes, steps, thresholds or noise that do not fit.
    """
    config = model.pyramid
    rows = schedule(steps, thresholds)
    if len(tuple(steps)) != config.levels:
        raise ValueError(f"steps={tuple(steps)!r}: expected {config.levels}, one per level")
    wanted = pyramid.shapes(shape, config)
    device = next((p.device for p in model.parameters()), None)
    z = pyramid.noise_levels(shape, config, seed=seed, offset=offset, device=device, impl=impl) if noise is None else list(noise)
    if [tuple(level.shape) for level in z] != wanted:
        raise ValueError(f"noise: shapes {[tuple(level.shape) for level in z]}, expected {wanted}")
    device, batch = z[0].device, shape[0]
    table = torch.tensor([row.times for row in rows], dtype=z[0].dtype, device=device)
    moves = torch.tensor([[config.sign * (b - a) for a, b in zip(row.times, row.next_times)] for row in rows], device=device)
    whole = torch.tensor([[config.sign * (1 - a) for a in row.times] for row in rows], device=device)
    weights = [weights_at(row, guidance, interval) for row in rows]
    weight_table = torch.tensor(weights, device=device)
    conditions = {"labels": (labels, labels if labels is None else torch.full_like(labels, config.classes)), "text": (text, null_text)}
    given = {name: pair for name, pair in conditions.items() if pair[0] is not None}
    if guidance != 1.0 and (not given or any(pair[1] is None for pair in given.values())):
        raise ValueError(f"guidance={guidance}: expected labels, or text and null_text, for a weight other than 1")
    inputs, each = [level if dtype is None else level.to(dtype) for level in z], enumerate(rows)
    if progress:
        each = import_extra("tqdm", "a progress bar").tqdm(each, total=len(rows), desc="sampling", leave=False)
    for i, row in each:
        active, guided = row.active, any(w != 1.0 for w in weights[i][: row.active])
        copies = 2 if guided else 1
        t = table[i].expand(batch * copies, -1)
        # Conditional half first. Where no guidance acts there is no second half.
        condition = {name: torch.cat(pair[:copies]) for name, pair in given.items()}
        v = model([torch.cat([level] * copies) for level in inputs[:active]], t, stage=active, **condition)
        cond, uncond = [level[:batch] for level in v], [level[batch:] for level in v] if guided else None
        guide = {"guidance": weight_table[i], "impl": impl}
        if callback is not None:
            callback(Moment(i, active, row.times, lambda: pyramid.join(
                vidkern.pyramid_flow_step(z, cond, uncond, dt=whole[i], active=active, next_active=0, **guide)[0][:active], config)))
        if i + 1 < len(rows):
            z, inputs = vidkern.pyramid_flow_step(z, cond, uncond, dt=moves[i], active=active, next_active=rows[i + 1].active, dtype=dtype, **guide)
        elif not config.upsample:
            return vidkern.pyramid_flow_step(z, cond, uncond, dt=moves[i], merge=True, std=config.scale, kind=config.kind, factor=config.factor,
                                             **guide)
        else:
            z, _ = vidkern.pyramid_flow_step(z, cond, uncond, dt=moves[i], next_active=0, **guide)
    return pyramid.join(z, config)
