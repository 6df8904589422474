"""What the demo learns from and transfers between: windows of the bundled clips, at rest or moving over the picture."""

import dataclasses
import functools

import torch
import torch.nn.functional as F

from vidkern.data import bundled_clip, bundled_clips, read_video

FRAMES, SIZE = 4, (32, 40)       # of a clip that the tiny model sees, in pixels
PATCH = 4
SPEED = 6                        # greatest motion of a training window along an axis, pixels a frame; most move by whole patches
STRIDES = (0, 0, 1, 2)           # frames of the clip between two frames of a window, drawn evenly; 0: a still
HEIGHTS = (48, 64, 96)           # of the pictures that windows are cut from
TRAIN_SHARE = 0.75               # of the frames of a clip; the rest is held out


@dataclasses.dataclass(frozen=True)
class Source:
    """pictures: {height: uint8 [n, 3, height, width]} of one clip, all frames in order."""

    name: str
    pictures: dict

    @property
    def split(self):
        """First held-out frame."""
        return int(len(next(iter(self.pictures.values()))) * TRAIN_SHARE)

    def window(self, height, start, stride, corner, motion, frames=FRAMES, size=SIZE):
        """float32 [frames, 3, h, w] in -1 .. 1: frames start, start + stride, ... seen through a moving window.

        motion: (x, y) pixels that what is at rest moves in a frame; the window goes the other way. corner: (x, y), its top left in the first frame.
        """
        pictures, cut = self.pictures[height], []
        for i in range(frames):
            x, y = (c - i * m for c, m in zip(corner, motion))
            if min(x, y) < 0 or x + size[1] > pictures.shape[3] or y + size[0] > pictures.shape[2]:
                raise ValueError(f"corner={tuple(corner)}, motion={tuple(motion)}: frame {i} leaves the picture, height {height}")
            cut.append(pictures[start + i * stride, :, y : y + size[0], x : x + size[1]])
        return torch.stack(cut).float() / 127.5 - 1

    def draw(self, generator, *, height=None, motion=None, stride=None, held_out=False):
        """A window of random place, height, motion and stride where they are not given; frames of the first three quarters, or held-out ones."""
        def number(low, high):
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        height = HEIGHTS[number(0, len(HEIGHTS) - 1)] if height is None else height
        pictures = self.pictures[height]
        stride = STRIDES[number(0, len(STRIDES) - 1)] if stride is None else stride
        room = (pictures.shape[3] - SIZE[1], height - SIZE[0])
        if motion is None:
            reach, whole = [min(SPEED, r // (FRAMES - 1)) for r in room], number(0, 3) > 0
            motion = tuple(PATCH * number(-(r // PATCH), r // PATCH) if whole else number(-r, r) for r in reach)
        first, last = (self.split, len(pictures)) if held_out else (0, self.split)
        start = number(first, last - 1 - (FRAMES - 1) * stride)
        corner = [number(max(0, m * (FRAMES - 1)), r + min(0, m * (FRAMES - 1))) for r, m in zip(room, motion)]
        return self.window(height, start, stride, corner, motion)


@functools.cache
def sources():
    """The bundled clips, in the order of their labels."""
    made = []
    for name in bundled_clips():
        frames = read_video(bundled_clip(name), size=(192, 256)).frames
        made.append(Source(name, {h: F.interpolate(frames.float(), (h, h * 4 // 3), mode="bilinear", antialias=True).round().byte() for h in HEIGHTS}))
    return tuple(made)


def batch(size, generator, drop=0.1):
    """(clips [size, FRAMES, 3, h, w], labels [size]) of training windows; a share `drop` has the null label."""
    known = sources()
    labels = torch.randint(len(known), (size,), generator=generator)
    clips = torch.stack([known[i].draw(generator) for i in labels.tolist()])
    dropped = torch.rand(size, generator=generator) < drop
    return clips, torch.where(dropped, len(known), labels)
