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
