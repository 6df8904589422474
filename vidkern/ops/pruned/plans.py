"""What a call of a pruned op need not do again that differs from an earlier one in the values of its tensors alone: its checks, the
dispatcher, and the walk through its launchers. Small layers are bound by these.

A plan stands for calls of one kind with plain tensors on the CPU, nobody listening and the compiled kernels chosen; every other call goes
through the dispatcher.
"""

from __future__ import annotations

import torch

from ... import compiled, registry
from ..quiet import PLAIN, alone, explaining, keep, simple
from .index import ChannelIndex

_autocast = torch.is_autocast_enabled


class _Maker:
    """New tensors of fixed shapes; one of them like a tensor of the call where there is such a one, which torch makes fastest."""

    def __init__(self, wanted, given):
        self._recipes = []
        for t in wanted:
            like = [i for i, g in enumerate(given) if g.shape == t.shape and g.dtype is t.dtype and g.stride() == t.stride()]
            self._recipes.append((like[0] if like and t.is_contiguous() else None, t.shape, t.stride(), t.dtype))

    def __call__(self, given) -> list[torch.Tensor]:
        return [
            torch.empty_strided(shape, strides, dtype=dtype) if like is None else torch.empty_like(given[like])
            for like, shape, strides, dtype in self._recipes
        ]


class _Repeat:
    """A program, the memory that it fills, and the lists that it reads, whose values must stay what they were."""

    def __init__(self, program, outputs, given):
        self.run, self.constants = program
        self.make = _Maker(outputs, given)


class Plan:
    """Calls of one kind: ``lists`` of channels as the kernels take them, ``rest`` of the op's arguments up to ``impl``."""

    def __init__(self, op: PlannedOp, lists: tuple, rest: tuple, asked: tuple):
        self.op, self.lists, self.rest, self.asked = op, lists, rest, asked
        self.versions = [(t, t._version) for t in {id(t): t for t in (*lists, *asked)}.values() if isinstance(t, torch.Tensor)]
        self.wants = rest[-2]
        # None: not noted yet; False: it cannot be repeated.
        self.forward: _Repeat | bool | None = None
        self.backward: dict[tuple, tuple | bool] = {}
        self.absent = {}  # dtype -> a tensor without values, for outputs that were not asked for

    def fresh(self) -> bool:
        """Whether the lists hold what they held."""
        for t, version in self.versions:
            if t._version != version:
                return False
        return True

    def args(self, tensors) -> tuple:
        """The op's arguments."""
        return (*tensors, *self.lists, *self.rest)

    def __call__(self, tensors: tuple) -> torch.Tensor:
        """The op's first output for tensors of this kind."""
        return _Node.apply(self, *tensors) if self.wants else self.outputs(tensors)[0]

    def outputs(self, tensors) -> list:
        """The op's outputs; None for one that was not asked for."""
        given = [t for i, t in enumerate(tensors) if t is not None and not (i == self.op.residual and t is tensors[0])]
        repeat = self.forward
        if repeat:
            made = repeat.make(given)
            if repeat.run((*made, *given)):
                return made if len(made) == self.op.returned else [*made, None]
        args = self.args(tensors)
        outputs = self.op._allocate(*args)
        run = self.op.backends[0].run
        if repeat is None:
            self.forward = _noted([t for t in outputs if t.numel()], given, [tensors[i] for i in self.op.sliced], run, outputs, args)
        else:
            run(outputs, *args)
        return [t if t.numel() else None for t in outputs]

    def gradients(self, saved, dout) -> list:
        """Gradients of the op's tensor arguments."""
        op, all_given = self.op, (dout, *saved)
        key = (dout.dtype, dout.stride(), *[None if t is None else (t.dtype, t.shape, t.stride()) for t in saved])
        known = self.backward.get(key)
        if known:
            repeat, order, which = known
            given = [all_given[i] for i in which]
            made = repeat.make(given)
            if repeat.run((*made, *given)):
                made += (dout, None)
                return [made[i] for i in order]
        rest = self.bare()
        args = (*op.gradient.call(saved, rest, (dout,)), self.rest[-1])
        outputs = op.gradient.allocate(*args)
        run = op.backends[0].run_backward
        if known is not None:
            run(outputs, *args)
            return op.gradient.scatter(outputs, rest, (dout,))
        made = [t for t in outputs if t.numel()]
        which = [i for i, t in enumerate(all_given) if t is not None and t.numel() and t.is_floating_point()]
        repeat = _noted(made, [all_given[i] for i in which], [saved[i] for i in op.sliced], run, outputs, args)
        grads = op.gradient.scatter(outputs, rest, (dout,))
        places = {id(t): i for i, t in enumerate((*made, dout, None))}
        keep(self.backward, key, repeat and (repeat, [places[id(g)] for g in grads], which))
        return grads

    def bare(self) -> tuple:
        """The op's arguments without tensors."""
        return (*(None,) * (self.op.tensors + len(self.lists)), *self.rest)


def _noted(made, given, sliced, run, outputs, args) -> _Repeat | bool:
    """Run a launcher; what repeats it for other tensors ``given`` with new ones like ``made``, or False."""
    from .tape import Tape

    with Tape([*made, *given], [*made, *sliced]) as tape:
        run(outputs, *args)
    program = tape.program()
    return program is not None and _Repeat(program, made, given)


class _Node(torch.autograd.Function):
    """The node of a planned call. It saves what the registered op saves, so that recomputation may run either."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        outputs = plan.outputs(tensors)
        if len(outputs) > 1 and outputs[1] is None:
            dtype = tensors[0].dtype
            if dtype not in plan.absent:
                plan.absent[dtype] = torch.empty(0, dtype=dtype)
            outputs[1] = plan.absent[dtype]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*plan.op.gradient.save(plan.args(tensors), outputs))
        return outputs[0]

    @staticmethod
    def backward(ctx, dout):
        plan = ctx.plan
        op = plan.op
        if dout is None:
            return (None,) * (1 + op.tensors)
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled() and alone() and simple((dout,)) and dout.is_cpu:
            return (None, *plan.gradients(saved, dout))
        rest = plan.bare()
        outputs = op.backward_overload(*op.gradient.call(saved, rest, (dout,)), plan.rest[-1])
        return (None, *op.gradient.scatter(outputs, rest, (dout,)))


class PlannedOp(registry.Op):
    """An op whose arguments are ``tensors`` differentiable ones (or None), then lists of channels, then numbers and names, the last two
    ``wants`` and ``impl``; the residual is the one at ``residual``. Its first backend is the compiled one, which reads parts of the tensors
    at ``sliced``; these come before the residual, so that they have the same places among the saved ones."""

    def __init__(self, *args, tensors: int, residual: int, sliced: tuple[int, ...], **more):
        super().__init__(*args, **more)
        self.tensors, self.residual, self.sliced = tensors, residual, sliced
        self.returned = len(self.overload._schema.returns)
        self._plans: dict[tuple, Plan] = {}
        self._seen: dict[tuple, bool] = {}  # kinds of calls that came once: a plan is made when they come again

    def key(self, tensors: tuple, lists: tuple, rest: tuple):
        """What a call's plan is kept by, None for a call without one: what its checks look at, of tensors everything but values, of lists
        the objects."""
        if not alone() or explaining() or _autocast("cpu"):
            return None
        cpu = compiled.cpu()
        if cpu is None:
            return None
        try:
            facts = cpu.call_facts(tensors, lists, rest)
        except (AttributeError, TypeError, RuntimeError):
            return None
        return facts, registry._forced, torch.get_num_threads(), torch.is_grad_enabled(), tensors[self.residual] is tensors[0], rest

    def known(self, key, tensors: tuple):
        """The result of a call by the plan of an earlier one; None where there is none."""
        plan = self._plans.get(key)
        if plan is None:
            return None
        if plan.fresh():
            return plan(tensors)
        del self._plans[key]
        return None

    def serve(self, key, tensors: tuple, asked: tuple, lists: tuple, rest: tuple):
        """The op's first output for checked arguments: ``asked`` the lists of channels as the caller gave them, ``lists`` as the op takes
        them. The second call of a kind makes its plan, where it may have one."""
        args = (*tensors, *lists, *rest)
        if key is not None and _repeatable(tensors, asked, lists):
            if key not in self._seen:
                keep(self._seen, key, True)
            elif self.choose((*args[:-1], registry._forced if args[-1] is None else args[-1])) == "cpu":
                plan = Plan(self, lists, (*rest[:-1], "cpu"), asked)
                keep(self._plans, key, plan)
                return plan(tensors)
        outputs = self(*args)
        return outputs[0] if isinstance(outputs, tuple) else outputs


def _repeatable(tensors, asked, lists) -> bool:
    """Whether tensors are plain rows on the CPU, and lists objects that can be told to be the same and unchanged."""
    return (
        # A list that was copied (to int32) may change in ways that leave no trace, as memory shared with NumPy does.
        all(t is None or type(t) is ChannelIndex or (type(t) in PLAIN and t is kept) for t, kept in zip(asked, lists))
        and not any(isinstance(t, torch.Tensor) and t.is_inference() for t in (*asked, *lists))
        and all(t is None or (type(t) in PLAIN and t.is_cpu and t.stride(-1) == 1) for t in tensors)
    )
