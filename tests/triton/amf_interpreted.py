"""Run by test_interpreter.py in the interpreter's process: attention motion flow through every kernel, at every shipped tile, and what only
Triton has."""

import contextlib

import pytest
import torch
from triton.runtime import interpreter

from vidkern.ops.attention_motion_flow import configs, reference
from vidkern.ops.attention_motion_flow import triton as launchers

C = configs.Config
SMALL = {kind: C(32, 32, 16, 4, 1) for kind in configs.KINDS} | {k: C(32, 32, 0, 4, 1) for k in ("held", "vote", "dq", "dk")}
GRID = (2, 5, 7)
EVERY = ("mean", "index", "lse", "top", "entropy")


def every_pair(frames=2):
    return tuple((i, j) for i in range(frames) for j in range(frames))


def operands(groups=1, heads=1, dim=16, grid=GRID, *, batch=1, beside=False, dtype=torch.float32):
    torch.manual_seed(7)
    size = grid[0] * grid[1] * grid[2]
    if beside:
        return [torch.randn(batch, size, groups, heads, dim).to(dtype).permute(0, 2, 3, 1, 4) for _ in range(2)]
    return [torch.randn(batch, groups, heads, size, dim).to(dtype) for _ in range(2)]


def empty(q, pairs, grid, wanted=EVERY, dtype=torch.float32):
    rows = (*q.shape[:2], len(pairs), grid[1] * grid[2])
    new = {n: torch.full(rows + (2,) * (n == "mean"), torch.nan, dtype=dtype) for n in EVERY if n != "index"}
    new["index"] = torch.full(rows, -1, dtype=torch.int32)
    return {n: new[n] if n in wanted else None for n in EVERY}


def forward(q, k, pairs=None, grid=GRID, scale=0.4, wanted=EVERY):
    """Results of the kernels, and of the reference in float64."""
    pairs = pairs or every_pair(grid[0])
    got, want = empty(q, pairs, grid, wanted), empty(q, pairs, grid, wanted, torch.float64)
    launchers.forward(q, k, pairs, grid=grid, scale=scale, **got)
    reference.forward(q.double(), k.double(), pairs, grid=grid, scale=scale, **want)
    return got, want


def backward(q, k, pairs=None, grid=GRID, scale=0.4, *, dmean=True, dlse=True, live=None, times=1.0):
    """dq and dk of the kernels, and of the reference in float64; ``live`` [G, P, S] says which rows have a gradient."""
    pairs = pairs or every_pair(grid[0])
    kept = empty(q, pairs, grid, ("mean", "lse"), torch.float64)
    reference.forward(q.double(), k.double(), pairs, grid=grid, scale=scale, **kept)
    grads = [torch.randn(kept[n].shape) * times if given else None for n, given in (("mean", dmean), ("lse", dlse))]
    if live is not None:
        grads = [g if g is None else g * (live[..., None] if g.dim() == 5 else live) for g in grads]
    got, want = ([torch.full_like(t, torch.nan) for t in x] for x in ((q, k), (q.double(), k.double())))
    saved = [kept[n].float() for n in ("mean", "lse")]
    launchers.backward(*grads, q, k, *saved, pairs, grid=grid, scale=scale, dq=got[0], dk=got[1])
    reference.backward(*grads, q.double(), k.double(), kept["mean"], kept["lse"], pairs, grid=grid, scale=scale, dq=want[0], dk=want[1])
    return got, want


def check_forward(got, want, limit=1e-5):
    for name in EVERY:
        if got[name] is not None:
            assert (got[name] - want[name]).abs().max() <= (0 if name == "index" else limit), name


def check_backward(got, want, limit=2e-6):
    for name, a, b in zip(("dq", "dk"), got, want):
        assert (a.double() - b).norm() <= limit * b.norm(), name


@contextlib.contextmanager
def tiles(**given):
    with contextlib.ExitStack() as stack:
        for kind, config in (SMALL | given).items():
            stack.enter_context(configs.forced(kind, config))
        yield


FORMS = {
    "one head": {"groups": 2, "dim": 24},
    "heads apart": {"heads": 3, "dim": 24, "batch": 2},
    "heads side by side": {"heads": 9, "dim": 16, "beside": True},
    "unaligned": {"groups": 2, "heads": 2, "dim": 20},
}
LISTS = {"all": every_pair(3), "some": ((2, 1), (0, 1), (2, 2))}


@pytest.mark.parametrize("pairs", LISTS)
@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(form, pairs):
    """Tiles that straddle query frames, ragged edges, frames without pairs, several shares of one dK."""
    q, k = operands(grid=(3, 5, 7), **FORMS[form])
    with tiles():
        check_forward(*forward(q, k, LISTS[pairs], (3, 5, 7)))
        check_backward(*backward(q, k, LISTS[pairs], (3, 5, 7)))


@pytest.mark.parametrize("wanted", [("mean",), ("index",), ("top", "entropy")], ids="-".join)
def test_results_alone(wanted):
    check_forward(*forward(*operands(heads=2, dim=8), wanted=wanted))


@pytest.mark.parametrize("dmean, dlse", [(True, False), (False, True)])
def test_gradients_alone(dmean, dlse):
    for q, k in (operands(groups=2), operands(heads=9, beside=True)):
        with tiles():
            check_backward(*backward(q, k, dmean=dmean, dlse=dlse))


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales(scale):
    """The largest logit of a negative scale is the smallest product; without any, all are equal and the first wins."""
    q, k = operands()
    got, want = forward(q, k, scale=scale)
    check_forward(got, want)
    assert bool(got["index"].any()) is (scale != 0)
    check_backward(*backward(q, k, scale=scale))


def test_ties_go_to_the_lowest_key():
    """Two keys in every tile of keys are equal and best."""
    grid = (1, 10, 10)
    q, k = operands(grid=grid)
    k[..., [9, 17, 40, 41, 70, 99], :] = k[..., :1, :] * 0 + 3
    q = q.abs()
    with tiles():
        got, want = forward(q, k, grid=grid)
        index, top = torch.full((1, 1, 1, 100), -1, dtype=torch.int32), torch.empty(1, 1, 1, 100)
        launchers.vote(q, k, got["lse"], every_pair(1), grid=grid, scale=0.4, index=index, top=top)
    assert bool((got["index"] == 9).all()) and bool((want["index"] == 9).all()) and bool((index == 9).all())
    assert torch.allclose(top, got["top"], rtol=1e-5)


@pytest.mark.parametrize("heads, dim", [(1, 24), (2, 20)])
@pytest.mark.parametrize("wanted", [("index", "top"), ("index",), ("top",)], ids="-".join)
def test_vote(heads, dim, wanted):
    q, k = operands(groups=3, heads=heads, dim=dim)
    pairs = ((1, 0), (0, 0), (1, 1))
    got, want = forward(q, k, pairs, wanted=("lse",))
    rows = (1, 1, 3, 35)
    given = [{"index": torch.full(rows, -1, dtype=torch.int32), "top": torch.empty(rows, dtype=d)} for d in (torch.float32, torch.float64)]
    given = [{n: t if n in wanted else None for n, t in g.items()} for g in given]
    with tiles():
        launchers.vote(q, k, got["lse"], pairs, grid=GRID, scale=0.4, **given[0])
    reference.vote(q.double(), k.double(), want["lse"], pairs, grid=GRID, scale=0.4, **given[1])
    if "index" in wanted:
        assert torch.equal(given[0]["index"], given[1]["index"])
    if "top" in wanted:
        assert (given[0]["top"] - given[1]["top"]).abs().max() <= 1e-5


def test_every_result_has_its_own_precision():
    """A peaked softmax: no cancellation in the mean or the entropy."""
    q, k = operands(dim=32)
    got, want = forward(q * 8, k, scale=1.0)
    check_forward(got, want, 1e-4)
    assert want["top"].max() > 0.999 and want["entropy"].min() < 1e-2


@pytest.mark.parametrize("form", [{"groups": 2, "dim": 32}, {"heads": 9}])
@pytest.mark.parametrize("times", [1e-9, 1.0, 6e4])
def test_float16_gradients_of_any_size(form, times):
    """float16 has neither the range of a scaled loss nor that of a mean over many patches; a gradient of one relative size has one relative
    error."""
    q, k = operands(dtype=torch.float16, **form)
    scale = 0.4 / max(1.0, times)
    got, want = backward(q, k, scale=scale, times=times)
    kept = [b.to(torch.float16) for b in want]
    if times < 1:  # what the dtype of dq holds of it
        assert all(bool((a != 0).any()) == bool((b != 0).any()) for a, b in zip(got, kept))
    else:
        check_backward(got, want, 2e-3)


# ---- rows without gradient -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [{"groups": 1}, {"heads": 9}], ids=["fused", "slab"])
@pytest.mark.parametrize("shift", [8, -8])
def test_deep_and_high_logits(form, shift):
    """Logits around -400 and 400 times the heads: zeros beyond a frame are not keys that outweigh all others."""
    q, k = operands(**form)
    q, k = q + 8, k + shift
    flow, right = (results["mean"] for results in forward(q, k))
    assert (flow - right).abs().max() < 0.01  # logits this large are rounded to 3e-5
    for a, b in zip(*backward(q, k)):
        assert (a - b).norm() < 2e-3 * b.norm()


TALL = (2, 20, 11)  # 220 patches: three whole blocks of rows and a short one


def rows_of(blocks):
    """1 for some rows of these blocks of 64, in [G, P, S]."""
    live = torch.zeros(1, 4, 220)
    for b in blocks:
        live[:, :, b * 64 + 5 : b * 64 + 9] = 1
    return live


@pytest.mark.parametrize("form", [{"groups": 1}, {"heads": 9}], ids=["fused", "slab"])
def test_rows_without_gradient_may_hold_anything(form):
    """NaN in them: the same bits of every other gradient, and zeros of theirs."""
    q, k = operands(grid=TALL, **form)
    live, spoilt = rows_of((1, 3)), q.clone()
    dead = (live[0].amax(0) == 0).repeat(2)
    spoilt[:, :, :, dead] = torch.nan
    dmean, dlse = torch.randn(1, 1, 4, 220, 2) * live[..., None], torch.randn(1, 1, 4, 220) * live
    results = []
    for x in (q, spoilt):
        kept, out = empty(x, every_pair(), TALL, ("mean", "lse")), [torch.full_like(t, torch.nan) for t in (q, k)]
        launchers.forward(x, k, every_pair(), grid=TALL, scale=0.4, **kept)
        launchers.backward(dmean, dlse, x, k, kept["mean"], kept["lse"], every_pair(), grid=TALL, scale=0.4, dq=out[0], dk=out[1])
        results.append(out)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results))
    assert bool((results[1][0][:, :, :, dead] == 0).all()) and bool((results[1][0][:, :, :, ~dead] != 0).any())


# 7 tiles of 32 rows or keys, 4 pairs. Fused: two products a tile of keys for dQ and two a step of rows for dK. Slab: 9 chunks of channels
# for its tiles; 5 tiles of channels with 14 steps of keys for dQ, and with the steps of rows for dK.
@pytest.mark.parametrize(
    "form, count",
    [
        ({"groups": 1}, lambda tiles, blocks: 4 * (tiles * 7 * 2 + 7 * blocks * 2 * 2)),
        ({"heads": 9}, lambda tiles, blocks: 4 * (tiles * 7 * 9 + tiles * 5 * 14 + 7 * 5 * blocks * 4)),
    ],
    ids=["fused", "slab"],
)
def test_blocks_without_gradient_are_not_computed(monkeypatch, form, count):
    """Products that the kernels do, counted: with gradients in one block of rows only, those of the others are left out."""
    products = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda *a: (products.append(1), dot(*a))[1])
    q, k = operands(grid=TALL, **form)
    for blocks, of_rows in ((range(4), 7), ((2,), 2), ((), 0)):
        products.clear()
        with tiles():
            check_backward(*backward(q, k, grid=TALL, live=rows_of(blocks)))
        assert len(products) == count(of_rows, len(blocks))


# ---- how it is launched --------------------------------------------------------------------------------------------
def shipped():
    """Every tile in the table, once; warps and stages mean nothing here."""
    seen = {}
    for (kind, itemsize), rows in configs._TABLE.items():
        for dim, row in rows.items():
            for c in {c for listed in row.values() for c in listed}:
                seen.setdefault((kind, c.block_m, c.block_n, c.block_k), (kind, c, dim if dim and not c.block_k else 0))
    return [pytest.param(*v, id="-".join(map(str, k))) for k, v in sorted(seen.items())]


@pytest.mark.parametrize("kind, config, dim", shipped())
def test_every_shipped_tile(kind, config, dim):
    """At its own block sizes, on frames that no block divides, or with more keys than one block."""
    grid = (2, 7, 10) if config.block_n < 70 else (1, 13, 10) if config.block_n < 130 else (1, 26, 10)
    x = operands(groups=1, dim=dim - 8, grid=grid) if dim else operands(heads=2, dim=72, grid=grid)
    pairs, scale = ((0, 1), (1, 1)) if grid[0] > 1 else ((0, 0),), 0.1
    with tiles(**{kind: config}):
        if kind in ("held", "wide"):
            check_forward(*forward(*x, pairs, grid=grid, scale=scale))
        elif kind == "vote":
            got, want = forward(*x, pairs, grid=grid, scale=scale, wanted=("lse", "index"))
            index = torch.full_like(got["index"], -1)
            launchers.vote(*x, got["lse"], pairs, grid=grid, scale=scale, index=index, top=None)
            assert torch.equal(index, want["index"])
        else:
            check_backward(*backward(*x, pairs, grid=grid, scale=scale))


def test_offsets_of_64_bits(monkeypatch):
    """The same bits where the launcher finds that offsets leave 32 bits."""
    for q, k in (operands(), operands(heads=9)):
        results = []
        for limit in (2**31, 0):
            monkeypatch.setattr(launchers, "_INT32", limit)
            with tiles():
                torch.manual_seed(3)
                results.append([t for t in forward(q, k)[0].values()] + backward(q, k)[0])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_frame_beyond_exact_coordinates_is_refused():
    with pytest.raises(ValueError, match=r"grid: \(1, 2048, 2048\), expected frames of less than 4194304 patches"):
        launchers._frame((1, 2048, 2048))
