"""Settings of motion guidance, with the published ones by name (DiTFlow, arXiv 2412.07776)."""

import dataclasses
import math
import numbers
import sys

from vidkern.ops.attention_motion_flow.pairs import pairs_key

OPTIMISED = ("latent", "positions", "none")
SIGNALS = ("amf", "smm", "moft")
HEADS = ("logit_mean", "prob_mean", "qk_mean", "none")


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """How the motion of a reference is imposed while sampling; defaults are those of CogVideoX-5B.

    blocks: transformer blocks whose queries and keys (or outputs) carry the motion; several: the mean of their losses. optimise: "latent", the noisy
    latent; "positions", the model's own table (RoPE of queries and of keys, or an additive embedding), which goes on from step to step; "none".
    signal: "amf", "smm" (space-time features, arXiv 2311.17009) or "moft" (arXiv 2405.14864). share: of the sampling steps, the first ones, that
    are guided. updates: Adam steps in each. lr: rate of the first guided step and of the one after the last, linear between. tau, heads, pairs: of
    `vidkern.attention_motion_flow`. threshold: only patches that move in the reference count. inject: blocks that get the reference's keys and
    values in guided steps. checkpointing: recompute blocks in the backward pass. compat: "ditflow", SMM as in that code: cosine over frames, both
    differences to the reference's anchor. channels: share of the channels that MOFT keeps. loss_scale: what the loss is multiplied by before the
    backward pass; None: 65536 for float16 models, 1 otherwise. It is lowered when gradients overflow.
    """

    blocks: tuple = (20,)
    optimise: str = "latent"
    signal: str = "amf"
    share: float = 0.2
    updates: int = 5
    lr: tuple = (0.002, 0.001)
    tau: float = 2.0
    heads: str = "logit_mean"
    pairs: object = "all"
    threshold: bool = True
    inject: tuple = (0,)
    checkpointing: bool = False
    compat: str | None = None
    channels: float = 0.04
    loss_scale: float | None = None

    def __post_init__(self):
        for name, allowed in (("optimise", OPTIMISED), ("signal", SIGNALS), ("heads", HEADS), ("compat", (None, "ditflow"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        for name in ("blocks", "inject"):
            blocks = getattr(self, name)
            if not isinstance(blocks, tuple) or not all(_whole(block) and block >= 0 for block in blocks):
                raise ValueError(f"{name}={blocks!r}: expected a tuple of block numbers from 0 on, such as (20,)")
        if not self.blocks:
            raise ValueError("blocks=(): expected at least one guidance block")
        for name in ("threshold", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        pairs_key(self.pairs, sys.maxsize)      # raises for what is none of its forms; whether the frames exist is seen with the latents
        if not _number(self.tau) or not 0 < self.tau < math.inf:
            raise ValueError(f"tau={self.tau!r}: expected a positive number")
        if not _number(self.share) or not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share!r}: expected a share of the steps, 0 to 1")
        if not _whole(self.updates) or self.updates < 1:
            raise ValueError(f"updates={self.updates!r}: expected at least 1")
        if not isinstance(self.lr, (tuple, list)) or len(self.lr) != 2 or not all(_number(rate) and 0 < rate < math.inf for rate in self.lr):
            raise ValueError(f"lr={self.lr!r}: expected two positive rates, of the first guided step and of the one after the last")
        if not _number(self.channels) or not 0 < self.channels <= 1:
            raise ValueError(f"channels={self.channels!r}: expected a share of the channels, above 0 and up to 1")
        if self.loss_scale is not None and not (_number(self.loss_scale) and 1 <= self.loss_scale < math.inf):
            raise ValueError(f"loss_scale={self.loss_scale!r}: expected None or at least 1")

    def guided(self, steps):
        """How many of `steps` sampling steps are guided: the first ones."""
        return round(self.share * steps)

    def rates(self, steps):
        """Learning rate of every guided step: the first `guided` of ``guided + 1`` evenly spaced ones."""
        count, (first, last) = self.guided(steps), self.lr
        return tuple(first + (last - first) * i / count for i in range(count))


def cogvideox_5b(**changes):
    """DiTFlow on CogVideoX-5B: block 20 of 42."""
    return GuidanceConfig(**{"blocks": (20,), **changes})


def cogvideox_2b(**changes):
    """DiTFlow on CogVideoX-2B: block 15 of 30."""
    return GuidanceConfig(**{"blocks": (15,), **changes})


def wan_14b(**changes):
    """Where a public port to Wan 2.1 14B starts, block 20 of 40; it reports weak control: probe blocks and tau (`select_block`)."""
    return GuidanceConfig(**{"blocks": (20,), **changes})


def wan_1_3b(**changes):
    """Where a public port to Wan 2.1 1.3B starts, block 15 of 30; it reports weak control: probe blocks and tau (`select_block`)."""
    return GuidanceConfig(**{"blocks": (15,), **changes})


def smm(**changes):
    """Space-time feature matching with its own settings (arXiv 2311.17009)."""
    return GuidanceConfig(**{"signal": "smm", "share": 0.4, "updates": 10, "lr": (0.007, 0.004), "inject": (), **changes})


def moft(**changes):
    """Motion features (arXiv 2405.14864) on DiTFlow's schedule."""
    return GuidanceConfig(**{"signal": "moft", "inject": (), **changes})
