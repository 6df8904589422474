"""Launchers of the compiled CPU kernels: pointers, strides and sizes go in, nothing is allocated but the workspace."""

from __future__ import annotations

import functools

import torch

from vidkern import _cpu

_FORWARD, _VOTE, _BACKWARD = 0, 1, 2


@functools.lru_cache(maxsize=64)
def _by_key_frame(pairs, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First entry of every key frame, int32 [F + 1], and the entries (query frame, row of the result), int32 [P, 2]."""
    entries = [[] for _ in range(frames)]
    for p, (i, j) in enumerate(pairs):
        entries[j].append((i, p))
    first = [0]
    for found in entries:
        first.append(first[-1] + len(found))
    return torch.tensor(first, dtype=torch.int32), torch.tensor([e for found in entries for e in found], dtype=torch.int32)


def _run(kind, launch, tensors, pairs, grid, scale, results) -> None:
    """``tensors``: q, k and, for the backward, dq, dk; ``results``: mean, index, lse, top, entropy, dmean, dlse, each may be None."""
    batch, groups, heads, _, dim = tensors[0].shape
    first, seen = _by_key_frame(pairs, grid[0])
    sizes = (
        tensors[0].dtype is torch.bfloat16, torch.get_num_threads(), batch, groups, heads, dim, *grid, len(pairs),
        first.data_ptr(), seen.data_ptr(),
    )  # fmt: skip
    size = _cpu.amf_workspace(kind, sizes)
    workspace = torch.empty(size, dtype=torch.uint8)
    views = [field for t in tensors for field in (t.data_ptr(), *t.stride()[:4])]
    pointers = [0 if t is None else t.data_ptr() for t in results]
    launch((*sizes, workspace.data_ptr(), size, *views, *pointers), scale)


def forward(q, k, pairs, *, grid, scale, mean, index, lse, top, entropy) -> None:
    """Fill those of the last five that are not None.

    Args:
        q, k: [B, G, Hg, N, d], float32 or bfloat16, last stride 1, any other strides.
        pairs: tuple of (query frame, key frame).
        mean: float32 [B, G, P, S, 2]; lse, top, entropy: float32 [B, G, P, S]; index: int32 [B, G, P, S]; contiguous.
    """
    _run(_FORWARD, _cpu.amf_forward, (q, k), pairs, grid, scale, (mean, index, lse, top, entropy, None, None))


def vote(q, k, lse, pairs, *, grid, scale, index, top) -> None:
    """Fill ``index`` and ``top`` [B, 1, P, S], each may be None, from the ``lse`` of :func:`forward`."""
    _run(_VOTE, _cpu.amf_vote, (q, k), pairs, grid, scale, (None, index, lse, top, None, None, None))


def backward(dmean, dlse, q, k, mean, lse, pairs, *, grid, scale, dq, dk) -> None:
    """Fill ``dq`` and ``dk``, like q and k; ``dmean`` and ``dlse``, contiguous, may be None (zero). ``mean`` is not read.

    The result does not depend on the number of threads and is the same bits from run to run.
    """
    _run(_BACKWARD, _cpu.amf_backward, (q, k, dq, dk), pairs, grid, scale, (None, None, lse, None, None, dmean, dlse))
