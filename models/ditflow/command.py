"""`vidkern motion VIDEO`: the attention motion flow of a clip, as numbers, arrows and colours, as a PNG, a video and an .npz file."""

import math
from pathlib import Path

import torch

from vidkern._files import prepare_folder
from vidkern.data import read_video
from vidkern.data.video import VideoFileError, VideoValueError
from vidkern.errors import UserError, import_extra

from . import data, pictures, runs
from .adapter import TinyAdapter

MODEL_FILE = "model_index.json"
SECONDS = 0.12      # between two frames that are looked at, about, unless --stride says otherwise


def add_arguments(parser):
    """Options of `vidkern motion`."""
    parser.add_argument("video", help="a video file")
    parser.add_argument("--out", default="vidkern-motion", help="folder for the results (default: %(default)s)")
    parser.add_argument("--model", help="name or folder of a diffusers pipeline (CogVideoX, Wan); default: the tiny model of `vidkern demo ditflow`,"
                        " which is trained once, in some minutes, and kept")
    parser.add_argument("--block", type=int, help="transformer block to read (default: the published one; for the tiny model the one that follows"
                        " known translations best)")
    parser.add_argument("--tau", type=float, default=2.0, help="sharpness of the soft flow (default: %(default)s)")
    parser.add_argument("--soft", action="store_true", help="draw the expected displacement instead of the likeliest")
    parser.add_argument("--start", type=int, default=0, help="first frame (default: %(default)s)")
    parser.add_argument("--stride", type=int, help=f"take every so many frames (default: about {SECONDS} seconds for the tiny model, 1 for others)")
    parser.add_argument("--frames", type=int, help="how many, at least 2 (default: 4 for the tiny model, 25 for others)")
    parser.add_argument("--size", help="HEIGHTxWIDTH that the model sees (default: 64x80 for the tiny model, its own for others)")


def run(args):
    """Run the command; returns the exit status. Raises UserError for what the user can mend."""
    for name, least in (("start", 0), ("stride", 1), ("frames", 2), ("block", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if not 0 < args.tau < math.inf:
        raise UserError(f"--tau {args.tau}: expected a positive number")
    if not Path(args.video).is_file():
        raise UserError(f"video {args.video}: no such file, expected a video")
    size = None if args.size is None else parse_size(args.size)
    out = prepare_folder(args.out)
    read = of_tiny if args.model is None else of_pipeline
    frames, flow, what = read(args, size)
    pictures.sheet(frames, flow, out / "motion.png", f"{Path(args.video).name}, {what}")
    pictures.movie(frames, flow, out / "motion.mp4")
    pictures.save_flow(out / "motion.npz", flow)
    print(f"{what}; flow [F, F, h, w, 2] of shape {list(flow.shape)}, in patches")
    for f in range(len(flow) - 1):
        x, y = flow[f, f + 1].flatten(0, 1).median(0).values.tolist()
        print(f"frame {f} to {f + 1}: median ({x:+.2f}, {y:+.2f}), {float((flow[f, f + 1].norm(dim=-1) > 0).float().mean()):.0%} of the patches move")
    print(f"pictures: {out / 'motion.png'}, {out / 'motion.mp4'}; numbers: {out / 'motion.npz'}")
    return 0


def parse_size(text):
    """(height, width) of "HEIGHTxWIDTH"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 64x80")
    return int(parts[0]), int(parts[1])


def read_clip(args, **options):
    """`read_video` of the clip from --start on; its errors name the argument."""
    try:
        return read_video(args.video, start=args.start, **options)
    except (VideoFileError, VideoValueError) as error:
        raise UserError(f"video {error}") from error


def clip_of(args, size, frames, stride):
    """float32 [T, 3, h, w] in 0 .. 1, and the same for the pictures, larger."""
    video = read_clip(args, max_frames=frames, stride=stride, size=size, dtype=torch.float32)
    if len(video) < frames:
        raise UserError(f"video {args.video}: {len(video)} frames from --start {args.start} on, by {stride}, expected {frames}; lower --frames or --stride")
    larger = max(1, round(320 / size[1]))
    shown = read_clip(args, max_frames=frames, stride=stride, size=(size[0] * larger, size[1] * larger), dtype=torch.float32)
    return video.frames, shown.frames


def of_tiny(args, size):
    """(frames to draw on, flow [F, F, h, w, 2], a description) by the tiny model."""
    size, frames = size or (64, 80), args.frames or data.FRAMES
    if any(side % data.PATCH for side in size):
        raise UserError(f"--size {size[0]}x{size[1]}: expected multiples of {data.PATCH}, the patch of the tiny model")
    rate = float(read_clip(args, max_frames=1, size=size).fps)
    clip, shown = clip_of(args, size, frames, args.stride or max(1, round(SECONDS * rate)))
    recipe, folder = runs.Recipe(), runs.user_folder()
    if args.block is not None and args.block >= recipe.blocks:      # before a training of minutes
        raise UserError(f"--block {args.block}: expected 0 to {recipe.blocks - 1} for the tiny model")
    if not (folder / recipe.name(0)).is_file():
        print(f"training the tiny model once, some minutes; it is kept as {folder / recipe.name(0)} (Ctrl-C stops, the next call continues)", flush=True)
    adapter = TinyAdapter(runs.model_of(recipe, 0, folder))
    if args.block is None:
        block = runs.choose_block(adapter, runs.probes(recipe, 0), args.tau)[1][0].block
    else:
        block = args.block
    flow = runs.flow_of(adapter, clip * 2 - 1, block, "soft" if args.soft else "hard", args.tau)
    return shown, pictures.square(flow, adapter.grid(clip[None])), f"block {block} of the tiny model"


def check_model(name):
    """UserError unless `name` is the folder of a pipeline, or a name on the hub that is kept here or that the hub can be asked for now.

    diffusers would try again for half a minute before it said that it could not, and then not that there is no connection.
    """
    expected = f"expected a folder with {MODEL_FILE}, or the name of a pipeline on the Hugging Face hub, such as THUDM/CogVideoX-2b"
    if Path(name).is_dir():
        if not (Path(name) / MODEL_FILE).is_file():
            raise UserError(f"--model {name}: a folder without {MODEL_FILE}, {expected}")
        return
    hub = import_extra("huggingface_hub", "--model")
    try:
        if isinstance(hub.try_to_load_from_cache(name, MODEL_FILE), str):
            return
    except ValueError as error:
        raise UserError(f"--model {name}: no such folder, and no name that the hub could have, {expected}") from error
    try:
        hub.get_session().head(hub.hf_hub_url(name, MODEL_FILE), timeout=10)
    except Exception as error:      # requests' or httpx', by the hub's release; an answer of any status is none of them
        raise UserError(f"--model {name}: no such folder, and the hub, which may have it, cannot be reached ({error}); {expected}") from error


def of_pipeline(args, size):
    """The same by a diffusers pipeline."""
    from vidkern.integrations.diffusers.motion_pipeline import MotionTransferPipeline, read_motion

    from .config import GuidanceConfig

    check_model(args.model)
    config = None if args.block is None else GuidanceConfig(blocks=(args.block,), inject=(), tau=args.tau)
    try:
        transfer = MotionTransferPipeline.from_pretrained(args.model, config)
        size = size or transfer.default_size()
        clip, shown = clip_of(args, size, args.frames or 25, args.stride or 1)
        flow, block = read_motion(transfer, clip, tau=args.tau, mode="soft" if args.soft else "hard")
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--model {args.model}: {error}") from error
    step = transfer.pipe.vae_scale_factor_temporal * transfer.temporal_patch()
    index = [min(i * step, len(shown) - 1) for i in range(len(flow))]
    return shown[index], flow, f"block {block} of {args.model}"
