"""Every primitive's model against the tables of the PTX manual, written out here, and every rule of the executor broken once."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vidkern.ops.pyramid import philox

from harness import KernelError, Program, machine_code, nvcc, structure

SOURCE = Path(__file__).parent / "primitives.cu"


@pytest.fixture(scope="module")
def program():
    return Program(SOURCE)


def halves(words):
    """[..., n] int32 words -> [..., 2 n] 16-bit patterns, low half first."""
    return words.contiguous().view(torch.int16)


# "Matrix Fragments for mma.m16n8k16 with floating point type": groupID = lane >> 2, threadID_in_group = lane % 4; value i of
# A: row = groupID for i in 0, 1, 4, 5 and groupID + 8 for 2, 3, 6, 7; col = threadID_in_group * 2 + (i & 1), + 8 for i >= 4.
# B: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2; col = groupID.
# C: row = groupID for i < 2, else groupID + 8; col = threadID_in_group * 2 + (i & 1).
def place_a(lane, i):
    return (lane >> 2) + (8 if i in (2, 3, 6, 7) else 0), lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_b(lane, i):
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def place_c(lane, i):
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def spread(matrix, place, n):
    """A matrix as the registers of 32 lanes, [32, n] values."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(n)]) for lane in range(32)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(program, dtype):
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=g) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    words = [spread(m, place, n).view(torch.int32) for m, place, n in ((a, place_a, 8), (b, place_b, 4))]
    registers, d = spread(c, place_c, 4), torch.full((32, 4), torch.nan)
    name = "product_bf16" if dtype is torch.bfloat16 else "product_f16"
    counts = program.run(name, structure(a=words[0], b=words[1], c=registers, d=d), blocks=1, threads=32, reads=[*words, registers], writes=[d])
    assert counts["products"] == 1
    torch.testing.assert_close(d.double(), spread(c.double() + a.double() @ b.double(), place_c, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(program, transposed):
    """ "ldmatrix": row r of matrix m is at the address of lane 8 m + r; lane l receives of each matrix row l / 4, elements 2 (l % 4) and next;
    with .trans of the transposed one."""
    values = torch.arange(256, dtype=torch.int16)
    got = torch.zeros(32, 4, dtype=torch.int32)
    program.run("matrices", structure(**{"from": values, "to": got, "kind": int(transposed)}), blocks=1, threads=32, shared=512, reads=[values],
                writes=[got])  # fmt: skip
    matrices = values.view(4, 8, 8)
    matrices = matrices.mT if transposed else matrices
    for lane in range(32):
        for m in range(4):
            expected = matrices[m, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert halves(got[lane, m : m + 1]).tolist() == expected.tolist()


@pytest.mark.parametrize("bytes_", [16, 10, 0])
def test_copies(program, bytes_):
    """ "cp.async": bytes beyond src-size are zeros."""
    values, got = torch.arange(1, 513, dtype=torch.int16), torch.zeros(512, dtype=torch.int16)
    counts = program.run("copies", structure(**{"from": values, "to": got, "kind": bytes_}), blocks=1, threads=64, shared=1024, reads=[values],
                         writes=[got], seed=3)  # fmt: skip
    expected = values.view(64, 8).clone()
    expected[:, bytes_ // 2 :] = 0
    assert torch.equal(got.view(64, 8), expected) and counts["copies"] == 64


def test_quads_and_numbers(program):
    values = torch.randn(32) * torch.logspace(-9, 5, 32)
    values[:4] = torch.tensor([65520.0, 6e-8, torch.inf, -2049.0])
    everything = torch.zeros(129)
    program.run("quads", structure(**{"from": values, "to": everything}), blocks=1, threads=32, reads=[values], writes=[everything])
    got, positive = everything[:128].view(32, 4), everything[128:].view(torch.int32)
    assert [bool(positive.item() >> lane & 1) for lane in range(32)] == (values > 0).tolist()
    quads = values.view(8, 4)
    pairs = quads.view(8, 2, 2).sum(2)  # lanes add in pairs, so that all four have the same
    assert torch.equal(got[:, 0].view(8, 4), pairs.sum(1, keepdim=True).expand(8, 4))
    assert torch.equal(got[:, 1].view(8, 4), quads.amax(1, keepdim=True).expand(8, 4))
    assert torch.equal(got[:, 2], values.bfloat16().float()) and torch.equal(got[:, 3], values.half().float())


def test_every_half_widens(program):
    """All 65,536 patterns: through pack and low of a NaN-free float16."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    finite = bits.view(torch.float16).float()
    finite = finite[finite.isfinite()]
    got = torch.zeros(129)
    for part in finite[: len(finite) // 32 * 32].split(32):
        program.run("quads", structure(**{"from": part, "to": got}), blocks=1, threads=32, reads=[part], writes=[got])
        assert torch.equal(got[:128].view(32, 4)[:, 3], part)


@pytest.mark.parametrize("seed", range(5))
def test_named_barriers(program, seed):
    values, got = torch.randn(128), torch.zeros(128)
    program.run("pairs", structure(**{"from": values, "to": got}), blocks=1, threads=128, shared=512, reads=[values], writes=[got], seed=seed)
    assert torch.equal(got, values.view(2, 2, 32).flip(1).reshape(128))


def test_numbers(program):
    """Against float64, which holds a product of two float32 exactly."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, generator=g).abs(), torch.randn(32, generator=g)
    c, got = -(a * b), torch.zeros(32, 4)  # what is left of a b + c are the bits that a product of its own drops
    program.run("numbers", structure(a=a, b=b, c=c, to=got), blocks=1, threads=32, reads=[a, b, c], writes=[got])
    assert torch.equal(got[:, 0].double(), a.double() * b.double() + c.double()) and got[:, 0].any()
    assert not got[:, 1].any() and torch.equal(got[:, 2], a.double().sqrt().float()) and torch.equal(got[:, 3], -a)


@pytest.mark.parametrize("seed, offset, sample, first", [(0, 0, 0, 0), (0x7BADC0DEDEADBEEF, 0xFFFFFFFF, 0x9ABCDEF0, (1 << 33) + 1)])
def test_noise_is_that_of_the_generator(program, seed, offset, sample, first):
    """From any element on, beyond 2^32 too: within 4 ulp of Box-Muller in float64 on the words of the reference."""
    got, words = torch.zeros(32, 8), [seed & 0xFFFFFFFF, seed >> 32, 3, sample, offset]
    fields = {f"word{i}": (ctypes.c_uint32, w) for i, w in enumerate(words)}
    program.run("drawn", structure(to=got, first=(ctypes.c_int64, first), **fields), blocks=1, threads=32, writes=[got])
    at = first + 9 * torch.arange(32)[:, None] + torch.arange(8)
    blocks = at // 4
    rest = (torch.full_like(blocks, v) for v in (3, sample, offset))
    made = torch.stack(philox.philox4x32((blocks, *rest), (seed & 0xFFFFFFFF, seed >> 32)), -1)
    exact = philox.box_muller(made.unflatten(-1, (2, 2))).flatten(-2).gather(-1, (at % 4)[..., None])[..., 0]
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 23)
    assert ((got.double() - exact).abs() / unit).max() <= 4


FAULTS = {
    "no barrier after the wait": ("copies", ("  copies_wait<0>();\n  block_barrier();", "  copies_wait<0>();"), "race: read of shared|which nothing was written to|is under way"),
    "no wait": ("copies", ("  copies_wait<0>();\n", ""), "is under way"),
    "a wait for the group before": ("copies", ("copies_wait<0>", "copies_wait<1>"), "is under way"),
    "no commit before the wait": ("copies", ("  copies_commit();\n", ""), "is under way"),
    "no barrier between lanes": ("matrices", ("  warp_barrier();\n", ""), "race: read of shared|which nothing was written to"),
    "half the threads at a barrier": ("copies", ("  block_barrier();", "  if (t < 32) block_barrier();"), "waits for ever for barrier.sync|race|which nothing was written to"),
    "a barrier for too few": ("pairs", ("named_barrier(1 + pair, 64)", "named_barrier(1, 64)"), "race: read|which nothing was written to"),
    "lanes part at a shuffle": ("quads", ("store(p.to + lane * 4, quad_sum(v));", "if (lane < 7) quad_sum(v);"), "lanes of a warp part|waits for ever"),
    "beyond the tensor": ("copies", ("static_cast<const u8*>(p.from) + t * 16, ", "static_cast<const u8*>(p.from) + t * 16 + 16, "), "outside every tensor"),
    "misaligned": ("copies", ("load16(all + i32(other * 16))", "load16(all + i32(other * 16 - 8))"), "not aligned to 16"),
    "beyond shared memory": ("copies", ("copy16(all + i32(t * 16)", "copy16(all + i32(t * 32)"), "only 1024 are there"),
    "never written": ("copies", ("load16(all + i32(other * 16))", "load16(all + i32(1024 + other * 16))"), "which nothing was written to"),
    "written by two": ("copies", ("store16(p.to + other * 4, w)", "store16(p.to + other / 2 * 4, w)"), "two threads write one global address"),
    "an input written": ("pairs", ("store(p.to + t, ", "store(const_cast<float*>(p.from) + t, "), "write to an input"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(lambda f: Program(SOURCE, f[1]), FAULTS.values())))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_told(faulty, fault):
    """On every schedule, with file and line."""
    name, _, message = FAULTS[fault]
    shared = {"copies": 2048 if fault == "never written" else 1024, "matrices": 512, "pairs": 512, "quads": 0}[name]
    threads = {"copies": 64, "matrices": 32, "pairs": 128, "quads": 32}[name]
    values, got = (torch.arange(512, dtype=torch.int16), torch.zeros(512, dtype=torch.int16))
    if name in ("pairs", "quads"):
        values, got = torch.randn(128), torch.zeros(129)
    more = {} if name in ("pairs", "quads") else {"kind": 16 if name == "copies" else 0}
    for seed in range(8):
        with pytest.raises(KernelError, match=message) as error:
            faulty[fault].run(name, structure(**{"from": values, "to": got, **more}), blocks=1, threads=threads, shared=shared, reads=[values],
                              writes=[got], seed=seed)  # fmt: skip
        assert "primitives.cu:" in str(error.value) or ".h:" in str(error.value)


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_nvcc_makes_the_instructions_that_are_meant():
    code = machine_code(SOURCE, "80")
    assert code["product_bf16"]["HMMA"] == code["product_f16"]["HMMA"] == 1
    assert code["matrices"]["LDSM"] == 2 and code["matrices"]["LDG.E.128"] == 1
    assert code["copies"]["LDGSTS"] == 1 and code["copies"]["STG.E.128"] == 1 and code["copies"]["BAR"] == 1
    assert all(not kernel["spilled"] for kernel in code.values())
