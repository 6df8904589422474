"""Reading and writing video files with PyAV.

A clip is a tensor ``[T, 3, H, W]`` in RGB: uint8 in 0..255, or floating in 0..1.
"""

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidkern._files import replacing
from vidkern.errors import UserError, import_extra

# name -> (FFmpeg encoder, pixel format, default CRF; None: lossless)
CODECS = {
    "h264": ("libx264", "yuv420p", 18),
    "vp9": ("libvpx-vp9", "yuv420p", 30),
    "ffv1": ("ffv1", "bgr0", None),
}


class VideoValueError(UserError, ValueError):
    """An argument of a video function, or the content of a video, is not what was expected."""


class VideoFileError(UserError, OSError):
    """A video file cannot be opened, decoded or written."""


@dataclass(frozen=True)
class Video:
    """A decoded clip.

    Attributes:
        frames: ``[T, 3, H, W]``, RGB, uint8 (0..255) or float32 (0..1).
        fps: frames of this clip per second; the file's rate divided by ``stride``.
        path: the file it came from.
    """

    frames: Tensor
    fps: Fraction
    path: Path

    def __len__(self) -> int:
        return len(self.frames)


def read_video(
    path: str | os.PathLike,
    *,
    start: int = 0,
    max_frames: int | None = None,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Video:
    """Decodes a video file, or a part of it, into memory.

    Args:
        path: any file that FFmpeg reads; its first video stream is taken, sound is ignored.
        start: index of the first frame taken, counted in the file.
        max_frames: at most this many frames are returned; None reads to the end.
        stride: every ``stride``-th frame is taken.
        size: ``(height, width)``. Frames are scaled to cover it, then cropped at the centre (the aspect ratio is kept).
            None keeps the file's size.
        dtype: ``torch.uint8`` (0..255) or ``torch.float32`` (0..1).

    Returns:
        A :class:`Video` with at least one frame. It has fewer than ``max_frames`` frames where the file ends earlier.

    Raises:
        VideoValueError: an argument is out of range, or the file has no frame at ``start``.
        VideoFileError: the file is missing, unreadable or not a video.
        MissingExtra: PyAV is not installed.
    """
    path = Path(path)
    for name, value, least in (("start", start, 0), ("stride", stride, 1), ("max_frames", max_frames, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise VideoValueError(f"{name}={value!r}: expected an integer of at least {least}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise VideoValueError(f"size={size!r}: expected (height, width) in pixels")
    if dtype not in (torch.uint8, torch.float32):
        raise VideoValueError(f"dtype={dtype}: expected torch.uint8 or torch.float32")
    if not path.is_file():
        raise VideoFileError(f"{path}: {'a folder, not a video file' if path.is_dir() else 'no such file'}")
    av, tqdm = import_extra("av", "reading video"), import_extra("tqdm", "reading video").tqdm

    frames, seen = [], 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoFileError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            count = len(range(start, stream.frames, stride)) or None  # the container may not know its length: 0
            count = count if max_frames is None else min(count or max_frames, max_frames)
            # disable=None: no bar unless a person looks at a terminal; delay: nor for what takes under two seconds
            with tqdm(total=count, desc=f"reading {path.name}", unit="frame", delay=2, leave=False, disable=None) as bar:
                for seen, frame in enumerate(container.decode(stream), start=1):
                    if seen > start and (seen - 1 - start) % stride == 0:
                        frames.append(_to_rgb(frame, size))
                        bar.update()
                        if len(frames) == max_frames:
                            break
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise VideoFileError(f"{path}: cannot be read as a video ({error.strerror or error})") from error
    if not frames:
        raise VideoValueError(f"{path}: start={start}, but the video has {seen} frame{'s' * (seen != 1)}")
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return Video(clip if dtype == torch.uint8 else clip.to(dtype).div_(255), fps / stride, path)


def _to_rgb(frame, size: tuple[int, int] | None) -> np.ndarray:
    """One decoded frame as ``[H, W, 3]`` uint8, scaled to cover ``size`` and cropped at the centre."""
    if size is None or size == (frame.height, frame.width):
        return frame.to_ndarray(format="rgb24")
    height, width = size
    scale = max(height / frame.height, width / frame.width)
    scaled_height, scaled_width = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    rgb = frame.to_ndarray(
        format="rgb24", width=scaled_width, height=scaled_height, interpolation="AREA" if scale < 1 else "BICUBIC"
    )
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return rgb[top : top + height, left : left + width]


def write_video(
    path: str | os.PathLike,
    frames: Tensor,
    fps: Fraction | float,
    *,
    codec: str = "h264",
    quality: int | None = None,
) -> Path:
    """Writes a clip to a video file. The file appears under its name only when it is complete.

    Args:
        path: the suffix chooses the container (.mp4, .mkv, .webm, .avi …).
        frames: ``[T, 3, H, W]``, RGB: uint8, or floating in 0..1 (values outside are clamped).
        fps: frames per second, above 0.
        codec: "h264" or "vp9" (for viewing; yuv420p, odd sizes are padded to even ones by repeating the last row or
            column), or "ffv1" (lossless: reading gives back the same uint8 frames; use .mkv or .avi).
        quality: CRF of h264 (0..51, default 18) and vp9 (0..63, default 30); smaller is better and larger files.

    Returns:
        ``path``.

    Raises:
        VideoValueError: wrong rank, dtype, values (NaN), fps, codec or quality, or a suffix that no container has.
        VideoFileError: the folder does not exist or cannot be written.
        MissingExtra: PyAV is not installed.
    """
    path = Path(path)
    if codec not in CODECS:
        raise VideoValueError(f"codec={codec!r}: expected one of {', '.join(CODECS)}")
    encoder, pixels, crf = CODECS[codec]
    if quality is not None and (crf is None or not 0 <= quality <= (51 if codec == "h264" else 63)):
        expected = "None, it is lossless" if crf is None else f"0..{51 if codec == 'h264' else 63}"
        raise VideoValueError(f"quality={quality!r}: for codec {codec} expected {expected}")
    if not 0 < fps < float("inf"):
        raise VideoValueError(f"fps={fps!r}: expected a number above 0")
    frames = _to_bytes(frames)
    if pixels == "yuv420p":
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    av = import_extra("av", "writing video")
    if not path.parent.is_dir():
        raise VideoFileError(f"{path}: the folder {path.parent} does not exist")
    try:
        with replacing(path) as fresh, av.open(str(fresh), "w") as container:
            stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(65535))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
            if crf is not None:
                stream.options = {"crf": str(crf if quality is None else quality)} | ({"b": "0"} if codec == "vp9" else {})
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, ValueError):  # FFmpeg's "invalid argument" too: this container does not hold this codec
            message = f"{path}: {codec} cannot be written to a {path.suffix or 'nameless'} file ({reason})"
            raise VideoValueError(message) from error
        raise VideoFileError(f"{path}: cannot be written ({reason})") from error
    return path


def _to_bytes(frames: Tensor) -> np.ndarray:
    """``[T, 3, H, W]`` uint8 or floating 0..1 -> ``[T, H, W, 3]`` uint8, contiguous."""
    shape = list(getattr(frames, "shape", ()))
    if not isinstance(frames, Tensor) or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise VideoValueError(f"frames of type {type(frames).__name__}, shape {shape}: expected a tensor [T, 3, H, W]")
    if frames.is_floating_point():
        frames = frames.detach().float()
        if frames.isnan().any():
            raise VideoValueError("frames: expected values in 0..1, found NaN")
        frames = frames.clamp(0, 1).mul(255).round().to(torch.uint8)
    elif frames.dtype != torch.uint8:
        raise VideoValueError(f"frames of {frames.dtype}: expected torch.uint8 or a floating type")
    return np.ascontiguousarray(frames.permute(0, 2, 3, 1).cpu().numpy())
