"""The backward of grid attention for compute capability 9.0, executed: the accuracy rule, hidden and visible NaN, its work, the same bits
under every schedule, and seeded faults that must be told; and how its tiles are chosen."""

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import grid_attention as op
from vidkern.ops.grid_attention import cuda, hopper, hopper_backward
from vidkern.ops.grid_attention.plan import Shape, Tiling, plan, work
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Launch, Program, machine_code, nvcc

FORWARD, DELTA = CSRC / "cuda" / "grid_attention.cu", CSRC / "cuda" / "grid_attention_backward.cu"
SOURCES = {dim: CSRC / "cuda" / f"grid_attention_hopper_backward_{dim}.cu" for dim in (64, 96, 128)}
# Two take minutes here.
SAMPLES = [s for s in rooms.room("grid_attention").samples if s.dim <= 128 and s.name not in ("one_token_frames", "demo")]
QUICK = ("one_frame", "text_front", "frames_masked", "dim_8")
OTHERS = tuple(s.name for s in SAMPLES if s.name not in QUICK)  # in the slow run
KERNELS = [(part, dim, width) for (part, dim), widths in hopper_backward.WIDTHS.items() for width in widths]


def prefixed(dim: int, program: Program) -> dict[str, Program]:
    return {prefix: program for prefix in hopper_backward.SOURCES[SOURCES[dim].stem]}


@pytest.fixture(scope="module")
def base():
    """The forward, and Delta, of the other GPUs."""
    return {"grid_attention_forward_": Program(FORWARD), "grid_attention_delta_": Program(DELTA)}


@pytest.fixture(scope="module")
def narrow(base):
    """With the kernels of head dims up to 64."""
    return base | prefixed(64, Program(SOURCES[64]))


@pytest.fixture(scope="module")
def programs(narrow):
    return narrow | prefixed(96, Program(SOURCES[96])) | prefixed(128, Program(SOURCES[128]))


def install(monkeypatch, programs, counted=None):
    launch = Launch(programs, counted)
    forward, backward = (functools.partial(run, launch=launch) for run in (cuda.forward, hopper_backward.backward))
    backend = registry.Backend(
        "hopper-executed", lambda q, k, v, *rest: hopper_backward.why_not(q, k, v), op._run_with(forward), op._run_backward_with(backward)
    )
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


@pytest.fixture
def executed(narrow, monkeypatch):
    install(monkeypatch, narrow)


def check(sample, dtype):
    with accuracy.poisoned():
        accuracy.check("grid_attention", sample, dtype, "hopper-executed", seeds=range(accuracy.draws("grid_attention", sample, dtype)))


def named(names):
    for i, sample in enumerate(SAMPLES):
        if sample.name in names:
            yield pytest.param(sample, torch.float16 if i % 2 or sample.name == "text_front" else torch.bfloat16, id=sample.name)


@pytest.mark.parametrize("sample, dtype", list(named(QUICK)))
def test_accuracy(executed, sample, dtype):
    check(sample, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sample, dtype", list(named(OTHERS)))
def test_accuracy_of_others(programs, monkeypatch, sample, dtype):
    install(monkeypatch, programs)
    check(sample, dtype)


def attend(impl, dtype=torch.bfloat16, grid=(2, 3), frame_len=37, dim=40, hidden=None, deep=0.0, pattern=None, **rules):
    """Gradients of the output and the lse of a problem of two heads on one key head, on a backend or in float64 on the reference.
    ``hidden``: tokens that hold NaN; ``deep``: shifts q up and k down, and with them every logit."""
    g = torch.Generator().manual_seed(0)
    length = (grid[0] * grid[1] if pattern is None else pattern.n_frames) * frame_len + rules.get("n_text", 0)
    q, k, v, weight = (torch.randn(1, h, length, dim, generator=g).to(dtype) for h in (2, 1, 1, 2))
    q, k = q + deep, k - deep
    if hidden is not None:
        for t in (q, k, v):
            t[:, :, hidden] = torch.nan
    leaves = [(t.double() if impl == "reference" else t).requires_grad_() for t in (q, k, v)]
    rules |= {"impl": impl, "return_lse": True}
    if pattern is None:
        out, lse = vidkern.grid_attention(*leaves, grid=grid, **rules)
    else:
        out, lse = vidkern.frame_sparse_attention(*leaves, pattern, **rules)
    loss = (out * weight.to(out.dtype)).sum() + torch.where(lse.isneginf(), 0.0, lse).sum()
    return torch.autograd.grad(loss, leaves)


exact = functools.lru_cache(maxsize=None)(lambda i: attend("reference", **PROBLEMS[i]))


def wrong(ours, expected) -> float:
    """Largest error of the gradients in units of each one's largest value."""
    return max(((a.double() - b).abs().nan_to_num(9).max() / b.abs().max()).item() for a, b in zip(ours, expected))


# More tiles than stages, none of them hidden from anyone, and the rest of one; rows of several frames, one of them dead and full of NaN;
# rows of two frames that see whole tiles which the others do not; a single tile; and logits of about -100, beside which a dead key's
# zeros would weigh e^100.
DEAD = {"valid": torch.tensor([[True] * 3, [True, False, True]])}
PROBLEMS = (
    {"grid": (1, 3), "frame_len": 100},
    {"scale": -0.16, **DEAD, "hidden": slice(4 * 37, 5 * 37)},
    {"grid": (2, 2), "frame_len": 96},
    {"grid": (1, 1), "frame_len": 20},
    {"deep": 4.0, **DEAD},
)
SOUND = 0.012  # what sound kernels stay below in all of them


@contextlib.contextmanager
def of_widths(**widths):
    """Of each part, the width, which is then not chosen."""
    with contextlib.ExitStack() as stack:
        for part, width in widths.items():
            stack.enter_context(hopper.forced(part, hopper.Config(width)))
        yield


@pytest.fixture
def narrowest():
    with of_widths(dq=48, dkv=48):
        yield


@pytest.mark.parametrize("i", range(len(PROBLEMS)))
def test_what_faults_are_told_from(executed, narrowest, i):
    with accuracy.poisoned():
        ours = attend("hopper-executed", **PROBLEMS[i])
    assert wrong(ours, exact(i)) < SOUND


LIVE = {"valid": torch.tensor([[True, True, False]]), "kv_len": torch.tensor([[70, 11, 70]]), "hidden": slice(140, 210)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("widest", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dim", SOURCES)
def test_every_kernel(programs, monkeypatch, dim, widest, dtype):
    """Main tiles, what is left of them, and masks; head dims that fill the kernel's and that do not."""
    counted, widths = [], {part: hopper_backward.WIDTHS[part, dim][widest] for part in ("dq", "dkv")}
    install(monkeypatch, programs, counted)
    for problem in ({"dim": dim}, {"dim": dim - 8, **LIVE}):
        problem |= {"grid": (1, 3), "frame_len": 70}
        with accuracy.poisoned(), of_widths(**widths):
            ours = attend("hopper-executed", dtype, **problem)
        assert wrong(ours, attend("reference", dtype, **problem)) < (SOUND if dtype is torch.bfloat16 else SOUND / 8)
    short = "bf16" if dtype is torch.bfloat16 else "f16"
    names = [f"grid_attention_hopper_{part}_{dim}_{short}_{width}" for part, width in widths.items()]
    assert [n for n, _ in counted if "hopper" in n] == 2 * names


def test_rules_at_once(executed):
    """Negative scale, text, dead frames and short ones, windows, GQA, a head dim that fills no panel; text that sees itself alone."""
    valid, kv_len = torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([[37, 0, 37], [1, 30, 37]])
    rules = {"n_text": 5, "causal_time": True, "scale": -0.3, "text_len": torch.tensor([3]), "valid": valid, "kv_len": kv_len}
    for problem in (rules, rules | {"hidden": slice(5 + 2 * 37, 5 + 3 * 37)}, {"n_text": 5, "include": ("view",)}):
        with accuracy.poisoned():
            ours = attend("hopper-executed", **problem)
        assert wrong(ours, attend("reference", **problem)) < SOUND


def test_repeated_and_strided_tensors(executed):
    """One key head for all by a stride of 0, and q, k, v cut out of one tensor: as of dense copies, to the bit."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 60, 2, 3 * 24, generator=g).bfloat16()
    weight = torch.randn(2, 60, 2, 24, generator=g).bfloat16()

    def gradients(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = vidkern.grid_attention(*leaves, grid=(1, 3), layout="blhd", impl="hopper-executed")
        return torch.autograd.grad(out, leaves, weight[:, :, :1].expand(out.shape))

    q, k, v = packed.split(24, -1)
    once = k[:, :, :1].expand(k.shape)
    for tensors in ((q, k, v), (q, once, v)):
        for ours, dense in zip(gradients(*tensors), gradients(*(t.contiguous() for t in tensors))):
            assert torch.equal(ours, dense)


@pytest.mark.parametrize("frame_len", [48, 20])
def test_a_visible_nan_stays_with_those_who_see_it(executed, narrowest, frame_len):
    """In a tile whose rows lie in frames of which some see it; it comes by a box, or by cp.async."""
    nan_stays(frame_len)


def nan_stays(frame_len):
    pattern = vidkern.FramePattern.from_lists([[0], [1, 0], [2]])
    problem = {"frame_len": frame_len, "pattern": pattern}
    first, middle, last = (slice(i * frame_len, (i + 1) * frame_len) for i in range(3))
    sound = attend("hopper-executed", **problem)
    spoilt = attend("hopper-executed", **problem, hidden=middle)
    # Frame 1 sees frame 0 and itself: it spoils the keys of both, and no queries but its own.
    for i, (ours, whole) in enumerate(zip(spoilt, sound)):
        assert torch.equal(ours[:, :, last], whole[:, :, last])
        assert ours[:, :, middle].isnan().all()
        assert ours[:, :, first].isnan().all() if i else torch.equal(ours[:, :, first], whole[:, :, first])


def test_the_same_bits_under_every_schedule(executed):
    """Every launch here is another schedule of the warps, and other delays of what is asynchronous."""
    for problem in PROBLEMS[:3]:
        first, *others = (attend("hopper-executed", **problem) for _ in range(3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))


def products(part: str, tables, dim: int, width: int, whole: bool) -> int:
    """Products of a warpgroup in one head, by the plan: of every tile that any of its 64 rows sees."""
    deep = width // 16
    panels = -(-dim // 64)
    main = 2 * dim // 16 + (deep * (1 + whole) if part == "dq" else 2 * deep)
    edge = 2 * dim // 16 + panels * (deep * (1 + whole) if part == "dq" else 2 * deep)
    count = 0
    for first, end, _, n_main, at, n_edge in tables.tiles.tolist():
        for share in (first, first + 64):
            count += n_main * main * (share < end)
            for _, _, begin, last in tables.edge[at : at + n_edge].tolist():
                count += edge * (share < min(last, end) and share + 64 > begin)
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products_are_those_of_the_plan(narrow, monkeypatch, dtype):
    """Tiles that none of a warpgroup's rows sees cost it nothing, and a warpgroup without rows does nothing; in float16 dQ takes dS in two
    products."""
    counted = []
    install(monkeypatch, narrow, counted)
    attend("hopper-executed", dtype, grid=(3, 2), frame_len=90, dim=64)
    backward = [(name, counts) for name, counts in counted if "hopper" in name]
    assert len(backward) == 2
    for (name, counts), part, heads in zip(backward, ("dq", "dkv"), (2, 2)):
        shape = Shape(vidkern.GridPattern(3, 2).key, 90, 0, False, part == "dkv")
        tiles = hopper_backward.tiling(shape, part, 64)
        tables = plan(shape, tiles, torch.device("cpu"))
        assert name.endswith(f"_{tiles.block_n}")
        assert counts["warpgroup_products"] == heads * products(part, tables, 64, tiles.block_n, dtype is torch.float16), name


def test_tiles_that_are_seen_whole_come_by_boxes(narrow, narrowest, monkeypatch):
    """Of main tiles and of edge tiles of full width; cp.async brings the rest, and under masks all."""
    counted = []
    install(monkeypatch, narrow, counted)
    attend("hopper-executed", grid=(2, 2), frame_len=96, dim=64)
    attend("hopper-executed", grid=(2, 2), frame_len=100, dim=64)
    attend("hopper-executed", grid=(2, 2), frame_len=96, dim=64, valid=torch.ones(2, 2, dtype=torch.bool))
    whole, rest, masked = ([c for n, c in counted[4 * i : 4 * i + 4] if "hopper" in n] for i in range(3))
    for fitting, odd, live, heads in zip(whole, rest, masked, (2, 1)):
        # Each block's own two tiles come by a box each.
        assert fitting["copies"] == 0 and fitting["boxes"] > 2 * 3 * heads
        assert odd["copies"] > 0 and odd["boxes"] > 2 * 4 * heads
        assert live["copies"] > 0 and live["boxes"] == 2 * 3 * heads


# What to replace in the source or the headers beside it.
FAULTS = {
    "no wait for a full stage": (
        "void wait_full(i32 i) const { mbarrier_wait(full(i), u32(i / STAGES) & 1); }",
        "void wait_full(i32) const {}",
    ),
    "the full stage's other parity": ("mbarrier_wait(full(i), u32(i / STAGES) & 1)", "mbarrier_wait(full(i), u32(i / STAGES + 1) & 1)"),
    "no wait for an empty stage": ("      room.ring.wait_empty(i);\n", ""),
    "no wait for the rows' own tiles": ("  clear(dk), clear(dv);\n  mbarrier_wait(room.rows, 0);\n", "  clear(dk), clear(dv);\n"),
    "half of a tile's bytes expected": (
        "mbarrier_expect(room.ring.full(i), 2 * Column::BYTES)",
        "mbarrier_expect(room.ring.full(i), Column::BYTES)",
    ),
    "no fence before what products read": (
        "    async_fence();\n    warp_barrier();\n    if (leads())",
        "    warp_barrier();\n    if (leads())",
    ),
    "notes read before they are all there": ("        named_barrier(PRODUCERS, GROUP);\n", ""),
    "released before its products end, dQ": ("if (i > 0) room.ring.release(i - 1);", "room.ring.release(i);"),
    "released before its products end, dK and dV": (
        "products_wait<0>();\n      room.ring.release(i);",
        "room.ring.release(i);\n      products_wait<0>();",
    ),
    "logits read early": ("    products_wait<1>();\n    exponentials();", "    exponentials();"),
    "sums read early": ("    products_commit();\n    products_wait<0>();\n", "    products_commit();\n"),
    "no fence before products of registers": (
        "VK_DEVICE void gather(Accumulator (&out)[DIM / 8], const Left<T, WIDTH, WHOLE>& p, const Column& b) {\n"
        "  products_begin();\n",
        "VK_DEVICE void gather(Accumulator (&out)[DIM / 8], const Left<T, WIDTH, WHOLE>& p, const Column& b) {\n",
    ),
    "a tile taken along for across": (
        "warpgroup_product<T, DIM, true>(out, p.kept[n], b.depth_across(n), true)",
        "warpgroup_product<T, DIM, false>(out, p.kept[n], b.depth_along(0, n), true)",
    ),
    "Q and dO swapped for dV": ("(dv, p, room.second(i));", "(dv, p, room.first(i));"),
    "another swizzle than the boxes'": ("((c ^ row) & 7) * 16", "((c ^ row >> 1) & 7) * 16"),
    "rows of the first warpgroup for both": (
        "warpgroup_product<T, N>(s, a.depth_along(row, d)",
        "warpgroup_product<T, N>(s, a.depth_along(row * 0, d)",
    ),
    "boxes for what is not seen whole": ("live == nullptr && c.end - c.first == WIDTH", "live == nullptr"),
    "a column too many": ("lane < WIDTH && c.first + lane < c.end", "lane < WIDTH && c.first + lane <= c.end"),
    "a row too many": ("token(h) >= from && token(h) < to", "token(h) >= from && token(h) <= to"),
    "a warpgroup that passes by what it sees": ("first + SHARE > from", "first > from"),
    "added where it is not seen": ("add_where(sees[i / 2], ", "add_where(true, "),
    "no Delta for keys": ("s[n].v[j] *= d[n].v[j] - less[j % 2];", "s[n].v[j] *= d[n].v[j];"),
    "dead keys seen": ("else if (live == nullptr || (load(live + column) & 1))", "else"),
    "gradients of dead keys": ("if (g.live != nullptr) {\n    // Nobody", "if (false) {\n    // Nobody"),
    "rows that leave through others' operands": (
        "  named_barrier(PRODUCERS + group_index(), GROUP);\n  c.template leave_to<T>(g.one, g.one_step, at, dk",
        "  c.template leave_to<T>(g.one, g.one_step, at, dk",
    ),
    "dQ without its scale": ("at, out, g.scale, room.first_own", "at, out, 1.0f, room.first_own"),
}  # fmt: skip
# Of the kernels that the problems take alone.
FEW = "VK_HOPPER_BACKWARDS(64, bf16, 96, 96)\nVK_HOPPER_BACKWARDS(64, f16, 96, 96)", " ".join(
    f"VK_HOPPER_BACKWARD({part.lower()}, {part}, 64, bf16, 48)" for part in ("DQ", "DKV")
)


@pytest.fixture(scope="module")
def faulty():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(lambda edit: Program(SOURCES[64], edit, FEW), FAULTS.values())))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(base, faulty, narrowest, monkeypatch, fault):
    """By a rule of the executor, by a wrong result, or by a visible NaN that spreads."""
    install(monkeypatch, base | prefixed(64, faulty[fault]))
    try:
        if any(wrong(attend("hopper-executed", **problem), exact(i)) > 2 * SOUND for i, problem in enumerate(PROBLEMS)):
            return
        with pytest.raises(AssertionError):
            for frame_len in (48, 20):
                nan_stays(frame_len)
    except KernelError:
        return


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("dim", SOURCES)
def test_machine_code(dim):
    """Nothing spilled, no product that waits for another; products of warpgroups, boxes, and registers that go to those who multiply."""
    kernels = machine_code(SOURCES[dim], "90a")
    assert len(kernels) == 8
    for name, code in kernels.items():
        assert not code["spilled"] and not code["serialized"] and "STL" not in code, (name, code)
        assert code["UTMALDG"] == 4 * -(-dim // 64) and code["USETMAXREG"] == 2, (name, code)
        assert code["LDGSTS"] and code["STG.E.128"] and "HMMA" not in code and "LDSM" not in code, (name, code)
        width, dq, twice = int(name.split("_")[-1]), "_dq_" in name, "_f16_" in name
        # Q K^T and dO V^T; dS K, or P^T dO and dS^T Q; of main tiles, and of others, whose sums are made panel by panel.
        deep, panels = width // 16 * (1 + twice if dq else 2), -(-dim // 64)
        piece = 2 if not dq and dim > 64 and width > 48 else 1
        assert code["HGMMA"] == 2 * 2 * dim // 16 + deep + deep // piece * panels, (name, code)


def test_the_width_is_that_of_least_work():
    """Frames of 144 tokens take tiles of 48 columns exactly; those of 576 the widest."""
    for frame_len, expected in ((144, 48), (576, None)):
        shape = Shape(vidkern.GridPattern(8, 16).key, frame_len, 0, False, False)
        for (part, dim), widths in hopper_backward.WIDTHS.items():
            tiles = hopper_backward.tiling(shape, part, dim)
            assert tiles == Tiling(128, expected or max(widths), expected or max(widths), True)
    shape = Shape(vidkern.GridPattern(8, 8).key, 144, 0, False, True)
    assert hopper_backward.tiling(shape, "dkv", 128, hopper.Config(64)) == Tiling(128, 64, 64, True)
    with pytest.raises(ValueError, match="forced: Config.block_n=96, groups=2., which no kernel dkv of head dim 128 has"):
        hopper_backward.tiling(shape, "dkv", 128, hopper.Config(96))
    exactly, wide = (work(shape, Tiling(128, width, width, True)) for width in (48, 64))
    assert exactly.main + exactly.edge < wide.main + wide.edge


@pytest.mark.parametrize("part, dim, width", KERNELS)
def test_shared_memory_fits(part, dim, width):
    """At least two stages, within what a block may have."""
    row = -(-dim // 64) * 128
    assert 1024 + 2 * 128 * row + 2 * 2 * width * row < hopper_backward.shared_bytes(dim, width) <= 232448
