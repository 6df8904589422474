"""The attention processor, and what each family of diffusers video transformers does around its attention.

Each function restates one stock processor of diffusers (tested with 0.42): projections, QK norms, rotary embedding, output
projections. Sequences stay [B, L, H, D]; the attention itself is one call of `vidkern.frame_sparse_attention`.
"""

import torch

from ...ops.grid_attention import frame_sparse_attention


def rotate(x, table):
    """Rotary embedding of the channel pairs (2i, 2i + 1) of x; table: (cos, sin) that broadcast to x, one value per channel."""
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin).type_as(x)


def per_token(table):
    """A (cos, sin) pair [L, D] shaped for [B, L, H, D]."""
    return tuple(t[None, :, None] for t in table)


def normed(norm, x):
    """``norm(x)``; x where a module has no such norm."""
    return x if norm is None else norm(x)


def refuse_mask(mask):
    """ValueError for an attention mask: patterns take its place."""
    if mask is not None:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, expected None; say which frame sees which with pattern="
        )


def project_out(layers, x):
    """Linear, then dropout."""
    return layers[1](layers[0](x))


def qkv(attn, x, fused):
    """Query, key, value [B, L, H * D], from the fused projection where diffusers' own processor would use it."""
    return attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))


def wan(processor, attn, x, text, mask, rope):
    """Wan self-attention: video only, QK norm across heads, then RoPE per head with tables [1, L, 1, D]."""
    if text is not None:
        raise ValueError(f"encoder_hidden_states: shape {tuple(text.shape)}, expected None; cross-attention stays stock")
    refuse_mask(mask)
    q, k, v = qkv(attn, x, attn.fused_projections)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k), v))
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return project_out(attn.to_out, processor.attend(q, k, v))


def ltx(processor, attn, x, text, mask, rope):
    """LTX self-attention: video only, QK norm and RoPE both across heads, tables [B, L, H * D]."""
    if text is not None:
        raise ValueError(f"encoder_hidden_states: shape {tuple(text.shape)}, expected None; cross-attention stays stock")
    refuse_mask(mask)
    q, k, v = qkv(attn, x, False)
    q, k = attn.norm_q(q), attn.norm_k(k)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return project_out(attn.to_out, processor.attend(*(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))))


def cogvideox(processor, attn, x, text, mask, rope):
    """CogVideoX joint attention: text in front, QK norm per head, RoPE on the video tokens alone; returns (video, text)."""
    refuse_mask(mask)
    n_text = text.shape[1]
    q, k, v = qkv(attn, torch.cat((text, x), 1), processor.fused)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
    q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
    if rope is not None:
        table = per_token(rope)
        q, k = (torch.cat((t[:, :n_text], rotate(t[:, n_text:], table)), 1) for t in (q, k))
    out = project_out(attn.to_out, processor.attend(q, k, v, n_text=n_text))
    return out[:, n_text:], out[:, :n_text]


def hunyuan(processor, attn, x, text, mask, rope):
    """HunyuanVideo joint attention: text behind; dual-stream blocks have projections of their own for it; returns (video, text)."""
    n_video, n_text = x.shape[1], text.shape[1]
    single = attn.add_q_proj is None
    q, k, v = (
        t.unflatten(-1, (attn.heads, -1)) for t in qkv(attn, torch.cat((x, text), 1) if single else x, False)
    )
    q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
    if rope is not None:
        table = per_token(rope)
        q, k = (torch.cat((rotate(t[:, :n_video], table), t[:, n_video:]), 1) for t in (q, k))
    if not single:
        added = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        text_q, text_k, text_v = (t.unflatten(-1, (attn.heads, -1)) for t in added)
        text_q, text_k = normed(attn.norm_added_q, text_q), normed(attn.norm_added_k, text_k)
        q, k, v = torch.cat((q, text_q), 1), torch.cat((k, text_k), 1), torch.cat((v, text_v), 1)
    text_len = processor.frames.text_len(mask, n_video, n_text)
    out = processor.attend(q, k, v, n_text=n_text, text_position="back", text_len=text_len)
    video, text = out[:, :n_video], out[:, n_video:]
    if attn.to_out is not None:
        video = project_out(attn.to_out, video)
    if attn.to_add_out is not None:
        text = attn.to_add_out(text)
    return video, text


REPLACES = {
    "WanAttnProcessor": wan,
    "LTXVideoAttnProcessor": ltx,
    "CogVideoXAttnProcessor2_0": cogvideox,
    "FusedCogVideoXAttnProcessor2_0": cogvideox,
    "HunyuanVideoAttnProcessor2_0": hunyuan,
}


class VidkernAttnProcessor:
    """Self-attention of one diffusers module on `vidkern.frame_sparse_attention`, in the place of ``stock``.

    :func:`enable_vidkern` makes them for a whole transformer. By hand: ``attn.set_processor(VidkernAttnProcessor(attn.processor,
    frames))``, with ``frames.set(frames, tokens)`` before each forward pass.

    Args:
        stock: the diffusers processor to replace; its class says what surrounds the attention.
        frames: the :class:`Frames` of the model.
        impl: backend by name, as in :func:`vidkern.grid_attention`.

    Raises:
        TypeError: no replacement for ``stock`` is known, or it is a VidkernAttnProcessor already.
        ValueError: diffusers' context parallelism is on.
    """

    def __init__(self, stock, frames, *, impl=None):
        name = type(stock).__name__
        if isinstance(stock, VidkernAttnProcessor):
            raise TypeError("processor: VidkernAttnProcessor, expected a stock one: vidkern is enabled already, remove() that first")
        if name not in REPLACES:
            raise TypeError(f"processor: {name}, expected one of {', '.join(REPLACES)}")
        if getattr(stock, "_parallel_config", None) is not None:
            raise ValueError("transformer: context parallelism is on, expected a model without it (frames must stay whole)")
        self.stock, self.frames, self.impl = stock, frames, impl
        self.fused = name.startswith("Fused")
        self._around = REPLACES[name]

    def attend(self, q, k, v, *, n_text=0, text_position="front", text_len=None):
        """Attention over q, k, v [B, L, H, D] with ``n_text`` of the tokens text; returns [B, L, H * D]."""
        frames = self.frames
        frames.check_length(q.shape[1] - n_text)
        out = frame_sparse_attention(
            q, k, v, frames.pattern, layout="blhd", n_text=n_text, text_position=text_position, text_len=text_len,
            impl=self.impl,
        )
        return out.flatten(2).type_as(q)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self._around(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
