"""One call of the compiled kernels, taken down as a program that repeats it on other tensors of the same shapes.

The launchers run as always; what they launch is noted, and a mode notes what torch does in between: memory made, cleared or copied,
views, arithmetic on lists of channels (which are constants). Anything else cannot be repeated, and there is no program.
"""

from __future__ import annotations

import threading

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


class Tape:
    """Takes down what happens while it is entered.

    Args:
        given: the tensors that a repetition gets anew, in this order; each has memory of its own.
    """

    def __init__(self, given: list[torch.Tensor]):
        self._given, self._scratch, self._constants, self._steps = list(given), [], [], []
        self._slots: dict[int, tuple[int, torch.Tensor]] = {}
        self._right = all([self._own(i, t) for i, t in enumerate(given)])

    def _own(self, slot: int, t: torch.Tensor) -> bool:
        """Give a tensor's memory to a slot; False where it is another's already."""
        place = t.untyped_storage().data_ptr()
        if place in self._slots:
            return False
        self._slots[place] = slot, t
        return True

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
        places = []
        for at, t in enumerate(fields):
            if not isinstance(t, torch.Tensor):
                continue
            found = self._slots.get(t.untyped_storage().data_ptr())
            if found is not None:
                places.append((at, found[0], t.data_ptr() - found[1].data_ptr()))
            elif t.is_floating_point():
                self._right = False
            else:
                self._constants.append(t)
        self._steps.append((kernel, fields, tuple(places), number))

    def saw(self, func, args, result) -> None:
        """Note what torch did."""
        if func in _MADE or func in _CLEARED or func in _COPIES:
            if not result.is_floating_point():
                return
            self._right &= self._own(len(self._given) + len(self._scratch), result) and result.is_contiguous()
            self._scratch.append(result)
            if func in _CLEARED:
                self._clear(result)
            elif func in _COPIES:
                self._copy(result, args[0])
        elif func is _aten.zero_.default:
            self._clear(args[0])
        elif func is _aten.copy_.default:
            self._copy(*args[:2])
        elif not (func.is_view or func is _aten._unsafe_view.default or _integers(result)):
            self._right = False

    def _clear(self, t: torch.Tensor) -> None:
        self._right &= t.is_contiguous()
        self.add("pruned_zero", (t, t.numel() * t.element_size()))

    def _copy(self, to: torch.Tensor, of: torch.Tensor) -> None:
        plain = to.is_contiguous() and of.is_contiguous() and to.shape == of.shape and to.dtype in _VALUES and of.dtype in _VALUES
        self._right &= plain
        if plain:
            self.add("pruned_copy", (to, to.dtype is torch.bfloat16, of, of.dtype is torch.bfloat16, to.numel()))

    def program(self):
        """What repeats it: ``run(tensors)`` and, to be kept with it, the lists that it reads; None if it cannot be repeated."""
        if not self._right:
            return None
        sizes = [t.numel() * t.element_size() for t in self._scratch]
        return _cpu.PrunedProgram(self._steps, len(self._given), sizes).run, self._constants
