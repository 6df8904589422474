"""attention_mass and attention_entropy against the dense softmax that they summarise."""

import math

import pytest
import torch

import vidkern
from vidkern import FramePattern, GridPattern

RULES = {
    "grid": (GridPattern(2, 3), {}),
    "causal windows": (GridPattern(2, 3, causal_time=True, window_time=1), {}),
    "text before": (GridPattern(2, 3), {"n_text": 5, "text_len": torch.tensor([2, 5])}),
    "text after": (GridPattern(3, 2), {"n_text": 4, "text_position": "back"}),
    "dead frame and short frames": (
        GridPattern(2, 3),
        {"valid": torch.tensor([[True, True, False], [True, True, True]]), "kv_len": torch.tensor([[3, 7, 7], [0, 2, 7]])},
    ),
    "more columns than dims": (11, {"n_text": 3}),
}
BATCH, HEADS, KV_HEADS, DIM, FRAME = 2, 4, 2, 8, 7


def inputs(pattern, n_text=0, dtype=torch.float64, layout="bhld", seed=0, **rest):
    frames = pattern if isinstance(pattern, int) else pattern.n_frames
    g = torch.Generator().manual_seed(seed)
    length = n_text + frames * FRAME
    q, k = (torch.randn(BATCH, h, length, DIM, generator=g, dtype=torch.float64).to(dtype) * 1.5 for h in (HEADS, KV_HEADS))
    if layout == "blhd":
        q, k = (t.transpose(1, 2).contiguous() for t in (q, k))
    return q, k


def dense(q, k, pattern, valid=None, kv_len=None, n_text=0, text_position="front", text_len=None, scale=None):
    """Weights [B, H, L, L] with every rule written out, and the column of every token."""
    if isinstance(pattern, int):
        pattern = FramePattern.from_mask(torch.ones(pattern, pattern, dtype=torch.bool))
    frames, length = pattern.n_frames, q.shape[2]
    video = torch.arange(length) - (n_text if text_position == "front" else 0)
    is_text = (video < 0) | (video >= frames * FRAME)
    frame, token = video.clamp(0, frames * FRAME - 1) // FRAME, video.clamp(0, frames * FRAME - 1) % FRAME
    seen = torch.from_numpy(pattern.frame_mask().copy())[frame][:, frame] | is_text[:, None] | is_text
    seen = seen.expand(len(q), -1, -1).clone()
    if valid is not None:
        dead = (~valid.flatten()[frame]) & ~is_text
        seen &= ~dead & ~dead[:, None]
    if kv_len is not None:
        seen &= (token < kv_len.flatten()[frame]) | is_text
    if text_len is not None:
        first = 0 if text_position == "front" else frames * FRAME
        seen &= (torch.arange(length) - first < text_len[:, None, None]) | ~is_text
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    weights = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.where(seen[:, None].any(-1, keepdim=True), weights, 0.0), torch.where(is_text, frames, frame)


def summed(weights, column, columns):
    return torch.stack([weights[..., column == c].sum(-1) for c in range(columns)], -1)


def entropy(weights):
    return -torch.special.xlogy(weights, weights).sum(-1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_they_summarise_the_softmax(name, layout):
    pattern, rules = RULES[name]
    q, k = inputs(pattern, layout=layout, **rules)
    heads_first = (q, k) if layout == "bhld" else (q.transpose(1, 2), k.transpose(1, 2))
    weights, column = dense(*heads_first, pattern, **rules)
    columns = int(column.max()) + 1
    mass = vidkern.attention_mass(q, k, pattern, per="token", layout=layout, **rules)
    torch.testing.assert_close(mass, summed(weights, column, columns))
    found = vidkern.attention_entropy(q, k, pattern, layout=layout, **rules)
    torch.testing.assert_close(found, entropy(weights), atol=1e-12, rtol=1e-10)
    alive = weights.sum(-1) > 0
    frames = vidkern.attention_mass(q, k, pattern, layout=layout, **rules)
    for row in range(columns):
        at = column == row
        expected = (mass[:, :, at]).sum(2) / alive[:, :, at].sum(2).clamp(min=1)[..., None]
        torch.testing.assert_close(frames[:, :, row], expected)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_the_compiled_backend(dtype, within):
    """Weights to the output's rounding; entropies to that of the expected key, in units of the largest logit."""
    pattern, rules = RULES["text before"]
    q, k = inputs(pattern, dtype=dtype, **rules)
    weights, column = dense(q.double(), k.double(), pattern, **rules)
    mass = vidkern.attention_mass(q, k, pattern, per="token", impl="cpu", **rules)
    assert mass.dtype is dtype
    assert (mass.double() - summed(weights, column, 7)).abs().max() < within
    found = vidkern.attention_entropy(q, k, pattern, impl="cpu", **rules)
    largest = (q.double() @ k.double().repeat_interleave(2, 1).mT).abs().max() * DIM**-0.5
    assert found.dtype is torch.float32
    assert (found.double() - entropy(weights)).abs().max() < within * largest


def test_gradients():
    pattern, rules = RULES["causal windows"]
    pattern = GridPattern(1, 3, causal_time=True)
    q, k = (t[:1, :2].detach().requires_grad_() for t in inputs(pattern, **rules))

    def whole(q, k):
        mass = vidkern.attention_mass(q, k, pattern)
        return mass, vidkern.attention_entropy(q, k, pattern)

    assert torch.autograd.gradcheck(whole, (q, k))


def test_extremes():
    """ln n for equal keys; 0 and a whole frame for a query that one key answers, also where rounding would make it negative."""
    q = torch.randn(1, 1, 4 * FRAME, DIM)
    same = torch.randn(DIM).expand(1, 1, 4 * FRAME, DIM)
    torch.testing.assert_close(vidkern.attention_entropy(q, same, 4), torch.full((1, 1, 4 * FRAME), math.log(4 * FRAME)), atol=1e-5, rtol=0)
    torch.testing.assert_close(vidkern.attention_mass(q, same, 4), torch.full((1, 1, 4, 4), 0.25))
    k = torch.zeros(1, 1, 4 * FRAME, DIM)
    k[0, 0, 2 * FRAME + 3] = 100 * torch.ones(DIM)
    q = torch.ones(1, 1, 4 * FRAME, DIM)
    found = vidkern.attention_entropy(q, k, 4)
    assert (found >= 0).all() and found.max() < 1e-3
    torch.testing.assert_close(vidkern.attention_mass(q, k, 4)[0, 0, :, 2], torch.ones(4))


def test_hidden_values_do_not_leak():
    """A frame that no query may see holds NaN; its own queries, which see nothing, report zeros."""
    q, k = inputs(3)
    valid = torch.tensor([True, True, False])
    clean = vidkern.attention_mass(q, k, 3, valid=valid), vidkern.attention_entropy(q, k, 3, valid=valid)
    q[:, :, 2 * FRAME :], k[:, :, 2 * FRAME :] = math.nan, math.nan
    for before, after in zip(clean, (vidkern.attention_mass(q, k, 3, valid=valid), vidkern.attention_entropy(q, k, 3, valid=valid))):
        assert torch.equal(before, after)
    assert (clean[0][:, :, 2] == 0).all() and (clean[1][:, :, 2 * FRAME :] == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pattern": 0}, "pattern: 0 frames, expected at least 1"),
        ({"pattern": "grid"}, "pattern: str, expected a vidkern.FramePattern"),
        ({"pattern": 4}, "pattern: 4 frames of equal length cannot fill 21 video tokens"),
        ({"k": torch.randn(3, 8)}, "k: shape"),
        ({"n_text": 21}, "cannot fill 0 video tokens"),
        ({"layout": "ldhb"}, "layout: 'ldhb'"),
        ({"per": "head"}, "per: 'head', expected \"frame\" or \"token\""),
    ],
)
def test_bad_input(change, message):
    q, k = inputs(3)
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        vidkern.attention_mass(**{"q": q, "k": k, "pattern": 3, **change})
    if "per" not in change:
        with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
            vidkern.attention_entropy(**{"q": q, "k": k, "pattern": 3, **change})
