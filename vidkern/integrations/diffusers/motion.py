"""Motion guidance (`vidkern.models.ditflow`) for diffusers transformers: CogVideoX (2B, 5B, 1.5) and Wan.

The transformer's own forward runs. Processors of its self-attentions show queries and keys after norms and rotary embedding, take injected
values and optimised tables, and end the pass where nothing more is needed. A pass for which nothing is asked goes to the stock processor.
"""

import contextlib

import torch
import torch.nn.functional as F

from ...models.ditflow.adapter import Adapter
from ...models.ditflow.taps import Taps
from .enable import family_of
from .processors import normed, per_token, project_out, qkv, refuse_mask, rotate

SUPPORTED = ("CogVideoXTransformer3DModel", "WanTransformer3DModel")


def _cogvideox(processor, attn, x, text, mask, rope):
    """CogVideoX joint attention, text in front, with tables of their own for queries and keys."""
    refuse_mask(mask)
    n_text = text.shape[1]
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in qkv(attn, torch.cat((text, x), 1), processor.fused))
    q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
    if rope is not None:
        q, k = (torch.cat((t[:, :n_text], rotate(t[:, n_text:], per_token(table))), 1) for t, table in zip((q, k), processor.tables(rope)))
    k, v = processor.taps.attention(processor.block, q, k, v, n_text)
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    out = project_out(attn.to_out, out)
    return out[:, n_text:], out[:, :n_text]


def _wan(processor, attn, x, text, mask, rope):
    """Wan self-attention: video tokens alone; the attention itself by diffusers' backend of this processor."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    refuse_mask(mask)
    q, k, v = qkv(attn, x, attn.fused_projections)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k), v))
    if rope is not None:
        q, k = (rotate(t, tuple(part if part.ndim == 4 else part[None, :, None] for part in table)) for t, table in zip((q, k), processor.tables(rope)))
    k, v = processor.taps.attention(processor.block, q, k, v)
    out = dispatch_attention_fn(q, k, v, backend=processor.stock._attention_backend)
    return project_out(attn.to_out, out.flatten(2).type_as(q))


REPLACES = {"CogVideoXAttnProcessor2_0": _cogvideox, "FusedCogVideoXAttnProcessor2_0": _cogvideox, "WanAttnProcessor": _wan}


class MotionAttnProcessor:
    """Self-attention of block number `block` whose queries, keys and values pass by `taps`; `stock` where nothing is asked of it.

    Raises:
        TypeError: `stock` is none of the processors that can be replaced; `remove()` whatever put it there first.
        ValueError: diffusers' context parallelism is on.
    """

    def __init__(self, stock, taps: Taps, block: int):
        name = type(stock).__name__
        if name not in REPLACES:
            raise TypeError(f"processor: {name}, expected a stock one, {' or '.join(REPLACES)}; remove() vidkern's or other processors first")
        if getattr(stock, "_parallel_config", None) is not None:
            raise ValueError("transformer: context parallelism is on, expected a model without it (frames must stay whole)")
        self.stock, self.taps, self.block, self.fused = stock, taps, block, name.startswith("Fused")
        self._around = REPLACES[name]

    def tables(self, rope):
        """(cos, sin) for queries and for keys: the optimised ones, or the model's for both."""
        moved = self.taps.positions
        return (rope, rope) if moved is None else tuple(tuple(part.to(rope[0].device) for part in pair) for pair in moved)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs):
        taps = self.taps
        if taps.positions is None and self.block not in taps.wanted and self.block not in taps.values:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        return self._around(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class DiffusersAdapter(Adapter):
    """Base of the adapters of diffusers transformers; made by :func:`motion_adapter`, undone by `remove`.

    A condition is the dict of the forward pass's arguments besides latents and time, for one video: ``encoder_hidden_states``, and for CogVideoX
    with rotary positions ``image_rotary_emb``. t is a timestep of the scheduler.
    """

    def __init__(self, transformer, family):
        super().__init__(transformer, len(getattr(transformer, family.blocks[0])))
        self.family, self.blocks = family, list(getattr(transformer, family.blocks[0]))
        self.modules = [getattr(block, family.attention) for block in self.blocks]
        self.processors = [MotionAttnProcessor(module.processor, self.taps, i) for i, module in enumerate(self.modules)]
        for module, processor in zip(self.modules, self.processors):
            module.set_processor(processor)
        self._hooks = [block.register_forward_hook(self._after(i)) for i, block in enumerate(self.blocks)]

    @property
    def dtype(self):
        """diffusers' own word for it: the first parameters may be among those that it keeps in fp32."""
        return self.model.dtype

    def _after(self, index):
        def hook(block, args, output):
            self.taps.output(index, output[0] if isinstance(output, tuple) else output)

        return hook

    def grid(self, z):
        if z.dim() != 5:
            raise ValueError(f"latents: shape {tuple(z.shape)}, expected 5 dimensions, as the transformer takes them")
        config = self.model.config
        frames, tokens = self.family.geometry(config, z, None)
        rows = z.shape[-2] // (config.patch_size if isinstance(config.patch_size, int) else config.patch_size[1])
        return frames, rows, tokens // rows

    def forward(self, z, t, condition):
        t = torch.as_tensor(t, device=z.device).reshape(1).expand(len(z))
        given = {name: value.to(z.dtype) if name == "encoder_hidden_states" else value for name, value in condition.items()}
        return self.model(hidden_states=z, timestep=t, return_dict=False, **given)[0]

    @contextlib.contextmanager
    def recomputing(self):
        model, numbers = self.model, {block: i for i, block in enumerate(self.blocks)}
        before = model.gradient_checkpointing, getattr(model, "_gradient_checkpointing_func", None)
        model.gradient_checkpointing = True
        model._gradient_checkpointing_func = lambda block, *args: self.taps.run(numbers[block], block, *args)
        try:
            yield
        finally:
            model.gradient_checkpointing, function = before
            if function is None:
                del model._gradient_checkpointing_func
            else:
                model._gradient_checkpointing_func = function

    def remove(self):
        """Put the stock processors back, where no other was set meanwhile."""
        super().remove()
        for hook in self._hooks:
            hook.remove()
        for module, processor in zip(self.modules, self.processors):
            if module.processor is processor:
                module.set_processor(processor.stock)


class CogVideoXAdapter(DiffusersAdapter):
    """CogVideoX: latents [1, F, C, H, W], text in front; rotary positions (5B, 1.5) or a sinusoidal embedding (2B)."""

    def __init__(self, transformer, family):
        super().__init__(transformer, family)
        if not transformer.config.use_rotary_positional_embeddings:
            self.positional = "additive"
            self._hooks.append(transformer.patch_embed.register_forward_hook(self._move))

    def n_text(self, condition):
        return condition["encoder_hidden_states"].shape[1]

    def grid(self, z):
        p_t = self.model.config.patch_size_t or 1
        if z.dim() == 5 and z.shape[1] % p_t:
            raise ValueError(f"latents: {z.shape[1]} frames, expected a multiple of the temporal patch size {p_t}")
        return super().grid(z)

    def positions(self, z, condition):
        if self.positional == "rope":
            return torch.stack([part.float() for part in condition["image_rotary_emb"]]).expand(2, -1, -1, -1)
        return self._embedding(z.shape[1], *z.shape[-2:])

    def _embedding(self, frames, height, width):
        """What the patch embedding adds to the video tokens of a latent, [1, N, dim]."""
        embed = self.model.patch_embed
        count = (frames - 1) * embed.temporal_compression_ratio + 1
        whole = embed._get_positional_embeddings(height, width, count, device=embed.proj.weight.device)
        return whole[:, embed.max_text_seq_length :].float()

    def _move(self, embed, args, output):
        """The model adds its own embedding; the difference to the optimised one follows."""
        if self.taps.positions is None:
            return None
        text, latents = args
        own = self._embedding(latents.shape[1], *latents.shape[-2:])
        moved = (self.taps.positions - own).to(output.dtype)
        return output + F.pad(moved, (0, 0, text.shape[1], 0))

    def forward(self, z, t, condition):
        if self.model.config.use_rotary_positional_embeddings and condition.get("image_rotary_emb") is None:
            raise ValueError("condition: without image_rotary_emb, expected the tables that CogVideoXPipeline makes, for rotary positions")
        return super().forward(z, t, condition)


class WanAdapter(DiffusersAdapter):
    """Wan: latents [1, C, F, H, W], no text among the tokens, rotary positions."""

    def positions(self, z, condition):
        return torch.stack([part[0, :, 0].float() for part in self.model.rope(z)]).expand(2, -1, -1, -1)


ADAPTERS = {"CogVideoXTransformer3DModel": CogVideoXAdapter, "WanTransformer3DModel": WanAdapter}


def motion_adapter(transformer):
    """The adapter of a diffusers transformer for :class:`vidkern.models.ditflow.MotionGuidance`; ``remove()`` undoes it.

    Raises:
        MissingExtra: diffusers is not installed.
        TypeError: another class of transformer (the message lists those supported), or processors that are not the stock ones.
        ValueError: context parallelism.
    """
    name, family = family_of(transformer, SUPPORTED)
    return ADAPTERS[name](transformer, family)
