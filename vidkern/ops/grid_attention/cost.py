"""What grid attention costs, and the named sample inputs that tests and benches share.

FLOP rules (attention: 2 per multiply-add): forward 4 * B * Hq * D * (visible token pairs), backward 2.5 times that
(five matrix products instead of two). ``valid``, ``kv_len`` and ``text_len`` are not subtracted: they live on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .patterns import FramePattern, GridPattern


def visible_pairs(pattern: FramePattern, frame_len: int, n_text: int = 0) -> int:
    """Visible (query token, key token) pairs of one head of one sample."""
    pairs = pattern.pairs * frame_len * frame_len
    if n_text and pattern.text_visible:
        n_video = pattern.n_frames * frame_len
        pairs += n_text * (n_text + 2 * n_video)
    return pairs


def forward_flops(batch: int, heads: int, dim: int, pattern: FramePattern, frame_len: int, n_text: int = 0) -> int:
    """FLOPs of the forward: QK^T and PV."""
    return 4 * batch * heads * dim * visible_pairs(pattern, frame_len, n_text)


def backward_flops(batch: int, heads: int, dim: int, pattern: FramePattern, frame_len: int, n_text: int = 0) -> int:
    """FLOPs of the backward with the logits recomputed: QK^T, dO V^T, P^T dO, dS^T Q, dS K."""
    return 10 * batch * heads * dim * visible_pairs(pattern, frame_len, n_text)


def forward_bytes(batch: int, heads: int, kv_heads: int, length: int, dim: int, itemsize: int) -> int:
    """Fewest bytes of the forward: q, k, v read once, out and lse written once."""
    return batch * length * ((2 * heads + 2 * kv_heads) * dim * itemsize + 4 * heads)


def backward_bytes(batch: int, heads: int, kv_heads: int, length: int, dim: int, itemsize: int) -> int:
    """Fewest bytes of the backward: q, k, v, out, dout and lse read once, dq, dk, dv written once."""
    return batch * length * ((4 * heads + 4 * kv_heads) * dim * itemsize + 4 * heads)


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``grid_attention`` or, with ``pattern``, of ``frame_sparse_attention``.

    ``valid``, ``kv_len`` and ``text_len`` are made from the seed when their flag is set.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    grid: tuple[int, int]
    frame_len: int
    n_text: int = 0
    text_position: str = "front"
    layout: str = "bhld"
    rules: Mapping = field(default_factory=dict)
    pattern: FramePattern | None = None
    with_valid: bool = False
    with_kv_len: bool = False
    with_text_len: bool = False

    @property
    def length(self) -> int:
        """Tokens L."""
        return self.n_text + self.grid[0] * self.grid[1] * self.frame_len

    @property
    def frames(self) -> FramePattern:
        """The frame pattern in force."""
        return self.pattern or GridPattern(*self.grid, **self.rules)

    @property
    def flops(self) -> int:
        """Forward FLOPs."""
        return forward_flops(self.batch, self.heads, self.dim, self.frames, self.frame_len, self.n_text)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of unit normal values in this sample's layout."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads):
            shape = (self.batch, heads, self.length, self.dim)
            if self.layout == "blhd":
                shape = (shape[0], shape[2], shape[1], shape[3])
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)

    def options(self, device="cpu", seed=0) -> dict:
        """Keyword arguments of the call (without ``pattern``/``grid``)."""
        views, times = self.grid
        given: dict = {"layout": self.layout, "n_text": self.n_text, "text_position": self.text_position}
        if not (self.with_valid or self.with_kv_len or self.with_text_len):
            return given
        generator = torch.Generator().manual_seed(seed + 1)
        if self.with_valid:
            given["valid"] = (torch.rand(self.batch, views, times, generator=generator) > 0.3).to(device)
        if self.with_kv_len:
            shape = (self.batch, views, times)
            given["kv_len"] = torch.randint(0, self.frame_len + 1, shape, generator=generator).to(device)
        if self.with_text_len:
            given["text_len"] = torch.randint(0, self.n_text + 1, (self.batch,), generator=generator).to(device)
        return given

    def call(self, q, k, v, *, device="cpu", seed=0, **more):
        """Run the public function on this sample."""
        import vidkern

        given = self.options(device, seed) | more
        if self.pattern is None:
            return vidkern.grid_attention(q, k, v, grid=self.grid, **self.rules, **given)
        for name in ("valid", "kv_len"):
            if name in given:
                given[name] = given[name].flatten(1)
        return vidkern.frame_sparse_attention(q, k, v, self.pattern, **given)


_DIAGONAL_AND_NEXT = FramePattern.from_lists([[0, 1], [1, 2, 5], [0, 2], [3], [], [0, 1, 2, 3, 4, 5]])

SAMPLES = (
    Sample("cross", 2, 3, 3, 64, (3, 4), 16),
    Sample("cross_token_major", 2, 3, 3, 64, (3, 4), 16, layout="blhd"),
    Sample("gqa", 2, 6, 2, 32, (2, 3), 7),
    Sample("mqa_blhd", 1, 4, 1, 40, (3, 2), 9, layout="blhd"),
    Sample("one_view", 1, 2, 2, 64, (1, 5), 13),
    Sample("one_time", 1, 2, 2, 64, (5, 1), 13),
    Sample("one_frame", 1, 1, 1, 8, (1, 1), 3),
    Sample("one_token_frames", 4, 16, 16, 16, (4, 6), 1),
    Sample("odd_799", 1, 2, 1, 24, (1, 1), 799),
    Sample("causal", 1, 2, 2, 32, (3, 5), 11, rules={"causal_time": True}),
    Sample("windows", 1, 2, 2, 32, (4, 6), 9, rules={"window_time": (2, 1), "window_view": 1}),
    Sample("cyclic", 1, 2, 2, 32, (6, 3), 9, rules={"window_view": (1, 2), "cyclic_view": True}),
    Sample("anchors", 1, 2, 2, 32, (4, 4), 9, rules={"anchors": {"views": [0], "times": [0], "frames": [(2, 3)]}}),
    Sample("causal_anchor", 1, 2, 2, 32, (2, 5), 9, rules={"causal_time": True, "anchors": {"times": [4]}}),
    Sample("part_self", 1, 2, 2, 32, (3, 3), 8, rules={"include": ("self",)}, n_text=5),
    Sample("part_view", 1, 2, 2, 32, (3, 3), 8, rules={"include": ("view",)}, n_text=5),
    Sample("part_time", 1, 2, 2, 32, (3, 3), 8, rules={"include": ("time",)}, n_text=5, text_position="back"),
    Sample("text_front", 2, 4, 2, 64, (2, 3), 17, n_text=19),
    Sample("text_back_len", 2, 2, 2, 72, (2, 3), 17, n_text=33, text_position="back", with_text_len=True),
    Sample("valid", 2, 2, 2, 48, (3, 4), 12, with_valid=True),
    Sample("kv_len", 2, 2, 2, 48, (3, 4), 12, with_kv_len=True),
    Sample("everything", 2, 4, 2, 96, (3, 4), 21, n_text=6, with_valid=True, with_kv_len=True, with_text_len=True,
           layout="blhd", rules={"causal_time": True, "window_view": 1, "anchors": {"views": [0]}}),
    Sample("frames", 2, 8, 8, 64, (6, 1), 10, pattern=_DIAGONAL_AND_NEXT),
    Sample("frames_masked", 2, 4, 2, 64, (6, 1), 10, n_text=4, pattern=_DIAGONAL_AND_NEXT, with_valid=True,
           with_kv_len=True),
    Sample("dim_8", 1, 2, 2, 8, (2, 2), 16),
    Sample("dim_128", 1, 2, 2, 128, (2, 2), 65),
    Sample("dim_256", 1, 2, 1, 256, (2, 2), 33),
    Sample("demo", 1, 4, 4, 32, (4, 8), 48),
)
