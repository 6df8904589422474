"""Configurations of 4Real-Video-V2 (arXiv 2506.18839) as frozen dataclasses: `tiny`, `demo`, `paper`."""

import dataclasses

from ..shared.dit import BlockSpec, DiTConfig
from .blend import SHIFTS

VARIANTS = ("fused", "full", "sequential_insert", "sequential_interleave", "parallel_hard", "parallel_soft", "parallel_light")
POSITIONS = ("collapsed", "sum", "learned")


@dataclasses.dataclass(frozen=True)
class FourRealConfig:
    """dit: the network, its attention included; architecture, positions: which variant it is. `variant` sets all three.

    prediction: what the network outputs, "velocity" or "x0".
    spread_references: also add, to every cell, embeddings of the reference frames of its own view and its own time (and of the
    corner cell that both share). The paper adds references to their own cells only and lets attention carry them; a model of a few
    hundred thousand parameters learns far sooner when each cell sees its two references directly.
    sigma_floor: least divisor when an x0 prediction is turned into a velocity.
    blend_shifts: shifts of the output layer described in `blend`; empty: a plain output, as in the paper. codec_scale: `ReferenceCodec`.
    """

    dit: DiTConfig
    prediction: str = "velocity"
    spread_references: bool = False
    sigma_floor: float = 0.05
    blend_shifts: tuple = ()
    codec_scale: float = 0.35
    architecture: str = "fused"
    positions: str = "collapsed"

    def __post_init__(self):
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction={self.prediction!r}: expected 'velocity' or 'x0'")
        outputs = self.dit.channels + (1 + len(self.blend_shifts) if self.blend_shifts else 0)
        if (self.dit.out_channels or self.dit.channels) != outputs:
            raise ValueError(f"dit.out_channels={self.dit.out_channels}: expected {outputs} with {len(self.blend_shifts)} blend_shifts")
        if self.blend_shifts and self.prediction != "x0":
            raise ValueError(f"blend_shifts with prediction={self.prediction!r}: expected 'x0'")

    def variant(self, name, *, positions="collapsed", insert_every=1):
        """The same model in another architecture; the names are explained in `variants`.

        positions (fused and full): "collapsed" (view * t_max + time, the paper's choice), "sum" (view + time) or "learned" (a view
        embedding added to q and k). insert_every (sequential_insert): a new column attention in every n-th block.
        """
        if name not in VARIANTS:
            raise ValueError(f"variant={name!r}: expected one of {VARIANTS}")
        if positions not in POSITIONS or (positions != "collapsed" and name not in ("fused", "full")):
            raise ValueError(f"positions={positions!r}: expected one of {POSITIONS}, with {name!r} 'collapsed'"
                             if name not in ("fused", "full") else f"positions={positions!r}: expected one of {POSITIONS}")
        if insert_every < 1 or (insert_every != 1 and name != "sequential_insert"):
            raise ValueError(f"insert_every={insert_every}: expected 1, or with 'sequential_insert' at least 1")
        specs = []
        for index, block in enumerate(self.dit.blocks):
            attention, kind = _attention(name, index, insert_every)
            kind = {"sum": "sum", "learned": "time"}.get(positions, kind)
            specs.append(dataclasses.replace(block, attention=attention, positions=kind))
        dit = dataclasses.replace(self.dit, blocks=tuple(specs))
        return dataclasses.replace(self, dit=dit, architecture=name, positions=positions)


def _attention(name, index, insert_every):
    """Pattern and positions of block `index`."""
    row, column = ("same_view", "time"), ("same_time", "view")
    if name in ("fused", "full"):
        return {"fused": "grid", "full": "full"}[name], "collapsed"
    if name == "sequential_interleave":
        return row if index % 2 == 0 else column
    if name == "sequential_insert" and (index + 1) % insert_every:
        return row[:1], (row[1], column[1])
    return (row[0], column[0]), (row[1], column[1])


def tiny():
    """4 blocks, 64 channels, 4 heads of 16, patch 2: the toy of tests (8x8 pixels, V = T = 4)."""
    return FourRealConfig(DiTConfig(channels=3, patch=2, dim=64, heads=4, blocks=(BlockSpec(),) * 4, t_max=16))


def demo():
    """What `vidkern demo` trains: 64x48 pixels, patch 8, 4 blocks of 192 channels; the reasons are in FEASIBILITY.md."""
    dit = DiTConfig(channels=3, out_channels=3 + 1 + len(SHIFTS), patch=8, dim=192, heads=3, blocks=(BlockSpec(),) * 4, t_max=16)
    return FourRealConfig(dit, prediction="x0", spread_references=True, blend_shifts=SHIFTS)


def paper():
    """The paper's size: 32 blocks, hidden 4096, 32 heads of 128, 2x2 patches of a 16-channel latent, text cross-attention.

    The paper says 11B. Per block, in units of C^2 = 4096^2 = 16.8M: self-attention 4, cross-attention 4 (text width = C), MLP with
    ratio 4: 8, AdaLN 6; 22 C^2 = 369M; 32 blocks = 11.81B, within 8 % of 11B. Biases, norms and embeddings add 0.06B.
    """
    dit = DiTConfig(channels=16, patch=2, dim=4096, heads=32, blocks=(BlockSpec(cross=True),) * 32, text_dim=4096, t_max=16,
                    rope_axes=(44, 42, 42), qk_norm="head")
    return FourRealConfig(dit)
