"""Products of warpgroups against plain matrix products: operands laid down by the layouts of the manual, and every rule broken once."""

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vidkern.cuda.tensor_map import TensorMap

from harness import KernelError, Program, structure, tensor_map

SOURCE = Path(__file__).parent / "products_hopper.cu"
RULES = Path(__file__).parent / "products_hopper_rules.cu"
SWIZZLES = {128: (8, 1), 64: (4, 2), 32: (2, 3), 0: (1, 0)}  # bytes -> chunks of a swizzled row, code in bits 62 and 63


@pytest.fixture(scope="module")
def program():
    return Program(SOURCE)


# "Strides", canonical layouts for 16-bit values, T = 8 to a chunk of 16 bytes: (shape, stride) of rows and of depth, the first index fastest.
# K-major:  128, 64, 32 bytes: ((8, m), (T, 2)) : ((W T, SBO), (1, T)); none: ((8, m), (T, 2)) : ((T, SBO), (1, LBO))
# MN-major: 128, 64, 32 bytes: ((T, W, m), (8, 2)) : ((1, T, LBO), (W T, SBO)); none: ((T, 1, m), (8, 2)) : ((1, T, SBO), (T, LBO))
def layout(across, swizzle, leading, stride):
    w = SWIZZLES[swizzle][0]
    if across:
        return ((8, w, 99), (1, 8, leading if swizzle else stride)), ((8, 2), (8 * w, stride if swizzle else leading))
    return ((8, 99), (8 * w, stride)), ((8, 2), (1, 8 if swizzle else leading))


def offset(i, mode):
    """Offset of index i along one mode of a layout, in values."""
    total = 0
    for size, stride in zip(*mode):
        total += i % size * stride
        i //= size
    return total


def places(rows, across, swizzle, start, leading, stride, base=0):
    """Bytes of shared memory where [rows, 16] values lie. start, leading, stride in bytes; base: 128-byte lines that the pattern begins after
    a multiple of 1024 bytes."""
    mask = SWIZZLES[swizzle][0] - 1  # Swizzle<B, 4, 3>: bits 7 on, of which there are B, onto bits 4 on
    of_row, of_depth = layout(across, swizzle, leading // 2, stride // 2)
    linear = torch.tensor([[start + 2 * (offset(r, of_row) + offset(k, of_depth)) for k in range(16)] for r in range(rows)])
    return linear ^ ((((linear >> 7) - base) & mask) << 4)


def descriptor(swizzle, start, leading, stride, base=0):
    """"Matrix Descriptor Format"."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base << 49 | SWIZZLES[swizzle][1] << 62


# "Register Fragments for wgmma.mma_async.m64nNk16": thread t of the warpgroup; value i of
# D: row = 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2), col = 8 (i / 4) + 2 (t % 4) + i % 2; A: the same rows, depth 8 (i / 4) + 2 (t % 4) + i % 2.
def spread(matrix):
    t, i = torch.arange(128)[:, None], torch.arange(matrix.shape[1] // 2)
    return matrix[t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2].contiguous()


def arranged(rows, across, swizzle, at):
    """Start, leading and stride for an operand from byte `at` on, with empty bytes between its groups; and its end."""
    w, apart = SWIZZLES[swizzle][0], 1024
    atom = 8 * w * 16  # bytes
    if not across:
        stride = (2 if swizzle == 0 else 1) * atom + apart
        return (at + (32 if w > 2 else 0), atom if swizzle == 0 else 16, stride), at + rows // 8 * stride + 32
    blocks = -(-rows // (8 * w))
    if swizzle:
        leading, stride = 2 * atom + apart, atom
        return (at, leading, stride), at + blocks * leading
    leading, stride = blocks * atom + apart, atom
    return (at, leading, stride), at + 2 * leading


def run(program, dtype, n, a_across=False, b_across=False, swizzle=(128, 128), own=False, keep=True, base=0, mistake=None):
    """One product: what came, and what was meant. ``mistake``: how a field of B's descriptor is changed behind its layout's back."""
    g = torch.Generator().manual_seed(n + a_across + 2 * b_across)
    a, b, c = (torch.randn(*shape, generator=g) for shape in ((64, 16), (n, 16), (64, n)))
    a, b = a.to(dtype), b.to(dtype)
    fields_a, end = arranged(64, a_across, swizzle[0], 128 * base)
    fields_b, end_b = arranged(n, b_across, swizzle[1], (end + 1023) // 1024 * 1024 + 128 * base)
    image = torch.full(((end_b + 2047) // 1024 * 512,), -1, dtype=torch.int16)  # NaN in both types
    if not own:
        image[places(64, a_across, swizzle[0], *fields_a, base) // 2] = a.view(torch.int16)
    image[places(n, b_across, swizzle[1], *fields_b, base) // 2] = b.view(torch.int16)
    words, sums = spread(a).view(torch.int32), spread(c)
    fields = {"image": image, "own": words if own else None, "sums": sums}
    said = {"swizzle": swizzle[1], **dict(zip(("start", "leading", "stride"), fields_b)), "base": base}
    said |= {field: change(said[field]) for field, change in (mistake or {}).items()}
    a_bits = 0 if own else descriptor(swizzle[0], *fields_a, base)
    fields |= {"a": (ctypes.c_uint64, a_bits), "b": (ctypes.c_uint64, descriptor(**said))}
    fields |= {"bytes": 2 * len(image), "n": n, "a_across": int(a_across), "b_across": int(b_across), "keep": int(keep)}
    name = "described_bf16" if dtype is torch.bfloat16 else "described_f16"
    counts = program.run(name, structure(**fields), blocks=1, threads=128, shared=2 * len(image), reads=[image, words], writes=[sums], seed=n)
    assert counts["warpgroup_products"] == 1
    return sums, spread(a.double() @ b.double().mT + (c.double() if keep else 0))


def check(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("n", range(16, 257, 16))
def test_every_width(program, n):
    """Each in a form of its own: both types, along and across, A in registers."""
    i = n // 16
    check(*run(program, (torch.bfloat16, torch.float16)[i // 8 % 2], n, bool(i & 1), bool(i & 2), own=i % 4 == 2, keep=i % 3 != 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b_across", [False, True])
@pytest.mark.parametrize("a", ["along", "across", "registers"])
def test_every_form(program, a, b_across, dtype):
    """By A in its three forms, B in its two, and each swizzle on either side."""
    for swizzle in SWIZZLES:
        other = list(SWIZZLES)[(list(SWIZZLES).index(swizzle) + 1) % 4]
        check(*run(program, dtype, 80, a == "across", b_across, (swizzle, other), a == "registers"))


@pytest.mark.parametrize("across", [False, True])
def test_patterns_begin_elsewhere(program, across):
    """"Matrix base offset": a pattern that begins 128 bytes times it after a multiple of 1024."""
    for base in (1, 6):
        check(*run(program, torch.bfloat16, 128, across, across, base=base))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_every_field_counts(program, swizzle, across):
    """The pins above can fail: one field of a descriptor changed gives numbers far off, NaN, or what lies outside shared memory."""
    other = {128: 64, 64: 32, 32: 0, 0: 32}[swizzle]
    mistakes = {"start": lambda s: s + 1024, "stride": lambda s: s + 1024, "swizzle": lambda s: other}
    if across or swizzle == 0:  # else not used
        mistakes["leading"] = lambda s: s + 1024
    for field, mistake in mistakes.items():
        try:
            got, expected = run(program, torch.bfloat16, 144, False, across, (128, swizzle), mistake={field: mistake})
        except KernelError as error:
            assert re.search("are there|of the pattern of its swizzle", str(error)), (field, error)
        else:
            assert not (got.double() - expected).abs().max() < 0.1, field


# ---- rules


def given():
    g = torch.Generator().manual_seed(5)
    x, y, z = (torch.randn(rows, 128, generator=g).bfloat16() for rows in (64, 80, 64))
    results = [torch.full((64, n), 7.0) for n in (80, 128, 80, 64)]
    return (x, y, z), results


def run_rules(program, seed):
    inputs, results = given()
    fields = dict(zip(("x", "y", "z", "first", "second", "third", "fourth"), (*inputs, *results)))
    counts = program.run("rules", structure(**fields), blocks=1, threads=256, shared=36 << 10, reads=inputs, writes=results, seed=seed)
    assert counts["warpgroup_products"] == 8 + 4 + 5 + 8
    return results


def meant():
    x, y, z = (t.double() for t in given()[0])
    first = x @ y.mT
    return first, first.float().bfloat16().double() @ y, z @ y.mT + first, x[:, 64:].mT @ x[:, :64]


def wrong(results):
    return [not torch.allclose(got.double(), expected, rtol=1e-2, atol=0.2) for got, expected in zip(results, meant())]


@pytest.mark.parametrize("seed", range(3))
def test_panels_are_what_descriptors_say(seed):
    """Tiles of panels, several groups under way, chains over groups, and a left operand made of sums."""
    got, expected = run_rules(Program(RULES), seed), meant()
    for i in (0, 2, 3):
        torch.testing.assert_close(got[i].double(), expected[i], rtol=1e-5, atol=1e-4)
    assert not any(wrong(got))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_ring(steps):
    """Panels as copies of boxes leave them; stages that are filled again once the products that read them were waited for."""
    for seed in range(8):
        got, expected, _ = run_ring(Program(RULES), steps, seed)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def run_ring(program, steps, seed):
    """What came of a b; what was meant; the last 64 of its depth alone."""
    g = torch.Generator().manual_seed(steps)
    a, b = (torch.randn(*shape, generator=g).bfloat16() for shape in ((64, 64 * steps), (64 * steps, 128)))
    got = torch.full((64, 128), torch.nan)
    maps = {name: (TensorMap, tensor_map(t, t.shape[::-1], (t.shape[1],), (64, 64))) for name, t in (("a", a), ("b", b))}
    counts = program.run("piped", structure(**maps, to=got, steps=steps), blocks=1, threads=256, shared=49 << 10, reads=[a, b], writes=[got],
                         seed=seed)  # fmt: skip
    assert counts["warpgroup_products"] == 4 * steps and counts["boxes"] == 3 * steps
    return got, a.double() @ b.double(), a[:, -64:].double() @ b[-64:].double()


FIRST = "warpgroup_product<bf16, 80>(c, x.depth_along(0, k), y.depth_along(0, k), k > 0);\n  products_commit();"
FOURTH = "warpgroup_product<bf16, 64, true, true>(e, x.depth_across(k, 1), x.depth_across(k), k > 0);\n  products_commit();"
SECOND = "warpgroup_product<bf16, 128, true>(d, own[k], y.depth_across(k), k > 0);"
SAME_LINE = FIRST.split("\n")[0]
BEGUN = "  block_barrier();\n  products_begin();\n  for (i32 k = 0; k < 8; ++k)"
OLD_TILE = "block_barrier();  // the tiles are there\n    block_barrier();  // x is no longer read\n"
SUMS_READ = "  products_wait<0>();\n  keep<64>(p.fourth, e);\n  block_barrier();\n"

TOLD = {
    "no fence before products": ([(BEGUN, "  block_barrier();\n  for (i32 k = 0; k < 8; ++k)")], "without wgmma.fence"),
    "no fence before the second group": ([("  products_begin();\n  for (i32 k = 4; k < 8; ++k)", "  for (i32 k = 4; k < 8; ++k)")], "without wgmma.fence"),
    "no commit": ([(FOURTH, FOURTH.split("\n")[0])], "is in no group"),
    "sums overwritten": ([(FOURTH, FOURTH + "\n  c[9].v[3] = 0;")], "touched while the product"),
    "sums scaled": ([(FOURTH, FOURTH + "\n  if (thread_index() == 200) c[3].v[1] *= 2;")], "touched while the product"),
    "sums scaled between groups": ([(FIRST, FIRST + "\n  if (lane_index() == 9) c[0].v[0] += 1;")], "touched while the product"),
    "another shape on sums under way": ([(FOURTH, "warpgroup_product<bf16, 64, true, true>(reinterpret_cast<Accumulator(&)[8]>(c[2]), x.depth_across(k, 1), x.depth_across(k), k > 0);\n  products_commit();")], "another shape"),
    "no wait at the end": ([("  products_wait<0>();\n  keep<128>(p.second, d);", "  keep<128>(p.second, d);")], "ends while the product"),
    "each warp its own rows, the warpgroup does not meet": ([(BEGUN, BEGUN.replace("  products", "  store4(x.chunk(i32(thread_index() % GROUP) / 2, i32(thread_index() % 2) * 8), 0);\n  async_fence();\n  warp_barrier();\n  products"))], "race"),
    "no asynchronous fence": ([("    async_fence();\n    block_barrier();  // z", "    block_barrier();  // z")], "fence"),
    "no barrier before products": ([(BEGUN, BEGUN.split("\n", 1)[1]), ("block_barrier();  // the tiles are there", "")], "race|nothing was written|under way"),
    "copied over before the wait": ([(OLD_TILE, OLD_TILE.split("\n")[0] + "\n"), (SUMS_READ, SUMS_READ.replace("  block_barrier();\n", ""))], "race|under way"),
    "handed over before the wait": ([(SUMS_READ, "  block_barrier();\n  products_wait<0>();\n  keep<64>(p.fourth, e);\n")], "race"),
    "the right operand handed over before the wait": ([("  products_wait<1>();\n  keep<80>(p.first, c);\n", ""), (SUMS_READ, "  block_barrier();\n" + SUMS_READ.split("  block")[0] + "  keep<80>(p.first, c);\n"), ("lay<X, 64>(x, p.z);", "lay<Y, 80>(y, p.y);")], "race"),
    "written over before the wait": ([(FOURTH, FOURTH + "\n  if (thread_index() == 255) store4(x.chunk(63, 15), 0);")], "race: (write of shared byte .* and a read|asynchronous read .* by thread 255)"),
    "the right operand written over before the wait": ([(FOURTH, FOURTH + "\n  if (thread_index() == 255) store4(y.chunk(79, 15), 0);")], "race: (write of shared byte .* and a read|asynchronous read .* by thread 255)"),
    "descriptors differ by warp": ([(SAME_LINE, SAME_LINE.replace("y.depth_along(0, k)", "y.depth_along(warp_index() == 6 ? 8 : 0, k)")), ("[80, 128], [64, 128]; bf16", "bf16")], "warps of a warpgroup part"),
    "descriptors differ by lane": ([(SAME_LINE, SAME_LINE.replace("y.depth_along(0, k)", "y.depth_along(lane_index() == 6 ? 8 : 0, k)"))], "lanes of a warp part"),
    "a warp leaves one out": ([("for (i32 k = 4; k < 8; ++k)", "for (i32 k = 4; k < (warp_index() == 5 ? 7 : 8); ++k)")], "warps of a warpgroup part"),
    "a lane leaves one out": ([("for (i32 k = 4; k < 8; ++k)", "for (i32 k = 4; k < (lane_index() == 5 ? 7 : 8); ++k)")], "lanes of a warp part"),
    "rows from no multiple of 8": ([(SAME_LINE, SAME_LINE.replace("y.depth_along(0, k)", "y.depth_along(4, k)"))], "begins in row 4"),
    "beyond a row": ([(SAME_LINE, SAME_LINE.replace("x.depth_along(0, k)", "along(x.base + 112)"))], "reaches beyond its end"),
    "beyond shared memory": ([(SAME_LINE, SAME_LINE.replace("x.depth_along(0, k)", "along(shared_at<u8>(35 << 10))"))], "only 36864 are there|nothing was written"),
}  # fmt: skip
# What no rule is broken by gives wrong sums, or NaN; in which of the four results.
WRONG = {
    "the swizzle of 64 bytes": ([(SECOND, SECOND.replace("y.depth_across(k)", "Described{y.depth_across(k).bits ^ 3ull << 62}"))], 1),
    "no swizzle": ([(SAME_LINE, SAME_LINE.replace("x.depth_along(0, k)", "Described{x.depth_along(0, k).bits & ~SWIZZLE_128}"))], 0),
    "another leading offset": ([(SECOND, SECOND.replace("y.depth_across(k)", "across(y.panel(0) + k * 2048, 8192)"))], 1),
    "another stride": ([(SAME_LINE, SAME_LINE.replace("y.depth_along(0, k)", "Described{y.depth_along(0, k).bits ^ 192ull << 32}"))], 0),
    "sums read early": ([("  products_wait<1>();\n  keep<80>", "  products_wait<2>();\n  keep<80>")], 0),
    "sums read early, the last group": ([("  products_wait<0>();\n  keep<64>(p.fourth, e);", "  keep<64>(p.fourth, e);\n  products_wait<0>();")], 3),
    "sums begun anew": ([("y.depth_along(0, k), true);\n  products_commit();\n  products_begin();", "y.depth_along(0, k), k > 0);\n  products_commit();\n  products_begin();")], 2),
}  # fmt: skip
LAYOUTS = ("the swizzle of 64 bytes", "no swizzle", "another leading offset", "another stride")  # may reach what nothing was written to
RING = {
    "released before the wait": ([("    products_wait<1>();\n    if (i > 0) ring.release(i - 1);", "    ring.release(i);")], "race: asynchronous write"),
    "released a stage too early": ([("    if (i > 0) ring.release(i - 1);", "    ring.release(i);")], "race: asynchronous write"),
    "released by one warp before its wait": ([("    if (i > 0) ring.release(i - 1);", "    if (warp_index() == 6) ring.release(i);\n    else if (i > 0) ring.release(i - 1);")], "race: asynchronous write|arrival|waits for ever"),
    "no wait for a full stage": ([("    ring.wait_full(i);\n", "")], "race|under way|nothing was written"),
    "a wait by one lane": ([("    ring.wait_full(i);\n", "    if (leads()) ring.wait_full(i);\n")], "race|under way|nothing was written"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty():
    edits = {name: edit for name, (edit, _) in (TOLD | WRONG | RING).items()} | {"anew": [("i + k > 0", "k > 0")]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(edits, pool.map(lambda e: Program(RULES, *e), edits.values())))


@pytest.mark.parametrize("fault", TOLD)
def test_a_broken_rule_is_told(faulty, fault):
    """On every schedule, with file and line."""
    for seed in range(4):
        with pytest.raises(KernelError, match=TOLD[fault][1]) as error:
            run_rules(faulty[fault], seed)
        assert "products_hopper_rules.cu:" in str(error.value)


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_is_seen(faulty, fault):
    try:
        seen = wrong(run_rules(faulty[fault], 0))
    except KernelError as error:
        assert fault in LAYOUTS and re.search("which nothing was written to|are there", str(error)), error
    else:
        assert seen[WRONG[fault][1]]


@pytest.mark.parametrize("fault", RING)
def test_a_fault_in_a_ring_is_told(faulty, fault):
    for seed in range(8):
        with pytest.raises(KernelError, match=RING[fault][1]):
            run_ring(faulty[fault], 5, seed)


def test_sums_begin_anew_behind_a_product_under_way(faulty):
    got, _, last = run_ring(faulty["anew"], 3, 0)
    torch.testing.assert_close(got.double(), last, rtol=1e-5, atol=1e-4)
