"""PrunedLinear and PrunedFFN: equal to dense layers with masks in results and gradients, inert padding, checkpoints in both forms."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vidkern
from vidkern.nn import PrunedFFN, PrunedLinear, load, load_masked_state, masked_state, save
from vidkern.nn.state import LayoutError


def kept(n, size):
    return torch.randperm(size)[:n].sort().values.tolist()


class Dense(nn.Module):
    """A block with masks, as pruning trains it: qkv and out projections of heads, a feed-forward network of groups."""

    def __init__(self, heads, groups, dim=24, head=8, hidden=64, group=8):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 2 * head * 4), nn.Linear(head * 4, dim)
        self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.register_buffer("heads", torch.zeros(4).index_fill(0, torch.tensor(heads), 1).repeat_interleave(head))
        self.register_buffer("groups", torch.zeros(hidden // group).index_fill(0, torch.tensor(groups), 1).repeat_interleave(group))

    def forward(self, x):
        a, b = self.qkv(x).chunk(2, -1)
        x = x + self.out(torch.tanh(a) * b * self.heads)
        return x + self.w2(F.gelu(self.w1(x), approximate="tanh") * self.groups)


class Packed(nn.Module):
    """The same block cut: chains need no index, since both sides are repacked."""

    def __init__(self, dense, heads, groups):
        super().__init__()
        channels = [c for h in heads for c in range(8 * h, 8 * h + 8)]
        both = channels + [c + 32 for c in channels]
        cut = nn.Linear(24, len(both))
        with torch.no_grad():
            cut.weight.copy_(dense.qkv.weight[both])
            cut.bias.copy_(dense.qkv.bias[both])
        self.qkv = PrunedLinear.from_linear(cut)
        narrow = nn.Linear(len(channels), 24)
        with torch.no_grad():
            narrow.weight.copy_(dense.out.weight[:, channels])
            narrow.bias.copy_(dense.out.bias)
        self.out = PrunedLinear.from_linear(narrow)
        self.ffn = PrunedFFN.from_dense(dense.w1, dense.w2, groups, group=8, tile=12)
        self.channels, self.both = channels, both

    def forward(self, x):
        a, b = self.qkv(x).chunk(2, -1)
        x = self.out(torch.tanh(a) * b, residual=x)
        return self.ffn(x, residual=x)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_masked_dense_equals_packed(impl):
    """Results and gradients to 1e-5."""
    heads, groups = [0, 2, 3], [1, 4, 5, 7]
    dense = Dense(heads, groups)
    packed = Packed(dense, heads, groups)
    x = torch.randn(2, 9, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with vidkern.use(impl):
        outs = [dense(inputs[0]), packed(inputs[1])]
        g = torch.randn_like(x)
        for out in outs:
            out.backward(g)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    pairs = {
        "x": (inputs[0].grad, inputs[1].grad),
        "qkv": (dense.qkv.weight.grad[packed.both], packed.qkv.weight.grad[: len(packed.both), :24]),
        "out": (dense.out.weight.grad[:, packed.channels], packed.out.weight.grad[:24, : len(packed.channels)]),
        "out bias": (dense.out.bias.grad, packed.out.bias.grad[:24]),
    }
    rows = packed.ffn._full()[0]
    pairs |= {
        "w1": (dense.w1.weight.grad[rows], packed.ffn.w1.grad), "b1": (dense.w1.bias.grad[rows], packed.ffn.b1.grad),
        "w2": (dense.w2.weight.grad[:, rows], packed.ffn.w2.grad), "b2": (dense.w2.bias.grad, packed.ffn.b2.grad),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("act", ["none", "gelu_tanh", "swiglu"])
def test_padding_is_inert(act):
    """Sizes that are no multiples of 8: the same bits as without padding, and exact zeros in it after AdamW with weight decay."""
    source = nn.Linear(29, 22)
    layer = PrunedLinear.from_linear(source, kept(13, 29), kept(7, 22 // (2 if act == "swiglu" else 1)), act=act)
    n, k = layer._logical["weight"]
    assert layer.weight.shape == (-(-n // 8) * 8, 16) and (n, k) != tuple(layer.weight.shape)
    x = torch.randn(2, 5, 29)
    bare = vidkern.pruned_linear(
        x, layer.logical("weight").contiguous(), layer.logical("bias").contiguous(), in_index=layer.in_index, out_index=layer.out_index,
        out_features=layer.out_features, act=act,
    )
    assert torch.equal(layer(x), bare)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.3)
    before = layer.weight.detach().clone()
    for _ in range(3):
        layer(x).square().sum().backward()
        assert not layer.weight.grad[n:].any() and not layer.weight.grad[:, k:].any() and not layer.bias.grad[n:].any()
        optimizer.step()
        optimizer.zero_grad()
    assert not layer.weight[n:].any() and not layer.weight[:, k:].any() and not layer.bias[n:].any()
    assert not torch.equal(layer.weight, before)


def test_ffn_padding_is_inert():
    ffn = PrunedFFN(21, 30, group=3, keep=[0, 4, 5, 9], tile=5)
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=0.1, weight_decay=0.3)
    for _ in range(2):
        ffn(torch.randn(2, 5, 21)).square().sum().backward()
        optimizer.step()
    for name, size in ffn._logical.items():
        rest = getattr(ffn, name).detach().clone()
        rest[tuple(slice(n) for n in size)] = 0
        assert not rest.any(), name


def test_dense_and_back():
    source = nn.Linear(20, 12)
    keep_in, keep_out = kept(9, 20), kept(5, 12)
    layer = PrunedLinear.from_linear(source, keep_in, keep_out)
    dense = layer.to_dense()
    x = torch.randn(3, 4, 20)
    torch.testing.assert_close(layer(x), dense(x))
    again = PrunedLinear.from_linear(dense, keep_in, keep_out)
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)
    w1, w2 = nn.Linear(16, 64), nn.Linear(32, 16)
    ffn = PrunedFFN.from_dense(w1, w2, [0, 3], group=8, act="swiglu")
    d1, d2 = ffn.to_dense()
    y = torch.randn(3, 4, 16)
    gate, value = d1(y).chunk(2, -1)
    torch.testing.assert_close(ffn(y), d2(F.silu(gate) * value), rtol=1e-5, atol=1e-5)


class Model(nn.Module):
    def __init__(self, keep_in=(0, 3, 5), groups=(1, 2), dim=10):
        super().__init__()
        self.first = PrunedLinear(dim, 16, in_index=list(keep_in), bias=False)
        self.norm = nn.LayerNorm(16)
        self.ffn = PrunedFFN(16, 32, group=8, keep=list(groups))

    def forward(self, x):
        return self.ffn(self.norm(self.first(x)))


@pytest.mark.parametrize("form", ["packed", "masked"])
def test_files_of_both_forms(tmp_path, form):
    model, other, x = Model(), Model(), torch.randn(2, 3, 10)
    assert not torch.allclose(model(x), other(x))
    save(model, tmp_path / "model.safetensors", form=form)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    load(other, tmp_path / "model.safetensors")
    assert torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(other)(x), model(x))


def test_masked_state_is_dense_and_says_what_is_kept():
    model = Model()
    state = masked_state(model)
    assert state["first.weight"].shape == (16, 10) and state["ffn.w1"].shape == (32, 16) and state["ffn.w2"].shape == (16, 32)
    assert state["first.in_mask"].nonzero().flatten().tolist() == [0, 3, 5] and state["ffn.keep_mask"].tolist() == [False, True, True, False]
    assert not state["first.weight"][:, 1].any() and "first.bias" not in state and "first._extra_state" not in state
    other = Model()
    state["first.weight"] += 7 * ~state["first.in_mask"]  # what was pruned may hold anything
    load_masked_state(other, state)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    dense = {n: t for n, t in state.items() if not n.endswith("_mask")}
    load_masked_state(Model(), dense)


def test_another_layout_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    for form in ("packed", "masked"):
        save(Model(), path, form=form)
        for other, message in (
            (Model(keep_in=(0, 3, 6)), r"first: in_index \[0, 3, 5\], expected \[0, 3, 6\]"),
            (Model(groups=(0, 2)), r"ffn: keep \[1, 2\], expected \[0, 2\]"),
            (Model(dim=11), "first: in_features 10, expected 11"),
            (nn.Sequential(nn.Linear(2, 2)), "ffn: PrunedFFN there, not pruned here"),
        ):
            before = [p.detach().clone() for p in other.parameters()]
            with pytest.raises(LayoutError, match=message) as caught:
                load(other, path)
            assert "\n" not in str(caught.value) and all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
    wrong = masked_state(Model())
    wrong["norm.weight"] = torch.zeros(3)
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(LayoutError, match=r"state: norm.weight: shape \(3,\), expected \(16,\)"):
        load_masked_state(model, wrong)
    wrong = masked_state(Model(keep_in=(0, 3, 6)))
    with pytest.raises(LayoutError, match="first.in_mask: keeps other channels than the model"):
        load_masked_state(model, wrong)
    del wrong["ffn.w1"]
    with pytest.raises(LayoutError):
        load_masked_state(model, wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(RuntimeError, match="another layout: in_index"):
        model.load_state_dict(Model(keep_in=(0, 3, 6)).state_dict())
    with pytest.raises(RuntimeError, match="first._extra_state: missing, expected a packed checkpoint of PrunedLinear"):
        model.load_state_dict(masked_state(Model()), strict=False)
    state = Model().state_dict()
    state["first.weight"][:, 4] = 1
    with pytest.raises(RuntimeError, match=r"first.weight: padding beyond \(16, 3\) is not zero"):
        model.load_state_dict(state)


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("fault", ["padding", "layout", "unreadable", "list"])
def test_files_whose_last_module_is_wrong_change_nothing(tmp_path, fault):
    """The file's own description fits and the tensors of one module do not: those before it are not loaded either."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, model = tmp_path / "model.safetensors", Model()
    save(model, path)
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
    if fault == "padding":
        model = nn.Sequential(nn.Linear(3, 3), PrunedLinear(12, 12))
        save(model, path)
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
        state["1.bias"][13] = 1.0
    elif fault == "layout":
        state["ffn._extra_state"] = Model(groups=(0, 2)).ffn.get_extra_state()
    elif fault == "unreadable":
        state["ffn._extra_state"] = torch.tensor([0.5, 300.0])
    else:
        state["ffn.keep"] = torch.tensor([0, 2], dtype=torch.int32)
    save_file(state, path, metadata=metadata)
    other = copy.deepcopy(model)
    other.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    before = parameters(other)
    message = {
        "padding": r"1.bias: padding beyond \(12,\) is not zero", "layout": r"ffn: another layout: keep \[0, 2\], expected \[1, 2\]",
        "unreadable": "ffn._extra_state: not readable, expected the layout of a PrunedFFN",
        "list": r"ffn.keep: \[0, 2\], expected the layout's \[1, 2\]",
    }[fault]  # fmt: skip
    with pytest.raises(LayoutError, match=f"path '.*model.safetensors': {message}") as caught:
        load(other, path)
    assert unchanged(other, before) and "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)


@pytest.mark.parametrize("form", ["packed", "masked"])
def test_padding_that_was_filled_is_written_as_zeros(tmp_path, form):
    """An initialisation that knows nothing of the padding fills all of it."""
    model, x = nn.Sequential(PrunedLinear(10, 13, in_index=[0, 3, 5]), PrunedFFN(13, 30, group=3, keep=[0, 4, 9])), torch.randn(2, 3, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.0)
    other, before = copy.deepcopy(model), parameters(model)
    save(model, tmp_path / "model.safetensors", form=form)
    assert unchanged(model, before)
    load(other, tmp_path / "model.safetensors")
    assert torch.equal(model(x), other(x))
    for module in other:
        for name, size in module._logical.items():
            t = getattr(module, name)
            assert t.count_nonzero() == torch.Size(size).numel() < t.numel(), name


def test_models_without_memory(tmp_path):
    """Meta construction, state, and every way from there to numbers."""
    model, x = Model(), torch.randn(2, 3, 10)
    want, state = model(x), model.state_dict()
    save(model, tmp_path / "model.safetensors")
    made = PrunedLinear(10, 16, in_index=[0, 3, 5], out_index=[1, 2], bias=False, device="meta")
    assert made.in_index.is_meta and made.layout()["in_index"] == [0, 3, 5] and made.state_dict()["out_index"].is_meta
    with torch.device("meta"):
        there = Model()
        assert there.state_dict()["ffn._extra_state"].device.type == "cpu"
    moved = Model().to("meta")
    for meta in (there, moved):
        assert meta.first.in_index.is_meta and meta.first.weight.is_meta and meta.state_dict()["first.in_index"].is_meta
        with pytest.raises(RuntimeError, match=r"ffn: another layout: keep \[0, 2\], expected \[1, 2\]"):
            copy.deepcopy(meta).load_state_dict(Model(groups=(0, 2)).state_dict(), assign=True)
        assigned = copy.deepcopy(meta)
        assigned.load_state_dict(state, assign=True)
        assert torch.equal(assigned(x), want)
        for take in (
            lambda m: m.load_state_dict(state), lambda m: load(m, tmp_path / "model.safetensors"),
            lambda m: load_masked_state(m, masked_state(model)),
        ):  # fmt: skip
            empty = copy.deepcopy(meta).to_empty(device="cpu")
            with torch.no_grad():
                for p in empty.parameters():
                    p.fill_(torch.nan)
            assert empty.first.in_index.tolist() == [0, 3, 5]
            take(empty)
            assert torch.equal(empty(x), want) and all(torch.equal(a, state[n]) for n, a in empty.state_dict().items())
    # Memory that had numbers and now holds anything.
    def garbage():
        empty = Model()
        for t in (*empty.parameters(), *empty.buffers()):
            t.detach().fill_(77)
        return empty

    empty = garbage()
    load_masked_state(empty, masked_state(model))
    assert torch.equal(empty(x), want)
    empty = garbage()
    without = {n: t for n, t in state.items() if n not in ("first.in_index", "ffn.keep")}
    assert sorted(empty.load_state_dict(without, strict=False).missing_keys) == ["ffn.keep", "first.in_index"]
    assert torch.equal(empty(x), want)
    empty = garbage()
    empty.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert empty.first.in_index.tolist() == [0, 3, 5] and empty.ffn.keep.tolist() == [1, 2] and empty(x).isfinite().all()
    empty.load_state_dict(empty.state_dict())                                  # its padding is zero again


def test_another_eps_is_another_layout(tmp_path):
    """What a norm adds under the root is part of what the weights were trained for."""
    x = 1e-3 * torch.randn(2, 3, 16)
    for make in (
        lambda eps: PrunedLinear(16, 8, in_index=[1, 2], eps=eps), lambda eps: PrunedFFN(16, 32, group=8, keep=[0, 3], eps=eps),
        lambda eps: PrunedLinear.from_linear(nn.Linear(16, 8), [1, 2], eps=eps),
        lambda eps: PrunedFFN.from_dense(nn.Linear(16, 32), nn.Linear(32, 16), [0, 3], group=8, eps=eps),
    ):  # fmt: skip
        layer, other = make(1e-6), make(1e-5)
        assert layer.eps == 1e-6 and other.eps == 1e-5
        other.load_state_dict({**layer.state_dict(), "_extra_state": other.get_extra_state()})
        assert not torch.allclose(layer(x, norm="rms"), other(x, norm="rms"), rtol=1e-2)
        with pytest.raises(RuntimeError, match="another layout: eps 1e-06, expected 1e-05"):
            other.load_state_dict(layer.state_dict())
        for form in ("packed", "masked"):
            save(layer, tmp_path / "layer.safetensors", form=form)
            with pytest.raises(LayoutError, match=": eps 1e-06, expected 1e-05"):
                load(other, tmp_path / "layer.safetensors")
            load(make(1e-6), tmp_path / "layer.safetensors")


class Noted(nn.Linear):
    """A layer with an extra state of its own, as quantised ones have."""

    def __init__(self, note):
        super().__init__(16, 16)
        self.note = note

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


@pytest.mark.parametrize("form", ["packed", "masked"])
@pytest.mark.parametrize("notes", [({"scale": 1}, {"scale": 2}), (torch.ones(3), torch.zeros(2))])
def test_other_modules_may_have_an_extra_state(tmp_path, form, notes):
    """A tensor goes through files, anything else only through states in memory; shapes are theirs to know."""
    model, other = (nn.Sequential(PrunedLinear(16, 16, in_index=[1, 4]), Noted(note)) for note in notes)
    save(model, tmp_path / "model.safetensors", form=form)
    load(other, tmp_path / "model.safetensors")
    kept = notes[0] if torch.is_tensor(notes[0]) else notes[1]
    assert torch.equal(other[1].note, kept) if torch.is_tensor(kept) else other[1].note is kept
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    state = masked_state(model)
    assert state["1._extra_state"] is notes[0]
    third = nn.Sequential(PrunedLinear(16, 16, in_index=[1, 4]), Noted(None))
    load_masked_state(third, state)
    assert third[1].note is notes[0] and torch.equal(third[0].weight, model[0].weight)


def test_files_of_others(tmp_path):
    from safetensors.torch import save_file

    path, model = tmp_path / "model.safetensors", Model()
    before = parameters(model)
    for junk in (b"", b"junk" * 40, (1 << 60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(junk)
        with pytest.raises(LayoutError, match="path: '.*model.safetensors' is no safetensors file") as caught:
            load(model, path)
        assert "\n" not in str(caught.value)
    save(model, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LayoutError, match="model.safetensors' is no safetensors file"):
        load(model, path)
    for layouts in (None, "{", "[]", '{"first": 3}'):
        metadata = {"vidkern_form": "packed"} | ({} if layouts is None else {"vidkern_layouts": layouts})
        save_file(model.state_dict(), path, metadata=metadata)
        with pytest.raises(LayoutError, match="model.safetensors' has no readable vidkern_layouts, expected a file of vidkern.nn.save") as caught:
            load(model, path)
        assert "\n" not in str(caught.value)
    save_file(model.state_dict(), path, metadata={"vidkern_form": "packed", "vidkern_layouts": '{"first": {}, "ffn": {}, "more": {}}'})
    with pytest.raises(LayoutError, match="model.safetensors': ffn: form None, expected 'PrunedFFN' \\(and 2 more\\)"):
        load(model, path)
    assert unchanged(model, before)


def test_files_that_are_none(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="does not exist, expected a file of vidkern.nn.save"):
        load(Model(), tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(LayoutError, match="was not written by vidkern.nn.save"):
        load(Model(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="form: 'dense', expected one of 'packed', 'masked'"):
        save(Model(), tmp_path / "x.safetensors", form="dense")
    with pytest.raises(FileNotFoundError):
        save(Model(), tmp_path / "missing" / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.safetensors"]


BAD = {
    "no input": (lambda: PrunedLinear(8, 8, in_index=[]), ValueError, "in_index: empty, expected"),
    "all heads": (lambda: PrunedLinear.from_linear(nn.Linear(8, 8), torch.zeros(8, dtype=torch.bool)), ValueError, "in_index: empty"),
    "unsorted": (lambda: PrunedLinear(8, 8, out_index=[3, 1]), ValueError, "out_index: holds 1 after 3"),
    "out of range": (lambda: PrunedLinear(8, 8, out_index=[8]), ValueError, r"out_index: holds 8, expected .* 0\.\.7"),
    "features": (lambda: PrunedLinear(0, 8), ValueError, "in_features: 0, expected an integer >= 1"),
    "act": (lambda: PrunedLinear(8, 8, act="relu"), ValueError, "act: 'relu', expected one of"),
    "linear": (lambda: PrunedLinear.from_linear(nn.Identity()), TypeError, "linear: Identity, expected an nn.Linear"),
    "odd": (lambda: PrunedLinear.from_linear(nn.Linear(4, 7), act="swiglu"), ValueError, "linear: 7 output channels, expected an even"),
    "group": (lambda: PrunedFFN(8, 100, group=64), ValueError, "group: 64, expected a divisor of hidden 100"),
    "groups": (lambda: PrunedFFN(8, 128, group=64, keep=[2]), ValueError, r"keep: holds 2, expected .* 0\.\.1"),
    "no group": (lambda: PrunedFFN(8, 128, group=64, keep=[]), ValueError, "keep: empty"),
    "tile": (lambda: PrunedFFN(8, 128, tile=0), ValueError, "tile: 0, expected an integer >= 1"),
    "w1": (lambda: PrunedFFN.from_dense(nn.Linear(4, 8), nn.Linear(9, 4)), ValueError, "w1: 8 output channels, expected 9 for w2's 9 inputs"),
    "w2": (lambda: PrunedFFN.from_dense(nn.Linear(4, 8), nn.Linear(8, 5)), ValueError, "w2: 5 output channels, expected w1's 4 inputs"),
    "biases": (lambda: PrunedFFN.from_dense(nn.Linear(4, 8), nn.Linear(8, 4, False)), ValueError, "w2: has a bias where w1 has none"),
}


@pytest.mark.parametrize("more", [{}, {"norm": "rms"}])
@pytest.mark.parametrize("out_index", [None, [0, 3, 4]])
@pytest.mark.parametrize("in_index", [None, [0, 1, 5]])
def test_layers_refuse_other_widths(in_index, out_index, more):
    """A list alone would take any x that is wide enough for it, and any residual; again, because a plan may serve later calls."""
    layer = PrunedLinear.from_linear(nn.Linear(32, 24), in_index, out_index)
    with torch.no_grad():
        for _ in range(3):
            assert layer(torch.randn(2, 5, 32), residual=torch.randn(2, 5, 24), **more).shape == (2, 5, 24)
            for width in (6, 31, 33, 64):
                with pytest.raises(ValueError, match=rf"x: shape \(2, 5, {width}\), expected \[\.\.\., tokens, 32\]"):
                    layer(torch.randn(2, 5, width), **more)
            for width in (5, 23, 32, 100):
                with pytest.raises(ValueError, match=rf"residual: shape \(2, 5, {width}\), expected \(2, 5, 24\)"):
                    layer(torch.randn(2, 5, 32), residual=torch.randn(2, 5, width), **more)
    with pytest.raises(TypeError, match="x: list, expected a torch.Tensor"):
        layer([1.0])


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_compiles_and_moves():
    """fullgraph, and meta construction as large models use it."""
    torch._dynamo.reset()
    model, x = Model(), torch.randn(2, 3, 10)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    with torch.device("meta"):
        large = PrunedFFN(2048, 8192, keep=list(range(48)))
    assert large.w1.shape == (6144, 2048) and large.w1.is_meta
    half = Model().to(torch.bfloat16)
    assert half(x.bfloat16()).dtype is torch.bfloat16 and half.first.in_index.dtype is torch.int32


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[2] / "docs" / "pruned.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space = {}
    for example in examples:
        exec(example, space)
    torch.testing.assert_close(space["layer"](space["x"]), space["dense"](space["x"]), rtol=2e-2, atol=2e-2)
    assert len(examples) == 2 and space["mask"].grad.shape == (32,) and space["mask"].grad.all()
