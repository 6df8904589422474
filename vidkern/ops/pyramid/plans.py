"""What a call need not do again that differs from an earlier one in the values of its tensors alone: its checks and the fields of
its kernel; and the dispatcher, where nothing but torch itself listens. Small problems are bound by these."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import registry
from ..quiet import PLAIN, alone, explaining, keep, simple


class Place(NamedTuple):
    """An address: so many bytes into a tensor's memory."""

    tensor: torch.Tensor
    offset: int = 0

    def resolved(self) -> int:
        """The address as it is now."""
        return self.tensor.data_ptr() + self.offset


class Launch(NamedTuple):
    """A compiled kernel, the integers that it reads, addresses as :class:`Place`, and the factor of each level."""

    kernel: Callable
    fields: tuple
    scale: tuple[float, ...]

    def run(self) -> None:
        """Run it."""
        self.kernel(tuple(f.resolved() if type(f) is Place else f for f in self.fields), self.scale)


_facts = operator.attrgetter("shape", "dtype", "device", "layout", "requires_grad")


class Ready:
    """What the checks of a call found out, as attributes. ``kept``: for calls of the same kind it is the same object."""

    kept = False

    def __init__(self, **found):
        self.__dict__.update(found)
        self.rests: dict[str, tuple] = {}


class Op(registry.Op):
    """An op whose plain calls (no gradient, no subclass, nobody listening) go straight to the kernel, by a plan kept from an earlier call
    that passed the same checks: the dispatcher and its conversions cost some 15 microseconds for arguments as many as these, and plain
    torch needs little more than that for a small pyramid."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._plans: dict[tuple, tuple] = {}

    def serve(self, ready: Ready, tensors: list, build: Callable[[], tuple], impl, out=None, random=(), quiet: bool | None = None):
        """The op's outputs for ``build()``, its arguments without ``impl``.

        Args:
            ready: what was found for these arguments; whatever but values the kernel depends on is part of it, or a stride.
            tensors: those among the arguments, in their order, with whatever strides and rank the caller gave them.
            impl: backend by name or None.
            out: outputs to write into; returned as they are.
            random: (seed, offset, first_sample), which may change from call to call.
            quiet: what :func:`alone` said, if it was asked already.
        """
        key = None
        quiet = alone() if quiet is None else quiet
        if ready.kept and quiet and not explaining():
            key = (
                ready, registry._forced if impl is None else impl, torch.get_num_threads(), *map(type, tensors),
                *[t.stride() for t in tensors],
            )  # fmt: skip
            plan = self._plans.get(key)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors, *(out or ())):
                if out is None and all(type(t) in PLAIN for t in tensors):
                    return _Direct.apply(self, key, build, random, *tensors)
                key = None
            elif plan is not None and (out is None or _fits(out, plan[0])):
                outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in plan[0]] if out is None else out
                _repeat(plan[1], [*outputs, *tensors], random)
                return outputs
        args = (*build(), impl)
        if out is not None:
            self.call_out(out, *args)
            return out
        if key is None or not all(type(t) in PLAIN for t in tensors):
            outputs = self(*args)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        return self._planning(key, (*args[:-1], key[1]), random)

    def _planning(self, key, args, random):
        """Run the op, and keep how where the backend can say it."""
        backend = self._by_name[self.choose(args)]
        outputs = self._allocate(*args)
        describe = getattr(backend.run, "describe", None)
        if describe is None:
            backend.run(outputs, *args)
            return outputs
        launch = describe(outputs, *args)
        launch.run()
        plan = _plan(launch, [*outputs, *(t for t in registry._flatten(args)[0] if isinstance(t, torch.Tensor))])
        if plan is not None:
            keep(self._plans, key, ([(t.shape, t.dtype) for t in outputs], plan))
        return outputs


class _Direct(torch.autograd.Function):
    """The node of a plain call: forward by the plan, backward by the backend chosen there."""

    @staticmethod
    def forward(ctx, op, key, build, random, *tensors):
        # As the dispatcher has them: the backward's functions are those of the registered op, which do not look at seeds.
        args, plan, rests = (*build(), key[1]), op._plans.get(key), key[0].rests
        if plan is None:
            outputs = op._planning(key, args, random)
        else:
            outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in plan[0]]
            _repeat(plan[1], [*outputs, *tensors], random)
        rest = rests.get(args[-1])
        if rest is None:
            rest = rests[args[-1]] = (*map(_without_tensors, args[:-1]), op.choose(args))
        ctx.op, ctx.rest = op, rest
        ctx.shapes = [t.shape for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*op.gradient.save(args, outputs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        op, rest = ctx.op, ctx.rest
        if all(g is None for g in grads):
            return (None,) * (4 + len(ctx.shapes))
        args = (*op.gradient.call(ctx.saved_tensors, rest, grads), rest[-1])
        if torch.is_grad_enabled() or not alone() or not simple(grads):
            outputs = op.backward_overload(*args)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        else:
            outputs = op.gradient.allocate(*args)
            op._by_name[rest[-1]].run_backward(outputs, *args)
        given = [None if g is None else g.view(shape) for g, shape in zip(op.gradient.scatter(outputs, rest, grads), ctx.shapes)]
        return (None,) * 4 + (*given, *(None,) * (len(ctx.shapes) - len(given)))


def _without_tensors(value):
    if isinstance(value, torch.Tensor):
        return None
    return [None] * len(value) if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else value


def _fits(out, wanted) -> bool:
    return all(
        type(t) in PLAIN and t.shape == shape and t.dtype is dtype and t.is_cpu and t.is_contiguous()
        for t, (shape, dtype) in zip(out, wanted)
    )


def remembered(check):
    """``check(tensors, *rest)`` kept by what it may depend on: of tensors (or None, or lists of them) in the tuple ``tensors`` shape,
    dtype, device, layout and whether they ask for a gradient; of the rest types and values. It returns a :class:`Ready` without data.

    What cannot be a key (lists, sizes that are symbols) and everything under a compiler is checked anew.
    """
    kept: dict[tuple, Ready] = {}

    @functools.wraps(check)
    def call(tensors, *rest):
        if torch.compiler.is_compiling():
            return check(tensors, *rest)
        key = [rest, *map(type, rest)]
        try:
            for t in tensors:
                kind = type(t)
                key.append(kind)
                if kind is list or kind is tuple:
                    key += map(_facts, t)
                elif t is not None:
                    key.append(_facts(t))
            for r in rest:
                if type(r) is tuple:
                    key += map(type, r)
            key = tuple(key)
            found = kept.get(key)
        except (AttributeError, TypeError):
            return check(tensors, *rest)
        if found is None:
            found = check(tensors, *rest)
            found.kept = True
            keep(kept, key, found)
        return found

    return call


def planned(describe):
    """The launcher that ``describe(outputs, *args)`` -> :class:`Launch` is for, with the fields kept for equal arguments and for tensors of
    the same dtypes and strides."""
    kept: dict[tuple, tuple] = {}

    @functools.wraps(describe)
    def run(outputs, *args):
        tensors, key = list(outputs), [torch.get_num_threads()]
        for a in args:
            if isinstance(a, torch.Tensor):
                tensors.append(a)
                key.append("tensor")
            elif type(a) is list and a and isinstance(a[0], torch.Tensor):
                tensors += a
                key.append(len(a))
            else:
                key.append(tuple(a) if type(a) is list else a)
        key += [t.dtype for t in tensors]
        key += [t.stride() for t in tensors]
        key = tuple(key)
        plan = kept.get(key)
        if plan is not None:
            return _repeat(plan, tensors, ())
        launch = describe(outputs, *args)
        launch.run()
        plan = _plan(launch, tensors)
        if plan is not None:
            keep(kept, key, plan)

    run.describe = describe
    return run


def _repeat(plan, tensors, random) -> None:
    kernel, fields, places, scale = plan
    fields = fields.copy()
    for at, which, offset in places:
        fields[at] = tensors[which].data_ptr() + offset
    if random:
        seed, offset, first_sample = random
        fields[-4:] = seed & 0xFFFFFFFF, seed >> 32, offset, first_sample
    kernel(tuple(fields), scale)


def _plan(launch: Launch, tensors) -> tuple | None:
    """What repeats the launch for other tensors; None where it read copies of them, or where one stands for two."""
    which = {id(t): i for i, t in enumerate(tensors)}
    places = [(n, which.get(id(f.tensor)), f.offset) for n, f in enumerate(launch.fields) if type(f) is Place]
    if len(which) < len(tensors) or any(i is None for _, i, _ in places):
        return None
    return launch.kernel, [0 if type(f) is Place else f for f in launch.fields], places, launch.scale
