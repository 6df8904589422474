"""Reading and writing video."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from vidkern.data import bundled_clip, bundled_clips, read_video, write_video
from vidkern.data.video import VideoFileError, VideoValueError
from vidkern.errors import MissingExtra, UserError


def moving_squares(T=7, height=46, width=63, seed=0):
    """[T, 3, H, W] uint8 with smooth and sharp parts."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 255, width).expand(T, 3, height, width).clone()
    for t in range(T):
        ramp[t, t % 3, 5 : 5 + t + 3, 4 * t : 4 * t + 12] = torch.randint(0, 256, (1,), generator=generator).float()
    return ramp.to(torch.uint8)


def psnr(a, b):
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_ffv1_gives_back_the_same_bytes(tmp_path, suffix):
    frames = torch.randint(0, 256, (5, 3, 37, 51), dtype=torch.uint8)
    video = read_video(write_video(tmp_path / f"a{suffix}", frames, Fraction(30000, 1001), codec="ffv1"))
    assert torch.equal(video.frames, frames)
    assert video.frames.is_contiguous() and abs(float(video.fps) - 30000 / 1001) < 1e-3 and len(video) == 5


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("vp9", ".webm")])
def test_a_clip_for_viewing_is_close_and_even_sized(tmp_path, codec, suffix):
    frames = moving_squares()
    video = read_video(write_video(tmp_path / f"a{suffix}", frames, 12.5, codec=codec, quality=5))
    assert video.frames.shape == (7, 3, 46, 64) and video.fps == Fraction(25, 2)
    assert psnr(video.frames[..., :63], frames) > 28
    assert psnr(video.frames[..., 63:], frames[..., 62:]) > 28, "the column that was added repeats the last one"


def test_quality_changes_the_size(tmp_path):
    frames = read_video(bundled_clip(), max_frames=10).frames
    sizes = [os.path.getsize(write_video(tmp_path / f"{q}.mp4", frames, 10, quality=q)) for q in (15, 40)]
    assert sizes[0] > 2 * sizes[1]


def test_floats_are_rounded_and_clamped(tmp_path):
    frames = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 1.5]).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        video = read_video(write_video(tmp_path / "a.mkv", frames.to(dtype), 5, codec="ffv1"))
        assert video.frames[:, 0, 0, 0].tolist() == [0, 0, 64, 128, 255, 255]
    video = read_video(tmp_path / "a.mkv", dtype=torch.float32)
    assert video.frames.dtype == torch.float32 and video.frames[2, 0, 0, 0] == 64 / 255 and video.frames.max() == 1


def test_start_stride_and_max_frames(tmp_path):
    frames = torch.arange(20, dtype=torch.uint8).mul(10).view(20, 1, 1, 1).expand(20, 3, 8, 8).contiguous()
    path = write_video(tmp_path / "a.mkv", frames, 24, codec="ffv1")
    video = read_video(path, start=3, stride=4, max_frames=3)
    assert (video.frames[:, 0, 0, 0] // 10).tolist() == [3, 7, 11] and video.fps == 6
    assert len(read_video(path, start=3, stride=4)) == 5 and len(read_video(path, max_frames=100)) == 20
    with pytest.raises(VideoValueError, match=r"a\.mkv: start=20, but the video has 20 frames"):
        read_video(path, start=20)


def test_size_covers_then_crops_at_the_centre(tmp_path):
    frames = torch.zeros(2, 3, 40, 80, dtype=torch.uint8)
    frames[..., 20:60] = 200  # the middle square of a frame twice as wide as high
    path = write_video(tmp_path / "a.mkv", frames, 5, codec="ffv1")
    small = read_video(path, size=(20, 20)).frames
    assert small.shape == (2, 3, 20, 20) and small[..., 1:-1].min() > 195
    assert torch.equal(read_video(path, size=(40, 40)).frames, frames[..., 20:60])
    assert read_video(path, size=(55, 33)).frames.shape == (2, 3, 55, 33)


def test_bundled_clips():
    for name in bundled_clips():
        video = read_video(bundled_clip(name))
        assert video.frames.shape[1:] == (3, 240, 320) and len(video) > 100
        frames = read_video(bundled_clip(name), stride=8, dtype=torch.float32).frames
        step = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
        assert 0.002 < step.mean(), "something moves"
        assert step.max() < 0.15, "one shot: no cut"
    assert bundled_clip() == bundled_clip("box")
    assert sum(bundled_clip(name).stat().st_size for name in bundled_clips()) < 1_500_000
    notice = bundled_clip().with_name("NOTICE.txt").read_text()
    assert all(f"{name}.mp4\n" in notice for name in bundled_clips())
    with pytest.raises(UserError, match="name='cat': expected one of box, bunny"):
        bundled_clip("cat")


def check_is_one_line(error):
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_reading_what_is_no_video(tmp_path):
    text = tmp_path / "a.mp4"
    text.write_text("this is not a video")
    (tmp_path / "empty.mp4").touch()
    cases = {
        tmp_path / "absent.mp4": "no such file",
        tmp_path: "a folder, not a video file",
        text: "cannot be read as a video",
        tmp_path / "empty.mp4": "cannot be read as a video",
    }
    for path, message in cases.items():
        with pytest.raises(VideoFileError, match=message) as error:
            read_video(path)
        check_is_one_line(error)
        assert str(path) in str(error.value) and isinstance(error.value, OSError)


def test_reading_sound_only(tmp_path):
    import av
    import numpy as np

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoFileError, match="holds no video stream"):
        read_video(path)


def test_a_file_that_was_cut_off(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", moving_squares(), 10)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoFileError, match="cannot be read as a video"):
        read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(start=-1), "start=-1: expected an integer of at least 0"),
        (dict(stride=0), "stride=0: expected an integer of at least 1"),
        (dict(max_frames=0), "max_frames=0: expected an integer of at least 1"),
        (dict(max_frames=1.5), "max_frames=1.5: expected an integer"),
        (dict(size=(0, 5)), r"size=\(0, 5\): expected \(height, width\)"),
        (dict(dtype=torch.float16), "dtype=torch.float16: expected torch.uint8 or torch.float32"),
    ],
)
def test_bad_arguments_of_read(arguments, message):
    with pytest.raises(VideoValueError, match=message) as error:
        read_video(bundled_clip(), **arguments)
    check_is_one_line(error)


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"shape \[3, 8, 8\]: expected a tensor \[T, 3, H, W\]"),
        (torch.zeros(2, 8, 8, 3), {}, r"shape \[2, 8, 8, 3\]: expected a tensor \[T, 3, H, W\]"),
        (torch.zeros(0, 3, 8, 8), {}, r"shape \[0, 3, 8, 8\]"),
        (None, {}, "frames of type NoneType"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), {}, "frames of torch.int64: expected torch.uint8 or a floating type"),
        (torch.full((2, 3, 8, 8), float("nan")), {}, "found NaN"),
        (torch.zeros(2, 3, 8, 8), dict(fps=0), "fps=0: expected a number above 0"),
        (torch.zeros(2, 3, 8, 8), dict(codec="mpeg1"), "codec='mpeg1': expected one of h264, vp9, ffv1"),
        (torch.zeros(2, 3, 8, 8), dict(quality=99), r"quality=99: for codec h264 expected 0\.\.51"),
        (torch.zeros(2, 3, 8, 8), dict(codec="ffv1", quality=3), "quality=3: for codec ffv1 expected None"),
        (torch.zeros(2, 3, 8, 8), dict(path="a.nonsense"), r"a\.nonsense: h264 cannot be written to a \.nonsense file"),
        (torch.zeros(2, 3, 8, 8), dict(path="a.webm"), r"a\.webm: h264 cannot be written to a \.webm file"),
    ],
)
def test_bad_arguments_of_write(tmp_path, frames, arguments, message):
    arguments = {"fps": 10, "path": "a.mp4"} | arguments
    path = tmp_path / arguments.pop("path")
    with pytest.raises(VideoValueError, match=message) as error:
        write_video(path, frames, **arguments)
    check_is_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_writing_where_it_cannot_be(tmp_path):
    frames = moving_squares()
    with pytest.raises(VideoFileError, match="the folder .*absent does not exist"):
        write_video(tmp_path / "absent" / "a.mp4", frames, 10)
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(VideoFileError, match=r"a\.mp4: cannot be written"):
        write_video(tmp_path / "a.mp4", frames, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"], "no temporary file is left"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder in which nobody, not even root, may write")
def test_writing_into_a_locked_folder():
    with pytest.raises(VideoFileError, match=r"/sys/a\.mp4: cannot be written \("):
        write_video("/sys/a.mp4", moving_squares(), 10)


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_squares(), 10)
    before = path.read_bytes()
    with pytest.raises(VideoValueError):
        write_video(path, torch.full((2, 3, 8, 8), float("nan")), 10)
    assert path.read_bytes() == before


def test_without_pyav(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: read_video(bundled_clip()), lambda: write_video(tmp_path / "a.mp4", moving_squares(), 10)):
        with pytest.raises(MissingExtra, match=r'needs av, which is not installed: it comes with vidkern.s extra "demo"'):
            call()


def test_importing_the_package_needs_no_pyav():
    program = "import sys\nsys.modules['av'] = None\nfrom vidkern.data import read_video, pseudo_views, bundled_clip"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
