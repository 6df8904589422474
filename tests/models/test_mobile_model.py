"""The mobile DiT: sizes, FLOPs, masks against cuts, and the two traps of head pruning (norm across heads, RoPE over the full width)."""

import copy
import dataclasses
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vidkern.nn  # before a counter of FLOPs takes down which ops there are
from vidkern.models.mobile_dit import (
    Keep, MobileDiT, ParameterCost, compact, compact_config, expand, masks_of, mobile, mobile_irregular, on_meta, pack, parameter_count,
    sample, server, times, tiny_student, tiny_teacher, unit_masks, unpack,
)
from vidkern.models.mobile_dit.config import IRREGULAR_HEADS, IRREGULAR_HIDDEN
from vidkern.models.mobile_dit.cost import forward_flops
from vidkern.models.mobile_dit.cutting import _slices
from vidkern.models.shared import FullWidthRope, TableConfig, TableSpec, denoise, euler, schedule

SMALL = TableConfig(channels=4, dim=48, heads=3, head_dim=16, group=16, text_dim=8, freq_dim=16, rope_axes=(8, 4, 4),
                    blocks=(TableSpec(heads=3, cross_heads=3, hidden=64),) * 4)
VARIANTS = {"head norm": {}, "full RoPE": {"rope": "full"}, "norm across heads": {"qk_norm": "all"},
            "both, divisor of the parent": {"qk_norm": "all", "rope": "full", "qk_divisor": 48}, "no norm": {"qk_norm": "none"}}
EVERYTHING = Keep.everything(SMALL)
KEEPS = {
    "block": Keep((0, 2, 3), {}, {}, {}, 16),
    "heads": Keep((0, 1, 2, 3), {0: (1, 2), 2: (0, 2), 3: (2,)}, {1: (1,), 3: (0, 2)}, {}, 16),
    "ffn": Keep((0, 1, 2, 3), {}, {}, {0: (1, 3), 3: (2,)}, 16),
    "all levels": Keep((0, 2, 3), {0: (1, 2), 3: (0,)}, {2: (2,), 3: (0, 1)}, {0: (0, 3), 2: (1, 2, 3)}, 16),
}


@pytest.fixture
def inputs(generator):
    return (torch.randn(2, 4, 2, 2, 3, generator=generator), torch.tensor([0.3, 0.8]), torch.randn(2, 3, 8, generator=generator))


@pytest.mark.parametrize("config, published", [(server, 1.92e9), (mobile, 0.96e9), (mobile_irregular, 0.96e9), (tiny_teacher, 1.0e6)])
def test_parameter_counts(config, published):
    """Section 3 of the specification derives them; the formula that budgets use is exact."""
    config = config()
    count = parameter_count(on_meta(config))
    assert count == pytest.approx(published, rel=0.02)
    assert count == ParameterCost(config).total([(s.heads, s.cross_heads, s.hidden) for s in config.blocks])


def test_irregular_lists_have_the_same_sums_and_fit_the_groups():
    assert sum(IRREGULAR_HEADS) == 400 and sum(IRREGULAR_HIDDEN) == 20 * 6144 and len(IRREGULAR_HEADS) == len(IRREGULAR_HIDDEN) == 20
    assert all(n % 128 == 0 for n in IRREGULAR_HIDDEN)
    student = tiny_student()
    assert [s.heads for s in student.blocks] == [4, 3, 2, 5] and 160 <= min(s.hidden for s in student.blocks)
    assert parameter_count(on_meta(student)) == pytest.approx(0.45e6, rel=0.1)


# Section 6.1 of the specification, GFLOP of one evaluation at paper scale.
PUBLISHED = {"ffn": 1353, "self_qkv": 423, "self_out": 141, "cross_q_out": 282, "self_attention": 185, "cross_kv_attention": 27}


def counted(config, shape, text):
    """{part: FLOPs} by torch's counter, from the modules of a model on the meta device; shape: (T, H, W)."""
    model = on_meta(config)
    z, said = (torch.empty(size, device="meta") for size in ((1, config.channels, *shape), (1, text, config.text_dim)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(z, torch.zeros(1, device="meta"), said)
    per = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    def total(*ends):
        return sum(value for name, value in per.items() if name.endswith(ends))

    found = {"ffn": total(".ffn"), "self_qkv": total(".attention.qkv"), "self_out": total(".attention.out"),
             "cross_q_out": total(".cross.q", ".cross.out"), "cross_kv": total(".cross.kv")}
    blocks = sum(value for name, value in per.items() if re.fullmatch(r".*\.blocks\.\d+", name))
    return {**found, "attention": blocks - sum(found.values()), "rest": counter.get_total_flops() - blocks}


def by_formula(config, tokens, text):
    """The same from `forward_flops`, whose attention parts are split between self and cross."""
    parts = forward_flops(config, tokens=tokens, text=text)
    kv = sum(4 * text * config.dim * spec.cross_heads * config.head_dim for spec in config.blocks)
    crossing = parts.pop("cross_kv_attention")
    attention = parts.pop("self_attention") + crossing - kv
    return {**parts, "cross_kv": kv, "attention": attention}


@pytest.mark.parametrize("config, published", [(mobile, 2410), (server, 4894)])
def test_flops_at_paper_scale(config, published):
    """Torch's counter, the formulas, and the published table agree."""
    parts = forward_flops(config(), tokens=1344, text=77)
    assert counted(config(), (7, 12, 16), 77) == by_formula(config(), 1344, 77)
    if config is mobile:
        assert {name: round(parts[name] / 1e9) for name in PUBLISHED} == PUBLISHED
    assert sum(value for name, value in parts.items() if name != "rest") / 1e9 == pytest.approx(published, rel=1e-3)


def test_flops_of_cut_and_packed_models():
    """Packed layers count like plain ones: only what is kept."""
    config = compact_config(SMALL, KEEPS["all levels"])
    wanted = by_formula(config, 12, 3)
    assert counted(config, (2, 2, 3), 3) == wanted
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        packed = MobileDiT(dataclasses.replace(config, packed=True))
        packed(torch.empty(1, 4, 2, 2, 3), torch.empty(1), torch.empty(1, 3, 8))
    per = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    assert sum(v for name, v in per.items() if name.endswith(".ffn")) == wanted["ffn"]
    assert sum(v for name, v in per.items() if name.endswith(".attention.qkv")) == wanted["self_qkv"]
    assert sum(v for name, v in per.items() if name.endswith((".cross.q", ".cross.out"))) == wanted["cross_q_out"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kept", KEEPS)
def test_masked_is_cut(randomise, inputs, variant, kept):
    """Outputs, and gradients of what is kept, to 1e-5; what is removed matters."""
    config, keep = dataclasses.replace(SMALL, **VARIANTS[variant]), KEEPS[kept]
    model = randomise(MobileDiT(config), spread=0.3)
    cut = compact(model, keep)
    masked, short = model(*inputs, masks=masks_of(keep, config)), cut(*inputs)
    torch.testing.assert_close(masked, short, rtol=1e-5, atol=1e-5)
    assert (masked - model(*inputs)).abs().max() > 0.05
    assert parameter_count(cut) < parameter_count(model)
    masked.square().sum().backward()
    short.square().sum().backward()
    slices, parent = _slices(config, keep.checked(config)), dict(model.named_parameters())
    for name, parameter in cut.named_parameters():
        source, axes = slices.get(name, (name, {}))
        wanted = parent[source].grad
        for axis, index in axes.items():
            wanted = wanted.index_select(axis, index)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()), msg=name)


@pytest.mark.parametrize("variant", ["head norm", "both, divisor of the parent"])
def test_packed_is_plain(randomise, inputs, variant):
    """vidkern's pruned layers give what ordinary ones and masks give, forward and backward, and turn back into the same weights.

    Gradients of all weights are compared, each to 1e-5 of its own largest. Those of the QK norms' scales are small sums of large terms, which
    float32 itself misses by up to 1e-4: there the packed model may be three times as far from float64 as the plain one, and 1e-5 more.
    """
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    model, keep = randomise(MobileDiT(config), spread=0.3), KEEPS["all levels"].checked(config)
    cut = compact(model, keep)
    packed, exact = pack(cut), copy.deepcopy(cut).double()
    assert packed.config.packed and pack(packed) is packed and unpack(cut) is cut
    a, b = cut(*inputs), packed(*inputs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for out in (a, b, model(*inputs, masks=masks_of(keep, config)), exact(*(t.double() for t in inputs))):
        out.square().sum().backward()
    as_weights = copy.deepcopy(packed)
    with torch.no_grad():
        for parameter, source in zip(as_weights.parameters(), packed.parameters(), strict=True):
            parameter.copy_(source.grad)
    found, slices, parent = unpack(as_weights).state_dict(), _slices(config, keep), dict(model.named_parameters())
    assert set(found) == {name for name, _ in cut.named_parameters()}
    for name, plain in cut.named_parameters():
        source, axes = slices.get(name, (name, {}))
        masked = parent[source].grad
        for axis, index in axes.items():
            masked = masked.index_select(axis, index)
        true, largest = exact.get_parameter(name).grad, plain.grad.abs().max()
        assert largest > 0, name
        if name.endswith("_norm.weight"):
            assert (found[name] - true).abs().max() <= 3 * (plain.grad - true).abs().max() + 1e-5 * largest, name
            continue
        for wanted in (plain.grad, masked):
            assert (found[name] - wanted).abs().max() <= 1e-5 * largest, name
    back = unpack(packed).state_dict()
    assert set(back) == set(cut.state_dict()) and all(torch.equal(back[name], value) for name, value in cut.state_dict().items())


def test_expand_is_the_inverse(randomise, inputs):
    keep = KEEPS["all levels"]
    model = randomise(MobileDiT(SMALL), spread=0.3)
    cut = compact(model, keep)
    full = expand(pack(cut), keep, SMALL)
    torch.testing.assert_close(full(*inputs, masks=masks_of(keep, SMALL)), cut(*inputs), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(compact(full, keep).state_dict().values(), cut.state_dict().values()))
    assert not full.blocks[1].attention.qkv.weight.any() and not full.blocks[0].ffn.up.weight[16:48].any()
    with pytest.raises(ValueError, match=r"keep: makes blocks .*, expected those of the model"):
        expand(cut, KEEPS["heads"], SMALL)


def test_cutting_twice_is_cutting_once(randomise, inputs):
    """Full-width RoPE: a head takes its columns along through two cuts."""
    config = dataclasses.replace(SMALL, rope="full")
    model = randomise(MobileDiT(config), spread=0.3)
    once = compact(model, Keep((0, 3), {0: (2,)}, {}, {3: (1,)}, 16))
    first = compact(model, Keep((0, 1, 3), {0: (1, 2)}, {}, {3: (1, 2)}, 16))
    twice = compact(first, Keep((0, 2), {0: (1,)}, {}, {2: (0,)}, 16))
    assert twice.config == once.config and once.config.blocks[0].rope_heads == (2,)
    assert torch.equal(twice(*inputs), once(*inputs))


def test_zero_heads_is_not_no_attention(randomise, inputs):
    keep = Keep((0, 1, 2, 3), {1: ()}, {2: ()}, {}, 16)
    model = randomise(MobileDiT(SMALL), spread=0.3)
    with pytest.raises(ValueError, match=r"heads of block 1: none is kept, expected at least 1 \(or remove the block; allow_no_heads=True"):
        compact(model, keep)
    cut = compact(model, keep, allow_no_heads=True)
    masked = model(*inputs, masks=masks_of(keep, SMALL))
    torch.testing.assert_close(cut(*inputs), masked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pack(cut)(*inputs), masked, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for block in (cut.blocks[1].attention, cut.blocks[2].cross):
            block.out.bias.zero_()
    assert (cut(*inputs) - masked).abs().max() > 1e-2         # the biases had stayed


def test_norm_across_heads_trap(randomise, inputs):
    """Masking behind an across-heads norm is another function than cutting; before it, with one divisor in both, it is the same."""
    keep = KEEPS["heads"]

    def pair(masked, cut):
        config = dataclasses.replace(SMALL, qk_norm="all", **masked)
        model = randomise(MobileDiT(config), spread=0.3)
        short = compact(model, keep)
        other = MobileDiT(dataclasses.replace(short.config, **cut))
        other.load_state_dict(short.state_dict())
        return (model(*inputs, masks=masks_of(keep, config)) - other(*inputs)).abs().max()

    assert pair({"mask_qk": False}, {}) > 1e-3
    assert pair({}, {}) < 1e-5                                                            # the kept channels, in both
    assert pair({"qk_divisor": 48}, {}) < 1e-5                                           # those of the parent, in both
    assert pair({"qk_divisor": 48}, {"qk_divisor": "kept"}) > 1e-3                       # the stock norm of the cut model
    assert pair({}, {"qk_divisor": 48}) > 1e-3


def test_rope_trap(randomise, inputs):
    """Full-width RoPE: cut heads take their columns along; a table made anew, or the first columns, is another function."""
    config = dataclasses.replace(SMALL, rope="full")
    keep = Keep((0, 1, 2, 3), {b: (1, 2) for b in range(4)}, {}, {}, 16)
    model = randomise(MobileDiT(config), spread=0.3)
    cut = compact(model, keep)
    masked = model(*inputs, masks=masks_of(keep, config))
    torch.testing.assert_close(cut(*inputs), masked, rtol=1e-5, atol=1e-5)
    assert cut.blocks[0].spec.rope_heads == (1, 2)
    for block in cut.blocks:
        block.attention.rope_heads = ()
    first = cut(*inputs)
    cut.rope = FullWidthRope(2, config.head_dim, config.theta)
    anew = cut(*inputs)
    assert (first - masked).abs().max() > 1e-3 and (anew - masked).abs().max() > 1e-3


def test_full_width_rope_spreads_its_frequencies_over_heads():
    rope = FullWidthRope(3, 16, theta=100.0)
    t, y, x = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 3.0]), torch.tensor([1.0, 5.0])
    cos, sin = rope((t, y, x))
    assert cos.shape == sin.shape == (2, 3, 8) and torch.equal(cos[0, 0, 0], torch.tensor(1.0))
    flat, rate = sin[1].flatten(), 100.0 ** (-5 / 8)                              # 24 numbers, 8 per axis, none left over
    assert flat[3 * 5 + 1].item() == pytest.approx(torch.sin(torch.tensor(3.0 * rate)).item(), rel=1e-6)
    cos, sin = FullWidthRope(5, 8)((t, y, x))                                     # 20 numbers: 18 turn, 2 stay
    assert torch.equal(sin.flatten(1)[:, :2], torch.zeros(2, 2)) and sin.flatten(1)[1, 2] == torch.sin(torch.tensor(2.0))
    with pytest.raises(ValueError, match="positions: got 2 axes, expected 3"):
        rope((t, y))
    with pytest.raises(ValueError, match="heads=1, head_dim=4: expected at least 6 channels"):
        FullWidthRope(1, 4)


def test_taps_early_stop_and_start(randomise, inputs):
    model = MobileDiT(SMALL)
    out, taps = model(*inputs, capture=("0.hidden", "3.hidden"))
    assert not out.any() and torch.equal(taps["0.hidden"], taps["3.hidden"])      # every block starts as the identity
    model = randomise(model)
    out, taps = model(*inputs, capture=["1.q", "1.k", "1.hidden"])
    assert torch.equal(out, model(*inputs)) and taps["1.q"].shape == (2, 12, 3, 16) and taps["1.hidden"].shape == (2, 12, 48)
    nothing, early = model(*inputs, capture=["1.hidden"], stop_after=1)
    assert nothing is None and torch.equal(early["1.hidden"], taps["1.hidden"])
    assert model(*inputs, stop_after=1) is None


def test_text_and_its_mask_are_read(randomise, inputs):
    z, sigma, text = inputs
    model = randomise(MobileDiT(SMALL), spread=0.3)
    mask = torch.tensor([[True, True, False]] * 2)
    changed = text.clone()
    changed[:, 2] = 9.0
    assert torch.equal(model(z, sigma, text, text_mask=mask), model(z, sigma, changed, text_mask=mask))
    assert (model(z, sigma, text) - model(z, sigma, torch.zeros_like(text))).abs().max() > 1e-2


def test_masks_of_ones_change_nothing_and_may_differ_per_sample(randomise, inputs):
    model = randomise(MobileDiT(SMALL), spread=0.3)
    assert torch.equal(model(*inputs, masks=unit_masks(SMALL)), model(*inputs))
    masks = unit_masks(SMALL, batch=2)
    masks[1]["heads"][1, 2] = masks[2]["ffn"][1, 0] = masks[3]["block"][1] = masks[0]["cross_heads"][1, 1] = 0.0
    out = model(*inputs, masks=masks)
    one = Keep((0, 1, 2), {1: (0, 1)}, {0: (0, 2)}, {2: (1, 2, 3)}, 16)
    torch.testing.assert_close(out[0], model(*inputs)[0])
    torch.testing.assert_close(out[1], model(*inputs, masks=masks_of(one, SMALL))[1], rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_autocast(randomise, inputs):
    model = randomise(MobileDiT(SMALL))
    high = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*inputs)
    assert (low - high).abs().max() < 0.05 * high.abs().max()
    assert model.double()(inputs[0].double(), inputs[1], inputs[2].double()).sub(high).abs().max() < 1e-4


def test_bad_configurations_and_inputs(inputs):
    z, sigma, text = inputs
    for changes, message in (({"rope": "half"}, "rope='half'"), ({"qk_divisor": 0}, "qk_divisor=0"), ({"head_dim": 12}, "head_dim=12"),
                             ({"group": 48}, "block 0: 3 heads, 3 cross-attention heads, 64 FFN channels"), ({"group": 0}, "group=0"),
                             ({"blocks": (TableSpec(heads=2, hidden=64, rope_heads=(1,)),)}, r"rope_heads=\(1,\)")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match="qk_norm='layer'"):
        MobileDiT(dataclasses.replace(SMALL, qk_norm="layer"))
    model = MobileDiT(SMALL)
    with pytest.raises(ValueError, match=r"z: shape \(2, 3, 2, 2, 3\), expected \[B, 4, T, H, W\]"):
        model(z[:, :3], sigma, text)
    for bad in (None, text[:1], text[..., :4]):
        with pytest.raises(ValueError, match=r"text: .*, expected \[2, S, 8\]"):
            model(z, sigma, bad)
    with pytest.raises(ValueError, match="masks: 1 entries, expected one for each of 4 blocks"):
        model(z, sigma, text, masks=unit_masks(SMALL)[:1])
    for name, wrong, size in (("heads", (1,), r"\(3,\) or \(2, 3\)"), ("heads", (2, 1), r"\(3,\) or \(2, 3\)"), ("heads", (), r"\(3,\)"),
                              ("cross_heads", (2,), r"\(3,\)"), ("cross_heads", (3, 3), r"\(3,\)"), ("ffn", (5,), r"\(4,\) or \(2, 4\)"),
                              ("ffn", (64,), r"\(4,\)"), ("block", (3,), r"\(\) or \(2,\)")):
        masks = unit_masks(SMALL)
        masks[2][name] = torch.ones(wrong)
        with pytest.raises(ValueError, match=rf"masks: {name} of block 2 has shape {re.escape(str(wrong))}, expected {size}"):
            model(z, sigma, text, masks=masks)
    masks = unit_masks(SMALL)
    masks[1]["head"] = torch.zeros(3)
    with pytest.raises(ValueError, match="masks: block 1 has 'head', expected block, heads, cross_heads, ffn"):
        model(z, sigma, text, masks=masks)
    with pytest.raises(ValueError, match="masks: given for a packed model"):
        pack(model)(z, sigma, text, masks=unit_masks(SMALL))


# ---- sampling ---------------------------------------------------------------------------------------------------------------------
def test_four_steps_with_implied_noise_are_euler(randomise, inputs, generator):
    z, _, text = inputs
    model = randomise(MobileDiT(SMALL)).eval()
    for shift in (1.0, 3.0):
        made = sample(model, z.shape, text, noise=z, shift=shift)
        with torch.no_grad():
            torch.testing.assert_close(made, euler(lambda x, s: model(x, s, text), z, schedule(4, shift)), rtol=1e-5, atol=1e-5)
    assert times() == (1.0, 0.75, 0.5, 0.25) and times(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    fresh = [sample(model, z.shape, text, noise=z, renoise=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert (fresh[0] - sample(model, z.shape, text, noise=z)).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 4, 40])
@pytest.mark.parametrize("renoise", [False, True])
def test_the_exact_velocity_of_a_point_is_integrated_exactly(steps, renoise, generator):
    """All data at x0: v = (z - x0) / sigma, and any number of steps ends at x0."""
    x0, z = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    made = denoise(lambda x, sigma: (x - x0) / sigma[:, None], z, schedule(steps), renoise=renoise, generator=generator)
    torch.testing.assert_close(made, x0, rtol=1e-5, atol=1e-5)


def test_sampling_is_guided_and_reports(randomise, inputs):
    z, _, text = inputs
    model, seen = randomise(MobileDiT(SMALL), spread=0.3).eval(), []
    plain, guided = (sample(model, z.shape, text, noise=z, steps=3, guidance=g, callback=lambda *a: seen.append(a)) for g in (1.0, 4.0))
    assert (plain - guided).abs().max() > 1e-2 and [s[0] for s in seen] == [0, 1, 2] * 2 and seen[2][1] == 0.0
    by_hand = z
    with torch.no_grad():
        for now, after in zip(schedule(3), schedule(3)[1:]):
            at = torch.full((2,), now)
            null = model(by_hand, at, torch.zeros_like(text))
            by_hand = by_hand + (after - now) * (null + 4.0 * (model(by_hand, at, text) - null))
    torch.testing.assert_close(guided, by_hand, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"noise: shape \(2, 4, 2, 2, 3\), expected \(1, 4, 2, 2, 3\)"):
        sample(model, (1, 4, 2, 2, 3), text, noise=z)
    with pytest.raises(ValueError, match=r"sigmas=\(1.0, 0.5\): expected positive times and a 0 at the end"):
        denoise(lambda x, s: x, z, (1.0, 0.5))


def test_every_public_name_resolves():
    from vidkern.models import mobile_dit

    assert all(callable(getattr(mobile_dit, name)) for name in mobile_dit.__all__)
    with pytest.raises(AttributeError):
        mobile_dit.nothing
