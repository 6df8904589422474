"""What is timed computes the right thing: every peer is checked first, and a wrong one is reported, not timed."""

import dataclasses

import pytest
import torch

import vidkern
from vidkern.bench import block as blocks
from vidkern.bench import peers
from vidkern.bench.peers import grid_attention
from vidkern.bench.shapes import GridShape
from vidkern.bench.suite import DTYPES, Peer, importable

TINY = GridShape("tiny", 2, 16, 3, 2, 5)


def case(op, dtype="float32", mode="fwdbwd"):
    suite = peers.load(op)
    block = blocks.Block(op, suite.small or "small", dtype, mode)
    shape = TINY if op == "grid_attention" else suite.shapes[block.shape]
    problem = suite.problem(shape, DTYPES[dtype], "cpu")
    return suite, block, problem, suite.reference(problem, mode)


def test_reference_is_that_of_the_op():
    _, _, problem, right = case("grid_attention")
    q, k, v = (x.double().requires_grad_() for x in problem.inputs)
    out = vidkern.grid_attention(q, k, v, grid=(3, 2), impl="reference")
    grads = torch.autograd.grad(out, (q, k, v), problem.grad_out.double())
    for ours, theirs in zip(right.values, (out, *grads)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("op", peers.names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_compute_the_same_thing(op, dtype):
    suite, block, problem, right = case(op, dtype)
    for peer in suite.candidates:
        if peer.compiles or "cpu" not in peer.devices or dtype not in peer.dtypes or peer.missing("cpu"):
            continue
        mode = "fwdbwd" if peer.backward("cpu") else "fwd"
        wanted = right if mode == "fwdbwd" else dataclasses.replace(right, values=right.values[:1])
        row, call = blocks.prepare(peer, dataclasses.replace(block, mode=mode), suite, problem, wanted)
        assert row["status"] == "timed" and call is not None, (peer.name, row)
        assert row["error"] < (1e-5 if dtype == "float32" else 0.05)


def test_a_wrong_peer_is_reported_as_wrong():
    suite, block, problem, right = case("grid_attention")
    dense = Peer("dense", lambda p: torch.nn.functional.scaled_dot_product_attention)
    row, call = blocks.prepare(dense, block, suite, problem, right)
    assert call is None and row["status"] == "wrong" and "largest error" in row["reason"]
    assert row["error"] > 0.01 and "seconds" not in row

    nan = Peer("nan", lambda p: lambda q, k, v: vidkern.grid_attention(q, k, v, grid=(3, 2)) * float("nan"))
    row, call = blocks.prepare(nan, block, suite, problem, right)
    assert call is None and row["status"] == "wrong"


def test_a_peer_with_wrong_gradients_is_reported_as_wrong():
    suite, block, problem, right = case("grid_attention")

    def detached(q, k, v):
        return vidkern.grid_attention(q, k, v.detach(), grid=(3, 2)) + 0 * v

    row, call = blocks.prepare(Peer("no dv", lambda p: detached), block, suite, problem, right)
    assert call is None and row["status"] == "wrong" and row["error"] < 1e-5 < row["grad_error"]


def test_reasons_not_to_run():
    suite, block, problem, right = case("grid_attention")

    def reason(peer, **changes):
        row, call = blocks.prepare(peer, dataclasses.replace(block, **changes), suite, problem, right)
        assert call is None
        return f"{row['status']}: {row['reason']}"

    def fails(p):
        raise RuntimeError("no such kernel\nand a long story")

    assert reason(Peer("x", fails)) == "failed: RuntimeError: no such kernel"
    assert reason(Peer("x", fails, devices=("cuda",))) == "not run: does not run on cpu"
    assert reason(Peer("x", fails, dtypes=("bfloat16",))) == "not run: has no float32"
    assert reason(Peer("x", fails, backward=lambda d: False)) == "not run: has no backward on cpu"
    assert reason(Peer("x", fails, compiles=True), quick=True).startswith("not run: is compiled")
    assert reason(Peer("x", fails, memory=lambda *a: 1 << 60)).startswith("not run: needs about")
    missing = reason(Peer("x", fails, missing=importable("no_such_package_here")))
    assert missing == "not run: import no_such_package_here: ModuleNotFoundError: No module named 'no_such_package_here'"


def test_the_reference_may_cover_some_heads_only(monkeypatch):
    monkeypatch.setattr(grid_attention, "REFERENCE_FLOPS", 0)
    shape = dataclasses.replace(TINY, heads=4)
    problem = grid_attention.problem(shape, torch.float32, "cpu")
    right = grid_attention.reference(problem, "fwd")
    assert right.values[0].shape[1] == 2
    out = vidkern.grid_attention(*problem.inputs, grid=(3, 2))
    assert blocks.errors((out,), right)[0][0] < 1e-5
    assert torch.equal(right.pick(out), out[:, [0, 3]])


def test_problems_are_the_same_bits_every_time():
    for op in peers.names():
        suite = peers.load(op)
        a, b = (suite.problem(suite.shapes["small"], torch.float32, "cpu") for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs)) and torch.equal(a.grad_out, b.grad_out)


def test_the_weight_given_to_sparse_matrix_units_is_two_of_four():
    """What only a GPU multiplies is looked at here: its form, and that its dense product is the layer's."""
    from vidkern.bench.peers import pruned_linear

    suite = pruned_linear.SUITE
    shape = dataclasses.replace(suite.shapes["two_of_four"], tokens=8, inputs=32, outputs=16, dense_in=64, dense_out=16, width=64)
    problem = suite.problem(shape, torch.float32, "cpu")
    wide = pruned_linear.two_of_four(problem)
    assert ((wide.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
    right = suite.reference(problem, "fwd").values[0]
    torch.testing.assert_close(torch.nn.functional.linear(problem.inputs[0], wide).double(), right, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="small: its weight is not 2:4 sparse"):
        pruned_linear.two_of_four(suite.problem(suite.shapes["small"], torch.float32, "cpu"))
