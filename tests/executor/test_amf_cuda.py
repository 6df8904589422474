"""The CUDA kernels of attention motion flow, executed: the accuracy rule on every sample, the properties of any implementation, rows
without gradient that hold NaN, and seeded faults that must be told."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import attention_motion_flow as op
from vidkern.ops.attention_motion_flow import cost, cuda
from vidkern.verify import accuracy, amf_rooms

from amf_executed import (
    EVERY, Runs, empty, every_pair, float16_gradients_of_any_size, launchers, offsets_of_64_bits, operands,
    the_same_bits_whatever_the_schedule,
)  # fmt: skip
from every_op import motion
from harness import CSRC, KernelError, Program, machine_code, nvcc

SOURCES = {stem: CSRC / "cuda" / f"{stem}.cu" for stem in cuda.SOURCES}


@pytest.fixture(scope="module")
def programs():
    return {stem: Program(source) for stem, source in SOURCES.items()}


@pytest.fixture
def executed(programs, monkeypatch):
    found = launchers(programs).__getitem__
    # float32 goes in parts of bfloat16.
    why_not = lambda q, k, pairs, *sizes: None if q.dtype == torch.float32 else cuda.why_not(q, k, *sizes[:3])  # noqa: E731
    backend = registry.Backend("cuda-executed", why_not, op._run_with(found), op._run_backward_with(found))
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


QUICK = ("prob_mean", "qk_mean", "one_frame", "negative", "wide_upper")


def cases():
    """The quick ones in one dtype, and in the slow run in the other one and all others in one."""
    for i, sample in enumerate(cost.SAMPLES):
        dtypes, quick = (torch.bfloat16, torch.float16), sample.name in QUICK
        for n, dtype in enumerate(dtypes if i % 2 else dtypes[::-1]):
            if n == 0 or quick:
                yield pytest.param(sample, dtype, id=f"{sample.name}-{str(dtype)[6:]}", marks=[pytest.mark.slow] * (n > 0 or not quick))


@pytest.mark.parametrize("sample, dtype", list(cases()))
def test_accuracy(executed, sample, dtype):
    with accuracy.poisoned():
        draws = accuracy.draws("attention_motion_flow", sample, dtype)
        accuracy.check("attention_motion_flow", sample, dtype, "cuda-executed", seeds=range(draws))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sample", amf_rooms.COUNTS, ids=lambda s: s.name)
def test_counting(executed, sample, dtype):
    amf_rooms.counting(sample, dtype, "cuda-executed")


# Theirs are the gradients of float32, ours are products of gradients of logits rounded to 16 bits: test_gradients has the bounds.
ROUNDED = (motion.has_the_gradient, motion.loss_is_its_formula)
LONG = (motion.ties_go_to_the_lowest,)


@pytest.mark.parametrize(
    "check", [pytest.param(c, id=c.__name__, marks=[pytest.mark.slow] * (c in LONG)) for c in motion.CHECKS if c not in ROUNDED]
)
def test_property(executed, check):
    check("cuda-executed")


@pytest.mark.parametrize("heads", motion.VARIANTS)
def test_gradients(executed, heads):
    """Of the flow, of the lse and of the loss, within 1e-2 of the norm of autograd's through the dense oracle; text gets exactly zero."""
    grid, n_text = (2, 7, 9), 5
    leaves = [(2 * motion.draw(1, 3, n_text + 126, 24, seed=s)).bfloat16().requires_grad_() for s in (1, 2)]
    got = motion.flow(*leaves, grid, "cuda-executed", heads=heads, n_text=n_text, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = motion.oracle(*(t[0, :, n_text:] for t in exact), grid, heads)
    losses = [[(getattr(got, n) * w).sum(), (want[n] * w).sum()] for n in ("flow", "lse") for w in [motion.draw(*want[n].shape, seed=9)]]
    hard = motion.flow(leaves[1].detach(), leaves[0].detach(), grid, "cuda-executed", heads=heads, n_text=n_text, mode="hard")
    moving = hard.square().sum(-1) > 0
    losses.append([
        vidkern.amf_loss(*leaves, hard, grid=grid, heads=heads, n_text=n_text, impl="cuda-executed"),
        ((want["flow"] - hard).square().sum(-1) * moving).sum() / (2 * moving.sum()),
    ])  # fmt: skip
    assert abs(losses[2][0] - losses[2][1]) < 1e-2 * losses[2][1]
    for ours, theirs in losses:
        grads = [torch.autograd.grad(loss, x, retain_graph=True) for loss, x in ((ours, leaves), (theirs, exact))]
        for a, b in zip(*grads):
            assert (a.double() - b).norm() < 1e-2 * b.norm()
            assert (a[:, :, :n_text] == 0).all()


# ---- launchers on operands of any form ------------------------------------------------------------------------------------
@pytest.fixture
def runs(programs):
    return Runs(programs)


FORMS = {
    "one head": {"groups": 2, "dim": 24},
    "one head of 128": {"dim": 128},
    "one head of 136": {"dim": 136},
    "heads apart": {"heads": 3, "dim": 24, "batch": 2},
    "heads side by side": {"heads": 5, "dim": 72, "beside": True},
}
LISTS = {"all": every_pair(3), "some": ((2, 1), (0, 1), (2, 2))}


@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(runs, form):
    """Tiles that straddle query frames, ragged edges, frames without pairs, several shares of one dK, heads wherever they lie."""
    grid = (3, 5, 7)
    for pairs in LISTS.values():
        assert runs.wrong(*operands(grid=grid, **FORMS[form]), grid, pairs, 0.1) < 1


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_scales(runs, scale):
    """The largest logit of a negative scale is the smallest product; without any, all are equal and the first wins."""
    for form in ("one head", "heads apart"):
        q, k = operands(**FORMS[form])
        got, want = runs.forward(q, k, (2, 5, 7), every_pair(2), scale)
        assert all((got[n] - want[n]).abs().max() < (1 if n == "index" else 1e-5) for n in EVERY)
        for a, b in zip(*runs.backward(q, k, (2, 5, 7), every_pair(2), scale)):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_gradients_alone(runs):
    for form in ("one head", "heads apart"):
        for given in ({"dmean": False}, {"dlse": False}):
            for a, b in zip(*runs.backward(*operands(**FORMS[form]), (2, 5, 7), every_pair(2), 0.1, **given)):
                assert (a.double() - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("form", [{"groups": 1}, {"heads": 9}], ids=["fused", "slab"])
@pytest.mark.parametrize("times", [1e-9, 6e4])
def test_float16_gradients_of_any_size(runs, form, times):
    float16_gradients_of_any_size(runs, form, times)


def test_the_same_bits_whatever_the_schedule(runs):
    for form in ("one head", "heads apart"):
        the_same_bits_whatever_the_schedule(runs, FORMS[form])


def test_offsets_of_64_bits(runs):
    offsets_of_64_bits(runs)


# ---- rows without gradient ------------------------------------------------------------------------------------------------
TALL = (2, 20, 11)  # 220 patches: three whole blocks of rows and a short one


def rows_of(blocks):
    """1 for some rows of these blocks of 64, in [G, P, S]."""
    live = torch.zeros(1, 4, 220)
    for b in blocks:
        live[:, :, b * 64 + 5 : b * 64 + 9] = 1
    return live


@pytest.mark.parametrize("form", [{"groups": 1}, {"heads": 2}], ids=["fused", "slab"])
def test_rows_without_gradient_may_hold_anything(runs, form):
    """NaN in them: the same bits of every other gradient, and zeros of theirs."""
    q, k = operands(grid=TALL, **form)
    live, spoilt = rows_of((1, 3)), q.clone()
    dead = (live[0].amax(0) == 0).repeat(2)
    spoilt[:, :, :, dead] = torch.nan
    g = torch.Generator().manual_seed(0)
    dmean, dlse = torch.randn(1, 1, 4, 220, 2, generator=g) * live[..., None], torch.randn(1, 1, 4, 220, generator=g) * live
    results = []
    for x in (q, spoilt):
        kept, out = empty(x, every_pair(2), TALL, ("mean", "lse")), [torch.full_like(t, torch.nan) for t in (q, k)]
        runs.ours["forward"](x, k, every_pair(2), grid=TALL, scale=0.05, **kept)
        with accuracy.poisoned():
            runs.ours["backward"](dmean, dlse, x, k, kept["mean"], kept["lse"], every_pair(2), grid=TALL, scale=0.05, dq=out[0], dk=out[1])
        results.append(out)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results))
    assert bool((results[1][0][:, :, :, dead] == 0).all()) and bool((results[1][0][:, :, :, ~dead] != 0).any())


# Products of 16 x 8 x 16 of a pair, for tiles of 128 rows and blocks of 64 with a gradient. Fused: two of 64 x 64 x 64 for every block of
# rows and the four of keys. Slab: tiles of 128 x 128, two of keys, over the two heads' chunks of 64 channels; dQ of 128 x 64 over four
# times 64 keys; dK of two tiles of 128 x 128 over blocks of 64 rows.
COUNTS = {
    "fused": ({"groups": 1}, {"amf_dq": lambda tiles, blocks: blocks * 4 * 256, "amf_dk": lambda tiles, blocks: 4 * blocks * 256}),
    "slab": (
        {"heads": 2},
        {
            "amf_slope": lambda tiles, blocks: tiles * 2 * 2 * 512, "amf_slab_dq": lambda tiles, blocks: tiles * 4 * 256,
            "amf_slab_dk": lambda tiles, blocks: 2 * blocks * 512,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", COUNTS)
def test_blocks_without_gradient_are_not_computed(programs, form):
    shape, expected = COUNTS[form]
    q, k = operands(grid=TALL, **shape)
    for blocks, tiles in ((range(4), 2), ((2,), 1), ((), 0)):
        counted = []
        got, want = Runs(programs, counted).backward(q, k, TALL, every_pair(2), 0.05, live=rows_of(blocks))
        assert all((a.double() - b).norm() <= 1e-2 * b.norm() for a, b in zip(got, want))
        for name, products in expected.items():
            made = sum(c["products"] for n, c in counted if n.startswith(name))
            assert made == 4 * products(tiles, len(blocks)), (name, blocks)


# ---- what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change, frame, words",
    [
        (lambda q: q.float(), (3, 4), "dtype is torch.float32, it serves torch.float16 and torch.bfloat16"),
        (lambda q: q[..., :12], (3, 4), "head_dim is 12, it serves multiples of 8"),
        (lambda q: q[..., 1:9], (3, 4), "q's rows are not aligned to 16 bytes"),
        (lambda q: q.as_strided(q.shape, (1, 1, 1, 20, 1)), (3, 4), "q's rows are not aligned to 16 bytes"),
        (lambda q: q, (2048, 2048), "frames have 4194304 patches, it serves less than 4194304"),
    ],
)
def test_what_is_refused(change, frame, words):
    q = torch.zeros(1, 1, 1, 24, 16, dtype=torch.bfloat16)
    wide = torch.zeros(640, dtype=torch.bfloat16)
    q = change(wide[: q.numel()].view(q.shape) if "as_strided" not in words else q)
    assert cuda.why_not(q, q, 2, *frame) == words


def test_what_is_served():
    q = torch.zeros(2, 3, 24, 16, dtype=torch.float16)
    for t in (q[:, :, None], q[:, None], q[-1:, None, :2], q.transpose(2, 3).contiguous().transpose(2, 3)[:, None]):
        assert cuda.why_not(t, t, 2, 3, 4) is None


# ---- seeded faults --------------------------------------------------------------------------------------------------------
def problems(heads):
    """Frames that end inside a tile, several tiles of keys, many equal logits, rows and blocks without gradient; and, where keys beyond the
    frame would show, logits far below zero."""
    made, grid, scale = ({"groups": 2, "dim": 24}, (2, 9, 9), -0.2) if heads == 1 else ({"heads": heads, "dim": 56}, (2, 13, 11), -0.05)
    size, g = grid[1] * grid[2], torch.Generator().manual_seed(5)
    live = (torch.rand(made.get("groups", 1), 4, size, generator=g) > 0.3).float()
    live[:, 1, :64] = 0
    yield (*operands(grid=grid, **made), grid, every_pair(2), scale, live)
    q, k = operands(heads=heads)
    yield (q * 0 + 4, k - 8, (2, 5, 7), every_pair(2), 1.0)


FORWARD, FUSED, SLAB = "amf", "amf_backward", "amf_slab"
FAULTS = {
    "no wait": (FORWARD, "    copies_wait<0>();\n    block_barrier();\n    if (first", "    block_barrier();\n    if (first"),
    "no barrier": (FORWARD, "    block_barrier();\n    if (first", "    if (first"),
    "a key too many": (FORWARD, "if (own + n * 8 + j >= f.size) {", "if (own + n * 8 + j > f.size) {"),
    "the last of ties": (FORWARD, "if (FULL && v > best)", "if (FULL && v >= best)"),
    "the last of ties in a quad": (FORWARD, "there < where", "there > where"),
    "sign of a negative scale": (FORWARD, "(query[m][d].w[w] & g.keep) ^ g.flip", "(query[m][d].w[w] & g.keep)"),
    "a row too many": (FORWARD, "return first + row < end;", "return first + row <= end;"),
    "an entropy that forgets what it was relative to": (FORWARD, "r.total[i] * (before - top[i])", "0 * r.total[i]"),
    "a vote of the last group": (FORWARD, "if (group == 0) clear(votes);", "clear(votes);"),
    "sweep: no wait": (FORWARD, "copies_wait<0>(), block_barrier();\n      if (c", "block_barrier();\n      if (c"),
    "sweep: no barrier": (FORWARD, "copies_wait<0>(), block_barrier();\n      if (c", "copies_wait<0>();\n      if (c"),
    "sweep: the next chunk in the same stage": (FORWARD, "ask(i, c + 1, left_of(stage ^ 1)", "ask(i, c + 1, left_of(stage)"),
    "sweep: -q without its sign": (FORWARD, "(a[m].w[w] & keep) ^ flip", "(a[m].w[w] & keep)"),
    "places: a row too late": (FORWARD, "if (x >= f.width) x -= f.width, y += 1.0f;", "if (x > f.width) x -= f.width, y += 1.0f;"),
    "fragment rows swapped": (FUSED, "(m & 1) * 8 + l % 8, 2 * k + (m >> 1)", "(m >> 1) * 8 + l % 8, 2 * k + (m & 1)"),
    "another swizzle for one reader": (FUSED, "load_matrices(w, chunk(", "load_matrices(w, (Tile<DIM>{base + 16}).chunk("),
    "backward: no wait": (FUSED, "copies_wait<0>();\n      block_barrier();\n      if (!here)", "block_barrier();\n      if (!here)"),
    "backward: no barrier": (FUSED, "block_barrier();\n      if (!here)", "if (!here)"),
    "backward: no barrier among rows that leave": (FUSED, "  warp_barrier();  // and has written them\n", ""),
    "backward: a key too many": (FUSED, "own + n * 8 + j < g.frame.size", "own + n * 8 + j <= g.frame.size"),
    "backward: queries without gradient read": (FUSED, "[&](i32 row) { return load(&slopes[row].lse) != infinity(); }", "All{}"),
    "backward: slopes of half a block": (FUSED, "part < BLOCK; part += i32(WARP)", "part < i32(WARP); part += i32(WARP)"),
    "backward: gradients not relative to the centre": (FUSED, "load(g.mean + at * 2) - g.centre_x", "load(g.mean + at * 2)"),
    "slab: no barrier before it leaves": (SLAB, "    block_barrier();  // the stages", "    // the stages"),
    "slab: no wait": (SLAB, "copies_wait<0>();\n    block_barrier();\n    at = next", "block_barrier();\n    at = next"),
    "slab: no barrier": (SLAB, "    block_barrier();\n    at = next", "    at = next"),
    "slab: left operand not turned": (SLAB, "(m >> 1) * 8 + l % 8, c + (m & 1)", "(m & 1) * 8 + l % 8, c + (m >> 1)"),
    "slab: rows without gradient seen": (SLAB, "return alive() ?", "return true ?"),
    "slab: rows of the other half": (SLAB, "if (alive[m][i / 2]) out", "if (alive[m][0]) out"),
    "slab: a share forgotten": (SLAB, "sum = {before.a + sum.a, before.b + sum.b};", "sum = {before.a + sum.a, sum.b};"),
    "slab: a row too many": (SLAB, "const bool there = r < g.frame.size &&", "const bool there = r <= g.frame.size &&"),
}  # fmt: skip


# What the problems do not run is not compiled.
LEAN = {
    FORWARD: [("VK_AMF_FORWARD(f16)\n", ""), *((f"  VK_AMF(amf_forward_##T##_128{full}, forward_held<vk::T, 128, {flag}>)", "")
                                               for full, flag in (("", "false"), ("_full", "true")))],
    FUSED: [("VK_AMF_BACKWARD(f16)\n", ""), *((f"  VK_AMF(amf_{d}_##T##_128, {d}<vk::T, 128>)", "") for d in ("dq", "dk"))],
    SLAB: [("VK_AMF_SLAB(f16)\n", "")],
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(programs):
    """Programs with a fault each in the source named, or in a header that it includes; the others stay sound."""

    def build(fault):
        where, *edit = FAULTS[fault]
        return {**programs, where: Program(SOURCES[where], edit, *LEAN[where])}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(build, FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault):
    """By a rule of the executor or by a wrong result, in a problem of those that the source is for."""
    runs, where = Runs(faulty[fault]), FAULTS[fault][0]
    wrong = runs.wrong_forward if where == FORWARD else runs.wrong_backward
    heads = {FORWARD: (1, 3), FUSED: (1,), SLAB: (3,)}[where]
    try:
        caught = any(wrong(*problem) > 2 for n in heads for problem in problems(n))
    except KernelError:
        return
    assert caught


@pytest.mark.parametrize("heads", [1, 3])
def test_what_faults_are_told_from(runs, heads):
    assert max(runs.wrong(*problem) for problem in problems(heads)) < 1


# ---- machine code ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("80", "89", "100", "120"))])
@pytest.mark.parametrize("stem", SOURCES)
def test_machine_code(stem, architecture):
    """Nothing spilled; products, matrix loads, asynchronous copies and 16-byte accesses as meant."""
    kernels = machine_code(SOURCES[stem], architecture)
    assert len(kernels) == {"amf": 14, "amf_backward": 9, "amf_slab": 6}[stem]
    for name, code in kernels.items():
        assert not code["spilled"], (name, code)
        assert name.startswith(cuda.SOURCES[stem])
        if name == "amf_prepare":
            assert code["STG.E.128"], (name, code)
            continue
        assert code["HMMA"] and code["LDSM"] and code["LDGSTS"], (name, code)
        if stem == "amf":
            # Rows of a warp are in two fragments (a vote: one), so that a matrix load of keys serves four products (two).
            rows, keys, deep = (1, 64, 32) if "vote" in name else (2, 128, 32) if "wide" in name else (2, 64, 128 if "128" in name else 64)
            assert code["HMMA"] == rows * keys // 8 * deep // 16, (name, code)
            assert code["LDSM"] == keys // 16 * deep // 16 + rows * deep // 16, (name, code)
        else:
            assert code["STG.E.128"], (name, code)
