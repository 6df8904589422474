"""Motion guidance of diffusers transformers and pipelines, tiny and random: taps, tables, injection, early exit, whole transfers, refusals."""

import copy
import dataclasses
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from vidkern.cli import main
from vidkern.data import write_video
from vidkern.integrations.diffusers import MotionTransferPipeline, enable_vidkern, motion_adapter, noise_function
from vidkern.integrations.diffusers.motion_pipeline import without_corrector
from vidkern.models.ditflow import GuidanceConfig, GuidanceStopped, MotionGuidance, load_tables, losses, pictures

NAMES = ["cogvideox-2b", "cogvideox-5b", "cogvideox-1.5", "wan"]
TEXT = {"cogvideox-2b": 5, "cogvideox-5b": 5, "cogvideox-1.5": 5, "wan": 0}
CONFIG = GuidanceConfig(blocks=(1,), lr=(0.02, 0.01), share=0.5, updates=2)


@pytest.fixture
def tiny(tiny):
    """The shared ``tiny``, and CogVideoX 1.5: two latent frames in a frame of patches, of which there are as many as the others have."""
    def make(name, **kwargs):
        if name != "cogvideox-1.5":
            return tiny(name, **kwargs)
        model, inputs = tiny("cogvideox-5b", **{"frames": 8, "patch_size_t": 2, "patch_bias": False, **kwargs})
        rows, columns = (side // 2 for side in inputs["hidden_states"].shape[-2:])
        frames = inputs["hidden_states"].shape[1] // 2
        rope = get_3d_rotary_pos_embed(16, None, (rows, columns), frames, grid_type="slice", max_size=(rows, columns))
        return model, inputs | {"image_rotary_emb": rope}

    return make


@pytest.fixture
def adapted(tiny):
    """``adapted(name)`` -> (adapter, latent, condition) of one video."""
    def make(name, **kwargs):
        model, inputs = tiny(name, **kwargs)
        condition = {k: v for k, v in inputs.items() if k not in ("hidden_states", "timestep")}
        condition["encoder_hidden_states"] = condition["encoder_hidden_states"][:1]
        return motion_adapter(model), inputs["hidden_states"][:1], condition

    return make


# ---- adapters --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_stock_model_with_nothing_asked_its_own_tables_or_its_own_values(name, tiny, run):
    model, inputs = tiny(name)
    stock, before = run(model, inputs), dict(model.attn_processors)
    adapter = motion_adapter(model)
    assert torch.equal(run(model, inputs), stock)
    z = inputs["hidden_states"]
    condition = {k: v for k, v in inputs.items() if k not in ("hidden_states", "timestep")}
    own = adapter.positions(z, condition)
    assert own.dtype == torch.float32 and own.shape == ((1, 24, 32) if name == "cogvideox-2b" else (2, 2, 24, 16))
    adapter.arm(positions=own)
    torch.testing.assert_close(run(model, inputs), stock, rtol=0, atol=1e-6)
    adapter.arm(positions=own + 0.1 * torch.randn_like(own))
    assert (run(model, inputs) - stock).abs().max() > 1e-3
    adapter.disarm()
    one = {k: v[:1] if torch.is_tensor(v) else v for k, v in inputs.items()}
    alone = run(model, one)
    values = {0: adapter.features(z[:1], inputs["timestep"][0], {k: v[:1] if torch.is_tensor(v) else v for k, v in condition.items()}, {0: ("kv",)})[0, "kv"]}
    adapter.arm(values=values)
    torch.testing.assert_close(run(model, one), alone, rtol=0, atol=1e-6)
    both = run(model, inputs)      # for both samples of the batch
    assert (both[1] - stock[1]).abs().max() > 1e-3
    adapter.remove()
    assert model.attn_processors == before and torch.equal(run(model, inputs), stock)
    assert not any(block._forward_hooks for block in adapter.blocks)
    assert name != "cogvideox-2b" or not model.patch_embed._forward_hooks


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_captured_is_what_the_stock_processor_attends_with(name, adapted):
    adapter, z, condition = adapted(name)
    got = adapter.features(z, 500, condition, {1: ("qk", "kv")})
    adapter.remove()
    calls = []
    if name == "wan":
        target = "diffusers.models.transformers.transformer_wan.dispatch_attention_fn"
    else:
        target = "torch.nn.functional.scaled_dot_product_attention"
    import importlib

    module, attribute = target.rsplit(".", 1)
    real = getattr(importlib.import_module(module), attribute)

    def watched(q, k, v, *args, **kwargs):
        calls.append((q, k, v))
        return real(q, k, v, *args, **kwargs)

    with mock.patch(target, watched):
        adapter.forward(z, 500, condition)
    q, k, v = calls[2 if name == "wan" else 1]      # Wan: self, text, self, text
    if name != "wan":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert got[1, "qk"][0].shape == (1, TEXT[name] + 24, 2, 16)
    for a, b in zip((*got[1, "qk"], *got[1, "kv"]), (q, k, k[:, TEXT[name] :], v[:, TEXT[name] :])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_ends_at_the_block_that_is_asked_for(name, adapted):
    adapter, z, condition = adapted(name, **({"num_layers": 4}))
    seen = []
    for i, block in enumerate(adapter.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
        (block.ff if hasattr(block, "ff") else block.ffn).register_forward_pre_hook(lambda *_, i=i: seen.append(f"mlp {i}"))
    adapter.features(z, 500, condition, {1: ("qk",)})
    assert seen == [0, "mlp 0", 1]
    del seen[:]
    found = adapter.features(z, 500, condition, {0: ("qk",), 2: ("hidden",)})
    assert seen == [0, "mlp 0", 1, "mlp 1", 2, "mlp 2"] and found[2, "hidden"].shape == (1, 24, 32)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_latent_and_tables_also_with_checkpointing(name, adapted):
    adapter, z, condition = adapted(name, **({"num_layers": 3}))
    own, found = adapter.positions(z, condition), {}
    values = {0: tuple(x.detach() for x in adapter.features(torch.randn_like(z), 500, condition, {0: ("kv",)})[0, "kv"])}
    before = adapter.model.gradient_checkpointing
    for checkpointing in (False, True):
        leaves = z.clone().requires_grad_(), own.clone().requires_grad_()
        with adapter.frozen():
            q, k = adapter.features(leaves[0], 500, condition, {2: ("qk",)}, positions=leaves[1], values=values, checkpointing=checkpointing)[2, "qk"]
            found[checkpointing] = torch.autograd.grad(q.pow(3).sum() + k.square().cumsum(1).sum(), leaves)
    assert adapter.model.gradient_checkpointing == before
    for a, b in zip(found[False], found[True]):
        assert a.abs().max() > 0 and torch.equal(a, b)
    table = found[False][1]
    if name != "cogvideox-2b":
        assert all(part.abs().max() > 0 for part in table.flatten(0, 1)) and not torch.equal(table[0], table[1])


def test_the_grid_of_a_latent(adapted):
    for name in NAMES:
        frames = 6 if name == "cogvideox-1.5" else 3
        adapter, z, _ = adapted(name, frames=frames, height=8, width=4)
        assert z.shape[2 if name == "wan" else 1] == frames and adapter.grid(z) == (3, 4, 2)
    adapter, z, _ = adapted("wan", frames=4, patch_size=(2, 1, 2))
    assert adapter.grid(z) == (2, 4, 3)


def test_other_classes_blocks_and_processors_are_refused(tiny, adapted):
    for name in ("ltx", "hunyuan"):
        with pytest.raises(TypeError, match="expected CogVideoXTransformer3DModel, WanTransformer3DModel"):
            motion_adapter(tiny(name)[0])
    adapter, z, condition = adapted("cogvideox-5b")
    with pytest.raises(ValueError, match=r"blocks=\(2,\): block 2, expected 0 to 1"):
        MotionGuidance(adapter, GuidanceConfig(blocks=(2,), inject=()))
    with pytest.raises(TypeError, match="processor: MotionAttnProcessor, expected a stock one"):
        motion_adapter(adapter.model)
    with pytest.raises(ValueError, match="without image_rotary_emb"):
        adapter.forward(z, 500, {"encoder_hidden_states": condition["encoder_hidden_states"]})
    with pytest.raises(ValueError, match="expected 5 dimensions"):
        adapter.grid(z[0])
    adapter.remove()
    with enable_vidkern(adapter.model), pytest.raises(TypeError, match="processor: VidkernAttnProcessor, expected a stock one"):
        motion_adapter(adapter.model)


def test_fused_projections(adapted):
    for name in ("cogvideox-5b", "wan"):
        adapter, z, condition = adapted(name)
        stock = adapter.features(z, 500, condition, {1: ("qk",)})[1, "qk"]
        adapter.remove()
        model = adapter.model
        model.fuse_qkv_projections()
        fused = motion_adapter(model).features(z, 500, condition, {1: ("qk",)})[1, "qk"]
        for a, b in zip(stock, fused):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models_as_they_are_loaded(name, dtype, adapted, tmp_path):
    """`from_pretrained` keeps some parameters in fp32, in Wan the very first."""
    adapter, z, condition = adapted(name)
    adapter.remove()
    adapter.model.save_pretrained(tmp_path)
    made = {}
    for kind in (torch.float32, dtype):
        model = type(adapter.model).from_pretrained(tmp_path, torch_dtype=kind).eval()
        loaded = motion_adapter(model)
        assert loaded.dtype == kind
        for optimise in ("latent", "positions"):
            guide = MotionGuidance(loaded, dataclasses.replace(CONFIG, optimise=optimise), add_noise=lambda clean, noise, t: 0.5 * (clean + noise))
            guide.extract(z.flip(-1).to(kind), condition)
            guide.begin([900, 500], noise=z.to(kind), condition=condition)
            out = guide.step(z.to(kind), 900)
            assert out.dtype == kind and out.isfinite().all() and torch.equal(out, z.to(kind)) == (optimise == "positions")
            assert loaded.forward(out, 900, condition).dtype == kind      # with the table and the injected values
            made[kind, optimise] = guide.history[0]["losses"]
    for optimise in ("latent", "positions"):
        assert made[dtype, optimise] == pytest.approx(made[torch.float32, optimise], rel=0.2)
    assert name != "wan" or next(model.parameters()).dtype == torch.float32      # what this is about


# ---- pipelines -------------------------------------------------------------------------------------------------------------------------------
def cogvideox_vae():
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4)


def wan_vae():
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
                                      latents_mean=[0.1] * 4, latents_std=[1.5] * 4)


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.fixture
def pipe(tiny):
    """``pipe(name, scheduler=None)``: a whole tiny pipeline without text encoder, in silence."""
    def make(name, scheduler=None):
        model, _ = tiny(name)
        torch.manual_seed(1)
        if name == "wan":
            made = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=wan_vae().eval(), transformer=model, scheduler=scheduler or unipc())
        else:
            kind = diffusers.CogVideoXDDIMScheduler if name == "cogvideox-2b" else diffusers.CogVideoXDPMScheduler
            made = diffusers.CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=cogvideox_vae().eval(), transformer=model,
                                               scheduler=scheduler or kind(timestep_spacing="trailing"))
        made.set_progress_bar_config(disable=True)
        return made

    return make


def embeds(seed):
    return torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(seed))


def options(**more):
    return {**dict(prompt_embeds=embeds(1), negative_prompt_embeds=embeds(2), num_inference_steps=4, guidance_scale=3.0, output_type="latent",
                   generator=torch.Generator().manual_seed(3)), **more}


VIDEO = torch.rand(13, 3, 32, 48, generator=torch.Generator().manual_seed(0))
SOURCE = dict(source_prompt_embeds=embeds(4))


@pytest.mark.parametrize("name", NAMES)
def test_no_guidance_is_the_pipeline_itself(name, pipe):
    plain = pipe(name)
    wanted = plain(height=32, width=48, num_frames=13, **options()).frames
    transfer = MotionTransferPipeline(plain, GuidanceConfig(blocks=(1,), share=0.0))
    assert torch.equal(transfer(VIDEO, **SOURCE, **options()).frames, wanted)
    assert torch.equal(transfer(latents=transfer.encode_video(VIDEO), **SOURCE, **options()).frames, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimise", ["latent", "positions"])
def test_the_pipeline_and_a_loop_by_hand_agree(name, optimise, pipe):
    """Guidance inside the pipeline's own loop is the loop that the guide's documentation shows."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if name == "wan" else diffusers.CogVideoXDDIMScheduler()
    whole, config = pipe(name, scheduler), GuidanceConfig(blocks=(0, 1), lr=(0.02, 0.01), share=0.5, updates=2, optimise=optimise)
    transfer = MotionTransferPipeline(whole, config)
    clean = transfer.encode_video(VIDEO, torch.Generator().manual_seed(5))
    got = transfer(latents=clean, **SOURCE, **options()).frames
    assert len(transfer.guide.history) == 2 and len(transfer.guide.tables) == (2 if optimise == "positions" else 0)

    adapter, scheduler = motion_adapter(whole.transformer), copy.deepcopy(whole.scheduler)
    scheduler.set_timesteps(4)
    guide = MotionGuidance(adapter, config, add_noise=noise_function(scheduler))
    conditions = [transfer._condition(embeds(seed), adapter, clean) for seed in (1, 2, 4)]
    guide.extract(clean, conditions[2], torch.tensor(0))
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    guide.begin(scheduler.timesteps, noise=z, condition=conditions[0])
    with torch.no_grad(), guide:
        for t in scheduler.timesteps:
            z = guide.step(z, t)
            cond, null = (adapter.forward(z, t, c).float() for c in conditions[:2])
            z = scheduler.step(null + 3.0 * (cond - null), t, z).prev_sample
    adapter.remove()
    torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-4 * float(z.abs().max()))
    plain = MotionTransferPipeline(whole, GuidanceConfig(blocks=(1,), share=0.0))(latents=clean, **SOURCE, **options()).frames
    assert (got - plain).abs().max() > 1e-3


def test_nothing_is_left_behind_even_when_it_fails(pipe, monkeypatch, tmp_path):
    whole = pipe("cogvideox-5b")
    before, learning = dict(whole.transformer.attn_processors), [p.requires_grad for p in whole.transformer.parameters()]
    transfer = MotionTransferPipeline(whole, CONFIG)
    seen = []
    transfer(VIDEO, **SOURCE, **options(), callback_on_step_end=lambda pipe, i, t, values: seen.append(i) or {})
    assert seen == [0, 1, 2, 3]      # the caller's own callback is heard
    assert whole.transformer.attn_processors == before and [p.requires_grad for p in whole.transformer.parameters()] == learning
    monkeypatch.setattr(losses.vidkern, "amf_loss", lambda q, *a, **k: q.sum() * float("nan"))
    with pytest.raises(GuidanceStopped, match="guided step 0"):
        transfer(VIDEO, **SOURCE, **options(), rescue=tmp_path / "rescue.pt")
    assert whole.transformer.attn_processors == before and (tmp_path / "rescue.pt").is_file()


def test_tables_of_one_prompt_serve_another(pipe, tmp_path):
    whole = pipe("cogvideox-2b")
    transfer = MotionTransferPipeline(whole, GuidanceConfig(blocks=(1,), lr=(0.05, 0.02), share=0.5, updates=2, optimise="positions"))
    clean = transfer.encode_video(VIDEO)
    made = transfer(latents=clean, **SOURCE, **options()).frames
    transfer.guide.save(tmp_path / "tables.pt")
    adapter = motion_adapter(whole.transformer)
    tables = load_tables(tmp_path / "tables.pt", adapter)
    adapter.remove()
    assert torch.equal(transfer(latents=clean, tables=tables, **SOURCE, **options()).frames, made) and not transfer.guide.history
    other = options(prompt_embeds=embeds(9))
    plain = MotionTransferPipeline(whole, GuidanceConfig(blocks=(1,), share=0.0))(latents=clean, **SOURCE, **other).frames
    other["generator"] = torch.Generator().manual_seed(3)
    assert not torch.equal(transfer(latents=clean, tables=tables, **SOURCE, **other).frames, plain)


def test_a_corrector_would_undo_the_optimised_latent():
    """UniPC recomputes the latent from the step before; without its corrector a change of the latent reaches the next one in full."""
    def moved(scheduler, off):
        out = []
        for change in (0.0, 1.0):
            s, g = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
            s.set_timesteps(6)
            z = torch.randn(1, 4, 3, 4, 4, generator=g)
            with without_corrector(s, 6 if off else 0):
                for i, t in enumerate(s.timesteps[:3]):
                    z = z + (change if i == 2 else 0.0)
                    z = s.step(torch.randn(z.shape, generator=g), t, z).prev_sample      # the model's answer is held fixed
            assert s.disable_corrector == scheduler.disable_corrector
            out.append(z)
        return float((out[1] - out[0]).mean())

    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    with without_corrector(euler, 3):
        pass
    assert moved(unipc(), True) == pytest.approx(1.0, abs=0.6) and abs(moved(unipc(), False)) < 0.3 * moved(unipc(), True)


def test_noise_at_the_time_of_a_step():
    clean, noise = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 4, 2, 2, 2)
    for scheduler in (unipc(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler.set_timesteps(5)
        add = noise_function(scheduler)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            torch.testing.assert_close(add(clean, noise, t), (1 - sigma) * clean + sigma * noise)
        with pytest.raises(ValueError, match="not a timestep of the scheduler"):
            add(clean, noise, 1.5)
    ddim = diffusers.CogVideoXDDIMScheduler()
    ddim.set_timesteps(5)
    t = ddim.timesteps[2]
    torch.testing.assert_close(noise_function(ddim)(clean, noise, t), ddim.add_noise(clean, noise, t[None]))


def test_reading_the_motion_of_a_clip(pipe):
    for name in NAMES:
        whole = pipe(name)
        ref = MotionTransferPipeline(whole, CONFIG).extract(VIDEO, **SOURCE, generator=torch.Generator().manual_seed(0))
        frames = 2 if name == "cogvideox-1.5" else 4
        assert ref.grid == (frames, 2, 3) and ref.flows[1].shape == (frames**2, 6, 2) and ref.flows[1].abs().max() > 0


def test_clips_that_do_not_fit_are_told(pipe):
    whole = pipe("wan")
    transfer = MotionTransferPipeline(whole, CONFIG)
    assert transfer.encode_video(VIDEO[:11]).shape[2] == 3      # 9 frames
    for video, part in ((VIDEO[:, :1], "expected \\[T, 3, H, W\\]"), (VIDEO[..., :30], "32x30 pixels, expected multiples of 16")):
        with pytest.raises(ValueError, match=part):
            transfer.encode_video(video)
    with pytest.raises(ValueError, match="neither given"):
        transfer(**SOURCE, **options())
    with pytest.raises(ValueError, match="source_prompt_embeds=None: expected embeddings, the pipeline has no tokenizer"):
        transfer(VIDEO, **options())
    with pytest.raises(ValueError, match="no published guidance block for 2 blocks"):
        MotionTransferPipeline(whole)
    with pytest.raises(ValueError, match="block 5, expected 0 to 1"):
        MotionTransferPipeline(whole, GuidanceConfig(blocks=(5,)))


@pytest.mark.parametrize("name, least", [("cogvideox-5b", 5), ("cogvideox-1.5", 9), ("wan", 5)])
def test_clips_that_are_too_short_are_told(name, least, pipe):
    transfer = MotionTransferPipeline(pipe(name), CONFIG)
    for frames in (0, 1, least - 1):
        with pytest.raises(ValueError, match=f"video: {frames} frames, expected at least {least}, for two frames of patches"):
            transfer.encode_video(VIDEO[:frames])
    assert transfer.extract(VIDEO[:least], **SOURCE).grid[0] == 2
    frames = transfer(VIDEO[:least], **SOURCE, **options(num_inference_steps=2)).frames
    assert torch.as_tensor(frames).isfinite().all()


# ---- callbacks -------------------------------------------------------------------------------------------------------------------------------
class Listening(PipelineCallback):
    tensor_inputs = ["negative_prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.__dict__.setdefault("seen", []).append(sorted(callback_kwargs))
        return callback_kwargs


@pytest.mark.parametrize("name", ["cogvideox-5b", "wan"])
def test_callbacks_get_what_they_ask_for_and_change_what_the_pipeline_lets_them(name, pipe):
    transfer, seen = MotionTransferPipeline(pipe(name), CONFIG), []

    def call(callback, **more):
        return transfer(VIDEO, **SOURCE, **options(), callback_on_step_end=callback, **more).frames

    def hears(change=None):
        def callback(pipe, index, t, values):
            seen.append(sorted(values))
            return change(values) if change else values
        return callback

    plain = call(None)
    assert torch.equal(call(hears()), plain) and seen == [["latents"]] * 4
    for asked in (["prompt_embeds"], ["negative_prompt_embeds", "latents"], []):
        del seen[:]
        assert torch.equal(call(hears(), callback_on_step_end_tensor_inputs=asked), plain) and seen == [sorted(asked)] * 4
    zeros = hears(lambda values: {"prompt_embeds": torch.zeros_like(values["prompt_embeds"])})
    assert not torch.equal(call(zeros, callback_on_step_end_tensor_inputs=["prompt_embeds"]), plain)
    assert not torch.equal(call(hears(lambda values: {"latents": values["latents"] + 1})), plain)
    one, two = Listening(), Listening()
    assert torch.equal(call(one), plain) and one.seen == [["negative_prompt_embeds"]] * 4
    assert torch.equal(call(MultiPipelineCallbacks([one, two]), callback_on_step_end_tensor_inputs=["latents"]), plain)
    assert two.seen == [["negative_prompt_embeds"]] * 4


# ---- what is not served ----------------------------------------------------------------------------------------------------------------------
def ddpm():
    return diffusers.DDPMPipeline(diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
                                                        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
                                  diffusers.DDPMScheduler())


def test_other_kinds_of_pipelines_are_told(pipe, tmp_path, capsys):
    whole = pipe("cogvideox-5b")
    parts = dict(tokenizer=None, text_encoder=None, vae=whole.vae, transformer=whole.transformer, scheduler=whole.scheduler)
    write_video(tmp_path / "clip.mp4", VIDEO, 8)
    for other in (ddpm(), diffusers.CogVideoXImageToVideoPipeline(**parts), diffusers.CogVideoXVideoToVideoPipeline(**parts)):
        name = type(other).__name__
        told = f"pipe: {name}, expected CogVideoXPipeline or WanPipeline"
        with pytest.raises(TypeError, match=told):
            MotionTransferPipeline(other, CONFIG)
        other.save_pretrained(tmp_path / name)
        with mock.patch.object(diffusers.DiffusionPipeline, "from_pretrained", side_effect=AssertionError("weights were fetched")):
            assert main(["motion", str(tmp_path / "clip.mp4"), "--model", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and told in error[0]
    assert main(["motion", str(tmp_path / "clip.mp4"), "--model", "", "--out", str(tmp_path / "out")]) == 2      # not the tiny model
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("vidkern: error: --model")

    class Derived(diffusers.CogVideoXPipeline):
        pass

    MotionTransferPipeline(Derived(**parts), CONFIG)


@pytest.mark.parametrize("name", ["cogvideox-5b", "wan"])
def test_more_than_one_video_is_told(name, pipe):
    transfer, two = MotionTransferPipeline(pipe(name), CONFIG), torch.cat((embeds(1), embeds(2)))
    for changes, part in (
        ({"prompt_embeds": two, "negative_prompt_embeds": two}, "prompt_embeds: 2 prompts, expected one"),
        ({"negative_prompt_embeds": two}, "negative_prompt_embeds: 2 prompts, expected one"),
        ({"source_prompt_embeds": two}, "source_prompt_embeds: 2 prompts, expected one"),
        ({"generator": [torch.Generator()]}, "generator: list, expected one torch.Generator"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt=2: expected 1"),
    ):
        with pytest.raises(ValueError, match=part):
            transfer(VIDEO, **{**SOURCE, **options(**changes)})
    assert torch.equal(transfer(VIDEO, **SOURCE, **options(num_videos_per_prompt=1)).frames, transfer(VIDEO, **SOURCE, **options()).frames)
    transfer.pipe.tokenizer = mock.Mock(side_effect=AssertionError("tokenised"))
    for prompt, part in ((["a fox", "a hen"], "prompt: 2 prompts, expected one"), (None, "prompt=None: expected a prompt, or prompt_embeds")):
        with pytest.raises(ValueError, match=part):
            transfer(VIDEO, prompt, **{**SOURCE, **options(prompt_embeds=None)})
    with pytest.raises(ValueError, match="source_prompt: 2 prompts"):
        transfer.extract(VIDEO, source_prompt=["a fox", "a hen"])


def test_a_second_transformer_is_not_guided(pipe):
    whole = pipe("wan")
    whole.register_to_config(boundary_ratio=0.95)
    with pytest.raises(ValueError, match="guides steps of the second transformer"):
        MotionTransferPipeline(whole, CONFIG)(VIDEO, **SOURCE, **options())


@pytest.mark.parametrize("name", ["cogvideox-5b", "wan"])
def test_the_command_reads_a_saved_pipeline(name, pipe, tmp_path, capsys):
    import numpy as np

    pipe(name).save_pretrained(tmp_path / "model")
    write_video(tmp_path / "clip.mp4", VIDEO, 8)
    out = tmp_path / "out"
    assert main(["motion", str(tmp_path / "clip.mp4"), "--model", str(tmp_path / "model"), "--block", "1", "--frames", "9", "--size", "32x48",
                 "--out", str(out)]) == 0
    assert np.load(out / "motion.npz")["flow"].shape == (3, 3, 2, 3, 2) and "block 1 of" in capsys.readouterr().out
    assert main(["motion", str(tmp_path / "clip.mp4"), "--model", str(tmp_path / "model"), "--out", str(out), "--frames", "9", "--size", "32x48"]) == 2
    assert "no published guidance block for 2 blocks" in capsys.readouterr().err
    assert main(["motion", str(tmp_path / "clip.mp4"), "--model", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name, wanted", [("cogvideox-5b", [0, 4, 8, 12]), ("cogvideox-1.5", [0, 8]), ("wan", [0, 4, 8, 12])])
def test_the_flow_is_drawn_on_the_frames_that_it_belongs_to(name, wanted, pipe, tmp_path, monkeypatch):
    """A frame of patches stands for four frames of the clip, for eight in CogVideoX 1.5."""
    pipe(name).save_pretrained(tmp_path / "model")
    write_video(tmp_path / "clip.mp4", torch.linspace(0, 1, 13).view(13, 1, 1, 1).expand(13, 3, 32, 48), 8)      # brighter and brighter
    drawn = []
    monkeypatch.setattr(pictures, "sheet", lambda frames, flow, *rest: drawn.append((frames.mean((1, 2, 3)) * 12, flow)))
    monkeypatch.setattr(pictures, "movie", lambda *args: None)
    assert main(["motion", str(tmp_path / "clip.mp4"), "--model", str(tmp_path / "model"), "--block", "1", "--frames", "13", "--size", "32x48",
                 "--out", str(tmp_path / "out")]) == 0
    assert drawn[0][0].round().tolist() == wanted and drawn[0][1].shape == (len(wanted), len(wanted), 2, 3, 2)
