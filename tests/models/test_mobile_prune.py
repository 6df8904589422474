"""Keep-lists, sensitivity, greedy allocation, latency budgets, checkpoints of cut models, and what is refused."""

import dataclasses
import json
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidkern.errors import UserError
from vidkern.models.mobile_dit import (
    BudgetError, Calibration, Keep, KeepError, LatencyCost, LayoutError, MobileDiT, ParameterCost, Unit, allocate, compact, distance, load,
    masks_of, measure_latency, pack, parameter_count, prune, save, scores, select, unit_masks, units,
)
from vidkern.models.mobile_dit.allocation import smallest
from vidkern.models.mobile_dit.keep import keep_of
from vidkern.models.shared import TableConfig, TableSpec

SMALL = TableConfig(channels=4, dim=48, heads=3, head_dim=16, group=16, text_dim=8, freq_dim=16, rope_axes=(8, 4, 4),
                    blocks=(TableSpec(heads=3, cross_heads=3, hidden=64),) * 4)
WHOLE = Keep.everything(SMALL)


@pytest.fixture
def model(randomise):
    return randomise(MobileDiT(SMALL), spread=0.2).eval()


@pytest.fixture
def calibration(generator):
    return Calibration.of(torch.randn(2, 4, 2, 2, 2, generator=generator), torch.randn(2, 3, 8, generator=generator), times=4)


def cost_of(keep, config=SMALL):
    keep = keep.checked(config)
    return ParameterCost(config).total([(len(keep.heads[b]), len(keep.xheads[b]), len(keep.ffn[b]) * config.group) for b in keep.blocks])


def subset(small, large):
    return set(small.blocks) <= set(large.blocks) and all(
        set(getattr(small, level)[b]) <= set(getattr(large, level)[b]) for level in ("heads", "xheads", "ffn") for b in small.blocks)


# ---- keep-lists ---------------------------------------------------------------------------------------------------------------------
def test_keep_lists_are_json(tmp_path):
    keep = Keep((0, 3), {3: (0, 2)}, {0: (1,)}, {3: (0, 1)}, 16)
    wanted = {"blocks": [0, 3], "heads": {"3": [0, 2]}, "xheads": {"0": [1]}, "ffn": {"3": {"group": 16, "keep": [0, 1]}}}
    assert keep.to_dict() == wanted and Keep.from_dict(wanted) == keep
    keep.save(tmp_path / "k.json")
    assert json.loads((tmp_path / "k.json").read_text()) == wanted and Keep.load(tmp_path / "k.json") == keep
    assert Keep.from_dict({"blocks": [0, 1, 2, 3]}, group=16).checked(SMALL) == WHOLE
    assert keep.checked(SMALL).heads == {0: (0, 1, 2), 3: (0, 2)} and keep.has(Unit("heads", 3, 2), SMALL)
    assert not keep.has(Unit("ffn", 1, 0), SMALL) and not keep.has(Unit("ffn", 3, 2), SMALL)
    assert WHOLE.without(Unit("block", 1), Unit("xheads", 2, 0)).checked(SMALL).xheads == {0: (0, 1, 2), 2: (1, 2), 3: (0, 1, 2)}
    assert len(units(SMALL)) == 4 * (1 + 3 + 3 + 4)


BAD = {
    "unsorted": ({"heads": {"0": [2, 0]}}, r"heads of block 0: \[2, 0\] is not sorted"),
    "repeated": ({"xheads": {"1": [0, 0]}}, r"xheads of block 1: \[0, 0\] repeats 0"),
    "too large": ({"heads": {"0": [0, 3]}}, r"heads of block 0: 3 is out of range, expected 0 to 2"),
    "negative": ({"heads": {"0": [-1, 0]}}, r"heads of block 0: -1 is out of range"),
    "not whole": ({"heads": {"0": [0.5]}}, r"heads of block 0: \[0.5\], expected integers"),
    "all heads": ({"heads": {"2": []}}, r"heads of block 2: none is kept, expected at least 1 \(or remove the block"),
    "all channels": ({"ffn": {"2": {"group": 16, "keep": []}}}, r"ffn of block 2: none is kept, expected at least 1$"),
    "no blocks": ({"blocks": []}, r"blocks: none is kept, expected at least 1"),
    "blocks out of range": ({"blocks": [0, 4]}, r"blocks: 4 is out of range, expected 0 to 3"),
    "a removed block": ({"blocks": [0, 1], "heads": {"3": [0]}}, r"heads: names block 3, expected one of the kept blocks \[0, 1\]"),
    "another group": ({"ffn": {"0": {"group": 32, "keep": [0]}}}, r"ffn: group=32, expected the model's own, 16"),
    "two groups": ({"ffn": {"0": {"group": 16, "keep": [0]}, "1": {"group": 32, "keep": [0]}}}, r"ffn: groups of \[16, 32\] channels"),
    "unknown": ({"channels": {}}, r"keep-list: unknown entries \['channels'\]"),
    "not a form": ({"ffn": {"0": [0, 1]}}, r"keep-list: TypeError .*, expected \{"),
    "a name": ({"heads": {"first": [0]}}, r"keep-list: ValueError .*, expected \{"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_keep_lists(model, case):
    changes, message = BAD[case]
    with pytest.raises(KeepError, match=message):
        compact(model, Keep.from_dict({"blocks": [0, 1, 2, 3], **changes}, group=16))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "k.json").write_text("{")
    with pytest.raises(KeepError, match=r"k.json: .*, expected a keep-list in JSON"):
        Keep.load(tmp_path / "k.json")


def test_masks_and_keep_lists_are_the_same_thing():
    keep = Keep((0, 2), {2: (1,)}, {0: (0, 2)}, {2: (0, 3)}, 16).checked(SMALL)
    masks = masks_of(keep, SMALL)
    assert keep_of(masks, SMALL) == keep and keep_of(unit_masks(SMALL), SMALL) == WHOLE
    channels = unit_masks(SMALL)
    channels[0]["heads"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(16)
    assert keep_of(channels, SMALL).heads[0] == (0, 2)
    channels[0]["heads"][3] = 0.0
    with pytest.raises(KeepError, match="heads of block 0: 15 of 16 channels of 0 are kept, expected all or none"):
        keep_of(channels, SMALL)
    channels = unit_masks(SMALL)
    channels[3]["ffn"] = torch.ones(64)
    channels[3]["ffn"][16:20] = 0.0
    with pytest.raises(KeepError, match="ffn of block 3: 12 of 16 channels of 1 are kept"):
        keep_of(channels, SMALL)
    masks[2]["ffn"][0] = 0.5
    with pytest.raises(KeepError, match="ffn of block 2: mask holds 0.5, expected 0 or 1"):
        keep_of(masks, SMALL)
    masks[2]["ffn"] = torch.ones(5)
    with pytest.raises(KeepError, match=r"mask of shape \(5,\), expected 4 or 64 numbers"):
        keep_of(masks, SMALL)


# ---- sensitivity ---------------------------------------------------------------------------------------------------------------------
def test_the_gradient_of_the_distance_is_zero_and_the_scores_are_not(model, calibration):
    """The trap: at the unpruned model a |dD/dm| score is 0 for every unit."""
    masks = unit_masks(SMALL, requires_grad=True)
    wanted = calibration.velocities(model)
    out = model(calibration.z, calibration.sigma, calibration.text, masks=masks)
    assert torch.equal(out, wanted)
    leaves = [mask for found in masks for mask in found.values()]
    grads = torch.autograd.grad((out - wanted).square().mean(), leaves)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    for how in ("exact", "difference", "fisher", "auto"):
        found = scores(model, calibration, how=how)
        assert set(found) == set(units(SMALL)) and all(value > 0 for value in found.values()), how


def test_exact_scores_are_the_distance_of_the_cut_model(model, calibration):
    found = scores(model, calibration, how="exact")
    for unit in (Unit("block", 1), Unit("heads", 0, 2), Unit("xheads", 3, 0), Unit("ffn", 2, 1)):
        cut = compact(model, WHOLE.without(unit))
        assert found[unit] == pytest.approx(distance(cut, model, calibration), rel=1e-4)
    left = WHOLE.without(Unit("block", 2), Unit("heads", 0, 0))
    later = scores(model, calibration, how="exact", keep=left)
    assert Unit("block", 2) not in later and Unit("ffn", 2, 0) not in later and Unit("heads", 0, 0) not in later
    both, one = (distance(compact(model, k), model, calibration) for k in (left.without(Unit("ffn", 3, 1)), left))
    assert later[Unit("ffn", 3, 1)] == pytest.approx(both - one, rel=1e-3)


def test_the_finite_difference_is_the_second_order_form(model, calibration):
    """mean |J_u|^2 with the Jacobian by autograd."""
    found = scores(model, calibration, how="difference", epsilon=1e-2)
    for unit, name in ((Unit("heads", 1, 2), "heads"), (Unit("ffn", 0, 3), "ffn")):
        def velocity(value, unit=unit, name=name):
            masks = unit_masks(SMALL)
            masks[unit.block][name] = torch.where(torch.arange(len(masks[unit.block][name])) == unit.index, value, masks[unit.block][name])
            return model(calibration.z, calibration.sigma, calibration.text, masks=masks)
        with sdpa_kernel(SDPBackend.MATH):                                  # the others have no second derivative, which this takes
            column = torch.autograd.functional.jvp(velocity, torch.tensor(1.0), torch.tensor(1.0))[1]
        assert found[unit] == pytest.approx(float(column.square().mean()), rel=0.05)


def test_fisher_scores_are_squared_gradients_of_each_sample(model, calibration):
    by_hand = dict.fromkeys([Unit("heads", 2, 1), Unit("ffn", 1, 0), Unit("block", 3)], 0.0)
    for i in range(len(calibration)):
        masks = unit_masks(SMALL, requires_grad=True)
        out = model(calibration.z[i : i + 1], calibration.sigma[i : i + 1], calibration.text[i : i + 1], masks=masks)
        loss = (out - calibration.target[i : i + 1]).square().mean()
        one = torch.autograd.grad(loss, [masks[2]["heads"], masks[1]["ffn"], masks[3]["block"]])
        for unit, grad in zip(by_hand, (one[0][1], one[1][0], one[2])):
            by_hand[unit] += float(grad) ** 2 / len(calibration)
    found = scores(model, calibration, how="fisher")
    ratios = [found[unit] / value for unit, value in by_hand.items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)          # one common scale
    exact = scores(model, calibration, how="exact")
    blocks = [Unit("block", b) for b in range(4)]
    assert sum(found[u] for u in blocks) == pytest.approx(sum(exact[u] for u in blocks), rel=1e-4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    auto = scores(model, calibration, how="auto")
    assert all(auto[u] == exact[u] for u in blocks) and auto[Unit("ffn", 1, 0)] == pytest.approx(found[Unit("ffn", 1, 0)])


def test_a_duplicated_head_matters_less(model, calibration):
    """A head split into two halves that do the same: either half matters less than the whole one did."""
    attention, D = model.blocks[1].attention, SMALL.head_dim
    with torch.no_grad():
        weight = attention.qkv.weight.unflatten(0, (3, 3, D))
        weight[:, 1] = weight[:, 0]
        attention.qkv.bias.unflatten(0, (3, 3, D))[:, 1] = attention.qkv.bias.unflatten(0, (3, 3, D))[:, 0]
        whole = attention.out.weight[:, :D].clone()
        attention.out.weight[:, D : 2 * D] = 0
        before = {how: scores(model, calibration, how=how) for how in ("exact", "difference", "fisher")}
        attention.out.weight[:, :D] = attention.out.weight[:, D : 2 * D] = whole / 2
    for how, unique in before.items():
        found = scores(model, calibration, how=how)
        first, second = (found[Unit("heads", 1, i)] for i in (0, 1))
        assert first == pytest.approx(second, rel=1e-2) and first < 0.7 * unique[Unit("heads", 1, 0)], how


def test_magnitude_and_chance(model):
    found = scores(model, how="magnitude")
    rows = [p for name, p in compact(model, WHOLE.without(*(Unit("ffn", 0, i) for i in (1, 2, 3)))).named_parameters()
            if name in ("blocks.0.ffn.up.weight", "blocks.0.ffn.down.weight")]
    assert found[Unit("ffn", 0, 0)] == pytest.approx(sum(float(p.detach().square().sum()) for p in rows), rel=1e-5)
    assert found[Unit("block", 0)] == pytest.approx(sum(v for u, v in found.items() if u.block == 0 and u.level != "block"), rel=1e-6)
    assert scores(model, how="random", seed=1) == scores(model, how="random", seed=1) != scores(model, how="random", seed=2)


def test_bad_calibration_and_methods(model, calibration):
    with pytest.raises(ValueError, match="how='taylor': expected one of"):
        scores(model, calibration, how="taylor")
    with pytest.raises(ValueError, match="calibration: None, expected a Calibration for how='exact'"):
        scores(model, how="exact")
    with pytest.raises(ValueError, match="x0: 0 latents, 3 texts, times=8"):
        Calibration.of(torch.zeros(0, 4, 2, 2, 2), torch.zeros(3, 3, 8))
    with pytest.raises(ValueError, match="model: packed, expected one with plain layers"):
        scores(compact(model, WHOLE, packed=True), calibration)
    again = Calibration.of(torch.ones(2, 4, 2, 2, 2), torch.ones(2, 3, 8), times=4)
    assert torch.equal(again.sigma, torch.tensor([0.125, 0.375, 0.625, 0.875] * 2)) and len(again) == 8
    assert torch.equal(again.z, Calibration.of(torch.ones(2, 4, 2, 2, 2), torch.ones(2, 3, 8), times=4).z)


# ---- allocation ----------------------------------------------------------------------------------------------------------------------
def test_an_identity_block_goes_first(model, calibration):
    with torch.no_grad():
        for layer in (model.blocks[2].attention.out, model.blocks[2].cross.out, model.blocks[2].ffn.down):
            layer.weight.zero_(), layer.bias.zero_()
    for how in ("exact", "difference", "fisher", "auto"):
        trace = []
        prune(model, budget=0.8, calibration=calibration, how=how, trace=trace, remeasure=False)
        assert all(units[0].block == 2 for units, _ in trace[:1]), how
        if how in ("exact", "auto"):
            assert trace[0][0] == (Unit("block", 2),)


@pytest.mark.parametrize("tie", [True, False])
def test_the_budget_is_met_within_one_unit_and_selections_are_nested(model, calibration, tie):
    found, kept = scores(model, calibration), []
    full = cost_of(WHOLE)
    for share in (0.9, 0.7, 0.5, 0.35):
        trace = []
        keep = allocate(SMALL, found, share * full, tie=tie, trace=trace)
        assert cost_of(keep) <= share * full == pytest.approx(share * full) and trace[-1][1] == cost_of(keep)
        before = trace[-2][1] if len(trace) > 1 else full
        assert before > share * full                                             # one removal less would not have met it
        assert parameter_count(compact(model, keep)) == cost_of(keep)
        assert keep == allocate(SMALL, found, share * full, tie=tie)
        assert {0, 3} <= set(keep.blocks) and all(len(getattr(keep, level)[b]) >= 1 for level in ("heads", "xheads", "ffn") for b in keep.blocks)
        assert not tie or all(len(keep.heads[b]) == len(keep.xheads[b]) for b in keep.blocks)
        kept.append(keep)
    assert all(subset(small, large) for large, small in zip(kept, kept[1:]))


def test_the_cheapest_quality_per_parameter_goes_first():
    """By hand: equal scores, so the greatest saving goes first; then the least score among equals."""
    even = {u: 1.0 for u in units(SMALL)}
    trace = []
    allocate(SMALL, even, cost_of(WHOLE) - 1, trace=trace)
    assert trace[0][0] == (Unit("block", 1),)
    even = {u: 100.0 if u.level == "block" else 1.0 for u in units(SMALL)} | {Unit("ffn", 3, 2): 0.5, Unit("ffn", 0, 1): 0.5}
    trace = []
    allocate(SMALL, even, cost_of(WHOLE) - 1, trace=trace)
    # A pair of heads scores 2 for 12.4k parameters, a group 0.5 for 1.6k.
    assert trace[0][0] == (Unit("heads", 0, 0), Unit("xheads", 0, 0))
    even[Unit("ffn", 3, 2)] = 0.1
    trace = []
    allocate(SMALL, even, cost_of(WHOLE) - 1, trace=trace)
    assert trace[0][0] == (Unit("ffn", 3, 2),)


def test_scores_are_measured_again(model, calibration):
    rounds = []

    def remeasure(keep):
        rounds.append(keep)
        return scores(model, calibration, keep=keep)

    keep = allocate(SMALL, scores(model, calibration), 0.4 * cost_of(WHOLE), remeasure=remeasure, every={"block": 1, "heads": 2, "ffn": 3})
    assert len(rounds) > 2 and cost_of(keep) <= 0.4 * cost_of(WHOLE)
    assert all(subset(later, earlier) for earlier, later in zip(rounds, rounds[1:] + [keep]))
    found = scores(model, calibration, how="fisher")
    with pytest.raises(ValueError, match=r"remeasure: scores of 44 units, expected those of the \d+ that are left"):
        allocate(SMALL, found, 0.4 * cost_of(WHOLE), remeasure=lambda keep: found, every={"block": 1, "heads": 2, "ffn": 3})


def test_unreachable_budgets_name_the_smallest(model, calibration):
    least = smallest(SMALL, ParameterCost(SMALL))
    assert least == cost_of(Keep((0, 3), {0: (0,), 3: (0,)}, {0: (0,), 3: (0,)}, {0: (0,), 3: (0,)}, 16))
    with pytest.raises(BudgetError, match=rf"budget={least - 1:,}: expected at least {least:,} parameters, the smallest that can be reached"):
        prune(model, budget=least - 1, calibration=calibration)
    keep = prune(model, budget=least, calibration=calibration)
    assert cost_of(keep) == least and keep.blocks == (0, 3)
    for bad in (0, -5, float("nan"), "small", True):
        with pytest.raises(BudgetError, match="budget=.*: expected a positive number"):
            prune(model, budget=bad, calibration=calibration)
    with pytest.raises(ValueError, match="budget=None, counts=None: expected one of the two"):
        prune(model, calibration=calibration)
    assert issubclass(BudgetError, UserError)


def test_uniform_counts(model, calibration):
    found = scores(model, calibration)
    keep = prune(model, counts={"blocks": 3, "heads": 2, "hidden": 32}, calibration=calibration)
    assert keep == select(SMALL, found, blocks=3, heads=2, hidden=32)
    gone = min((1, 2), key=lambda b: found[Unit("block", b)])
    assert set(keep.blocks) == {0, 1, 2, 3} - {gone}
    for b in keep.blocks:
        assert [len(getattr(keep, level)[b]) for level in ("heads", "xheads", "ffn")] == [2, 2, 2]
        assert min(range(3), key=lambda i: found[Unit("heads", b, i)]) not in keep.heads[b]
    for counts, message in (({"blocks": 1, "heads": 2, "hidden": 32}, "blocks=1: expected 2 to 4"),
                            ({"blocks": 3, "heads": 4, "hidden": 32}, "heads: block 0 has 3 heads, expected at least 4"),
                            ({"blocks": 3, "heads": 0, "hidden": 32}, "heads=0: expected at least 1"),
                            ({"blocks": 3, "heads": 2, "hidden": 40}, "hidden=40: expected a positive multiple of the group, 16"),
                            ({"blocks": 3, "heads": 2, "hidden": 128}, "hidden: block 0 has 4 ffn, expected at least 8")):
        with pytest.raises(BudgetError, match=message):
            prune(model, counts=counts, calibration=calibration)
    with pytest.raises(ValueError, match=r"counts: \['blocks'\], expected blocks, heads, hidden"):
        prune(model, counts={"blocks": 3}, calibration=calibration)


def test_a_budget_of_milliseconds(model, calibration, tmp_path):
    """A table in which FFN channels cost nothing below 32, and heads much: no group goes for nothing, and the budget is met."""
    table = LatencyCost(base=1.0, fixed=0.5, tables={"heads": [(1, 1.0), (3, 3.0)], "cross_heads": [(1, 0.1), (3, 0.1)],
                                                     "hidden": [(16, 0.4), (32, 0.3), (64, 0.9)]})
    assert table.block(2, 1, 48) == pytest.approx(0.5 + 2.0 + 0.1 + 0.65) and table.block(0, 0, 16) == pytest.approx(0.9)
    assert table.block(6, 3, 64) == pytest.approx(0.5 + 6.0 + 0.1 + 0.9)                  # beyond the table: in proportion
    full = table.total([(3, 3, 64)] * 4)
    trace = []
    keep = prune(model, budget=0.6 * full, calibration=calibration, cost=table, trace=trace)
    used = table.total([(len(keep.heads[b]), len(keep.xheads[b]), 16 * len(keep.ffn[b])) for b in keep.blocks])
    assert used <= 0.6 * full and used == pytest.approx(trace[-1][1])
    # Milliseconds, also below 1: no share of the model's own.
    with pytest.raises(BudgetError, match=r"budget=0.5: expected at least 5.0 milliseconds, the smallest that can be reached"):
        prune(model, budget=0.5, calibration=calibration, cost=table)
    table.save(tmp_path / "t.json")
    assert LatencyCost.load(tmp_path / "t.json") == table
    with pytest.raises(ValueError, match="tables: no points of 'hidden'"):
        LatencyCost(base=1.0, fixed=0.0, tables={"heads": [(1, 1.0)], "cross_heads": [(1, 1.0)]})


def test_a_table_is_measured():
    table = measure_latency(SMALL, (2, 2, 2), 3, points=2, repeats=2)
    assert table.base >= 0 and table.fixed >= 0 and [n for n, _ in table.tables["hidden"]] == [16, 64]
    assert all(a[1] <= b[1] for points in table.tables.values() for a, b in zip(points, points[1:]))
    assert table.total([(3, 3, 64)]) > 0
    for points in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match=f"points={points}: expected an integer of at least 2"):
            measure_latency(SMALL, (2, 2, 2), 3, points=points, repeats=1)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_cut_models_reload(model, tmp_path, packed, generator):
    keep = Keep((0, 2, 3), {0: (1, 2), 3: (0,)}, {2: (2,)}, {0: (0, 3)}, 16)
    cut, path = compact(model, keep, packed=packed), tmp_path / "cut.safetensors"
    save(cut, path, keep)
    assert sorted(os.listdir(tmp_path)) == ["cut.keep.json", "cut.safetensors"] and Keep.load(tmp_path / "cut.keep.json") == keep
    z, sigma, text = torch.randn(1, 4, 2, 2, 2, generator=generator), torch.tensor([0.5]), torch.randn(1, 3, 8, generator=generator)
    for again in (load(path, SMALL), load(path, SMALL, packed=True), load(path, SMALL, keep=keep)):
        torch.testing.assert_close(again(z, sigma, text), cut(z, sigma, text), rtol=1e-5, atol=1e-5)


def test_checkpoints_of_another_layout_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    keep, other = Keep((0, 3), {}, {}, {}, 16), Keep((0, 3), {0: (1,)}, {}, {}, 16)
    path = tmp_path / "cut.safetensors"
    save(compact(model, keep), path, keep)
    with pytest.raises(LayoutError, match="was saved with another keep-list than the given one"):
        load(path, SMALL, keep=other)
    with pytest.raises(LayoutError, match=r"blocks.0.attention.q.* has shape \(\d+,?.*\), expected"):
        load(path, dataclasses.replace(SMALL, blocks=(TableSpec(heads=2, cross_heads=3, hidden=64),) * 4))
    with pytest.raises(KeepError, match="blocks: 3 is out of range"):
        load(path, dataclasses.replace(SMALL, blocks=SMALL.blocks[:3]))
    with pytest.raises(LayoutError, match="caption.0.weight has shape"):
        load(path, dataclasses.replace(SMALL, text_dim=16))
    with pytest.raises(LayoutError, match="blocks.0.attention.k_norm.weight is not expected for this configuration"):
        load(path, dataclasses.replace(SMALL, qk_norm="none"))
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    with pytest.raises(LayoutError, match="format None, expected 'vidkern.mobile_dit/1'"):
        load(tmp_path / "dense.safetensors", SMALL)
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(LayoutError, match="text.safetensors: .*, expected a safetensors file"):
        load(tmp_path / "text.safetensors", SMALL)
    with pytest.raises(LayoutError, match="none.safetensors: no such file"):
        load(tmp_path / "none.safetensors", SMALL)
    for metadata in ({}, {"keep": "{"}, {"keep": "[]"}, {"keep": '{"blocks": 3}'}):
        save_file(compact(model, keep).state_dict(), path, metadata={"format": "vidkern.mobile_dit/1", **metadata})
        with pytest.raises(LayoutError, match="cut.safetensors: has no readable keep-list, expected one in its metadata"):
            load(path, SMALL)


def test_the_list_beside_a_file_is_for_readers(model, tmp_path):
    keep, path = Keep((0, 3), {}, {}, {}, 16), tmp_path / "cut.safetensors"
    cut = compact(model, keep)
    save(cut, path, keep)
    for text in (None, "{", '{"blocks": [0, 2]}'):
        (tmp_path / "cut.keep.json").unlink(missing_ok=True)
        if text:
            (tmp_path / "cut.keep.json").write_text(text)
        with pytest.warns(UserWarning, match="cut.keep.json: not the keep-list of cut.safetensors, which is read from cut.safetensors itself"):
            again = load(path, SMALL)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), cut.parameters(), strict=True))


def test_lists_of_another_model_are_not_saved(model, tmp_path):
    """Counts of every named block, and what could not be read again."""
    keep = Keep((0, 2, 3), {0: (1, 2), 3: (0,)}, {2: (2,)}, {0: (0, 3)}, 16)
    cut = compact(model, keep)
    for changes, message in (
        ({"blocks": (0, 2)}, "keep: 2 blocks, expected the model's 3"), ({"blocks": (0, 3, 2)}, r"blocks: \[0, 3, 2\] is not sorted"),
        ({"heads": {0: (1,), 3: (0,)}}, "keep: 1 heads of block 0, expected 2 as in block 0 of the model"),
        ({"heads": {0: (1, 2), 3: ()}}, "keep: 0 heads of block 3, expected 1 as in block 2 of the model"),
        ({"xheads": {2: (0, 1)}}, "keep: 2 xheads of block 2, expected 1 as in block 1 of the model"),
        ({"ffn": {0: (0, 1, 3)}}, "keep: 3 ffn of block 0, expected 2 as in block 0 of the model"),
        ({"group": 32}, "keep: ffn groups of 32 channels, expected the model's 16"),
        ({"ffn": {1: (0, 3)}}, r"keep: ffn names block 1, expected one of the kept blocks \[0, 2, 3\]"),
        ({"heads": {0: (2, 1)}}, r"heads of block 0: \[2, 1\] is not sorted"),
    ):
        with pytest.raises(KeepError, match=message):
            save(cut, tmp_path / "cut.safetensors", dataclasses.replace(keep, **changes))
    assert os.listdir(tmp_path) == []
    save(pack(cut), tmp_path / "cut.safetensors", keep)


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_stop_between_two_files_leaves_one_that_loads(model, tmp_path, monkeypatch, stopped):
    """The old model or the new one, whole, wherever it happens."""
    keeps = [Keep((0, 3), {}, {}, {}, 16), Keep((0, 2, 3), {0: (1,)}, {}, {}, 16)]
    cuts, path, moves, rename = [compact(model, k) for k in keeps], tmp_path / "cut.safetensors", [], os.replace
    save(cuts[0], path, keeps[0])

    def failing(source, target):
        if os.path.dirname(target) == str(tmp_path) and not os.path.basename(target).startswith("."):
            moves.append(target)
            if len(moves) >= stopped:
                raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save(cuts[1], path, keeps[1])
    monkeypatch.undo()
    if stopped == 1:
        again, wanted = load(path, SMALL), cuts[0]
    else:
        with pytest.warns(UserWarning, match="not the keep-list of cut.safetensors"):
            again, wanted = load(path, SMALL), cuts[1]
    assert again.config == wanted.config and all(torch.equal(a, b) for a, b in zip(again.parameters(), wanted.parameters(), strict=True))


def test_nothing_half_written(model, tmp_path, monkeypatch):
    keep = Keep((0, 3), {}, {}, {}, 16)
    with pytest.raises(KeepError, match="keep: 2 blocks, expected the model's 4"):
        save(model, tmp_path / "cut.safetensors", keep)

    def failing(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(Keep, "save", failing)
    with pytest.raises(OSError):
        save(compact(model, keep), tmp_path / "cut.safetensors", keep)
    assert os.listdir(tmp_path) == []
