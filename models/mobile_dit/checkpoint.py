"""Checkpoints of cut models: plain [out, in] weights in a safetensors file, with the keep-list in its metadata, and in JSON beside it.

The weights are those of ordinary linears, whether the model is packed or not. Whatever does not fit is refused before a model is touched.
"""

import json
import sys
import warnings
from pathlib import Path

from vidkern._files import replacing
from vidkern.errors import import_extra
from vidkern.nn.state import LayoutError

from .cutting import compact_config, pack, unpack
from .keep import LEVELS, Keep, KeepError, _check, counts
from .model import on_meta

FORMAT = "vidkern.mobile_dit/1"


def keep_path(path):
    """Where the keep-list of a checkpoint lies: model.safetensors -> model.keep.json."""
    return Path(path).with_suffix(".keep.json")


def _own(keep, config):
    """Refuse a keep-list that cannot have made a model of this configuration. The parent is not known: blocks that are not named may be any."""
    _check("blocks", keep.blocks, sys.maxsize, least=1)
    if len(keep.blocks) != len(config.blocks):
        raise KeepError(f"keep: {len(keep.blocks)} blocks, expected the model's {len(config.blocks)}")
    if keep.ffn and keep.group != config.group:
        raise KeepError(f"keep: ffn groups of {keep.group} channels, expected the model's {config.group}")
    for level in LEVELS[1:]:
        for b, kept in getattr(keep, level).items():
            if b not in keep.blocks:
                raise KeepError(f"keep: {level} names block {b}, expected one of the kept blocks {list(keep.blocks)}")
            _check(f"{level} of block {b}", kept, sys.maxsize, least=0)
            here = keep.blocks.index(b)
            found = counts(config.blocks[here], config.group)[level]
            if len(kept) != found:
                raise KeepError(f"keep: {len(kept)} {level} of block {b}, expected {found} as in block {here} of the model")


def save(model, path, keep):
    """Write `path` (safetensors) and its keep-list; both are whole or absent. keep: of the model that this one was cut from.

    Where they replace others, a stop at any moment leaves a checkpoint that loads: the weights are renamed first, and know their list.
    Raises KeepError for a keep-list that is not this model's.
    """
    _own(keep, model.config)
    write = import_extra("safetensors.torch", "writing a checkpoint").save_file
    state = {name: tensor.contiguous() for name, tensor in unpack(model).state_dict().items()}
    with replacing(keep_path(path)) as fresh_list:
        keep.save(fresh_list)
        with replacing(path) as fresh:
            write(state, fresh, metadata={"format": FORMAT, "keep": json.dumps(keep.to_dict())})


def _beside(path, within):
    """Say so where the keep-list beside a file is not its own."""
    try:
        if Keep.load(keep_path(path)).to_dict() == within.to_dict():
            return
    except (KeepError, OSError):
        pass
    warnings.warn(f"{keep_path(path)}: not the keep-list of {path.name}, which is read from {path.name} itself", stacklevel=3)


def load(path, config, *, packed=False, keep=None):
    """The model of a checkpoint. config: of the model that was cut. keep: the keep-list that is expected, None for the file's own.

    The list beside the file is for readers: where it is another one or missing, a warning says so and the file's own is taken.

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
        try:
            within = Keep.from_dict(json.loads(metadata["keep"]), config.group)
        except (KeyError, ValueError) as error:
            raise LayoutError(f"{path}: has no readable keep-list, expected one in its metadata") from error
        if keep is None:
            keep = within
            _beside(path, within)
        if keep.to_dict() != within.to_dict():
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
