"""One call of the compiled kernels, taken down as a program that repeats it on other tensors of the same shapes.

The launchers run as always; what they launch is noted, and a mode notes what torch does in between: memory made, cleared or copied (with
a number added), views, arithmetic on lists of channels (which are constants). Anything else cannot be repeated: there is no program.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidkern import _cpu

_local = threading.local()
_aten = torch.ops.aten
_MADE = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default}
_CLEARED = {_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default}
_COPIES = {_aten._to_copy.default, _aten.clone.default}
_VALUES = (torch.float32, torch.bfloat16)


def launch(kernel: str, fields: tuple, *number: float) -> None:
    """Run a compiled kernel on fields: integers, and tensors (or None), which stand for their addresses."""
    tape = getattr(_local, "tape", None)
    if tape is not None:
        tape.add(kernel, fields, *number)
    getattr(_cpu, kernel)(fields, *number)


def _integers(result) -> bool:
    """Whether an op's result is lists of channels alone."""
    parts = result if isinstance(result, (list, tuple)) else (result,)
    return all(isinstance(t, torch.Tensor) and not t.is_floating_point() for t in parts)


class _Watch(TorchDispatchMode):
    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tape.saw(func, args, result)
        return result


class _Slot(NamedTuple):
    """A tensor whose address a repetition puts in place of this one's; ``end``: of its memory."""

    number: int
    tensor: torch.Tensor
    start: int
    end: int
    sliced: bool


LIMIT = 1 << 20  # bytes between kernels: a program holds all of them at once, where a call has one tile after the other


class Tape:
    """Takes down what happens while it is entered, of calls that need no more than LIMIT bytes between their kernels.

    Args:
        given: the tensors that a repetition gets anew, in this order.
        sliced: those of them of which launchers take parts: others may lie between each other in one memory, as modulations do.
    """

    def __init__(self, given: list[torch.Tensor], sliced: Sequence[torch.Tensor] = ()):
        self._given, self._scratch, self._constants, self._steps = list(given), [], [], []
        self._slots: dict[int, list[_Slot]] = {}
        self._bytes = 0
        parts = {id(t) for t in sliced}
        self._right = all([self._own(i, t, id(t) in parts) for i, t in enumerate(given)])

    def _give_up(self) -> None:
        """Let go of all that was noted."""
        self._right = False
        self._scratch, self._constants, self._steps, self._slots = [], [], [], {}

    def _own(self, number: int, t: torch.Tensor, sliced: bool = False) -> bool:
        """Give a tensor's memory to a slot; False where another slot's could be mistaken for it."""
        start, reach = t.data_ptr(), sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1
        slot = _Slot(number, t, start, start + reach * t.element_size(), sliced)
        others = self._slots.setdefault(t.untyped_storage().data_ptr(), [])
        clear = all(
            o.end <= slot.start or slot.end <= o.start or not (sliced or o.sliced or o.start == slot.start) for o in others
        )
        others.append(slot)
        return clear

    def _slot_of(self, t: torch.Tensor) -> _Slot | None:
        """Whose memory a tensor reads or writes."""
        slots, at = self._slots.get(t.untyped_storage().data_ptr(), ()), t.data_ptr()
        exact = [s for s in slots if s.start == at]
        return next(iter(exact or [s for s in slots if s.start <= at < s.end]), None)

    def __enter__(self) -> Tape:
        self._watch = _Watch(self)
        self._watch.__enter__()
        _local.tape = self
        return self

    def __exit__(self, *error):
        _local.tape = None
        return self._watch.__exit__(*error)

    def add(self, kernel: str, fields: tuple, number: float = 0.0) -> None:
        """Note a kernel."""
        if not self._right:
            return
        places = []
        for at, t in enumerate(fields):
            if not isinstance(t, torch.Tensor):
                continue
            slot = self._slot_of(t)
            if slot is not None:
                places.append((at, slot.number, t.data_ptr() - slot.start))
            elif t.is_floating_point():
                self._right = False
            else:
                self._constants.append(t)
        self._steps.append((kernel, fields, tuple(places), number))

    def saw(self, func, args, result) -> None:
        """Note what torch did."""
        if not self._right:
            return
        plus = args[1] if func is _aten.add.Tensor and type(args[1]) in (int, float) else None
        if func in _MADE or func in _CLEARED or func in _COPIES or plus is not None:
            if not result.is_floating_point():
                return
            self._right &= self._own(len(self._given) + len(self._scratch), result) and result.is_contiguous()
            self._scratch.append(result)
            self._bytes += result.numel() * result.element_size()
            if self._bytes > LIMIT:
                self._give_up()
            elif func in _CLEARED:
                self._clear(result)
            elif func in _COPIES:
                self._copy(result, args[0])
            elif plus is not None:
                self._copy(result, args[0], plus)
        elif func is _aten.zero_.default:
            self._clear(args[0])
        elif func is _aten.copy_.default:
            self._copy(*args[:2])
        elif not (func.is_view or func is _aten._unsafe_view.default or _integers(result)):
            self._right = False

    def _clear(self, t: torch.Tensor) -> None:
        self._right &= t.is_contiguous()
        self.add("pruned_zero", (t, t.numel() * t.element_size()))

    def _copy(self, to: torch.Tensor, of: torch.Tensor, plus: float = 0.0) -> None:
        plain = to.is_contiguous() and to.shape == of.shape and to.dtype in _VALUES and of.dtype in _VALUES
        try:
            rows = of.view(1, -1) if of.is_contiguous() else of.view(-1, of.shape[-1])
            plain &= rows.stride(1) == 1
        except RuntimeError:
            plain = False
        self._right &= plain
        if plain:
            fields = (to, to.dtype is torch.bfloat16, of, of.dtype is torch.bfloat16, *rows.shape, rows.stride(0))
            self.add("pruned_copy", fields, float(plus))

    def program(self):
        """What repeats it: ``run(tensors)`` and, to be kept with it, the lists that it reads; None if it cannot be repeated."""
        if not self._right:
            return None
        sizes = [t.numel() * t.element_size() for t in self._scratch]
        return _cpu.PrunedProgram(self._steps, len(self._given), sizes).run, self._constants
