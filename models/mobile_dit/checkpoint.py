"""Checkpoints of cut models: plain [out, in] weights in a safetensors file, and the keep-list in JSON beside it.

The weights are those of ordinary linears, whether the model is packed or not. Whatever does not fit is refused before a model is touched.
"""

import json
from pathlib import Path

from vidkern._files import replacing
from vidkern.errors import import_extra
from vidkern.nn.state import LayoutError

from .cutting import compact_config, pack, unpack
from .keep import Keep, KeepError
from .model import on_meta

FORMAT = "vidkern.mobile_dit/1"


def keep_path(path):
    """Where the keep-list of a checkpoint lies: model.safetensors -> model.keep.json."""
    return Path(path).with_suffix(".keep.json")


def save(model, path, keep):
    """Write `path` (safetensors) and its keep-list; both are whole or absent. keep: of the model that this one was cut from."""
    if len(keep.blocks) != len(model.blocks):
        raise KeepError(f"keep: {len(keep.blocks)} blocks, expected the model's {len(model.blocks)}")
    write = import_extra("safetensors.torch", "writing a checkpoint").save_file
    state = {name: tensor.contiguous() for name, tensor in unpack(model).state_dict().items()}
    with replacing(path) as fresh:
        write(state, fresh, metadata={"format": FORMAT, "keep": json.dumps(keep.to_dict())})
        keep.save(keep_path(path))


def load(path, config, *, packed=False, keep=None):
    """The model of a checkpoint. config: of the model that was cut. keep: a keep-list instead of the one beside the file.

    Raises LayoutError when the file is not such a checkpoint, when its keep-list and its tensors disagree, or when `config` is another parent's;
    KeepError for a keep-list that does not fit `config`.
    """
    opened = import_extra("safetensors", "reading a checkpoint").safe_open
    path = Path(path)
    if not path.is_file():
        raise LayoutError(f"{path}: no such file, expected a checkpoint")
    try:
        file = opened(path, framework="pt")
    except Exception as error:
        raise LayoutError(f"{path}: {error}, expected a safetensors file") from error
    with file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise LayoutError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}")
        if keep is None:
            beside = keep_path(path)
            if not beside.is_file():
                raise LayoutError(f"{beside}: no such file, expected the keep-list of {path.name}")
            keep = Keep.load(beside, config.group)
        if keep.to_dict() != json.loads(metadata["keep"]):
            raise LayoutError(f"{path}: was saved with another keep-list than the given one")
        cut = compact_config(config, keep, allow_no_heads=True)
        model = on_meta(cut)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = set(file.keys())
        for name in sorted(set(expected) ^ names):
            raise LayoutError(f"{path}: {name} is {'missing' if name in expected else 'not expected'} for this configuration and keep-list")
        for name, shape in expected.items():
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise LayoutError(f"{path}: {name} has shape {found}, expected {shape}")
        state = {name: file.get_tensor(name) for name in expected}
    model.load_state_dict(state, assign=True)
    return pack(model) if packed else model
