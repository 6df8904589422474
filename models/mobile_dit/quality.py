"""Figures of quality of generated toy clips: a distance to held-out clips, and whether a clip shows what its prompt says."""

import torch

from ..shared.metrics import frechet
from .data import COLOURS, DIRECTIONS, GROUND

COMPONENTS = 32


class Measure:
    """``measure(latents [N, C, 3, 4, 4], said [N, 3])`` -> {"distance", "colour", "direction"}.

    distance: Fréchet distance to the held-out latents in the first 32 principal components of the training latents, each scaled to variance 1.
    colour, direction: share of clips whose colour or direction, read from the decoded pixels, is the one asked for. floor: the same of as many
    other real clips.
    """

    what = ("Fréchet distance to held-out clips in the first 32 principal components of the training latents, each of variance 1; share of clips "
            "with the colour and with the direction of the prompt, read from the pixels")

    def __init__(self, clips, count=128):
        flat = clips.train.flatten(1)
        self.mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - self.mean).T @ (flat - self.mean) / len(flat))
        self.basis = vectors.flip(-1)[:, :COMPONENTS] / values.flip(-1)[:COMPONENTS].clamp_min(1e-8).sqrt()
        self.codec, self.reference = clips.codec, self.features(clips.held_out)
        self.floor = self(clips.train[:count], clips.said[:count])

    def features(self, latents):
        return (latents.flatten(1) - self.mean) @ self.basis

    def __call__(self, latents, said):
        colours, directions = read(self.codec.decode(latents))
        return {"distance": frechet(self.features(latents), self.reference), "colour": float((colours == said[:, 0]).double().mean()),
                "direction": float((directions == said[:, 2]).double().mean())}


def read(video):
    """(colour, direction) of videos [N, 3, 17, 32, 32]: int64 [N] each, -1 where there is nothing to see.

    Colour: the palette's nearest to the mean of what stands out. Direction: the greatest part of the way of its centre, first to last frame.
    """
    frames = (video + 1) / 2
    weight = ((frames - GROUND).abs().amax(1) - 0.25).clamp_min(0)
    mean = (frames * weight[:, None]).sum((2, 3, 4)) / weight.sum((1, 2, 3)).clamp_min(1e-6)[:, None]
    palette = torch.tensor(list(COLOURS.values()))
    colours = torch.cdist(mean, palette).argmin(1)
    grid = torch.arange(video.shape[-1], dtype=torch.float32)
    mass = weight.sum((2, 3)).clamp_min(1e-6)
    centres = torch.stack(((weight.sum(3) * grid).sum(2), (weight.sum(2) * grid).sum(2)), -1) / mass[..., None]
    way = centres[:, -1] - centres[:, 0]
    directions = (way @ torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32).T).argmax(1)
    seen = (mass[:, 0] > 1.0) & (mass[:, -1] > 1.0)
    return torch.where(seen, colours, -1), torch.where(seen, directions, -1)
