"""Checkpoints of models with pruned layers, in two forms.

"packed": what the modules hold, as ``state_dict()`` gives it. "masked": every pruned layer at its dense size with zeros where it was
pruned, beside bool masks of what is kept, so that a dense model takes the weights and a search can go on from them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from .._files import replacing
from ..errors import UserError, import_extra
from .pruned import PrunedFFN, _Packed, clear_padding

FORMS = ("packed", "masked")


class LayoutError(UserError, ValueError):
    """A checkpoint is of another layout than the model: the message says where and what was expected."""


def _packed_modules(model: nn.Module) -> dict[str, _Packed]:
    return {f"{name}." if name else "": m for name, m in model.named_modules() if isinstance(m, _Packed)}


def _foreign(model: nn.Module) -> dict[str, nn.Module]:
    """The other modules that have an extra state, by its name: what it holds is theirs to know."""
    own = {f"{name}._extra_state".lstrip("."): m for name, m in model.named_modules() if not isinstance(m, _Packed)}
    return {name: m for name, m in own.items() if type(m).get_extra_state is not nn.Module.get_extra_state}


def _mask(index, size: int, device) -> torch.Tensor:
    if index is None:
        return torch.ones(size, dtype=torch.bool, device=device)
    return torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, index.long(), True)


def _dense(module: _Packed) -> dict[str, torch.Tensor]:
    """A layer at its dense size, and its masks."""
    if isinstance(module, PrunedFFN):
        names, parts = ("w1", "b1", "w2", "b2"), module.dense()
        masks = {"keep_mask": _mask(module.keep, module.hidden // module.group, module.w1.device)}
    else:
        names, parts, device = ("weight", "bias"), module.dense(), module.weight.device
        masks = {"in_mask": _mask(module.in_index, module.in_features, device), "out_mask": _mask(module.out_index, module.out_features, device)}
    return {n: t for n, t in zip(names, parts) if t is not None} | masks


@torch.no_grad()
def masked_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state in masked form: every :class:`PrunedLinear` and :class:`PrunedFFN` dense, with ``in_mask``, ``out_mask`` or
    ``keep_mask`` (bool) beside it; everything else as it is."""
    state = model.state_dict()
    for prefix, module in _packed_modules(model).items():
        for name in (*module._parameters, *module._buffers, "_extra_state"):
            state.pop(prefix + name, None)
        state.update({prefix + n: t for n, t in _dense(module).items()})
    return dict(state)


@torch.no_grad()
def load_masked_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load dense weights into a packed model: each layer takes what it keeps. Nothing is written unless all of it fits.

    Args:
        state: masked form, or the plain state of a dense model with the same names (then without masks). Weights that were pruned
            may hold anything. The extra state of other modules is optional.

    Raises:
        LayoutError: names are missing or left over, shapes differ, or a mask is not the layer's own.
    """
    state, faults, todo = dict(state), [], []
    for prefix, module in _packed_modules(model).items():
        module._refill(*module._kept)
        own = _dense(module)
        for name, want in own.items():
            got = state.pop(prefix + name, None)
            if got is None:
                if want.dtype is not torch.bool:
                    faults.append(f"{prefix}{name}: missing, expected {tuple(want.shape)}")
            elif got.shape != want.shape:
                faults.append(f"{prefix}{name}: shape {tuple(got.shape)}, expected the dense {tuple(want.shape)}")
            elif want.dtype is torch.bool and not torch.equal(got.to(want.device, torch.bool), want):
                faults.append(f"{prefix}{name}: keeps other channels than the model, expected {int(want.sum())} of {want.numel()} as there")
            elif want.dtype is not torch.bool:
                own[name] = got.to(want)
        todo.append((module, own))
    packed = {p + n for p, m in _packed_modules(model).items() for n in (*m._parameters, *m._buffers, "_extra_state")}
    foreign = _foreign(model)
    extra = {n: state.pop(n) for n in foreign if n in state}
    rest = {n: t for n, t in model.state_dict().items() if n not in packed and n not in foreign}
    faults += [f"{n}: missing, expected {tuple(t.shape)}" for n, t in rest.items() if n not in state]
    faults += [
        f"{n}: shape {tuple(state[n].shape)}, expected {tuple(t.shape)}" for n, t in rest.items() if n in state and state[n].shape != t.shape
    ]
    faults += [f"{n}: not in the model" for n in state if n not in rest]
    _raise(faults)
    for module, own in todo:
        names = ("w1", "b1", "w2", "b2") if isinstance(module, PrunedFFN) else ("weight", "bias")
        module._take(*(own.get(n) for n in names))
    for name, t in rest.items():
        t.copy_(state[name])
    for name, value in extra.items():
        foreign[name].set_extra_state(value)


def _raise(faults: list[str], what: str = "state") -> None:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise LayoutError(f"{what}: {faults[0]}{more}")


def save(model: nn.Module, path: str | os.PathLike, *, form: str = "packed") -> None:
    """Write the model to a safetensors file, whole or not at all. Padding is written as zeros, whatever it holds.

    Args:
        model: an extra state of other modules that is no tensor is left out.
        form: "packed" or "masked".

    Raises:
        ValueError: another form. FileNotFoundError: no such folder. MissingExtra: safetensors is not installed.
    """
    if form not in FORMS:
        raise ValueError(f"form: {form!r}, expected one of {', '.join(map(repr, FORMS))}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path: folder {os.fspath(Path(path).parent)!r} does not exist, expected one that does")
    safetensors = import_extra("safetensors.torch", "saving a pruned model")
    state = model.state_dict() if form == "packed" else masked_state(model)
    state = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items() if isinstance(t, torch.Tensor)}
    modules = _packed_modules(model)
    if form == "packed":
        for prefix, m in modules.items():
            for name, size in m._logical.items():
                if prefix + name in state:
                    clear_padding(state[prefix + name], size)
    layouts = {prefix.rstrip("."): m.layout() for prefix, m in modules.items()}
    with replacing(path) as fresh:
        safetensors.save_file(state, fresh, metadata={"format": "pt", "vidkern_form": form, "vidkern_layouts": json.dumps(layouts)})


def _read(path: str | os.PathLike) -> tuple[str, dict[str, dict], dict[str, torch.Tensor]]:
    """The form, the layouts and the tensors of a file."""
    import_extra("safetensors.torch", "loading a pruned model")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            form = metadata.get("vidkern_form")
            if form not in FORMS:
                raise LayoutError(f"path: {os.fspath(path)!r} was not written by vidkern.nn.save, expected one that was (or load_masked_state)")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise LayoutError(f"path: {os.fspath(path)!r} is no safetensors file ({' '.join(str(error).split())})") from error
    try:
        layouts = json.loads(metadata["vidkern_layouts"])
        if not all(isinstance(layout, dict) for layout in layouts.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"path: {os.fspath(path)!r} has no readable vidkern_layouts, expected a file of vidkern.nn.save") from error
    return form, layouts, state


def load(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a file of :func:`save`, of either form; the model must have the layout it was saved with. Nothing is loaded unless all fits.

    Raises:
        LayoutError: the file is none of ``save``'s, or of another layout. FileNotFoundError: there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: {os.fspath(path)!r} does not exist, expected a file of vidkern.nn.save")
    form, theirs, state = _read(path)
    modules, faults = _packed_modules(model), []
    ours = {prefix.rstrip("."): m.layout() for prefix, m in modules.items()}
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            there, here = ("not pruned" if layout is None else layout.get("form") for layout in (b, a))
            faults.append(f"{name or 'the model'}: {there} there, {here} here")
        elif a != b:
            faults += [f"{name or a['form']}: {k} {b.get(k)!r:.40}, expected {v!r:.40}" for k, v in a.items() if b.get(k) != v][:1] or [
                f"{name or a['form']}: more entries than expected, {sorted(set(b) - set(a))}"
            ]
    _raise(faults, f"path {os.fspath(path)!r}")
    if form == "masked":
        load_masked_state(model, state)
        return
    foreign, own = _foreign(model), model.state_dict()
    faults = [f"{n}: missing" for n in own if n not in state and n not in foreign]
    faults += [f"{n}: not in the model" for n in state if n not in own]
    faults += [fault for prefix, m in modules.items() if (fault := m._fault(state, prefix))]
    faults += [
        f"{n}: shape {tuple(state[n].shape)}, expected {tuple(t.shape)}"
        for n, t in own.items() if n in state and n not in foreign and state[n].shape != t.shape
    ]  # fmt: skip
    _raise(faults, f"path {os.fspath(path)!r}")
    # Names were looked at; an extra state that no file can hold may be missing.
    model.load_state_dict(state, strict=False)
