"""Toy text-to-video data: a coloured shape moves over a dark ground in 17 frames of 32 x 32 pixels; three words say colour, shape and direction.

Latents are made like a causal video autoencoder's at 8 x 8 x 8: the first frame alone, then groups of 8 frames, in cells of 8 x 8 pixels, each
projected on its principal components. 3 x 4 x 4 latent positions.
"""

import dataclasses

import torch

FRAMES, SIZE, CELL, GROUP = 17, 32, 8, 8
COLOURS = {"red": (0.9, 0.15, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.15, 0.3, 1.0), "yellow": (0.95, 0.85, 0.1), "white": (0.95, 0.95, 0.95)}
SHAPES = ("square", "disc", "ring")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
WORDS = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS))
TEXT_DIM = 32
GROUND = 0.08
FITTED = 384  # videos that the components are fitted on: 12288 cells for 1536 numbers each


def words(count, generator):
    """Random prompts: int64 [count, 3], indices into WORDS."""
    return torch.stack([torch.randint(len(options), (count,), generator=generator) for options in WORDS], 1)


def prompt(row):
    """A prompt as a sentence."""
    colour, shape, direction = (options[int(i)] for options, i in zip(WORDS, row))
    return f"{colour} {shape} going {direction}"


def clips(said, generator):
    """Videos [N, 3, 17, 32, 32] in -1 .. 1 of prompts [N, 3]; place, size and speed are random, and the shape stays in the picture."""
    N = len(said)
    radius = 5.0 + 2.0 * torch.rand(N, generator=generator)
    travel = 8.0 + 4.0 * torch.rand(N, generator=generator)
    step = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[said[:, 2]]
    low, high = radius[:, None], SIZE - 1 - radius[:, None]
    start_low = torch.maximum(low, low - step * travel[:, None])
    start_high = torch.minimum(high, high - step * travel[:, None])
    start = start_low + (start_high - start_low) * torch.rand(N, 2, generator=generator)
    time = torch.linspace(0, 1, FRAMES)
    centre = start[:, None] + step[:, None] * (travel[:, None] * time)[..., None]
    grid = torch.arange(SIZE, dtype=torch.float32)
    dy, dx = (grid - centre[..., i, None] for i in range(2))
    dy, dx = dy[..., :, None], dx[..., None, :]
    edge = radius[:, None, None, None]
    square = torch.maximum(dy.abs() + 0 * dx, dx.abs() + 0 * dy) - 0.9 * edge
    far = (dy.square() + dx.square()).sqrt()
    disc, ring = far - edge, (far - 0.75 * edge).abs() - 0.25 * edge
    distance = torch.stack((square, disc, ring), 0)[said[:, 1], torch.arange(N)]
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[said[:, 0]][:, :, None, None, None]
    return (GROUND + (colour - GROUND) * cover) * 2 - 1


class Vocabulary:
    """Fixed random embeddings of the words, in place of a frozen text encoder: prompts [N, 3] -> [N, 3, 32]. No text is all zeros."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tables = [torch.randn(len(options), TEXT_DIM, generator=generator) for options in WORDS]

    def __call__(self, said):
        return torch.stack([table[said[:, i]] for i, table in enumerate(self.tables)], 1)


def _cells(video):
    """(first frames [N, 16, 192], groups [N, 2, 16, 1536]) of videos."""
    N = len(video)
    side = SIZE // CELL

    def cut(frames):
        x = frames.reshape(N, 3, -1, GROUP if frames.shape[2] > 1 else 1, side, CELL, side, CELL)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)

    return cut(video[:, :, :1])[:, 0], cut(video[:, :, 1:])


class Codec:
    """Principal components as an autoencoder: videos [N, 3, 17, 32, 32] <-> latents [N, C, 3, 4, 4] of unit variance over all their numbers.

    video: what the components are fitted on. channels: C.
    """

    def __init__(self, video, channels=32):
        self.channels = channels
        self.parts = []
        for cells in _cells(video):
            flat = cells.flatten(0, -2)
            mean = flat.mean(0)
            _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
            basis = vectors.flip(-1)[:, :channels]
            spread = ((flat - mean) @ basis).square().mean().sqrt()
            self.parts.append((mean, basis, spread))

    def encode(self, video):
        first, groups = _cells(video)
        latents = [((cells - mean) @ basis / spread) for cells, (mean, basis, spread) in zip((first[:, None], groups), self.parts)]
        return torch.cat(latents, 1).unflatten(2, (SIZE // CELL, -1)).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents):
        tokens = latents.permute(0, 2, 3, 4, 1)
        N, side = len(tokens), SIZE // CELL
        videos = []
        for part, (mean, basis, spread) in zip((tokens[:, :1], tokens[:, 1:]), self.parts):
            frames = 1 if part.shape[1] == 1 else GROUP
            x = (part * spread) @ basis.T + mean
            x = x.reshape(N, -1, side, side, 3, frames, CELL, CELL).permute(0, 4, 1, 5, 2, 6, 3, 7)
            videos.append(x.reshape(N, 3, -1, SIZE, SIZE))
        return torch.cat(videos, 2).clamp(-1, 1)


@dataclasses.dataclass(frozen=True)
class Clips:
    """train, held_out: latents [N, C, 3, 4, 4]; said, held_out_said: prompts [N, 3]; codec, vocabulary."""

    train: torch.Tensor
    said: torch.Tensor
    held_out: torch.Tensor
    held_out_said: torch.Tensor
    codec: Codec
    vocabulary: Vocabulary

    def batch(self, size, generator):
        """(latents, text [size, 3, 32]), drawn with replacement."""
        index = torch.randint(len(self.train), (size,), generator=generator)
        return self.train[index], self.vocabulary(self.said[index])


def open_clips(*, train=2048, held_out=512, channels=32, seed=0):
    """The data set of a seed: always the same clips."""
    generator = torch.Generator().manual_seed(seed)
    said, videos = [], []
    for count in (train, held_out):
        said.append(words(count, generator))
        videos.append(clips(said[-1], generator))
    codec = Codec(videos[0][:FITTED], channels)
    return Clips(codec.encode(videos[0]), said[0], codec.encode(videos[1]), said[1], codec, Vocabulary())
