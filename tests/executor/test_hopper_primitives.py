"""The models of compute capability 9.0's primitives against what the PTX manual says of them, written out here, and every rule broken once."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vidkern.cuda.tensor_map import TensorMap, parameters

from harness import KernelError, Launch, Program, machine_code, nvcc, structure, tensor_map

SOURCE = Path(__file__).parent / "primitives_hopper.cu"
ROWS, STEPS = 16, 6
BYTES = 128 * ROWS
SEEDS = range(12)  # with every eagerness of copies among them

BOX = parameters("Box", [("map", TensorMap), ("to", ctypes.c_void_p), ("first", ctypes.c_int32 * 4), ("at", ctypes.c_uint32), ("bytes", ctypes.c_uint32)])  # fmt: skip
REFILL = parameters("Refill", [("map", TensorMap), ("to", ctypes.c_void_p), ("kind", ctypes.c_int32)])
BOXES = parameters("Boxes", [("map", TensorMap), ("to", ctypes.c_void_p)])


@pytest.fixture(scope="module")
def program():
    return Program(SOURCE)


def numbered(*shape):
    """All different and none zero, as bfloat16 patterns."""
    n = torch.Size(shape).numel()
    return (torch.arange(n) % 65535 + 1).to(torch.int16).view(torch.bfloat16).view(shape)


# "Tensor Swizzling Modes", 128-byte mode: which 16-byte chunk of a row stands at each of its eight places, for the eight lines of 128 bytes
# that follow an address that is a multiple of 1024; then again.
PLACES = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [1, 0, 3, 2, 5, 4, 7, 6],
    [2, 3, 0, 1, 6, 7, 4, 5],
    [3, 2, 1, 0, 7, 6, 5, 4],
    [4, 5, 6, 7, 0, 1, 2, 3],
    [5, 4, 7, 6, 1, 0, 3, 2],
    [6, 7, 4, 5, 2, 3, 0, 1],
    [7, 6, 5, 4, 3, 2, 1, 0],
]


def swizzled(rows, at=0):
    """[..., 64] values as lines of shared memory from byte `at` on, [..., 64] int16."""
    chunks = rows.contiguous().view(torch.int16).view(-1, 8, 8)
    lines = [row[PLACES[(at // 128 + i) % 8]] for i, row in enumerate(chunks)]
    return torch.stack(lines).view(rows.shape)


def fetched(program, t, map_, first, box, *, at=1024, seed=0, reads=None):
    lines = torch.Size(box[1:]).numel()
    got = torch.full((lines, 64), -1, dtype=torch.int16)
    given = BOX(map_, got.data_ptr(), (ctypes.c_int32 * 4)(*first), at, 128 * lines)
    how = {"blocks": 1, "threads": 64, "shared": at + 128 * lines, "reads": [t] if reads is None else reads, "writes": [got], "seed": seed}
    counts = program.run(f"box{len(box)}", given, **how)
    assert counts["boxes"] == 1
    return got


def cut(t, first, box):
    """The box that begins at `first` of a tensor, innermost dimension last; outside, zeros ("Tensor Access modes: Tiled mode": out-of-bound
    elements are filled with zeros)."""
    got = torch.zeros(box, dtype=t.dtype)
    inside = [(max(f, 0), min(f + n, size)) for f, n, size in zip(first, box, t.shape)]
    if all(b < e for b, e in inside):
        got[tuple(slice(b - f, e - f) for (b, e), f in zip(inside, first))] = t[tuple(slice(b, e) for b, e in inside)]
    return got


@pytest.mark.parametrize("at", [1024, 1024 + 3 * 128])
@pytest.mark.parametrize("first", [(0, 0), (5, 64), (-3, -7), (30, 70), (-16, 0), (0, 100), (2, -64), (1 << 20, 0)])
def test_boxes_of_two_dimensions(program, first, at):
    """Rows outside are zeros, and so is what a row has outside; all bytes of the box count. The swizzle is one of addresses."""
    t = numbered(40, 104)[:, :100]  # rows 104 apart
    map_ = tensor_map(t, (100, 40), (104,), (64, ROWS))
    got = fetched(program, t, map_, first[::-1], (64, ROWS), at=at, seed=at + first[0])
    assert torch.equal(got, swizzled(cut(t, first, (ROWS, 64)), at))


def test_boxes_of_four_dimensions(program):
    """The second dimension runs fastest among rows; strides need not grow."""
    t = numbered(3, 5, 4, 72).transpose(0, 1)  # [5, 3, 4, 72]
    strides = (t.stride(2), t.stride(1), t.stride(0))
    map_ = tensor_map(t, (72, 4, 3, 5), strides, (64, 2, 2, 4))
    for first in ((0, 0, 0, 0), (3, 1, -1, 8), (-2, 2, 3, -8), (1, 1, 2, 9)):
        got = fetched(program, t, map_, first[::-1], (64, 2, 2, 4), seed=first[0] + 4)
        assert torch.equal(got.view(4, 2, 2, 64), swizzled(cut(t, first, (4, 2, 2, 64)).view(16, 64)).view(4, 2, 2, 64))


def test_what_a_tensor_map_cannot_say():
    t = numbered(8, 64)
    for sizes, strides, box in (((64, 8), (60,), (64, 8)), ((64, 8), (64,), (64, 257)), ((64, 8), (64,), (72, 8)), ((64, 8), (64,), (32, 8))):
        with pytest.raises(ValueError, match="strides|box"):
            tensor_map(t, sizes, strides, box)
    with pytest.raises(ValueError, match="16"):
        tensor_map(t[:, 4:], (60, 8), (64,), (64, 8))


def test_maps_stay_inside_what_the_launch_names(program):
    t = numbered(40, 64)
    for sizes, reads in (((64, 41), [t]), ((64, 40), [t[:39]]), ((64, 40), [])):
        with pytest.raises(KernelError, match=r"copy of a box at primitives_hopper.cu:\d+: the tensor .* reaches outside every tensor"):
            fetched(program, t, tensor_map(t, sizes, (64,), (64, ROWS)), (0, 0), (64, ROWS), reads=reads)
    with pytest.raises(KernelError, match="expected a multiple of 128"):
        fetched(program, t, tensor_map(t, (64, 40), (64,), (64, ROWS)), (0, 0), (64, ROWS), at=1024 + 64)
    with pytest.raises(KernelError, match="by 2 coordinates, where the tensor map has 3 dimensions"):
        fetched(program, t, tensor_map(t, (64, 40, 1), (64, 64), (64, ROWS, 1)), (0, 0), (64, ROWS))


def run(program, name, seed):
    """A kernel under a schedule; what it wrote, and what it should have written."""
    how = {"blocks": 1, "threads": 64, "shared": 1024 + 2 * BYTES, "seed": seed}
    if name in ("phases", "readers", "shares", "remote"):
        threads, blocks = {"phases": (64, 1), "readers": (64, 1), "shares": (384, 1), "remote": (32, 4)}[name]
        given = torch.arange(100, 484, dtype=torch.int32)[: 384 if name == "shares" else STEPS * 32]
        right = torch.tensor([0, 1, 0, 1], dtype=torch.int32) if name == "remote" else given
        right = given[:1].repeat(2) if name == "readers" else right
        got = torch.full_like(right, -1)
        counts = program.run(name, structure(**{"from": given, "to": got}), **{**how, "threads": threads, "blocks": blocks}, reads=[given], writes=[got])
        return got, right, counts
    t = numbered(2 * STEPS * ROWS, 64)
    map_ = tensor_map(t, (64, len(t)), (64,), (64, ROWS))
    right = swizzled(t)
    if name.startswith("refill"):
        got = torch.full((ROWS, 64), -1, dtype=torch.int16)
        counts = program.run("refill", REFILL(map_, got.data_ptr(), name == "refill by the asker"), **how, reads=[t], writes=[got])
        return got, right[:ROWS], counts
    if name == "pipeline":
        how["threads"], right = 96, right[: STEPS * ROWS]
    else:
        how["blocks"], right = 4, right.repeat(4, 1)
    got = torch.full_like(right, -1)
    counts = program.run(name, BOXES(map_, got.data_ptr()), **how, reads=[t], writes=[got])
    return got, right, counts


@pytest.mark.parametrize("name", ["phases", "readers", "refill", "refill by the asker", "pipeline", "remote", "halves", "shares"])
def test_what_is_sound_runs_on_every_schedule(program, name):
    """ "mbarrier.try_wait": a wait for a parity returns when the current phase has the other one, so at once for the one before the first.
    "cp.async.bulk.tensor": .multicast::cluster writes the same place of each block and signals the barrier there. "mapa": arrivals at another
    block. "setmaxnreg": 24 + 2 x 240 registers fit 3 x 168."""
    for seed in SEEDS:
        got, right, counts = run(program, name, seed)
        assert torch.equal(got, right)
    assert counts["boxes"] == {"pipeline": STEPS, "halves": 4 * STEPS}.get(name, name.startswith("refill"))


def test_clusters_fill_the_grid(program):
    given, got = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="blocks: 3, expected a multiple of remote's 2"):
        program.run("remote", structure(**{"from": given, "to": got}), blocks=3, threads=32, shared=64, reads=[given], writes=[got])


def test_blocks_fit_a_device(program):
    given, got = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for threads, shared in ((1056, 64), (48, 64), (64, (227 << 10) + 16)):
        with pytest.raises(ValueError, match=f"threads, shared: {threads} and {shared} bytes, expected"):
            program.run("phases", structure(**{"from": given, "to": got}), blocks=1, threads=threads, shared=shared)


def test_every_launch_has_another_schedule(program):
    launch = Launch({"pha": program, "phases": program, "box": None}, counted := [])
    given, got = torch.arange(STEPS * 32, dtype=torch.int32), torch.zeros(STEPS * 32, dtype=torch.int32)
    before = next(Launch._seeds)
    for _ in range(2):
        launch("phases", structure(**{"from": given, "to": got}), 1, 64, 1024, [given], [got])
    assert torch.equal(got, given) and [name for name, _ in counted] == ["phases"] * 2 and next(Launch._seeds) == before + 3
    with pytest.raises(AssertionError, match="other: expected a name that begins with one of"):
        launch("other", structure(to=got), 1, 32, 0, [], [got])


LINE = r"primitives_hopper\.cu:\d+"
# What is broken -> (kernel, (old, new), what is said).
FAULTS = {
    # Phases.
    "a word is read before the wait": ("phases", ("      mbarrier_wait(there, i & 1);\n", ""), f"race: (read|write) of shared byte .* at {LINE}|which nothing was written to"),
    "a word is overwritten before it is read": ("phases", ("mbarrier_wait(back, (i + 1) & 1);", "mbarrier_wait(back, 1);"), f"race: write of shared .* at {LINE} and|may count for the phase before|waits for ever"),
    "a wait for the other parity": ("phases", ("mbarrier_wait(there, i & 1)", "mbarrier_wait(there, (i + 1) & 1)"), f"race: .* at {LINE}|which nothing was written to"),
    "one of two readers arrives": ("readers", ("    warp_barrier();  // read\n", ""), f"race: write of shared byte 64 at {LINE} and a read.*last read at {LINE}|race: read of shared byte 64 at {LINE}"),
    "two arrivals too many": ("phases", ("mbarrier_make(back, 32)", "mbarrier_make(back, 30)"), f"arrival at {LINE} may count for the phase before.* made at {LINE} for 30|race: (read|write) of shared byte .* at {LINE}"),
    "an arrival too few": ("phases", ("mbarrier_make(there, 32)", "mbarrier_make(there, 33)"), f"waits for ever for the phase of parity . of a barrier at {LINE} .*made at {LINE} for 33; 0 phases have ended, this one lacks 1 arrivals"),
    "a barrier that was not made": ("phases", ("    mbarrier_make(back, 32);\n", ""), f"at {LINE} of the barrier at shared byte 8 .*none was made"),
    "a barrier made twice": ("phases", ("mbarrier_make(back, 32)", "mbarrier_make(there, 32)"), f"write of shared byte 0 at {LINE}, which belongs to the barrier made at {LINE}"),
    "nobody told of the barrier": ("phases", ("    mbarriers_made();\n  }\n  block_barrier();\n  for (u32 i", "  }\n  block_barrier();\n  for (u32 i"), f"at {LINE} of the barrier .*made at {LINE}: mbarriers_made"),
    "a word over the barrier": ("phases", ("shared_at<u8>(64 + lane * 4)", "shared_at<u8>(lane * 4)"), f"(write|read) of shared byte .* at {LINE}, which belongs to the barrier made at {LINE}"),
    # Boxes, and what threads wrote where they come.
    "no fence": ("refill", ("if (p.kind == 0) async_fence();", ""), f"asynchronous write of shared byte .* at {LINE} and write by thread \\d+ at {LINE}, no async_fence between"),
    "a fence before the writes": ("refill", ("  for (u32 b = t * 16; b < BYTES; b += 64 * 16) store16(shared_at<u8>(1024 + b), Words{});\n  if (p.kind == 0) async_fence();\n", "  if (p.kind == 0) async_fence();\n  for (u32 b = t * 16; b < BYTES; b += 64 * 16) store16(shared_at<u8>(1024 + b), Words{});\n"), f"{LINE} and write by thread \\d+ at {LINE}, no async_fence between"),
    "the asker does not fence": ("refill by the asker", ("    if (p.kind == 1) async_fence();  // after\n", ""), f"{LINE} and write by thread \\d+ at {LINE}, no async_fence between"),
    "fences, but no barrier": ("refill", ("  block_barrier();\n  if (t == 0) {\n    if (p.kind", "  warp_barrier();\n  if (t == 0) {\n    if (p.kind"), f"race: asynchronous write of shared byte .* at {LINE} and write by thread \\d+ at {LINE}, no barrier|barrier at shared byte 0"),
    # A pipeline.
    "no wait for what is full": ("pipeline", ("      mbarrier_wait(full + s, parity);\n", ""), f"at {LINE} while the copy asked for at {LINE} is under way|which nothing was written to|race: read of shared byte .* at {LINE} and write by a copy at {LINE}"),
    "no wait for what is empty": ("pipeline", ("        if (i >= 2) mbarrier_wait(empty + s, parity ^ 1);\n", ""), f"race: asynchronous write of shared byte .* at {LINE} and .* at {LINE}|at {LINE} may count for the phase before|{LINE} while the copy asked for at {LINE}|arrival at {LINE}, one more than the phase waits for: the barrier .* made at {LINE}"),
    "the empty phase before": ("pipeline", ("mbarrier_wait(empty + s, parity ^ 1)", "mbarrier_wait(empty + s, parity)"), f"race: asynchronous write of shared byte .* at {LINE} and|may count for the phase before|{LINE} while the copy asked for at {LINE}|waits for ever|arrival at {LINE}, one more than the phase waits for: the barrier .* made at {LINE}"),
    "the full phase before": ("pipeline", ("mbarrier_wait(full + s, parity)", "mbarrier_wait(full + s, parity ^ 1)"), f"at {LINE} while the copy asked for at {LINE} is under way|nothing was written to|race: read"),
    "bytes that are not expected": ("pipeline", ("mbarrier_expect(full + s, BYTES)", "mbarrier_arrive(full + s)"), "more than it was told to expect|whose bytes it was not told to expect|no barrier between|may count for the phase before|which nothing was written to|is under way"),
    "fewer bytes expected": ("pipeline", ("mbarrier_expect(full + s, BYTES)", "mbarrier_expect(full + s, BYTES / 2)"), f"the end of the copy asked for at {LINE}: 1024 bytes more than it was told to expect .*made at {LINE}"),
    "more bytes expected": ("pipeline", ("mbarrier_expect(full + s, BYTES)", "mbarrier_expect(full + s, BYTES + 16)"), f"waits for ever for .* at {LINE} .* lacks 0 arrivals and 16 bytes"),
    "released before it is read": ("pipeline", ("      show(p.to + u32(i) * BYTES, at, BYTES, thread_index() - 32, 64);\n      warp_barrier();\n      if (lane_index() == 0) mbarrier_arrive(empty + s);\n", "      warp_barrier();\n      if (lane_index() == 0) mbarrier_arrive(empty + s);\n      show(p.to + u32(i) * BYTES, at, BYTES, thread_index() - 32, 64);\n"), f"race: asynchronous write of shared byte .* at {LINE} and a read|race: read of shared|while the copy asked for at {LINE} is under way"),
    "released by a lane before the others read": ("pipeline", ("      warp_barrier();\n      if (lane_index() == 0) mbarrier_arrive(empty + s)", "      if (lane_index() == 0) mbarrier_arrive(empty + s)"), f"race: asynchronous write of shared byte .* at {LINE} and a read|race: read of shared|while the copy asked for at {LINE} is under way"),
    "released by one of two": ("pipeline", ("if (lane_index() == 0) mbarrier_arrive(empty + s)", "if (thread_index() == 32) mbarrier_arrive(empty + s)"), "waits for ever for .* lacks 1 arrivals"),
    "nobody waits for the last copies": ("pipeline", ("    } else {\n      mbarrier_wait(full + s, parity);\n      show(", "    } else if (i < 4) {\n      mbarrier_wait(full + s, parity);\n      show("), f"ends? while the copy asked for at {LINE} is under way"),
    "used before everyone knows": ("pipeline", ("  block_barrier();  // made\n", ""), f"at {LINE} of the barrier at shared byte|none was made"),
    # Clusters.
    "arrivals before the other block is there": ("remote", ("  cluster_barrier();  // made\n  mbarrier_arrive_at", "  block_barrier();\n  mbarrier_arrive_at"), f"arrival at {LINE} of the barrier at shared byte 0.*(none was made|mbarriers_made)"),
    "a block ends before it is arrived at": ("remote", ("  mbarrier_wait(come, 0);\n", ""), f"the block may end before block . of its cluster arrives at its barrier at {LINE}"),
    "arrivals at itself alone": ("halves", ("for (u32 b = 0; b < 2; ++b) mbarrier_arrive_at(empty, b)", "for (u32 b = rank; b == rank; ++b) mbarrier_arrive_at(empty, b)"), "waits for ever for .* lacks 1 arrivals"),
    "no barrier at the end": ("halves", ("  cluster_barrier();  // over\n", ""), f"the block may end before block . of its cluster arrives at its barrier at {LINE}"),
    "a copy to one block": ("halves", ("copy_box_to(3, ", "copy_box_to(u16(1 << rank), "), "waits for ever for .* lacks 0 arrivals and 2048 bytes"),
    "half of the bytes": ("halves", ("mbarrier_expect(full, 2 * BYTES)", "mbarrier_expect(full, BYTES)"), "more than it was told to expect|whose bytes it was not told|may count for the phase before|which nothing was written to|is under way"),
    "a block that the cluster does not have": ("halves", ("copy_box_to(3, ", "copy_box_to(5, "), f"copy of a box at {LINE} to blocks 5 .bits. of a cluster of 2"),
    "one block's readers are enough": ("halves", ("mbarrier_make(empty, 2)", "mbarrier_make(empty, 1)"), f"race: asynchronous write of shared byte .* at {LINE} and .* at {LINE}|may count for the phase before|{LINE} while the copy asked for at {LINE}|race: read of shared|arrival at {LINE}, one more than the phase waits for: the barrier .* made at {LINE}"),
    # Registers.
    "more registers than there are": ("shares", ("registers_up<240>();", "if (thread_index() < 256) registers_up<248>(); else registers_up<240>();"), f"waits for ever for enough registers, setmaxnreg.inc, at {LINE}"),
    "fewer that are more": ("shares", ("registers_down<24>", "registers_down<176>"), f"setmaxnreg.dec to 176 at {LINE}, where each thread has 168"),
    "more that are fewer": ("shares", ("registers_up<240>", "registers_up<160>"), f"setmaxnreg.inc to 160 at {LINE}, where each thread has 168"),
    "no multiple of 8": ("shares", ("registers_down<24>", "registers_down<28>"), f"setmaxnreg.dec to 28 at {LINE}, expected a multiple of 8 from 24 to 256"),
    "three warps of four": ("shares", ("if (thread_index() < 128)", "if (thread_index() < 96)"), "waits for ever for setmaxnreg|the warps of a warpgroup part"),
    "a fetch from anywhere": ("shares", ("prefetch(p.from + thread_index(), 16)", "prefetch(p.from + thread_index() + 2, 16)"), "not aligned to 16"),
    "a fetch of anything": ("shares", ("prefetch(p.from + thread_index(), 16)", "prefetch(p.from + thread_index(), 8)"), f"fetch of 8 bytes at {LINE}, expected a multiple of 16"),
    "a fetch of what is not there": ("shares", ("prefetch(p.from + thread_index(), 16)", "prefetch(p.from + 384, 16)"), f"read of 16 global bytes outside every tensor, at {LINE}"),
    "twice without a barrier": ("shares", ("registers_down<24>();", "registers_down<32>(), registers_down<24>();"), f"setmaxnreg.dec at {LINE} after the one at {LINE}, the warpgroup did not meet"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    """By fault: programs that hold at most one in each kernel."""
    rounds, of = [], {}
    for fault, (name, edit, _) in FAULTS.items():
        kernel = name.split()[0]
        fits = next((r for r in rounds if kernel not in r), None)
        if fits is None:
            rounds.append(fits := {})
        fits[kernel], of[fault] = edit, fits
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda r: Program(SOURCE, *r.values()), rounds))
    return {fault: made[next(i for i, r in enumerate(rounds) if r is fits)] for fault, fits in of.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_told(faulty, fault):
    """On every schedule, with the lines."""
    name, _, message = FAULTS[fault]
    for seed in SEEDS:
        with pytest.raises(KernelError, match=message):
            run(faulty[fault], name, seed)


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_nvcc_makes_the_instructions_that_are_meant():
    code = machine_code(SOURCE, "90a")
    assert code["box2"]["UTMALDG"] == code["box4"]["UTMALDG"] == 1 and code["halves"]["UTMALDG.MULTICAST"] >= 1
    assert code["shares"]["USETMAXREG"] == 2 and code["shares"]["UBLKPF"] == 1
    assert all(not kernel["spilled"] for kernel in code.values())
