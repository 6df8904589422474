"""The one mechanism behind every op: register it with torch, keep its backends, choose one, say why.

An op is one :class:`Op` declaration. From it come the dispatcher schema, the kernel for every device, the fake
kernel, autograd, autocast, the FLOP formula, the DTensor sharding rule and, where asked for, an ``out`` overload.

A call takes four hops: public function (checks) -> ``torch.ops.vidkern.<op>`` -> the chosen backend -> its kernel.
Every argument of a schema is explicit, defaults live in the public functions, and the last one is ``str impl``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

_LIB = torch.library.Library("vidkern", "DEF")
_OPS: dict[str, Op] = {}
_forced: str = "auto"
_warned: set[tuple] = set()  # (op, backend, kind of device) of which a user has been told
_settled: dict[tuple, bool] = {}  # (op, backend, device, dtype) -> may be chosen; emptied by verified.forget()


class _PerThread(threading.local):
    explaining: list | None = None  # the calls that explain() of this thread has caught


_local = _PerThread()
# Fixed strides: a compiler may not hand a kernel other strides than the traced ones.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
# Key sets of plain tensors below autograd: no mode, subclass, functorch level or functionalization is left to see the
# call, so that the dispatcher would only come back to the op's kernel, 4 microseconds later.
_PLAIN = {torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)}
# The dispatcher has already chosen the functorch level when an Autograd kernel runs, so the node for just that level is
# what is wanted; torch.autograd.Function would start over from the outermost level, and its apply() costs twice as much.
_LevelFunction = torch.autograd.function._SingleLevelFunction


class BackendUnavailable(RuntimeError):
    """A backend was named (``impl=`` or :func:`use`) that cannot serve these arguments; the message says why."""


class UnverifiedBackendWarning(UserWarning):
    """A backend was chosen that no record says is right on this kind of device; ``vidkern verify`` makes one."""


def _as_returns(outputs: tuple):
    return outputs if len(outputs) > 1 else outputs[0]


# What the backends that most ops have are; the others describe themselves.
_COMMON = {
    "cpu": "C++ kernels for float32 and bfloat16 on the CPU",
    "reference": "plain torch for any device and dtype; slow",
}
TRUST = ("none", "warn", "require")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: what ``impl=`` calls it.
        why_not: ``why_not(*op_args)`` returns None when it can serve them, else one sentence that says why not. It may
            look at metadata only (device, dtype, shape, strides): it also runs on fake tensors.
        run: ``run(outputs, *op_args)`` fills the preallocated outputs.
        run_backward: the same for the backward op, or None when the op has no backward.
        description: what it is, in one line; "cpu" and "reference" need none.
        trust: what automatic choice asks for on a device other than the CPU (see ``verified.py``): "none" no record;
            "warn" says once per op and kind of device that there is none; "require" passes it over without one. A backend
            that is named runs in any case.
        sources: its files, as "ops/<op>/triton.py" below the package or "csrc/...", whose content a record is bound to;
            what they include or import from beside them is found.

    Raises:
        ValueError: ``trust`` is none of the three, or asks for records without ``sources``.
    """

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., None]
    run_backward: Callable[..., None] | None = None
    description: str = ""
    trust: str = "none"
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if self.trust not in TRUST:
            raise ValueError(f"trust: {self.trust!r}, expected one of {', '.join(map(repr, TRUST))}")
        if self.trust != "none" and not self.sources:
            raise ValueError(f"sources: none given, expected the files that a record of {self.name!r} is bound to")
        if not self.description:
            object.__setattr__(self, "description", _COMMON.get(self.name, ""))


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated by its backward op.

    Args:
        schema: schema of ``<op>_backward``, ending in ``str impl``.
        allocate: ``allocate(*backward_args)`` -> tuple of uninitialised outputs.
        save: ``save(args, outputs)`` -> tuple of tensors (or None) to keep.
        call: ``call(saved, args, grads)`` -> positional arguments of the backward op without ``impl``; ``args`` are the
            forward arguments with every tensor replaced by None, and a gradient that does not exist is None.
        scatter: ``scatter(backward_outputs, args, grads)`` -> gradients in the order of the flattened forward arguments; ``grads``, those
            of the outputs, for an argument whose gradient is one of them as it is.
        flops: FLOPs of ``<op>_backward`` from its arguments.
        shard: sharding rule of ``<op>_backward``; see :class:`Op`.
    """

    schema: str
    allocate: Callable[..., tuple[torch.Tensor, ...]]
    save: Callable
    call: Callable
    scatter: Callable
    flops: Callable[..., int] | None = None
    shard: Callable | None = None


def _flatten(args: Sequence) -> tuple[list, tuple | None]:
    """Tensor lists spread into the argument list, with what it takes to undo it (autograd sees only flat tensors)."""
    if not any(isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor) for a in args):
        return list(args), None
    flat, plan = [], []
    for a in args:
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor):
            flat.extend(a)
            plan.append(len(a))
        else:
            flat.append(a)
            plan.append(-1)
    return flat, tuple(plan)


def _unflatten(flat: Sequence, plan: tuple | None) -> tuple:
    if plan is None:
        return tuple(flat)
    args, i = [], 0
    for n in plan:
        if n < 0:
            args.append(flat[i])
            i += 1
        else:
            args.append(list(flat[i : i + n]))
            i += n
    return tuple(args)


def _wants_gradient(name: str, args: Sequence) -> bool:
    """Whether autograd must record this call. Forward mode has no formula here, and dropping a tangent would be silent."""
    if forward_ad._current_level >= 0:
        for t in _flatten(args)[0]:
            if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(f"{name}: forward-mode differentiation is not supported, expected reverse mode")
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _lower_levels():
    """What a node's forward runs the rest of the dispatch under: a node switches gradients off, but inside torch.func an outer
    level still has to record the call."""
    return torch.enable_grad() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext()


def _apply(function, keyset, args):
    """Put the autograd node ``function`` on the graph, also inside torch.func transforms."""
    flat, plan = _flatten(args)
    if not torch._C._are_functorch_transforms_active():
        return function.apply(keyset, plan, *flat)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return function.apply(keyset, plan, *flat)


class Op:
    """Declare an op and register it with torch.

    Args:
        name: ``torch.ops.vidkern.<name>``.
        schema: argument and return schema, without defaults, ending in ``str impl``.
        allocate: ``allocate(*args)`` -> tuple of uninitialised outputs: the only place that decides their shapes and
            strides, for the fake kernel and for every backend.
        backends: best first.
        gradient: see :class:`Gradient`; None for an op without backward.
        cast: positions of the tensor (or tensor-list) arguments that autocast lowers.
        flops: ``flops(*args)`` -> int for ``torch.utils.flop_counter``; sees real or fake tensors.
        shard: ``shard(*args)`` -> list of (output placements, input placements) over one mesh dimension, as
            ``torch.distributed.tensor.experimental.register_sharding`` takes; tensors arrive as ``DTensorSpec``.
        out: also register ``<name>.out``, which writes into given outputs; inference only.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        allocate: Callable[..., tuple[torch.Tensor, ...]],
        backends: Sequence[Backend],
        gradient: Gradient | None = None,
        cast: Sequence[int] = (),
        flops: Callable[..., int] | None = None,
        shard: Callable | None = None,
        out: bool = False,
    ):
        if name in _OPS:
            raise RuntimeError(f"name: op {name!r} is registered already, expected a new one")
        if not schema.split("->")[0].rstrip().endswith("str impl)"):
            raise ValueError(f"schema: {schema!r}, expected a last argument `str impl`")
        self.name, self.backends, self.gradient = name, tuple(backends), gradient
        self._by_name = {b.name: b for b in self.backends}
        self._cast = tuple(cast)
        self._allocate = allocate
        self._sharding = [(name, shard)] if shard else []
        self._sharded = False

        _LIB.define(name + schema, tags=_TAGS)
        self.overload = getattr(torch.ops.vidkern, name).default
        _LIB.impl(name, self._kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vidkern::{name}", self._fake, lib=_LIB)
        for key in ("AutocastCPU", "AutocastCUDA"):
            _LIB.impl(name, self._autocast_kernel(key), key)
        if out:
            self._define_out(schema)
        # After the last overload: a new one changes the packet's hash, by which the formula is found.
        _register_flops(self.overload, flops)
        if gradient is None:
            _LIB.impl(name, self._no_gradient, "Autograd", with_keyset=True)
        else:
            self._define_backward(gradient)
            self._function = self._make_function(gradient)
            _LIB.impl(name, self._autograd_kernel, "Autograd", with_keyset=True)
        _OPS[name] = self

    # ---- choice -------------------------------------------------------------------------------------------------
    def choose(self, args: Sequence) -> str:
        """Name of the backend that serves ``args`` (positional op arguments, ``impl`` last)."""
        impl = args[-1]
        if impl == "auto":
            for backend in self.backends:
                # A record that is needed is looked for first: that is quicker than a predicate which looks at every stride.
                if backend.trust == "require" and not self._trusted(backend, args):
                    continue
                # The comparison is all that a call pays for backends that need no record.
                if backend.why_not(*args) is None and (backend.trust != "warn" or self._trusted(backend, args)):
                    return backend.name
            reasons = "; ".join(f"{b.name}: {b.why_not(*args) or self.unverified(b, args)}" for b in self.backends)
            raise BackendUnavailable(f"{self._called()}: no backend can serve these arguments ({reasons})")
        backend = self._by_name.get(impl)
        if backend is None:
            names = ", ".join(f'"{n}"' for n in ("auto", *self._by_name))
            if impl == _forced:  # a backend of another op: an argument cannot be wrong that was not given
                raise BackendUnavailable(f'vidkern.use("{impl}"): {self._called()} has no such backend; name one of its own by impl=: {names}')
            raise ValueError(f"impl: {impl!r} is no backend of {self._called()}, expected one of {names}")
        reason = backend.why_not(*args)
        if reason is not None:
            raise BackendUnavailable(f'impl: "{impl}" cannot serve this call of {self._called()}: {reason}')
        return impl

    def _called(self) -> str:
        """The public function whose call brought us here, for errors; the op as well where that has another name."""
        from . import _HOMES

        name, frame = self.name, sys._getframe(1)
        while frame is not None:
            function, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
            if module.startswith("vidkern.ops.") and _HOMES.get(function) == module:
                name = function  # the outermost counts: that is what was called from outside
            frame = frame.f_back
        return name if name == self.name else f"{name} (op {self.name})"

    def unverified(self, backend: Backend, args: Sequence) -> str | None:
        """What is missing to trust ``backend`` with ``args`` on their device, one phrase; None when nothing is."""
        tensor = _first_tensor(args)
        if backend.trust == "none" or tensor.device.type == "cpu":
            return None
        from . import verified

        return verified.lacking(self.name, backend, tensor.device, tensor.dtype)

    def _trusted(self, backend: Backend, args: Sequence) -> bool:
        """Whether automatic choice may take ``backend``; warns where that is without a record."""
        tensor = _first_tensor(args)
        key = (self.name, backend.name, tensor.device, tensor.dtype)
        if key in _settled:
            return _settled[key]
        lack = self.unverified(backend, args)
        if lack is not None and backend.trust == "warn":
            # Tracing has no side effects: the warning comes when real tensors arrive.
            if torch.compiler.is_compiling() or is_fake(tensor):
                return True
            _warn_once(self.name, backend.name, tensor.device, lack)
        _settled[key] = lack is None or backend.trust == "warn"
        return _settled[key]

    def __call__(self, *args):
        """Call the op with positional arguments, ``impl`` (None = what :func:`use` says) last."""
        if args[-1] is None:
            args = (*args[:-1], _forced)
        if not torch.compiler.is_compiling():
            self._outside_the_compiler(args)
        return self.overload(*args)

    def _outside_the_compiler(self, args) -> None:
        if not isinstance(args[-1], str):
            raise TypeError(f"impl: {args[-1]!r}, expected a backend's name or None")
        if getattr(_local, "explaining", None) is not None:
            _local.explaining.append((self, args))
            raise _Explained
        if not self._sharded:
            self._prepare_sharding(args)

    def call_out(self, outputs: Sequence[torch.Tensor], *args) -> None:
        """The ``out`` overload: write into ``outputs``; raises RuntimeError if anything requires grad."""
        if args[-1] is None:
            args = (*args[:-1], _forced)
        if not torch.compiler.is_compiling():
            self._outside_the_compiler(args)
        self._out_overload(*args, **dict(zip(self._out_names, outputs)))

    # ---- dispatcher kernels -------------------------------------------------------------------------------------
    def _kernel(self, *args):
        backend = self._by_name[self.choose(args)]
        outputs = self._allocate(*args)
        backend.run(outputs, *args)
        return _as_returns(outputs)

    def _fake(self, *args):
        self.choose(args)
        return _as_returns(self._allocate(*args))

    def _autocast_kernel(self, key: str):
        device = "cpu" if key == "AutocastCPU" else "cuda"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*self._lowered(args, device))

        return kernel

    def _lowered(self, args: Sequence, device: str) -> list:
        """The arguments as autocast hands them on."""

        def lower(t):
            eligible = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
            return t.to(dtype) if eligible and t.dtype != dtype else t

        dtype, args = torch.get_autocast_dtype(device), list(args)
        for i in self._cast:
            args[i] = [lower(t) for t in args[i]] if isinstance(args[i], (list, tuple)) else lower(args[i])
        return args

    def _prepare_sharding(self, args: Sequence) -> None:
        """Tell DTensor how to shard this op, the first time a DTensor arrives.

        Registering earlier would import torch.distributed.tensor (about a second) for everybody.
        """
        module = sys.modules.get("torch.distributed.tensor")
        if self._sharded or module is None or not any(isinstance(a, module.DTensor) for a in _flatten(args)[0]):
            return
        from torch.distributed.tensor.experimental import register_sharding

        for name, rule in self._sharding:
            register_sharding(getattr(torch.ops.vidkern, name).default)(rule)
        self._sharded = True

    def _below_autograd(self, keyset, args):
        if (keyset & _AFTER_AUTOGRAD).raw_repr() in _PLAIN:
            return self._kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & _AFTER_AUTOGRAD, *args)

    def _no_gradient(self, keyset, *args):
        self._prepare_sharding(args)
        if _wants_gradient(self.name, args):
            raise RuntimeError(f"{self.name}: has no backward, expected inputs that do not require grad")
        return self._below_autograd(keyset, args)

    def _autograd_kernel(self, keyset, *args):
        if not self._sharded:
            self._prepare_sharding(args)
        if not _wants_gradient(self.name, args):
            return self._below_autograd(keyset, args)
        # The choice is made once, here, and handed to the backward op.
        args = (*args[:-1], self.choose(args))
        return _apply(self._function, keyset, args)

    # ---- autograd -----------------------------------------------------------------------------------------------
    def _define_backward(self, gradient: Gradient) -> None:
        name = f"{self.name}_backward"
        _LIB.define(name + gradient.schema, tags=_TAGS)
        self.backward_overload = overload = getattr(torch.ops.vidkern, name).default

        def kernel(*args):
            backend = self._by_name[args[-1]]
            outputs = gradient.allocate(*args)
            backend.run_backward(outputs, *args)
            return _as_returns(outputs)

        def fake(*args):
            return _as_returns(gradient.allocate(*args))

        class Twice(_LevelFunction):
            @staticmethod
            def forward(ctx, keyset, plan, *flat):
                with torch._C._AutoDispatchBelowAutograd(), _lower_levels():
                    return overload.redispatch(keyset & _AFTER_AUTOGRAD, *_unflatten(flat, plan))

            @staticmethod
            def backward(ctx, *grads):
                raise RuntimeError(f"{name}: double backward is not supported, expected first-order gradients only")

        def autograd(keyset, *args):
            if _wants_gradient(name, args):
                return _apply(Twice, keyset, args)
            if (keyset & _AFTER_AUTOGRAD).raw_repr() in _PLAIN:
                return kernel(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & _AFTER_AUTOGRAD, *args)

        _LIB.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vidkern::{name}", fake, lib=_LIB)
        _LIB.impl(name, autograd, "Autograd", with_keyset=True)
        _register_flops(overload, gradient.flops)
        if gradient.shard:
            self._sharding.append((name, gradient.shard))

    def _make_function(self, gradient: Gradient):
        op = self

        class Function(_LevelFunction):
            @staticmethod
            def forward(ctx, keyset, plan, *flat):
                args = _unflatten(flat, plan)
                with _lower_levels():
                    output = op._below_autograd(keyset, args)
                outputs = output if isinstance(output, tuple) else (output,)
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(*gradient.save(args, outputs))
                ctx.rest = tuple(
                    None if isinstance(a, torch.Tensor)
                    else [None] * len(a) if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)
                    else a
                    for a in args
                )
                return output

            @staticmethod
            def backward(ctx, *grads):
                if all(g is None for g in grads):
                    return (None,) * len(ctx.needs_input_grad)
                args = gradient.call(ctx.saved_tensors, ctx.rest, grads)
                outputs = op.backward_overload(*args, ctx.rest[-1])
                outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                given = gradient.scatter(outputs, ctx.rest, grads)
                tail = len(ctx.needs_input_grad) - 2 - len(given)
                return (None, None, *given, *(None,) * tail)

        Function.__name__ = f"vidkern_{self.name}"
        return Function

    # ---- out= ---------------------------------------------------------------------------------------------------
    def _define_out(self, schema: str) -> None:
        returns = self.overload._schema.returns
        self._out_names = [r.name or f"out{i}" for i, r in enumerate(returns)]
        mutable = ", ".join(f"Tensor({chr(97 + i)}!) {n}" for i, n in enumerate(self._out_names))
        arguments = schema.split("->")[0].rstrip()[:-1]
        _LIB.define(f"{self.name}.out{arguments}, *, {mutable}) -> ()", tags=_TAGS)
        self._out_overload = getattr(torch.ops.vidkern, self.name).out
        name = f"{self.name}.out"

        def check(args, given):
            # Memory that is never touched costs next to nothing, so asking what would be allocated is cheap.
            for n, want, have in zip(self._out_names, self._allocate(*args), given):
                same = have.shape == want.shape and have.dtype == want.dtype and have.device == want.device
                if not same or have.stride(-1) != 1 or torch._debug_has_internal_overlap(have) == 1:
                    raise ValueError(
                        f"{n}: {tuple(have.shape)} {have.dtype} on {have.device} with strides {have.stride()}, expected "
                        f"{tuple(want.shape)} {want.dtype} on {want.device} with a last stride of 1 and no repeated memory"
                    )

        def kernel(*args, **given):
            outputs = tuple(given[n] for n in self._out_names)
            check(args, outputs)
            self._by_name[self.choose(args)].run(outputs, *args)

        def autograd(keyset, *args, **given):
            if _wants_gradient(self.name, (*args, *given.values())):
                raise RuntimeError(f"{self.name}: out= is inference only, expected tensors that do not require grad")
            with torch._C._AutoDispatchBelowAutograd():
                return self._out_overload.redispatch(keyset & _AFTER_AUTOGRAD, *args, **given)

        _LIB.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vidkern::{name}", lambda *args, **given: None, lib=_LIB)
        _LIB.impl(name, autograd, "Autograd", with_keyset=True)


def _first_tensor(args: Sequence) -> torch.Tensor:
    first = args[0]
    return first if isinstance(first, torch.Tensor) else next(a for a in _flatten(args)[0] if isinstance(a, torch.Tensor))


def _warn_once(op: str, backend: str, device: torch.device, lack: str) -> None:
    from . import verified

    key = (op, backend, verified.device_class(device))
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f'{op}: backend "{backend}" is {lack}', UnverifiedBackendWarning, stacklevel=2)


def evenly_sharded(specs: Sequence, axes: Sequence[int]) -> list[int]:
    """Those of ``axes`` that every mesh dimension divides in every ``DTensorSpec``: the others would leave ragged shards."""
    sizes = specs[0].mesh.shape
    return [axis for axis in axes if all(t.shape[axis] % n == 0 for t in specs for n in sizes)]


def _register_flops(overload, flops) -> None:
    if flops is None:
        return
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(overload._overloadpacket, get_raw=True)(lambda *args, out_val=None, **kwargs: flops(*args))


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    from . import ops as rooms

    rooms.load_all()
    return dict(_OPS)


# ---- what users see -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def use(impl: str) -> Iterator[None]:
    """Force a backend for every vidkern op called inside: ``with vidkern.use("reference"): ...``.

    An op that has no such backend raises :class:`BackendUnavailable` (merging and the pyramids have no "hopper"): give it ``impl=``.

    Args:
        impl: name of a backend, or "auto" to choose again. ``impl=`` given to a call wins over it. Gradients follow the
            backend that the forward ran on, wherever ``backward()`` is called. It holds for the whole process, not for one
            thread, and goes around a compiled function, not into it.

    Raises:
        ValueError: no op has a backend of that name.
    """
    global _forced
    names = {"auto", *(b.name for op in ops().values() for b in op.backends)}
    if impl not in names:
        raise ValueError(f"impl: {impl!r}, expected one of {', '.join(repr(n) for n in sorted(names))}")
    before, _forced = _forced, impl
    try:
        yield
    finally:
        _forced = before


class _Explained(Exception):
    """Raised by an op to hand its arguments to :func:`explain` instead of running."""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the op, the backend chosen (None if none can), a reason for each one passed over, and the
    backend that was named, if one was."""

    op: str
    chosen: str | None
    reasons: dict[str, str]
    named: str | None = None

    def __str__(self) -> str:
        none = f'"{self.named}", which was named, cannot serve this' if self.named else "no backend can serve this"
        lines = [f"{self.op}: {self.chosen or none}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Which backend a call would run on, and why not the others; nothing is computed.

    Args:
        function: a public vidkern function, such as ``vidkern.grid_attention``.
        *args, **kwargs: its arguments.

    Returns:
        an :class:`Explanation`; ``print`` it.

    Raises:
        ValueError, TypeError: the function's own checks failed, ``impl`` is unknown, or the function calls no vidkern op.
        BackendUnavailable: :func:`use` names a backend that this op does not have.
    """
    if not callable(function):
        raise TypeError(f"function: {function!r}, expected a public vidkern function, such as vidkern.grid_attention")
    before = getattr(_local, "explaining", None)
    _local.explaining = calls = []
    try:
        function(*args, **kwargs)
    except _Explained:
        pass
    finally:
        _local.explaining = before
    if not calls:
        raise TypeError(f"function: {function!r} called no vidkern op, expected a public vidkern function")
    op, op_args = calls[0]
    device = _flatten(op_args)[0][0].device.type
    if torch.is_autocast_enabled(device):
        op_args = op._lowered(op_args, device)
    if op_args[-1] not in ("auto", *op._by_name):
        op.choose(op_args)
    wanted, chosen, reasons = op_args[-1], None, {}
    for backend in op.backends:
        reason = backend.why_not(*op_args)
        lack = op.unverified(backend, op_args) if reason is None else None
        if lack and backend.trust == "require" and wanted == "auto":
            reason = f"could serve it, but is chosen only by name: it is {lack}"
        elif reason is None and chosen is None and wanted in ("auto", backend.name):
            chosen, reason = backend.name, f"serves this call, {lack}" if lack else "serves this call"
        elif reason is None:
            reason = f'could serve it, but "{wanted}" was named' if wanted != "auto" else "could serve it, but comes later"
        reasons[backend.name] = reason
    return Explanation(op.name, chosen, reasons, None if wanted == "auto" else wanted)
