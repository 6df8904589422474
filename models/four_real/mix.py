"""The training mix of 4Real-Video-V2 (arXiv 2506.18839, training data): dynamic scenes, 2D-transformed videos, static scenes.

The paper draws 40 % Objaverse and 20 % Kubric (dynamic scenes seen by several cameras), 20 % ordinary videos under homographies, and
20 % static scenes whose frames are repeated over time; it reverses the order of views at random and lengthens the clips midway.
"""

import dataclasses

import torch

from .conditioning import draw_modes

STATIC = "static"


def reversed_views(grid, generator):
    """Grids [n, V, T, ...] with the order of views reversed in each sample with probability 1/2. Twice reversed is unchanged."""
    turned = torch.rand(len(grid), generator=generator) < 0.5
    return torch.where(turned.to(grid.device).view(-1, *[1] * (grid.ndim - 1)), grid.flip(1), grid)


def static_grids(grid):
    """Grids [n, V, T, ...] that stand still: the frames of time 0 at every time."""
    return grid[:, :, :1].expand_as(grid).contiguous()


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Lengths of training clips. stages: ((share of the training done, times), ...), beginning with share 0.

    The paper trains two thirds of its steps on 8 latent times and the rest on 16: `Curriculum.halves(16)`.
    """

    stages: tuple

    def __post_init__(self):
        shares = [share for share, _ in self.stages]
        if not shares or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1 or any(t < 1 for _, t in self.stages):
            raise ValueError(f"stages={self.stages}: expected rising shares in [0, 1), the first 0, and at least one time each")

    @classmethod
    def halves(cls, times):
        """Half the times for the first two thirds, then all of them."""
        return cls(((0.0, max(1, times // 2)), (2 / 3, times)))

    def times(self, step, steps):
        """Times T of the grids of step 0 .. steps - 1."""
        return [times for share, times in self.stages if step >= share * steps][-1]


@dataclasses.dataclass(frozen=True)
class DataMix:
    """Draws training grids from several sources.

    sources: {name: object with train(n, generator) -> [n, V, T, 3, h, w]}, all of one size. weights: {name: share}; the name "static"
    stands for grids of the first source that stand still. modes: probabilities for `draw_modes`.
    """

    sources: dict
    weights: dict
    modes: tuple = (0.2, 0.2, 0.6, 0.0)

    def __post_init__(self):
        unknown = sorted(set(self.weights) - set(self.sources) - {STATIC})
        if unknown or not self.sources or sum(self.weights.values()) <= 0 or min(self.weights.values()) < 0:
            raise ValueError(f"weights={self.weights}: expected shares, not all zero, of {sorted(self.sources)} and 'static'")

    def draw(self, n, generator, times=None):
        """(grids [n, V, times or T, 3, h, w], n mode names).

        A static sample loses its references (mode "none"): given them, a model would learn to copy the first frame and to ignore the
        view (arXiv 2506.18839). times: shorter clips, cut from the front.
        """
        names = list(self.weights)
        picks = torch.multinomial(torch.tensor([float(self.weights[name]) for name in names]), n, replacement=True, generator=generator)
        modes = draw_modes(n, generator, self.modes)
        grids = []
        for i, name in enumerate(names[pick] for pick in picks.tolist()):
            grid = self.sources[next(iter(self.sources)) if name == STATIC else name].train(1, generator)
            if name == STATIC:
                grid, modes[i] = static_grids(grid), "none"
            grids.append(grid[:, :, :times])
        return reversed_views(torch.cat(grids), generator), modes
