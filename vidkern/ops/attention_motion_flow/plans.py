"""What a soft flow on the CPU need not do again for tensors of the same shapes and strides: its checks, the views that it reads, and the
dispatcher where nobody but torch listens. Calls of a few hundred tokens are bound by these."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import registry
from ..quiet import PLAIN, alone, explaining, keep, simple


class _View(NamedTuple):
    """A view [B, G, Hg, N, d] of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements from the tensor's first one

    @classmethod
    def of(cls, view, base) -> _View | None:
        """How ``view`` lies in ``base``; None where it has memory of its own."""
        if view.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or view.stride(-1) != 1:
            return None
        return cls(tuple(view.shape), view.stride(), view.storage_offset() - base.storage_offset())

    def on(self, t) -> torch.Tensor:
        return t.as_strided(self.shape, self.strides, t.storage_offset() + self.offset)


class Plan(NamedTuple):
    """A checked call: what it reads of q and k, the op's other arguments, and the shapes of what it makes."""

    q: _View
    k: _View
    grad: _View  # of a dense gradient of q or k
    given: tuple[int, ...]  # shape of q and k
    rest: tuple  # (pairs, frames, height, width, scale, wants, "cpu")
    pairs: tuple
    shape: tuple[int, ...]  # of the flow
    own: torch.Tensor  # coordinates [S, 2]

    def means(self, q, k):
        """Expected coordinates [B, G, P, S, 2] and log-sum-exp [B, G, P, S] of viewed q and k."""
        from . import cpu

        _, frames, height, width, scale, *_ = self.rest
        rows = (*self.q.shape[:2], len(self.pairs), height * width)
        mean, lse = torch.empty((*rows, 2), dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
        cpu.forward(q, k, self.pairs, grid=(frames, height, width), scale=scale, mean=mean, index=None, lse=lse, top=None, entropy=None)
        return mean, lse


_plans: dict[tuple, Plan | None] = {}  # None: the call has to go the long way


def key_of(q, k, grid, pairs, options: tuple, impl) -> tuple | None:
    """What a plan depends on, ending with the backend asked for; None where a call has to go the long way. ``options``: plain values."""
    if torch.compiler.is_compiling() or type(q) not in PLAIN or type(k) not in PLAIN or not (q.is_cpu and k.is_cpu):
        return None
    if type(grid) is not tuple or type(pairs) is not str or not alone() or explaining() or torch.is_autocast_enabled("cpu"):
        return None
    return (
        q.shape, q.stride(), k.shape, k.stride(), q.dtype, k.dtype, q.layout, k.layout, grid, pairs, options, *map(type, grid),
        *map(type, options), torch.get_num_threads(), registry._forced if impl is None else impl,
    )  # fmt: skip


def known(key) -> bool:
    """Whether such a call was seen before."""
    try:
        return key in _plans
    except TypeError:  # an option that cannot be a key: what is wrong with it is said on the long way
        return True


def find(key) -> Plan | None:
    """The plan of an earlier call."""
    try:
        return _plans.get(key)
    except TypeError:
        return None


def make(key, op, views, given, rest, pairs, shape, own) -> None:
    """Keep how a call was made where the compiled kernels serve it and nothing is computed before them.

    Args:
        views: (view, tensor) of q, of k, and of a dense tensor like them.
        given: shape of q and k.
        rest: the op's arguments after q and k, but for ``impl``.
        shape: of the flow; None where it is not what the kernel makes.
        own: coordinates of the patches.
    """
    found = [_View.of(view, t) for view, t in views]
    served = shape is not None and None not in found and op.choose((views[0][0], views[1][0], *rest, key[-1])) == "cpu"
    keep(_plans, key, Plan(*found, tuple(given), (*rest, "cpu"), pairs, shape, own) if served else None)


def flow(op, plan: Plan, q, k) -> torch.Tensor:
    """The soft flow by a plan, differentiable in q and k."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Node.apply(op, plan, q, k)
    mean, _ = plan.means(plan.q.on(q), plan.k.on(k))
    return mean.sub_(plan.own).view(plan.shape)


class _Node(torch.autograd.Function):
    """The node of a planned call. It saves what the registered op saves, so that recomputation may run either."""

    @staticmethod
    def forward(ctx, op, plan, q, k):
        # Detached: changing q before the backward is then told as it always is.
        q, k = plan.q.on(q.detach()), plan.k.on(k.detach())
        mean, lse = plan.means(q, k)
        ctx.op, ctx.plan = op, plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, mean, lse)
        # Subtracted last: the result must not be a view, or it could not be changed in place.
        return mean.view(plan.shape) - plan.own

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        op, plan, (q, k, mean, lse) = ctx.op, ctx.plan, ctx.saved_tensors
        rest = (*plan.rest[:5], plan.rest[-1])
        dmean = grad.reshape(mean.shape)
        # Text and samples that are not looked at have gradients of zero.
        if torch.is_grad_enabled() or not alone() or not simple((grad,)):
            if torch.is_grad_enabled():  # create_graph: differentiating the result has to raise, whatever grad came from
                q = q.detach().requires_grad_()
            found = op.backward_overload(dmean, None, q, k, mean, lse, *rest)
            whole = [g.new_zeros(plan.given) for g in found]
            for t, g in zip(whole, found):
                plan.grad.on(t).copy_(g)
        else:
            new = torch.empty if torch.Size(plan.grad.shape).numel() == torch.Size(plan.given).numel() else torch.zeros
            whole = [new(plan.given, dtype=q.dtype) for _ in range(2)]
            op._by_name["cpu"].run_backward([plan.grad.on(t) for t in whole], dmean, None, q, k, mean, lse, *rest)
        return None, None, *whole
