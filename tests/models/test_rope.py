"""Rotary embedding against its definition, and the collapsed view/time positions (4Real-Video-V2, spec properties 8)."""

import cmath

import pytest
import torch

from vidkern.models.shared.rope import RotaryEmbedding, apply_rope, collapsed_time, split_head_dim


def test_against_complex_numbers():
    axes, theta, L, D = (8, 4, 4), 100.0, 5, 16
    positions = tuple(torch.rand(L) * 7 for _ in axes)
    x = torch.randn(2, L, 3, D, dtype=torch.float64)
    got = apply_rope(x, RotaryEmbedding(axes, theta)(positions))
    for token in range(L):
        turns = [cmath.exp(1j * positions[a][token].item() * theta ** (-2 * j / width)) for a, width in enumerate(axes) for j in range(width // 2)]
        z = torch.complex(x[:, token, :, : D // 2], x[:, token, :, D // 2 :]) * torch.tensor(turns, dtype=torch.complex128)
        torch.testing.assert_close(got[:, token], torch.cat((z.real, z.imag), -1), rtol=0, atol=2e-6)


def test_logits_depend_on_relative_positions_alone():
    t_max, rope = 16, RotaryEmbedding((16,))
    position = collapsed_time(3, 4, t_max)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 12, 1, 16)
    table = rope((position,))
    logits = (apply_rope(q, table)[0, :, 0] @ apply_rope(k, table)[0, :, 0].T).view(3, 4, 3, 4)
    same_view = torch.stack([logits[v, :, v, :] for v in range(3)])
    assert (same_view - same_view[0]).abs().max() < 1e-5  # not on the view
    assert (same_view[0, 1:, 1:] - same_view[0, :-1, :-1]).abs().max() < 1e-5  # on t - t' alone
    same_time = torch.stack([logits[:, t, :, t] for t in range(4)])
    assert (same_time - same_time[0]).abs().max() < 1e-5
    shifted = apply_rope(q[:, :2], rope((torch.tensor([0.0, float(t_max)]),)))[0, :, 0]
    keyed = apply_rope(k[:, :2], rope((torch.tensor([0.0, float(t_max)]),)))[0, :, 0]
    assert abs(same_time[0, 0, 1] - shifted[0] @ keyed[1]) < 1e-5  # a view step is t_max time steps


def test_positions_that_would_collide_are_refused():
    assert collapsed_time(2, 4, 4).unique().numel() == 8
    with pytest.raises(ValueError, match="T=5 is greater than t_max=4"):
        collapsed_time(2, 5, 4)


def test_axis_shares():
    assert split_head_dim(64) == (32, 16, 16) and split_head_dim(16) == (8, 4, 4) and split_head_dim(40, 1) == (40,)
    assert all(sum(split_head_dim(d)) == d for d in range(6, 130, 2))
    with pytest.raises(ValueError, match="head_dim=4"):
        split_head_dim(4)
    with pytest.raises(ValueError, match="2 axes, expected 3"):
        RotaryEmbedding((4, 4, 4))((torch.zeros(1),) * 2)


def test_batched_positions_and_low_precision():
    rope = RotaryEmbedding((8,))
    position = torch.rand(2, 3) * 5
    x = torch.randn(2, 3, 1, 8)
    both = apply_rope(x, rope((position,)))
    for b in range(2):
        assert torch.equal(both[b : b + 1], apply_rope(x[b : b + 1], rope((position[b],))))
    assert apply_rope(x.bfloat16(), rope((position,))).dtype == torch.bfloat16
