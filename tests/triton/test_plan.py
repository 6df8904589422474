"""Plans cover every visible pair exactly once, waste what the tables say, and put the heaviest tile first."""

import itertools

import numpy as np
import pytest
import torch

from vidkern import GridPattern
from vidkern.ops.grid_attention import configs
from vidkern.ops.grid_attention.cost import SAMPLES
from vidkern.ops.grid_attention.plan import Shape, Tiling, plan, work

TILINGS = [Tiling(*blocks, straddle) for blocks in ((16, 32, 16), (64, 16, 16), (128, 64, 32)) for straddle in (False, True)]


def shape_of(sample, transposed):
    n_text = sample.n_text if sample.frames.text_visible else 0
    return Shape(sample.frames.key, sample.frame_len, n_text, sample.text_position == "front", transposed)


def visits(shape, tiling, length):
    """How often each (row, column) pair is computed with a weight other than 0, and how often each row is stored."""
    tables = plan(shape, tiling, torch.device("cpu"))
    tiles, main, edge = (t.numpy() for t in tables)
    pairs, rows = np.zeros((length, length), int), np.zeros(length, int)
    for first, end, main_first, n_main, edge_first, n_edge in tiles:
        assert 0 < end - first <= tiling.block_m
        rows[first:end] += 1
        for column in main[main_first : main_first + n_main]:
            pairs[first:end, column : column + tiling.block_n] += 1
        for c0, c1, r0, r1 in edge[edge_first : edge_first + n_edge]:
            assert 0 < c1 - c0 <= tiling.block_edge
            pairs[max(r0, first) : max(first, min(r1, end)), c0:c1] += 1
    return pairs, rows, tables


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_every_visible_pair_once(sample):
    n_text = sample.n_text if sample.frames.text_visible else 0
    seen = sample.frames.bool_mask(sample.frame_len, n_text=n_text, text_position=sample.text_position)[0, 0].numpy()
    for transposed, tiling in itertools.product((False, True), TILINGS):
        pairs, rows, _ = visits(shape_of(sample, transposed), tiling, len(seen))
        assert (rows == 1).all()
        assert (pairs == (seen.T if transposed else seen)).all(), (tiling, transposed)


@pytest.mark.parametrize("frame_len", [1, 7, 63, 64, 65, 96, 127, 128, 129, 144, 192])
def test_alignment_torture(frame_len):
    for grid, tiling in itertools.product(((1, 3), (3, 1), (2, 3)), TILINGS):
        pattern = GridPattern(*grid, causal_time=True)
        seen = pattern.bool_mask(frame_len)[0, 0].numpy()
        for transposed in (False, True):
            pairs, rows, _ = visits(Shape(pattern.key, frame_len, 0, True, transposed), tiling, len(seen))
            assert (rows == 1).all() and (pairs == (seen.T if transposed else seen)).all()


def test_work_is_what_the_tables_hold():
    for sample, transposed, tiling in itertools.product(SAMPLES[::3], (False, True), TILINGS):
        shape = shape_of(sample, transposed)
        tables, counted = plan(shape, tiling, torch.device("cpu")), work(shape, tiling)
        per_tile = tiling.block_m * (tables.tiles[:, 3] * tiling.block_n + tables.tiles[:, 5] * tiling.block_edge)
        assert counted.main + counted.edge == per_tile.sum()
        assert counted.heaviest == per_tile.max() == per_tile[0], "the heaviest tile goes first"
        assert (per_tile.diff() <= 0).all()


@pytest.mark.parametrize(
    "views, times, frame_len, tiling, useful",
    [
        # Executed score elements by hand: frames of 576 are 9 tiles of 64; 144 is 64 + 64 + 16 columns, and of 9 row tiles of 64
        # over 4 frames 3 cross a border and visit the columns of both frames.
        (8, 16, 576, Tiling(64, 64, 16, True), 1.0),
        (8, 8, 144, Tiling(64, 64, 16, True), 15 * 144 / (8 * 144 + 7 * 144 * (6 + 3 * 2) / 9)),
        (8, 8, 144, Tiling(64, 64, 16, False), 144 / 192),
        # Two frames of one view and the one after them in memory, the next view's first: one run of 3 x 100 columns for that row.
        (2, 2, 100, Tiling(128, 64, 16, False), 3 * 100 / (1.28 * (300 + 4 + 2 * 200 + 2 * 8 + 2 * 100 + 2 * 12 + 300 + 4) / 4)),
    ],
)
def test_useful_fraction(views, times, frame_len, tiling, useful):
    counted = work(Shape(GridPattern(views, times).key, frame_len, 0, True, False), tiling)
    assert counted.needed / (counted.main + counted.edge) == pytest.approx(useful, rel=1e-12)


def test_plans_are_built_once():
    shape, tiling = Shape(GridPattern(2, 3).key, 5, 0, True, False), TILINGS[0]
    assert plan(shape, tiling, torch.device("cpu")) is plan(shape, tiling, torch.device("cpu"))


@pytest.mark.parametrize("family", ["ampere", "hopper", "blackwell", "small"])
@pytest.mark.parametrize("kind", configs.KINDS)
def test_a_configuration_for_every_head_dim(kind, family):
    """Every head dim and element size has shipped configurations, and the choice is one of them, whatever the frame length."""
    for dim, itemsize in itertools.product(range(8, 257, 8), (2, 4)):
        shipped = configs.shipped(kind, dim, itemsize, family)
        for frame_len in (1, 36, 144, 576, 1350):
            shape = Shape(GridPattern(3, 4).key, frame_len, 0, True, kind == "dkv")
            config, tiling = configs.choose(kind, dim, itemsize, family, shape)
            assert config in shipped and tiling[:3] == (config.block_m, config.block_n, config.block_edge)
            assert config.straddle or not tiling.straddle


def test_the_choice_follows_the_work():
    """Tiles never cross frames that they divide, and short frames get short tiles."""
    at = lambda n: configs.choose("forward", 128, 2, "hopper", Shape(GridPattern(8, 8).key, n, 0, True, False))
    assert not at(512)[1].straddle and at(512)[0].block_m == 128
    assert at(576)[1].straddle and at(144)[0].block_m == 64 and at(1350)[0].block_m == 128


def test_forced_configurations_end_with_the_block():
    shape = Shape(GridPattern(2, 2).key, 16, 0, True, False)
    odd, other = configs.Config(16, 16, 16, 1, 1), configs.Config(32, 16, 16, 1, 1)
    assert configs.forced.get("forward") is None
    with configs.forced("forward", odd):
        assert configs.forced.get("forward") == odd and configs.forced.get("dq") is None
        with configs.forced("forward", other):
            assert configs.forced.get("forward") == other
        assert configs.forced.get("forward") == odd
    assert configs.forced.get("forward") is None
    assert configs.choose("forward", 64, 2, "ampere", shape, odd)[0] == odd
    with pytest.raises(ValueError, match="kind: 'sideways', expected one of"):
        with configs.forced("sideways", odd):
            pass


def test_candidates_fit():
    for kind, dim, shared in itertools.product(configs.KINDS, (64, 128), (99 * 1024, 227 * 1024)):
        found = configs.candidates(kind, dim, 2, shared)
        assert len(found) > 10 and len(set(found)) == len(found)
        assert all(c.block_edge <= c.block_n for c in found)
