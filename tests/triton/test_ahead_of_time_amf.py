"""What attention motion flow launches compiles for every architecture without spills, with matrix instructions; the record says so."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-aot makes its absence an error
import torch
from vidkern.bench import aot_amf as aot
from vidkern.ops.attention_motion_flow import configs, triton_tables

CASES = aot.cases()


def chosen(kind, shape, dtype, architecture):
    return next(c for c in CASES if (c.kind, c.shape, c.dtype, c.architecture) == (kind, shape, dtype, architecture))


def test_record_is_of_these_sources_and_within_the_limits():
    record = json.loads(aot.KIND.path.read_text())
    assert record["sources"] == aot.KIND.digest(), "the kernels changed: run python -m vidkern.bench.aot_amf"
    assert set(record["built"]) == {c.name for c in CASES}
    assert not [fault for c in CASES if (fault := aot.KIND.fault_of(c, record["built"][c.name]))]
    assert {c.architecture for c in CASES} == {80, 89, 90, 100, 120}


# One forward and one backward kernel, and what finds the rows with gradient.
NOW = [chosen("wide", "apart", "bf16", 90), chosen("dk", "heads64", "bf16", 80), chosen("prepare", "heads64", "bf16", 90)]


@pytest.mark.parametrize("case", NOW, ids=lambda c: c.name)
def test_record_is_what_the_compiler_makes_now(case):
    """Every number of the record again."""
    rows = aot.build(case)
    assert [asdict(b) for b in rows] == json.loads(aot.KIND.path.read_text())["built"][case.name] and not aot.faults(case, rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_of_hopper_builds_again():
    """The record's numbers for sm_90, and the same limits for float16."""
    cases = aot.cases((90,)) + aot.cases((90,), ("fp16",))
    record = json.loads(aot.KIND.path.read_text())["built"]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for case, rows in zip(cases, pool.map(aot.build, cases)):
            assert not aot.faults(case, rows)
            assert case.dtype == "fp16" or [asdict(b) for b in rows] == record[case.name]


def test_no_build_depends_on_the_video():
    """Frames, patches, heads and pairs are run-time arguments: the constants and the specialised ones are the same for all videos."""
    seen = set()
    for grid, shape in (((6, 30, 45), (1, 48, 64)), ((13, 30, 45), (1, 30, 64)), ((21, 30, 52), (1, 40, 128))):
        with torch.device("meta"):
            for kernel, values in launched(grid, shape):
                never = {p.name for p in kernel.params if p.do_not_specialize}
                assert {"size", "dim_units", "blocks"} & set(values) <= never
                constant = tuple((p.name, values[p.name]) for p in kernel.params if p.is_constexpr)
                seen.add((kernel.__name__, constant))
    assert len(seen) == 5, seen


def launched(grid, shape):
    """(kernel, arguments) of a forward and backward of 16-bit heads apart."""
    from unittest import mock

    from vidkern.bench.aot_launch import launches
    from vidkern.ops.attention_motion_flow import triton as launchers

    pairs = tuple((i, j) for i in range(grid[0]) for j in range(grid[0]))
    size = grid[1] * grid[2]
    q = torch.empty(1, shape[0], shape[1], grid[0] * size, shape[2], dtype=torch.bfloat16)
    mean, lse = torch.empty(1, shape[0], len(pairs), size, 2), torch.empty(1, shape[0], len(pairs), size)
    shared = {"grid": grid, "scale": 0.1}

    def call():
        launchers.forward(q, q, pairs, **shared, mean=mean, index=None, lse=lse, top=None, entropy=None)
        launchers.backward(mean, lse, q, q, mean, lse, pairs, **shared, dq=q, dk=q)

    with mock.patch.object(launchers, "_device", lambda device: ("hopper", 132)):
        found = {}
        for kernel, _, values in launches(launchers, call):
            found[kernel.__name__] = (kernel, values)
    return list(found.values())


# ---- tables, which need no GPU either -------------------------------------------------------------------------------------
PAIRS = ((2, 0), (0, 1), (0, 2), (3, 2), (2, 2))


@pytest.mark.parametrize("size, block", [(70, 64), (70, 32), (5, 16), (64, 64)])
def test_tiles_hold_every_row_of_every_pair_once(size, block):
    tables = triton_tables.across(PAIRS, size, block, torch.device("cpu"))
    rows = []
    for target, member, first, count in tables.tiles.tolist():
        for row in range(first, min(first + block, count)):
            frame, pair = tables.members[member + row // size].tolist()
            assert PAIRS[pair] == (frame, target)
            rows.append((pair, row % size))
    assert sorted(rows) == [(p, s) for p in range(len(PAIRS)) for s in range(size)]
    for which in (0, 1):
        tables = triton_tables.within(PAIRS, which, size, block, 5, torch.device("cpu"))
        seen, visited = [], []
        for frame, first, start, end in tables.tiles.tolist():
            seen += [(frame, s) for s in range(first, min(first + block, size))]
            found = tables.members[start:end].tolist()
            assert [PAIRS[p] for _, p in found] == [(frame, o) if which == 0 else (o, frame) for o, _ in found]
            visited += [p for _, p in found] if first == 0 else []
        assert sorted(seen) == [(f, s) for f in range(5) for s in range(size)] and sorted(visited) == list(range(len(PAIRS)))


def test_slabs_begin_and_end_every_sum_once():
    table = triton_tables.slots(PAIRS, 5, torch.device("cpu"))
    assert table.no_query == (1, 4) and table.no_target == (3, 4) and table.added
    begun, ended = [], []
    for frame, slot, count in table.slabs:
        for s in range(slot, slot + count):
            (target, pair), (first, last) = table.slots[s].tolist(), table.shares[s].tolist()
            assert PAIRS[pair] == (frame, target) and first == (target not in begun) and target not in ended
            begun += [target] * first
            ended += [target] * last
    assert sorted(begun) == sorted(ended) == [0, 1, 2]
    assert not triton_tables.slots(((0, 1), (0, 0)), 2, torch.device("cpu")).added


def test_the_choice_fills_the_last_wave():
    """One frame pair of 1350 rows leaves most of 132 processors idle with tall tiles; all pairs of 13 frames do not."""
    few = configs.choose("wide", 2, 1 << 30, "hopper", 1350, 1350, 1, 132)
    many = configs.choose("wide", 2, 1 << 30, "hopper", 13 * 13 * 1350, 1350, 1, 132)
    assert few.block_m < many.block_m and many.lean
    assert not configs.choose("wide", 2, 1 << 30, "hopper", 13 * 13 * 1350, 1350, 1, 132, lean=False).lean
    with configs.forced("wide", few):
        assert configs.choose("wide", 2, 1 << 30, "hopper", 13 * 13 * 1350, 1350, 1, 132) == few
    with pytest.raises(ValueError, match="kind: 'tall', expected one of"), configs.forced("tall", few):
        pass


def test_faults_are_found():
    case = chosen("wide", "apart", "bf16", 90)
    good = aot.Built("forward_kernel", 128, 0, 98304, {"HGMMA": 4})
    assert not aot.faults(case, [good])
    assert "spilled" in aot.faults(case, [aot.Built("forward_kernel", 255, 8, 98304, {"HGMMA": 4})])[0]
    assert "no matrix instruction" in aot.faults(case, [aot.Built("forward_kernel", 128, 0, 98304, {})])[0]
    assert "no HGMMA" in aot.faults(case, [aot.Built("forward_kernel", 128, 0, 98304, {"HMMA": 4})])[0]
    small = chosen("wide", "apart", "bf16", 120)
    assert "shared memory" in aot.faults(small, [aot.Built("forward_kernel", 128, 0, 110_000, {"HMMA": 4})])[0]
    assert aot.KIND.fault_of(case, "CompilationError: x") == f"{case.name}: CompilationError: x"


def test_a_record_goes_on_where_it_stopped(tmp_path):
    """Rows that are there are not built again; the file keeps its form, and no other is left beside it."""
    path = tmp_path / "amf.json"
    path.write_text(aot.KIND.path.read_text())
    before = json.loads(path.read_text())
    assert aot.KIND.make(CASES[:5], path, 1) == before["built"]
    assert path.read_text() == aot.KIND.path.read_text() and list(tmp_path.iterdir()) == [path]
