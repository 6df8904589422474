"""Lists of kept channels: sorted, unique, in range, checked once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Tensors whose values have been looked at: their version then, the size that they index, and whether they are made of aligned runs of
# eight. A tensor that was written to since is looked at again.
_CHECKED = WeakIdKeyDictionary()


def fault(values: torch.Tensor, size: int) -> str | None:
    """What is wrong with a list of channels of a tensor that has ``size`` of them: a phrase, or None. Waits for a GPU."""
    if values.numel() == 0:
        return "empty"
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        return f"holds {low if low < 0 else high}"
    steps = values[1:] - values[:-1]
    at = int(steps.argmin()) if steps.numel() else 0
    if steps.numel() and int(steps[at]) <= 0:
        return f"holds {int(values[at])} twice" if int(steps[at]) == 0 else f"holds {int(values[at + 1])} after {int(values[at])}"
    return None


def _runs(values: torch.Tensor) -> bool:
    if values.numel() % 8:
        return False
    rows = values.view(-1, 8) - torch.arange(8, device=values.device)
    return bool(((rows == rows[:, :1]) & (rows % 8 == 0)).all())


def in_runs(index: torch.Tensor | None) -> bool:
    """Whether a list is known to be made of aligned runs of at least eight channels; never waits for a GPU."""
    known = None if index is None else _CHECKED.get(index)
    return known is not None and known[2]


def _expected(size: int) -> str:
    return f"expected sorted numbers without repetition among 0..{size - 1}"


class ChannelIndex:
    """A list of kept channels (or slabs), checked when it is made and kept on every device that asks for it.

    A tensor can be handed to the ops as well; its values are checked at the first call with it, which waits for a GPU.

    Args:
        values: sorted channel numbers without repetition: integers, or a 1-D integer or bool (mask) tensor.
        size: how many channels there are to choose from.

    Raises:
        TypeError, ValueError: the values are no integers, none, out of range, unsorted or repeated.
    """

    def __init__(self, values: Sequence[int] | torch.Tensor, size: int):
        self.size = size
        self._on = {}
        self._keep(checked("values", values, size).cpu())

    def on(self, device: torch.device) -> torch.Tensor:
        """The list as int32 on ``device``."""
        found = self._on.get(device)
        if found is None:
            found = self._keep(self._on[torch.device("cpu")].to(device))
        return found

    def _keep(self, values: torch.Tensor) -> torch.Tensor:
        self._on[values.device] = values
        _CHECKED[values] = (values._version, self.size, _runs(values) if values.device.type == "cpu" else self._runs())
        return values

    def _runs(self) -> bool:
        return in_runs(self._on[torch.device("cpu")])

    def __len__(self) -> int:
        return self._on[torch.device("cpu")].numel()

    def tolist(self) -> list[int]:
        return self._on[torch.device("cpu")].tolist()

    def __repr__(self) -> str:
        return f"ChannelIndex({len(self)} of {self.size})"


def checked(name: str, values, size: int) -> torch.Tensor:
    """Channel numbers, or a bool mask, as a checked int32 tensor."""
    if isinstance(values, torch.Tensor):
        if values.dtype is torch.bool and values.dim() == 1:
            if values.numel() != size:
                raise ValueError(f"{name}: mask of {values.numel()} channels, expected {size}")
            values = values.nonzero().flatten()
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype is torch.bool:
            raise ValueError(f"{name}: shape {tuple(values.shape)} {values.dtype}, expected a 1-D integer tensor")
        result = values.detach()
    else:
        values = list(values) if isinstance(values, (Sequence, range)) and not isinstance(values, str) else values
        if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise TypeError(f"{name}: {values!r:.60}, expected a list of channel numbers, an integer tensor or a ChannelIndex")
        result = torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the default device is
    if reason := fault(result, size):
        raise ValueError(f"{name}: {reason}, {_expected(size)}")
    return result.to(torch.int32).contiguous()


def resolve(name: str, index, size: int, device: torch.device) -> torch.Tensor | None:
    """``index`` as int32 on ``device``, None for None.

    Args:
        index: a :class:`ChannelIndex`, an integer tensor on ``device``, or a list of integers.
        size: how many channels it chooses from.

    Raises:
        TypeError, ValueError: it is none of these or wrong; the message names ``name``.
    """
    if index is None:
        return None
    if isinstance(index, ChannelIndex):
        if index.size != size:
            raise ValueError(f"{name}: chooses from {index.size} channels, expected from {size}")
        return index.on(device)
    if not isinstance(index, torch.Tensor):
        return checked(name, index, size).to(device)
    if index.device != device:
        raise ValueError(f"{name}: on device {index.device}, expected {device}")
    plain = index.dtype is torch.int32 and index.dim() == 1
    # Values cannot be looked at while a graph is traced, and need not be twice.
    if torch.compiler.is_compiling() or type(index) is not torch.Tensor:
        return index if plain else index.to(torch.int32)
    version = 0 if index.is_inference() else index._version
    known = _CHECKED.get(index)
    if known is None or known[:2] != (version, size):
        looked_at = checked(name, index, size)
        if not plain:
            return looked_at
        _CHECKED[index] = (version, size, _runs(index))
    return index.contiguous() if plain else index.to(torch.int32)
