"""The kernels of attention motion flow for compute capability 9.0, executed: the accuracy rule on every sample, all forms beside the
reference, rows without gradient that hold NaN, keys of other frames that do, and seeded faults that must be told."""

import re

import pytest
import torch

from vidkern import registry
from vidkern.ops import attention_motion_flow as op
from vidkern.ops.attention_motion_flow import cost, cuda, hopper
from vidkern.verify import accuracy

from amf_executed import (
    EVERY, Runs, empty, every_pair, float16_gradients_of_any_size, offsets_of_64_bits, operands, the_same_bits_whatever_the_schedule,
)  # fmt: skip
from harness import CSRC, KernelError, Launch, Program, machine_code, nvcc

STEMS = hopper.SOURCES | cuda.SOURCES  # of what hopper.py launches


def source(stem):
    return CSRC / "cuda" / f"{stem}.cu"


def by_prefix(programs):
    return {prefix: programs[stem] for stem, prefixes in STEMS.items() for prefix in prefixes}


@pytest.fixture(scope="module")
def programs():
    return by_prefix({stem: Program(source(stem)) for stem in STEMS})


class HopperRuns(Runs):
    """:class:`Runs` of hopper.py's launchers."""

    def __init__(self, programs, counted=None):
        launch = Launch(programs, counted)

        def bound(kind):
            return lambda *args, **more: getattr(hopper, kind)(*args, **more, launch=launch)

        self.ours = {kind: bound(kind) for kind in ("forward", "vote", "backward")}


@pytest.fixture
def runs(programs):
    return HopperRuns(programs)


@pytest.fixture
def executed(runs, monkeypatch):
    found = runs.ours.__getitem__
    why_not = lambda q, k, pairs, *sizes: hopper.why_not(q, k, *sizes[:3])  # noqa: E731
    backend = registry.Backend("hopper-executed", why_not, op._run_with(found), op._run_backward_with(found))
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


QUICK = ("negative", "wide_upper")


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
        accuracy.check("attention_motion_flow", sample, dtype, "hopper-executed", seeds=range(draws))


# ---- launchers on operands of any form ------------------------------------------------------------------------------------
FORMS = {
    "one head": {"groups": 2, "dim": 24},
    "samples of one head": {"groups": 2, "dim": 24, "batch": 2},
    "one head of 72": {"dim": 72},
    "one head of 128": {"dim": 128, "beside": True},
    "one head of 136": {"dim": 136},
    "heads apart": {"heads": 3, "dim": 24, "batch": 2},
    "heads side by side": {"heads": 5, "dim": 72, "beside": True},
}
LISTS = {"all": every_pair(3), "some": ((2, 1), (0, 1), (2, 2))}


@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(runs, form):
    """Rows of several query frames in a block, ragged edges, frames without pairs, heads wherever they lie."""
    for pairs in LISTS.values():
        assert runs.wrong(*operands(grid=(3, 5, 7), **FORMS[form]), (3, 5, 7), pairs, 0.1) < 1


LONG = (1, 20, 27)  # 540 tokens: more tiles of keys than the ring has stages


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [{"dim": 24}, {"dim": 72}, {"heads": 2, "dim": 24}], ids=["64", "128", "wide"])
def test_long_frames(runs, form, dtype):
    assert runs.wrong(*operands(grid=LONG, dtype=dtype, **form), LONG, every_pair(1), 0.02) < 1


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_scales(runs, scale):
    """The largest logit of a negative scale is the smallest product; without any, all are equal and the first wins, however large a product
    is."""
    for form in ("one head", "one head of 128", "heads apart"):
        q, k = operands(**FORMS[form])
        size = 1 if scale else 1e25
        got, want = runs.forward(q * size, k * size, (2, 5, 7), every_pair(2), scale)
        assert all((got[n] - want[n]).abs().max() < (1 if n == "index" else 1e-5) for n in EVERY)
        for a, b in zip(*runs.backward(q, k, (2, 5, 7), every_pair(2), scale)):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_gradients_alone(runs):
    for given in ({"dmean": False}, {"dlse": False}):
        for a, b in zip(*runs.backward(*operands(**FORMS["one head"]), (2, 5, 7), every_pair(2), 0.1, **given)):
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


# ---- what must not be seen ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["one head", "one head of 72", "heads apart"])
def test_frames_that_are_not_asked_for_may_hold_anything(runs, form):
    """Boxes reach past a frame's end: the frame behind it, of q or of k, holds NaN, and results are the same bits."""
    q, k = operands(grid=(3, 5, 7), **FORMS[form])
    found = []
    for value in (1.0, torch.nan):
        spoilt = [t.clone() for t in (q, k)]
        for t, frames in zip(spoilt, ((1,), (0, 2))):
            for f in frames:
                t[..., f * 35 : (f + 1) * 35, :] = value
        # Queries of frames 0 and 2 look at keys of frame 1.
        pairs, grid = ((0, 1), (2, 1)), (3, 5, 7)
        outs, grads = empty(q, pairs, grid), [torch.zeros_like(t) for t in (q, k)]
        runs.ours["forward"](*spoilt, pairs, grid=grid, scale=0.1, **outs)
        voted = {"index": outs["index"][:, :1].clone(), "top": outs["top"][:, :1].clone()}
        runs.ours["vote"](*spoilt, outs["lse"], pairs, grid=grid, scale=0.1, **voted)
        runs.ours["backward"](
            outs["mean"], outs["lse"], *spoilt, outs["mean"], outs["lse"], pairs, grid=grid, scale=0.1, dq=grads[0], dk=grads[1]
        )
        found.append([*outs.values(), *voted.values(), *grads])
    assert all(bool(t.isfinite().all()) for t in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


TALL = (2, 20, 11)  # 220 patches: three whole blocks of 64 rows and a short one


def rows_of(blocks):
    """1 for some rows of these blocks of 64, in [G, P, S]."""
    live = torch.zeros(1, 4, 220)
    for b in blocks:
        live[:, :, b * 64 + 5 : b * 64 + 9] = 1
    return live


def gradients_twice(runs, q, k, spoilt, live):
    """dq and dk of the same gradients for q and k, and for what is spoilt of them."""
    g = torch.Generator().manual_seed(0)
    dmean, dlse = torch.randn(1, 1, 4, 220, 2, generator=g) * live[..., None], torch.randn(1, 1, 4, 220, generator=g) * live
    results = []
    for given in ((q, k), spoilt):
        kept, out = empty(q, every_pair(2), TALL, ("mean", "lse")), [torch.full_like(t, torch.nan) for t in (q, k)]
        runs.ours["forward"](*given, every_pair(2), grid=TALL, scale=0.05, **kept)
        with accuracy.poisoned():
            runs.ours["backward"](dmean, dlse, *given, kept["mean"], kept["lse"], every_pair(2), grid=TALL, scale=0.05, dq=out[0], dk=out[1])
        results.append(out)
    return results


def test_rows_without_gradient_may_hold_anything(runs):
    """NaN in them: the same bits of every other gradient, and zeros of theirs."""
    q, k = operands(grid=TALL)
    live, spoilt = rows_of((1, 3)), q.clone()
    dead = (live[0].amax(0) == 0).repeat(2)
    spoilt[:, :, :, dead] = torch.nan
    results = gradients_twice(runs, q, k, (spoilt, k), live)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results))
    assert bool((results[1][0][:, :, :, dead] == 0).all()) and bool((results[1][0][:, :, :, ~dead] != 0).any())


def test_keys_reach_only_rows_with_a_gradient(runs):
    """Frame 1 of k is NaN, and of frame 0 row 69 alone has a gradient for it: those in the same tile have theirs for frame 0."""
    q, k = operands(grid=TALL)
    live, spoilt = rows_of((1,)), k.clone()
    live[:, 1, 70:], live[:, 3] = 0, 0
    spoilt[..., 220:, :] = torch.nan
    (dq, dk), found = gradients_twice(runs, q, k, (q, spoilt), live)
    rows = torch.arange(440) != 69
    assert torch.equal(found[0][..., rows, :], dq[..., rows, :]) and bool((dq[..., 70:73, :] != 0).any())
    assert bool(found[0][..., 69, :].isnan().all()) and torch.equal(found[1][..., :220, :], dk[..., :220, :])


def test_blocks_without_gradient_are_not_computed(programs):
    """Products of warpgroups, each of 16 channels, keys or queries of depth; channels are 64 with padding."""
    q, k = operands(grid=TALL)
    for blocks in (range(4), (2,), ()):
        counted = []
        got, want = HopperRuns(programs, counted).backward(q, k, TALL, every_pair(2), 0.05, live=rows_of(blocks))
        assert all((a.double() - b).norm() <= 1e-2 * b.norm() for a, b in zip(got, want))
        made = {part: sum(c["warpgroup_products"] for n, c in counted if f"_{part}_" in n) for part in ("dq", "dk")}
        # Pairs times blocks of queries, tiles of 128 keys or blocks of 64, and depth: of the first product and of the second.
        assert made == {"dq": 4 * len(blocks) * 2 * (4 + 8), "dk": 4 * 4 * len(blocks) * (4 + 4)}


# ---- tables, and what is refused ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("together", [1, 2])
def test_pieces(together):
    """Every row of every pair is in one piece of its target's, and clusters are of one target."""
    pairs, size = ((2, 1), (0, 1), (2, 2), (0, 0)), 35
    found = hopper.pieces(pairs, 3, size, together, torch.device("cpu"))
    assert found.shape[1:] == (8, 4) and len(found) % together == 0
    for cluster in found.unflatten(0, (-1, together)):
        assert len({int(t) for t in cluster[..., 3].flatten()}) == 1
    rows = [(token + i, entry + i, target) for token, entry, n, target in found.flatten(0, 1).tolist() for i in range(n)]
    assert sorted(rows) == sorted((f * size + i, p * size + i, t) for p, (f, t) in enumerate(pairs) for i in range(size))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q: q.float(), "dtype is torch.float32, it serves torch.float16 and torch.bfloat16"),
        (lambda q: q[..., :12], "head_dim is 12, it serves multiples of 8"),
        (lambda q: q.expand(1, 2, 3, 24, 16), "there are 2 groups of 3 heads, it serves groups of one head or one group"),
        (lambda q: q.expand(2, 1, 1, 24, 16), "q repeats what it holds (strides (0, 384, 384, 16, 1)), it serves positive strides"),
    ],
)
def test_what_is_refused(change, words):
    q = change(torch.zeros(1, 1, 1, 24, 16, dtype=torch.bfloat16))
    assert hopper.why_not(q, q, 2, 3, 4) == words


def test_what_is_served():
    q = torch.zeros(2, 3, 24, 16, dtype=torch.float16)
    for t in (q[:, :, None], q[:, None], q[-1:, None, :2], q.transpose(2, 3).contiguous().transpose(2, 3)[:, None]):
        assert hopper.why_not(t, t, 2, 3, 4) is None


# ---- seeded faults --------------------------------------------------------------------------------------------------------
# One head: more tiles than stages, and two tiles; several heads: two tiles of several chunks.
PROBLEMS = {
    "held": [({"dim": 24}, LONG), ({"groups": 2, "dim": 24}, (2, 12, 13))],
    "held 128": [({"dim": 72}, (2, 9, 9))],
    "wide": [({"heads": 3, "dim": 72}, (1, 15, 20))],
}


def problems(which):
    """Frames that end inside a tile, many equal logits, rows and blocks without gradient; and, where keys beyond the frame would show,
    logits far below zero."""
    g = torch.Generator().manual_seed(5)
    for form, grid in PROBLEMS[which]:
        pairs, size = every_pair(grid[0]), grid[1] * grid[2]
        live = (torch.rand(form.get("groups", 1), len(pairs), size, generator=g) > 0.3).float()
        live[:, -1, :64], live[:, 0, 64:] = 0, 1
        yield (*operands(grid=grid, **form), grid, pairs, -0.05, live)
    q, k = operands(**{n: v for n, v in form.items() if n != "groups"})
    yield (q * 0 + 4, k / 8 - 8, (2, 5, 7), every_pair(2), 16 / (q.shape[2] * q.shape[4]))


# Of a fault: its source, the kernels that are compiled with it, what their names begin with, and the problems that show it.
HELD = ("amf_hopper", "VK_AMF_HELD(bf16, 64)", "amf_hopper_forward_", "held")
HELD_128 = ("amf_hopper", "VK_AMF_HELD(bf16, 128)", "amf_hopper_forward_", "held 128")
WIDE = ("amf_hopper", "VK_AMF_WIDE(bf16)", "amf_hopper_forward_", "wide")
VOTE = ("amf_hopper", "VK_AMF_VOTE(bf16)", "amf_hopper_vote_", "held")
BACK = ("amf_hopper_backward", "VK_AMF_BACKWARD(bf16, 64)", "amf_hopper_d", "held")
BACK_128 = ("amf_hopper_backward", "VK_AMF_BACKWARD(bf16, 128)", "amf_hopper_d", "held 128")
FAULTS = {
    "no wait for a tile": (HELD, "    ring.wait_full(i);\n    products_begin();\n", "    products_begin();\n"),
    "no wait for the rows": (HELD, "  mbarrier_wait(there, 0);\n  if (g.keep", "  if (g.keep"),
    "parity of full": (HELD, "u32(i / STAGES) & 1", "u32(i / STAGES + 1) & 1"),
    "parity of empty": (HELD, "u32(i / STAGES + 1) & 1", "u32(i / STAGES) & 1"),
    "released before its products are done": (
        HELD, "      products_wait<1>();\n      ring.release(i + j);", "      ring.release(i + j);\n      products_wait<1>();",
    ),
    "released by half of the warps": (HELD, "ring.make(1, READERS);", "ring.make(1, READERS / 2);"),
    "sums read early": (HELD, "products_wait<1>();\n      ring.release(i + j);", "products_wait<2>();\n      ring.release(i + j);"),
    "the last sums read early": (HELD, "    products_wait<0>();\n    r.fold(s[1]", "    r.fold(s[1]"),
    "no fence before products": (HELD, "ring.wait_full(i);\n    products_begin();\n", "ring.wait_full(i);\n"),
    "the first panel twice": (HELD_128, "along(panel(k / 4) + row", "along(panel(0) + row"),
    "half a step of depth": (HELD, "k % 4 * 32); }", "k % 4 * 16); }"),
    "boxes of panels beside each other": (HELD_128, "return base + n * PANEL_BYTES;", "return base + n * 1024;"),
    "a stage too few bytes": (HELD, "mbarrier_expect(ring.full(i), Right::BYTES);", "mbarrier_expect(ring.full(i), Right::BYTES / 2);"),
    "turned rows not fenced": (HELD, "  async_fence();\n  named", "  named"),
    "turned rows not waited for": (HELD, "  named_barrier(u32(group_index()), GROUP);\n", ""),
    "sign of a negative scale": (HELD, "v.w[w] = (v.w[w] & keep) ^ flip;", "v.w[w] = v.w[w] & keep;"),
    "a key too many": (HELD, "+ n * 8 >= f.size) s", "+ n * 8 > f.size) s"),
    "the last of ties": (HELD, "if (FULL && v > best[h])", "if (FULL && v >= best[h])"),
    "an entropy that forgets what it was relative to": (HELD, "total[h] * (before - now[h])", "0 * total[h]"),
    "a row too many": (HELD, "row >= own.rows) continue;\n    const i64 at = map", "row > own.rows) continue;\n    const i64 at = map"),
    "wide: no wait for a chunk": (WIDE, "      ring.wait_full(i);\n      products_begin();", "      products_begin();"),
    "wide: released before its products are done": (
        WIDE, "      products_wait<1>();\n      release(i - 1);", "      release(i - 1);\n      products_wait<1>();",
    ),
    "wide: sums read early": (WIDE, "    products_wait<0>();\n    release(i - 1);", "    release(i - 1);"),
    "wide: released here alone": (WIDE, "if (lane_index() < CLUSTER)", "if (lane_index() < 1)"),
    "wide: both blocks bring the same keys": (WIDE, "n = rank * SHARE; n < keys", "n = 0; n < keys"),
    "wide: keys for this block alone": (WIDE, "u16((1 << CLUSTER) - 1)", "u16(1 << rank)"),
    "wide: the chunk before": (WIDE, "channel = c % each * STEP;", "channel = c / each * STEP;"),
    "wide: keys from the eighth on": (WIDE, "right(i).depth_along(0, k), c +", "right(i).depth_along(8, k), c +"),
    "wide: sign of a negative scale": (WIDE, "s[n].v[i] * sign;", "s[n].v[i];"),
    "wide: gone before the other block": (WIDE, "n < STAGES; ++n) ring.wait_empty(i + n)", "n < 0; ++n) ring.wait_empty(i + n)"),
    "vote: of the last group": (VOTE, "votes[n].v[i] += exp2", "votes[n].v[i] = exp2"),
    "vote: a key too many": (VOTE, "if (key < g.frame.size && votes", "if (key <= g.frame.size && votes"),
    "backward: no wait for a stage": (BACK, "        ring.wait_full(i);\n        const Words", "        const Words"),
    "backward: released early": (
        BACK, "products_wait<0>();\n      if (before >= 0) ring.release(before);", "ring.release(i);\n      products_wait<0>();",
    ),
    "backward: sums read early": (BACK, "    products_wait<0>();\n    add();", "    add();"),
    "backward: no fence before gradients": (
        BACK, "s[2 * n + 1]);\n      products_begin();\n", "s[2 * n + 1]);\n",
    ),
    "backward: the same tokens as depth": (BACK, "right(i).depth_across(n), n > 0", "right(i).depth_across(n ^ 1), n > 0"),
    "backward: depth of another panel": (BACK_128, "(PANEL * 2), PANEL_BYTES);", "(PANEL * 2), PANEL_BYTES / 2);"),
    "backward: queries without gradient read": (BACK, "(alive >> row & 1) != 0 &&", "first + own + row < g.frame.size &&"),
    "backward: boxes of queries without gradient": (BACK, "(alive | past) == 0xffffffffu", "true"),
    "backward: filled, not fenced": (BACK, "          async_fence();\n", ""),
    "backward: filled, not waited for": (BACK, "copies_commit(), copies_wait<0>();", "copies_commit();"),
    "backward: a producer's warp not waited for": (BACK, "p.ring.make(4, READERS);", "p.ring.make(3, READERS);"),
    "backward: a key too many": (BACK, "own + n * 8 + j < g.frame.size", "own + n * 8 + j <= g.frame.size"),
    "backward: rows leave while they are read": (BACK, "    named_barrier(u32(half) + 1, GROUP);", "    "),
    "backward: no barrier among rows that leave": (BACK, "    warp_barrier();\n    T* to", "    T* to"),
}  # fmt: skip


def without_others(stem, kept):
    """Edits that leave out kernels which the problems do not run."""
    lines = re.findall(r"^VK_AMF_\w+\([^)]*\)$", source(stem).read_text(), re.MULTILINE)
    assert kept in lines
    return [(f"{line}\n", "") for line in lines if line != kept]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(programs, fault):
    """In the source named or in a header that it includes: by a rule of the executor or by a wrong result."""
    (stem, kept, prefix, which), *edit = FAULTS[fault]
    made = Program(source(stem), edit, *without_others(stem, kept))
    runs = HopperRuns({p: made if p.startswith(prefix) else sound for p, sound in programs.items()})
    wrong = runs.wrong_backward if stem == "amf_hopper_backward" else runs.wrong_forward
    try:
        caught = any(wrong(*problem) > 2 for problem in problems(which))
    except KernelError:
        return
    assert caught


@pytest.mark.parametrize("which", PROBLEMS)
def test_what_faults_are_told_from(runs, which):
    assert max(runs.wrong(*problem) for problem in problems(which)) < 1


# ---- machine code ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("stem", [pytest.param("amf_hopper", marks=pytest.mark.slow), "amf_hopper_backward"])
def test_machine_code(stem):
    """Nothing spilled, no product that waits for another; products of warpgroups, boxes, and registers that change hands."""
    kernels = machine_code(source(stem), "90a")
    assert len(kernels) == {"amf_hopper": 14, "amf_hopper_backward": 8}[stem]
    for name, code in kernels.items():
        assert not code["spilled"] and not code["serialized"], (name, code)
        assert name.startswith(hopper.SOURCES[stem])
        assert code["HGMMA"] and code["UTMALDG"] and code["USETMAXREG"] == 2 and "HMMA" not in code, (name, code)
        paired = "wide" in name or "vote" in name
        assert bool(code.get("UTMALDG.MULTICAST")) == paired, (name, code)
