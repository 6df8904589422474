"""The noise levels at both ends of every stage of Pyramidal Flow, in plain Python: nothing here touches a device.

Source: arXiv 2410.05954, equations 12 to 15; noise time, 1 = noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage, coarse to fine.

    Args:
        start, end: noise level (sigma, 1 = noise) at its start and at its end.
        scale, spread: of the jump into it: ``z <- scale * up(z) + spread * noise`` (1 and 0 for the first).
    """

    start: float
    end: float
    scale: float
    spread: float


def pyramid_stages(stages=3, *, gamma=1 / 3, ranges=None, steps=1000) -> tuple[Stage, ...]:
    """Noise levels of the stages.

    A stage starts noisier than the one before it ended: nearest upsampling correlates the 2x2 blocks of the noise, and blockwise noise
    of correlation ``-gamma`` makes it white again.

    Args:
        stages: number of stages K, from 1 to 4.
        gamma: size of the negative correlation of the corrective noise, 0 < gamma <= 1/3.
        ranges: K + 1 increasing shares of the schedule where stages begin and end; None: equal parts.
        steps: discrete times of the schedule that the shares are cut from.

    Returns:
        one :class:`Stage` each, coarse to fine.

    Raises:
        ValueError: an argument is wrong.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= 4:
        raise ValueError(f"stages: {stages!r}, expected 1 to 4")
    if not isinstance(gamma, (int, float)) or not 0 < gamma <= 1 / 3:
        raise ValueError(f"gamma: {gamma!r}, expected a number in (0, 1/3]: blocks of four with a stronger correlation do not exist")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < stages:
        raise ValueError(f"steps: {steps!r}, expected an integer of at least {stages}")
    ranges = [k / stages for k in range(stages + 1)] if ranges is None else list(ranges)
    if len(ranges) != stages + 1 or ranges[0] != 0 or ranges[-1] != 1 or any(a >= b for a, b in zip(ranges, ranges[1:])):
        raise ValueError(f"ranges: {ranges!r}, expected {stages + 1} increasing numbers from 0 to 1")
    # Discrete noise levels 1, ..., 1/steps, as the schedule that stages cut has them; the last stage ends at 0.
    grid = [1 - i / steps for i in range(steps)] + [0.0]
    result = []
    for k in range(stages):
        first, last = (max(int(ranges[i] * steps), 0) for i in (k, k + 1))
        at, end = grid[first], grid[last] if last < steps else 0.0
        if k == 0:
            result.append(Stage(at, end, 1.0, 0.0))
            continue
        s = 1 - at
        scale = 1 / (math.sqrt(1 + 1 / gamma) * (1 - s) + s)
        result.append(Stage(1 - s * scale, end, scale, scale * (1 - s) / math.sqrt(gamma)))
    return tuple(result)
