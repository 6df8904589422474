"""Whether anybody but torch itself looks at a call: where nobody does, a plan made from an earlier call may stand in for the dispatcher."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from .. import registry

PLAIN = (torch.Tensor, torch.nn.Parameter)
LIMIT = 1024  # entries of a table before it starts anew

_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _tracing, _profiled = (
    torch._C._are_functorch_transforms_active, torch._C._get_tracing_state, torch.autograd._profiler_enabled
)  # fmt: skip


def alone() -> bool:
    """Whether nothing looks at calls but torch itself: no compiler, mode, transform, tracer or profiler."""
    return not (
        torch.compiler.is_compiling()
        or _modes()
        or _function_modes()
        or _transforms()
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or _profiled()
    )


_batched = torch._C._functorch.is_legacy_batchedtensor


def simple(grads) -> bool:
    """Whether gradients (or None) are plain tensors with memory of their own: those of ``is_grads_batched`` look plain and have none."""
    return all(g is None or (type(g) in PLAIN and not _batched(g)) for g in grads)


def explaining() -> bool:
    """Whether :func:`vidkern.explain` catches this thread's calls."""
    return registry._local.explaining is not None


def keep(table: dict, key, value) -> None:
    """Put an entry into a table that does not grow for ever."""
    if len(table) >= LIMIT:
        table.clear()
    table[key] = value
