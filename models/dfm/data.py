"""What the demo trains on: scikit-learn's handwritten digits, and crops of the bundled clip; and its measures of quality for each."""

import dataclasses
import functools

import torch

from vidkern.errors import UserError, import_extra

SPLIT_SEED = 0
NAMES = ("digits", "clip")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """train, held_out: [N, C, H, W] in -1 .. 1; labels, held_out_labels: int64 [N] or None. measure: `quality.Measure` of this data."""

    name: str
    what: str
    train: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor | None
    held_out_labels: torch.Tensor | None
    measure: object

    @property
    def classes(self):
        """How many kinds the labels tell apart; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def batch(self, size, generator):
        """(pictures, labels or None), drawn with replacement."""
        index = torch.randint(len(self.train), (size,), generator=generator)
        return self.train[index], None if self.labels is None else self.labels[index]


@functools.cache
def open_pictures(name, *, quick=False):
    """The data set `name`, the same object every time; quick: with fewer crops."""
    if name not in NAMES:
        raise UserError(f"--data {name}: expected one of {', '.join(NAMES)}")
    return digits() if name == "digits" else clip(count=512, held_out=128) if quick else clip()


def digits(train=1200):
    """1797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn): `train` to learn from, the others held out."""
    from .quality import ClassifierMeasure

    source = import_extra("sklearn.datasets", "the digits demo").load_digits()
    order = torch.randperm(len(source.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
    pictures = (torch.from_numpy(source.images).float() / 8 - 1)[order, None]
    labels = torch.from_numpy(source.target).long()[order]
    measure = ClassifierMeasure(pictures[:train], labels[:train], pictures[train:], labels[train:])
    return Pictures("digits", "handwritten digits, 8x8 pixels", pictures[:train], pictures[train:], labels[:train], labels[train:], measure)


def clip(size=32, height=72, count=4096, held_out=1024):
    """Random crops of the bundled clip "bunny", `size` pixels of frames `height` pixels high; held out: the same of its last quarter."""
    from vidkern.data import bundled_clip, read_video

    from .quality import CropMeasure

    frames = read_video(bundled_clip("bunny"), size=(height, height * 4 // 3), dtype=torch.float32).frames * 2 - 1
    cut = len(frames) * 3 // 4
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts = [_crops(part, size, number, generator) for part, number in ((frames[:cut], count), (frames[cut:], held_out))]
    what = f"crops of {size}x{size} pixels of an animated film"
    return Pictures("clip", what, *parts, None, None, CropMeasure(*parts))


def _crops(frames, size, count, generator):
    """Crops [count, C, size, size], every second one mirrored."""
    def draw(limit):
        return torch.randint(limit, (count,), generator=generator).tolist()

    places = zip(draw(len(frames)), draw(frames.shape[2] - size + 1), draw(frames.shape[3] - size + 1))
    crops = torch.stack([frames[t, :, y : y + size, x : x + size] for t, y, x in places])
    crops[::2] = crops[::2].flip(-1)
    return crops
