"""The compared architectures: what each is at initialisation, who sees whom, positions, parameters, FLOPs, and seeded faults.

Where the properties of 4Real-Video-V2 are tested: the op (masks, symmetries, merging, dead cells, gradients) in every_op/; positions in
test_rope; one view is the base model, references, 11B in test_four_real; flow in test_flow; homographies in data/test_views; data mix, static
scenes, latents in test_mix; what training separates in test_toy and test_compare; variants, the literal mask, receptive fields and counts here.
"""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vidkern
from vidkern.models.four_real import FourRealVideo, References, config, cost, on_meta, parameter_count, variants
from vidkern.models.four_real.config import VARIANTS
from vidkern.models.shared import BlockSpec, SelfAttention, VideoDiT

DIT = dataclasses.replace(config.tiny().dit, dim=32, heads=2, blocks=(BlockSpec(),) * 2, freq_dim=16)
TINY = dataclasses.replace(config.tiny(), dit=DIT)
OPTIONS = [(name, {}) for name in VARIANTS] + [("fused", {"positions": "sum"}), ("fused", {"positions": "learned"}),
                                               ("full", {"positions": "sum"}), ("sequential_insert", {"insert_every": 2})]
SIGMA = torch.tensor([0.3, 0.8])


def base_of(randomise, cfg=TINY):
    return randomise(VideoDiT(cfg.dit), spread=0.3)


def grid_of(views=3, times=4):
    return torch.randn(2, views, times, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def per_view(base, z, sigma, call):
    """call(base, one row as a video, sigma) for every view, joined along the views."""
    return torch.cat([call(base, z[:, v : v + 1], sigma) for v in range(z.shape[1])], 1)


def hidden(model, z, sigma):
    """The last block's tokens as [B, V, T, N, C]."""
    last = len(model.config.blocks) - 1
    _, taps = model(z, sigma, capture=[f"{last}.hidden"])
    return taps[f"{last}.hidden"].unflatten(1, (*z.shape[1:3], -1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- initialisation: each check takes the model's maker, so that the faults below can be tried on it ---------------
def check_insert_is_the_base_on_each_view(randomise):
    base, z = base_of(randomise), grid_of()
    model = FourRealVideo.from_base(base, TINY.variant("sequential_insert"))
    want = per_view(base, z, SIGMA, lambda m, x, s: m(x, s))
    assert torch.equal(model(z, SIGMA), want)
    assert torch.equal(model(z, SIGMA, cameras=torch.randn(2, 3, 4, 4, 4)), want)


def check_soft_is_the_mean_of_both_directions(randomise):
    base, z = base_of(randomise), grid_of()
    model = FourRealVideo.from_base(base, TINY.variant("parallel_soft"))
    rows = per_view(base, z, SIGMA, hidden)
    columns = per_view(base, z.transpose(1, 2), SIGMA, hidden).transpose(1, 2)
    close(hidden(model.dit, z, SIGMA), (rows + columns) / 2)


def check_hard_halves_both_streams(randomise):
    one = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, blocks=(BlockSpec(),)))
    base, z = base_of(randomise, one), grid_of()
    soft, hard = (FourRealVideo.from_base(base, one.variant(f"parallel_{kind}")) for kind in ("soft", "hard"))
    close(hidden(hard.dit, z, SIGMA), hidden(soft.dit, z, SIGMA))  # after one block the same mean; after two no longer
    base = base_of(randomise)
    soft, hard = (hidden(FourRealVideo.from_base(base, TINY.variant(f"parallel_{kind}")).dit, z, SIGMA) for kind in ("soft", "hard"))
    assert (soft - hard).abs().max() > 1e-3


def check_light_runs_from_rows_to_columns(randomise):
    base, z = base_of(randomise), grid_of()
    model = FourRealVideo.from_base(base, TINY.variant("parallel_light"))
    assert [block.attention.share.item() for block in model.dit.blocks] == [0.5, 0.5]
    for share, want in ((1.0, per_view(base, z, SIGMA, hidden)), (0.0, per_view(base, z.transpose(1, 2), SIGMA, hidden).transpose(1, 2))):
        for block in model.dit.blocks:
            block.attention.share.data.fill_(share)
        close(hidden(model.dit, z, SIGMA), want)


def check_interleave_is_rows_then_columns(randomise):
    base, z = base_of(randomise), grid_of()
    model = FourRealVideo.from_base(base, TINY.variant("sequential_interleave"))
    first, second = ({"dit": dataclasses.replace(TINY.dit, blocks=TINY.dit.blocks[:1])} for _ in range(2))
    row = FourRealVideo(dataclasses.replace(TINY, **first)).dit
    row.load_state_dict({k: v for k, v in base.state_dict().items() if not k.startswith("blocks.1")})
    _, taps = model.dit(z, SIGMA, capture=["0.hidden", "1.hidden"])
    after_rows = per_view(row, z, SIGMA, hidden)
    close(taps["0.hidden"].unflatten(1, (3, 4, -1)), after_rows)
    table = base.rope(base.positions(1, 3, 4, 4))
    for t in range(4):
        column = base.blocks[1](after_rows[:, :, t].flatten(1, 2), base.condition(SIGMA), table, (1, 3))
        close(taps["1.hidden"].unflatten(1, (3, 4, -1))[:, :, t].flatten(1, 2), column)


def check_new_parts_can_learn(randomise):
    """The first gradient reaches a weight of every kind of new part: nothing zero stands behind a zero."""
    base, z = base_of(randomise), grid_of()
    for name, weight in (("parallel_soft", "syncs.0.linear.weight"), ("parallel_hard", "syncs.0.view.weight"), ("parallel_soft", "context"),
                         ("parallel_light", "blocks.0.attention.share"), ("sequential_insert", "blocks.0.projector.weight")):
        model = FourRealVideo.from_base(base, TINY.variant(name))
        model(z, SIGMA).square().mean().backward()
        assert dict(model.dit.named_parameters())[weight].grad.abs().max() > 0, (name, weight)
    fresh = FourRealVideo(TINY.variant("sequential_insert"))
    for _ in range(2):  # the output layer is zero at first, so the second step is the one that counts
        optimiser = torch.optim.SGD(fresh.parameters(), lr=1.0)
        optimiser.zero_grad()
        (fresh(z, SIGMA) - z).square().mean().backward()
        optimiser.step()
    assert dict(fresh.dit.named_parameters())["blocks.0.view_modulation.weight"].grad.abs().max() > 0


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_initialisation(randomise, name):
    CHECKS[name](randomise)


def swap_view_and_time(monkeypatch):
    monkeypatch.setattr(variants, "ROW", variants.COLUMN)
    monkeypatch.setattr(variants, "COLUMN", ("same_view", "time"))
    monkeypatch.setattr(config, "_attention", lambda name, i, every: ((("same_time", "view"), ("same_view", "time"))[i % 2]
                        if name == "sequential_interleave" else (("same_time", "same_view"), ("view", "time"))))


def positions_swapped(monkeypatch):
    monkeypatch.setattr(config, "_attention", lambda name, i, every: ((("same_view", "view"), ("same_time", "time"))[i % 2]
                        if name == "sequential_interleave" else (("same_view", "same_time"), ("view", "time"))))


def patched(owner, attribute, value):
    return lambda monkeypatch: monkeypatch.setattr(owner, attribute, value)


def gate_starts_at_zero(monkeypatch):
    def forward(self, y_view, y_time, condition):
        gate = self.modulation(condition)[:, None].chunk(4, dim=-1)
        d_view, d_time = self.linear(torch.cat((y_view, y_time), -1)).chunk(2, dim=-1)
        return y_view + gate[2] * d_view, y_time + gate[3] * d_time

    monkeypatch.setattr(variants.SoftSync, "forward", forward)


def with_init(owner, change):
    def fault(monkeypatch):
        adopt = owner.adopt

        def wrong(self):
            adopt(self)
            with torch.no_grad():
                change(self)

        monkeypatch.setattr(owner, "adopt", wrong)

    return fault


def projector_zero_from_nothing(monkeypatch):
    init = variants.InsertDiT.__init__ if "__init__" in vars(variants.InsertDiT) else VideoDiT.__init__

    def wrong(self, cfg):
        init(self, cfg)
        self.adopt()

    monkeypatch.setattr(variants.InsertDiT, "__init__", wrong)


FAULTS = {
    "rows and columns swapped: insert": (swap_view_and_time, "check_insert_is_the_base_on_each_view"),
    "rows and columns swapped: light": (swap_view_and_time, "check_light_runs_from_rows_to_columns"),
    "rows and columns swapped: interleave": (swap_view_and_time, "check_interleave_is_rows_then_columns"),
    "positions swapped: insert": (positions_swapped, "check_insert_is_the_base_on_each_view"),
    "positions swapped: light": (positions_swapped, "check_light_runs_from_rows_to_columns"),
    "positions swapped: interleave": (positions_swapped, "check_interleave_is_rows_then_columns"),
    "column stream takes times": (patched(variants, "COLUMN", ("same_time", "time")), "check_soft_is_the_mean_of_both_directions"),
    "both streams are rows": (patched(variants, "COLUMN", ("same_view", "time")), "check_soft_is_the_mean_of_both_directions"),
    "gate of the soft sync starts at zero": (gate_starts_at_zero, "check_new_parts_can_learn"),
    "soft sync starts at random": (with_init(variants.SoftSync, lambda s: s.linear.weight.normal_()),
                                   "check_soft_is_the_mean_of_both_directions"),
    "context starts at random": (with_init(variants.ParallelDiT, lambda s: s.context.normal_()),
                                 "check_soft_is_the_mean_of_both_directions"),
    "hard sync starts at the identity": (with_init(variants.HardSync, lambda s: s.view.weight.mul_(2)), "check_hard_halves_both_streams"),
    "projector starts at random": (with_init(variants.InsertBlock, lambda s: s.projector.weight.normal_()),
                                   "check_insert_is_the_base_on_each_view"),
    "projector has a bias": (with_init(variants.InsertBlock, lambda s: s.projector.bias.fill_(0.1)),
                             "check_insert_is_the_base_on_each_view"),
    "zero behind zero": (projector_zero_from_nothing, "check_new_parts_can_learn"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_seeded_fault_is_caught(randomise, monkeypatch, name):
    fault, check = FAULTS[name]
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check](randomise)


# ---- who sees whom -------------------------------------------------------------------------------------------------
def influence(randomise, cfg, v=1, t=2, V=3, T=3):
    """bool [V, T]: which input cells change the output of cell (v, t)."""
    model = randomise(FourRealVideo(cfg))
    z = torch.randn(1, V, T, 3, 4, 4, requires_grad=True)
    model(z, torch.tensor([0.5]))[:, v, t].square().sum().backward()
    return z.grad.abs().amax((0, 3, 4, 5)) > 0


def test_receptive_fields(randomise):
    row, column = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    row[1], column[:, 2] = True, True
    everything = torch.ones_like(row)

    def with_blocks(n, name, **options):
        return dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, blocks=(BlockSpec(),) * n)).variant(name, **options)

    for name, one, two in (("fused", row | column, everything), ("sequential_interleave", row, everything),
                           ("sequential_insert", everything, everything), ("parallel_soft", row | column, everything),
                           ("parallel_hard", row | column, everything), ("parallel_light", row | column, everything), ("full", everything, everything)):
        assert torch.equal(influence(randomise, with_blocks(1, name)), one), name
        assert torch.equal(influence(randomise, with_blocks(2, name)), two), name
    assert torch.equal(influence(randomise, with_blocks(1, "sequential_insert", insert_every=2)), row)


def test_two_softmaxes_are_not_one():
    """Half a row attention and half a column attention is another function than the fused softmax, which merging by lse gives."""
    q, k, v = torch.randn(3, 1, 2, 3 * 4 * 5, 16).unbind(0)
    row, column = (vidkern.grid_attention(q, k, v, grid=(3, 4), include=("self", part)) for part in ("view", "time"))
    fused = vidkern.grid_attention(q, k, v, grid=(3, 4))
    assert ((row + column) / 2 - fused).abs().max() > 0.05
    parts = [vidkern.grid_attention(q, k, v, grid=(3, 4), include=p, return_lse=True) for p in (("self", "view"), ("self", "time"), ("self",))]
    merged, _ = vidkern.merge_attention([o for o, _ in parts], [lse for _, lse in parts], signs=(1, 1, -1))
    torch.testing.assert_close(merged, fused, rtol=1e-5, atol=1e-5)


def test_a_mask_times_the_logits_is_another_function():
    """The paper's printed formula taken literally, logits * M, lets hidden keys take part with logit 0."""
    q, k, v = torch.randn(3, 1, 2, 3 * 4 * 5, 16).unbind(0)
    mask = vidkern.GridPattern(3, 4).bool_mask(5)
    logits = q @ k.transpose(-1, -2) / 4
    fused = vidkern.grid_attention(q, k, v, grid=(3, 4))
    torch.testing.assert_close(logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v, fused, rtol=1e-5, atol=1e-5)
    assert ((logits * mask).softmax(-1) @ v - fused).abs().max() > 0.2


# ---- positions -----------------------------------------------------------------------------------------------------
def test_sum_positions_do_not_tell_an_anti_diagonal_apart(randomise):
    dit = FourRealVideo(TINY.variant("fused", positions="sum")).dit
    assert dit.config.blocks[0].positions == "sum"
    time = dit.positions(3, 4, 2, 2, kind="sum")[0].view(3, 4, 4)[..., 0]
    assert time[0].tolist() == [0, 1, 2, 3] and time[1, 1] == time[0, 2] == time[2, 0]
    assert dit.positions(3, 4, 2, 2)[0].view(3, 4, 4)[..., 0].unique().numel() == 12
    a, b = (FourRealVideo.from_base(base_of(randomise), TINY.variant("fused", positions=p)) for p in ("sum", "collapsed"))
    assert (a(grid_of(), SIGMA) - b(grid_of(), SIGMA)).abs().max() > 1e-4


def test_learned_view_embedding_starts_silent_and_tells_views_apart(randomise):
    base, one = base_of(randomise), grid_of(views=1)
    model = FourRealVideo.from_base(base, TINY.variant("fused", positions="learned"))
    assert torch.equal(model(one, SIGMA), base(one, SIGMA))
    z = grid_of(3, 1)
    order = torch.tensor([2, 0, 1])
    close(model(z[:, order], SIGMA), model(z, SIGMA)[:, order])  # views are a set at first
    randomise(model.dit.view_embedding, spread=1.0)
    assert (model(z[:, order], SIGMA) - model(z, SIGMA)[:, order]).abs().max() > 1e-4
    model(z, SIGMA).square().mean().backward()
    assert model.dit.view_rates.grad.abs().max() > 0


# ---- counts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, options", OPTIONS)
def test_formulas_equal_what_torch_counts(name, options):
    cross = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, blocks=(BlockSpec(cross=True), BlockSpec()), text_dim=24))
    z, frames = torch.randn(2, 3, 4, 3, 8, 8), References.from_grid(torch.randn(2, 3, 4, 3, 8, 8), "both")
    for cfg, text in ((TINY, None), (cross, torch.randn(2, 5, 24))):
        cfg = cfg.variant(name, **options)
        model = FourRealVideo(cfg)
        assert sum(cost.parameters(cfg).values()) == parameter_count(model)
        assert cost.parameters(cfg)["base"] == parameter_count(VideoDiT(dataclasses.replace(cfg.dit, blocks=(
            tuple(BlockSpec(cross=b.cross) for b in cfg.dit.blocks)))))
        assert sum(p.numel() for p in model.parameters_of("new")) == cost.parameters(cfg)["new"] + cost.parameters(cfg)["references"]
        cameras = {"cameras": torch.randn(2, 3, 4, 3, 4)} if name == "sequential_insert" else {}
        vidkern.grid_attention  # noqa: B018  (known to the counter from here on)
        # torch's counter knows no CPU flash attention, which the text cross-attention would take
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(z, SIGMA, frames.frames, frames.mask, **cameras, **({} if text is None else {"text": text}))
        want = cost.forward_flops(cfg, batch=2, views=3, times=4, size=(8, 8), text=0 if text is None else 5, cameras=bool(cameras))
        assert counter.get_total_flops() == sum(want.values())


def test_parameters_by_hand():
    C, n = TINY.dit.dim, len(TINY.dit.blocks)
    new = {name: cost.parameters(TINY.variant(name))["new"] for name in VARIANTS}
    assert new["fused"] == new["full"] == new["sequential_interleave"] == 0
    # Column attention 4 C^2 + 4 C and two norms, projector C^2 + C, camera 12 C + C, modulation 3 C^2 + 3 C.
    assert new["sequential_insert"] == n * (8 * C * C + 12 * C + 9 * C + 2 * C // TINY.dit.heads)
    assert new["parallel_hard"] == n * (2 * C * C + 2 * C + 2) + 2 * C
    assert new["parallel_soft"] == n * (4 * C * C + 2 * C + 4 * C + 4) + 2 * C
    assert new["parallel_light"] == n


def test_the_papers_sizes_and_flops():
    """Table 4 of arXiv 2506.18839: 11B and 17B parameters; per layer of 8 views x 16 latent times at 36x64 / 2: attention and linears."""
    paper = config.paper()
    total = {name: sum(cost.parameters(paper.variant(name)).values()) for name in VARIANTS}
    assert total["fused"] == total["full"] == total["sequential_interleave"] == pytest.approx(11e9, rel=0.08)
    assert total["sequential_insert"] == pytest.approx(17e9, rel=0.08) and total["parallel_soft"] > total["parallel_hard"] > total["fused"]
    assert total["sequential_insert"] == parameter_count(on_meta(paper.variant("sequential_insert")))
    size = {"batch": 1, "views": 8, "times": 16, "size": (36, 64)}
    attention = {name: cost.forward_flops(paper.variant(name), **size)["attention"] / 32 for name in VARIANTS}
    assert attention["fused"] == pytest.approx(16.0e12, rel=0.01) and attention["full"] == pytest.approx(89.1e12, rel=0.01)
    assert attention["sequential_interleave"] == pytest.approx(8.35e12, rel=0.01)
    assert attention["parallel_soft"] == attention["sequential_insert"] == pytest.approx(16.7e12, rel=0.01)
    assert cost.forward_flops(paper, **size)["linear"] / 32 == pytest.approx(34.6e12, rel=0.03)


def test_scopes_name_what_trains(randomise):
    model = FourRealVideo.from_base(base_of(randomise), TINY.variant("sequential_insert", insert_every=2))
    counts = {scope: sum(p.numel() for p in model.train_only(scope)) for scope in ("attention", "new", "both", "all")}
    references = parameter_count(model.references)
    assert counts["both"] == counts["attention"] + counts["new"] - references and counts["all"] == parameter_count(model)
    model.train_only("new")
    assert not model.dit.blocks[1].attention.qkv.weight.requires_grad and model.dit.blocks[1].view_attention.qkv.weight.requires_grad
    assert isinstance(model.dit.blocks[0].attention, SelfAttention) and not hasattr(model.dit.blocks[0], "view_attention")
    with pytest.raises(ValueError, match="scope='sync': expected one of"):
        model.parameters_of("sync")


def test_a_trained_base_keeps_its_reference_embedding(randomise):
    base = randomise(FourRealVideo(TINY))
    model = FourRealVideo.from_base(base, TINY.variant("parallel_soft"))
    assert torch.equal(model.references.embeds[0].weight, base.references.embeds[0].weight)


def test_wrong_requests(randomise):
    with pytest.raises(ValueError, match="variant='dense': expected one of"):
        TINY.variant("dense")
    with pytest.raises(ValueError, match="positions='sum'.*'parallel_soft' 'collapsed'"):
        TINY.variant("parallel_soft", positions="sum")
    with pytest.raises(ValueError, match="positions='rope'"):
        TINY.variant("fused", positions="rope")
    with pytest.raises(ValueError, match="insert_every=2"):
        TINY.variant("fused", insert_every=2)
    with pytest.raises(ValueError, match=r"cameras: shape \(2, 3, 4, 3\), expected \(2, 3, 4, 3, 4\)"):
        FourRealVideo(TINY.variant("sequential_insert"))(grid_of(), SIGMA, cameras=torch.zeros(2, 3, 4, 3))
    with pytest.raises(ValueError, match="base weights: .*blocks.1"):
        small = dataclasses.replace(TINY.dit, blocks=TINY.dit.blocks[:1])
        FourRealVideo.from_base(VideoDiT(small), TINY)
    with pytest.raises(ValueError, match="positions='diagonal'"):
        VideoDiT(TINY.dit).positions(2, 2, 2, 2, kind="diagonal")
