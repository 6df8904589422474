"""Linear and feed-forward layers that hold the kept channels alone.

Weights are padded once to the next multiple of 8 rows and columns, so that every row starts on 16 bytes. The ops see the logical
part, a view: no padded element enters any arithmetic, and its gradient is exactly zero, which weight decay keeps it.
"""

from __future__ import annotations

import json

import torch
from torch import nn

from .. import pruned_ffn, pruned_linear
from ..ops.pruned.activations import ACTS
from ..ops.pruned.index import ChannelIndex, checked

ALIGN = 8


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def _indices(name: str, keep, size: int) -> tuple[int, ...] | None:
    """Kept channels; None where all are kept."""
    if keep is None:
        return None
    if isinstance(keep, ChannelIndex) and keep.size != size:
        raise ValueError(f"{name}: chooses from {keep.size} channels, expected from {size}")
    index = tuple((keep if isinstance(keep, ChannelIndex) else checked(name, keep, size)).tolist())
    return None if len(index) == size else index


def _positive(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r}, expected an integer >= 1")
    return value


def _check_act(act: str) -> str:
    if act not in ACTS:
        raise ValueError(f"act: {act!r}, expected one of {', '.join(map(repr, ACTS))}")
    return act


class _Packed(nn.Module):
    """What a packed layer has: matrices padded by :data:`ALIGN`, lists of kept channels, and a description that its checkpoint carries.

    Lists are kept as numbers as well: those of a buffer may be out of reach (meta) or not there yet (``to_empty``).
    """

    def __init__(self):
        super().__init__()
        self._logical: dict[str, tuple[int, ...]] = {}
        self._kept: dict[str, tuple[int, ...] | None] = {}

    def _matrix(self, name: str, rows: int, columns: int, device, dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.zeros(padded(rows), padded(columns), device=device, dtype=dtype)))
        self._logical[name] = (rows, columns)

    def _vector(self, name: str, size: int, wanted: bool, device, dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.zeros(padded(size), device=device, dtype=dtype)) if wanted else None)
        self._logical[name] = (size,)

    def _list(self, name: str, kept: tuple[int, ...] | None, device) -> None:
        self.register_buffer(name, None if kept is None else torch.tensor(kept, dtype=torch.int32, device=device))
        self._kept[name] = kept

    @torch.no_grad()
    def _refill(self, *names: str) -> None:
        """Write lists into their buffers, where these have memory."""
        for name in names:
            buffer = getattr(self, name)
            if buffer is not None and not buffer.is_meta:
                buffer.copy_(torch.tensor(self._kept[name], dtype=torch.int32, device="cpu"))

    def _apply(self, fn, recurse=True):
        without = [n for n in self._kept if getattr(self, n) is not None and getattr(self, n).is_meta]
        super()._apply(fn, recurse)
        self._refill(*without)
        return self

    @torch.no_grad()
    def _put(self, name: str, value: torch.Tensor | None) -> None:
        """Write the logical part of a parameter, and zeros around it."""
        if value is not None:
            if tuple(getattr(self, name).shape) != self._logical[name]:
                getattr(self, name).zero_()
            self.logical(name).copy_(value)

    @torch.no_grad()
    def _draw(self, name: str, fan: int) -> None:
        """nn.Linear's initialisation of the logical part, and zeros around it."""
        if getattr(self, name) is not None:
            getattr(self, name).zero_()
            self.logical(name).uniform_(-(fan**-0.5), fan**-0.5)

    def logical(self, name: str) -> torch.Tensor | None:
        """A parameter without its padding: a view."""
        t = getattr(self, name)
        size = self._logical[name]
        if t is None or tuple(t.shape) == size:
            return t
        return t[tuple(slice(n) for n in size)]

    def layout(self) -> dict:
        """What the numbers in a checkpoint mean: JSON types only."""
        raise NotImplementedError

    def _lists(self) -> dict:
        return {name: None if kept is None else list(kept) for name, kept in self._kept.items()}

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(json.dumps(self.layout(), sort_keys=True).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state) -> None:
        """Checked before anything is loaded; see :meth:`_load_from_state_dict`."""

    def _fault(self, state, prefix: str) -> str | None:
        """Why a state is not of this layer: a line that names it, or None. Missing names and other shapes are torch's to report."""
        found, ours = state.get(prefix + "_extra_state"), self.layout()
        if found is None:
            if all(prefix + n not in state for n in (*self._parameters, *self._buffers)):
                return None
            return (
                f"{prefix}_extra_state: missing, expected a packed checkpoint of {type(self).__name__} "
                "(vidkern.nn.load_masked_state takes dense ones)"
            )
        theirs = _described(found)
        if theirs is None:
            return f"{prefix}_extra_state: not readable, expected the layout of a {type(self).__name__}"
        if theirs != ours:
            differing = [f"{k} {theirs.get(k)!r:.40}, expected {v!r:.40}" for k, v in ours.items() if theirs.get(k) != v]
            return f"{prefix.rstrip('.') or type(self).__name__}: another layout: {'; '.join(differing) or theirs}"
        for name, kept in self._kept.items():
            t = state.get(prefix + name)
            if kept is not None and type(t) is torch.Tensor and not t.is_meta and t.tolist() != list(kept):
                return f"{prefix}{name}: {t.tolist()!r:.40}, expected the layout's {list(kept)!r:.40}"
        for name, size in self._logical.items():
            t, own = state.get(prefix + name), getattr(self, name)
            if t is not None and own is not None and t.shape == own.shape and has_padding(t, size):
                return f"{prefix}{name}: padding beyond {size} is not zero, expected a packed weight (vidkern.nn.save writes zeros there)"
        return None

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if fault := self._fault(state, prefix):
            errors.append(fault)
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        self._refill(*(name for name in self._kept if prefix + name not in state))


def _described(found) -> dict | None:
    """The layout in an extra state; None where there is none."""
    try:
        layout = json.loads(bytes(found.cpu().tolist()))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return layout if isinstance(layout, dict) else None


def has_padding(t: torch.Tensor, size: tuple[int, ...]) -> bool:
    """Whether anything beyond the logical size is not zero."""
    if t.device.type == "meta" or tuple(t.shape) == size:
        return False
    rest = t.detach().clone()
    rest[tuple(slice(n) for n in size)] = 0
    return bool(rest.any())


def clear_padding(t: torch.Tensor, size: tuple[int, ...]) -> None:
    """Zero what is beyond the logical size."""
    for axis, n in enumerate(size):
        t.narrow(axis, n, t.shape[axis] - n).zero_()


class PrunedLinear(_Packed):
    """nn.Linear(in_features, out_features) of which only some inputs and outputs are left; x and the result keep their full width.

    Without ``out_index`` the result is full; with it, channels that are not written are zero, or the residual's own. A layer whose
    neighbours were packed too has no index: ``PrunedLinear(kept_in, kept_out)``.

    ``model.load_state_dict`` refuses a state of another layout (lists, sizes, act, eps, bias), but by then other modules of the model may
    have taken theirs; :func:`vidkern.nn.load` looks at all of them first.

    Args:
        in_features, out_features: width of x and of the result.
        bias: whether there is one, on the kept outputs.
        in_index, out_index: kept channels: sorted numbers, a bool mask, or a ChannelIndex; None: all.
        act: as in :func:`vidkern.pruned_linear`; with "swiglu" the weight has two rows per kept output, all gates first.
        eps: of the norm that a call may ask for.

    Raises:
        TypeError, ValueError: an argument is wrong; a list is empty, unsorted, repeated or out of range.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, in_index=None, out_index=None, act="none", eps=1e-6, device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features = _positive("in_features", in_features), _positive("out_features", out_features)
        self.act, self.eps = _check_act(act), float(eps)
        kept_in, kept_out = _indices("in_index", in_index, in_features), _indices("out_index", out_index, out_features)
        self.kept_in = in_features if kept_in is None else len(kept_in)
        self.kept_out = out_features if kept_out is None else len(kept_out)
        rows = self.kept_out * (2 if act == "swiglu" else 1)
        self._matrix("weight", rows, self.kept_in, device, dtype)
        self._vector("bias", rows, bias, device, dtype)
        self._list("in_index", kept_in, device)
        self._list("out_index", kept_out, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation of the logical part, zeros around it, and the lists: all that ``to_empty`` leaves undone."""
        self._draw("weight", self.kept_in)
        self._draw("bias", self.kept_in)
        self._refill(*self._kept)

    def layout(self) -> dict:
        return {
            "form": "PrunedLinear", "in_features": self.in_features, "out_features": self.out_features, "act": self.act,
            "eps": float(self.eps), "bias": self.bias is not None, **self._lists(),
        }  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.kept_in} of {self.in_features} in, {self.kept_out} of {self.out_features} out, bias={self.bias is not None}, "
            f"act={self.act!r}"
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, keep_in=None, keep_out=None, *, act="none", eps=1e-6) -> PrunedLinear:
        """The kept rows and columns of a dense layer. ``keep_out`` counts pairs where ``act`` is "swiglu"."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: {type(linear).__name__}, expected an nn.Linear")
        out = linear.out_features
        if _check_act(act) == "swiglu":
            if out % 2:
                raise ValueError(f"linear: {out} output channels, expected an even number: swiglu takes pairs")
            out //= 2
        made = cls(
            linear.in_features, out, linear.bias is not None, in_index=keep_in, out_index=keep_out, act=act, eps=eps,
            device=linear.weight.device, dtype=linear.weight.dtype,
        )
        made._take(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        return made

    def _full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the dense weight that are kept."""
        device = self.weight.device
        columns = torch.arange(self.in_features, device=device) if self.in_index is None else self.in_index.long()
        rows = torch.arange(self.out_features, device=device) if self.out_index is None else self.out_index.long()
        return (torch.cat([rows, rows + self.out_features]) if self.act == "swiglu" else rows), columns

    @torch.no_grad()
    def _take(self, weight, bias) -> None:
        rows, columns = self._full()
        self._put("weight", weight.index_select(0, rows).index_select(1, columns))
        self._put("bias", None if bias is None else bias.index_select(0, rows))

    @torch.no_grad()
    def dense(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, bias) at full size, zero where pruned."""
        rows, columns = self._full()
        size = self.out_features * (2 if self.act == "swiglu" else 1)
        weight = self.weight.new_zeros(size, self.in_features)
        weight[rows[:, None], columns] = self.logical("weight")
        if self.bias is None:
            return weight, None
        bias = self.bias.new_zeros(size)
        bias[rows] = self.logical("bias")
        return weight, bias

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with the same result (before ``act``), zero where pruned."""
        weight, bias = self.dense()
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
        return made

    def forward(self, x, *, gate=None, mask=None, residual=None, norm=None, scale=None, shift=None, impl=None):
        """x [..., tokens, in_features] -> [..., tokens, out_features]; arguments as in :func:`vidkern.pruned_linear`.

        Raises:
            ValueError: x or ``residual`` has another width; and as there.
        """
        # To the op, channels that a list does not name may be any number.
        if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] != self.in_features:
            raise ValueError(f"x: shape {tuple(x.shape)}, expected [..., tokens, {self.in_features}]: the layer's in_features")
        return pruned_linear(
            x, self.logical("weight"), self.logical("bias"), in_index=self.in_index, out_index=self.out_index, act=self.act, gate=gate,
            mask=mask, residual=residual, out_features=self.out_features, norm=norm, scale=scale, shift=shift, eps=self.eps, impl=impl,
        )


class PrunedFFN(_Packed):
    """A two-layer network of which some groups of hidden channels are left; the hidden tensor exists a tile at a time.

    ``model.load_state_dict`` refuses a state of another layout (kept groups, sizes, act, eps, bias), but by then other modules of the model
    may have taken theirs; :func:`vidkern.nn.load` looks at all of them first.

    Args:
        dim: channels of x and of the result.
        hidden: hidden channels before pruning.
        tile: hidden channels that exist at a time.
        act: "gelu_tanh", "silu", "none" or "swiglu" (gate and value of a channel are kept or cut together).
        group: channels of a group; divides ``hidden``.
        keep: kept groups: sorted numbers, a bool mask or a ChannelIndex; None: all.
        bias: whether both layers have one.
        eps: of the norm that a call may ask for.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self, dim, hidden, *, tile=768, act="gelu_tanh", group=128, keep=None, bias=True, eps=1e-6, device=None, dtype=None
    ):
        super().__init__()
        self.dim, self.hidden, self.group = _positive("dim", dim), _positive("hidden", hidden), _positive("group", group)
        self.tile, self.act, self.eps = _positive("tile", tile), _check_act(act), float(eps)
        if hidden % group:
            raise ValueError(f"group: {group}, expected a divisor of hidden {hidden}")
        groups = _indices("keep", keep, hidden // group)
        self.kept = hidden if groups is None else len(groups) * group
        rows = self.kept * (2 if act == "swiglu" else 1)
        self._matrix("w1", rows, dim, device, dtype)
        self._vector("b1", rows, bias, device, dtype)
        self._matrix("w2", dim, self.kept, device, dtype)
        self._vector("b2", dim, bias, device, dtype)
        self._list("keep", groups, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation of the logical part, zeros around it, and the list: all that ``to_empty`` leaves undone."""
        for name, fan in (("w1", self.dim), ("b1", self.dim), ("w2", self.kept), ("b2", self.kept)):
            self._draw(name, fan)
        self._refill(*self._kept)

    def layout(self) -> dict:
        return {
            "form": "PrunedFFN", "dim": self.dim, "hidden": self.hidden, "group": self.group, "act": self.act,
            "eps": float(self.eps), "bias": self.b1 is not None, **self._lists(),
        }  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.kept} of {self.hidden} hidden, tile={self.tile}, act={self.act!r}, bias={self.b1 is not None}"

    @classmethod
    def from_dense(cls, w1: nn.Linear, w2: nn.Linear, keep=None, *, group=128, tile=768, act="gelu_tanh", eps=1e-6) -> PrunedFFN:
        """The kept groups of two dense layers."""
        for name, layer in (("w1", w1), ("w2", w2)):
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"{name}: {type(layer).__name__}, expected an nn.Linear")
        pairs = 2 if _check_act(act) == "swiglu" else 1
        if w1.out_features != pairs * w2.in_features:
            raise ValueError(f"w1: {w1.out_features} output channels, expected {pairs * w2.in_features} for w2's {w2.in_features} inputs")
        if w1.in_features != w2.out_features:
            raise ValueError(f"w2: {w2.out_features} output channels, expected w1's {w1.in_features} inputs")
        if (w1.bias is None) != (w2.bias is None):
            raise ValueError("w2: has a bias where w1 has none or the reverse, expected both or neither")
        made = cls(
            w1.in_features, w2.in_features, tile=tile, act=act, group=group, keep=keep, bias=w1.bias is not None, eps=eps,
            device=w1.weight.device, dtype=w1.weight.dtype,
        )
        made._take(*(None if p is None else p.detach() for p in (w1.weight, w1.bias, w2.weight, w2.bias)))
        return made

    def _full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the dense first weight, and columns of the second, that are kept."""
        device = self.w1.device
        columns = torch.arange(self.hidden, device=device)
        if self.keep is not None:
            columns = columns.view(-1, self.group)[self.keep.long()].flatten()
        return (torch.cat([columns, columns + self.hidden]) if self.act == "swiglu" else columns), columns

    @torch.no_grad()
    def _take(self, w1, b1, w2, b2) -> None:
        rows, columns = self._full()
        self._put("w1", w1.index_select(0, rows))
        self._put("w2", w2.index_select(1, columns))
        self._put("b1", None if b1 is None else b1.index_select(0, rows))
        self._put("b2", b2)

    @torch.no_grad()
    def dense(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """(w1, b1, w2, b2) at full size, zero where pruned."""
        rows, columns = self._full()
        w1 = self.w1.new_zeros(self.hidden * (2 if self.act == "swiglu" else 1), self.dim)
        w1[rows] = self.logical("w1")
        w2 = self.w2.new_zeros(self.dim, self.hidden)
        w2[:, columns] = self.logical("w2")
        if self.b1 is None:
            return w1, None, w2, None
        b1 = self.b1.new_zeros(w1.shape[0])
        b1[rows] = self.logical("b1")
        return w1, b1, w2, self.logical("b2").clone()

    def to_dense(self) -> tuple[nn.Linear, nn.Linear]:
        """Two nn.Linear with the same result around ``act`` (which maps 0 to 0), zero where pruned."""
        w1, b1, w2, b2 = self.dense()
        made = []
        for weight, bias in ((w1, b1), (w2, b2)):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
            made.append(layer)
        return made[0], made[1]

    def forward(self, x, *, gate=None, mask=None, residual=None, norm=None, scale=None, shift=None, impl=None):
        """x [..., tokens, dim] -> the same shape; arguments as in :func:`vidkern.pruned_ffn`."""
        return pruned_ffn(
            x, *(self.logical(n) for n in ("w1", "b1", "w2", "b2")), tile=self.tile, act=self.act, gate=gate, mask=mask, residual=residual,
            norm=norm, scale=scale, shift=shift, eps=self.eps, impl=impl,
        )
