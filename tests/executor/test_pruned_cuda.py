"""The CUDA kernels of the pruned layers, executed: the accuracy rule on every sample, what must not be touched, and seeded faults that must
be told."""

import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import pruned_ffn, pruned_linear, pruned_linear_grouped
from vidkern.ops.pruned import configs, cuda, cuda_grouped
from vidkern.ops.pruned.compose import flat
from vidkern.ops.pruned_ffn import tiles
from vidkern.ops.pruned_linear import cost
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Program, machine_code, nvcc

SOURCES = cuda.SOURCES | cuda_grouped.SOURCES
OPS = {"pruned_linear": pruned_linear, "pruned_ffn": pruned_ffn, "pruned_linear_grouped": pruned_linear_grouped}
LARGE, SMALL = cuda.TILES
seeds = itertools.count()


def source(stem):
    return CSRC / "cuda" / f"{stem}.cu"


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(lambda stem: Program(source(stem)), SOURCES)))


def install(monkeypatch, programs):
    """The CUDA backend of the three ops on the executor, every launch under another schedule. Returns what was launched: (kernel, blocks,
    counts) in order."""
    launched = []

    def launch(name, given, blocks, threads, shared, reads, writes):
        program = next(programs[stem] for stem, prefixes in SOURCES.items() if name.startswith(prefixes))
        counts = program.run(name, given, blocks=blocks, threads=threads, shared=shared, reads=reads, writes=writes, seed=next(seeds))
        launched.append((name, blocks, counts))

    register(monkeypatch, launch, cuda, cuda_grouped, "cuda-executed")
    return launched


def register(monkeypatch, launch, kits, layers, impl):
    """A backend of the three ops: :class:`Kit` of the one module and the layers of the other around ``launch``."""

    def grouped(outputs, x, weight, bias, sizes, act, wants, impl):
        u = outputs[1] if outputs[1].numel() else None
        layers.forward([flat(t) for t in x], [flat(t) for t in weight], bias, act, outputs[0], u, launch=launch)

    kit = impl.replace("-", "_")  # imported by name, as the others are
    monkeypatch.setitem(sys.modules, f"vidkern.ops.pruned.{kit}", kits.Kit(launch))
    runs = {
        "pruned_linear": pruned_linear._with(kit), "pruned_ffn": pruned_ffn._with(kit),
        "pruned_linear_grouped": (grouped, pruned_linear_grouped._backward_with(kit)),
    }  # fmt: skip
    why_not = {
        "pruned_linear": lambda x, *rest: kits.why_not(x, rest[4]), "pruned_ffn": lambda x, *rest: kits.why_not(x, rest[6]),
        "pruned_linear_grouped": lambda x, *rest: kits.why_not(x[0]),
    }  # fmt: skip
    for name, room in OPS.items():
        backend = registry.Backend(impl, why_not[name], *runs[name])
        monkeypatch.setattr(room.OP, "backends", (*room.OP.backends, backend))
        monkeypatch.setattr(room.OP, "_by_name", {b.name: b for b in room.OP.backends})


@pytest.fixture
def launched(programs, monkeypatch):
    return install(monkeypatch, programs)


# ---- the accuracy rule -------------------------------------------------------------------------------------------------------
QUICK = {
    "pruned_linear": ("gather_scatter", "runs_into_zeros", "every_part", "uneven"), "pruned_ffn": ("short_last_tile", "slabs_of_pairs"),
    "pruned_linear_grouped": ("three_widths",),
}  # fmt: skip


def cases(quick_ones):
    """The quick ones in one dtype, in the other one and all others, in one, in the slow run."""
    for op in OPS:
        for i, sample in enumerate(rooms.room(op).samples):
            dtypes, quick = [torch.bfloat16, torch.float16][:: -1 if i % 2 else 1], sample.name in quick_ones[op]
            for n, dtype in enumerate(dtypes if quick else dtypes[:1]):
                marks = [pytest.mark.slow] * (n > 0 or not quick)
                yield pytest.param(op, sample, dtype, id=f"{op}-{sample.name}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("op, sample, dtype", list(cases(QUICK)))
def test_accuracy(launched, op, sample, dtype):
    with accuracy.poisoned():
        accuracy.check(op, sample, dtype, "cuda-executed", seeds=range(accuracy.draws(op, sample, dtype)))
    assert launched


# ---- problems ----------------------------------------------------------------------------------------------------------------
def cut(*shape, scale=1.0, pad=0):
    """Normal values cut out of memory that holds NaN behind each of its rows."""
    whole = torch.full((*shape[:-1], shape[-1] + pad), torch.nan, dtype=torch.float64)
    whole[..., : shape[-1]] = torch.randn(shape, dtype=torch.float64) * scale
    return whole, shape[-1]


def answers(function, tensors, options, impl, dtype):
    """The result and every gradient: in ``dtype`` on a backend, in float64 on the reference."""
    leaves = {}
    for name, (whole, width) in tensors.items():
        t = whole.to(dtype)
        leaves[name] = (t if impl != "reference" else t.double())[..., :width].requires_grad_()
    out = function(**leaves, **options, impl=impl)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)
    return out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), list(leaves.values()))


def linear_problem(shape, k, n, *, width=None, gate=0, mask=0, residual=None, modulate=0, lead=1, pad=3, bias=True, **options):
    """Arguments of pruned_linear. ``pad``: values of NaN behind the rows of x and the weight."""
    written = n // 2 if options.get("act") == "swiglu" else n
    slab = options.get("slab", 1)
    rows = n if "rows" not in options else (max(options["rows"]) + 2) * slab
    columns = k if "columns" not in options else (max(options["columns"]) + 2) * slab
    found = {"x": cut(*shape, width or k, pad=pad), "weight": cut(rows, columns, scale=k**-0.5, pad=pad)}
    if bias:
        found["bias"] = cut(rows)
    if gate:
        found["gate"] = cut(gate, written)
    if mask:
        found["mask"] = cut(mask)
    if residual:
        found["residual"] = cut(*shape, residual, pad=pad)
    if modulate:
        found |= {name: cut(modulate, width or k, scale=0.5) for name in ("scale", "shift")}
    return vidkern.pruned_linear, found, options


def picked(n, size, seed=0):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].sort().values.int()


def runs_of(n, size, run=8, shift=0):
    """n channels in runs, every other run of ``size``."""
    first = torch.arange(0, size - run + 1, 2 * run)[: n // run] + shift
    return (first[:, None] + torch.arange(run)).flatten().int()


def problems():
    """Small, and between them every part: four stages of depth; every tile with a ragged edge; gathers of runs and of single channels;
    slabs whose runs do not lie on 16 bytes; pairs; scatter; norms over more than what is kept."""
    torch.manual_seed(0)
    slabs = {"rows": [0, 2, 3], "columns": [0, 2, 3, 5, 6, 8, 9, 11, 12], "slab": 4}
    norm = {"norm": "rms", "in_index": picked(44, 75)}
    return {
        "deep": linear_problem((70,), 300, 72, act="gelu_tanh", gate=2, residual=72, pad=4),
        "runs": linear_problem((2, 35), 40, 70, width=96, in_index=runs_of(40, 96), out_index=picked(70, 91), residual=91, pad=8),
        "pairs": linear_problem((3, 23), 44, 78, width=75, act="swiglu", gate=3, mask=13, modulate=3, **norm),
        "slabs": linear_problem((21,), 36, 12, act="silu", **slabs),
        "wide run": linear_problem((11,), 24, 24, width=48, in_index=runs_of(24, 48), out_index=runs_of(24, 80, shift=16), out_features=80),
    }


SOUND = 0.012  # of the largest value: what sound kernels stay below in bfloat16


def wrong(problem, impl="cuda-executed", dtype=torch.bfloat16) -> float:
    """Largest error of the result and the gradients, in units of each one's largest value."""
    with accuracy.poisoned():
        ours = answers(*problem, impl, dtype)
    worst = 0.0
    for a, b in zip(ours, answers(*problem, "reference", dtype), strict=True):
        worst = max(worst, ((a.double() - b).abs().nan_to_num(9).max() / b.abs().max()).item())
    return worst


@pytest.mark.parametrize("name", list(problems()))
def test_problems(launched, name):
    """Rows on 16 bytes and not, and NaN behind every row: what pads a row is never part of a sum."""
    assert wrong(problems()[name]) < SOUND
    assert launched


@pytest.mark.parametrize("config", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "f16"])
def test_every_kernel_runs(launched, config, dtype):
    """Both tiles, whether rows lie on 16 bytes or not (what only one tile reads is not made compact)."""
    torch.manual_seed(3)
    size = config.block_n // 2 + 8
    with configs.forced(config):
        for act in ("none", "swiglu"):
            for pad in (0, 3):
                assert wrong(linear_problem((35,), size, size + 16, act=act, pad=pad), dtype=dtype) < SOUND
        assert group("cuda-executed", dtype) < SOUND
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    forms = [f"product_{form}" for form in ("nt", "pairs", "nn", "tn")] + ["grouped"]
    ran = {name for name, *_ in launched if name.endswith(str(config.block_m))}
    assert ran == {f"pruned_{form}_{short}_{config.block_m}" for form in forms}


def test_the_ffn_in_tiles(launched):
    """More tiles than one, the last one short, with every part; and no more than a tile of hidden channels lives."""
    torch.manual_seed(0)
    found = {"x": cut(2, 35, 40), "w1": cut(90, 40, scale=0.2), "b1": cut(90), "w2": cut(40, 90, scale=0.1), "b2": cut(40)}
    found |= {"gate": cut(2, 40), "mask": cut(9), "residual": cut(2, 35, 40), "scale": cut(2, 40, scale=0.5), "shift": cut(1, 40)}
    assert wrong((vidkern.pruned_ffn, found, {"tile": 32, "norm": "rms", "act": "silu"})) < SOUND
    products = [name for name, *_ in launched if "product_nt" in name]
    assert len(products) == 2 * 3 + 2 * 3  # the backward computes tiles again, and with them what the gate was of

    made = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.name():
                made.append(tuple(out.shape))
            return out

    x, w1, w2, out = (torch.randn(*s).bfloat16() for s in ((64, 24), (96, 24), (24, 96), (64, 24)))
    with Allocations():
        kit = sys.modules["vidkern.ops.pruned.cuda_executed"]
        tiles.forward(kit, (out,), x, w1, None, w2, None, *(None,) * 6, 1, 40, "gelu_tanh", False, 1e-6, 0, "cuda")
    assert sorted(made) == [(64, 24), (64, 40)]  # the sums, and a tile


def test_lists_of_runs_are_gathered_by_the_product(launched):
    """Aligned runs of eight and more take no pass of their own, single channels one."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 20, 96).bfloat16(), torch.randn(24, 40).bfloat16()
    for channels, passes in ((runs_of(40, 96), 0), (picked(40, 96), 1)):
        launched.clear()
        got = vidkern.pruned_linear(x, w, in_index=channels, impl="cuda-executed")
        want = x.double()[..., channels.long()] @ w.double().t()
        assert (got - want).abs().max() < SOUND * want.abs().max()
        assert [name for name, *_ in launched if "gather" in name] == ["pruned_gather_bf16"] * passes


def test_products_and_copies_are_those_of_the_tiles(launched):
    """The work done is the work counted: 16-byte copies of every stage of every tile, and their products."""
    x, w = torch.randn(1, 130, 200).bfloat16(), torch.randn(70, 200).bfloat16()
    for c, blocks in ((SMALL, 3 * 2), (LARGE, 2 * 1)):
        launched.clear()
        with configs.forced(c):
            vidkern.pruned_linear(x, w, impl="cuda-executed")
        ((name, ran, counts),) = launched
        stages = 4
        assert ran == blocks and counts["products"] == blocks * stages * c.block_m * c.block_n * 64 // (16 * 8 * 16)
        assert counts["copies"] == blocks * stages * (c.block_m + c.block_n) * 8
        assert counts["barriers"] == blocks * (stages + 2)


def test_one_rounding_in_place_and_nothing_beside(launched):
    """The residual is added in float32; it may be the result's own memory; what lies behind the rows and between the columns stays."""
    torch.manual_seed(0)
    x, w, o = torch.randn(40, 24).bfloat16(), torch.randn(11, 24).bfloat16(), picked(11, 32)
    exact = x.double() @ w.double().t()
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.randn(41, 37).to(dtype)
        before = whole.clone()
        stream = whole[:40, :32]
        got = vidkern.pruned_linear(x, w, out_index=o, residual=stream, out=stream, impl="cuda-executed")
        assert got.data_ptr() == stream.data_ptr()
        want = before.clone()
        want[:40, o.long()] = (before[:40, o.long()].float() + exact.float()).to(dtype)
        same = torch.ones_like(whole, dtype=torch.bool)
        same[:40, o.long()] = False
        assert torch.equal(whole[same], before[same])
        if dtype is torch.bfloat16:
            assert (whole == want).float().mean() > 0.99  # sums in another order may round the other way
        torch.testing.assert_close(whole, want, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-5)


def test_without_a_norm_hidden_channels_may_hold_anything(launched):
    x, w, i = torch.randn(1, 9, 64).bfloat16(), torch.randn(24, 16).bfloat16(), runs_of(16, 64)
    other = torch.ones(64, dtype=torch.bool).index_fill_(0, i.long(), False)
    x[..., other] = torch.nan
    assert vidkern.pruned_linear(x, w, in_index=i, impl="cuda-executed").isfinite().all()
    assert vidkern.pruned_linear(x, w[:, 1:], in_index=i[1:].clone(), impl="cuda-executed").isfinite().all()


@pytest.mark.parametrize("wanted", ["x", "weight", "scale"])
def test_one_gradient_alone(launched, wanted):
    """What the others leave behind is not relied on: with a frozen weight nothing gathers x in the backward, but the norm needs its rms."""
    sample = cost.Sample("alone", (2, 5), 24, 16, width=40, act="silu", gate=2, residual=True, norm=True, modulate=2)
    named = sample.tensors(torch.bfloat16)
    grads = []
    for impl in ("cuda-executed", "reference"):
        leaf = named[wanted].clone().requires_grad_()
        with accuracy.poisoned():
            grads += torch.autograd.grad(sample.call(named | {wanted: leaf}, impl=impl).float().square().sum(), leaf)
    ours, want = (g.double() for g in grads)
    assert (ours - want).abs().max() < SOUND * want.abs().max()


def test_same_bits_whatever_the_schedule(launched):
    for op, sample in (("pruned_linear", "every_part"), ("pruned_ffn", "short_last_tile")):
        room = rooms.room(op)
        sample = next(s for s in room.samples if s.name == sample)
        results = []
        for _ in range(2):
            leaves = [t.requires_grad_() for t in room.inputs(sample, torch.bfloat16, 0)]
            (out,) = room.call(sample, leaves, impl="cuda-executed")
            results.append((out, *torch.autograd.grad(out.float().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_it_does_not_serve_is_refused(launched):
    x, w = torch.randn(1, 5, 8), torch.randn(3, 8)
    for op, args in ((vidkern.pruned_linear, (x, w)), (vidkern.pruned_linear_grouped, ([x], [w]))):
        with pytest.raises(vidkern.BackendUnavailable, match="dtype is torch.float32, it serves torch.float16 and torch.bfloat16"):
            op(*args, impl="cuda-executed")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(vidkern.BackendUnavailable, match="residual is torch.float16, it serves"):
        vidkern.pruned_linear(x, w, residual=torch.zeros(1, 5, 3).half(), impl="cuda-executed")


def test_tiles_fit_and_fill_the_gpu(monkeypatch):
    """Within the 99 KB that a block may have on every GPU; 1344 x 256 results are 22 large tiles for 132 processors, but 84 small ones."""
    assert all(cuda.shared(c) <= 99 * 1024 for c in cuda.TILES)
    monkeypatch.setattr(cuda, "processors", lambda device: 132)
    assert [cuda.tile_for(torch.device("cuda"), 1344, n) for n in (256, 2048)] == [SMALL, LARGE]


# ---- faults ------------------------------------------------------------------------------------------------------------------
PRODUCT, BACKWARD, ROWS, GROUPED = SOURCES
LOOP = "    block_barrier();\n    if (i + STAGES - 1 < count) ask(i + STAGES - 1);\n"
# name -> (the source that is built with it, edits)
FAULTS = {
    "no wait": (PRODUCT, ("    copies_wait<STAGES - 2>();\n", "")),
    "a wait for a stage too few": (PRODUCT, ("copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>")),
    "no barrier": (PRODUCT, (LOOP, LOOP.replace("    block_barrier();\n", ""))),
    "the next stage asked for before the barrier": (PRODUCT, (LOOP, "".join(LOOP.splitlines(True)[::-1]))),
    "two places for three stages": (PRODUCT, ("A{shared_at<u8>(u32(i % STAGES * BYTES))}", "A{shared_at<u8>(u32(i % 2 * BYTES))}")),
    "no barrier before the sums": (PRODUCT, ("  block_barrier();  // the sums", "  // the sums")),
    "no barrier among the sums": (PRODUCT, ("  block_barrier();\n  VK_NO_UNROLL\n", "  VK_NO_UNROLL\n")),
    "a row's tail too long": (PRODUCT, ("u32(least(end - column, CHUNK) * 2)", "16")),
    "a listed row's tail too long": (PRODUCT, ("u32(at.count * 2)", "16")),
    "a line too many": (BACKWARD, ("k0 + line < p.k ? k0", "k0 + line <= p.k ? k0")),
    "a row too many": (PRODUCT, ("row0 + row >= p.m ||", "row0 + row > p.m ||")),
    "fragment rows swapped": (PRODUCT, ("(m & 1) * 8 + l % 8, 2 * k + (m >> 1)", "(m >> 1) * 8 + l % 8, 2 * k + (m & 1)")),
    "fragment rows swapped, across": (BACKWARD, ("(m >> 1) * 8 + l % 8, c + (m & 1)", "(m & 1) * 8 + l % 8, c + (m >> 1)")),
    "another swizzle for one reader": (
        PRODUCT, ("tile.template right<T>(b, row, k)", "(Tile<WIDTH>{tile.base + 16}).template right<T>(b, row, k)"),
    ),
    "another swizzle for the sums": (BACKWARD, ("(WIDTH / 4) + (c ^ (row & 7))", "(WIDTH / 4) + (c ^ (lane_index() & 7))")),
    "gates and values swapped": (PRODUCT, ("PAIRS && line & 8", "PAIRS && !(line & 8)")),
    "the first gate for all": (PRODUCT, ("i64(row / p.gate_group)", "i64(0)")),
    "the residual where the sums lie": (
        PRODUCT, ("row * p.residual_step, at)", "row * p.residual_step, Place(nullptr, column, p.n))"),
    ),
    "a list where the rows are": (BACKWARD, ("p.out_rows == nullptr ? row", "p.out_rows != nullptr ? row")),
    "runs taken for aligned": (PRODUCT, ("if (at.run && on_16_bytes(row + at.first)) copy16", "if (at.run) copy16")),
    "any eight taken for a run": (PRODUCT, ("- first == CHUNK - 1", "- first >= CHUNK - 1")),
    "the first rows of slabs": (PRODUCT, ("i64(o.rows == nullptr ? n : load(o.rows + n))", "i64(n)")),
    "the norm over the kept channels": (ROWS, (
        "for (i32 c = first; c < g.width; c += step) {\n      const Eight v = take(x, Place(nullptr, c, g.width));",
        "for (i32 c = first; c < g.k; c += step) {\n      const Eight v = take(x, Place(g.cols, c, g.k));",
    ), ("warp_sum(total) / float(g.width)", "warp_sum(total) / float(g.k)")),
    "the sum of a lane": (ROWS, ("warp_sum(total)", "total")),
    "no gradient through the norm": (ROWS, ("mean = warp_sum(mean) * stat * stat / float(g.width)", "mean = 0")),
    "a row of the next group": (ROWS, ("(group + 1) * rows_of_group", "(group + 1) * rows_of_group + 1")),
    "no barrier before the sums over rows": (ROWS, ("put_sums(2, gates);\n  block_barrier();", "put_sums(2, gates);")),
    "half of the rows summed": (ROWS, ("r < ROWS; ++r", "r < ROWS / 2; ++r")),
    "the gate before its own gradient": (ROWS, ("(g.pairs ? z * b.v[i] : z);", "(g.pairs ? z * b.v[i] : z) * gate.v[i];")),
    "the first layer's start for all": (GROUPED, ("static_cast<T*>(g.out) + layer.start", "static_cast<T*>(g.out)")),
}  # fmt: skip
# Only what the problems launch is compiled.
FEWER = (
    "  VK_PRUNED(form##_f16_128, f16, Large, __VA_ARGS__)   \\\n"
    "  VK_PRUNED(form##_f16_64, f16, Small, __VA_ARGS__)    \\\n"
    "  VK_PRUNED(form##_bf16_128, bf16, Large, __VA_ARGS__) \\\n", "",
)  # fmt: skip


def group(impl, dtype=torch.bfloat16):
    """Largest error of the grouped op, as :func:`wrong`."""
    torch.manual_seed(0)
    xs, ws = [torch.randn(m, 40).to(dtype) for m in (67, 5)], [torch.randn(n, 40).to(dtype) for n in (70, 9)]
    with accuracy.poisoned():
        got = vidkern.pruned_linear_grouped(xs, ws, impl=impl)
    want = [x.double() @ w.double().t() for x, w in zip(xs, ws)]
    return max(((a.double() - b).abs().nan_to_num(99).max() / b.abs().max()).item() for a, b in zip(got, want))


def test_more_layers_than_a_launch_holds(launched):
    """Of every size, with biases: several launches, each layer's result in its own place."""
    g = torch.Generator().manual_seed(0)
    sizes = [(1 + 7 * i % 70, 8 + 11 * i % 90, 8 + 8 * (i % 9)) for i in range(cuda_grouped.LAYERS + 3)]
    made = [[torch.randn(*shape, generator=g).bfloat16() for shape in ((m, k), (n, k), (n,))] for m, n, k in sizes]
    launched.clear()
    with accuracy.poisoned():
        got = vidkern.pruned_linear_grouped(*map(list, zip(*made)), act="silu", impl="cuda-executed")
    assert len([name for name, *_ in launched if name.startswith("pruned_grouped")]) == 2
    for y, (x, w, b) in zip(got, made, strict=True):
        want = torch.nn.functional.silu(x.double() @ w.double().t() + b.double())
        assert (y.double() - want).abs().max() < 0.02 * want.abs().max().clamp_min(1)


def worst_of_all():
    with configs.forced(SMALL):
        return max(group("cuda-executed"), *(wrong(problem) for problem in problems().values()))


@pytest.fixture(scope="module")
def faulty(programs):
    """Programs with a fault each; those that an edit does not concern stay sound."""

    def build(fault):
        where, *edits = FAULTS[fault]
        return programs | {where: Program(source(where), *edits, *((FEWER,) if where in (PRODUCT, BACKWARD) else ()))}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(build, FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault, monkeypatch):
    """By a rule of the executor or by a wrong result."""
    install(monkeypatch, faulty[fault])
    try:
        error = worst_of_all()
    except KernelError:
        return
    assert error > 2 * SOUND


def test_what_faults_are_told_from(launched):
    assert worst_of_all() < SOUND


# ---- machine code ------------------------------------------------------------------------------------------------------------
def architectures():
    """One by default, of the sources that the others are made of."""
    for stem in SOURCES:
        for architecture in ("90", "80", "89", "100", "120"):
            quick = architecture == "90" and stem in (PRODUCT, ROWS)
            yield pytest.param(stem, architecture, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("stem, architecture", list(architectures()))
def test_machine_code(stem, architecture):
    """Nothing spilled; products, matrix loads, asynchronous copies and 16-byte loads and stores as meant."""
    kernels = machine_code(source(stem), architecture)
    assert len(kernels) == {"pruned_grouped": 4}.get(stem, 8)
    for name, code in kernels.items():
        assert not code["spilled"], (name, code)
        if stem == "pruned_rows":
            assert code["LDG.E.128"] >= 2 and ("modulation" in name or code["STG.E.128"]), (name, code)
            continue
        assert code["LDGSTS"] and code["LDG.E.128"] and code["STG.E.128"] >= 2, (name, code)
        # A stage's products, all unrolled: of a warp's 16 x 8 tiles, and one ldmatrix for each 16 rows, or columns, of its operands.
        rows = 64 if "128" in name else 32
        assert code["HMMA"] == rows // 16 * 32 // 8 * 64 // 16, (name, code)
        assert code["LDSM"] == (rows + 32) // 16 * 64 // 16, (name, code)
