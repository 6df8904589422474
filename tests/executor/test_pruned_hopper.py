"""The products of the pruned layers for compute capability 9.0, executed: the accuracy rule on every sample, how operands come, tiles that
blocks stay for, clusters, and seeded faults that must be told."""

import contextlib
import ctypes
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern.ops.pruned import configs, cuda, hopper, hopper_grouped
from vidkern.verify import accuracy

from harness import CSRC, KernelError, Launch, Program, machine_code, nvcc
from test_pruned_cuda import SOUND, cases, group, linear_problem, picked, register, runs_of, wrong
from test_pruned_cuda import problems as problems_of_all

SOURCES = hopper.SOURCES | hopper_grouped.SOURCES
ROWS = {"pruned_rows": cuda.SOURCES["pruned_rows"]}
LARGE, MIDDLE, SMALL = hopper.TILES
IMPL = "hopper-executed"


def source(stem):
    return CSRC / "cuda" / f"{stem}.cu"


def built(*edits_of):
    """Programs by the prefixes of their kernels' names; ``edits_of``: (stem, edits) of those that are not as they stand."""
    edits = dict(edits_of)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(SOURCES | ROWS, pool.map(lambda stem: Program(source(stem), *edits.get(stem, ())), SOURCES | ROWS)))
    return {prefix: made[stem] for stem, prefixes in (SOURCES | ROWS).items() for prefix in prefixes}


@pytest.fixture(scope="module")
def programs():
    return built()


def install(monkeypatch, programs):
    """The backend of the three ops on the executor. Returns what was launched: (kernel, counts) in order."""
    launched = []
    register(monkeypatch, Launch(programs, launched), hopper, hopper_grouped, IMPL)
    return launched


@pytest.fixture
def launched(programs, monkeypatch):
    return install(monkeypatch, programs)


@contextlib.contextmanager
def on(monkeypatch, processors, tile=None):
    """A device of so many multiprocessors, and products in one tile."""
    with monkeypatch.context() as m, configs.forced(tile) if tile else contextlib.nullcontext():
        m.setattr(cuda, "processors", lambda device: processors)
        yield


# ---- the accuracy rule -------------------------------------------------------------------------------------------------------
QUICK = {"pruned_linear": ("every_part", "uneven"), "pruned_ffn": ("slabs_of_pairs",), "pruned_linear_grouped": ("three_widths",)}


@pytest.mark.parametrize("op, sample, dtype", list(cases(QUICK)))
def test_accuracy(launched, op, sample, dtype):
    with accuracy.poisoned():
        accuracy.check(op, sample, dtype, IMPL, seeds=range(accuracy.draws(op, sample, dtype)))
    assert any("hopper" in name for name, _ in launched)


# ---- problems ----------------------------------------------------------------------------------------------------------------
def problems():
    """And what threads bring for more stages than the ring has; pairs that come in boxes."""
    torch.manual_seed(1)
    return problems_of_all() | {
        "long runs": linear_problem((70,), 296, 72, width=600, in_index=runs_of(296, 600), pad=8),
        "pairs in boxes": linear_problem((133,), 72, 80, act="swiglu", pad=8),
    }  # fmt: skip


QUICK_PROBLEMS = ("deep", "pairs", "long runs", "pairs in boxes")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK_PROBLEMS else [pytest.mark.slow]) for n in problems()])
def test_problems(launched, monkeypatch, name):
    """Rows on 16 bytes and not, and NaN behind every row; one block for all tiles, so that stages come round."""
    for tile in (SMALL,) if name != "runs" else hopper.TILES:
        with on(monkeypatch, 1, tile):
            assert wrong(problems()[name], IMPL) < SOUND
    assert launched


EVERY = [
    pytest.param(tile, dtype, id=f"{tile.block_n}-{short}", marks=[] if (tile, short) == (LARGE, "bf16") else [pytest.mark.slow])
    for tile, (dtype, short) in itertools.product(hopper.TILES, cuda.NAMES.items())
]  # fmt: skip


@pytest.mark.parametrize("tile, dtype", EVERY)
def test_every_kernel_runs(launched, monkeypatch, tile, dtype):
    """Whether rows lie on 16 bytes or not (what only one tile reads is not made compact)."""
    torch.manual_seed(3)
    size = tile.block_n // 2 + 8
    with on(monkeypatch, 2, tile):
        for act, pad in itertools.product(("none", "swiglu"), (0, 3)):
            assert wrong(linear_problem((35,), size, size + 16, act=act, pad=pad), IMPL, dtype) < SOUND
        assert group(IMPL, dtype) < SOUND
        assert tile is not MIDDLE or wrong(linear_problem((140,), 72, 130, pad=6), IMPL, dtype) < SOUND
    forms = ["nt", "pairs", "nn", "tn", "grouped", *(["cluster"] if tile is MIDDLE else [])]
    ran = {name for name, _ in launched if "hopper" in name}
    assert ran == {f"pruned_hopper_{form}_{cuda.NAMES[dtype]}_{tile.block_n}" for form in forms}


def test_how_operands_come(launched, monkeypatch):
    """The work done is the work counted: whole boxes of what lies plain, 16-byte copies of what lists pick, and the tiles' products."""
    torch.manual_seed(0)
    w, tiles, stages = torch.randn(70, 200).bfloat16(), 2 * 2, 4
    wide = torch.randn(1, 130, 400).bfloat16()
    overlapping = torch.randn(129 * 8 + 200).bfloat16().as_strided((1, 130, 200), (0, 8, 1))
    cases = {
        "plain": (wide[..., :200], {}, 2, 0), "runs": (wide, {"in_index": runs_of(200, 400)}, 1, 128),
        "overlapping": (overlapping, {}, 1, 128),
        "rows": (wide[..., :200], {"rows": list(range(0, 70, 2)), "slab": 1}, 1, 64),
        "pairs": (wide[..., :200], {"act": "swiglu"}, 3, 0),
    }  # fmt: skip
    for case, (x, options, boxes, lines) in cases.items():
        launched.clear()
        with on(monkeypatch, 4, SMALL):
            got = vidkern.pruned_linear(x, w, impl=IMPL, **options)
        want = vidkern.pruned_linear(x.double(), w.double(), impl="reference", **options)
        assert (got - want).abs().max() < SOUND * want.abs().max(), case
        ((_, counts),) = launched
        ran = tiles // 2 if case == "rows" else tiles
        assert (counts["boxes"], counts["copies"]) == (ran * stages * boxes, ran * stages * lines * 8), case
        assert counts["warpgroup_products"] == ran * stages * 2 * 4, case
        assert counts["products"] == counts["matrix_loads"] == 0


def test_bits_do_not_depend_on_who_computes_a_tile(launched, monkeypatch):
    """Blocks that stay for one tile, two, or all; of an odd number of stages; and whatever the schedule."""
    torch.manual_seed(0)
    x, w, i = torch.randn(1, 150, 160).bfloat16(), torch.randn(130, 96).bfloat16(), runs_of(80, 160)
    results = {}
    for processors in (1, 2, 5, 6, 6):
        with on(monkeypatch, processors, SMALL):
            whole = vidkern.pruned_linear(x[..., :96], w, impl=IMPL)
            picked_ = vidkern.pruned_linear(x, w[:, :80], in_index=i, impl=IMPL)
        results.setdefault("whole", []).append(whole)
        results.setdefault("picked", []).append(picked_)
    for found in results.values():
        assert all(torch.equal(found[0], other) for other in found[1:])
    want = x[..., i.long()].double() @ w[:, :80].double().t()
    assert (results["picked"][0] - want).abs().max() < SOUND * want.abs().max()


def test_clusters_share_the_right_operand(launched, monkeypatch):
    """Three rows of tiles: one block computes below the last row and writes nothing. Each block brings half of every tile's right side."""
    torch.manual_seed(0)
    x, w, residual = torch.randn(1, 300, 840).bfloat16()[..., :413], torch.randn(140, 413).bfloat16(), torch.randn(1, 300, 140).bfloat16()
    w = torch.nn.functional.pad(w, (0, 3), value=torch.nan)[:, :413]
    want = x.double() @ w.double().t() + residual.double()
    found = []
    for processors in (4, 12):
        launched.clear()
        with on(monkeypatch, processors, MIDDLE):
            found.append(vidkern.pruned_linear(x, w, residual=residual, impl=IMPL))
        ((name, counts),) = launched
        assert name == "pruned_hopper_cluster_bf16_128" and counts["boxes"] == 2 * 2 * 2 * 7 * 2
        assert (found[-1] - want).abs().max() < SOUND * want.abs().max()
    assert torch.equal(*found)


def test_one_rounding_in_place_and_nothing_beside(launched, monkeypatch):
    """The residual is added in float32; it may be the result's own memory; what lies behind the rows and between the columns stays."""
    torch.manual_seed(0)
    x, w, o = torch.randn(140, 24).bfloat16(), torch.randn(75, 24).bfloat16(), picked(75, 91)
    exact = x.double() @ w.double().t()
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.randn(141, 97).to(dtype)
        before, stream = whole.clone(), whole[:140, :91]
        with on(monkeypatch, 3, SMALL):
            vidkern.pruned_linear(x, w, out_index=o, residual=stream, out=stream, impl=IMPL)
        want = before.clone()
        want[:140, o.long()] = (before[:140, o.long()].float() + exact.float()).to(dtype)
        same = torch.ones_like(whole, dtype=torch.bool)
        same[:140, o.long()] = False
        assert torch.equal(whole[same], before[same])
        assert dtype is torch.float32 or (whole == want).float().mean() > 0.99  # sums in another order may round the other way
        torch.testing.assert_close(whole, want, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-5)


def many_layers(count):
    g = torch.Generator().manual_seed(0)
    sizes = [(1 + 37 * i % 150, 8 + 11 * i % 90, 8 + 29 * (i % 9)) for i in range(count)]
    return [[torch.randn(*shape, generator=g).bfloat16() for shape in ((m, k), (n, k), (n,))] for m, n, k in sizes]


def grouped_error(made) -> float:
    with accuracy.poisoned():
        got = vidkern.pruned_linear_grouped(*map(list, zip(*made)), act="silu", impl=IMPL)
    worst = 0.0
    for y, (x, w, b) in zip(got, made, strict=True):
        want = torch.nn.functional.silu(x.double() @ w.double().t() + b.double())
        worst = max(worst, ((y.double() - want).abs().nan_to_num(99).max() / want.abs().max().clamp_min(1)).item())
    return worst


def test_more_layers_than_a_launch_holds(launched, monkeypatch):
    """Of every size, with biases: several launches, whose blocks stay for tiles of several layers; each layer's result in its own place."""
    with on(monkeypatch, 3, SMALL):
        assert grouped_error(many_layers(hopper_grouped.LAYERS + 2)) < 0.02
    assert len([name for name, _ in launched if name.startswith("pruned_hopper_grouped")]) == 2


# ---- what is chosen ----------------------------------------------------------------------------------------------------------
class Recorded:
    """A launch that runs nothing."""

    def __init__(self):
        self.names = []

    def tensor_map(self, t, sizes, strides, box):
        return Launch.tensor_map(t, sizes, strides, box)

    def __call__(self, name, parameters, blocks, threads, shared, reads, writes):
        self.names.append((name, blocks))


def test_tiles_fit_and_fill_the_gpu(monkeypatch):
    """The 227 KB of a block; and on 132 multiprocessors no layer of 1344 tokens waits for a wave that is nearly empty."""
    assert [hopper.shared(c) for c in hopper.TILES] == [230400] * 3 and 230400 <= 227 << 10
    assert ctypes.sizeof(hopper_grouped.Group) <= 4096 and ctypes.sizeof(hopper.Boxed) <= 4096
    monkeypatch.setattr(cuda, "processors", lambda device: 132)
    sizes = {(1344, 6144): LARGE, (1344, 2048): LARGE, (1344, 1280): MIDDLE, (1344, 256): SMALL, (77, 2560): SMALL}
    chosen = {size: hopper.tile_for(torch.device("cuda"), *size) for size in sizes}
    assert chosen == sizes


@pytest.mark.parametrize("rows, columns, expected", [
    (2560, 1280, ("pruned_hopper_cluster_bf16_128", 132)), (1344, 6144, ("pruned_hopper_nt_bf16_128", 132)),
    (128, 1280, ("pruned_hopper_nt_bf16_128", 10)), (256, 256, ("pruned_hopper_cluster_bf16_128", 4)),
])  # fmt: skip
def test_clusters_where_they_cost_no_wave(monkeypatch, rows, columns, expected):
    """11 rows of tiles in pairs are 12, which 66 clusters of 6144 columns need a fifth wave for."""
    launch = Recorded()
    kit, x, w = hopper.Kit(launch), torch.empty(rows, 64).bfloat16(), torch.empty(columns, 64).bfloat16()
    with on(monkeypatch, 132, MIDDLE):
        kit.product(kit.Source(x), kit.Source(w), torch.empty(rows, columns).bfloat16(), rows, columns, 64)
    assert launch.names == [expected]


def test_what_it_does_not_serve_is_refused(launched):
    x, w = torch.randn(1, 5, 8), torch.randn(3, 8)
    for op, args in ((vidkern.pruned_linear, (x, w)), (vidkern.pruned_linear_grouped, ([x], [w]))):
        with pytest.raises(vidkern.BackendUnavailable, match="dtype is torch.float32, it serves torch.float16 and torch.bfloat16"):
            op(*args, impl=IMPL)


# ---- faults ------------------------------------------------------------------------------------------------------------------
PRODUCT, BACKWARD, GROUPED = SOURCES
FULL, EMPTY = ("mbarrier_wait(full(i), u32(i / STAGES)", "mbarrier_wait(empty(i), u32(i / STAGES + 1)")
LAST = "    products_wait<0>();\n    F::release(use - 1);\n"
FILLED = "  async_fence();\n  warp_barrier();\n"
WHOLE = "BLOCKS * WORKERS * (hopper::GROUP / WARP));"
ACROSS = "p.b, job.column + n * hopper::PANEL, p.n,\n" + " " * 44 + "[&](i32 line) { return k0 + line "
# name -> (the source that is built with it, edits)
FAULTS = {
    "no wait for a stage": (PRODUCT, ("    F::ring().wait_full(use);\n", "")),
    "no wait for an empty stage": (PRODUCT, ("      ring.wait_empty(use);\n", "")),
    "the other parity of full": (PRODUCT, (FULL, FULL.replace("STAGES", "STAGES + 1"))),
    "the other parity of empty": (BACKWARD, (EMPTY, EMPTY.replace(" + 1", ""))),
    "released before the wait": (PRODUCT, (LAST, "".join(LAST.splitlines(True)[::-1]))),
    "half of the releases": (PRODUCT, (WHOLE, "(hopper::GROUP / WARP));")),
    "sums read before their products' end": (PRODUCT, (LAST, LAST.replace("<0>", "<1>"))),
    "products not begun": (PRODUCT, ("    products_begin();\n", "")),
    "no fence for what threads bring": (PRODUCT, (FILLED, "  warp_barrier();\n")),
    "no barrier of the warp that brings": (BACKWARD, (FILLED, "  async_fence();\n")),
    "a stage said to be there too early": (PRODUCT, ("copies_wait<AHEAD>", "copies_wait<AHEAD + 1>")),
    "the last stages said to be there too early": (PRODUCT, ("  copies_wait<0>();\n  for (i32 i = use", "  for (i32 i = use")),
    "too few bytes": (PRODUCT, ("(boxes_b ? F::B::BYTES : 0)", "0")),
    "no barrier before the sums are read": (PRODUCT, ("    warp_barrier();\n    VK_NO_UNROLL", "    VK_NO_UNROLL")),
    "no barrier before the next sums": (PRODUCT, ("    }\n    warp_barrier();\n  }\n}", "    }\n  }\n}")),
    "another swizzle of what threads bring": (PRODUCT, ("(row * CHUNKS + (c ^ (row & 7)))", "(row * CHUNKS + (c ^ (row & 3)))")),
    "the first rows for both": (PRODUCT, ("a.depth_along(worker * 64, k)", "a.depth_along(0, k)")),
    "the first rows for both, across": (BACKWARD, ("a.depth_across(k, worker)", "a.depth_across(k, 0)")),
    "the first panel twice": (BACKWARD, ("to.panel(n), job.a, job.row + n * hopper::PANEL", "to.panel(n), job.a, job.row")),
    "a line's tail too long": (PRODUCT, ("u32(at.count * 2)", "16")),
    "a line too many, across": (BACKWARD, (f"{ACROSS}<", f"{ACROSS}<=")),
    "a row too many": (PRODUCT, ("job.row + own >= p.m ||", "job.row + own > p.m ||")),
    "values for gates": (PRODUCT, ("line < F::WRITTEN ? column : column + p.half", "line < F::WRITTEN ? column + p.half : column")),
    "values of the next pairs": (PRODUCT, ("job.column + job.p.half, full", "job.column + job.p.half + 1, full")),
    "the first layer's start for all": (GROUPED, ("static_cast<T*>(given.out) + layer.start", "static_cast<T*>(given.out)")),
    "the first layer's weight for all": (GROUPED, ("given.weight[i], within", "given.weight[0], within")),
    "half of the right operand twice": (PRODUCT, ("i32(cluster_rank()) * (F::COLUMNS / F::BLOCKS)", "0")),
    "empty here is empty everywhere": (PRODUCT, ("make(fills, BLOCKS * ", "make(fills, ")),
    "released to the first block alone": (PRODUCT, ("lane_index() < u32(BLOCKS)", "lane_index() < 1")),
    "no barrier of the cluster at the beginning": (
        PRODUCT, ("  if constexpr (F::BLOCKS > 1) cluster_barrier();\n  else block_barrier();", "  block_barrier();"),
    ),
    "more registers than there are": (PRODUCT, ("WORKER_REGISTERS = 216", "WORKER_REGISTERS = 224")),
}  # fmt: skip
# Only what runs is compiled.
FEWER = ("".join(
    f"  VK_BOXED(form##_{name}, {name.split('_')[0]}, {name.split('_')[1]}, __VA_ARGS__)".ljust(52) + "\\\n"
    for name in ("f16_256", "f16_128", "f16_64", "bf16_256", "bf16_128")
), "")  # fmt: skip
TRIMMED = {
    PRODUCT: (FEWER, ("VK_BOXED_CLUSTER(pruned_hopper_cluster_f16_128, f16)\n", "")), BACKWARD: (FEWER,),
    GROUPED: [(f"VK_BOXED_GROUP(pruned_hopper_grouped_f16_{n}, f16, {n})\n", "") for n in (64, 128, 256)],
}  # fmt: skip


def in_clusters() -> float:
    """Largest error of two tiles after each other of each of two clusters, as :func:`wrong`."""
    torch.manual_seed(0)
    x, w = torch.randn(300, 456).bfloat16(), torch.randn(140, 456).bfloat16()
    with accuracy.poisoned():
        got = vidkern.pruned_linear(x, w, impl=IMPL)
    want = x.double() @ w.double().t()
    return ((got - want).abs().nan_to_num(99).max() / want.abs().max()).item()


def errors(monkeypatch, where):
    """Of what a source concerns: one block for all tiles, clusters, and layers of several sizes."""
    with on(monkeypatch, 1, SMALL):
        if where != GROUPED:
            yield from (wrong(problem, IMPL) for problem in problems().values())
        else:
            yield grouped_error(many_layers(6))
    with on(monkeypatch, 4, MIDDLE):
        yield in_clusters() if where == PRODUCT else 0.0


@pytest.fixture(scope="module")
def faulty():
    """Programs with a fault each; the other sources stay sound."""

    def build(fault):
        where, *edits = FAULTS[fault]
        return built((where, (*edits, *TRIMMED[where])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(build, FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault, monkeypatch):
    """By a rule of the executor or by a wrong result."""
    install(monkeypatch, faulty[fault])
    try:
        error = max(errors(monkeypatch, FAULTS[fault][0]))
    except KernelError as told:
        print(fault, "|", str(told)[:150])
        return
    print(fault, "|", error)
    assert error > 2 * SOUND


def test_a_map_too_wide_is_caught(launched, monkeypatch):
    """A value behind the rows, which is NaN, becomes part of the sums."""
    sound = hopper.box_map
    monkeypatch.setattr(hopper, "box_map", lambda launch, t, rows, values, side: sound(launch, t, rows, values + 1, side))
    with contextlib.suppress(KernelError):
        assert wrong(problems()["deep"], IMPL) > 2 * SOUND


def test_what_faults_are_told_from(launched, monkeypatch):
    assert max(error for where in SOURCES for error in errors(monkeypatch, where)) < SOUND


# ---- machine code ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("stem", [pytest.param(stem, marks=[] if stem == GROUPED else [pytest.mark.slow]) for stem in SOURCES])
def test_machine_code(stem):
    """Nothing spilled, no product that waits for another; a stage's products twice, boxes as many as a stage has, registers that change
    hands, and 16-byte copies where threads may have to bring an operand."""
    kernels = machine_code(source(stem), "90a")
    assert len(kernels) == {PRODUCT: 14, BACKWARD: 12, GROUPED: 6}[stem]
    for name, code in kernels.items():
        form, _, width = name.removeprefix("pruned_hopper_").split("_")
        assert not code["spilled"] and not code["serialized"], (name, code)
        assert code["HGMMA"] == 2 * 4 and "HMMA" not in code and code["USETMAXREG"] == 2, (name, code)
        across = int(width) // 64
        boxes = {"pairs": 3, "nn": 1 + across, "tn": 2 + across}.get(form, 2)
        assert code["UTMALDG"] == boxes and code.get("UTMALDG.MULTICAST", 0) == (form == "cluster"), (name, code)
        assert bool(code.get("LDGSTS")) == (form not in ("cluster", "grouped")), (name, code)
        assert code["LDG.E.128"] and code["STG.E.128"] >= 2, (name, code)
