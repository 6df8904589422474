"""What attention motion flow costs, and the named sample inputs that tests and benches share.

FLOP rules (2 per multiply-add), per query token and key token of a pair: forward 2 (D + 2) with D the channels of a logit (the
product and two coordinate columns), backward 2 (3 D + 2) (the product again, dq, dk, and the slope of the two coordinates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .pairs import pairs_key, pairs_of


def forward_flops(groups: int, pairs: int, size: int, channels: int) -> int:
    """Of ``groups`` logit maps (batch times groups) of ``channels`` channels each, for ``pairs`` pairs of frames of ``size`` tokens."""
    return 2 * groups * pairs * size**2 * (channels + 2)


def vote_flops(groups: int, pairs: int, size: int, channels: int) -> int:
    """Of the second pass: the product again and the sum over the heads."""
    return groups * pairs * size**2 * (2 * channels + 1)


def backward_flops(groups: int, pairs: int, size: int, channels: int) -> int:
    """Of the backward, arguments as in :func:`forward_flops`."""
    return 2 * groups * pairs * size**2 * (3 * channels + 2)


def forward_bytes(groups: int, pairs: int, frames: int, size: int, channels: int, itemsize: int) -> int:
    """Fewest bytes of the forward: q and k read once, mean and lse written once."""
    return groups * size * (2 * frames * channels * itemsize + 12 * pairs)


def backward_bytes(groups: int, pairs: int, frames: int, size: int, channels: int, itemsize: int) -> int:
    """Fewest bytes of the backward: q, k, mean, lse and dmean read once, dq and dk written once."""
    return groups * size * (4 * frames * channels * itemsize + 20 * pairs)


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``attention_motion_flow``; ``spread`` is the standard deviation of q and k."""

    name: str
    batch: int
    heads: int
    dim: int
    grid: tuple[int, int, int]
    combine: str = "logit_mean"
    layout: str = "bhld"
    pairs: object = "all"
    n_text: int = 0
    text_position: str = "front"
    batch_index: int | None = -1
    spread: float = 1.0
    rules: Mapping = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Tokens of a frame, S."""
        return self.grid[1] * self.grid[2]

    @property
    def n_pairs(self) -> int:
        """Pairs of frames, P."""
        return len(pairs_of(pairs_key(self.pairs, self.grid[0]), self.grid[0]))

    @property
    def groups(self) -> tuple[int, int]:
        """Logit maps, and channels of each."""
        batch = self.batch if self.batch_index is None else 1
        groups = {"logit_mean": (1, self.heads), "qk_mean": (1, 1)}.get(self.combine, (self.heads, 1))
        return batch * groups[0], groups[1] * self.dim

    @property
    def flops(self) -> int:
        """Forward FLOPs."""
        groups, channels = self.groups
        return forward_flops(groups, self.n_pairs, self.size, channels)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of normal values in this sample's layout."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = [self.batch, self.heads, self.n_text + self.grid[0] * self.size, self.dim]
        if self.layout == "blhd":
            shape[1], shape[2] = shape[2], shape[1]
        draw = lambda: (self.spread * torch.randn(shape, generator=generator, device=device)).to(dtype)  # noqa: E731
        return draw(), draw()

    def call(self, q, k, **more):
        """Run the public function on this sample."""
        import vidkern

        given = {
            "grid": self.grid, "layout": self.layout, "heads": self.combine, "pairs": self.pairs, "n_text": self.n_text,
            "text_position": self.text_position, "batch_index": self.batch_index, **self.rules,
        }
        return vidkern.attention_motion_flow(q, k, **(given | more))


# Averaged over H heads, logits of unit normal channels are sqrt(H) times smaller than a head's: a wider spread keeps maps peaked.
SAMPLES = (
    Sample("logits", 2, 4, 64, (3, 4, 6), spread=2.0),
    Sample("logits_token_major", 1, 3, 32, (2, 5, 4), layout="blhd", n_text=7, spread=2.0),
    Sample("per_head", 2, 3, 32, (3, 4, 5), "none", batch_index=None),
    Sample("prob_mean", 1, 4, 64, (2, 3, 7), "prob_mean"),
    Sample("qk_mean", 1, 4, 40, (3, 5, 3), "qk_mean", spread=2.0),
    Sample("one_frame", 1, 1, 8, (1, 3, 5)),
    Sample("one_patch", 1, 2, 16, (4, 1, 1), "none"),
    Sample("tall_113", 1, 2, 24, (2, 113, 1), "none"),
    Sample("wide_upper", 1, 2, 72, (4, 3, 11), "none", pairs="upper"),
    Sample("near_frames", 2, 3, 16, (5, 4, 4), pairs={"max_dt": 1}, batch_index=0, spread=3.0),
    Sample("listed", 1, 2, 128, (4, 6, 5), "none", pairs=((3, 0), (1, 1), (0, 3), (1, 2))),
    Sample("text_back", 2, 2, 64, (2, 7, 9), n_text=19, text_position="back", spread=2.0),
    Sample("tau_5", 1, 2, 64, (2, 8, 10), "prob_mean", rules={"tau": 5.0}),
    Sample("negative", 1, 2, 16, (2, 4, 5), "none", rules={"scale": -0.3}),
    Sample("frame_799", 1, 1, 16, (1, 17, 47), "none"),
    Sample("demo", 1, 4, 16, (4, 8, 10), layout="blhd", n_text=6),
)
