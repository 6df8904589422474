"""The named scenes: what stands where, at any time, in closed form, drawn from one seed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vidkern.data.scenes.cameras import rigid
from vidkern.data.scenes.textures import hsv_to_rgb, random_texture
from vidkern.data.scenes.tracer import SKY_RADIUS, Body, World

GRAVITY = 4.0  # scene units per second squared; slower than on earth, so that a ball crosses a few pixels per image
PATTERNS = ("checker", "stripes", "noise")


class Draw:
    """Random numbers of one scene, in the order they are asked for."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def whole(self, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def sign(self) -> int:
        return 2 * self.whole(0, 1) - 1

    def texture(self, frequency: tuple[int, int] = (1, 2)):
        return random_texture(self.generator, PATTERNS[self.whole(0, len(PATTERNS) - 1)], self.whole(*frequency))


def rotation(axis: Tensor, angle: Tensor) -> Tensor:
    """``[T, 3, 3]`` right-handed rotations by ``angle`` [T] radians about a unit ``axis`` [3] (Rodrigues)."""
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    sine, versine = angle.sin()[:, None, None], (1 - angle.cos())[:, None, None]
    return torch.eye(3, dtype=torch.float64) + sine * cross + versine * (cross @ cross)


def turned(xy: Tensor, angle: float) -> Tensor:
    """Ground positions ``[2, T]`` turned about z."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ xy


def triangle_wave(s: Tensor, half: float) -> Tensor:
    """``s`` folded into ±half: a point that runs at constant speed and turns back at both ends."""
    return half - ((s + half) % (4 * half) - 2 * half).abs()


def bouncing_height(seconds: Tensor, drop: float, restitution: float) -> Tensor:
    """Height above the rest position at ``seconds`` [T] of a ball let go at height ``drop``, closed form.

    It first lands after ``fall = sqrt(2 drop / g)``. Flight k = 1, 2... starts with speed ``g fall restitution^k``, lasts
    ``2 fall restitution^k``, and the flights end after finite time, when it lies still.
    """
    fall = math.sqrt(2 * drop / GRAVITY)
    # The flights before k took 2 fall (restitution + ... + restitution^(k - 1)), solved for k:
    done = 1 - (seconds - fall) / (2 * fall) * (1 - restitution) / restitution
    k = torch.log(done.clamp(min=1e-300, max=1)) / math.log(restitution)
    k = (k + 1e-9).floor() + 1
    power = restitution**k
    start = fall + 2 * fall * (restitution - power) / (1 - restitution)
    flight = seconds - start
    height = GRAVITY * flight * (fall * power - flight / 2)
    height = torch.where(done > 1e-9, height.clamp(min=0), torch.zeros_like(seconds))
    return torch.where(seconds < fall, drop - GRAVITY / 2 * seconds**2, height)


def body(draw: Draw, name: str, shape: str, half: list[float], xyz: Tensor, R: Tensor) -> Body:
    """A body with a random texture. xyz: [3, T]; R: [T, 3, 3]."""
    return Body(name, shape, torch.tensor(half, dtype=torch.float64), draw.texture(), rigid(R, xyz.mT.contiguous()))


def bounce(draw: Draw, seconds: Tensor) -> list[Body]:
    """Balls that bounce, each in a lane of its own with a wall at both ends, rolling on with the speed of its flight."""
    count, angle, balls = draw.whole(3, 4), draw.uniform(0, 2 * math.pi), []
    for lane in range(count):
        radius = draw.uniform(0.3, 0.44)
        across = (lane - (count - 1) / 2) * 0.92 + draw.uniform(-0.02, 0.02)
        run = triangle_wave(draw.uniform(-1.3, 1.3) + draw.sign() * draw.uniform(0.4, 1.4) * seconds, 1.6 - radius)
        height = bouncing_height(seconds + draw.uniform(0, 0.6), draw.uniform(0.8, 1.9), draw.uniform(0.75, 0.9)) + radius
        xy = turned(torch.stack([run, torch.full_like(run, across)]), angle)
        axis = torch.tensor([-math.sin(angle), math.cos(angle), 0], dtype=torch.float64)
        xyz, R = torch.cat([xy, height[None]]), rotation(axis, run / radius)
        balls.append(body(draw, f"ball {lane + 1}", "sphere", [radius] * 3, xyz, R))
    return balls


def orbit(draw: Draw, seconds: Tensor) -> list[Body]:
    """Balls and boxes that circle a turning one, each at a distance of its own, and turn as they go."""
    radius, up = draw.uniform(0.45, 0.6), torch.tensor([0, 0, 1.0], dtype=torch.float64)
    still = torch.zeros(2, len(seconds), dtype=torch.float64)
    centre = torch.cat([still, torch.full_like(seconds, draw.uniform(0.9, 1.1))[None]])
    spin = rotation(up, draw.sign() * draw.uniform(0.5, 1.2) * seconds)
    bodies = [body(draw, "centre", "sphere", [radius] * 3, centre, spin)]
    distance = radius + 0.38
    for index in range(draw.whole(2, 3)):
        reach = draw.uniform(0.2, 0.28)  # of the body from its own centre; a box's corner lies on it
        angle = draw.uniform(0, 2 * math.pi) + draw.sign() * draw.uniform(1.0, 2.2) * seconds / distance
        tilt, lean = draw.uniform(-0.25, 0.25), draw.uniform(0, 2 * math.pi)
        xyz = torch.stack([distance * angle.cos(), distance * angle.sin(), 1.0 + tilt * (angle - lean).cos()])
        axis = torch.nn.functional.normalize(torch.randn(3, generator=draw.generator, dtype=torch.float64), dim=0)
        shape = ("sphere", "box")[draw.whole(0, 1)]
        half = [reach] * 3 if shape == "sphere" else [reach / math.sqrt(3) * 1.1] * 2 + [reach / math.sqrt(3) * 0.75]
        R = rotation(axis, draw.uniform(-2.5, 2.5) * seconds)
        bodies.append(body(draw, f"satellite {index + 1}", shape, half, xyz, R))
        distance += 0.58
    return bodies


def boxes(draw: Draw, seconds: Tensor) -> list[Body]:
    """Boxes that turn on the spot or slide to and fro on the ground, each in a lane of its own."""
    count, angle, found = draw.whole(3, 4), draw.uniform(0, 2 * math.pi), []
    up = torch.tensor([0, 0, 1.0], dtype=torch.float64)
    for lane in range(count):
        a, b, height = draw.uniform(0.2, 0.32), draw.uniform(0.2, 0.32), draw.uniform(0.25, 0.75)
        across = (lane - (count - 1) / 2) * 0.95
        swing, pace, phase = draw.uniform(0.3, 1.1), draw.uniform(0.8, 1.8), draw.uniform(0, 2 * math.pi)
        run = draw.uniform(-0.4, 0.4) + swing * (pace * seconds + phase).sin()
        xy = turned(torch.stack([run, torch.full_like(run, across)]), angle)
        R = rotation(up, draw.uniform(0, 2 * math.pi) + draw.uniform(-1.5, 1.5) * seconds)
        xyz = torch.cat([xy, torch.full_like(run, height)[None]])
        found.append(body(draw, f"box {lane + 1}", "box", [a, b, height], xyz, R))
    return found


def mixed(draw: Draw, seconds: Tensor) -> list[Body]:
    """One of the other scenes."""
    return (bounce, orbit, boxes)[draw.whole(0, 2)](draw, seconds)


SCENES: dict[str, Callable[[Draw, Tensor], list[Body]]] = {"bounce": bounce, "orbit": orbit, "boxes": boxes, "mixed": mixed}


def build(scene: str, seconds: Tensor, generator: torch.Generator) -> World:
    """The world of a scene of `SCENES` at times ``seconds`` [T] float64."""
    draw = Draw(generator)
    still = torch.eye(4, dtype=torch.float64).expand(len(seconds), 4, 4)
    ones = torch.ones(3, dtype=torch.float64)
    hue, deep = draw.uniform(0, 1), draw.uniform(0.35, 0.6)
    ground = torch.stack([hsv_to_rgb(hue, 0.25, deep), hsv_to_rgb((hue + 0.1) % 1, 0.2, 0.9)])
    blue = draw.uniform(0.52, 0.64)
    sky = torch.stack([hsv_to_rgb(blue, 0.45, 0.95), hsv_to_rgb(blue, 0.12, 1.0)])
    floor, cells = ("ground_checker", 1.5) if draw.whole(0, 1) else ("noise", 0.8)
    background = Body("background", "sky", SKY_RADIUS * ones, random_texture(generator, "noise", 4, sky), still)
    plane = Body("ground", "ground", ones, random_texture(generator, floor, cells * draw.uniform(1, 1.6), ground, fade=5), still)
    azimuth, elevation = draw.uniform(0, 2 * math.pi), math.radians(draw.uniform(45, 70))
    flat = math.cos(elevation)
    light = torch.tensor([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)], dtype=torch.float64)
    return World((background, plane, *SCENES[scene](draw, seconds)), light)
