"""4Real-Video-V2 on diffusers base models: no new parameter, V = 1 is the base, V > 1 is the masked stock model at its positions."""

import copy

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed

from vidkern import GridPattern
from vidkern.integrations.diffusers import VidkernAttnProcessor, four_real_from_diffusers

V, T, T_MAX = 2, 3, 5
BASES = ["wan", "cogvideox-2b", "cogvideox-5b"]


def grids(name, tiny, views=V, times=T, t_max=T_MAX, **kwargs):
    """(stock base, 4D model of the same weights, latents [B, V, T, C, H, W], other inputs)."""
    base, inputs = tiny(name, frames=times, **kwargs)
    inputs.pop("hidden_states")
    latents = torch.randn(2, views, times, base.config.in_channels, 4, 6, generator=torch.Generator().manual_seed(3))
    return base, four_real_from_diffusers(copy.deepcopy(base), t_max=t_max), latents, inputs


def stacked(name, latents):
    return latents.permute(0, 3, 1, 2, 4, 5).flatten(2, 3) if name.startswith("wan") else latents.flatten(1, 2)


def unstacked(name, out, views):
    return out.unflatten(2, (views, -1)).permute(0, 2, 3, 1, 4, 5) if name.startswith("wan") else out.unflatten(1, (views, -1))


class SelectedRope(torch.nn.Module):
    """Wan's RoPE at given positions in time."""

    def __init__(self, rope, positions):
        super().__init__()
        self.rope, self.positions = rope, positions

    def forward(self, x):
        sizes = [self.rope.t_dim, self.rope.h_dim, self.rope.w_dim]
        height, width = x.shape[3] // 2, x.shape[4] // 2
        shape = (len(self.positions), height, width, -1)

        def table(freqs):
            t, h, w = freqs.split(sizes, 1)
            parts = t[self.positions][:, None, None], h[:height][None, :, None], w[:width][None, None]
            return torch.cat([p.expand(shape) for p in parts], -1).flatten(0, 2)[None, :, None]

        return table(self.rope.freqs_cos), table(self.rope.freqs_sin)


class SelectedPatchEmbed(torch.nn.Module):
    """CogVideoX's patch embedding with sinusoidal positions at given times."""

    def __init__(self, embed, positions):
        super().__init__()
        self.embed, self.positions = embed, positions

    def forward(self, text, latents):
        self.embed.use_positional_embeddings = False
        tokens = self.embed(text, latents)
        table = get_3d_sincos_pos_embed(self.embed.embed_dim, (3, 2), int(self.positions.max()) + 1, 1.875, 1.0)
        position = table[self.positions].flatten(0, 1).to(tokens.dtype)
        n_text = text.shape[1]
        return torch.cat((tokens[:, :n_text], tokens[:, n_text:] + position), 1)


def oracle(name, base, latents, inputs, t_max, masked, patch_t=1):
    """The stock model on the stacked views under the cross mask, at positions view * t_max + time."""
    views, times = latents.shape[1], latents.shape[2] // patch_t
    model, inputs = copy.deepcopy(base), dict(inputs)
    positions = (torch.arange(views)[:, None] * (t_max // patch_t) + torch.arange(times)).flatten()
    n_text = 0 if name.startswith("wan") else 5
    mask = GridPattern(views, times).bool_mask(6, n_text=n_text)
    for block in model.blocks if name.startswith("wan") else model.transformer_blocks:
        masked(block.attn1, mask)
    if name.startswith("wan"):
        model.rope = SelectedRope(model.rope, positions)
    elif "image_rotary_emb" in inputs:
        longest = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), views * t_max // patch_t)
        inputs["image_rotary_emb"] = tuple(t.unflatten(0, (-1, 6))[positions].flatten(0, 1) for t in longest)
    else:
        model.patch_embed = SelectedPatchEmbed(model.patch_embed, positions)
    return unstacked(name, model(stacked(name, latents), **inputs, return_dict=False)[0], views), model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", BASES)
def test_adds_no_parameter(name, tiny):
    base, model, _, _ = grids(name, tiny)
    assert {f"transformer.{k}" for k in base.state_dict()} == set(model.state_dict())
    assert sum(p.numel() for p in base.parameters()) == sum(p.numel() for p in model.parameters())
    model.transformer.load_state_dict(base.state_dict())


@pytest.mark.parametrize("name", [*BASES, "wan-i2v"])
def test_one_view_is_the_base_model(name, tiny):
    base, model, latents, inputs = grids(name, tiny, views=1)
    expected = base(stacked(name, latents), **inputs, return_dict=False)[0]
    out = model(latents, **inputs)
    assert out.shape == (*latents.shape[:3], 4, 4, 6)
    close(out, unstacked(name, expected, 1))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (unstacked(name, expected, 1) * weight).sum().backward()
    grads = {k: p.grad for k, p in base.named_parameters() if p.grad is not None}
    whole = max(g.abs().max() for g in grads.values())
    for key, grad in grads.items():
        error = (model.transformer.get_parameter(key).grad - grad).abs().max()
        assert error <= 2e-5 * grad.abs().max() + 1e-7 * whole, key


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("views, times, t_max", [(2, 3, 5), (3, 2, 2), (3, 1, 4)])
def test_more_views_are_the_masked_base_at_collapsed_positions(name, views, times, t_max, tiny, masked):
    base, model, latents, inputs = grids(name, tiny, views, times, t_max)
    expected, stock = oracle(name, base, latents, inputs, t_max, masked)
    out = model(latents, **inputs)
    close(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    mine = model.handle.modules
    for key in mine:
        for parameter, grad in zip(mine[key].parameters(), (p.grad for p in stock.get_submodule(key).parameters())):
            assert parameter.grad.abs().max() > 0
            assert (parameter.grad - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6


def test_cogvideox_1_5_with_patches_in_time(tiny, masked):
    base, inputs = tiny("cogvideox-5b", frames=2, patch_size_t=2)      # its tables are of two patched frames
    inputs.pop("hidden_states")
    model = four_real_from_diffusers(copy.deepcopy(base), t_max=6)
    latents = torch.randn(2, 2, 4, 4, 4, 6)
    expected, _ = oracle("cogvideox-5b", base, latents, inputs, 6, masked, patch_t=2)
    close(model(latents, **inputs), expected)
    with pytest.raises(ValueError, match="latents: 3 times, expected a multiple of the temporal patch size 2"):
        model(latents[:, :, :3], **inputs)
    assert four_real_from_diffusers(copy.deepcopy(base)).t_max == 4      # 13 pixel frames are 4 latents


def test_default_t_max(tiny):
    assert four_real_from_diffusers(tiny("wan")[0]).t_max == 21
    assert four_real_from_diffusers(tiny("cogvideox-5b", sample_frames=49)[0]).t_max == 13
    assert four_real_from_diffusers(tiny("cogvideox-5b", sample_frames=81, patch_size_t=2)[0]).t_max == 22


def test_views_of_one_time_are_not_a_video(tiny):
    """T = 1 is full attention over views: the base model on V frames, but only where t_max = 1 puts views next to each other."""
    base, model, latents, inputs = grids("wan", tiny, views=4, times=1, t_max=1)
    expected = unstacked("wan", base(stacked("wan", latents), **inputs, return_dict=False)[0], 4)
    close(model(latents, **inputs), expected)
    apart = four_real_from_diffusers(base, t_max=4)
    assert (apart(latents, **inputs) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_view_permutation_without_positions(tiny):
    """Without positions, views in another order give the same outputs in that order; with them they do not."""
    _, model, latents, inputs = grids("wan", tiny, views=3)
    order = [2, 0, 1]
    assert (model(latents[:, order], **inputs) - model(latents, **inputs)[:, order]).abs().max() > 1e-3
    rope = model.transformer.rope
    rope.freqs_cos.fill_(1)
    rope.freqs_sin.zero_()
    close(model(latents[:, order], **inputs), model(latents, **inputs)[:, order])


def test_one_block_sees_the_cross_and_nothing_else(tiny):
    _, model, latents, inputs = grids("wan", tiny, num_layers=1)
    latents.requires_grad_()
    model(latents, **inputs)[:, 1, 2].square().sum().backward()
    seen = latents.grad.abs().amax((0, 3, 4, 5)) > 0
    assert seen.tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.parametrize("name", BASES)
def test_gradient_checkpointing(name, tiny):
    _, model, latents, inputs = grids(name, tiny)
    model.train_attention_only()

    def gradients():
        model.zero_grad()
        model(latents, **inputs).square().sum().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) == len(model.attention_parameters()) and all(".attn1." in k for k in plain)
    model.train()
    model.transformer.enable_gradient_checkpointing()
    again = gradients()
    for key, grad in plain.items():
        close(again[key], grad)


@pytest.mark.parametrize("name", BASES)
def test_the_base_by_itself_and_remove(name, tiny):
    base, model, latents, inputs = grids(name, tiny)
    model(latents, **inputs)
    one = stacked(name, latents[:, :1])
    expected = base(one, **inputs, return_dict=False)[0]
    close(model.transformer(one, **inputs, return_dict=False)[0], expected)
    model.remove()
    assert not any(isinstance(p, VidkernAttnProcessor) for p in model.transformer.attn_processors.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.transformer(one, **inputs, return_dict=False)[0], expected)


def test_condition_channels_of_an_image_to_video_base(tiny):
    _, model, latents, inputs = grids("wan-i2v", tiny)
    out = model(latents[:, :, :, :4], condition=latents[:, :, :, 4:], **inputs)
    assert torch.equal(out, model(latents, **inputs)) and out.shape == (2, V, T, 4, 4, 6)


def test_errors(tiny):
    _, model, latents, inputs = grids("wan", tiny)
    for bad, message in [
        (dict(latents=latents[0]), "latents: shape .* expected 6 dimensions .B, V, T, C, H, W."),
        (dict(latents=latents.repeat(1, 1, 2, 1, 1, 1)), "latents: 6 times, expected 1 to t_max = 5"),
        (dict(latents=latents.repeat(1, 7, 1, 1, 1, 1)), "latents: 14 views x t_max 5, expected at most 64 positions in time"),
        (dict(condition=latents), "latents: 4 channels and 4 of condition, expected the 4 input channels of the base model"),
        (dict(condition=latents[:, :1]), "condition: shape .* expected latents' .* up to channels"),
        (dict(image_rotary_emb=(1, 1)), "image_rotary_emb: given, expected None for this base model"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**({"latents": latents} | inputs | bad))
    _, model, latents, inputs = grids("cogvideox-5b", tiny)
    with pytest.raises(ValueError, match="image_rotary_emb: missing, expected the tables of one view for this base model"):
        model(latents, **{k: v for k, v in inputs.items() if k != "image_rotary_emb"})
    assert model.handle.frames.views == 1
    with pytest.raises(TypeError, match="transformer: LTXVideoTransformer3DModel, expected WanTransformer3DModel, CogVideoX"):
        four_real_from_diffusers(tiny("ltx")[0])
    for t_max in (0, True, 2.0):
        with pytest.raises(ValueError, match="t_max: .* expected a positive multiple of the temporal patch size 1"):
            four_real_from_diffusers(tiny("wan")[0], t_max=t_max)
    learned = tiny("cogvideox-5b", use_learned_positional_embeddings=True)[0]
    with pytest.raises(ValueError, match="transformer: learned positional embeddings, expected rotary or sinusoidal"):
        four_real_from_diffusers(learned)
    assert not learned._forward_pre_hooks
