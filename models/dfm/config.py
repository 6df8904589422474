"""Configurations of DFM models, named after the sizes of the paper (arXiv 2506.19839, section 4 and its supplement)."""

import dataclasses

from ..shared.dit import BlockSpec, DiTConfig


@dataclasses.dataclass(frozen=True)
class DFMConfig:
    """dit: the trunk and the channels of a picture or latent; its own `patch` is not used. levels: S. patch: side of a patch of the coarsest
    level; it doubles from level to level, so that all levels have the same tokens. classes: 0 = no labels.

    upsample: states of all levels live at full size, with the same patch (the FLUX recipe, section 4.5), so that a pretrained model's patch
    fits the coarsest level. kind, factor: of the pyramid, see `vidkern.pyramid_decompose`. std: standard deviation of every level;
    standardise: divide the levels by it; precond: unit-variance inputs and targets (section A.1). direction: what the network predicts,
    "data": data - noise, "noise": noise - data (diffusers, pretrained models). stage_embed: tell the model its current stage (section A.1).
    """

    dit: DiTConfig = DiTConfig()
    levels: int = 2
    patch: int = 1
    classes: int = 0
    upsample: bool = False
    kind: str = "laplacian"
    factor: tuple = (1, 2, 2)
    std: tuple = ()
    standardise: bool = False
    precond: bool = False
    stage_embed: bool = True
    direction: str = "data"

    def __post_init__(self):
        if self.levels not in (1, 2, 3, 4):
            raise ValueError(f"levels={self.levels!r}: expected 1 to 4")
        if self.patch < 1:
            raise ValueError(f"patch={self.patch!r}: expected at least 1")
        if self.direction not in ("data", "noise"):
            raise ValueError(f"direction={self.direction!r}: expected 'data' (data - noise) or 'noise' (noise - data)")
        if (self.standardise or self.precond or self.std) and (len(self.std) != self.levels or not all(s > 0 for s in self.std)):
            raise ValueError(f"std={self.std!r}: expected {self.levels} positive numbers, coarse to fine (see `level_std`)")
        if self.upsample and (self.kind, tuple(self.factor)) != ("laplacian", (1, 2, 2)):
            raise ValueError(f"upsample=True with kind={self.kind!r}, factor={self.factor!r}: expected 'laplacian', (1, 2, 2)")

    @property
    def sign(self):
        """+1 or -1: the velocity times this points from noise to data."""
        return 1 if self.direction == "data" else -1

    @property
    def scale(self):
        """What the levels are divided by, or None."""
        return self.std if self.standardise else None

    def patch_of(self, level):
        """(time, row, column) patch of level 0 .. S - 1."""
        if self.upsample:
            return (1, self.patch, self.patch)
        return (2**level if self.factor[0] == 2 else 1, self.patch * 2**level, self.patch * 2**level)

    def width_of(self, level):
        """Numbers of a patch of level 0 .. S - 1."""
        t, y, x = self.patch_of(level)
        return self.dit.channels * t * y * x


def _image_dit(layers, dim, heads, *, channels, rope_axes):
    blocks = (BlockSpec(attention="sdpa"),) * layers
    return DiTConfig(channels=channels, patch=2, dim=dim, heads=heads, blocks=blocks, qk_norm="none", rope_axes=rope_axes)


def tiny(channels=3, classes=10, **changes):
    """0.36M parameters, for 16x16 pixels in 64 tokens; changes: fields of `DFMConfig`."""
    return DFMConfig(_image_dit(4, 64, 4, channels=channels, rope_axes=(4, 6, 6)), classes=classes, **changes)


def base(channels=16, classes=1000, **changes):
    """DiT-B of the ablations: 256 -> 512 pixels in 8x latents of 16 channels, 1024 tokens, patches 1 and 2."""
    return DFMConfig(_image_dit(12, 768, 12, channels=channels, rope_axes=(4, 30, 30)), classes=classes, **changes)


def large(channels=16, classes=1000, **changes):
    """DiT-L."""
    return DFMConfig(_image_dit(24, 1024, 16, channels=channels, rope_axes=(4, 30, 30)), classes=classes, **changes)


def xlarge(channels=16, classes=1000, **changes):
    """DiT-XL of the main results. The paper's 716.5M count one more linear layer of dim x dim in every block, of unknown place."""
    return DFMConfig(_image_dit(28, 1152, 16, channels=channels, rope_axes=(8, 32, 32)), classes=classes, **changes)


def flux(dit, levels=2, **changes):
    """The FLUX recipe for a plain model's DiTConfig: its patch, all levels at full size, velocities noise - data; see `model.from_plain`."""
    return DFMConfig(dit, levels=levels, patch=dit.patch, upsample=True, direction="noise", **changes)
