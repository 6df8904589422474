"""The CUDA kernels of the pyramid ops, executed: the accuracy rule on every sample, bits and ulps of the reference, many tiles, unaligned and
mixed memory, and seeded faults that must be told."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops.pyramid import cuda, levels, philox
from vidkern.ops.pyramid.cost import Pyramid
from vidkern.ops.pyramid_decompose import cost as decompose_cost
from vidkern.ops.pyramid_flow_inputs import cost as inputs_cost
from vidkern.ops.pyramid_flow_loss import cost as loss_cost
from vidkern.ops.pyramid_flow_step import cost as step_cost
from vidkern.ops.pyramid_merge import cost as merge_cost
from vidkern.ops.pyramid_stage_inputs import cost as stage_cost
from vidkern.ops.pyramid_stage_transition import cost as transition_cost
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Program, machine_code, nvcc

OPS = {
    f"pyramid_{name}": name
    for name in ("decompose", "merge", "flow_inputs", "flow_loss", "flow_step", "stage_inputs", "stage_transition")
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXECUTED = "cuda-executed"
seeds = itertools.count()


def source(stem):
    return CSRC / "cuda" / f"{stem}.cu"


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cuda.SOURCES, pool.map(lambda stem: Program(source(stem)), cuda.SOURCES)))


def within(t, others) -> bool:
    """Whether a tensor begins in the memory of one of others: what a kernel may write, it may read."""
    return any(o.data_ptr() <= t.data_ptr() < o.data_ptr() + o.numel() * o.element_size() for o in others)


def install(monkeypatch, programs):
    """The launchers of the CUDA backend, on the executor, every launch under another schedule; the kernels' names as they are launched."""
    launched = []

    def launch(name, given, blocks, threads, shared, reads, writes):
        (stem,) = [s for s, prefixes in cuda.SOURCES.items() if name.startswith(prefixes)]
        launched.append(name)
        reads = [t for t in reads if not within(t, writes)]
        programs[stem].run(name, given, blocks=blocks, threads=threads, shared=shared, reads=reads, writes=writes, seed=next(seeds))

    def calls(name):
        return lambda outputs, *args: getattr(cuda, name)(outputs, *args, launch=launch)

    for op, name in OPS.items():
        op = registry.ops()[op]
        backend = registry.Backend(EXECUTED, cuda.why_not, calls(name), calls(f"{name}_backward"))
        monkeypatch.setattr(op, "backends", (*op.backends, backend))
        monkeypatch.setattr(op, "_by_name", {b.name: b for b in op.backends})
    return launched


@pytest.fixture
def executed(programs, monkeypatch):
    return install(monkeypatch, programs)


def cases():
    """Every sample, with one dtype in the quick run and the others in the slow one."""
    for op in OPS:
        for i, sample in enumerate(rooms.room(op).samples):
            for k in range(len(DTYPES)):
                dtype = DTYPES[(i + k) % len(DTYPES)]
                yield pytest.param(
                    op, sample, dtype, id=f"{op}-{sample.name}-{str(dtype)[6:]}", marks=[pytest.mark.slow] if k else []
                )


@pytest.mark.parametrize("op, sample, dtype", list(cases()))
def test_accuracy(executed, op, sample, dtype):
    with accuracy.poisoned():
        accuracy.check(op, sample, dtype, EXECUTED, seeds=range(accuracy.draws(op, sample, dtype)))


def ulps(got, want):
    """Worst error in units in the last place of max(|value|, 1)."""
    unit = torch.exp2(torch.floor(torch.log2(want.double().abs().clamp_min(1))) - 23)
    return ((got.double() - want.double()).abs() / unit).max().item()


def flat(result):
    return torch.cat([p.flatten() for p in (result if isinstance(result, (list, tuple)) else [result])])


@pytest.mark.parametrize("sample", [s for s in inputs_cost.SAMPLES if s.pyramid.kind != "dct"], ids=lambda s: s.name)
def test_within_four_ulp(executed, sample):
    """z and v against the reference with the same seed."""
    x = sample.tensors()
    with torch.no_grad():
        got, want = sample.call(*x, impl=EXECUTED), sample.call(*x, impl="reference")
    assert all(ulps(flat(a), flat(b)) <= 4 for a, b in zip(got, want))


# Several tiles along both axes, the last ones cut, at every depth.
TILED = [
    Pyramid("tiled", (2, 24, 280), batch=2, channels=1),
    Pyramid("tiled_three", (48, 296), levels=3, batch=1, channels=2),
    Pyramid("tiled_four", (64, 304), levels=4, batch=1, channels=1),
    Pyramid("tall_three", (300, 24), levels=3, batch=1, channels=1),
    Pyramid("tall_time_three", (8, 168, 24), levels=3, factor=(2, 2, 2), batch=1, channels=1),
    Pyramid("tiled_haar", (40, 168), levels=3, kind="haar", batch=1, channels=1),
    Pyramid("tiled_time", (6, 36, 148), factor=(2, 2, 2), batch=1, channels=1),
    Pyramid("tiled_time_three", (8, 40, 152), levels=3, factor=(2, 2, 2), batch=1, channels=1),
    Pyramid("tiled_time_four", (16, 16, 144), levels=4, factor=(2, 2, 2), batch=1, channels=1),
    Pyramid("tiled_time_haar", (8, 40, 152), levels=3, kind="haar", factor=(2, 2, 2), batch=1, channels=1),
]


@pytest.mark.parametrize("p", TILED, ids=lambda p: p.name)
def test_tiles_have_the_bits_of_the_reference(executed, p):
    """No product of these filters rounds, so that the order of additions is all there is. One launch each, and no tile shows."""
    (x,) = p.draw([p.shape], torch.float32, "cpu", 0)
    want = vidkern.pyramid_decompose(x, levels=p.levels, impl="reference", **p.options)
    with accuracy.poisoned():
        got = vidkern.pyramid_decompose(x, levels=p.levels, impl=EXECUTED, **p.options)
        merged = vidkern.pyramid_merge(want, impl=EXECUTED, **p.options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert torch.equal(merged, vidkern.pyramid_merge(want, impl="reference", **p.options))
    time = "_time" if p.pool_time else ""
    assert executed == [f"pyramid_levels_apart{time}", f"pyramid_merge_levels{time}"]


def wrong(op, sample) -> float:
    """Largest error of outputs and gradients in float32 against the reference in float64, in units of the largest value."""
    r = rooms.room(op)
    tensors = r.inputs(sample, torch.float32, 0, "cpu")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator).double() for o in r.call(sample, tensors, impl="reference")]
    with accuracy.poisoned():
        ours = accuracy.measure(lambda x: r.call(sample, x, impl=EXECUTED), tensors, weights)
    exact = accuracy.measure(lambda x: r.call(sample, x, impl="reference"), [t.double() for t in tensors], weights)
    errors = [((a.double() - b).abs().nan_to_num(9).max() / b.abs().max().clamp_min(1)).item() for a, b in zip(ours, exact)]
    return max(errors)


@pytest.mark.parametrize("p", TILED, ids=lambda p: p.name)
def test_adjoints_of_tiles(executed, p):
    assert wrong("pyramid_decompose", decompose_cost.Sample(p)) < SOUND
    assert wrong("pyramid_merge", merge_cost.Sample(p)) < SOUND


@pytest.mark.parametrize("width", [1, 5, 7, 10])
def test_noise_at_any_width(executed, width):
    """Runs that begin anywhere in a block of four: every level and sample has its own numbers, those of the reference."""
    x, table = torch.zeros(2, 2, 3, 4, 4 * width), torch.tensor([[[0.0, 1.0, 0.0, -1.0]] * 3] * 2)
    z, v = vidkern.pyramid_flow_inputs(x, table, levels=3, seed=(5 << 40) + 3, offset=9, first_sample=4, impl=EXECUTED)
    for s, (noise, minus) in enumerate(zip(z, v)):
        want = philox.normal(
            noise.shape, seed=(5 << 40) + 3, level=s, offset=9, first_sample=4, dtype=torch.float64, device="cpu"
        )
        assert ulps(noise, want) <= 4 and torch.equal(noise, -minus)
    part, _ = vidkern.pyramid_flow_inputs(x[1:], table[1:], levels=3, seed=(5 << 40) + 3, offset=9, first_sample=5, impl=EXECUTED)
    assert all(torch.equal(a[1:], b) for a, b in zip(z, part))


def scattered(t):
    """The same values in memory with gaps, from an odd address on."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)[..., 1 : 1 + t.shape[-1]]
    return wide.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment_do_not_matter(executed, dtype):
    """16 bytes at a time or one value at a time: the same bits; transposed, expanded and sliced ones."""
    x, table = torch.randn(2, 3, 2, 24, 40).to(dtype), vidkern.flow_coefficients(torch.rand(2, 3), direction="data")
    mask = torch.tensor([[True, False, True], [True, True, False]])
    moved = x.transpose(1, 2).contiguous().transpose(1, 2)
    for options in ({}, {"layout": "tokens", "patch": (1, 2, 2)}):
        run = lambda t, c, m: vidkern.pyramid_flow_inputs(t, c, levels=3, seed=2, active=m, impl=EXECUTED, **options)
        want = run(x, table, mask)
        for other in (run(scattered(x), scattered(table), mask.T.contiguous().T), run(moved, table.expand(2, 3, 4), mask)):
            assert all(torch.equal(flat(a), flat(b)) for a, b in zip(want, other))
    parts = vidkern.pyramid_decompose(x, impl="reference")
    want = vidkern.pyramid_merge(parts, impl=EXECUTED)
    assert torch.equal(want, vidkern.pyramid_merge([scattered(p) for p in parts], impl=EXECUTED))
    stages = lambda t, eps: vidkern.pyramid_stage_inputs(t, torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), stages=3, stage=1,
                                                         noise=eps, impl=EXECUTED)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(stages(x, x.flip(0)), stages(scattered(x), scattered(x.flip(0)))))


def test_dtypes_mix(executed):
    """A state in float32, velocities in bfloat16, the next input in float16: each as it is."""
    z = [torch.randn(2, 3, 4 << s, 8 << s) for s in range(2)]
    c, u = ([torch.randn_like(p).bfloat16() for p in z] for _ in range(2))
    run = lambda impl, **more: vidkern.pyramid_flow_step(z, c, u, dt=[0.1, 0.2], guidance=1.5, dtype=torch.float16, impl=impl, **more)
    (state, given), (want, given_too) = run(EXECUTED), run("reference")
    assert all(ulps(a, b) <= 4 for a, b in zip(state, want))
    assert all(a.dtype is torch.float16 and torch.equal(a, b.half()) for a, b in zip(given, state))
    assert all(b.dtype is torch.float16 for b in given_too)
    tokens = run(EXECUTED, layout="tokens", patch=(1, 1, 2))[1]
    assert torch.equal(tokens, levels.to_tokens([p.unsqueeze(2) for p in given], (1, 1, 2), False))
    pred, target = [p.bfloat16() for p in z], [torch.randn_like(p) for p in z]
    loss = lambda impl: vidkern.pyramid_flow_loss(pred, target, impl=impl)
    assert ulps(loss(EXECUTED), loss("reference")) <= 4


def test_a_step_in_place_and_what_is_not_active(executed):
    z, c, u = ([torch.randn(2, 3, 4 << s, 4 << s) for s in range(2)] for _ in range(3))
    store = torch.cat([p.flatten() for p in z])
    views = levels.handed_out(store, levels.places(levels.free_sizes([p.unsqueeze(2) for p in z]), 4))
    want, _ = vidkern.pyramid_flow_step(z, c, u, dt=0.1, guidance=2.0, impl=EXECUTED)
    got, given = vidkern.pyramid_flow_step(views, c, u, dt=0.1, guidance=2.0, out=(store, torch.empty_like(store)), impl=EXECUTED)
    assert got[0].data_ptr() == store.data_ptr() and all(torch.equal(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(given, want))
    nan = torch.full_like(z[1], torch.nan)
    moved, given = vidkern.pyramid_flow_step([z[0], nan], [c[0], nan], dt=0.1, active=1, impl=EXECUTED)
    assert torch.isfinite(moved[0]).all() and len(given) == 1


def test_masked_levels_are_never_read(executed):
    table, mask = torch.rand(2, 2, 4), torch.tensor([[True, False], [True, True]])
    table = table.masked_fill(~mask[..., None], torch.nan)
    parts = [torch.randn(2, 1, 4 << s, 4 << s) for s in range(2)]
    parts[1][0] = torch.nan
    z, v = vidkern.pyramid_flow_inputs(parts, table, active=mask, seed=1, impl=EXECUTED)
    assert not z[1][0].any() and not v[1][0].any() and torch.isfinite(z[1][1]).all()
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    z, v = vidkern.pyramid_flow_inputs(x, table, active=mask, seed=1, impl=EXECUTED)
    assert not z[1][0].any() and not v[1][0].any()
    spoiled = [torch.ones_like(p) for p in z]
    spoiled[1][0] = torch.nan
    assert torch.isfinite(torch.autograd.grad(z, x, spoiled)[0]).all()
    pred = [p.clone().requires_grad_() for p in parts]
    loss = vidkern.pyramid_flow_loss(pred, [torch.zeros_like(p) for p in parts], active=mask, impl=EXECUTED)
    grads = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss) and not grads[1][0].any() and grads[1][1].all()


def test_the_loss_adds_in_a_fixed_order(executed):
    """Long enough for several blocks; under other schedules the same bits, and those of float64 rounded once."""
    pred = [torch.randn(3, 5, 64 << s, 64 << s) for s in range(2)]
    target = [torch.randn_like(p) for p in pred]
    run = lambda: vidkern.pyramid_flow_loss(pred, target, return_levels=True, impl=EXECUTED)
    (loss, means), (again, _) = run(), run()
    want = torch.stack([(p.double() - t.double()).square().flatten(1).mean(1) for p, t in zip(pred, target)], 1)
    assert torch.equal(loss, again) and ulps(means, want) <= 4 and ulps(loss, want.sum() / 3) <= 4


def test_what_is_not_served():
    (x,) = Pyramid("image", (4, 4)).draw([(1, 1, 4, 4)], torch.float64, "cpu", 0)
    assert cuda.why_not([x], None, torch.float32) == "dtype is torch.float64, it serves torch.float16, torch.bfloat16, torch.float32"
    assert cuda.why_not([x.half()], torch.ones(2, dtype=torch.bool), None, torch.bfloat16, 3) is None


# ---- faults -------------------------------------------------------------------------------------------------------------------
SOUND = 2e-6  # what sound kernels stay below
TWO, TIME = Pyramid("two", (2, 18, 74)), Pyramid("in_time", (4, 10, 76), factor=(2, 2, 2), channels=2)
THREE, DCT = Pyramid("three", (20, 152), levels=3), Pyramid("blocks", (8, 8, 16), kind="dct", factor=(2, 2, 2), channels=2)
# Per source, what is run to tell its faults.
PROBLEMS = {
    "pyramid_levels": [
        *(("pyramid_flow_inputs", inputs_cost.Sample(p, masked=p is THREE, std=tuple(range(2, 2 + p.levels)))) for p in (TWO, TIME, THREE)),
        ("pyramid_flow_inputs", inputs_cost.Sample(Pyramid("cut", (8, 40)), patch=(1, 2, 5))),
    ],
    "pyramid_merge": [
        *(("pyramid_flow_step", step_cost.Sample(p, merge=True, std=tuple(range(2, 2 + p.levels)))) for p in (TWO, TIME, THREE)),
        ("pyramid_merge", merge_cost.Sample(THREE)),
    ],
    "pyramid_filter": [("pyramid_decompose", decompose_cost.Sample(DCT)), ("pyramid_merge", merge_cost.Sample(DCT))],
    "pyramid_flow": [
        ("pyramid_flow_inputs", inputs_cost.Sample(TWO, given_levels=True, masked=True, std=(2.0, 3.0))),
        ("pyramid_flow_step", step_cost.Sample(TIME, active=1, next_active=2, inactive="zero", patch=(1, 1, 2))),
        ("pyramid_flow_loss", loss_cost.Sample(TWO, masked=True)),
        ("pyramid_flow_loss", loss_cost.Sample(Pyramid("long", (64, 160), levels=1, channels=1))),
    ],
    "pyramid_stage": [
        *(("pyramid_stage_inputs", stage_cost.Sample(Pyramid("stages", (2, 12, 44), levels=3, kind="haar"), k)) for k in range(3)),
        ("pyramid_stage_transition", transition_cost.Sample("odd", (3, 7, 13), per_sample=True)),
    ],
}  # fmt: skip
FAULTS = {
    "a value too many read": ("flow", "v[i] = i < n ? load(p + i) : 0.0f", "v[i] = i <= n ? load(p + i) : 0.0f"),
    "a value too many written": ("flow", "if (i < n) store(p + i, v[i]);", "if (i <= n) store(p + i, v[i]);"),
    "the noise of the block after": ("flow", "normals8(eps, p.e, draw_of", "normals8(eps, p.e + 4, draw_of"),
    "one noise for all samples": ("flow", "r.first_sample + u32(b), r.offset};", "r.first_sample, r.offset};"),
    "one noise for all levels": ("levels", "{r.key0, r.key1, u32(s),", "{r.key0, r.key1, 0u,"),
    "noise one element off": ("levels", "normals8(eps, p.e, draw_of", "normals8(eps, p.e + 1, draw_of"),
    "the other half of the seed": ("levels", "return {r.key0, r.key1,", "return {r.key1, r.key0,"),
    "the noise of the upper row twice": ("stage", "(2 * i64(g.height)) + y) *", "(2 * i64(g.height)) + 2 * at.y) *"),
    "no barrier among the sums of the loss": (
        "flow", "as_bits(total));\n  block_barrier();\n", "as_bits(total));\n"
    ),
    "no barrier before the loss": ("flow", "as_bits(low));\n  }\n  block_barrier();\n", "as_bits(low));\n  }\n"),
    "lanes left out of the loss": ("flow", "for (u32 mask = 1; mask < WARP; mask *= 2) total += shuffle_xor", "for (u32 mask = 2; mask < WARP; mask *= 2) total += shuffle_xor"),
    "one turn too few": ("flow", "part && j < LOSS_TURNS", "part && j < LOSS_TURNS - 1"),
    "the scale of another level": ("levels", "? m.scale[s] * x[i] : 0.0f", "? m.scale[0] * x[i] : 0.0f"),
    "the gradient's scale of another level": ("flow", "m.scale[s] * load(row), w.v", "m.scale[0] * load(row), w.v"),
    "a frame's stride for a row's": ("levels", "t * v.frame + y * v.row", "t * v.row + y * v.row"),
    "a sample's stride": ("merge", "return b * v.batch + c * v.channel", "return b * v.channel + c * v.channel"),
    "columns of another level": ("flow", "token * r.row + r.column[s] +", "token * r.row + r.column[0] +"),
    "a token's stride": ("flow", "inside = 0, at += r.row - q.w;", "inside = 0, at += r.row;"),
    "patches that do not grow": ("levels", "g.patch[2] << s}", "g.patch[2]}"),
    "a level that is masked": ("levels", "takes_part = difference ? part : lowest", "takes_part = true"),
    "no barrier after the means": ("levels", "  block_barrier();\n\n  const i32 runs = up_to(columns.count(), 4), lines = 2 * rows.count(), diff", "  const i32 runs = up_to(columns.count(), 4), lines = 2 * rows.count(), diff"),
    "no barrier after a level's gradient": ("levels", "v + 4);\n    }\n    block_barrier();\n", "v + 4);\n    }\n"),
    "no margin": ("levels", "const i32 halo = a.laplacian && a.fine ? 1 : 0;", "const i32 halo = 0;"),
    "half a mean": ("levels", "SHARE = TIME ? 0.125f : 0.25f", "SHARE = TIME ? 0.0625f : 0.125f"),
    "edges that are not repeated": ("merge", "    if (x + i >= w.kept.end) m[i + 1] = m[i];\n", "    ;\n"),
    "the wrong neighbour": ("merge", "w.rows.clamped(yn + 2 * (y & 1) - 1)", "w.rows.clamped(yn - 2 * (y & 1) + 1)"),
    "no barrier between levels": ("merge", "    if (s < last) block_barrier();\n", ""),
    "one window for all levels": ("merge", "u32(s & 1) * a.window_bytes", "0u * a.window_bytes"),
    "a tap too few": ("merge", "taps = laplacian ? 4 : 2", "taps = laplacian ? 3 : 2"),
    "velocities swapped": ("merge", "fused(w, c[i] - u[i], u[i])", "fused(w, u[i] - c[i], c[i])"),
    "the matrix turned round": ("filter", "WIDENS ? g.up[n][k % 4] : g.up[k][n % 4]", "WIDENS ? g.up[n][3 - k % 4] : g.up[k][n % 4]"),
    "subtracted the other way": ("filter", "SUBTRACT ? own[n] - v[n]", "SUBTRACT ? v[n] - own[n]"),
    "rows of the block before": ("filter", "from_y + j) + x * IN", "from_y) + x * IN"),
    "means for sums": ("stage", "eps[i] * (1.0f / (1 << L))", "eps[i] * (1.0f / (1 << 2 * L))"),
    "the partner in the row": ("stage", "begin[0][o % N] + begin[1][o % N]", "begin[0][i] + begin[1][i]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    """A program with a fault each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(lambda f: Program(source(f"pyramid_{f[0]}"), f[1:]), FAULTS.values())))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(programs, faulty, fault, monkeypatch):
    """By a rule of the executor or by a wrong result."""
    stem = f"pyramid_{FAULTS[fault][0]}"
    install(monkeypatch, programs | {stem: faulty[fault]})
    try:
        errors = [wrong(*problem) for problem in PROBLEMS[stem]]
    except KernelError:
        return
    assert max(errors) > 1000 * SOUND


@pytest.mark.parametrize("stem", PROBLEMS)
def test_what_faults_are_told_from(executed, stem):
    assert max(wrong(*problem) for problem in PROBLEMS[stem]) < SOUND


KERNELS = {"pyramid_levels": 4, "pyramid_merge": 4, "pyramid_filter": 2, "pyramid_flow": 7, "pyramid_stage": 10}


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("stem, architecture", [
    pytest.param(stem, a, marks=[] if a == "90" and stem in ("pyramid_levels", "pyramid_filter", "pyramid_flow") else [pytest.mark.slow])
    for stem in KERNELS for a in ("80", "89", "90", "100", "120")
])  # fmt: skip
def test_machine_code(stem, architecture):
    """Nothing spilled; runs of eight come and go 16 bytes at a time, in every dtype."""
    kernels = machine_code(source(stem), architecture)
    assert len(kernels) == KERNELS[stem]
    for name, code in kernels.items():
        assert not code["spilled"], (name, code)
        if name == "pyramid_flow_loss_sum":
            continue
        # float32 takes two pieces and a 16-bit type one.
        assert code.get("LDG.E.128", 0) >= 3 or name.startswith("pyramid_stage_adjoint"), (name, code)
        assert code.get("STG.E.128", 0) >= (1 if "coarser" in name or "transition_adjoint" in name else 2) or name in (
            "pyramid_flow_loss", "pyramid_stage_inputs_4", "pyramid_stage_inputs_8"
        ), (name, code)  # fmt: skip
