"""The gradients of logits that go into a slab on compute capability 9.0, executed: beside their formula in float64 and beside what the
kernel for mma.sync writes, in every form; what may hold NaN, how much is computed, and seeded faults that must be told."""

import math
import re

import pytest
import torch

from vidkern.ops.attention_motion_flow import cuda, hopper
from vidkern.ops.attention_motion_flow import triton_tables as tables

from amf_executed import Runs, every_pair, operands
from harness import CSRC, KernelError, Launch, Program, machine_code, nvcc

SOURCE, KERNEL = CSRC / "cuda" / "amf_hopper_slope.cu", "amf_hopper_slope_"


@pytest.fixture(scope="module")
def program():
    return Program(SOURCE)


@pytest.fixture
def launch(program):
    return Launch({KERNEL: program})


@pytest.fixture(scope="module")
def older():
    """The kernels for mma.sync."""
    return {stem: Program(CSRC / "cuda" / f"{stem}.cu") for stem in ("amf_backward", "amf_slab")}


class Problem:
    """A sample and group of several heads, pairs of frames, and rows of pairs that have a gradient (``live``, [P, S]). Products are exact.
    What nobody may look at holds NaN: queries without gradient in any pair, keys of frames that are no target."""

    def __init__(self, form, grid, pairs=None, *, scale=0.05, dtype=torch.bfloat16, live=None, seed=3):
        self.grid, self.pairs, self.scale = grid, pairs or every_pair(grid[0]), scale
        self.size, g = grid[1] * grid[2], torch.Generator().manual_seed(seed)
        self.centre, self.padded = ((grid[2] - 1) / 2, (grid[1] - 1) / 2), -(-self.size // 8) * 8
        self.live = torch.ones(len(self.pairs), self.size, dtype=torch.bool) if live is None else live
        blocks = -(-self.size // 64)
        self.flags = torch.nn.functional.pad(self.live, (0, blocks * 64 - self.size)).unflatten(1, (blocks, 64)).any(2).int()
        self.q, self.k = (t[0, 0] for t in operands(grid=grid, dtype=dtype, **form))
        self.slopes = torch.randn(len(self.pairs), self.size, 4, generator=g)
        self.slopes[..., 3] = torch.stack([(self.logits(*pair) / math.log(2)).exp2().sum(1).log2() for pair in self.pairs])
        self.slopes[~self.live] = torch.tensor([0, 0, 0, torch.inf])
        self.slots = tables.slots(self.pairs, grid[0], torch.device("cpu"))
        self.expected = {pair: self.exact(p, *pair) for p, pair in enumerate(self.pairs)}
        for f in range(grid[0]):
            at = slice(f * self.size, (f + 1) * self.size)
            looks = torch.stack([self.live[p] for p, pair in enumerate(self.pairs) if pair[0] == f] or [self.live[0] & False]).any(0)
            self.q[:, at][:, ~looks] = torch.nan
            if f not in [j for _, j in self.pairs]:
                self.k[:, at] = torch.nan

    def logits(self, i, j):
        q, k = (t.unflatten(1, self.grid[:1] + (self.size,))[:, f].double() for t, f in ((self.q, i), (self.k, j)))
        return torch.einsum("hsd,htd->st", q, k) * self.scale

    def exact(self, p, i, j):
        """[S, padded]; NaN in rows that are not written."""
        x, y, rest, lse = self.slopes[p].double().unsqueeze(-1).unbind(1)
        key = torch.arange(self.size)
        places = key % self.grid[2] - self.centre[0], key // self.grid[2] - self.centre[1]
        found = (self.logits(i, j) / math.log(2) - lse).exp2() * (x * places[0] + y * places[1] + rest)
        found = torch.nn.functional.pad(found.where(self.live[p][:, None], 0), (0, self.padded - self.size))
        return found.where(self.flags[p].repeat_interleave(64)[: self.size, None] != 0, torch.nan)

    def made(self, launch, slope=hopper._slope):
        """Of each pair, what was written of its slab."""
        result = {}
        for frame, slot, n in self.slots.slabs:
            slab = self.q.new_full((self.size * n * self.padded,), torch.nan)
            slope(
                self.q, self.k, self.slopes, self.flags, slab, self.slots.slots, slot, n, frame,
                grid=self.grid, scale=self.scale, centre=self.centre, padded=self.padded, launch=launch,
            )  # fmt: skip
            for which, (target, _) in enumerate(self.slots.slots[slot : slot + n].tolist()):
                result[frame, target] = slab.view(self.size, n, self.padded)[:, which]
        return result

    def wrong(self, launch) -> float:
        """Largest error, 1 being what sound kernels stay below: two roundings of the dtype."""
        found, errors = self.made(launch), []
        for pair, want in self.expected.items():
            got = found[pair].double()
            errors.append(9.0 * (got.isnan() != want.isnan()).any())
            errors.append(((got - want).abs() / (torch.finfo(self.q.dtype).eps * want.abs() + 1e-5)).nan_to_num(0, 9, 9).max())
        return max(float(e) for e in errors)


def some(pairs, size, seed=5):
    """Two of three rows of every pair but: none of the first 64 of the last one, all from the 65th on of the first, the last row alone of
    the second, none of the third."""
    live = torch.rand(pairs, size, generator=torch.Generator().manual_seed(seed)) > 0.3
    live[-1, :64], live[0, 64:] = False, True
    if pairs > 2:
        live[1, :-1], live[1, -1], live[2] = False, True, False
    return live


# ---- any form -------------------------------------------------------------------------------------------------------------
# Tiles are 128 rows by 256 keys, or 128 where fewer are left; two tiles of rows make a cluster.
FORMS = {
    "one head": ({"dim": 24}, (3, 5, 7)),
    "one head of 136": ({"dim": 136}, (2, 9, 9)),
    "3 heads of 40": ({"heads": 3, "dim": 40}, (2, 20, 11)),
    "2 heads of 72 beside each other": ({"heads": 2, "dim": 72, "beside": True}, (1, 15, 20)),
    "5 heads of 64 beside each other": ({"heads": 5, "dim": 64, "beside": True}, (2, 8, 16)),
    "2 heads of 72": ({"heads": 2, "dim": 72}, (1, 20, 27)),
}


@pytest.mark.parametrize("form", FORMS)
def test_against_the_formula(launch, form):
    """Ragged ends of tiles, of frames and of heads; rows, blocks, tiles and clusters without gradient."""
    heads, grid = FORMS[form]
    for n, dtype in enumerate((torch.bfloat16, torch.float16)):
        live = some(grid[0] ** 2, grid[1] * grid[2]) if n == 0 else None
        assert Problem(heads, grid, dtype=dtype, live=live, scale=(-1) ** n * 0.05).wrong(launch) < 1


def test_frames_that_are_not_asked_for(launch):
    """Slabs of some targets, in any order; the others and their queries hold NaN."""
    pairs = ((2, 1), (0, 1), (2, 2), (3, 1), (3, 0))
    problem = Problem({"heads": 3, "dim": 40}, (4, 9, 9), pairs, live=some(5, 81))
    assert problem.wrong(launch) < 1 and len(problem.slots.slabs) == 3
    assert problem.q.isnan().all(-1).all(0)[81:162].all() and problem.k.isnan().all(-1).all(0)[243:].all()


@pytest.mark.parametrize("form", ["3 heads of 40", "2 heads of 72 beside each other"])
def test_the_bits_of_the_other_kernel(launch, older, form):
    """What mma.sync writes of the same rows, so that each may stand in for the other."""
    heads, grid = FORMS[form]
    problem = Problem(heads, grid, live=some(grid[0] ** 2, grid[1] * grid[2]))
    ours, theirs = problem.made(launch), problem.made(Launch({"amf_slope_": older["amf_slab"]}), cuda._slope)
    written = {pair: ~a.isnan() for pair, a in ours.items()}
    assert all(torch.equal(ours[pair][at], theirs[pair][at]) for pair, at in written.items()) and any(at.any() for at in written.values())


class Backward(Runs):
    """:class:`Runs` of cuda.py's backward alone."""

    def __init__(self, launch):
        self.ours = {"backward": lambda *args, **more: cuda.backward(*args, **more, launch=launch)}


@pytest.mark.parametrize("form", ["one head of 136", "3 heads of 40"])
def test_before_the_other_products(program, older, form, monkeypatch):
    """Gradients of q and k where the products of the slab are those of mma.sync, of queries that hold NaN where they have no gradient."""
    monkeypatch.setattr(cuda, "_slope", hopper._slope)
    launch = Launch({KERNEL: program, "amf_prepare": older["amf_backward"], "amf_slab_": older["amf_slab"]})
    heads, grid = FORMS[form]
    pairs = every_pair(grid[0])
    assert Backward(launch).wrong_backward(*operands(grid=grid, **heads), grid, pairs, 0.05, some(len(pairs), grid[1] * grid[2])[None]) < 1


def test_the_same_bits_whatever_the_schedule(launch):
    problem = Problem({"heads": 3, "dim": 72}, (2, 20, 11), live=some(4, 220))
    first, *others = [problem.made(launch) for _ in range(3)]
    assert all(torch.equal(made[pair].nan_to_num(99), first[pair].nan_to_num(99)) for made in others for pair in first)


def test_offsets_of_64_bits(launch):
    """Tokens 2^28 values apart, of which a few pages exist."""
    problem = Problem({"heads": 2, "dim": 16}, (2, 2, 3))
    room = torch.empty(12 * 2**28, dtype=torch.bfloat16)
    for n, name in enumerate("qk"):
        near = getattr(problem, name)
        setattr(problem, name, room.as_strided(near.shape, (16, 2**28, 1), n * 64).copy_(near))
    assert problem.wrong(launch) < 1


def test_values_that_are_not_seen(launch):
    """NaN in a key: in its column of rows with a gradient, in no other, and zeros where there is none."""
    problem = Problem({"heads": 2, "dim": 24}, (2, 20, 11), live=some(4, 220))
    problem.k[1, 220 + 7, 3] = torch.nan
    found = problem.made(launch)
    for p, pair in enumerate(problem.pairs):
        want, live = problem.expected[pair].clone(), problem.live[p]
        if pair[1] == 1:
            want[live, 7] = torch.nan
        assert torch.equal(found[pair].isnan(), want.isnan()), pair
        assert bool((found[pair][~live & ~want.isnan().all(1)] == 0).all())


# ---- what is computed -----------------------------------------------------------------------------------------------------
def test_what_is_computed(program):
    """Products of warpgroups with a gradient alone, each of 16 channels by up to 256 keys; boxes of 64 channels: of keys for the clusters
    that have one, of rows for such blocks of 64. Frames have 300 patches: five blocks of rows, in clusters of four, and 256 and 128 keys."""
    chunks, keys, boxes = 3, 2, 4 + 2  # of the heads; tiles of keys; of 64 keys each
    for blocks in ((), (0,), (2, 3), (0, 4), range(5)):
        live = torch.zeros(1, 300, dtype=torch.bool)
        for b in blocks:
            live[:, b * 64 + 9] = True
        problem, counted = Problem({"heads": 3, "dim": 40}, (1, 15, 20), live=live), []
        assert problem.wrong(Launch({KERNEL: program}, counted)) < 1
        ((_, counts),) = counted
        clusters = len({b // 4 for b in blocks})
        assert counts["warpgroup_products"] == len(blocks) * chunks * 4 * keys
        # Two tiles of keys: a block's rows are read for each.
        assert counts["boxes"] == chunks * (len(blocks) * 2 + clusters * boxes)


# ---- seeded faults --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def problems():
    """More chunks than stages. Tiles of 256 keys, of some of them, and of less than 128; blocks, halves of blocks and clusters without
    gradient; slabs that end in the middle of eight keys."""
    return [
        Problem({"heads": 3, "dim": 72, "beside": True}, (2, 13, 17), live=some(4, 221)),
        Problem({"heads": 2, "dim": 136}, (1, 15, 20), live=some(1, 300), scale=-0.05),
    ]


WAIT, RELEASE = "      ring.wait_full(i);\n      products_begin();", "      products_wait<1>();\n      release(i - 1);"
FAULTS = {
    "no wait for a chunk": (WAIT, "      products_begin();"),
    "no fence before products": (WAIT, "      ring.wait_full(i);"),
    "no wait for an empty stage": ("      ring.wait_empty(i);\n", ""),
    "parity of full": ("u32(i / STAGES) & 1", "u32(i / STAGES + 1) & 1"),
    "parity of empty": ("u32(i / STAGES + 1) & 1", "u32(i / STAGES) & 1"),
    "released before its products are done": (RELEASE, "      release(i - 1);\n      products_wait<1>();"),
    "released too early": (RELEASE, "      products_wait<1>();\n      release(i);"),
    "sums read early": ("    products_wait<0>();\n    release(i - 1);", "    release(i - 1);"),
    "released here alone": ("if (lane_index() < CLUSTER)", "if (lane_index() < 1)"),
    "released by one block": ("READERS * CLUSTER);", "READERS);"),
    "passed by without a wait": ("      ring.wait_full(i);\n      release(i);", "      release(i);"),
    "passed by without a release": ("      ring.wait_full(i);\n      release(i);", "      ring.wait_full(i);"),
    "barriers before the other block's": ("    cluster_barrier();\n  }\n  static", "    block_barrier();\n  }\n  static"),
    "gone before the other block": ("n < STAGES; ++n) ring.wait_empty(i + n)", "n < 0; ++n) ring.wait_empty(i + n)"),
    "gone before the last stage": ("n < STAGES; ++n) ring.wait_empty(i + n)", "n < STAGES - 1; ++n) ring.wait_empty(i + n)"),
    "both blocks bring the same keys": ("n = rank * SHARE; n < keys", "n = 0; n < keys"),
    "halves of the keys swapped": ("map, channel, key + n, z", "map, channel, key + (n ^ SHARE), z"),
    "keys for this block alone": ("u16((1 << CLUSTER) - 1)", "u16(1 << rank)"),
    "too few bytes": ("row_bytes + u32(keys * STEP * 2)", "row_bytes + u32(keys * STEP)"),
    "bytes of rows that do not come": ("halves * (BLOCK * STEP * 2)", "u32(HALVES) * (BLOCK * STEP * 2)"),
    "the chunk before": ("channel = c % each * STEP;", "channel = c / each * STEP;"),
    "another head": ("z = group + c / each", "z = group + c % each"),
    "each chunk anew": ("c + k > 0", "k > 0"),
    "keys from the eighth on": ("right(i).depth_along(0, k), c +", "right(i).depth_along(8, k), c +"),
    "rows of the other warpgroup": ("row = (group_index() - 1) * 64;", "row = (2 - group_index()) * 64;"),
    "half a step of depth": ("k % 4 * 32); }", "k % 4 * 16); }"),
    "one block goes alone": ("if (tile.cluster_live == 0) return;", "if (tile.live == 0) return;"),
    "flags from this block on": ("row_first - rank * ROWS + n * BLOCK", "row_first + n * BLOCK"),
    "flags of the other block": ("cluster_live >> rank * HALVES", "cluster_live >> (1 - rank) * HALVES"),
    "flags of 128 rows": ("* g.blocks + row / BLOCK", "* g.blocks + row / ROWS"),
    "a pair of another frame": ("pair = load(g.slots + (g.slot + which)", "pair = load(g.slots + (which)"),
    "rows of the target": ("head, g.query, done", "head, tile.target, done"),
    "keys of the query frame": ("0, tile.target);", "0, g.query);"),
    "the first rows twice": ("tile.row_first + n * BLOCK, head", "tile.row_first, head"),
    "half of the keys": ("tile.first + COLUMNS < g.frame.size;", "tile.first + KEYS <= g.frame.size;"),
    "gradients of the warp before": ("(i32(warp_index()) - 4) * PIECE", "(i32(warp_index()) - 5) * PIECE"),
    "places of the first keys": ("own = begin + accumulator_column(0)", "own = first + accumulator_column(0)"),
    "places a row too late": ("if (x >= f.width) x -= f.width, y += 1.0f;", "if (x > f.width) x -= f.width, y += 1.0f;"),
    "rows without gradient seen": ("return alive() ?", "return true ?"),
    "a key too many": ("own + n * 8 + j < g.frame.size ?", "own + n * 8 + j <= g.frame.size ?"),
    "eight keys too many": ("begin + c * CHUNK < g.padded", "begin + c * CHUNK <= g.padded"),
    "a row too many": ("there = row + n < g.frame.size", "there = row + n <= g.frame.size"),
    "leaves through a stage": ("shared_at<u8>(chunks.END - 4 * PIECE * COLUMNS * 2)", "shared_at<u8>(ALIGN)"),
    "leaves while it is read": ("  warp_barrier();  // the warp has read what these rows held\n", ""),
    "leaves before it is written": ("  warp_barrier();  // and has written them\n", ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(problems, fault):
    """In the source or in a header that it includes: by a rule of the executor or by a wrong result."""
    launch = Launch({KERNEL: Program(SOURCE, FAULTS[fault], ("VK_AMF_SLOPE(f16)\n", ""))})
    try:
        caught = any(problem.wrong(launch) > 2 for problem in problems)
    except KernelError:
        return
    assert caught


def test_what_faults_are_told_from(launch, problems):
    assert max(problem.wrong(launch) for problem in problems) < 1


# ---- machine code ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_machine_code():
    """Nothing spilled, no product that waits for another; boxes for this block and for two, registers that change hands, 16-byte stores."""
    kernels = machine_code(SOURCE, "90a")
    assert set(kernels) == {f"{KERNEL}{dtype}" for dtype in ("bf16", "f16")}
    for name, code in kernels.items():
        assert not code["spilled"] and not code["serialized"], (name, code)
        assert code["HGMMA"] and code["UTMALDG"] > code["UTMALDG.MULTICAST"] > 0 and code["USETMAXREG"] == 2, (name, code)
        assert "HMMA" not in code and {w for w in code if w.startswith("STG.E")} == {"STG.E.128"}, (name, code)


def test_every_kernel_has_its_launch():
    """Names in the source are those that the launcher asks for."""
    assert re.findall(r"^VK_AMF_SLOPE\((\w+)\)$", SOURCE.read_text(), re.MULTILINE) == list(cuda._NAMES.values())
