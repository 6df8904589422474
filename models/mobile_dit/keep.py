"""What can be removed: whole blocks, heads of self- and cross-attention, groups of FFN channels; as keep-lists and as masks."""

import dataclasses
import json
from typing import NamedTuple

import torch

from vidkern._files import replacing

LEVELS = ("block", "heads", "xheads", "ffn")
MASK_OF = {"block": "block", "heads": "heads", "xheads": "cross_heads", "ffn": "ffn"}


class KeepError(ValueError):
    """A keep-list that does not fit; one line that names the entry, its value and what was expected."""


class Unit(NamedTuple):
    """One removable part. level: one of LEVELS. block: its index. index: head or group within the block, -1 for the block itself."""

    level: str
    block: int
    index: int = -1


def counts(spec, group):
    """{"heads", "xheads", "ffn"}: how many units of each level a block has."""
    return {"heads": spec.heads, "xheads": spec.cross_heads, "ffn": spec.hidden // group}


def units(config):
    """Every unit of a configuration, blocks first."""
    found = [Unit("block", b) for b in range(len(config.blocks))]
    for b, spec in enumerate(config.blocks):
        found += [Unit(level, b, i) for level, n in counts(spec, config.group).items() for i in range(n)]
    return found


@dataclasses.dataclass(frozen=True)
class Keep:
    """What is kept, by the indices of the parent model, sorted. heads, xheads, ffn: {block: indices}; a block that is not named keeps all.

    group: FFN channels per index in `ffn`. As JSON: ``{"blocks": [..], "heads": {"3": [0, 2]}, "xheads": {..},
    "ffn": {"3": {"group": 128, "keep": [..]}}}``.
    """

    blocks: tuple
    heads: dict
    xheads: dict
    ffn: dict
    group: int

    @classmethod
    def everything(cls, config):
        n = range(len(config.blocks))
        per = {level: {b: tuple(range(counts(config.blocks[b], config.group)[level])) for b in n} for level in LEVELS[1:]}
        return cls(tuple(n), per["heads"], per["xheads"], per["ffn"], config.group)

    def of(self, level, block, config):
        """Kept indices of a level within a block."""
        kept = getattr(self, level).get(block)
        return tuple(range(counts(config.blocks[block], config.group)[level])) if kept is None else tuple(kept)

    def without(self, *removed):
        """The same without some units that it has."""
        blocks = tuple(b for b in self.blocks if Unit("block", b) not in removed)
        parts = {level: {b: tuple(i for i in kept if Unit(level, b, i) not in removed) for b, kept in getattr(self, level).items() if b in blocks}
                 for level in LEVELS[1:]}
        return Keep(blocks, **parts, group=self.group)

    def has(self, unit, config):
        """Whether a unit of the parent is kept; a unit of a removed block is not."""
        return unit.block in self.blocks and (unit.level == "block" or unit.index in self.of(unit.level, unit.block, config))

    def checked(self, config, *, allow_no_heads=False):
        """This, written out in full, if it fits a parent's configuration; KeepError otherwise.

        allow_no_heads: an attention may lose all its heads; what is left of it is its output bias, which is not the same as no attention.
        """
        if self.group != config.group:
            raise KeepError(f"ffn: group={self.group}, expected the model's own, {config.group}")
        _check("blocks", self.blocks, len(config.blocks), least=1)
        parts = {}
        for level in LEVELS[1:]:
            named = getattr(self, level)
            for b in named:
                if b not in self.blocks:
                    raise KeepError(f"{level}: names block {b}, expected one of the kept blocks {list(self.blocks)}")
            parts[level] = {b: self.of(level, b, config) for b in self.blocks}
            for b, kept in parts[level].items():
                total = counts(config.blocks[b], config.group)[level]
                least = 0 if allow_no_heads and level != "ffn" or total == 0 else 1
                _check(f"{level} of block {b}", kept, total, least=least)
        return Keep(tuple(self.blocks), **parts, group=self.group)

    def to_dict(self):
        """The interchange form."""
        return {"blocks": list(self.blocks), "heads": {str(b): list(kept) for b, kept in self.heads.items()},
                "xheads": {str(b): list(kept) for b, kept in self.xheads.items()},
                "ffn": {str(b): {"group": self.group, "keep": list(kept)} for b, kept in self.ffn.items()}}

    @classmethod
    def from_dict(cls, value, group=None):
        """From the interchange form; group: of a list that names no FFN channels. KeepError for what is not such a form."""
        try:
            unknown = sorted(set(value) - {"blocks", "heads", "xheads", "ffn"})
            if unknown:
                raise KeepError(f"keep-list: unknown entries {unknown}, expected blocks, heads, xheads, ffn")
            groups = {entry["group"] for entry in value.get("ffn", {}).values()}
            if len(groups) > 1:
                raise KeepError(f"ffn: groups of {sorted(groups)} channels, expected one size")
            heads, xheads = ({int(b): tuple(kept) for b, kept in value.get(name, {}).items()} for name in ("heads", "xheads"))
            ffn = {int(b): tuple(entry["keep"]) for b, entry in value.get("ffn", {}).items()}
            return cls(tuple(value["blocks"]), heads, xheads, ffn, *(groups or {group}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, KeepError):
                raise
            raise KeepError(f"keep-list: {type(error).__name__} {error}, expected "
                            '{"blocks": [..], "heads": {"0": [..]}, "xheads": {..}, "ffn": {"0": {"group": 128, "keep": [..]}}}') from error

    def save(self, path):
        """Write the JSON form; the file is whole or absent."""
        with replacing(path) as fresh:
            fresh.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path, group=None):
        with open(path, encoding="utf-8") as file:
            try:
                value = json.load(file)
            except ValueError as error:
                raise KeepError(f"{path}: {error}, expected a keep-list in JSON") from error
        return cls.from_dict(value, group)


def _check(name, kept, total, least):
    """An index list must hold sorted, unique integers below `total`, at least `least` of them."""
    kept = list(kept)
    if any(not isinstance(i, int) or isinstance(i, bool) for i in kept):
        raise KeepError(f"{name}: {kept}, expected integers")
    if any(not 0 <= i < total for i in kept):
        raise KeepError(f"{name}: {next(i for i in kept if not 0 <= i < total)} is out of range, expected 0 to {total - 1}")
    if len(set(kept)) < len(kept):
        raise KeepError(f"{name}: {kept} repeats {next(i for i in kept if kept.count(i) > 1)}, expected every index once")
    if sorted(kept) != kept:
        raise KeepError(f"{name}: {kept} is not sorted, expected rising indices")
    if len(kept) < least:
        more = " (or remove the block; allow_no_heads=True keeps the output bias alone)" if "heads" in name else ""
        raise KeepError(f"{name}: none is kept, expected at least {least}{more}")


def unit_masks(config, *, batch=None, device=None, requires_grad=False):
    """Masks of ones for `MobileDiT(..., masks=)`: a list of {"block", "heads", "cross_heads", "ffn"}, each [n] or, with batch, [batch, n]."""
    lead = () if batch is None else (batch,)

    def ones(*shape):
        return torch.ones(lead + shape, device=device, requires_grad=requires_grad)

    return [{"block": ones(), **{MASK_OF[level]: ones(n) for level, n in counts(spec, config.group).items()}} for spec in config.blocks]


def masks_of(keep, config, device=None):
    """The masks of a keep-list, 0 for what is removed."""
    masks = unit_masks(config, device=device)
    for b, found in enumerate(masks):
        found["block"].fill_(float(b in keep.blocks))
        if b in keep.blocks:
            for level in LEVELS[1:]:
                mask = found[MASK_OF[level]].zero_()
                mask[list(keep.of(level, b, config))] = 1.0
    return masks


def set_unit(masks, unit, value):
    """A copy of the masks in which one unit has another value."""
    masks = list(masks)
    masks[unit.block] = dict(masks[unit.block])
    name = MASK_OF[unit.level]
    mask = masks[unit.block][name].clone()
    mask[... if unit.level == "block" else unit.index] = value
    masks[unit.block][name] = mask
    return masks


def keep_of(masks, config):
    """The keep-list of masks in {0, 1}. FFN masks and head masks may be given per channel; a head or group that is only partly kept is refused."""
    blocks, parts = [], {level: {} for level in LEVELS[1:]}
    for b, (spec, found) in enumerate(zip(config.blocks, masks, strict=True)):
        if not _binary(f"block {b}", found["block"]):
            continue
        blocks.append(b)
        for level, n in counts(spec, config.group).items():
            mask, size = found[MASK_OF[level]], config.group if level == "ffn" else config.head_dim
            if mask.numel() == n * size and size > 1:
                mask = mask.reshape(n, size)
                if not (mask == mask[:, :1]).all():
                    i = int((mask != mask[:, :1]).any(1).nonzero()[0])
                    raise KeepError(f"{level} of block {b}: {int((mask[i] != 0).sum())} of {size} channels of {i} are kept, expected all or none")
                mask = mask[:, 0]
            if mask.shape != (n,):
                raise KeepError(f"{level} of block {b}: mask of shape {tuple(mask.shape)}, expected {n} or {n * size} numbers")
            kept = _binary(f"{level} of block {b}", mask)
            parts[level][b] = tuple(i for i, on in enumerate(kept) if on)
    return Keep(tuple(blocks), **parts, group=config.group)


def _binary(name, mask):
    if not ((mask == 0) | (mask == 1)).all():
        raise KeepError(f"{name}: mask holds {mask[(mask != 0) & (mask != 1)].flatten()[0].item():g}, expected 0 or 1")
    return mask.bool().tolist()
