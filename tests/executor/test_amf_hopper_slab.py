"""The backward of motion flow through slabs for compute capability 9.0, executed: the accuracy rule on the samples that take it, frames and
heads of every kind of size, what must not be seen, products that are left out, and seeded faults that must be told."""

import itertools

import pytest
import torch

from vidkern.ops.attention_motion_flow import cost, cuda, hopper
from vidkern.verify import accuracy

from amf_executed import every_pair, operands
from harness import KernelError, Program, machine_code, nvcc
from test_amf_hopper import STEMS, TALL, HopperRuns, by_prefix, executed, gradients_twice, rows_of, source, without_others  # noqa: F401


@pytest.fixture(scope="module")
def programs():
    return by_prefix({stem: Program(source(stem)) for stem in STEMS})


@pytest.fixture
def runs(programs):
    return HopperRuns(programs)


# ---- right for every shape ------------------------------------------------------------------------------------------------
WIDE = [s for s in cost.SAMPLES if s.combine == "logit_mean" and s.heads > 1 or s.groups[1] > cuda.HELD]
QUICK = ("qk_mean-bfloat16", "qk_mean-float16", "near_frames-float16")


def cases():
    for sample, dtype in itertools.product(WIDE, (torch.bfloat16, torch.float16)):
        name = f"{sample.name}-{str(dtype)[6:]}"
        yield pytest.param(sample, dtype, id=name, marks=[pytest.mark.slow] * (name not in QUICK))


@pytest.mark.parametrize("sample, dtype", list(cases()))
def test_accuracy(executed, sample, dtype):  # noqa: F811
    with accuracy.poisoned():
        draws = accuracy.draws("attention_motion_flow", sample, dtype)
        accuracy.check("attention_motion_flow", sample, dtype, "hopper-executed", seeds=range(draws))


def wrong(runs, grid, pairs, live=None, **form):
    with accuracy.poisoned():
        return runs.wrong_backward(*operands(grid=grid, **form), grid, pairs, -0.05, live)


def some_of(groups, pairs, size):
    """Which rows have a gradient: in the first pair all, in the last none of the first block, else most, and 32 of the second block all."""
    live = (torch.rand(groups, len(pairs), size, generator=torch.Generator().manual_seed(5)) > 0.3).float()
    live[:, :, 64:96] = 1
    live[:, 0], live[:, -1, :64] = 1, 0
    return live


# Heads of which the last chunk of 64 channels is short, or the last of four panels is missing; tokens' heads side by side or apart.
FORMS = [
    {"heads": 3, "dim": 40}, {"heads": 3, "dim": 40, "beside": True, "batch": 2}, {"heads": 2, "dim": 72},
    {"heads": 5, "dim": 72, "beside": True}, {"dim": 136}, {"heads": 2, "dim": 256, "beside": True},
    {"heads": 9, "dim": 8, "dtype": torch.float16},
]  # fmt: skip
LISTS = {"all": every_pair(2), "some": ((0, 1), (1, 0), (1, 1)), "one": ((1, 0),)}


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_heads(runs, form):
    """Rows of which some have no gradient, several shares of one dK, frames that are no query or no target."""
    for pairs in LISTS.values():
        assert wrong(runs, (2, 5, 13), pairs, some_of(1, pairs, 65), **form) < 1


@pytest.mark.parametrize("size", [1, 7, 8, 16, 63, 64, 72, 127, 128, 129, 200])
def test_sizes(runs, size):
    for live in (None, some_of(1, every_pair(2), size)):
        assert wrong(runs, (2, 1, size), every_pair(2), live, heads=2, dim=24) < 1


@pytest.mark.parametrize("size", [257, pytest.param(540, marks=pytest.mark.slow)])
def test_more_stages_than_the_ring_has(runs, size):
    for live in (None, some_of(1, every_pair(1), size)):
        assert wrong(runs, (1, 1, size), every_pair(1), live, heads=2, dim=24) < 1


@pytest.mark.parametrize("ours", ["slope", "products"])
def test_each_half_works_with_the_other_of_mma_sync(runs, monkeypatch, ours):
    """The slab is the same."""
    if ours == "products":
        monkeypatch.setattr(hopper, "_slope", cuda._slope)
    else:
        monkeypatch.setattr(cuda, "_slope", hopper._slope)
        monkeypatch.setattr(hopper, "_through_slabs", cuda._through_slabs)
    for form in (FORMS[1], FORMS[3]):
        assert wrong(runs, (2, 5, 13), every_pair(2), some_of(1, every_pair(2), 65), **form) < 1


def test_gradients_alone(runs):
    for given in ({"dmean": False}, {"dlse": False}):
        for a, b in zip(*runs.backward(*operands(heads=9), (2, 5, 7), every_pair(2), 0.1, **given)):
            assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_the_same_bits_whatever_the_schedule(runs):
    q, k = operands(heads=3, dim=72, grid=(2, 9, 9))
    live = some_of(1, every_pair(2), 81)
    found = [runs.backward(q, k, (2, 9, 9), every_pair(2), 0.1, live=live)[0] for _ in "abc"]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# ---- what must not be seen, and what is not made ---------------------------------------------------------------------------
@pytest.mark.parametrize("blocks", [(1, 3), (0, 1, 2)])
def test_rows_without_gradient_may_hold_anything(runs, blocks):
    """NaN in them, and in the slab where nothing was written: the same bits of every other gradient, and zeros of theirs."""
    q, k = operands(heads=2, dim=72, grid=TALL)
    live, spoilt = rows_of(blocks), q.clone()
    live[:, 0, 64:128] = blocks[0]  # a block that is all alive
    dead = torch.cat([live[0, :2].amax(0), live[0, 2:].amax(0)]) == 0
    spoilt[:, :, :, dead] = torch.nan
    results = gradients_twice(runs, q, k, (spoilt, k), live)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*results))
    assert bool((results[1][0][:, :, :, dead] == 0).all()) and bool((results[1][0][:, :, :, ~dead] != 0).any())


def reached(runs):
    """dq and dk where frame 1 of k is NaN, and of frame 0 row 69 alone has a gradient for it; and without the NaN."""
    q, k = operands(heads=2, dim=72, grid=TALL)
    live, spoilt = rows_of((1, 2)), k.clone()
    live[:, 1], live[:, 3] = 0, 0
    live[:, 1, 69] = 1
    spoilt[..., 220:, :] = torch.nan
    return gradients_twice(runs, q, k, (q, spoilt), live)


def test_keys_reach_only_rows_with_a_gradient(runs):
    """Those in the same tile have theirs for frame 0."""
    (dq, dk), found = reached(runs)
    rows = torch.arange(440) != 69
    assert torch.equal(found[0][..., rows, :], dq[..., rows, :]) and bool((dq[..., 70:73, :] != 0).any())
    assert bool(found[0][..., 69, :].isnan().all()) and torch.equal(found[1][..., :220, :], dk[..., :220, :])


def test_frames_that_are_not_asked_for_may_hold_anything(runs):
    """Boxes reach past a frame's end: the frame behind it, of q or of k, holds NaN, and results are the same bits."""
    q, k = operands(heads=3, dim=40, beside=True, grid=(3, 5, 7))
    found, pairs, grid = [], ((0, 1), (2, 1)), (3, 5, 7)
    g = torch.Generator().manual_seed(0)
    kept = [torch.randn(1, 1, 2, 35, *more, generator=g) for more in ((2,), (), (2,), ())]
    for value in (1.0, torch.nan):
        spoilt, out = [t.clone() for t in (q, k)], [torch.full_like(t, torch.nan) for t in (q, k)]
        for t, frames in zip(spoilt, ((1,), (0, 2))):
            for f in frames:
                t[..., f * 35 : (f + 1) * 35, :] = value
        with accuracy.poisoned():
            runs.ours["backward"](*kept[:2], *spoilt, *kept[2:], pairs, grid=grid, scale=0.05, dq=out[0], dk=out[1])
        found.append(out)
    assert all(bool(t.isfinite().all()) for t in found[0]) and all(torch.equal(a, b) for a, b in zip(*found))


def test_blocks_without_gradient_are_not_computed(programs):
    """Products of warpgroups, each of 16 keys or rows of depth. A block of rows of dQ takes the channels in two parts where some of its
    rows have no gradient, and in one where all have."""
    q, k = operands(heads=2, dim=72, grid=TALL)
    whole = torch.zeros(1, 4, 220)
    whole[..., 64:128] = 1
    for live, blocks, parts in ((rows_of(range(4)), 4, 2), (rows_of((2,)), 1, 2), (whole, 1, 1), (rows_of(()), 0, 1)):
        counted = []
        got, want = HopperRuns(programs, counted).backward(q, k, TALL, every_pair(2), 0.05, live=live)
        assert all((a.double() - b).norm() <= 1e-2 * b.norm() for a, b in zip(got, want))
        made = {part: sum(c["warpgroup_products"] for n, c in counted if f"_slab_{part}_" in n) for part in ("dq", "dk")}
        # Pairs times blocks, and depth: of four times 64 keys; of 64 rows, for four times 64 keys.
        assert made == {"dq": 4 * blocks * parts * 4 * 4, "dk": 4 * blocks * 4 * 4}


# ---- seeded faults --------------------------------------------------------------------------------------------------------
def caught(runs) -> bool:
    """Two tiles of rows, the second with few; frames that differ in how many targets they have; two tiles of channels, whose last panels do
    not exist; a target whose keys are NaN for others."""
    pairs = LISTS["some"]
    if not wrong(runs, (2, 13, 11), pairs, some_of(1, pairs, 143), heads=3, dim=72) < 2:
        return True
    if not wrong(runs, (1, 1, 280), every_pair(1), heads=1, dim=136) < 2:  # more stages than the ring has
        return True
    (dq, dk), found = reached(runs)
    rows = torch.arange(440) != 69
    return not (torch.equal(found[0][..., rows, :], dq[..., rows, :]) and torch.equal(found[1][..., :220, :], dk[..., :220, :]))


FAULTS = {
    "parity of full": ("u32(i / STAGES) & 1", "u32(i / STAGES + 1) & 1"),
    "parity of empty": ("u32(i / STAGES + 1) & 1", "u32(i / STAGES) & 1"),
    "half a step of depth": ("k % 4 * 32); }", "k % 4 * 16); }"),
    "depth of another panel": ("(PANEL * 2), PANEL_BYTES);", "(PANEL * 2), PANEL_BYTES / 2);"),
    "boxes of panels beside each other": ("return base + n * PANEL_BYTES;", "return base + n * 1024;"),
    "no swizzle of what threads write": ("((c ^ row) & 7) * 16", "(c & 7) * 16"),
    "another slot": ("load(slots + (slot + which) * 2); }", "load(slots + which * 2); }"),
    "another pair": ("load(slots + (slot + which) * 2 + 1)", "load(slots + which * 2 + 1)"),
    "a head that there is not": ("return head < g.heads && channel", "return channel"),
    "channels of the next head": ("head < g.heads && channel + c < g.dim", "head < g.heads"),
    "chunks of a head": ("channel(panel % tiles_of(g.dim, STEP) * STEP)", "channel(panel % tiles_of(g.dim, STEP) * CHUNK)"),
    "one place for two warps": ("(warp_index() - 4) * (PIECE", "(warp_index() % 4) * (PIECE"),
    "leaves before it is written": ("      warp_barrier();  // the warp has written them\n", ""),
    "written before it has left": ("      warp_barrier();  // and has read them\n", ""),
    "dq: released by half of the warps": ("ring.make(1, READERS);", "ring.make(1, READERS / 2);"),
    "dq: filled while it is read": (
        "        ring.wait_empty(i);\n        store16(at.note(i), rows);", "        store16(at.note(i), rows);",
    ),
    "dq: the last note while one is read": (
        "    ring.wait_empty(i);\n    store16(at.note(i), Words{});", "    store16(at.note(i), Words{});",
    ),
    "dq: no note at the end": ("    mbarrier_arrive(ring.full(i));\n    return;", "    return;"),
    "dq: bytes of both halves": ("(i32(live[0]) + i32(live[1]))", "2"),
    "dq: rows of the first half alone": ("if (!live[0] && !live[1]) continue;", "if (!live[0]) continue;"),
    "dq: no wait for a stage": (
        "    ring.wait_full(i);\n    products_begin();\n    VK_UNROLL\n    for (i32 k = 0; k < DEPTH / 16; ++k) warp",
        "    products_begin();\n    VK_UNROLL\n    for (i32 k = 0; k < DEPTH / 16; ++k) warp",
    ),
    "dq: no wait for a note": ("    ring.wait_full(i);\n    const Words note", "    const Words note"),
    "dq: no fence before products": (
        "    products_begin();\n    VK_UNROLL\n    for (i32 k = 0; k < DEPTH / 16; ++k) warp",
        "    VK_UNROLL\n    for (i32 k = 0; k < DEPTH / 16; ++k) warp",
    ),
    "dq: released before its products are done": (
        "        multiply(i);\n        products_wait<1>();\n        ring.release(i - 1);",
        "        multiply(i);\n        ring.release(i - 1);",
    ),
    "dq: released never": ("        products_wait<1>();\n        ring.release(i - 1);", "        products_wait<1>();"),
    "dq: sums read early": (
        "      products_wait<0>();\n      ring.release(i - 1);\n      continue;", "      ring.release(i - 1);\n      continue;",
    ),
    "dq: rows of the other half": ("depth_along(half * HALF, k)", "depth_along(0, k)"),
    "dq: the slab of another target": ("row_first + n * HALF, which, 0, ring", "row_first + n * HALF, 0, 0, ring"),
    "dq: the slab's rows of the first half": ("key, row_first + n * HALF, which", "key, row_first, which"),
    "dq: keys of another target": (".channel, key, target,", ".channel, key, which,"),
    "dq: keys reach all rows of a block": ("(low & high) == 0xffffffffu", "(low | high) != 0"),
    "dq: keys reach all rows": ("add_where(alive[v / 2],", "add_where(true,"),
    "dq: rows of the other eight": ("add_where(alive[v / 2],", "add_where(alive[0],"),
    "dq: rows of the first 32": ("(own < 32 ? low : high)", "low"),
    "dq: parts: no wait for a stage": ("      ring.wait_full(i);\n      VK_UNROLL", "      VK_UNROLL"),
    "dq: parts: no fence": ("        products_begin();\n", ""),
    "dq: parts: sums read early": ("products_commit(), products_wait<0>();", "products_commit();"),
    "dq: parts: the first channels twice": ("depth_across(k, n * (PANELS / 2))", "depth_across(k)"),
    "dq: parts: sums of the stage before": ("(PANELS / 2)), k > 0);", "(PANELS / 2)), true);"),
    "dq: a row too many": ("row + n < g.size && span", "row + n <= g.size && span"),
    "dk: a producer's warp not waited for": ("ring.make(1 + 4, READERS)", "ring.make(4, READERS)"),
    "dk: filled while it is read": ("before the wait\n      ring.wait_empty(i);\n", "before the wait\n"),
    "dk: the same keys twice": ("key_first + n * STEP, here", "key_first, here"),
    "dk: the slab of another target": ("here, which, 0, ring", "here, 0, 0, ring"),
    "dk: a block without gradient": ("while (row < g.size && !live(row)) row", "while (false) row"),
    "dk: one block too few": ("count += i32(live(row))", "count += i32(live(row) && row > 0)"),
    "dk: boxes of rows without gradient": ("const bool whole = (alive | past) == 0xffffffffu;", "const bool whole = true;"),
    "dk: rows without gradient read": ("(alive >> n & 1) != 0 && holds", "token + n < g.size && holds"),
    "dk: boxes of other rows": (".channel, token, g.query", ".channel, here, g.query"),
    "dk: boxes of another frame": (".channel, token, g.query", ".channel, token, 0"),
    "dk: rows of another frame": ("q + g.first_token(g.query) * g.q_token", "q"),
    "dk: filled, not fenced": ("      async_fence();\n", ""),
    "dk: said before it has come": ("copies_wait<AHEAD>();", "copies_wait<AHEAD + 1>();"),
    "dk: the last said before they have come": ("    copies_wait<0>();\n", ""),
    "dk: the last not said": ("n = AHEAD - 1; n >= 0; --n", "n = AHEAD - 1; n > 0; --n"),
    "dk: no wait for a stage": ("    ring.wait_full(i);\n    const Panels", "    const Panels"),
    "dk: no fence before products": ("left{at.left(i)};\n    products_begin();\n", "left{at.left(i)};\n"),
    "dk: keys of the other half": ("left.depth_across(k, half)", "left.depth_across(k, 0)"),
    "dk: left operand not turned": (
        "<T, WIDTH, true, true>(out, left.depth_across(k, half)", "<T, WIDTH, false, true>(out, left.depth_across(k, half)",
    ),
    "dk: released before its products are done": (
        "      multiply(i);\n      products_wait<1>();\n      ring.release(i - 1);", "      multiply(i);\n      ring.release(i - 1);",
    ),
    "dk: sums read early": ("    products_wait<0>();\n  }\n  const bool first_share", "  }\n  const bool first_share"),
    "dk: a share forgotten": ("b = before[n++].b + b;", "++n;"),
    "dk: the first share added to nothing": ("    if (!first_share) {", "    if (true) {"),
    "dk: a share not kept": ("    if (!last_share)\n", "    if (false)\n"),
    "dk: another slot's share": ("load(g.shares + (g.slot + which) * 2) != 0", "load(g.shares + which * 2) != 0"),
    "dk: a key too many": ("key + n < g.size && span", "key + n <= g.size && span"),
    "dk: said by a warp that is not there": ("      async_fence();\n      warp_barrier();\n", "      async_fence();\n"),
    "released by a warp that is not there": ("    warp_barrier();\n    if (leads()) mbarrier_arrive(empty(i));", "    if (leads()) mbarrier_arrive(empty(i));"),
    "dk: sums fetched of a key too many": ("key_first + i32(thread_index()) < g.size", "true"),
    "dk: sums fetched of another channel": ("+ s.channel, u32(g.dim", "+ s.channel + 1, u32(g.dim"),
    "dk: sums of a key too many": ("key + row < g.size && span.head", "key + row <= g.size && span.head"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(programs, fault):
    """By a rule of the executor or by a wrong result."""
    made = Program(source("amf_hopper_slab"), FAULTS[fault], *without_others("amf_hopper_slab", "VK_AMF_SLAB(bf16)"))
    runs = HopperRuns({p: made if p.startswith("amf_hopper_slab_") else sound for p, sound in programs.items()})
    try:
        assert caught(runs)
    except KernelError:
        pass


def test_what_faults_are_told_from(runs):
    assert not caught(runs)


# ---- machine code ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_machine_code():
    """Nothing spilled, no product that waits for another; products of warpgroups, boxes, registers that change hands, wide stores."""
    kernels = machine_code(source("amf_hopper_slab"), "90a")
    assert set(kernels) == {f"amf_hopper_slab_{part}_{dtype}" for part in ("dq", "dk") for dtype in ("bf16", "f16")}
    for name, code in kernels.items():
        assert not code["spilled"] and not code["serialized"], (name, code)
        assert code["UTMALDG"] and code["USETMAXREG"] == 2 and code["STG.E.128"] and "HMMA" not in code, (name, code)
        # Stages stand in the code twice, the first and those in the loop: 4 times 16 of depth; of dQ also in two parts.
        assert code["HGMMA"] == (16 if "_dq_" in name else 8), (name, code)
        # Rows brought by threads, and sums that are fetched ahead, a panel at a time.
        assert bool(code.get("LDGSTS")) == ("_dk_" in name) and code.get("UBLKPF", 0) == (4 if "_dk_" in name else 0), (name, code)
