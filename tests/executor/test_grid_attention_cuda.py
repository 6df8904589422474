"""The CUDA kernels of grid attention, executed: the accuracy rule on every sample, hidden NaN, and seeded faults that must be told."""

import functools
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import grid_attention as op
from vidkern.ops.grid_attention import cuda
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Program, machine_code, nvcc

SOURCE = CSRC / "cuda" / "grid_attention.cu"
BACKWARD = CSRC / "cuda" / "grid_attention_backward.cu"
# Two take minutes here; test_rules_at_once has frames of one token.
SAMPLES = [s for s in rooms.room("grid_attention").samples if s.dim <= 128 and s.name not in ("one_token_frames", "demo")]
seeds = itertools.count()


@pytest.fixture(scope="module")
def programs():
    return Program(SOURCE), Program(BACKWARD)


def backend(programs):
    """The launchers of the CUDA backend, on the executor; every launch under another schedule."""

    def launch(name, given, blocks, threads, shared, reads, writes):
        program = programs[not name.startswith("grid_attention_forward")]
        program.run(name, given, blocks=blocks, threads=threads, shared=shared, reads=reads, writes=writes, seed=next(seeds))

    return registry.Backend(
        "cuda-executed", lambda q, k, v, *rest: cuda.why_not(q, k, v), op._run_with(functools.partial(cuda.forward, launch=launch)),
        op._run_backward_with(functools.partial(cuda.backward, launch=launch)),
    )  # fmt: skip


def install(monkeypatch, programs):
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend(programs)))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


@pytest.fixture
def executed(programs, monkeypatch):
    install(monkeypatch, programs)


# Every head dim, layout, mask and way of grouping; patterns are in the plans' tables alone, which tests/triton/test_plan.py counts.
QUICK = ("cross_token_major", "gqa", "mqa_blhd", "one_frame", "text_back_len", "frames_masked", "dim_8", "dim_128")


def cases():
    """The quick ones in one dtype, in the other one and all others, two of them in both, in the slow run."""
    for i, sample in enumerate(SAMPLES):
        dtypes = [torch.bfloat16, torch.float16]
        if i % 2 or sample.name == "text_front":  # it draws a dS in the middle between two values of float16
            dtypes.reverse()
        quick = sample.name in QUICK
        for n, dtype in enumerate(dtypes if quick or sample.name in ("causal_anchor", "part_view") else dtypes[:1]):
            marks = [pytest.mark.slow] * (n > 0 or not quick)
            yield pytest.param(sample, dtype, id=f"{sample.name}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("sample, dtype", list(cases()))
def test_accuracy(executed, sample, dtype):
    with accuracy.poisoned():
        accuracy.check("grid_attention", sample, dtype, "cuda-executed", seeds=range(accuracy.draws("grid_attention", sample, dtype)))


def attend(impl, dtype=torch.bfloat16, grid=(2, 3), frame_len=37, dim=40, seed=0, hidden=None, deep=0.0, **rules):
    """Output, lse, and gradients of both, of a straddling, odd-sized problem of two heads on one key head: in bfloat16 on a backend or in
    float64 on the reference. ``hidden``: tokens that hold NaN; ``deep``: shifts q up and k down, and with them every logit."""
    g = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1] * frame_len + rules.get("n_text", 0)
    q, k, v, weight = (torch.randn(1, h, length, dim, generator=g).to(dtype) for h in (2, 1, 1, 2))
    q, k = q + deep, k - deep
    if hidden is not None:
        for t in (q, k, v):
            t[:, :, hidden] = torch.nan
    exact = impl == "reference"
    leaves = [(t.double() if exact else t).requires_grad_() for t in (q, k, v)]
    out, lse = vidkern.grid_attention(*leaves, grid=grid, impl=impl, return_lse=True, **rules)
    loss = (out * weight.to(out.dtype)).sum() + torch.where(lse.isneginf(), 0.0, lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def wrong(impl, **rules) -> float:
    """Largest error of the output, the lse and the gradients against the exact result, in units of the largest value (lse: of 1)."""
    with accuracy.poisoned():
        ours = attend(impl, **rules)
    worst = 0.0
    for i, (a, b) in enumerate(zip(ours, attend("reference", **rules))):
        # Rows that see nothing have an lse of -inf in both.
        error = torch.where(a == b, 0.0, (a.double() - b).abs()).nan_to_num(9).max().item()
        worst = max(worst, error / (1 if i == 1 else b.abs().max().item()))
    return worst


def test_rules_at_once(executed):
    """Negative scale, text, dead frames and short ones, windows, GQA, a head dim that fills no fragment."""
    rules = {"n_text": 5, "causal_time": True, "scale": -0.3, "text_len": torch.tensor([3]),
             "valid": torch.tensor([[True, True, False], [True, True, True]]), "kv_len": torch.tensor([[37, 0, 37], [1, 30, 37]])}  # fmt: skip
    assert wrong("cuda-executed", **rules) < 0.01
    assert wrong("cuda-executed", scale=-0.3) < 0.01
    assert wrong("cuda-executed", grid=(4, 6), frame_len=1) < 0.01
    # The dead frame holds NaN.
    assert wrong("cuda-executed", **rules, hidden=slice(5 + 2 * 37, 5 + 3 * 37)) < 0.01


def test_a_visible_nan_stays_with_those_who_see_it(executed):
    """Also in a tile whose rows lie in two frames, of which one sees it."""
    g = torch.Generator().manual_seed(0)
    pattern = vidkern.FramePattern.from_lists([[0], [1], [1, 2]])
    q, k, v = (torch.randn(1, 1, 60, 16, generator=g).bfloat16() for _ in range(3))
    v[:, :, 25] = torch.nan
    out = vidkern.frame_sparse_attention(q, k, v, pattern, impl="cuda-executed")
    assert not out[:, :, :20].isnan().any() and out[:, :, 20:].isnan().all()


@pytest.mark.parametrize("dtype, for_dq", [(torch.bfloat16, 3), (torch.float16, 4)])
def test_products_are_those_of_the_plan(executed, monkeypatch, dtype, for_dq):
    """The work done is the work counted: of every tile of a plan two products forward, three for dQ, or four where it takes dS whole, and, of
    the plan turned round and for both query heads, four for dK and dV."""
    counted = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *args, **more: counted.append(run(self, *args, **more)))
    attend("cuda-executed", dtype, grid=(3, 2), frame_len=100, dim=64)

    def columns(transposed):
        tiles = cuda._tables(cuda.Shape(vidkern.GridPattern(3, 2).key, 100, 0, False, transposed), torch.device("cpu")).tiles
        return int((tiles[:, 3] * 64 + tiles[:, 5] * 32).sum()) * cuda.ROWS * 64 // (16 * 8 * 16)

    expected = [2 * 2 * columns(False), 0, for_dq * 2 * columns(False), 4 * 2 * columns(True)]
    assert [c["products"] for c in counted] == expected


@pytest.mark.parametrize("dim", [40, 128])
def test_ds_is_whole_in_float16_for_dq(executed, dim):
    """Equal weights, values that cancel and keys of ones: a row of dS sums to 0, and what dQ holds is what its rounding left. In bfloat16
    that is half steps of each dS."""
    g = torch.Generator().manual_seed(0)
    length = 96  # a main tile and an edge tile
    v = torch.stack([torch.where(torch.randperm(length, generator=g) % 2 == 0, 1.0, -1.0) for _ in range(dim)], -1)[None, None]
    weight = 64 * torch.randn(1, 1, length, dim, generator=g)
    left = {}
    for dtype in (torch.float16, torch.bfloat16):
        leaves = [t.to(dtype).requires_grad_() for t in (torch.zeros_like(v), torch.ones_like(v), v)]
        out = vidkern.grid_attention(*leaves, grid=(1, 1), scale=1.0, impl="cuda-executed")
        (dq,) = torch.autograd.grad(out, leaves[:1], weight.to(dtype))
        largest = (weight @ v.transpose(2, 3)).abs().max().item() / length
        left[dtype] = dq.abs().max().item() / largest
    assert left[torch.float16] < 2**-16 and left[torch.bfloat16] > 2**-8, left


# Several tiles and a dead frame; a single tile, where no barrier of the loop comes between a row's loads and its output; and logits of about
# -100, beside which a dead key's zeros would weigh e^100.
DEAD = {"valid": torch.tensor([[True] * 3, [True, False, True]])}
PROBLEMS = ({"scale": -0.16, **DEAD}, {"grid": (1, 1), "frame_len": 20}, {"deep": 4.0, **DEAD})
SOUND = 0.012  # what sound kernels stay below in all of them
TAIL = "    block_barrier();\n    if (i + 1 < count) ask(i + 1);\n", "    if (i + 1 < count) ask(i + 1);\n    block_barrier();\n"
FAULTS = {
    "no wait": (SOURCE, "    copies_wait<0>();\n", ""),
    "no barrier": (SOURCE, "    block_barrier();\n", ""),
    "the next tile asked for before the barrier": (SOURCE, *TAIL),
    "one stage for all values": (SOURCE, "stage(i % 2 * 2 + 1).fill", "stage(1).fill"),
    "a column too many": (SOURCE, "votes(column < at.end", "votes(column <= at.end"),
    "a row too many": (SOURCE, "mine >= at.row_first && mine < at.row_end", "mine >= at.row_first && mine <= at.row_end"),
    "sum of one lane": (SOURCE, "quad_sum(r.total[h])", "r.total[h]"),
    "sign of a negative scale": (SOURCE, "g.scale_log2 < 0 ? 0x80008000u : 0u", "g.scale_log2 < 0 ? 0x8000u : 0u"),
    "fragment rows swapped": (None, "chunk(row + (m & 1) * 8 + l % 8, 2 * k + (m >> 1))", "chunk(row + (m >> 1) * 8 + l % 8, 2 * k + (m & 1))"),
    "another swizzle for one reader": (None, "load_matrices(w, chunk(", "load_matrices(w, (Tile<DIM>{base + 16}).chunk("),
    "a chunk past the head dim": (None, "c * CHUNK < dim &&", "c * CHUNK < dim + 8 &&"),
    "no barrier before the rows that leave": (None, "  warp_barrier();\n  VK_UNROLL\n", "  VK_UNROLL\n"),
    "no barrier among the rows that leave": (None, "  warp_barrier();\n  for (i32 i = i32(lane", "  for (i32 i = i32(lane"),
    "backward: a log-sum-exp in the wrong base": (BACKWARD, "load(lse + mine * g.lse_step.token) * LOG2E", "load(lse + mine * g.lse_step.token)"),
    "backward: no Delta for keys": (BACKWARD, "p * (d[n].v[2 * h + j] - less)", "p * d[n].v[2 * h + j]"),
    "backward: one head of a group": (BACKWARD, "count = each * g.group;", "count = each;"),
    "backward: a query too many": (BACKWARD, "!EDGE_TILE || column < c.end", "!EDGE_TILE || column <= c.end"),
    "backward: dead keys seen": (BACKWARD, "(!LIVE || (load(g.live + at.batch * g.live_step + column) & 1))", "true"),
    "backward: gradients of dead keys": (BACKWARD, "if (mine < at.row_end && !(load(", "if (false && !(load("),
    "backward: half of a tile's columns": (BACKWARD, "first < MAIN; first += HALF", "first < HALF; first += HALF"),
    "backward: Delta of four lanes": (BACKWARD, "for (u32 mask = 4; mask < WARP; mask *= 2)", "for (u32 mask = 4; mask < 4; mask *= 2)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(programs):
    """Programs with a fault each; the one that an edit does not concern stays sound."""

    def others(source):
        """The kernels that PROBLEMS do not launch, which take most of the compiler's time, left out."""
        return [(line, "") for line in source.read_text().splitlines() if line.startswith("VK_") and re.search(r"\bf16|\b128", line)]

    def build(fault):
        where, *edit = FAULTS[fault]
        return tuple(
            Program(source, edit, *others(source)) if where in (source, None) else sound for source, sound in zip((SOURCE, BACKWARD), programs)
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(build, FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault, monkeypatch):
    """By a rule of the executor or by a wrong result."""
    install(monkeypatch, faulty[fault])
    try:
        errors = [wrong("cuda-executed", **problem) for problem in PROBLEMS]
    except KernelError:
        return
    assert max(errors) > 2 * SOUND


def test_what_faults_are_told_from(executed):
    assert max(wrong("cuda-executed", **problem) for problem in PROBLEMS) < SOUND


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", *(pytest.param(a, marks=pytest.mark.slow) for a in ("89", "90", "100", "120"))])
@pytest.mark.parametrize("source", [SOURCE, BACKWARD], ids=["forward", "backward"])
def test_machine_code(source, architecture):
    """Nothing spilled; products, matrix loads, asynchronous copies and 16-byte stores as meant."""
    kernels = machine_code(source, architecture)
    assert len(kernels) == (8 if source is SOURCE else 18)
    for name, code in kernels.items():
        assert not code["spilled"], (name, code)
        if "delta" in name:
            assert code["LDG.E.128"] >= 2, (name, code)
            continue
        assert code["HMMA"] and code["LDSM"] and code["LDGSTS"] and code["STG.E.128"], (name, code)
        if source is SOURCE:
            # Q K^T and P V of a main and of an edge tile, all unrolled; one ldmatrix for two products, and the queries'.
            dim = 128 if "128" in name else 64
            assert code["HMMA"] == 2 * (64 + 32) // 8 * dim // 16, (name, code)
            assert code["LDSM"] == code["HMMA"] // 2 + dim // 16, (name, code)
