"""Put vidkern's attention into a diffusers video transformer, and take it out again."""

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import import_extra
from ...ops.grid_attention import MAX_DIM
from .frames import Frames
from .processors import VidkernAttnProcessor


def _five(hidden_states, layout):
    if hidden_states.dim() != 5:
        raise ValueError(f"hidden_states: shape {tuple(hidden_states.shape)}, expected 5 dimensions {layout}")
    return hidden_states.shape


def _wan_geometry(config, hidden_states, argument):
    _, _, frames, height, width = _five(hidden_states, "[B, C, F, H, W]")
    p_t, p_h, p_w = config.patch_size
    return frames // p_t, (height // p_h) * (width // p_w)


def _cogvideox_geometry(config, hidden_states, argument):
    _, frames, _, height, width = _five(hidden_states, "[B, F, C, H, W]")
    return frames // (config.patch_size_t or 1), (height // config.patch_size) * (width // config.patch_size)


def _hunyuan_geometry(config, hidden_states, argument):
    _, _, frames, height, width = _five(hidden_states, "[B, C, F, H, W]")
    return frames // config.patch_size_t, (height // config.patch_size) * (width // config.patch_size)


def _ltx_geometry(config, hidden_states, argument):
    frames, height, width = argument(4, "num_frames"), argument(5, "height"), argument(6, "width")
    length = hidden_states.shape[1]
    if frames is None or height is None or width is None:
        raise ValueError(
            f"num_frames, height, width: {frames}, {height}, {width}, expected the size of the latents; video_coords alone "
            "does not say which token belongs to which frame"
        )
    if frames * height * width != length:
        raise ValueError(f"num_frames, height, width: {frames} x {height} x {width}, expected a product of {length} tokens")
    return frames, height * width


@dataclass(frozen=True)
class Family:
    """One supported transformer class: where its self-attentions are, and how its forward arguments give frames and tokens.

    blocks: attribute names of block lists. attention: name of the self-attention in a block.
    geometry: (config, hidden_states, argument(position, name)) -> (frames, tokens per frame), both after patching.
    """

    blocks: tuple[str, ...]
    attention: str
    geometry: Callable


FAMILIES = {
    "WanTransformer3DModel": Family(("blocks",), "attn1", _wan_geometry),
    "CogVideoXTransformer3DModel": Family(("transformer_blocks",), "attn1", _cogvideox_geometry),
    "LTXVideoTransformer3DModel": Family(("transformer_blocks",), "attn1", _ltx_geometry),
    "HunyuanVideoTransformer3DModel": Family(("transformer_blocks", "single_transformer_blocks"), "attn", _hunyuan_geometry),
}


def family_of(transformer, names=tuple(FAMILIES)):
    """(class name, Family) of a diffusers transformer among ``names``.

    Raises:
        TypeError: it is of no such class.
    """
    diffusers = import_extra("diffusers", "running diffusers models on vidkern")
    for name in names:
        if isinstance(transformer, getattr(diffusers, name, ())):
            return name, FAMILIES[name]
    raise TypeError(
        f"transformer: {type(transformer).__name__}, expected {', '.join(names)} (not yet wrapped by torch.compile or peft)"
    )


class VidkernHandle:
    """What :func:`enable_vidkern` did to a transformer. ``remove()`` undoes it; as a context manager, at the end of the block.

    Attributes:
        transformer: the model.
        processors: dict of module name -> :class:`VidkernAttnProcessor`.
        frames: the :class:`Frames` that they share; ``frames.set`` is for running a block without its transformer.
    """

    def __init__(self, transformer, family, frames, modules, impl):
        self.transformer, self.family, self.frames = transformer, family, frames
        self.modules = modules
        self.processors = {name: VidkernAttnProcessor(m.processor, frames, impl=impl) for name, m in modules.items()}
        for name, module in modules.items():
            module.set_processor(self.processors[name])
        self._hook = transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, transformer, args, kwargs):
        for name, module in self.modules.items():
            if module.processor is not self.processors[name]:
                raise RuntimeError(
                    f"transformer: {name} now has {type(module.processor).__name__}, expected the VidkernAttnProcessor of "
                    "enable_vidkern; call remove(), change processors or fuse projections, then enable_vidkern again"
                )

        def argument(position, name):
            return args[position] if len(args) > position else kwargs.get(name)

        hidden_states = argument(0, "hidden_states")
        self.frames.set(*self.family.geometry(transformer.config, hidden_states, argument))

    def remove(self):
        """Put the stock processors back, where no other was set meanwhile. A second call does nothing."""
        self._hook.remove()
        for name, module in self.modules.items():
            if module.processor is self.processors[name]:
                module.set_processor(self.processors[name].stock)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()


def enable_vidkern(transformer, pattern="dense", *, views=1, only=None, impl=None):
    """Run the self-attention of a diffusers video transformer on vidkern, each frame seeing the frames that ``pattern`` shows.

    Weights, cross-attention and everything else stay as they are. The number of latent frames and the tokens per frame are
    read from each forward call, so that one call serves every resolution and length. Text tokens of joint attention
    (CogVideoX, HunyuanVideo) see everything and are seen by everything.

    Args:
        transformer: a WanTransformer3DModel, CogVideoXTransformer3DModel, LTXVideoTransformer3DModel or
            HunyuanVideoTransformer3DModel; LoRA adapters and fused projections are honoured.
        pattern: ``"dense"``: every frame sees every frame, the stock model; ``"grid"``: the cross of
            :func:`vidkern.grid_attention`; a mapping of its rules (``causal_time``, ``window_time``, ``window_view``,
            ``cyclic_view``, ``anchors``), e.g. ``dict(causal_time=True, window_time=2)``; a FramePattern of all latent
            frames; or a callable that is given their number and returns one.
        views: V, when V videos of T frames are stacked along the frame axis, view after view.
        only: callable on a module name ("blocks.3.attn1") that says which self-attentions to change; None: all.
        impl: backend by name, as in :func:`vidkern.grid_attention`.

    Returns:
        a :class:`VidkernHandle`; its ``remove()`` restores the stock processors.

    Raises:
        MissingExtra: diffusers is not installed.
        TypeError: another class of transformer, processor or pattern.
        ValueError: a pattern rule, ``views``, the head width or ``only`` that does not fit. In the forward pass: frames that
            do not divide into views or do not fit the pattern, or an attention mask that a pattern cannot express.
    """
    _, family = family_of(transformer)
    frames = Frames(pattern, views)
    dim = transformer.config.attention_head_dim
    if dim % 8 or dim > MAX_DIM:
        raise ValueError(f"transformer: attention_head_dim {dim}, expected a multiple of 8 up to {MAX_DIM}")
    found = {
        f"{blocks}.{i}.{family.attention}": getattr(block, family.attention)
        for blocks in family.blocks
        for i, block in enumerate(getattr(transformer, blocks))
    }
    modules = {name: module for name, module in found.items() if only is None or only(name)}
    if not modules:
        raise ValueError(f"only: chose none of {', '.join(found)}, expected at least one")
    return VidkernHandle(transformer, family, frames, modules, impl)
