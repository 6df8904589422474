"""Shapes of pyramid levels, the memory they share, and the checks of the public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

KINDS = ("laplacian", "haar", "dct")
FACTORS = ((1, 2, 2), (2, 2, 2))
MAX_LEVELS = 4
_AXES = ("T", "H", "W")


def integer(name: str, value, least: int, expectation: str) -> int:
    """``value`` if it is an integer (or a symbolic size) of at least ``least``; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ValueError(f"{name}: {value!r}, expected {expectation}")
    return value


def tensor(name: str, t) -> torch.Tensor:
    """``t``; TypeError when it is none."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: {type(t).__name__}, expected a torch.Tensor")
    return t


def volume(name: str, x) -> torch.Tensor:
    """A dense floating-point [B, C, H, W] or [B, C, T, H, W] as [B, C, T, H, W]."""
    tensor(name, x)
    if x.dim() not in (4, 5):
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected [B, C, H, W] or [B, C, T, H, W]")
    if not x.is_floating_point():
        raise ValueError(f"{name}: dtype {x.dtype}, expected a floating-point dtype")
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: layout {x.layout}, expected a dense tensor")
    if x.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected no empty dimension")
    return x.unsqueeze(2) if x.dim() == 4 else x


def rules(kind, factor) -> bool:
    """Checks ``kind`` and ``factor``; whether time is pooled too."""
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if not isinstance(factor, (tuple, list)) or tuple(factor) not in FACTORS:
        raise ValueError(f"factor: {factor!r}, expected (1, 2, 2) or (2, 2, 2)")
    return tuple(factor) == (2, 2, 2)


def count(name: str, value) -> int:
    """``value`` if it is a possible number of levels; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LEVELS:
        raise ValueError(f"{name}: {value!r}, expected a number of levels from 1 to {MAX_LEVELS}")
    return value


def divisor(levels: int, kind: str) -> int:
    """What every pooled axis of the finest level must be a multiple of."""
    blocks = 4 if kind == "dct" and levels > 1 else 1
    return blocks << (levels - 1)


def sizes_of(x: torch.Tensor, levels: int, kind: str, pool_time: bool, name: str = "x") -> list[int]:
    """Sizes B, C, then T, H, W of each level of the volume ``x``, flattened as the ops take them.

    Raises:
        ValueError: a pooled axis does not divide.
    """
    need = divisor(levels, kind)
    for axis, size in zip(_AXES, x.shape[2:]):
        if (axis != "T" or pool_time) and size % need:
            raise ValueError(
                f"{name}: {axis} = {size}, expected a multiple of {need} for {levels} {kind} levels (pad with vidkern.pyramid_pad)"
            )
    sizes = [*x.shape[:2]]
    for s in range(levels):
        shrink = 1 << (levels - 1 - s)
        sizes += [x.shape[2] // shrink if pool_time else x.shape[2], x.shape[3] // shrink, x.shape[4] // shrink]
    return sizes


def _kept(function):
    """Remember what a function of sizes gave; symbolic sizes, which a compiler traces, are no keys."""
    remembered = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def call(sizes, *rest):
        if torch.compiler.is_compiling():
            return function(sizes, *rest)
        try:
            return remembered(tuple(sizes), *rest)
        except TypeError:
            return function(sizes, *rest)

    return call


def shapes(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """[B, C, T, H, W] of every level."""
    return [(sizes[0], sizes[1], *sizes[i : i + 3]) for i in range(2, len(sizes), 3)]


def level_count(sizes: Sequence[int]) -> int:
    """How many levels flattened sizes hold."""
    return (len(sizes) - 2) // 3


@_kept
def numel(sizes: Sequence[int], first: int | None = None) -> int:
    """Values of the first (coarsest) ``first`` levels."""
    return sum(math.prod(shape) for shape in shapes(sizes)[:first])


def split(flat: torch.Tensor, sizes: Sequence[int], first: int | None = None) -> list[torch.Tensor]:
    """The levels as views of the memory that they share."""
    return handed_out(flat, places(sizes, 5, first))


@_kept
def places(sizes: Sequence[int], rank: int, first: int | None = None) -> tuple:
    """(shape, strides, offset) of the first ``first`` levels in the memory that they share; without T for rank 4."""
    result, at = [], 0
    for shape in shapes(sizes)[:first]:
        shown = shape if rank == 5 else (*shape[:2], *shape[3:])
        result.append((shown, tuple(math.prod(shown[i + 1 :]) for i in range(len(shown))), at))
        at += math.prod(shape)
    return tuple(result)


def handed_out(flat: torch.Tensor, where: tuple) -> list[torch.Tensor]:
    """The levels at ``places`` as views of a 1-D tensor, for the caller: one call of torch each where no gradient has to find its way
    back."""
    plain = type(flat) is torch.Tensor and not flat.requires_grad and flat.is_contiguous()
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return [p.view(shape) for p, (shape, _, _) in zip(flat.split([math.prod(shape) for shape, _, _ in where]), where)]
    start = flat.storage_offset()
    return [flat.as_strided(shape, strides, start + at) for shape, strides, at in where]


def as_volumes(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Levels [B, C, H, W] or [B, C, T, H, W], checked before, as [B, C, T, H, W]."""
    return [t.unsqueeze(2) if t.dim() == 4 else t for t in given]


def level_list(name: str, given, expected: int | None = None, less: bool = False) -> list[torch.Tensor]:
    """A list of levels, coarse to fine, as [B, C, T, H, W] each; one batch, channel count, rank and device."""
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"{name}: {type(given).__name__}, expected a non-empty list of level tensors, coarse to fine")
    if len(given) > MAX_LEVELS or (expected is not None and not (len(given) == expected or (less and len(given) < expected))):
        wanted = f"1 to {MAX_LEVELS}" if expected is None else f"{'at most ' if less else ''}{expected}"
        raise ValueError(f"{name}: {len(given)} levels, expected {wanted}")
    result = [volume(f"{name}[{i}]", x) for i, x in enumerate(given)]
    first, (batch, channels, *_) = given[0], result[0].shape
    for i, (x, y) in enumerate(zip(given, result)):
        alike = x.dtype is first.dtype and x.dim() == first.dim() and x.device == first.device
        if alike and y.shape[0] == batch and y.shape[1] == channels:
            continue
        for what, a, b in (
            ("rank", x.dim(), given[0].dim()), ("batch", y.shape[0], result[0].shape[0]),
            ("channels", y.shape[1], result[0].shape[1]), ("device", x.device, given[0].device),
            ("dtype", x.dtype, given[0].dtype),
        ):  # fmt: skip
            if a != b:
                raise ValueError(f"{name}[{i}]: {what} {a}, expected that of {name}[0], {b}")
    return result


def same_shapes(name: str, parts, wanted, reference: str) -> None:
    """ValueError for the first of ``parts`` that has not the shape (or that of the tensor) in ``wanted``, which ``reference`` names."""
    for i, (x, y) in enumerate(zip(parts, wanted)):
        if tuple(x.shape) != tuple(y.shape if isinstance(y, torch.Tensor) else y):
            y = y.shape if isinstance(y, torch.Tensor) else y
            raise ValueError(f"{name}[{i}]: [B, C, T, H, W] = {tuple(x.shape)}, expected {reference} {tuple(y)}")


def sizes_of_levels(name: str, parts, kind: str, pool_time: bool) -> list[int]:
    """Flattened sizes of a list of levels, which must double from each to the next."""
    sizes = sizes_of(parts[-1], len(parts), kind, pool_time, f"{name}[{len(parts) - 1}]")
    same_shapes(name, parts, shapes(sizes), "the size that the finest level gives it,")
    return sizes


def free_sizes(parts) -> list[int]:
    """Flattened sizes of levels that need not belong to one pyramid."""
    return [*parts[0].shape[:2], *(n for p in parts for n in p.shape[2:])]


def active_levels(name: str, active, levels: int) -> int:
    """How many of the coarsest levels take part: an integer, or one boolean per level without gaps."""
    if active is None:
        return levels
    if isinstance(active, (list, tuple)):
        if len(active) != levels or not all(isinstance(a, bool) for a in active):
            raise ValueError(f"{name}: {active!r}, expected {levels} booleans, coarse to fine")
        number = sum(active)
        if list(active) != [True] * number + [False] * (levels - number):
            raise ValueError(f"{name}: {active!r}, expected no level to be skipped: a level takes part only after every coarser one")
        active = number
    integer(name, active, 1, f"1 to {levels} levels")
    if active > levels:
        raise ValueError(f"{name}: {active!r}, expected 1 to {levels} levels")
    return active


def mask_of(name: str, active, batch: int, levels: int, device) -> torch.Tensor | None:
    """A per-sample boolean mask [B, S], or None when ``active`` is none."""
    if not isinstance(active, torch.Tensor):
        return None
    if active.dtype is not torch.bool:
        raise ValueError(f"{name}: dtype {active.dtype}, expected torch.bool")
    if tuple(active.shape) != (batch, levels):
        raise ValueError(f"{name}: shape {tuple(active.shape)}, expected [B, S] = {(batch, levels)}")
    if active.device != device:
        raise ValueError(f"{name}: on device {active.device}, expected {device}")
    return active


def table_of(name: str, t, batch: int, levels: int, columns: tuple[str, ...], device) -> torch.Tensor:
    """A float32 table [B or 1, S, columns], not differentiable."""
    tensor(name, t)
    if t.dtype is not torch.float32:
        raise ValueError(f"{name}: dtype {t.dtype}, expected torch.float32")
    if t.dim() != 3 or t.shape[0] not in (1, batch) or tuple(t.shape[1:]) != (levels, len(columns)):
        raise ValueError(
            f"{name}: shape {tuple(t.shape)}, expected [B, S, {len(columns)}] = {(batch, levels, len(columns))} with ({', '.join(columns)})"
        )
    if t.device != device:
        raise ValueError(f"{name}: on device {t.device}, expected {device}")
    if t.requires_grad:
        raise ValueError(f"{name}: requires grad, expected a tensor that does not: coefficients are not differentiated")
    return t.expand(batch, -1, -1)


def scales_of(std, levels: int, inverse: bool) -> list[float]:
    """One factor per level from its standard deviation (None: 1)."""
    if std is None:
        return [1.0] * levels
    ok = isinstance(std, (list, tuple)) and len(std) == levels
    if not ok or not all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in std):
        raise ValueError(f"std: {std!r}, expected {levels} positive numbers, one per level")
    return [1 / v if inverse else float(v) for v in std]


def random_of(seed, offset, first_sample, levels_sizes: Sequence[int]) -> tuple[int, int, int]:
    """The three checked: what the generator's key and counter hold; ValueError otherwise."""
    for name, value, bits in (("seed", seed, 63), ("offset", offset, 32), ("first_sample", first_sample, 32)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: {value!r}, expected an integer from 0 to 2^{bits} - 1")
    for shape in shapes(levels_sizes):
        if math.prod(shape[1:]) >= 1 << 34:
            raise ValueError(f"x: {math.prod(shape[1:])} values a sample, expected fewer than 2^34 for the noise counter")
    return seed, offset, first_sample


def patches(patch, levels: int, pool_time: bool) -> list[tuple[int, int, int]]:
    """Patch (time, row, column) of every level: the coarsest level's, times the pooling factor from level to level."""
    ok = isinstance(patch, (list, tuple)) and len(patch) == 3
    if not ok or not all(isinstance(p, int) and not isinstance(p, bool) and p > 0 for p in patch):
        raise ValueError(f"patch: {patch!r}, expected three positive integers (time, row, column), those of the coarsest level")
    pt, ph, pw = patch
    return [(pt << s if pool_time else pt, ph << s, pw << s) for s in range(levels)]


def check_patch(patch, sizes: Sequence[int]) -> None:
    """ValueError for a patch that does not divide the coarsest level."""
    for axis, p, n in zip(_AXES, patch, sizes[2:5]):
        if n % p:
            raise ValueError(f"patch: {p} along {axis}, expected a divisor of the coarsest level's {n}")


def token_shape(sizes: Sequence[int], patch: Sequence[int], pool_time: bool, first: int | None = None) -> tuple[int, int, int]:
    """[B, tokens, K] of the token matrix of the first ``first`` levels."""
    tokens = math.prod(n // p for n, p in zip(sizes[2:5], patch))
    columns = sum(sizes[1] * math.prod(p) for p in patches(tuple(patch), level_count(sizes), pool_time)[:first])
    return sizes[0], tokens, columns


def to_tokens(parts: Sequence[torch.Tensor], patch: Sequence[int], pool_time: bool) -> torch.Tensor:
    """Levels [B, C, T, H, W] as one matrix [B, tokens, K]; columns in the order level, channel, time, row, column of the patch."""
    columns = []
    for x, (pt, ph, pw) in zip(parts, patches(tuple(patch), len(parts), pool_time)):
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        columns.append(x.reshape(b, (t // pt) * (h // ph) * (w // pw), c * pt * ph * pw))
    return torch.cat(columns, 2)


def from_tokens(tokens: torch.Tensor, sizes: Sequence[int], patch: Sequence[int], pool_time: bool, first: int | None = None):
    """The inverse of :func:`to_tokens`: the first ``first`` levels of a token matrix."""
    wanted, at, parts = shapes(sizes)[:first], 0, []
    for (b, c, t, h, w), (pt, ph, pw) in zip(wanted, patches(tuple(patch), level_count(sizes), pool_time)):
        k = c * pt * ph * pw
        x = tokens[:, :, at : at + k].reshape(b, t // pt, h // ph, w // pw, c, pt, ph, pw)
        parts.append(x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, c, t, h, w))
        at += k
    return parts


def flat_out(name: str, out, values: int):
    """A 1-D tensor to write levels into."""
    tensor(name, out)
    if out.dim() != 1 or out.numel() != values:
        raise ValueError(f"{name}: shape {tuple(out.shape)}, expected a 1-D tensor of {values} values, shared by the levels")
    return out
