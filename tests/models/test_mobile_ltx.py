"""LTX-Video's transformer as a model to prune: the same function, and the two traps of head pruning on its own form."""

import dataclasses

import pytest
import torch

from vidkern.models.mobile_dit import Keep, MobileDiT, compact, from_ltx, masks_of

diffusers = pytest.importorskip("diffusers")
SCALE = (0.01, 0.02, 0.03)


@pytest.fixture
def ltx(generator):
    made = diffusers.LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, cross_attention_dim=48,
                                                   num_layers=2, caption_channels=8).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def inputs(generator):
    return torch.randn(2, 4, 3, 2, 5, generator=generator), torch.tensor([0.3, 0.9]), torch.randn(2, 4, 8, generator=generator)


def test_the_same_velocities(ltx, generator):
    z, sigma, text = inputs(generator)
    model = from_ltx(ltx, rope_scale=SCALE, group=16)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        wanted = ltx(z.flatten(2).transpose(1, 2), text, 1000 * sigma, mask.float(), num_frames=3, height=2, width=5, return_dict=False,
                     rope_interpolation_scale=tuple(s * base for s, base in zip(SCALE, (20, 2048, 2048))))[0]
        wanted = wanted.transpose(1, 2).unflatten(2, (3, 2, 5))
        torch.testing.assert_close(model(z, sigma, text, text_mask=mask), wanted, rtol=1e-4, atol=1e-4)
        other = MobileDiT(dataclasses.replace(model.config, rope_scale=(0.01, 0.03, 0.02)))
        other.load_state_dict(model.state_dict())
        assert (other(z, sigma, text, text_mask=mask) - wanted).abs().max() > 1e-3


def test_it_is_cut_as_it_is_masked(ltx, generator):
    model, batch = from_ltx(ltx, group=16), inputs(generator)
    keep = Keep((0, 1), {0: (2,), 1: (0, 2)}, {0: (0, 1)}, {1: (0, 5, 7)}, 16)
    with torch.no_grad():
        masked = model(*batch, masks=masks_of(keep, model.config))
        for packed in (False, True):
            torch.testing.assert_close(compact(model, keep, packed=packed)(*batch), masked, rtol=1e-4, atol=1e-5)
        assert (model(*batch) - masked).abs().max() > 1e-2


def test_other_forms_are_refused(ltx):
    for changes, message in (({"patch_size": 2}, "patch_size=2, patch_size_t=1: expected 1 and 1"),
                             ({"attention_bias": False}, "has affine norms or attentions without bias")):
        made = diffusers.LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16,
                                                       cross_attention_dim=48, num_layers=1, caption_channels=8, **changes)
        with pytest.raises(ValueError, match=message):
            from_ltx(made, group=16)
    with pytest.raises(ValueError, match="192 FFN channels; expected heads of at least 0 and a positive multiple of the group, 128"):
        from_ltx(ltx)
