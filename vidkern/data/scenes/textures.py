"""Solid textures: a colour for every point of an object, in its own coordinates, so that they move and turn with it.

A point comes as ``u`` [3, n], divided by the object's size (a box spans -1..1). All are continuous in ``u``, the edges of a checker
are narrow ramps: a picture of them can be interpolated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EDGE = 5.0  # steepness of checker and stripe edges


@dataclass(frozen=True)
class Texture:
    """pattern: a name of `PATTERNS`. colours: float64 [2, 3], RGB in 0..1. frequency: periods over u from -1 to 1.
    directions: float64 [waves, 3] and phases: float64 [waves], used by "noise" (all) and "stripes" (the first).
    fade: |u| at which half of the contrast is left, so that the ground does not flicker at the horizon."""

    pattern: str
    colours: Tensor
    frequency: float
    directions: Tensor
    phases: Tensor
    fade: float = math.inf

    def __call__(self, u: Tensor) -> Tensor:
        """RGB ``[3, n]`` at points ``u`` [3, n], in u's dtype."""
        mix = PATTERNS[self.pattern](self, u)
        if self.fade < math.inf:
            mix = 0.5 + (mix - 0.5) / (1 + ((u * u).sum(0) / self.fade**2) ** 2)
        first, second = self.colours.to(u)[:, :, None]
        return first + (second - first) * mix


def checker(texture: Texture, u: Tensor) -> Tensor:
    """Solid checker, mix [n] of the two colours at u [3, n]; so the patterns below."""
    # cos is ±1 on the faces of a box (u = ±1) at whole frequencies, so a face never lies on an edge of the pattern
    x, y, z = (math.pi * texture.frequency * u).cos()
    return (0.5 + EDGE * x * y * z).clamp(0, 1)


def ground_checker(texture: Texture, u: Tensor) -> Tensor:
    """Checker of the plane z = 0, shifted at random."""
    x, y, _ = (math.pi * texture.frequency * u + texture.phases.to(u)[0]).cos()
    return (0.5 + EDGE * x * y).clamp(0, 1)


def stripes(texture: Texture, u: Tensor) -> Tensor:
    """Waves along one random direction, with narrow edges."""
    along = texture.directions.to(u)[0] @ u
    return (0.5 + EDGE / 3 * (math.pi * texture.frequency * along + texture.phases.to(u)[0]).sin()).clamp(0, 1)


def noise(texture: Texture, u: Tensor) -> Tensor:
    """Smooth noise."""
    # Plane waves in random directions: smooth everywhere, and without a lattice
    waves = (math.pi * texture.frequency * (texture.directions.to(u) @ u) + texture.phases.to(u)[:, None]).sin()
    return (0.5 + 0.9 * waves.mean(0)).clamp(0, 1)


def plain(texture: Texture, u: Tensor) -> Tensor:
    """The first colour everywhere."""
    return torch.zeros_like(u[0])


PATTERNS = {"checker": checker, "ground_checker": ground_checker, "stripes": stripes, "noise": noise, "plain": plain}


def random_texture(generator: torch.Generator, pattern: str, frequency: float, colours: Tensor | None = None, *,
                   waves: int = 6, fade: float = math.inf) -> Texture:  # fmt: skip
    """A texture with random phases and directions, and where ``colours`` is None a random pair of contrasting colours."""
    directions = torch.nn.functional.normalize(torch.randn(waves, 3, generator=generator, dtype=torch.float64), dim=1)
    if pattern == "noise":  # waves of different length
        directions = directions * torch.linspace(0.6, 1.4, waves, dtype=torch.float64)[:, None]
    phases = 2 * math.pi * torch.rand(waves, generator=generator, dtype=torch.float64)
    return Texture(pattern, random_colours(generator) if colours is None else colours, frequency, directions, phases, fade)


def random_colours(generator: torch.Generator) -> Tensor:
    """Two colours ``[2, 3]``: a saturated one and, on the far side of the hue circle, a lighter or darker one."""
    hue, lightness = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    second = 0.95 if lightness < 0.5 else 0.3
    return torch.stack([hsv_to_rgb(hue, 0.85, 0.9), hsv_to_rgb((hue + 0.45) % 1, 0.35 + 0.3 * lightness, second)])


def hsv_to_rgb(hue: float | Tensor, saturation: float | Tensor, value: float | Tensor) -> Tensor:
    """RGB along the last axis, all in 0..1; hue 0 is red, 1/3 green."""
    hue, saturation, value = (torch.as_tensor(x, dtype=torch.float64)[..., None] for x in (hue, saturation, value))
    wheel = (((hue * 6 + torch.tensor([0.0, 4, 2])) % 6 - 3).abs() - 1).clamp(0, 1)
    return value * (1 + saturation * (wheel - 1))
