"""Motion guidance on a tiny transformer: early exit, gradients, schedule, injection, optimisation, tables, baselines, and what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import vidkern
from vidkern.models.ditflow import (Adapter, FlowSampler, GuidanceConfig, GuidanceStopped, MotionGuidance, TinyAdapter, TinyVideoDiT, cogvideox_2b,
                                    cogvideox_5b, dynamic_scale, load_tables, losses, moft, probe, smm, tiny, tracking, transfer, wan_14b)
from vidkern.models.ditflow import guidance as guidance_module
from vidkern.models.ditflow import model as model_module

SHAPE = (1, 4, 8, 8, 10)
LABEL, NULL = torch.tensor([0]), torch.tensor([2])
CONFIG = GuidanceConfig(blocks=(2,), lr=(0.02, 0.01), share=0.5)


@pytest.fixture
def make(randomise):
    """``make(positions)``: an adapter of the tiny model with random weights."""
    return lambda positions="rope": TinyAdapter(randomise(TinyVideoDiT(tiny(positions=positions))))


def latents(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def guided(adapter, config=CONFIG, *, steps=6, seed=1, condition=LABEL, **options):
    """(guide after a run, result of the run)."""
    sampler = FlowSampler(steps)
    guide = MotionGuidance(adapter, config, add_noise=sampler.add_noise, **options)
    guide.extract(latents(seed), NULL)
    return guide, transfer(guide, sampler, latents(0), condition=condition)


# ---- passes that stop early (15) -------------------------------------------------------------------------------------------------------------
def run_blocks(adapter, run):
    """Numbers of the blocks that `run` went through, in order."""
    seen = []
    hooks = [b.register_forward_pre_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(adapter.model.blocks)]
    found = run()
    for hook in hooks:
        hook.remove()
    return seen, found


def test_an_early_exit_gives_what_the_whole_pass_gives(make):
    adapter, z = make(), latents(0)
    seen, early = run_blocks(adapter, lambda: adapter.features(z, 0.5, LABEL, {1: ("qk",)}))
    assert seen == [0, 1]
    seen, late = run_blocks(adapter, lambda: adapter.features(z, 0.5, LABEL, {1: ("qk",), 3: ("hidden",)}))
    assert seen == [0, 1, 2, 3]
    assert early.keys() == {(1, "qk")} and all(torch.equal(a, b) for a, b in zip(early[1, "qk"], late[1, "qk"]))
    assert early[1, "qk"][0].shape == (1, 6 + 320, 4, 16) and late[3, "hidden"].shape == (1, 320, 64)
    # A block that is asked for its keys alone does not attend any more.
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module.vidkern, "grid_attention", lambda *a, **k: calls.append(1) or vidkern.ops.grid_attention.grid_attention(*a, **k))
        adapter.features(z, 0.5, LABEL, {1: ("qk",)})
    assert len(calls) == 1
    whole = adapter.forward(z, 0.5, LABEL)
    assert whole.shape == z.shape and not adapter.taps.found


@pytest.mark.parametrize("positions", ["rope", "additive"])
def test_gradients_are_the_same_with_recomputation_and_with_learning_weights(make, positions):
    adapter, z = make(positions), latents(0)
    table, values = adapter.positions(z, None).clone(), adapter.features(latents(5), 0.5, LABEL, {0: ("kv",)})[0, "kv"]

    def gradients(checkpointing):
        leaves = z.clone().requires_grad_(), table.clone().requires_grad_()
        found = adapter.features(leaves[0], 0.5, LABEL, {1: ("qk",), 3: ("hidden",)}, positions=leaves[1], values={0: values},
                                 checkpointing=checkpointing)
        adapter.features(latents(6), 0.1, NULL, {2: ("qk",)})     # taps serve another pass before the backward pass
        total = found[1, "qk"][0].square().sum() + found[1, "qk"][1].sum() + found[3, "hidden"].pow(3).sum()
        return torch.autograd.grad(total, leaves)

    learning = gradients(False)
    with adapter.frozen():
        assert not any(p.requires_grad for p in adapter.model.parameters())
        plain, recomputed = gradients(False), gradients(True)
    assert all(p.requires_grad for p in adapter.model.parameters())
    for a, b, c in zip(learning, plain, recomputed):
        assert a.abs().max() > 0 and torch.equal(a, b) and torch.equal(a, c)


# ---- gradients (16) --------------------------------------------------------------------------------------------------------------------------
def test_gradients_reach_the_latent_and_the_tables_and_no_weight(make):
    for positions in ("rope", "additive"):
        adapter, z = make(positions), latents(0).requires_grad_()
        table = adapter.positions(z, None).clone().requires_grad_()
        reference = losses.flow_of(*adapter.features(latents(1), 0.0, NULL, {2: ("qk",)})[2, "qk"], CONFIG, (4, 8, 10), n_text=6)
        with adapter.frozen():
            found = adapter.features(z, 0.5, LABEL, {2: ("qk",)}, positions=table)
            losses.amf(*found[2, "qk"], reference, CONFIG, (4, 8, 10), n_text=6).backward()
        assert z.grad.abs().max() > 0
        assert all(p.grad is None for p in adapter.model.parameters())
        if positions == "rope":
            assert table.shape == (2, 2, 320, 8) and all(part.abs().max() > 0 for part in table.grad.flatten(0, 1))
            assert not torch.equal(table.grad[0], table.grad[1])      # queries and keys on their own
        else:
            assert table.shape == (1, 320, 64) and table.grad.abs().amax((0, 1)).min() > 0


# ---- schedule (17) ---------------------------------------------------------------------------------------------------------------------------
def test_the_published_schedule(make, monkeypatch):
    rates = cogvideox_5b().rates(50)
    assert rates == pytest.approx([0.0020, 0.0019, 0.0018, 0.0017, 0.0016, 0.0015, 0.0014, 0.0013, 0.0012, 0.0011], abs=1e-12)
    assert (cogvideox_5b().blocks, cogvideox_2b().blocks, wan_14b().blocks) == ((20,), (15,), (20,))
    assert cogvideox_5b() == GuidanceConfig(blocks=(20,), updates=5, tau=2.0, inject=(0,), optimise="latent", signal="amf", heads="logit_mean")
    assert len(smm().rates(50)) == 20 and smm().rates(50)[0] == 0.007 and smm().updates == 10

    class Spy(torch.optim.Adam):
        made = []

        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.made.append((options, self.defaults["betas"], self.defaults["weight_decay"]))

    monkeypatch.setattr(guidance_module.torch.optim, "Adam", Spy)
    adapter = make()
    guide, _ = guided(adapter, GuidanceConfig(blocks=(0,), inject=(), updates=1), steps=50)
    assert [options["lr"] for options, _, _ in Spy.made] == pytest.approx(rates) and {m[1:] for m in Spy.made} == {((0.9, 0.999), 0)}
    assert [r["step"] for r in guide.history] == list(range(10)) and [r["lr"] for r in guide.history] == pytest.approx(rates)


def test_adam_starts_afresh_and_tables_go_on(make):
    """The first step of a fresh Adam moves every entry that has a gradient by its rate exactly."""
    adapter = make()
    guide, _ = guided(adapter, dataclasses.replace(CONFIG, optimise="positions", updates=1), steps=8)
    assert len(guide.tables) == len(guide.history) == 4
    before = adapter.positions(latents(0), None)
    for record in guide.history:
        table = guide.tables[record["t"]]
        assert float((table - before).abs().max()) == pytest.approx(record["lr"], rel=1e-3)
        before = table
    moved = []
    config = dataclasses.replace(CONFIG, updates=1)
    sampler = FlowSampler(8)
    guide = MotionGuidance(adapter, config, add_noise=sampler.add_noise)
    guide.extract(latents(1), NULL)
    guide.begin(sampler.timesteps, noise=latents(0), condition=LABEL)
    for t in sampler.timesteps:
        z = latents(3)
        kept = z.clone()
        out = guide.step(z, t)
        assert torch.equal(z, kept)      # what the caller has is not written to
        moved.append(float((out - z).abs().max()))
    assert moved == pytest.approx([*config.rates(8), 0, 0, 0, 0], rel=1e-3)


def test_half_precision_latents_are_optimised_in_full(make):
    adapter = make()
    adapter.model.to(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        features = adapter.features
        patch.setattr(adapter, "features", lambda z, *a, **k: seen.append(z.dtype) or features(z, *a, **k))
        sampler = FlowSampler(4)
        guide = MotionGuidance(adapter, dataclasses.replace(CONFIG, inject=()), add_noise=None)
        guide.extract(latents(1).bfloat16(), NULL)
        guide.begin(sampler.timesteps, noise=latents(0).bfloat16(), condition=LABEL)
        out = guide.step(latents(0).bfloat16(), 1.0)
    assert out.dtype == torch.bfloat16 and seen == [torch.bfloat16] + [torch.float32] * 5 and guide._scale == 1.0


# ---- injection (18) --------------------------------------------------------------------------------------------------------------------------
def attended(adapter, run):
    """[(q, k, v)] of every attention of `run`."""
    calls = []
    real = vidkern.ops.grid_attention.grid_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module.vidkern, "grid_attention", lambda q, k, v, **o: calls.append((q, k, v)) or real(q, k, v, **o))
        run()
    return calls


@torch.no_grad()
def test_injection_changes_keys_and_values_of_the_video_in_its_block_alone(make):
    adapter, z = make(), latents(0)
    other = adapter.features(latents(5), 0.7, LABEL, {0: ("kv",)})[0, "kv"]
    plain = attended(adapter, lambda: adapter.forward(z, 0.5, LABEL))[0]
    adapter.arm(values={0: other})
    q, k, v = attended(adapter, lambda: adapter.forward(z, 0.5, LABEL))[0]
    assert torch.equal(q, plain[0])
    for got, own, given in zip((k, v), plain[1:], other):
        assert torch.equal(got[:, :6], own[:, :6]) and torch.equal(got[:, 6:], given) and not torch.equal(given, own[:, 6:])
    two = adapter.forward(torch.cat((z, z)), 0.5, LABEL)      # one set of values for a batch
    torch.testing.assert_close(two[:1], two[1:])
    stock = adapter.taps.values[0]
    adapter.disarm()
    before = adapter.forward(z, 0.5, LABEL)
    adapter.arm(values={0: adapter.features(z, 0.5, LABEL, {0: ("kv",)})[0, "kv"]})
    assert torch.equal(adapter.forward(z, 0.5, LABEL), before)      # its own: the identity
    adapter.arm(values={0: tuple(x[:, :-1] for x in stock)})
    with pytest.raises(ValueError, match="319 tokens, expected the 320 video tokens"):
        adapter.forward(z, 0.5, LABEL)


def test_injection_and_tables_last_as_long_as_the_guided_steps(make):
    adapter = make()
    state = []
    forward = adapter.forward

    def watched(z, t, condition):
        state.append((float(t), sorted(adapter.taps.values), adapter.taps.positions is not None, sorted(adapter.taps.wanted)))
        return forward(z, t, condition)

    adapter.forward = watched
    config = dataclasses.replace(CONFIG, optimise="positions", updates=2, share=0.5)
    sampler = FlowSampler(4)
    guide = MotionGuidance(adapter, config, add_noise=sampler.add_noise)
    guide.extract(latents(1), NULL)
    transfer(guide, sampler, latents(0), condition=LABEL, null=NULL, scale=2.0)
    step = [([], False, [0]), ([0], True, [2]), ([0], True, [2]), ([0], True, []), ([0], True, [])]     # injected pass, 2 updates, 2 predictions
    assert state[0] == (0.0, [], False, [2])
    for i, t in enumerate(sampler.timesteps):
        wanted = step if i < 2 else [([], False, [])] * 2
        part, state[1:] = state[1 : 1 + len(wanted)], state[1 + len(wanted) :]
        assert [s[0] for s in part] == [t] * len(wanted) and [s[1:] for s in part] == wanted
    assert len(state) == 1 and adapter.taps.positions is None and not adapter.taps.values


def test_the_injected_pass_runs_one_block(make):
    adapter = make()
    sampler = FlowSampler(2)
    guide = MotionGuidance(adapter, dataclasses.replace(CONFIG, optimise="none"), add_noise=sampler.add_noise)
    guide.extract(latents(1), NULL)
    guide.begin(sampler.timesteps, noise=latents(0), condition=LABEL)
    seen, _ = run_blocks(adapter, lambda: guide.step(latents(0), 1.0))
    assert seen == [0] and list(adapter.taps.values) == [0]


# ---- optimisation (19) -----------------------------------------------------------------------------------------------------------------------
class Convolutions(Adapter):
    """The smallest adapter: queries and keys are normalised convolutions of the latent [1, F, C, h, w]."""

    def __init__(self, channels=8, heads=4, width=16):
        model = torch.nn.Conv2d(channels, heads * width, 3, padding=1)
        super().__init__(model, 1)
        self.heads = heads

    def grid(self, z):
        return z.shape[1], z.shape[3], z.shape[4]

    def forward(self, z, t, condition):
        x = self.model(z[0]).flatten(2).transpose(1, 2).flatten(0, 1)[None].unflatten(-1, (self.heads, -1))
        x = F.layer_norm(x, x.shape[-1:])
        self.taps.attention(0, x, x, x)
        return z


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_falls_but_that_is_no_evidence_of_matches(seed):
    """50 updates lower the loss by more than half and the soft flow follows; the likeliest matches hardly change. Never report the loss as motion."""
    torch.manual_seed(seed)
    adapter, motion = Convolutions(), (2, -1)
    picture = F.avg_pool2d(torch.randn(1, 8, 20, 24), 3, 1)[0] * 3
    reference = torch.stack([picture[:, 3 + f : 11 + f, 7 - 2 * f : 17 - 2 * f] for f in range(4)])[None]
    sampler = FlowSampler(20)
    config = GuidanceConfig(blocks=(0,), inject=(), share=0.5, lr=(0.02, 0.01))
    guide = MotionGuidance(adapter, config)
    ref = guide.extract(reference).flows[0]
    truth, inside = probe.known_flow((4, 8, 10), motion)
    assert (ref == truth)[inside].float().mean() > 0.9      # what is to be followed is right
    guide.begin(sampler.timesteps, noise=latents(seed))
    z = latents(seed)
    for t in sampler.timesteps[:10]:
        z = guide.step(z, t)
    made = [loss for record in guide.history for loss in record["losses"]]
    assert len(made) == 50 and all(b < a for a, b in zip(made, made[1:])) and made[-1] < 0.5 * made[0]
    with torch.no_grad():
        pair = adapter.features(z, 0.0, None, {0: ("qk",)})[0, "qk"]
    soft, hard = losses.flow_of(*pair, config, (4, 8, 10), mode="both")
    mask = ref.norm(dim=-1) > 0
    assert tracking.agreement(soft, ref, mask) > 0.7
    assert (hard == ref).all(-1)[mask].float().mean() < 0.2


def test_several_blocks_are_averaged(make):
    adapter = make()
    first = [guided(adapter, dataclasses.replace(CONFIG, blocks=blocks, updates=1), steps=2)[0].history[0]["losses"][0] for blocks in ((1,), (3,), (1, 3))]
    assert first[2] == pytest.approx((first[0] + first[1]) / 2, rel=1e-5) and first[0] != pytest.approx(first[1], rel=1e-3)


def test_a_still_reference_asks_for_nothing(make):
    """Nothing moves: the loss and its gradient are 0, and the latent stays."""
    adapter, z = make(), latents(0)
    sampler = FlowSampler(2)
    guide = MotionGuidance(adapter, dataclasses.replace(CONFIG, inject=()))
    ref = guide.extract(latents(1), NULL)
    still = dataclasses.replace(ref, flows={2: torch.zeros_like(ref.flows[2])})
    guide.begin(sampler.timesteps, noise=z, condition=LABEL, reference=still)
    assert torch.equal(guide.step(z, 1.0), z) and guide.history[0]["losses"] == [0.0] * 5


# ---- tables ----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["rope", "additive"])
def test_saved_tables_repeat_the_run_without_optimisation(make, tmp_path, positions):
    adapter = make(positions)
    config = dataclasses.replace(CONFIG, optimise="positions", share=0.5)
    guide, made = guided(adapter, config, steps=4)
    guide.save(tmp_path / "tables.pt")
    tables = load_tables(tmp_path / "tables.pt", adapter)
    again, same = guided(adapter, config, steps=4, tables=tables)
    assert torch.equal(made, same) and not again.history and len(tables) == 2
    plain = transfer(MotionGuidance(adapter, dataclasses.replace(config, share=0.0)), FlowSampler(4), latents(0), condition=LABEL)
    zero_shot = MotionGuidance(adapter, dataclasses.replace(config, inject=()), tables=tables)      # no reference at all
    assert not torch.equal(transfer(zero_shot, FlowSampler(4), latents(0), condition=LABEL), plain)
    with pytest.raises(ValueError, match="none for t=0.8, expected those of a run with the same timesteps"):
        guided(adapter, config, steps=5, tables=tables)
    with pytest.raises(ValueError, match=f"tables of {positions} positions, expected"):
        load_tables(tmp_path / "tables.pt", make("additive" if positions == "rope" else "rope"))
    with pytest.raises(ValueError, match="none were optimised"):
        again.save(tmp_path / "none.pt")
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected a file written by MotionGuidance.save"):
        load_tables(tmp_path / "other.pt", adapter)


# ---- baselines (20) --------------------------------------------------------------------------------------------------------------------------
def hidden(seed, frames=4, patches=6, dim=50):
    return torch.randn(1, frames * patches, dim, generator=torch.Generator().manual_seed(seed))


def smm_by_hand(made, wanted, ditflow):
    made, wanted = (x[0].view(4, 6, -1).mean(1) for x in (made, wanted))
    total = 0.0
    for a in range(4):
        ours, theirs = made - (wanted if ditflow else made)[a], wanted - wanted[a]
        if ditflow:
            cosines = [torch.dot(ours[:, c], theirs[:, c]) / (ours[:, c].norm() * theirs[:, c].norm()) for c in range(made.shape[1])]
        else:
            cosines = [torch.dot(ours[f], theirs[f]) / (ours[f].norm() * theirs[f].norm()) if f != a else torch.tensor(0.0) for f in range(4)]
        total += 1 - torch.stack(cosines).mean()
    return float(total / 4)


def test_smm_as_published_and_as_in_the_comparison():
    made, wanted, grid = hidden(0), hidden(1), (4, 2, 3)
    values = {compat: float(losses.smm(made, wanted, GuidanceConfig(signal="smm", compat=compat), grid)) for compat in (None, "ditflow")}
    assert values[None] == pytest.approx(smm_by_hand(made, wanted, False), rel=1e-5)
    assert values["ditflow"] == pytest.approx(smm_by_hand(made, wanted, True), rel=1e-5)
    assert abs(values[None] - values["ditflow"]) > 0.01
    same = float(losses.smm(wanted, wanted, GuidanceConfig(signal="smm"), grid))
    assert same == pytest.approx(0.25, abs=1e-5)      # a frame against itself has no direction: one of four frames counts 1 for every anchor


def test_moft_channels_and_what_it_does_not_see():
    reference, grid = hidden(1), (4, 2, 3)
    reference[0, :, 17] += 10 * torch.linspace(-1, 1, 24)      # a channel that moves
    reference[0, :, 30] += 100                                 # a strong one that does not
    channels = losses.motion_channels(reference, 0.04, grid)
    assert len(channels) == int(0.04 * 50) == 2 and channels[0] == 17
    assert len(losses.motion_channels(reference, 0.1, grid)) == 5
    config = GuidanceConfig(signal="moft")
    made = hidden(2)
    value = losses.moft(made, reference, config, grid, channels)
    constant = torch.randn(6, 50).repeat(4, 1)[None]
    torch.testing.assert_close(losses.moft(made + 3 * constant, reference, config, grid, channels), value, rtol=1e-4, atol=1e-5)
    assert float(losses.moft(reference, reference, config, grid, channels)) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="keeps none of 50 channels"):
        losses.motion_channels(reference, 0.01, grid)


@pytest.mark.parametrize("config", [smm(blocks=(1, 2), share=0.5), moft(blocks=(1, 2), share=0.5, channels=0.1, optimise="positions")],
                         ids=["smm", "moft"])
def test_baselines_lower_their_own_loss(make, config):
    guide, _ = guided(make(), config, steps=4)
    for record in guide.history:
        assert record["losses"][-1] < record["losses"][0]
    assert not guide.reference.flows and set(guide.reference.hidden) == {1, 2}


# ---- what goes wrong -------------------------------------------------------------------------------------------------------------------------
def test_gradients_that_are_not_finite_stop_with_the_step_and_the_latents(make, tmp_path, monkeypatch):
    adapter, calls, amf = make(), [], losses.amf

    def breaking(*args, **options):
        calls.append(1)
        return amf(*args, **options) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(guidance_module.losses, "amf", breaking)
    with pytest.raises(GuidanceStopped, match=r"guided step 1 \(t=0.833333, update 1\).*rescue.pt; lower lr=") as caught:
        guided(adapter, rescue=tmp_path / "rescue.pt")
    saved = torch.load(tmp_path / "rescue.pt", weights_only=True)
    assert saved["step"] == caught.value.step == 1 and torch.equal(saved["latents"], caught.value.latents) and saved["latents"].isfinite().all()
    assert isinstance(caught.value, FloatingPointError)
    assert not adapter.taps.values and all(p.requires_grad for p in adapter.model.parameters())      # nothing is left behind


def test_the_loss_scale_gives_way_to_overflow(make, monkeypatch):
    """Gradients of a scaled loss that overflow are taken again at a lower scale; the update is the one without a scale."""
    amf = losses.amf

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad if float(grad) < 5000 else grad * float("inf")

    plain = guided(make(), dataclasses.replace(CONFIG, inject=()), steps=2)[1]
    monkeypatch.setattr(guidance_module.losses, "amf", lambda *a, **k: Overflowing.apply(amf(*a, **k)))
    guide, scaled = guided(make(), dataclasses.replace(CONFIG, inject=(), loss_scale=65536.0), steps=2)
    assert guide._scale == 4096.0
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


def test_bad_calls_are_told(make):
    adapter, sampler = make(), FlowSampler(4)
    for blocks in ((4,), (0, 9)):
        with pytest.raises(ValueError, match=r"blocks=\(.*expected 0 to 3 for this transformer"):
            MotionGuidance(adapter, GuidanceConfig(blocks=blocks, inject=()))
    with pytest.raises(ValueError, match="inject=.*block 7, expected 0 to 3"):
        MotionGuidance(adapter, GuidanceConfig(blocks=(1,), inject=(7,)), add_noise=sampler.add_noise)
    with pytest.raises(ValueError, match="add_noise=None: expected a function"):
        MotionGuidance(adapter, GuidanceConfig(blocks=(1,)))
    guide = MotionGuidance(adapter, CONFIG, add_noise=sampler.add_noise)
    with pytest.raises(RuntimeError, match="called before begin"):
        guide.step(latents(0), 1.0)
    with pytest.raises(ValueError, match="reference: none was extracted"):
        guide.begin(sampler.timesteps, noise=latents(0))
    with pytest.raises(ValueError, match=r"latents: shape \(2, 4, 8, 8, 10\), expected one video"):
        guide.extract(torch.cat((latents(0),) * 2), NULL)
    guide.extract(latents(1), NULL)
    with pytest.raises(ValueError, match=r"noise: \(4, 8, 8\) frames, rows and columns of patches, expected the reference's \(4, 8, 10\)"):
        guide.begin(sampler.timesteps, noise=latents(0)[..., :8])
    with pytest.raises(ValueError, match="the same one twice"):
        guide.begin([1.0, 1.0], noise=latents(0))
    guide.begin(sampler.timesteps, noise=latents(0), condition=LABEL)
    with pytest.raises(ValueError, match="t=0.3: not among the timesteps"):
        guide.step(latents(0), 0.3)
    with pytest.raises(ValueError, match="scale=2.0: expected null"):
        transfer(guide, sampler, latents(0), condition=LABEL, scale=2.0)
    with pytest.raises(ValueError, match=r"labels=\[3\]: expected 0 to 2"):
        adapter.forward(latents(0), 0.5, torch.tensor([3]))


def test_dynamic_guidance_is_cogvideox_own_expression():
    """Bit for bit, far outside the range that its form suggests: t is the raw timestep."""
    import math

    for t in (999, 979, 19):
        assert dynamic_scale(7.0, t, 50) == 1 + 7.0 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2)
    assert dynamic_scale(7.0, 0, 50) == 8.0


def test_dynamic_guidance_is_behind_a_flag(make):
    adapter = make()
    guide = MotionGuidance(adapter, GuidanceConfig(blocks=(0,), share=0.0, inject=()))
    runs = [transfer(guide, FlowSampler(3), latents(0), condition=LABEL, null=NULL, scale=s, dynamic=d) for s, d in ((2.0, False), (2.0, True))]
    assert not torch.equal(*runs)


# ---- which block -----------------------------------------------------------------------------------------------------------------------------
def test_blocks_are_scored_by_known_translations():
    """Convolutions follow a pan; the same with their frames' keys shuffled do not."""
    class Two(Convolutions):
        def __init__(self):
            super().__init__()
            self.n_blocks = 2

        def forward(self, z, t, condition):
            x = F.layer_norm(self.model(z[0]).flatten(2).transpose(1, 2).flatten(0, 1)[None].unflatten(-1, (self.heads, -1)), (16,))
            self.taps.attention(0, x, x[:, torch.randperm(x.shape[1])], x)
            self.taps.attention(1, x, x, x)
            return z

    torch.manual_seed(0)
    adapter, picture, clips = Two(), torch.randn(8, 30, 40), []
    for motion in ((1, 0), (0, -2), (-2, 1)):
        clips.append((probe.window(picture, (15, 10), motion, frames=4, size=(8, 10))[None], motion))
    scores = probe.score_blocks(adapter, clips)
    assert [s.block for s in scores] == [1, 0]
    assert scores[0].correlation > 0.8 and scores[0].hits > 0.8 and abs(scores[1].correlation) < 0.3
    assert probe.select_block(scores) == (1,)
    near = [probe.BlockScore(b, c, c, 0.1) for b, c in ((3, 0.5), (1, 0.4), (2, 0.1))]
    assert probe.select_block(near) == (1, 3)
    with pytest.raises(ValueError, match="best correlation 0.10"):
        probe.select_block(near[2:])
    with pytest.raises(ValueError, match="none of them moves"):
        probe.score_blocks(adapter, [(clips[0][0], (0, 0))])
    with pytest.raises(ValueError, match="frame 2 leaves the picture"):
        probe.window(picture, (3, 0), (2, 0), frames=4, size=(8, 10))
