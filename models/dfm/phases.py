"""The sampler's times: one per level and step, on the host (arXiv 2506.19839, section 3.3 and its figure of the inference schedule)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Step:
    """Data times of all levels before and after a step, and how many of the coarsest levels move: the phase, 1 .. S."""

    times: tuple
    next_times: tuple
    active: int


def schedule(steps, thresholds=()):
    """All steps of a sampler, a tuple of `Step`.

    In phase i level i goes from 0 to its threshold (to 1 in the last phase); every earlier level goes on a straight line from its own
    threshold to 1, which it reaches with the very last step; later levels wait at 0.

    Args:
        steps: number of steps of every phase, coarse to fine.
        thresholds: data time at which each phase but the last ends, in (0, 1).

    Raises:
        ValueError: a number of steps below 1, a threshold outside (0, 1), or lists that do not fit each other.
    """
    steps, thresholds = tuple(steps), tuple(thresholds)
    if not steps or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in steps):
        raise ValueError(f"steps={steps!r}: expected whole numbers of at least 1, one per level, coarse to fine")
    if len(thresholds) != len(steps) - 1:
        raise ValueError(f"thresholds={thresholds!r}: expected {len(steps) - 1} for {len(steps)} levels")
    if any(not 0 < t < 1 for t in thresholds):
        raise ValueError(f"thresholds={thresholds!r}: expected data times in (0, 1), 1 = data")
    ends, t, rows = (*thresholds, 1.0), [0.0] * len(steps), []
    for phase, count in enumerate(steps):
        left = sum(steps[phase:])
        end = [a + (1 - a) * count / left if level < phase else a for level, a in enumerate(t)]
        end[phase] = ends[phase]
        if phase == len(steps) - 1:
            end = [1.0] * len(steps)
        points = [tuple(a + (e - a) * k / count for a, e in zip(t, end)) for k in range(count)] + [tuple(end)]
        rows += [Step(a, b, phase + 1) for a, b in zip(points, points[1:])]
        t = end
    return tuple(rows)
