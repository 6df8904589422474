"""The CUDA kernels of grid attention, executed: the accuracy rule on every sample, hidden NaN, and seeded faults that must be told."""

import dataclasses
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vidkern
from vidkern import registry
from vidkern.ops import grid_attention as op
from vidkern.ops.grid_attention import cuda, reference
from vidkern.verify import accuracy, rooms

from harness import CSRC, KernelError, Program, machine_code, nvcc

SOURCE = CSRC / "cuda" / "grid_attention.cu"
SAMPLES = [s for s in rooms.room("grid_attention").samples if s.dim <= 128]
seeds = itertools.count()


@pytest.fixture(scope="module")
def program():
    return Program(SOURCE)


def backend(program):
    def launch(name, given, blocks, threads, shared, reads, writes):
        program.run(name, given, blocks=blocks, threads=threads, shared=shared, reads=reads, writes=writes, seed=next(seeds))

    def forward(*args, **more):
        cuda.forward(*args, **more, launch=launch)

    return registry.Backend("cuda-executed", lambda q, k, v, *rest: cuda.why_not(q, k, v), op._run_with(forward), op._run_backward_with(
        lambda *args, dq, dk, dv, **more: [t.copy_(g) for t, g in zip((dq, dk, dv), reference.backward(*args, **more))]))  # fmt: skip


@pytest.fixture
def executed(program, monkeypatch):
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend(program)))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})


@pytest.fixture
def forward_only(monkeypatch):
    room = dataclasses.replace(rooms.room("grid_attention"), differentiable=False)
    monkeypatch.setattr(accuracy, "room", lambda name: room)


def redundant(sample, dtype) -> bool:
    """Left to the slow run: the largest samples, and of the others one of two dtypes."""
    return sample.name in ("one_token_frames", "demo") or SAMPLES.index(sample) % 2 != (dtype is torch.float16)


@pytest.mark.parametrize(
    "sample, dtype",
    [
        pytest.param(s, d, id=f"{s.name}-{str(d)[6:]}", marks=[pytest.mark.slow] * redundant(s, d))
        for s in SAMPLES
        for d in (torch.bfloat16, torch.float16)
    ],
)
def test_accuracy(executed, forward_only, sample, dtype):
    with accuracy.poisoned():
        accuracy.check("grid_attention", sample, dtype, "cuda-executed", seeds=range(2))


def attend(impl, dtype=torch.bfloat16, grid=(2, 3), frame_len=37, dim=40, seed=0, hidden=None, **rules):
    """A straddling, odd-sized problem of two heads on one key head, in bfloat16 on a backend or in float64 on the reference."""
    g = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1] * frame_len + rules.get("n_text", 0)
    q, k, v = (torch.randn(1, h, length, dim, generator=g).to(dtype) for h in (2, 1, 1))
    if hidden is not None:
        for t in (q, k, v):
            t[:, :, hidden] = torch.nan
    if impl == "reference":
        q, k, v = q.double(), k.double(), v.double()
    return vidkern.grid_attention(q, k, v, grid=grid, impl=impl, return_lse=True, **rules)


def wrong(impl, **rules) -> float:
    """Largest error of the output and of the lse against the exact result."""
    with accuracy.poisoned():
        ours = attend(impl, **rules)
    exact = attend("reference", **rules)
    # Rows that see nothing have an lse of -inf in both.
    return max(torch.where(a == b, 0.0, (a.double() - b).abs()).nan_to_num(9).max().item() for a, b in zip(ours, exact))


def test_rules_at_once(executed):
    """Negative scale, text, dead frames and short ones, windows, GQA, a head dim that fills no fragment."""
    rules = {"n_text": 5, "causal_time": True, "scale": -0.3, "text_len": torch.tensor([3]),
             "valid": torch.tensor([[True, True, False], [True, True, True]]), "kv_len": torch.tensor([[37, 0, 37], [1, 30, 37]])}  # fmt: skip
    assert wrong("cuda-executed", **rules) < 0.01
    assert wrong("cuda-executed", scale=-0.3) < 0.01
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


def test_products_are_those_of_the_plan(program, executed, monkeypatch):
    """The work done is the work counted: 16 x 8 x 16 products of every tile of the plan, twice (Q K^T and P V)."""
    counted = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *args, **more: counted.append(run(self, *args, **more)))
    attend("cuda-executed", grid=(3, 2), frame_len=100, dim=64)
    tiles = cuda._tables(cuda.Shape(vidkern.GridPattern(3, 2).key, 100, 0, False, False), torch.device("cpu")).tiles
    columns = int((tiles[:, 3] * 64 + tiles[:, 5] * 32).sum())
    assert counted[0]["products"] == 2 * 2 * columns * cuda.ROWS * 64 // (16 * 8 * 16)


SOUND = 0.004  # what sound kernels stay below in the two problems
FAULTS = {
    "no wait": ("    copies_wait<0>();\n", ""),
    "no barrier": ("    block_barrier();\n", ""),
    "the next tile asked for before the barrier": (
        "    block_barrier();\n    if (i + 1 < count) ask(i + 1);\n", "    if (i + 1 < count) ask(i + 1);\n    block_barrier();\n"),
    "a stage too few": ("stage(i % 2 * 2 + 1).template fill", "stage(1).template fill"),
    "a column too many": ("votes(column < at.end", "votes(column <= at.end"),
    "a row too many": ("sees[h] = mine >= at.row_first && mine < at.row_end", "sees[h] = mine >= at.row_first && mine <= at.row_end"),
    "fragment rows swapped": ("chunk(row + (m & 1) * 8 + l % 8, 2 * k + (m >> 1))", "chunk(row + (m >> 1) * 8 + l % 8, 2 * k + (m & 1))"),
    "swizzle of one reader": ("load_matrices(w, chunk(", "load_matrices(w, (Tile<DIM>{base + 16}).chunk("),
    "rounded tail": ("c * CHUNK < dim;", "c * CHUNK < dim + 8;"),
    "sum of one lane": ("quad_sum(r.total[h])", "r.total[h]"),
    "no barrier before the output's rows": ("  // Through this warp's own rows of shared memory, so that rows leave 16 bytes at a time.\n  warp_barrier();\n", ""),
    "no barrier after the output's rows": ("  warp_barrier();\n  T* out", "  T* out"),
    "sign of a negative scale": ("g.scale_log2 < 0 ? 0x80008000u : 0u", "g.scale_log2 < 0 ? 0x8000u : 0u"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(lambda edit: Program(SOURCE, edit), FAULTS.values())))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty, fault, monkeypatch):
    """By a rule of the executor or by a wrong result."""
    monkeypatch.setattr(op.OP, "backends", (*op.OP.backends, backend(faulty[fault])))
    monkeypatch.setattr(op.OP, "_by_name", {b.name: b for b in op.OP.backends})
    try:
        # The second has one tile: no barrier of the loop comes between its rows' loads and their output.
        errors = [wrong("cuda-executed", scale=-0.16), wrong("cuda-executed", grid=(1, 1), frame_len=20)]
    except KernelError:
        return
    assert max(errors) > 3 * SOUND


def test_what_faults_are_told_from(executed):
    assert max(wrong("cuda-executed", scale=-0.16), wrong("cuda-executed", grid=(1, 1), frame_len=20)) < SOUND


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", *(pytest.param(a, marks=pytest.mark.slow) for a in ("89", "90", "100", "120"))])
def test_machine_code(architecture):
    """Nothing spilled; products, matrix loads, asynchronous copies and 16-byte stores as meant."""
    kernels = machine_code(SOURCE, architecture)
    assert len(kernels) == 8
    for name, code in kernels.items():
        dim = 128 if "128" in name else 64
        assert not code["spilled"], (name, code)
        # Q K^T and P V of a main and of an edge tile.
        assert code["HMMA"] == 2 * (64 + 32) // 8 * dim // 16, (name, code)
        assert code["LDSM"] == code["HMMA"] // 2 + dim // 16 and code["LDGSTS"] and code["STG.E.128"], (name, code)
