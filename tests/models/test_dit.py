"""The shared video transformer."""

import dataclasses

import pytest
import torch

import vidkern
from vidkern.models.shared import Block, BlockSpec, DiTConfig, VideoDiT, patchify, unpatchify

SMALL = DiTConfig(channels=2, patch=2, dim=32, heads=2, blocks=(BlockSpec(),) * 2, t_max=8, freq_dim=16)


def test_patchify_order_and_inverse():
    x = torch.arange(2 * 2 * 3 * 2 * 4 * 6.0).view(2, 2, 3, 2, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 2 * 3 * 2 * 3, 8)
    v, t, y, xx = 1, 2, 1, 2
    token = ((v * 3 + t) * 2 + y) * 3 + xx
    assert torch.equal(tokens[1, token].view(2, 2, 2), x[1, v, t, :, 2:4, 4:6])
    assert torch.equal(unpatchify(tokens, 2, x.shape), x)
    with pytest.raises(ValueError, match="5x6: expected multiples of the patch size 2"):
        patchify(torch.zeros(1, 1, 1, 1, 5, 6), 2)


def test_starts_as_zero_and_blocks_as_identity():
    dit = VideoDiT(SMALL)
    x = torch.randn(1, 2, 3, 2, 4, 4)
    out, taps = dit(x, torch.tensor([0.5]), capture=("0.hidden", "1.hidden"))
    assert out.shape == x.shape and not out.any()
    torch.testing.assert_close(taps["0.hidden"], taps["1.hidden"])


def test_taps_and_early_stop(randomise):
    dit = randomise(VideoDiT(SMALL))
    x, sigma = torch.randn(1, 2, 3, 2, 4, 4), torch.tensor([0.5])
    out, taps = dit(x, sigma, capture=["0.q", "1.k", "1.hidden"])
    assert torch.equal(out, dit(x, sigma)) and taps["0.q"].shape == taps["1.k"].shape == (1, 24, 2, 16)
    nothing, early = dit(x, sigma, capture=["0.q"], stop_after=0)
    assert nothing is None and torch.equal(early["0.q"], taps["0.q"])
    with pytest.raises(ValueError, match=r"capture=\['1.q'\]"):
        dit(x, sigma, capture=["1.q"], stop_after=0)


@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
def test_patterns_agree_where_they_must(randomise, qk_norm):
    config = dataclasses.replace(SMALL, qk_norm=qk_norm)
    x, sigma = torch.randn(2, 2, 3, 2, 4, 4), torch.tensor([0.2, 0.8])
    everything = vidkern.FramePattern.from_mask(torch.ones(6, 6, dtype=torch.bool))
    outs = [randomise(VideoDiT(config.with_attention(p)))(x, sigma) for p in ("full", "sdpa", everything, "grid")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-5)
    assert (outs[0] - outs[3]).abs().max() > 1e-3  # the fused pattern sees less


def test_dead_frames_do_not_speak(randomise):
    dit = randomise(VideoDiT(SMALL))
    x, valid = torch.randn(1, 2, 2, 2, 4, 4), torch.tensor([[[True, False], [True, True]]])
    other = x.clone()
    other[:, 0, 1] = 9.0
    a, b = (dit(grid, torch.tensor([0.3]), valid=valid) for grid in (x, other))
    assert torch.equal(a[:, 1], b[:, 1]) and torch.equal(a[:, 0, 0], b[:, 0, 0])


def test_text_is_read(randomise):
    config = dataclasses.replace(SMALL, blocks=(BlockSpec(cross=True),), text_dim=6)
    dit, x, sigma = randomise(VideoDiT(config)), torch.randn(1, 1, 2, 2, 4, 4), torch.tensor([0.3])
    text, mask = torch.randn(1, 5, 6), torch.tensor([[True, True, True, False, False]])
    a = dit(x, sigma, text=text, text_mask=mask)
    changed = text.clone()
    changed[:, 3:] = 7.0
    assert torch.equal(a, dit(x, sigma, text=changed, text_mask=mask))
    changed[:, 0] = 7.0
    assert not torch.equal(a, dit(x, sigma, text=changed, text_mask=mask))


def test_one_block_compiles_into_one_graph(randomise):
    torch._dynamo.reset()
    block = randomise(Block(SMALL, BlockSpec()))
    dit = VideoDiT(SMALL)
    table = dit.rope(dit.positions(2, 3, 2, 2))
    x, condition = torch.randn(1, 24, 32, requires_grad=True), torch.randn(1, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition, table, (2, 3)), block(x, condition, table, (2, 3)))
    compiled(x, condition, table, (2, 3)).sum().backward()
    assert x.grad.isfinite().all()


def test_bf16_autocast_is_close_to_fp32(randomise):
    dit = randomise(VideoDiT(SMALL), spread=0.05)
    x, sigma = torch.randn(1, 2, 2, 2, 4, 4), torch.tensor([0.5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = dit(x, sigma)
    high = dit(x, sigma)
    assert (low.float() - high).abs().max() < 0.05 * high.abs().max()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="pattern='dense'"):
        VideoDiT(SMALL.with_attention("dense"))(torch.zeros(1, 1, 1, 2, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="qk_norm='layer'"):
        VideoDiT(dataclasses.replace(SMALL, qk_norm="layer"))
    with pytest.raises(ValueError, match="dim=36, heads=3"):
        VideoDiT(dataclasses.replace(SMALL, dim=36, heads=3))
