"""Tiny randomly initialised diffusers transformers and inputs for them; nothing is downloaded."""

import os
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

FRAMES, HEIGHT, WIDTH, BATCH = 4, 4, 6, 2
WAN = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32,
           num_layers=2, rope_max_seq_len=64)
COG = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
           num_layers=2, sample_width=WIDTH, sample_height=HEIGHT, sample_frames=13, max_text_seq_length=5)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan(frames=FRAMES, height=HEIGHT, width=WIDTH, **config):
    model = diffusers.WanTransformer3DModel(**{**WAN, **config})
    channels = model.config.in_channels
    inputs = dict(hidden_states=randn(BATCH, channels, frames, height, width), timestep=torch.tensor([100, 700]),
                  encoder_hidden_states=randn(BATCH, 512 if model.config.added_kv_proj_dim else 7, 12))
    if model.config.image_dim:
        inputs["encoder_hidden_states_image"] = randn(BATCH, 5, model.config.image_dim)
    return model, inputs


def wan_i2v(**kwargs):
    return wan(in_channels=9, image_dim=12, added_kv_proj_dim=32, **kwargs)


def cogvideox_2b(frames=FRAMES, height=HEIGHT, width=WIDTH, **config):
    model = diffusers.CogVideoXTransformer3DModel(**{**COG, **config})
    inputs = dict(hidden_states=randn(BATCH, frames, 4, height, width), timestep=torch.tensor([100, 700]),
                  encoder_hidden_states=randn(BATCH, 5, 12))
    return model, inputs


def rotary(frames, height, width):
    """As CogVideoXPipeline makes it at the model's own resolution, patch size 2."""
    return get_3d_rotary_pos_embed(16, ((0, 0), (height // 2, width // 2)), (height // 2, width // 2), frames)


def cogvideox_5b(frames=FRAMES, height=HEIGHT, width=WIDTH, **config):
    model, inputs = cogvideox_2b(frames, height, width, use_rotary_positional_embeddings=True, **config)
    return model, inputs | dict(image_rotary_emb=rotary(frames, height, width))


def ltx(frames=FRAMES, height=HEIGHT, width=WIDTH):
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2,
        caption_channels=12,
    )
    mask = torch.ones(BATCH, 7)
    mask[1, 4:] = 0
    inputs = dict(hidden_states=randn(BATCH, frames * height * width, 4), encoder_hidden_states=randn(BATCH, 7, 12),
                  timestep=torch.tensor([100, 700]), encoder_attention_mask=mask, num_frames=frames, height=height, width=width,
                  rope_interpolation_scale=(0.32, 32.0, 32.0))
    return model, inputs


def hunyuan(frames=FRAMES, height=HEIGHT, width=WIDTH, **config):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=False, **config,
    )
    mask = torch.ones(BATCH, 5, dtype=torch.long)
    mask[1, 3:] = 0
    inputs = dict(hidden_states=randn(BATCH, 4, frames, height, width), timestep=torch.tensor([100, 700]),
                  encoder_hidden_states=randn(BATCH, 5, 12), encoder_attention_mask=mask, pooled_projections=randn(BATCH, 8))
    return model, inputs


MODELS = {"wan": wan, "wan-i2v": wan_i2v, "cogvideox-2b": cogvideox_2b, "cogvideox-5b": cogvideox_5b, "ltx": ltx, "hunyuan": hunyuan}


class Masked:
    """A stock processor whose attention also gets ``mask``."""

    def __init__(self, stock, mask):
        self.stock, self.mask = stock, mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        attend = torch.nn.functional.scaled_dot_product_attention

        def masked(query, key, value, attn_mask=None, **kwargs):
            return attend(query, key, value, attn_mask=self.mask if attn_mask is None else self.mask & attn_mask, **kwargs)

        with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


@pytest.fixture
def masked():
    """``masked(module, mask)``: give an attention module's stock processor a boolean mask."""
    return lambda module, mask: module.set_processor(Masked(module.processor, mask))


@pytest.fixture
def tiny():
    """``tiny(name, **kwargs)`` -> (transformer, forward keyword arguments)."""
    def make(name, **kwargs):
        torch.manual_seed(0)
        model, inputs = MODELS[name](**kwargs)
        with torch.no_grad():
            for parameter in model.parameters():     # norms and gates of their own, so that a lost one is seen
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval(), inputs

    return make


@pytest.fixture
def run():
    """``run(model, inputs)`` -> output tensor, in whatever dtype the model has."""
    def call(model, inputs):
        dtype = next(model.parameters()).dtype

        def cast(value):
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return model(**{name: cast(value) for name, value in inputs.items()}, return_dict=False)[0]

    return call
