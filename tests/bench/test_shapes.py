"""The named shapes are the published ones, and scaling keeps what defines the tiling problem."""

import pytest

from vidkern.bench import peers
from vidkern.bench.peers import grid_attention
from vidkern.bench.shapes import BUDGET, GRID, forward_flops, scaled

# Length, keys per query, forward TFLOP: 4 B H D L K.
TABLE = {
    "A": (9_216, 2_160, 0.33),
    "B": (18_432, 3_312, 1.00),
    "C": (73_728, 13_248, 16.0),
    "D": (294_912, 52_992, 256),
    "E": (262_080, 43_680, 234),
    "F": (140_400, 27_000, 46.6),
    "G": (262_080, 43_680, 70.3),
    "H": (1_024, 448, 0.0002),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    length, keys, teraflops = TABLE[name]
    s = GRID[name]
    assert (s.length, s.keys) == (length, keys)
    assert forward_flops(s) == 4 * s.batch * s.heads * s.head_dim * length * keys
    assert forward_flops(s) * 1e-12 == pytest.approx(teraflops, rel=0.2 if name == "H" else 0.02)


def test_cpu_shape_is_47_gigaflop_forward_and_165_with_backward():
    assert grid_attention.work(GRID["cpu"], 4, "fwd").flops * 1e-9 == pytest.approx(47.2, abs=0.1)
    assert grid_attention.work(GRID["cpu"], 4, "fwdbwd").flops * 1e-9 == pytest.approx(165.3, abs=0.1)


@pytest.mark.parametrize("name", GRID)
def test_scaling_fits_and_keeps_the_tiling_problem(name):
    s = GRID[name]
    small, rule = scaled(s, "cpu")
    assert (small.tokens, small.head_dim) == (s.tokens, s.head_dim)
    assert forward_flops(small) <= BUDGET["cpu"]
    assert bool(rule) == (small != s)
    assert small.views >= 2 and small.times >= 2 and small.heads <= s.heads
    assert scaled(s, "cuda") == (s, "")


def test_small_shapes_are_not_scaled():
    assert all(scaled(GRID[n], "cpu")[1] == "" for n in ("cpu", "H", "small"))


@pytest.mark.parametrize("op", peers.names())
def test_every_suite_names_shapes_that_exist(op):
    suite = peers.load(op)
    used = {*suite.default["cpu"], *suite.default["cuda"], suite.quick, *(s for t in suite.targets for s in t.shapes)}
    assert used <= set(suite.shapes)
    names = [p.name for p in suite.candidates]
    assert len(set(names)) == len(names)
    known = {*names, *(p.group for p in suite.candidates)}
    calls = set(suite.overheads("cpu")) if suite.overheads else set()
    assert {a for t in suite.targets for a in t.against} <= known | calls
