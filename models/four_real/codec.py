"""Pixels relative to the references: what takes the place of the paper's video autoencoder in the demo.

The paper denoises latents of an autoencoder with an 11B model. A model of a few million parameters trained for minutes learns much
sooner what *differs* from its references than what they already show, so a cell is coded as

    z = (pixels - prediction) / scale

where the prediction is made from the reference cells alone, with no parameters: the mean of the fixed-view frame of the same time
and the freeze-time frame of the same view, or the one that is given, or mid-grey without either; at a reference cell, the cell
itself. The code is invertible, so the flow stays a flow over pixels; its prediction is one of the baselines that the demo reports.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ReferenceCodec:
    """scale: divisor of the difference, chosen so that z has a spread near 1. Pixels are in [-1, 1]."""

    scale: float = 0.35

    @staticmethod
    def predict(references):
        """The prediction [B, V, T, C, H, W] from `references` (see `conditioning.References`)."""
        (row, has_row), (column, has_column), _ = references.spread()
        has_row, has_column = (m[..., None, None, None].to(row.dtype) for m in (has_row, has_column))
        mean = (row * has_row + column * has_column) / (has_row + has_column).clamp_min(1)
        return mean.where(~references.mask[..., None, None, None], references.frames)

    def encode(self, grid, references):
        return (grid - self.predict(references)) / self.scale

    def decode(self, z, references):
        return self.predict(references) + self.scale * z
