"""Scenes simulated and drawn by PyBullet: real meshes, physics, a software renderer that needs no graphics driver.

The renderer's depth is that of its triangles at a known place of each pixel, and everything that moves is a rigid link, so depth, link
poses and cameras give exact motion here too. Only what is hidden is read from depth maps instead of rays.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vidkern.data.scenes.cameras import Rig, rigid
from vidkern.data.scenes.clip import SceneClip
from vidkern.data.scenes.definitions import GRAVITY, Draw
from vidkern.data.scenes.textures import hsv_to_rgb
from vidkern.errors import import_extra

CLIP_NEAR, CLIP_FAR = 0.5, 60.0  # scene units; the room ends before the far plane
ROOM = 12.0  # half the width of the room, scene units
SIMULATION_RATE = 240.0  # steps per second, at least
BODY_BITS = 24  # a segmentation value is body + ((link + 1) << BODY_BITS)


class Simulation:
    """A simulation of its own inside PyBullet: its functions as methods, its constants as attributes."""

    def __init__(self, pybullet):
        self._pybullet, self._client = pybullet, pybullet.connect(pybullet.DIRECT)

    def __getattr__(self, name):
        found = getattr(self._pybullet, name)
        return functools.partial(found, physicsClientId=self._client) if callable(found) else found


@dataclass
class Stage:
    """What is simulated. names: what each body is. motors: called with the time before each step."""

    sim: Simulation
    draw: Draw
    names: dict[int, str] = field(default_factory=dict)
    motors: list = field(default_factory=list)

    def load(self, name: str, urdf: str, xyz, euler=(0, 0, 0), scale: float = 1.0, fixed: bool = False) -> int:
        """A model of pybullet_data; returns its body number."""
        turn = self.sim.getQuaternionFromEuler(euler)
        number = self.sim.loadURDF(urdf, xyz, turn, useFixedBase=fixed, globalScaling=scale)
        self.names[number] = name
        return number

    def wall(self, half, xyz, colour) -> None:
        """A box that stands still and belongs to the background."""
        shape = self.sim.createVisualShape(self.sim.GEOM_BOX, halfExtents=half, rgbaColor=[*colour, 1], specularColor=[0, 0, 0])
        self.names[self.sim.createMultiBody(0, -1, shape, xyz)] = "background"

    def joint(self, number: int, name: str) -> int:
        found = {self.sim.getJointInfo(number, j)[1].decode(): j for j in range(self.sim.getNumJoints(number))}
        return found[name]

    def paint(self, number: int, colour) -> None:
        for link in range(-1, self.sim.getNumJoints(number)):
            self.sim.changeVisualShape(number, link, rgbaColor=[*colour, 1])

    def links(self) -> list[tuple[int, int, str]]:
        """(body, link, name) of everything but background and ground; link -1 is a body's base."""
        found = []
        for number, name in self.names.items():
            if name in ("background", "ground"):
                continue
            joints = range(self.sim.getNumJoints(number))
            found.append((number, -1, name))
            found += [(number, j, f"{name} {self.sim.getJointInfo(number, j)[12].decode()}") for j in joints]
        return found

    def pose(self, number: int, link: int) -> Tensor:
        """``[4, 4]`` of a frame that moves with the link."""
        if link < 0:
            xyz, turn = self.sim.getBasePositionAndOrientation(number)
        else:
            xyz, turn = self.sim.getLinkState(number, link, computeForwardKinematics=1)[4:6]
        R = torch.tensor(self.sim.getMatrixFromQuaternion(turn), dtype=torch.float64).view(3, 3)
        return rigid(R, torch.tensor(xyz, dtype=torch.float64))

    def advance(self, start: float, end: float) -> None:
        """Simulates from one time to another, seconds."""
        steps = math.ceil((end - start) * SIMULATION_RATE)
        if steps:
            self.sim.setTimeStep((end - start) / steps)
        for index in range(steps):
            for motor in self.motors:
                motor(start + (end - start) * index / steps)
            self.sim.stepSimulation()


def robots(stage: Stage) -> None:
    """A Kuka arm that swings and an R2D2 that drives in a circle, while balls, cubes, ducks and teddies fall around them."""
    sim, draw = stage.sim, stage.draw
    side, turned = draw.sign(), draw.uniform(-math.pi, math.pi)
    arm = stage.load("arm", "kuka_iiwa/model.urdf", [side * 0.9, 0.5, 0], (0, 0, turned), 2.0, fixed=True)
    joints = list(range(sim.getNumJoints(arm)))
    rest = [0.0, 0.5, 0.0, -1.2, 0.0, 0.9, 0.0]
    reach = [0.9, 0.35, 0.5, 0.5, 0.6, 0.5, 1.0]
    pace = [draw.uniform(1.2, 2.6) for _ in joints]
    phase = [draw.uniform(0, 2 * math.pi) for _ in joints]

    def posture(seconds):
        return [r + a * math.sin(w * seconds + p) for r, a, w, p in zip(rest, reach, pace, phase)]

    for j, angle in zip(joints, posture(0)):
        sim.resetJointState(arm, j, angle)
    stage.motors.append(lambda seconds: sim.setJointMotorControlArray(
        arm, joints, sim.POSITION_CONTROL, posture(seconds), forces=[20000.0] * len(joints)))  # fmt: skip

    heading, spin, speed = draw.uniform(0, 2 * math.pi), draw.sign() * draw.uniform(0.7, 1.4), draw.uniform(0.5, 0.9)
    droid = stage.load("droid", "r2d2.urdf", [-side * 0.8, -0.3, 0.62], (0, 0, heading), 1.3)
    head = stage.joint(droid, "head_swivel")

    def drive(seconds):
        direction = heading + spin * seconds
        fall = sim.getBaseVelocity(droid)[0][2]
        sim.resetBaseVelocity(droid, [-speed * math.sin(direction), speed * math.cos(direction), fall], [0, 0, spin])
        sim.setJointMotorControl2(droid, head, sim.POSITION_CONTROL, 1.5 * math.sin(2.0 * seconds), force=500.0)

    stage.motors.append(drive)

    kinds = (
        ("ball", "soccerball.urdf", 0.5),
        ("cube", "cube.urdf", 0.34),
        ("duck", "duck_vhacd.urdf", 6.0),
        ("teddy", "teddy_vhacd.urdf", 5.0),
    )
    count, offset = draw.whole(4, 6), draw.uniform(0, 2 * math.pi)
    for index in range(count):
        name, urdf, scale = kinds[index % len(kinds)]
        angle = offset + 2 * math.pi * index / count + draw.uniform(-0.2, 0.2)
        distance = draw.uniform(1.1, 1.7)
        xyz = [distance * math.cos(angle), distance * math.sin(angle) - 0.3, draw.uniform(0.9, 2.4)]
        euler = [draw.uniform(-math.pi, math.pi) for _ in range(3)]
        number = stage.load(f"{name} {index + 1}", urdf, xyz, euler, scale)
        sim.changeDynamics(number, -1, restitution=draw.uniform(0.5, 0.8))
        sim.resetBaseVelocity(number, [draw.uniform(-0.5, 0.5), draw.uniform(-0.5, 0.5), 0], [draw.uniform(-3, 3) for _ in range(3)])
        if name == "cube":
            stage.paint(number, hsv_to_rgb(draw.uniform(0, 1), 0.7, 0.95).tolist())


SCENES = {"robots": robots}


def room(stage: Stage) -> None:
    """The ground, id 1, and four high walls around everything, id 0."""
    ground = stage.load("ground", "plane.urdf", [0, 0, 0], fixed=True)
    stage.sim.changeDynamics(ground, -1, restitution=0.9)
    hue = stage.draw.uniform(0, 1)
    for index, (x, y) in enumerate(((1, 0), (-1, 0), (0, 1), (0, -1))):
        colour = hsv_to_rgb((hue + 0.08 * index) % 1, 0.3, 0.95).tolist()
        stage.wall([0.1 + ROOM * (x == 0), 0.1 + ROOM * (y == 0), ROOM], [x * ROOM, y * ROOM, ROOM], colour)


def render(scene: str, views: int, moments: Tensor, seconds: Tensor, size: tuple[int, int], generator: torch.Generator, seed: int,
           step: float, rig: Rig, samples: int, shading: bool) -> SceneClip:  # fmt: skip
    """`vidkern.data.scenes.render` for a scene of `SCENES`, its arguments checked. moments: scene times; seconds: camera times.

    Raises:
        MissingExtra: PyBullet is not installed.
    """
    sim = Simulation(import_extra("pybullet", f"scene {scene!r}"))
    try:
        sim.setAdditionalSearchPath(import_extra("pybullet_data", f"scene {scene!r}").getDataPath())
        sim.setGravity(0, 0, -GRAVITY)
        sim.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        stage = Stage(sim, Draw(generator))
        room(stage)
        SCENES[scene](stage)
        light = Light(stage.draw, shading)
        K, world_to_camera = rig.cameras(views, seconds, size, generator)
        links = stage.links()
        known = {number: 0 if name == "background" else 1 for number, name in stage.names.items() if name in ("background", "ground")}
        known |= {number + ((link + 1) << BODY_BITS): index for index, (number, link, _) in enumerate(links, start=2)}
        images, poses, now = [[] for _ in range(views)], [], 0.0
        for t, moment in enumerate(moments.tolist()):
            stage.advance(now, moment)
            now = moment
            poses.append(torch.stack([torch.eye(4, dtype=torch.float64)] * 2 + [stage.pose(n, link) for n, link, _ in links]))
            for v, row in enumerate(images):
                row.append(draw_view(sim, K[v, t], world_to_camera[v, t], size, samples, light, known))
    finally:
        sim.disconnect()
    rgb, depth, ids = (torch.stack([torch.stack([cell[part] for cell in row]) for row in images]) for part in range(3))
    names = ("background", "ground", *(name for _, _, name in links))
    return SceneClip(rgb, depth, ids, K, world_to_camera, torch.stack(poses), names, scene, seed, step)


class Light:
    """Arguments of the renderer. No highlights and no shadows, so that a point looks alike from everywhere; unshaded: ambient light."""

    def __init__(self, draw: Draw, shading: bool):
        azimuth = draw.uniform(0, 2 * math.pi)
        self.arguments = {
            "lightDirection": [6 * math.cos(azimuth), 6 * math.sin(azimuth), 10],
            "lightColor": [1, 1, 1],
            "lightAmbientCoeff": 0.5 if shading else 1.0,
            "lightDiffuseCoeff": 0.5 if shading else 0.0,
            "lightSpecularCoeff": 0.0,
            "shadow": 0,  # the renderer's shadows depend on the camera, and mostly cover the whole ground
        }


def draw_view(sim, K: Tensor, world_to_camera: Tensor, size: tuple[int, int], samples: int, light: Light, known: dict[int, int]):
    """(rgb float32 ``[3, H, W]``, depth float32 ``[H, W]``, ids int64 ``[H, W]``) of one camera now."""
    colours, z, found = camera_image(sim, K, world_to_camera, size, 1, light)
    if samples > 1:
        colours, _, _ = camera_image(sim, K, world_to_camera, size, samples, light)
    height, width = size
    rgb = torch.from_numpy(colours.copy()).float().view(height, samples, width, samples, 3).mean((1, 3)).permute(2, 0, 1) / 255
    depth = CLIP_FAR * CLIP_NEAR / (CLIP_FAR - (CLIP_FAR - CLIP_NEAR) * z.astype(np.float64))
    values, places = np.unique(found, return_inverse=True)
    ids = np.array([known.get(int(value), 0) for value in values])[places].reshape(size)
    return rgb.contiguous(), torch.from_numpy(depth).float(), torch.from_numpy(ids)


def camera_image(sim, K: Tensor, world_to_camera: Tensor, size: tuple[int, int], factor: int, light: Light):
    """(uint8 ``[h, w, 3]``, z buffer ``[h, w]``, segmentation ``[h, w]``) of one camera, enlarged by a whole factor."""
    height, width = (n * factor for n in size)
    fx, fy = (K[0, 0] * factor).item(), (K[1, 1] * factor).item()
    view = np.diag([1.0, -1, -1, 1]) @ world_to_camera.numpy()  # OpenGL's camera looks along -z with y up
    # The renderer samples a pixel half a pixel left of and below its centre; shifting the image by as much puts that right.
    projection = np.array([
        [2 * fx / width, 0, 1 / width, 0],
        [0, 2 * fy / height, 1 / height, 0],
        [0, 0, -(CLIP_FAR + CLIP_NEAR) / (CLIP_FAR - CLIP_NEAR), -2 * CLIP_FAR * CLIP_NEAR / (CLIP_FAR - CLIP_NEAR)],
        [0, 0, -1, 0],
    ])  # fmt: skip
    flat = (view.T.flatten().tolist(), projection.T.flatten().tolist())  # column by column
    flags = sim.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX
    _, _, rgba, z, found = sim.getCameraImage(width, height, *flat, renderer=sim.ER_TINY_RENDERER, flags=flags, **light.arguments)
    colours = np.asarray(rgba, np.uint8).reshape(height, width, 4)[..., :3]
    return colours, np.asarray(z).reshape(height, width), np.asarray(found).reshape(height, width)
