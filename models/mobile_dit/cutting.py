"""From a keep-list to a physically smaller model, and back. Weights are sliced once; what one GEMM produces the next one consumes, so that
compact layers need no gather.

`compact` cuts, `expand` puts a cut model back into its parent's shape with zeros, `pack` and `unpack` change between ordinary linears and
vidkern's pruned layers, in which norm, gate and residual are fused.
"""

import dataclasses

import torch
from torch import nn

from .keep import KeepError
from .model import MobileDiT, on_meta


def compact_config(config, keep, *, allow_no_heads=False):
    """The configuration of the cut model. keep: see `keep.Keep`."""
    keep = keep.checked(config, allow_no_heads=allow_no_heads)
    blocks = []
    for b in keep.blocks:
        spec, heads = config.blocks[b], keep.heads[b]
        owned = spec.rope_heads or tuple(range(spec.heads))
        rope_heads = tuple(owned[h] for h in heads) if config.rope == "full" else ()
        blocks.append(dataclasses.replace(spec, heads=len(heads), cross_heads=len(keep.xheads[b]), hidden=len(keep.ffn[b]) * config.group,
                                          rope_heads=rope_heads))
    return dataclasses.replace(config, blocks=tuple(blocks))


def channels(kept, width, parts=1, total=0):
    """Channel indices of kept units of `width` channels, in each of `parts` runs of `total` units."""
    index = torch.tensor(list(kept), dtype=torch.long)
    runs = torch.arange(parts)[:, None] * total + index
    return (runs.flatten()[:, None] * width + torch.arange(width)).flatten()


def _slices(config, keep):
    """{name in the cut model: (name in the parent, {axis: channels})} of every tensor that a cut shortens, and of the blocks' other ones."""
    D = config.head_dim
    found = {}
    for new, b in enumerate(keep.blocks):
        spec = config.blocks[b]
        attentions = (("attention", keep.heads[b], spec.heads, ("qkv",)), ("cross", keep.xheads[b], spec.cross_heads, ("q", "kv")))
        for name, kept, total, projections in attentions:
            prefix, to = f"blocks.{b}.{name}.", f"blocks.{new}.{name}."
            if total and kept:
                for projection in projections:
                    rows = channels(kept, D, {"qkv": 3, "kv": 2, "q": 1}[projection], total)
                    found[f"{to}{projection}.weight"] = found[f"{to}{projection}.bias"] = (f"{prefix}{projection}", {0: rows})
                for norm in ("q_norm", "k_norm"):
                    if config.qk_norm != "none":
                        found[f"{to}{norm}.weight"] = (f"{prefix}{norm}", {0: channels(kept, D)} if config.qk_norm == "all" else {})
                found[f"{to}out.weight"] = (f"{prefix}out", {1: channels(kept, D)})
            found[f"{to}out.bias"] = (f"{prefix}out", {})
        rows = channels(keep.ffn[b], config.group)
        found[f"blocks.{new}.ffn.up.weight"] = found[f"blocks.{new}.ffn.up.bias"] = (f"blocks.{b}.ffn.up", {0: rows})
        found[f"blocks.{new}.ffn.down.weight"] = (f"blocks.{b}.ffn.down", {1: rows})
        found[f"blocks.{new}.ffn.down.bias"] = (f"blocks.{b}.ffn.down", {})
        found[f"blocks.{new}.table"] = (f"blocks.{b}", {})
    return {name: (f"{parent}.{name.rpartition('.')[2]}", axes) for name, (parent, axes) in found.items()}


@torch.no_grad()
def compact(model, keep, *, packed=False, allow_no_heads=False):
    """A new model that has only what `keep` keeps; its outputs and the gradients of kept weights are those of the masked model.

    packed: with vidkern's pruned layers. allow_no_heads: see `Keep.checked`. Raises KeepError for a keep-list that does not fit.
    """
    model = unpack(model)
    config = model.config
    keep = keep.checked(config, allow_no_heads=allow_no_heads)
    cut = on_meta(compact_config(config, keep, allow_no_heads=allow_no_heads))
    parent, state = model.state_dict(), {}
    slices = _slices(config, keep)
    for name in cut.state_dict():
        source, axes = slices.get(name, (name, {}))
        value = parent[source]
        for axis, index in axes.items():
            value = value.index_select(axis, index.to(value.device))
        state[name] = value if axes else value.clone()
    cut.load_state_dict(state, assign=True)
    cut.train(model.training)
    return pack(cut) if packed else cut


@torch.no_grad()
def expand(model, keep, config):
    """The inverse of `compact`: a model of the parent's configuration that holds the cut model's weights, and zeros for what is removed.

    Under `keep.masks_of(keep, config)` it is the cut model's function; removed blocks need that mask.
    """
    keep = keep.checked(config, allow_no_heads=True)
    expected = compact_config(config, keep, allow_no_heads=True)
    plain = unpack(model)
    if plain.config.blocks != expected.blocks:
        raise KeepError(f"keep: makes blocks {_shapes(expected)}, expected those of the model, {_shapes(plain.config)}")
    full = MobileDiT(config).to(plain.embed.weight)
    state = full.state_dict()
    for name, value in state.items():
        if name.startswith("blocks."):
            value.zero_()
    slices = _slices(config, keep)
    for name, value in plain.state_dict().items():
        target, axes = slices.get(name, (name, {}))
        if axes:
            (axis, index), = axes.items()
            state[target].index_copy_(axis, index.to(value.device), value)
        else:
            state[target].copy_(value)
    full.train(model.training)
    return full


def _shapes(config):
    return [(spec.heads, spec.cross_heads, spec.hidden) for spec in config.blocks]


def _linears(model):
    """(parent module, attribute, name) of every layer that has a packed form, but the FFNs."""
    for b, block in enumerate(model.blocks):
        for part in ("attention", "cross"):
            module = getattr(block, part)
            if module is not None and module.heads:
                for attribute in ("qkv", "out") if part == "attention" else ("q", "kv", "out"):
                    yield module, attribute, f"blocks.{b}.{part}.{attribute}"


@torch.no_grad()
def pack(model):
    """The same model with vidkern's pruned layers; a packed model is returned as it is."""
    if model.config.packed:
        return model
    from vidkern.nn import PrunedFFN, PrunedLinear

    packed = on_meta(dataclasses.replace(model.config, packed=True))
    plain = model.state_dict()
    for (home, attribute, _), (source, _, _) in zip(_linears(packed), _linears(model), strict=True):
        setattr(home, attribute, PrunedLinear.from_linear(getattr(source, attribute)))
    for home, source in zip(packed.blocks, model.blocks, strict=True):
        home.ffn = PrunedFFN.from_dense(source.ffn.up, source.ffn.down, group=model.config.group, tile=model.config.tile)
    return _take_rest(packed, plain, model)


@torch.no_grad()
def unpack(model):
    """The same model with ordinary linears; a plain model is returned as it is."""
    if not model.config.packed:
        return model
    plain = on_meta(dataclasses.replace(model.config, packed=False))
    packed = model.state_dict()
    for (home, attribute, _), (source, _, _) in zip(_linears(plain), _linears(model), strict=True):
        setattr(home, attribute, getattr(source, attribute).to_dense())
    for home, source in zip(plain.blocks, model.blocks, strict=True):
        home.ffn.up, home.ffn.down = source.ffn.to_dense()
    return _take_rest(plain, packed, model)


def _take_rest(new, state, model):
    """Give `new`, whose layers in question are real, copies of all other tensors of the model."""
    for name, parameter in list(new.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            setattr(new.get_submodule(owner), attribute, nn.Parameter(state[name].clone(), requires_grad=parameter.requires_grad))
    new.train(model.training)
    return new
