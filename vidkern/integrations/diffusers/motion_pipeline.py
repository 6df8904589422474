"""Motion transfer with a diffusers pipeline: its own denoising loop runs, guidance acts between its steps (DiTFlow, arXiv 2412.07776)."""

import contextlib
import dataclasses

import torch

from ...errors import import_extra
from ...models.ditflow import losses
from ...models.ditflow.config import GuidanceConfig, cogvideox_2b, cogvideox_5b, wan_1_3b, wan_14b
from ...models.ditflow.guidance import MotionGuidance
from ...models.ditflow.taps import QK
from .motion import CogVideoXAdapter, motion_adapter

# Published guidance blocks, by number of blocks of the transformer.
PRESETS = {42: cogvideox_5b, 30: cogvideox_2b}
WAN_PRESETS = {40: wan_14b, 30: wan_1_3b}
PIPELINES = ("CogVideoXPipeline", "WanPipeline")


def check_pipeline(name, kind):
    """Raise TypeError unless `kind`, a class of this name or None, is one of `PIPELINES` or derived from one."""
    diffusers = import_extra("diffusers", "motion transfer")
    if kind is None or not issubclass(kind, tuple(getattr(diffusers, known) for known in PIPELINES)):
        raise TypeError(f"pipe: {name}, expected {' or '.join(PIPELINES)}")


def noise_function(scheduler):
    """A function (clean latent, noise, t) -> latent at timestep t of a diffusers scheduler, whose timesteps are set."""
    flow = hasattr(scheduler, "scale_noise") or getattr(scheduler.config, "use_flow_sigmas", False)

    def add_noise(latents, noise, t):
        t = torch.as_tensor(t)
        if not flow:
            return scheduler.add_noise(latents, noise, t.reshape(1).to(latents.device))
        index = (scheduler.timesteps.cpu() == t.cpu()).nonzero()
        if not len(index):
            raise ValueError(f"t={float(t):g}: not a timestep of the scheduler, expected one of set_timesteps")
        sigma = scheduler.sigmas[int(index[0])].to(latents)
        return (1 - sigma) * latents + sigma * noise

    return add_noise


@contextlib.contextmanager
def without_corrector(scheduler, steps):
    """Predictor alone in the first `steps` steps: a corrector (UniPC) computes the latent anew from the step before, which undoes an optimisation."""
    before = getattr(scheduler, "disable_corrector", None)
    if before is not None:
        scheduler.disable_corrector = sorted({*before, *range(steps)})
    try:
        yield
    finally:
        if before is not None:
            scheduler.disable_corrector = before


class MotionTransferPipeline:
    """Generates videos that move as a reference does, with a CogVideoXPipeline or WanPipeline.

    Args:
        pipe: the diffusers pipeline; its weights are not changed.
        config: a `vidkern.models.ditflow.GuidanceConfig`; None: the published one for this number of blocks.

    Attributes: pipe; guide, the `MotionGuidance` of the last call, with its reference, tables and history.

    Raises:
        TypeError: another kind of pipeline, or a transformer without adapter. ValueError: a guidance block out of range, or no published settings
        for this size.
    """

    def __init__(self, pipe, config=None):
        check_pipeline(type(pipe).__name__, type(pipe))
        adapter = motion_adapter(pipe.transformer)      # raises for what is not supported
        adapter.remove()
        self.pipe, self.guide = pipe, None
        self.wan = type(pipe.transformer).__name__.startswith("Wan")
        blocks = pipe.transformer.config.num_layers
        presets = WAN_PRESETS if self.wan else PRESETS
        if config is None and blocks not in presets:
            raise ValueError(f"config=None: no published guidance block for {blocks} blocks, expected a GuidanceConfig(blocks=...)")
        self.config = presets[blocks]() if config is None else config
        adapter.check_blocks("blocks", self.config.blocks)
        if getattr(pipe.config, "expand_timesteps", False):
            raise ValueError("pipe: expand_timesteps is on, expected a pipeline with one time for all tokens")

    @classmethod
    def from_pretrained(cls, name, config=None, **options):
        """The pipeline of a pretrained model, as ``DiffusionPipeline.from_pretrained(name, **options)`` loads it; saved parts may be missing."""
        diffusers = import_extra("diffusers", "motion transfer")
        kind = diffusers.DiffusionPipeline
        parts = kind.load_config(name, **{k: options[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in options})
        named = parts.get("_class_name")
        if not isinstance(named, (list, tuple)) and "custom_pipeline" not in options:
            check_pipeline(named, getattr(diffusers, str(named), None))      # before weights are fetched
        missing = {part: None for part, home in parts.items() if isinstance(home, (list, tuple)) and list(home) == [None, None]}
        return cls(kind.from_pretrained(name, **{**missing, **options}), config)

    # ---- parts of a call -------------------------------------------------------------------------------------------------------------------
    def encode_video(self, video, generator=None):
        """Clean latent of a clip [T, 3, H, W] (uint8, or floating in 0 .. 1), as the transformer takes it, [1, ...]; a sample of the posterior.

        Wan takes 4 k + 1 frames: frames at the end that do not fit are left out.

        Raises:
            ValueError: a shape, a size, or too few frames: motion needs two frames of patches.
        """
        pipe, vae = self.pipe, self.pipe.vae
        if getattr(video, "ndim", 0) != 4 or video.shape[1] != 3:
            raise ValueError(f"video: shape {tuple(getattr(video, 'shape', ()))}, expected [T, 3, H, W]")
        latent_frames = 2 * self.temporal_patch() if self.wan else self.temporal_patch() + 1      # Wan leaves out what does not fill a patch; CogVideoX fills it up
        if len(video) < (least := (latent_frames - 1) * pipe.vae_scale_factor_temporal + 1):
            raise ValueError(f"video: {len(video)} frames, expected at least {least}, for two frames of patches")
        x = video.float() / 255 if video.dtype == torch.uint8 else video.float()
        multiple = pipe.vae_scale_factor_spatial * self._patch()
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"video: {x.shape[2]}x{x.shape[3]} pixels, expected multiples of {multiple}")
        if self.wan:
            x = x[: (len(x) - 1) // pipe.vae_scale_factor_temporal * pipe.vae_scale_factor_temporal + 1]
        x = (2 * x - 1).permute(1, 0, 2, 3)[None].to(pipe._execution_device, vae.dtype)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample(generator)
        if self.wan:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (vae.config.latents_mean, vae.config.latents_std))
            return (latents - mean) / std
        latents = latents.permute(0, 2, 1, 3, 4) * pipe.vae_scaling_factor_image
        missing = -latents.shape[1] % self.temporal_patch()
        return torch.cat((latents[:, :1].expand(-1, missing, -1, -1, -1), latents), 1)     # the pipeline drops as many frames in front

    def _patch(self):
        size = self.pipe.transformer.config.patch_size
        return size if isinstance(size, int) else size[1]

    def temporal_patch(self):
        """Latent frames in a frame of patches: 2 for CogVideoX 1.5, 1 for the others."""
        config = self.pipe.transformer.config
        return config.patch_size[0] if self.wan else config.patch_size_t or 1

    def _embeds(self, what, prompt, embeds, **options):
        """(prompt embeddings, negative ones or None) on the pipeline's device."""
        if embeds is None and self.pipe.tokenizer is None:
            raise ValueError(f"{what}_embeds=None: expected embeddings, the pipeline has no tokenizer")
        if embeds is None and prompt is None:
            raise ValueError(f"{what}=None: expected a prompt, or {what}_embeds")
        given = {what: None if embeds is not None or isinstance(prompt, str) else prompt, f"{what}_embeds": embeds,
                 "negative_prompt_embeds": options.get("negative_prompt_embeds")}
        for name, value in given.items():
            if value is not None and len(value) != 1:
                raise ValueError(f"{name}: {len(value)} prompts, expected one; call once for each")
        return self.pipe.encode_prompt(None if embeds is not None else prompt, prompt_embeds=embeds, device=self.pipe._execution_device, **options)

    def _condition(self, embeds, adapter, latents):
        condition = {"encoder_hidden_states": embeds}
        if isinstance(adapter, CogVideoXAdapter) and adapter.positional == "rope":
            factor = self.pipe.vae_scale_factor_spatial
            condition["image_rotary_emb"] = self.pipe._prepare_rotary_positional_embeddings(
                latents.shape[-2] * factor, latents.shape[-1] * factor, latents.shape[1], latents.device)
        return condition

    def default_size(self):
        """(height, width) in pixels that the model was made for, as far as its configuration says: CogVideoX's own, 480 x 832 for Wan."""
        config, factor = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        return (480, 832) if self.wan else (config.sample_height * factor, config.sample_width * factor)

    def extract(self, video, *, source_prompt="", source_prompt_embeds=None, generator=None):
        """The motion of a clip [T, 3, H, W]: a `vidkern.models.ditflow.MotionReference`. Source prompt: empty, as published."""
        source, _ = self._embeds("source_prompt", source_prompt, source_prompt_embeds, do_classifier_free_guidance=False,
                                 max_sequence_length=512 if self.wan else 226)
        clean = self.encode_video(video, generator)
        adapter = motion_adapter(self.pipe.transformer)
        try:
            guide = MotionGuidance(adapter, dataclasses.replace(self.config, inject=()))
            return guide.extract(clean, self._condition(source, adapter, clean), 0)
        finally:
            adapter.remove()

    # ---- use -------------------------------------------------------------------------------------------------------------------------------
    def __call__(self, video=None, prompt=None, *, latents=None, source_prompt="", source_prompt_embeds=None, negative_prompt=None,
                 prompt_embeds=None, negative_prompt_embeds=None, num_frames=None, num_inference_steps=50, guidance_scale=7.0, generator=None,
                 tables=None, rescue=None, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",), max_sequence_length=None,
                 num_videos_per_prompt=1, **options):
        """Generate one video, for one prompt.

        Args:
            video: the reference, [T, 3, H, W]; its size and length are those of the result. latents: its clean latent instead (`encode_video`).
            prompt, negative_prompt, or their embeddings: of the result. source_prompt: of the reference, empty as published.
            num_frames: of the result, when it cannot be told from `latents`.
            num_inference_steps, guidance_scale, callback_on_step_end, callback_on_step_end_tensor_inputs, max_sequence_length, options: of the
                pipeline. A callback is called before guidance acts, with the tensors that it names in ``tensor_inputs``, or else those named here.
            generator: one, not a list. num_videos_per_prompt: 1, and no other.
            tables: of an earlier run with ``optimise="positions"`` (`load_tables`), injected without optimisation.
            rescue: see `MotionGuidance`.

        Returns:
            what the pipeline returns.

        Raises:
            ValueError: sizes, blocks, tables that do not fit, or more than one video. GuidanceStopped: gradients that are not finite.
        """
        pipe, device = self.pipe, self.pipe._execution_device
        if (video is None) == (latents is None):
            raise ValueError(f"video, latents: {'both' if video is not None else 'neither'} given, expected one of them")
        if num_videos_per_prompt != 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt!r}: expected 1; call once for each video")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: {type(generator).__name__}, expected one torch.Generator")
        longest = max_sequence_length or (512 if self.wan else 226)      # of the prompt, as the pipelines have it
        shared = {"max_sequence_length": longest, "num_videos_per_prompt": 1}
        guided = guidance_scale > 1
        prompt_embeds, negative_prompt_embeds = self._embeds("prompt", prompt, prompt_embeds, negative_prompt=negative_prompt,
                                                             negative_prompt_embeds=negative_prompt_embeds, do_classifier_free_guidance=guided, **shared)
        source, _ = self._embeds("source_prompt", source_prompt, source_prompt_embeds, do_classifier_free_guidance=False, **shared)
        state = None if generator is None else generator.get_state()
        if latents is None:
            clean, num_frames = self.encode_video(video, generator), len(video)
            if state is not None:
                generator.set_state(state)      # the noise is the pipeline's own for this seed
        else:
            clean = latents.to(device)
            frames = clean.shape[2 if self.wan else 1]
            num_frames = num_frames or (frames - 1) * pipe.vae_scale_factor_temporal + 1
        dtype = torch.float32 if self.wan else prompt_embeds.dtype
        noise = import_extra("diffusers.utils.torch_utils", "motion transfer").randn_tensor(clean.shape, generator=generator, device=device, dtype=dtype)
        scheduler = pipe.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps.clone()
        self._check_boundary(timesteps)
        asked = tuple(getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs or ()))
        adapter = motion_adapter(pipe.transformer)
        config = self.config
        try:
            guide = self.guide = MotionGuidance(adapter, config, add_noise=noise_function(scheduler), tables=tables, rescue=rescue)
            if tables is None or config.inject:
                guide.extract(clean, self._condition(source, adapter, clean), timesteps.new_zeros(()))
            guide.begin(timesteps, noise=noise, condition=self._condition(prompt_embeds[:1], adapter, clean))
            sigma = 1.0 if self.wan else scheduler.init_noise_sigma      # what the pipeline multiplies the latents that it is given by
            with without_corrector(scheduler, config.guided(len(timesteps))):
                start = guide.step(noise * sigma, timesteps[0]) / sigma
                factor = pipe.vae_scale_factor_spatial
                return pipe(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, latents=start, generator=generator,
                            height=clean.shape[-2] * factor, width=clean.shape[-1] * factor, num_frames=num_frames,
                            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, max_sequence_length=longest,
                            callback_on_step_end=self._between(guide, timesteps, callback_on_step_end, asked),
                            callback_on_step_end_tensor_inputs=list(dict.fromkeys(("latents", *asked))), **options)
        finally:
            adapter.remove()

    @staticmethod
    def _between(guide, timesteps, theirs, asked):
        """The pipeline's callback after step i: the user's own, with the tensors `asked` for, then guidance for step i + 1."""
        def after(pipe, index, t, values):
            if theirs is not None:
                values = {**values, **theirs(pipe, index, t, {name: values[name] for name in asked})}
            if index + 1 < len(timesteps):
                values["latents"] = guide.step(values["latents"], timesteps[index + 1])
            return values

        return after

    def _check_boundary(self, timesteps):
        """Wan 2.2 changes to a second transformer below a timestep: guidance must end before."""
        ratio = getattr(self.pipe.config, "boundary_ratio", None)
        count = self.config.guided(len(timesteps))
        if ratio is not None and count and float(timesteps[count - 1]) < ratio * self.pipe.scheduler.config.num_train_timesteps:
            raise ValueError(f"share={self.config.share}: guides steps of the second transformer, expected a share that ends before boundary_ratio={ratio}")


def read_motion(transfer, video, *, tau=2.0, mode="hard"):
    """(flow [F, F, h, w, 2] in patches, block) of a clip [T, 3, H, W] by the first guidance block of a `MotionTransferPipeline`.

    A pipeline without tokenizer gets zeros for the empty prompt. mode: "hard" or "soft".
    """
    pipe, adapter_config = transfer.pipe, transfer.pipe.transformer.config
    source = None
    if pipe.tokenizer is None:
        length, width = (512, adapter_config.text_dim) if transfer.wan else (adapter_config.max_text_seq_length, adapter_config.text_embed_dim)
        source = torch.zeros(1, length, width, dtype=pipe.transformer.dtype, device=pipe._execution_device)
    block = transfer.config.blocks[0]
    config = dataclasses.replace(transfer.config, blocks=(block,), pairs="all", tau=tau, heads="logit_mean")
    source, _ = transfer._embeds("source_prompt", "", source, do_classifier_free_guidance=False)
    clean = transfer.encode_video(video, torch.Generator(pipe._execution_device).manual_seed(0))
    adapter = motion_adapter(pipe.transformer)
    try:
        condition = transfer._condition(source, adapter, clean)
        with torch.no_grad():
            pair = adapter.features(clean, 0, condition, {block: (QK,)})[block, QK]
        grid = adapter.grid(clean)
        flow = losses.flow_of(*pair, config, grid, mode=mode, n_text=adapter.n_text(condition), text_position=adapter.text_position)
    finally:
        adapter.remove()
    return flow.view(grid[0], *grid, 2), block
