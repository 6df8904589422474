"""The forward of grid attention for compute capability 9.0, executed: the accuracy rule, hidden NaN, its work, and seeded faults that must be
told; and how its tiles are chosen."""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import grid_attention as op
from vidkern.ops.grid_attention import hopper, hopper_backward
from vidkern.ops.grid_attention.plan import Shape, Tiling, plan, work
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Launch, Program, machine_code, nvcc

SOURCES = {dim: CSRC / "cuda" / f"grid_attention_hopper_{dim}.cu" for dim in (64, 96, 128)}
# Two take minutes here.
SAMPLES = [s for s in rooms.room("grid_attention").samples if s.dim <= 128 and s.name not in ("one_token_frames", "demo")]
QUICK = ("gqa", "mqa_blhd", "one_frame", "causal_anchor", "part_view", "text_back_len", "frames_masked", "dim_128")
# All kernels of a source take as long to compile as everything else here to run: of each dim the narrowest, and one with masks. The slow run
# has all of them.
FEW = {"WIDTHS": {2: (64,), 3: (80,)}, "LIVE_WIDTHS": {2: (96,)}}


def few(dim: int, kinds, widths=FEW) -> list[tuple[str, str]]:
    """Edits of a source: some of its kernels."""
    plain = [f"VK_FORWARD_{64 * g}({t}, {dim}, {w})" for t in kinds for g, ws in widths["WIDTHS"].items() for w in ws if g == 2 or dim == 64]
    live = [f"VK_FORWARD_LIVE({t}, {dim}, {w})" for t in kinds for w in widths["LIVE_WIDTHS"][2]]
    others = [("\nVK_FORWARDS_OF_THREE(64)\n", "\n")] if dim == 64 else []
    return [(f"VK_FORWARDS({dim})", " ".join(plain + live)), *others]


def built(*jobs):
    """Programs of (dim, edits ...), compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: Program(SOURCES[job[0]], *job[1:]), jobs))


@pytest.fixture(scope="module")
def programs():
    kinds = {64: ("bf16", "f16"), 96: ("bf16", "f16"), 128: ("bf16",)}
    return {f"grid_attention_hopper_forward_{d}_": p for d, p in zip(kinds, built(*((d, *few(d, k)) for d, k in kinds.items())))}


def install(monkeypatch, programs, widths=FEW, counted=None, backward=op._reference_backward):
    """The backend on the executor. Gradients are the reference's, unless told otherwise, of the output and the lse that the kernel left."""
    for name, values in widths.items():
        monkeypatch.setattr(hopper, name, values)
    hopper.choose.cache_clear()
    forward = functools.partial(hopper.forward, launch=Launch(programs, counted))
    backend = registry.Backend(
        "hopper-executed", lambda q, k, v, *rest: hopper.why_not(q, k, v), op._run_with(forward), op._run_backward_with(backward)
    )
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


@pytest.fixture(autouse=True)
def chosen_anew():
    yield
    hopper.choose.cache_clear()


@pytest.fixture
def executed(programs, monkeypatch):
    install(monkeypatch, programs)


def check(sample, dtype):
    with accuracy.poisoned():
        accuracy.check("grid_attention", sample, dtype, "hopper-executed", seeds=range(accuracy.draws("grid_attention", sample, dtype)))


def cases():
    """The quick ones in one dtype; all others in the slow run."""
    for i, sample in enumerate(SAMPLES):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        marks = [] if sample.name in QUICK else [pytest.mark.slow]
        yield pytest.param(sample, dtype, id=f"{sample.name}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("sample, dtype", list(cases()))
def test_accuracy(executed, sample, dtype):
    check(sample, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_front", "frames_masked"])
def test_accuracy_with_its_backward(programs, monkeypatch, name):
    """Both launchers, as they are registered."""
    backward = Program(CSRC / "cuda" / "grid_attention_hopper_backward_64.cu")
    parts = {prefix: backward for prefix in hopper_backward.SOURCES["grid_attention_hopper_backward_64"]}
    parts["grid_attention_delta_"] = Program(CSRC / "cuda" / "grid_attention_backward.cu")
    run = functools.partial(hopper_backward.backward, launch=Launch(parts))
    install(monkeypatch, programs, backward=run)
    [sample] = [s for s in SAMPLES if s.name == name]
    check(sample, torch.bfloat16)


def attend(impl, dtype=torch.bfloat16, frames=(2, 3), frame_len=37, dim=40, heads=(2, 1), hidden=None, deep=0.0, pattern=None, **rules):
    """Output and lse of an odd-sized problem: in bfloat16 on a backend or in float64 on the reference. ``hidden``: tokens that hold NaN;
    ``deep``: shifts q up and k down, and with them every logit; ``pattern``: who sees whom, in place of a grid of ``frames``."""
    g = torch.Generator().manual_seed(0)
    n_frames = frames[0] * frames[1] if pattern is None else pattern.n_frames
    length = n_frames * frame_len + rules.get("n_text", 0)
    q, k, v = (torch.randn(1, h, length, dim, generator=g).to(dtype) for h in (heads[0], heads[1], heads[1]))
    q, k = q + deep, k - deep
    if hidden is not None:
        for t in (q, k, v):
            t[:, :, hidden] = torch.nan
    if impl == "reference":
        q, k, v = q.double(), k.double(), v.double()
    if pattern is None:
        return vidkern.grid_attention(q, k, v, grid=frames, impl=impl, return_lse=True, **rules)
    return vidkern.frame_sparse_attention(q, k, v, pattern, impl=impl, return_lse=True, **rules)


def wrong(**problem) -> float:
    """Largest error of the output, in units of the largest value, and of the lse."""
    with accuracy.poisoned():
        out, lse = attend("hopper-executed", **problem)
    exact_out, exact_lse = attend("reference", **problem)
    # Rows that see nothing have an lse of -inf in both.
    lse_error = torch.where(lse == exact_lse, 0.0, (lse - exact_lse).abs()).nan_to_num(9).max().item()
    return max((out - exact_out).abs().nan_to_num(9).max().item() / exact_out.abs().max().item(), lse_error)


def test_rules_at_once(executed):
    """Negative scale, text, dead frames and short ones, windows, GQA, a head dim that fills no panel."""
    rules = {"n_text": 5, "causal_time": True, "scale": -0.3, "text_len": torch.tensor([3]),
             "valid": torch.tensor([[True, True, False], [True, True, True]]), "kv_len": torch.tensor([[37, 0, 37], [1, 30, 37]])}  # fmt: skip
    assert wrong(**rules) < 0.01
    assert wrong(scale=-0.3, dim=72) < 0.01
    assert wrong(frames=(4, 6), frame_len=1) < 0.01
    assert wrong(heads=(3, 1), dim=104) < 0.01
    # The dead frame holds NaN.
    assert wrong(**rules, hidden=slice(5 + 2 * 37, 5 + 3 * 37)) < 0.01


def nan_stays(frame_len=20) -> bool:
    """Whether a visible NaN is in all rows that see it and in no other, where one tile has rows of both kinds."""
    g = torch.Generator().manual_seed(0)
    pattern = vidkern.FramePattern.from_lists([[0], [1], [1, 2]])
    q, k, v = (torch.randn(1, 1, 3 * frame_len, 72, generator=g).bfloat16() for _ in range(3))
    v[:, :, frame_len] = torch.nan  # the row behind what the first frame's rows see
    out = vidkern.frame_sparse_attention(q, k, v, pattern, impl="hopper-executed")
    return bool(not out[:, :, :frame_len].isnan().any() and out[:, :, frame_len:].isnan().all())


def test_a_visible_nan_stays_with_those_who_see_it(executed):
    assert nan_stays()


def test_expanded_and_strided_inputs(executed):
    """Samples and heads that share memory, which no tensor map describes, and a fused projection, which one does."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 60, 16, generator=g).bfloat16()
    k, v = torch.randn(60, 2, 2, 16, generator=g).bfloat16().permute(2, 1, 0, 3)[:, :1].expand(2, 2, 60, 16).unbind(0)
    k, v = k.expand(2, 2, 60, 16), v.expand(2, 2, 60, 16)
    packed = torch.randn(2, 60, 3, 2, 16, generator=g).bfloat16().permute(2, 0, 3, 1, 4)
    for inputs in ((q, k, v), tuple(packed)):
        ours = vidkern.grid_attention(*inputs, grid=(1, 3), impl="hopper-executed")
        exact = vidkern.grid_attention(*(t.double() for t in inputs), grid=(1, 3), impl="reference")
        assert (ours - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("groups, heads", [(2, (1, 1)), (2, (2, 1)), (3, (1, 1)), (3, (3, 1))])
def test_products_are_those_of_the_plan(programs, monkeypatch, groups, heads):
    """The work done is the work counted, of each warpgroup: all main tiles, and the edge tiles that one of its rows sees."""
    counted = []
    width = FEW["WIDTHS"][groups][0]
    install(monkeypatch, programs, {"WIDTHS": FEW["WIDTHS"]}, counted)
    with hopper.forced("forward", hopper.Config(width, groups)):
        assert wrong(frames=(3, 2), frame_len=70, dim=64, heads=heads) < 0.01
    tiles = Tiling(64 * groups // heads[0], width, 48, True)
    tables = plan(Shape(vidkern.GridPattern(3, 2).key, 70, 0, False, False), tiles, torch.device("cpu"))
    expected = 0
    for first, end, _, main, at, edges in tables.tiles.tolist():
        for row in range(first, end, 64):
            seen = sum(r0 < row + 64 and r1 > row for _, _, r0, r1 in tables.edge[at : at + edges].tolist())
            expected += heads[0] * (main * (4 + width // 16) + seen * (4 + 3))
    [(name, counts)] = counted
    assert name == f"grid_attention_hopper_forward_64_bf16_{64 * groups}x{width}"
    assert counts["warpgroup_products"] == expected
    assert counts["boxes"] and counts["copies"]


# ---- the choice of tiles ------------------------------------------------------------------------------------------------
FORMS = [(g, w) for widths in (hopper.WIDTHS, hopper.LIVE_WIDTHS) for g, ws in widths.items() for w in ws]


def test_shared_memory():
    """Every kernel has two stages or more in what a block may have."""
    for dim, (groups, width) in itertools.product(SOURCES, FORMS):
        assert 2 <= hopper.stages(dim, groups, width) <= 4
        assert hopper.shared_bytes(dim, groups, width) <= 227 * 1024
    assert [hopper.padded(d) for d in (8, 64, 72, 96, 104, 128)] == [64, 64, 96, 96, 128, 128]
    assert hopper.shared_bytes(128, 2, 176) == 1024 + 128 * 256 + 4 * 176 * 256


@pytest.mark.parametrize("frame_len, width", [(144, 144), (576, 144), (96, 96), (160, 160), (352, 176), (64, 64)])
def test_width_follows_the_frame(frame_len, width):
    """The frame's length decides, where some width divides it, and no tile of a column frame is then cut."""
    shape = Shape(vidkern.GridPattern(4, 4).key, frame_len, 0, False, False)
    assert hopper.choose(shape, 128, 2) == (Tiling(64, width, 48, True), 2, 2)
    assert hopper.choose(shape, 128).tiles.block_m == 128


def test_three_warpgroups_where_they_fit():
    """192 rows where frames have them, of narrow heads; three heads of a group on the same 64."""
    shape = Shape(vidkern.GridPattern(4, 4).key, 576, 0, False, False)
    assert hopper.choose(shape, 64) == (Tiling(192, 96, 48, True), 3, 1)
    assert hopper.choose(shape, 96).groups == hopper.choose(shape, 64, live=True).groups == 2
    assert hopper.choose(shape, 64, 3).together == 3


def test_a_sweep_has_its_way():
    shape = Shape(vidkern.GridPattern(4, 4).key, 576, 0, False, False)
    for dim, config in [(d, c) for d in SOURCES for c in hopper.candidates(d)]:
        chosen = hopper.choose(shape, dim, forced=config)
        assert (chosen.tiles.block_n, chosen.groups) == (config.block_n, config.groups)
    for words in ({"dim": 128, "forced": hopper.Config(80, 3)}, {"dim": 64, "live": True, "forced": hopper.Config(80)}):
        with pytest.raises(ValueError, match="forced: Config.block_n=80, groups=.., which no kernel of head dim"):
            hopper.choose(shape, **words)


def test_nothing_else_is_cheaper():
    for frame_len, live, dim in itertools.product((7, 100, 150, 390, 585), (False, True), (64, 128)):
        shape = Shape(vidkern.GridPattern(3, 4).key, frame_len, 16, True, False)
        chosen = hopper.choose(shape, dim, 1, live).tiles
        widths = hopper.LIVE_WIDTHS if live else hopper.WIDTHS
        assert (chosen.block_m, chosen.block_n) in [(64 * g, w) for g, ws in widths.items() for w in ws]
        # By score elements alone, where one of an edge tile counts twice, at most what the other costs make of it.
        count = {n: (w := work(shape, Tiling(128, n, 48, True))).main + 2 * w.edge for n in widths[2]}
        ours = work(shape, chosen)
        assert ours.main + 2 * ours.edge <= 1.15 * min(count.values())


# ---- faults -------------------------------------------------------------------------------------------------------------
# Frame 0 sees all: rings that come round several times, in main and in edge tiles; one row of a warpgroup that sees a tile; a warpgroup
# without rows; what is hidden, whose zeros would weigh e^50 and more, beside logits far below.
STAR = vidkern.FramePattern.from_lists([list(range(9)), *([f] for f in range(1, 9))])
PAIR = vidkern.FramePattern.from_lists([[0, 3], [1], [2], [3]])
PROBLEMS = {
    "main": {"pattern": STAR, "frame_len": 80, "dim": 72, "heads": (2, 1), "scale": -0.1},
    "edges": {"pattern": STAR, "frame_len": 63, "dim": 72, "heads": (1, 1), "scale": 0.3},
    "first row": {"pattern": PAIR, "frame_len": 63, "dim": 72, "heads": (1, 1)},
    "last row": {"pattern": PAIR, "frame_len": 65, "dim": 72, "heads": (1, 1), "deep": 3.0},
    "idle": {"frames": (1, 1), "frame_len": 390, "dim": 72, "heads": (1, 1)},
    "live": {"frames": (1, 5), "frame_len": 64, "dim": 72, "heads": (1, 1), "deep": 3.0,
             "valid": torch.tensor([[True, False, True, True, True]]), "kv_len": torch.tensor([[64, 64, 30, 1, 64]])},
}  # fmt: skip
SOUND = 0.012  # what the sound kernels stay below in all of them
FAULTS = {
    "keys not waited for": ("      room.keys.wait_full(i);\n      finish(", "      finish("),
    "values not waited for": ("      room.values.wait_full(i - 1);\n", ""),
    "keys of an edge tile not waited for": ("    room.keys.wait_full(i);\n    products_begin();", "    products_begin();"),
    "values of an edge tile not waited for": ("    room.values.wait_full(i);\n", ""),
    "queries not waited for": ("  mbarrier_wait(room.queries, 0);\n", ""),
    # Those of a main tile may be: who fills the stage again has waited for the values of the tile before.
    "keys released before their products": ("    products_wait<0>();\n    room.keys.release(i);\n    hide", "    room.keys.release(i);\n    products_wait<0>();\n    hide"),
    "values released before their products": ("      products_wait<0>();\n      if (i >= 0) room.values.release(i);", "      if (i >= 0) room.values.release(i);\n      products_wait<0>();"),
    "not released": ("      products_wait<1>();\n      room.keys.release(i);", "      products_wait<1>();"),
    "passed by without waiting": ("    room.values.wait_full(i), room.values.release(i);\n", "    room.values.release(i);\n"),
    "full in the wrong phase": ("mbarrier_wait(full(i), u32(i / STAGES) & 1)", "mbarrier_wait(full(i), u32(i / STAGES + 1) & 1)"),
    "empty in the wrong phase": ("mbarrier_wait(empty(i), u32(i / STAGES + 1) & 1)", "mbarrier_wait(empty(i), u32(i / STAGES) & 1)"),
    "filled without asking": ("        room.values.wait_empty(n);\n", ""),
    "an edge tile filled without asking": ("    room.keys.wait_empty(i);\n", ""),
    "too few bytes expected": ("mbarrier_expect(room.keys.full(n), Room<DIM, WIDTH, GROUPS>::Column::BYTES)", "mbarrier_expect(room.keys.full(n), WIDTH)"),
    "no fence behind an edge tile": ("  copies_wait<LAG>();\n  async_fence();\n", "  copies_wait<LAG>();\n"),
    "an edge tile not waited for": ("if (i > begin) filled<2>(room.values", "if (i > begin) filled<3>(room.values"),
    "no barrier among producers": ("  async_fence();\n  named_barrier(PRODUCERS, GROUP);\n", "  async_fence();\n"),
    "producers do not wait for the first": ("    named_barrier(PRODUCERS, GROUP);\n  }\n", "  }\n"),
    "logits read early": ("      products_wait<1>();\n", "      products_wait<2>();\n"),
    "sums read early": ("      products_wait<0>();\n      if (i >= 0)", "      products_wait<1>();\n      if (i >= 0)"),
    "products of no group": ("      room.values.wait_full(i - 1);\n      products_begin();\n", "      room.values.wait_full(i - 1);\n", "      products_begin();\n      compare", "      compare"),
    "turns never passed": ("      if (turns) room.pass_turn(own);\n      products_wait<1>", "      products_wait<1>"),
    "values where keys are": ("ask(room.value(n), g.v_map", "ask(room.key(n), g.v_map"),
    "the values of the next stage": ("gather<T, WIDTH, DIM>(r.out, p, room.value(i - 1), true)", "gather<T, WIDTH, DIM>(r.out, p, room.value(i), true)"),
    "a column too many": ("votes(column < at.end", "votes(column <= at.end"),
    "the tail brought whole": ("first + row < end && c * hopper::CHUNK < dim", "first + row <= end && c * hopper::CHUNK < dim"),
    "a wrong panel stride": ("k * 16 * (PANEL * 2), PANEL_BYTES)", "k * 16 * (PANEL * 2), PANEL_BYTES / 2)"),
    "another swizzle for one writer": ("((c ^ row) & 7) * 16", "(c & 7) * 16"),
    "passed by with one row at the end": ("c.row_first >= first + SHARE ||", "c.row_first >= first + SHARE - 1 ||"),
    "passed by with one row at the beginning": ("c.row_end <= first)", "c.row_end <= first + 1)"),
    "a row too many": ("mine < c.row_end;", "mine <= c.row_end;"),
    "rows that see nothing take part": ("(sees[n / 2] ? part[d].v[n] : 0.0f)", "part[d].v[n]"),
    "sums not scaled": ("r.out[d].v[n] *= shrink[n / 2]", "r.out[d].v[n] *= 1.0f"),
    "sum of one lane": ("quad_sum(r.total[h])", "r.total[h]"),
    "half of a negative scale": ("w.w[n] ^= 0x80008000u", "w.w[n] ^= 0x8000u"),
    "no fence behind negated queries": ("    async_fence();\n    named_barrier(PRODUCERS + 1 + own, GROUP);", "    named_barrier(PRODUCERS + 1 + own, GROUP);"),
    "no barrier behind negated queries": ("    async_fence();\n    named_barrier(PRODUCERS + 1 + own, GROUP);", "    async_fence();"),
    "no barrier before the rows that leave": ("  named_barrier(PRODUCERS + 1 + own, GROUP);\n  T* out", "  T* out"),
    "no barrier among the rows that leave": ("  warp_barrier();\n  VK_NO_UNROLL\n", "  VK_NO_UNROLL\n"),
    "one head for all warpgroups": ("i32(at.head) * g.together + (shared_rows ? own : 0)", "i32(at.head) * g.together"),
    "dead keys seen": ("(!LIVE || (load(live + column) & 1))", "true"),
    "dead queries run": ("!(load(live + mine) & 2)", "false"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    """Programs with a fault each, of head dims up to 96."""
    jobs = [(96, *few(96, ("bf16",), kernel(fault)), *zip(edits[::2], edits[1::2])) for fault, edits in FAULTS.items()]
    return dict(zip(FAULTS, built(*jobs)))


def kernel(fault: str) -> dict:
    """The width of the one kernel by which a fault is told."""
    live = fault.startswith("dead")
    return {"WIDTHS": {2: () if live else (64,)}, "LIVE_WIDTHS": {2: (96,) if live else ()}}


def caught(fault: str) -> bool:
    """By a rule of the executor, by a wrong result, or by a NaN that spreads."""
    live = fault.startswith("dead")
    try:
        return any(wrong(**p) > 2 * SOUND for name, p in PROBLEMS.items() if live == (name == "live")) or not (live or nan_stays())
    except KernelError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault, monkeypatch):
    install(monkeypatch, {"grid_attention_hopper_forward_96_": faulty[fault]}, kernel(fault))
    assert caught(fault)


def test_what_faults_are_told_from(executed):
    assert max(wrong(**problem) for problem in PROBLEMS.values()) < SOUND


# ---- all kernels ---------------------------------------------------------------------------------------------------------
def names(dim: int) -> set[str]:
    """Kernels of a source."""
    forms = [f"{64 * g}x{w}" for g, ws in hopper.WIDTHS.items() for w in ws if g == 2 or dim == 64]
    forms += [f"{64 * g}x{w}_live" for g, ws in hopper.LIVE_WIDTHS.items() for w in ws]
    return {f"grid_attention_hopper_forward_{dim}_{t}_{form}" for t in ("bf16", "f16") for form in forms}


@pytest.mark.slow
@pytest.mark.parametrize("dim", SOURCES)
def test_other_widths(monkeypatch, dim):
    """Every width that the samples do not run, with main and edge tiles, and with as many stages as fit."""
    others = {g: tuple(w for w in ws if w not in FEW["WIDTHS"][g]) for g, ws in hopper.WIDTHS.items() if g == 2 or dim == 64}
    [program] = built((dim, *few(dim, ("bf16",), {"WIDTHS": others, "LIVE_WIDTHS": {2: ()}})))
    star = vidkern.FramePattern.from_lists([[0, 1, 2], [1], [2]])
    for groups, widths in others.items():
        for width in widths:
            install(monkeypatch, {f"grid_attention_hopper_forward_{dim}_": program}, {"WIDTHS": {groups: (width,)}})
            assert wrong(pattern=star, frame_len=width + 24, dim=dim, heads=(2, 1)) < SOUND, (groups, width)
            monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("dim", SOURCES)
def test_masked_rings_come_round(monkeypatch, dim):
    """The widest tiles that threads bring have the fewest stages: main tiles that use each of them again, and edge tiles behind."""
    width = hopper.LIVE_WIDTHS[2][-1]
    assert hopper.stages(dim, 2, width) >= 3
    [program] = built((dim, *few(dim, ("bf16",), {"WIDTHS": {2: ()}, "LIVE_WIDTHS": {2: (width,)}})))
    install(monkeypatch, {f"grid_attention_hopper_forward_{dim}_": program}, {"WIDTHS": {}, "LIVE_WIDTHS": {2: (width,)}})
    star = vidkern.FramePattern.from_lists([list(range(7)), *([f] for f in range(1, 7))])
    kv_len = torch.tensor([[width, width, 5, width + 9, width, 1, width]])
    assert wrong(pattern=star, frame_len=width + 9, dim=dim, heads=(2, 1), kv_len=kv_len) < SOUND


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("dim", [pytest.param(d, marks=pytest.mark.slow) for d in SOURCES])
def test_machine_code(dim):
    """Every kernel that the launcher names; nothing spilled, no product waits for another; products of warpgroups, boxes, copies, the
    registers passed on and 16-byte stores as meant."""
    kernels = machine_code(SOURCES[dim], "90a")
    assert set(kernels) == names(dim)
    for name, code in kernels.items():
        assert not code["spilled"] and not code["serialized"], (name, code)
        live, width = name.endswith("_live"), int(name.removesuffix("_live").rsplit("x", 1)[1])
        # S of the first main tile, S and P V within the loop and P V behind it, and the two of an edge tile.
        assert code["HGMMA"] == 2 * (dim + width) // 16 + (dim + hopper.NARROW) // 16, (name, code)
        assert code["UTMALDG"] and code["LDGSTS"] and code["USETMAXREG"] == 2 and code["STG.E.128"], (name, code)
        if live:
            assert code["UTMALDG"] == 2 * (1 + (dim > 64)), (name, code)  # the queries
