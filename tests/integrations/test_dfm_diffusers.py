"""DFM in diffusers: the scheduler's interface and its arithmetic, and FLUX and Wan as DFM models that start as what they were."""

import copy
import json

import diffusers
import pytest
import torch

import vidkern
from vidkern.integrations.diffusers import DFMFlowMatchEulerScheduler, dfm_from_diffusers
from vidkern.integrations.diffusers.dfm import pack, unpack
from vidkern.models.dfm import join, schedule, split

FLUX = dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
            pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def flux(guidance=False):
    torch.manual_seed(0)
    model = randomised(diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guidance))
    condition = dict(encoder_hidden_states=torch.randn(2, 5, 12), pooled_projections=torch.randn(2, 8))
    return model, (2, 4, 8, 12), condition | (dict(guidance=torch.ones(2)) if guidance else {})


def wan(**config):
    torch.manual_seed(0)
    model = randomised(diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12,
                                                       freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64, **config))
    return model, (2, 4, 3, 8, 12), dict(encoder_hidden_states=torch.randn(2, 7, 12))


BASES = {"flux": flux, "flux-guidance": lambda: flux(True), "wan": wan}


def base_velocity(name, model, x, timestep, condition):
    """The base model by itself on a latent, as its pipeline calls it; timestep [B] in 0 .. 1000."""
    if name == "wan":
        return model(x, timestep, **condition, return_dict=False)[0]
    B, _, H, W = x.shape
    ids = torch.zeros(H // 2, W // 2, 3)
    ids[..., 1] += torch.arange(H // 2)[:, None]
    ids[..., 2] += torch.arange(W // 2)[None]
    out = model(pack(x), timestep=timestep / 1000, img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(5, 3), return_dict=False, **condition)[0]
    return unpack(out, x.shape)


def test_packing_is_that_of_the_pipeline():
    x = torch.randn(2, 4, 8, 12)
    assert torch.equal(pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    assert torch.equal(unpack(pack(x), x.shape), x)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_a_new_model_is_the_base_model(name, levels):
    """Level 1, the upsampled picture, gets the base model's own velocity, bit for bit, whatever the other levels and times are; they get 0."""
    base, shape, condition = BASES[name]()
    stock = copy.deepcopy(base)
    model = dfm_from_diffusers(base, levels=levels)
    states = split(torch.randn(shape), model.pyramid)
    assert len(states) == levels and all(z.shape == shape for z in states)
    timestep = torch.tensor([[700.0, 1000.0, 900.0], [300.0, 400.0, 1000.0]])[:, :levels]
    wanted = base_velocity(name, stock, states[0], timestep[:, 0], condition)
    for active in range(1, levels + 1):
        first, *others = model(states[:active], timestep, **condition)
        assert torch.equal(first, wanted) and len(others) == active - 1 and all(not v.any() for v in others)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_every_new_part_learns_from_the_first_steps(name):
    """All parameters of the finer level get a gradient within two steps (embeddings are behind a head that starts at 0), and then matter."""
    base, shape, condition = BASES[name]()
    model = dfm_from_diffusers(base)
    states, timestep = [torch.randn(shape), torch.randn(shape)], torch.tensor([100.0, 600.0])
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(2):
        optimiser.zero_grad()
        sum((v - 1).square().mean() for v in model(states, timestep, **condition)).backward()
        optimiser.step()
    fresh = [(n, p) for n, p in model.transformer.named_parameters() if ".levels.1." in n or "_embed.levels.0." in n or "embedder.levels.0." in n]
    assert {n.split(".")[0] for n, _ in fresh} >= {"flux": {"x_embedder", "time_text_embed", "norm_out", "proj_out"},
                                                   "wan": {"patch_embedding", "condition_embedder", "proj_out"}}[name]
    assert not [n for n, p in fresh if p.grad is None or not p.grad.any()]
    named = {id(p): n for n, p in model.transformer.named_parameters()}
    chosen = {named[id(p)] for p in model.level_parameters()}
    assert {n for n, _ in fresh} <= chosen and not any("blocks" in n for n in chosen)
    with torch.no_grad():
        first = model(states, timestep, **condition)
        for other in ([states[0], states[1] + 1], states):
            changed = model(other, timestep + torch.tensor([0.0, 100.0]) * (other is states), **condition)
            assert (changed[0] - first[0]).abs().max() > 0 and (changed[1] - first[1]).abs().max() > 0


@pytest.mark.parametrize("name", ["flux", "wan"])
@torch.no_grad()
def test_every_block_knows_the_time_of_every_level(name):
    base, shape, condition = BASES[name]()
    model, seen = randomised(dfm_from_diffusers(base)), []
    block = base.transformer_blocks[0] if name == "flux" else base.blocks[0]
    block.register_forward_pre_hook(lambda block, args, kwargs: seen.append(kwargs.get("temb", args[-2] if args else None)), with_kwargs=True)
    for time in ([700.0, 900.0], [600.0, 900.0], [700.0, 800.0]):
        model([torch.zeros(shape)] * 2, torch.tensor(time), **condition)
    assert all(not torch.equal(seen[0], other) for other in seen[1:])


@torch.no_grad()
def test_levels_that_wait_leave_no_trace():
    base, shape, condition = wan()
    model = randomised(dfm_from_diffusers(base))
    z, timestep = torch.randn(shape), torch.tensor([700.0, 1000.0])
    alone = model([z], timestep, **condition)
    both = model([z, torch.zeros(shape)], timestep, **condition)
    assert len(alone) == 1 and torch.equal(alone[0], both[0])
    assert not torch.equal(both[0], model([z, torch.ones(shape)], timestep, **condition)[0])


@torch.no_grad()
def test_weights_come_back_and_low_precision_runs():
    base, shape, condition = flux()
    model = randomised(dfm_from_diffusers(base), 5)
    other = dfm_from_diffusers(flux()[0])
    other.load_state_dict(model.state_dict())
    states, timestep = [torch.randn(shape), torch.randn(shape)], torch.tensor([700.0, 900.0])
    first, again = model(states, timestep, **condition), other(states, timestep, **condition)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    low = other.to(torch.bfloat16)(states, timestep, **{k: v.bfloat16() for k, v in condition.items()})
    assert low[0].dtype == torch.bfloat16
    torch.testing.assert_close(low[1].float(), first[1], rtol=0.1, atol=0.1)


def test_what_does_not_fit_is_said():
    base, shape, condition = wan()
    with pytest.raises(TypeError, match="transformer: Linear, expected FluxTransformer2DModel or WanTransformer3DModel"):
        dfm_from_diffusers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="levels: 5, expected 1 to 4"):
        dfm_from_diffusers(base, levels=5)
    model = dfm_from_diffusers(base)
    z, t = torch.randn(shape), torch.tensor([700.0, 1000.0])
    for levels, timestep, part in (([z, z, z], t, "expected 1 to 2 of one shape"), ([z, z[..., :4]], t, "of one shape"), ([z[:, :, 0]], t, "T, H, W"),
                                   ([z[:, :3]], t, "shape"), ([z[..., :7]], t, "divide by the patch size 2"), ([z], t[:1], "a time for every level")):
        with pytest.raises(ValueError, match=part):
            model(levels, timestep, **condition)


# ---- the scheduler ------------------------------------------------------------------------------------------------------------
def test_sigmas_are_the_schedule_of_the_paper():
    scheduler = DFMFlowMatchEulerScheduler()
    rows = schedule((30, 10), (0.9,))
    assert scheduler.timesteps.shape == (40, 2) and scheduler.sigmas.shape == (41, 2) and len(scheduler) == 1000
    torch.testing.assert_close(scheduler.sigmas[:-1], 1 - torch.tensor([r.times for r in rows]))
    assert scheduler.sigmas[0].tolist() == [1, 1] and scheduler.sigmas[-1].tolist() == [0, 0]
    assert scheduler.active == (1,) * 30 + (2,) * 10
    scheduler.set_timesteps(8)
    assert scheduler.active == (1,) * 6 + (2,) * 2 and scheduler.num_inference_steps == 8
    scheduler.set_timesteps(steps_per_stage=(2, 5), thresholds=(0.3,))
    assert scheduler.active == (1,) * 2 + (2,) * 5 and scheduler.sigmas[2].tolist() == pytest.approx([0.3, 1])
    three = DFMFlowMatchEulerScheduler(steps_per_stage=(20, 10, 10), thresholds=(0.2, 0.1))
    assert (three.sigmas[1:] <= three.sigmas[:-1]).all() and three.active[-1] == 3
    three.set_timesteps(3)
    assert three.active == (1, 2, 3)


def test_it_is_saved_and_loaded_as_any_scheduler(tmp_path):
    scheduler = DFMFlowMatchEulerScheduler(steps_per_stage=(6, 2, 1), thresholds=(0.3, 0.1))
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DFMFlowMatchEulerScheduler"
    for other in (DFMFlowMatchEulerScheduler.from_pretrained(tmp_path), DFMFlowMatchEulerScheduler.from_config(scheduler.config)):
        assert torch.equal(other.timesteps, scheduler.timesteps) and tuple(other.config.thresholds) == (0.3, 0.1)
    assert isinstance(scheduler, diffusers.SchedulerMixin) and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0


def test_a_pipelines_loop_reaches_the_data():
    """With the true velocity, noise - data, every clean estimate and the end are the data; the loop is a pipeline's."""
    scheduler = DFMFlowMatchEulerScheduler()
    scheduler.set_timesteps(10)
    data = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    noise = [torch.randn_like(x) for x in data]
    sample = noise
    for i, t in enumerate(scheduler.timesteps):
        active = scheduler.active[i]
        expected = scheduler.scale_noise(data, t, noise)
        for z, e in zip(sample, expected):
            torch.testing.assert_close(z, e, rtol=1e-4, atol=1e-5)
        velocity = [n - x for n, x in zip(noise, data)][:active]
        out = scheduler.step(velocity, t, scheduler.scale_model_input(sample, t))
        assert len(out.pred_original_sample) == active and scheduler.step_index == i + 1
        for estimate, x in zip(out.pred_original_sample, data):
            torch.testing.assert_close(estimate, x, rtol=1e-4, atol=1e-5)
        sample = out.prev_sample
    for z, x in zip(sample, data):
        torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="all 10 steps are done"):
        scheduler.step(velocity, t, sample)


def test_guidance_starting_late_and_times_per_sample():
    scheduler = DFMFlowMatchEulerScheduler(steps_per_stage=(2, 2))
    sample = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]
    c, u = ([torch.randn_like(x) for x in sample] for _ in range(2))
    scheduler.set_begin_index(2)
    (after,) = scheduler.step(c, scheduler.timesteps[2], sample, uncond_output=u, guidance_scale=3.0, return_dict=False)
    dt = scheduler.sigmas[3] - scheduler.sigmas[2]
    for s in range(2):
        torch.testing.assert_close(after[s], sample[s] + dt[s] * (u[s] + 3 * (c[s] - u[s])))
    scheduler.set_timesteps()
    scheduler.step(c, scheduler.timesteps[1], sample)
    assert scheduler.step_index == 2 and scheduler.index_for_timestep(scheduler.timesteps[3, 0]) == 3
    mixed = scheduler.scale_noise(sample, torch.tensor([[0.0, 1000.0], [1000.0, 0.0]]), c)
    assert torch.equal(mixed[0][0], sample[0][0]) and torch.equal(mixed[0][1], c[0][1]) and torch.equal(mixed[1][1], sample[1][1])


@torch.no_grad()
def test_a_wrapped_model_samples_with_it():
    base, shape, condition = wan()
    model, scheduler = randomised(dfm_from_diffusers(base)), DFMFlowMatchEulerScheduler(steps_per_stage=(2, 1))
    sample = [torch.randn(shape), torch.randn(shape)]
    for i, t in enumerate(scheduler.timesteps):
        velocity = model(sample[: scheduler.active[i]], t, **condition)
        (sample,) = scheduler.step(velocity, t, sample, return_dict=False)
    picture = join(sample, model.pyramid)
    assert picture.shape == shape and picture.isfinite().all()
    coarse = vidkern.pyramid_decompose(sample[0], levels=2)[0]
    torch.testing.assert_close(picture, vidkern.pyramid_merge([coarse, sample[1]]))


@pytest.mark.parametrize("call, part", [
    (lambda: DFMFlowMatchEulerScheduler(steps_per_stage=(3, 0)), "steps=(3, 0)"),
    (lambda: DFMFlowMatchEulerScheduler(thresholds=(1.0,)), "thresholds=(1.0,): expected sigmas in (0, 1)"),
    (lambda: DFMFlowMatchEulerScheduler(thresholds=(0.2, 0.1)), "expected 1 for 2 levels"),
    (lambda: DFMFlowMatchEulerScheduler(num_train_timesteps=0), "num_train_timesteps=0"),
    (lambda: DFMFlowMatchEulerScheduler().set_timesteps(1), "num_inference_steps=1: expected a whole number of at least 2"),
    (lambda: DFMFlowMatchEulerScheduler().set_timesteps(-3), "num_inference_steps=-3"),
    (lambda: DFMFlowMatchEulerScheduler().set_timesteps(4, steps_per_stage=(2, 2)), "expected without steps_per_stage"),
    (lambda: DFMFlowMatchEulerScheduler().set_timesteps(steps_per_stage=(2,)), "expected 2 numbers"),
    (lambda: DFMFlowMatchEulerScheduler().step([torch.zeros(1, 1, 2, 2)], torch.tensor([1e3, 1e3]), torch.zeros(1, 1, 2, 2)), "a list of 2"),
    (lambda: DFMFlowMatchEulerScheduler().index_for_timestep(123.4), "expected a row of scheduler.timesteps")])
def test_bad_arguments(call, part):
    with pytest.raises(ValueError) as error:
        call()
    assert part in str(error.value)
