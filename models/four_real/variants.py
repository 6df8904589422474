"""The architectures that 4Real-Video-V2 (arXiv 2506.18839) compares, each a `VideoDiT` that loads a base video model's weights.

Row attention joins the times of one view (`same_view`), column attention the views of one time (`same_time`).

fused                 one softmax over the own frame, the row and the column: the paper's method. No new parameters.
full                  every frame sees every frame. No new parameters.
sequential_interleave even blocks row, odd blocks column attention. No new parameters.
sequential_insert     row attention, and in each block a new column attention behind it, with cameras (SynCamMaster, arXiv 2412.07760).
parallel_hard, _soft  two streams through the same blocks, one with row and one with column attention, synchronised after every block
                      (4Real-Video, arXiv 2412.04462): hard makes them equal, soft adds a learned difference to each.
parallel_light        one stream; row and column attention side by side, averaged with one learned weight a block (as SV4D 2.0 does).

At initialisation sequential_insert *is* the base model applied to each view, parallel_soft is the average of the base model applied to
each view and to each time, and parallel_light and the hard average start half and half.
"""

import torch
from torch import nn

from ..shared.attention import SelfAttention, attend
from ..shared.dit import Block, VideoDiT, modulate
from ..shared.rope import apply_rope

ROW, COLUMN = ("same_view", "time"), ("same_time", "view")  # pattern and kind of positions


class LearnedViewDiT(VideoDiT):
    """Fused attention with the time alone on RoPE's time axis; the view enters as a learned embedding, added to q and k before RoPE.

    sin and cos of view * 16 learned frequencies -> two linear layers -> one vector of a head's width for each head, shared by all
    blocks. The last layer starts at zero: at first views are not told apart.
    """

    frequencies = 16

    def __init__(self, config):
        super().__init__(config)
        self.view_rates = nn.Parameter(torch.logspace(0, -2, self.frequencies))
        self.view_embedding = nn.Sequential(nn.Linear(2 * self.frequencies, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        nn.init.zeros_(self.view_embedding[2].weight)
        nn.init.zeros_(self.view_embedding[2].bias)

    def forward(self, x, sigma, **kwargs):
        V, T, patch = x.shape[1], x.shape[2], self.config.patch
        angle = torch.arange(V, device=x.device, dtype=self.view_rates.dtype)[:, None] * self.view_rates
        per_view = self.view_embedding(torch.cat((angle.sin(), angle.cos()), -1)).view(V, self.config.heads, -1)
        tokens = T * (x.shape[-2] // patch) * (x.shape[-1] // patch)
        return super().forward(x, sigma, block_inputs={"offset": per_view.repeat_interleave(tokens, 0)}, **kwargs)


class InsertBlock(Block):
    """A base block with row attention, and between it and the cross-attention

        y = modulate(LN(x)) + camera(3x4 extrinsics);  x += gate * projector(column attention(y))

    On a trained base the column attention and its modulation start as copies of the block's own, projector and camera at zero, so that
    the block is the base block (`adopt`). A block made from nothing has, like every AdaLN-zero block, zero gates instead: with a zero
    projector behind a zero gate neither would ever learn. spec.positions is (row, column). A spec whose attention is ("same_view",)
    alone inserts nothing.
    """

    def __init__(self, config, spec):
        super().__init__(config, spec)
        dim, self.inserted = config.dim, len(spec.attention) > 1
        if self.inserted:
            self.norm_view = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.view_attention = SelfAttention(dim, config.heads, qk_norm=config.qk_norm)
            self.projector, self.camera = nn.Linear(dim, dim), nn.Linear(12, dim)
            self.view_modulation = nn.Linear(dim, 3 * dim)

    def adopt(self):
        """Start the new parts: copies of the block's own, projector and camera from zero."""
        if not self.inserted:
            return
        third = self.view_modulation.out_features
        self.view_attention.load_state_dict(self.attention.state_dict())
        with torch.no_grad():
            self.view_modulation.weight.copy_(self.modulation.weight[:third])
            self.view_modulation.bias.copy_(self.modulation.bias[:third])
            for layer in (self.projector, self.camera):
                layer.weight.zero_()
                layer.bias.zero_()

    def forward(self, x, condition, table, grid, *, cameras=None, text=None, text_mask=None, capture=None, **attention):
        """cameras: [B, L, 12], the extrinsics of each token's frame, or None. table: (row, column)."""
        row, column = table
        shift1, scale1, gate1, *rest = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(h, row, ROW[0], grid, capture=capture, **attention)
        if self.inserted:
            shift, scale, gate = self.view_modulation(condition)[:, None].chunk(3, dim=-1)
            y = modulate(self.norm_view(x), shift, scale)
            y = y if cameras is None else y + self.camera(cameras.to(y.dtype))
            x = x + gate * self.projector(self.view_attention(y, column, COLUMN[0], grid, **attention))
        return self.after_attention(x, rest, text, text_mask)


class InsertDiT(VideoDiT):
    """`sequential_insert`: a `VideoDiT` of `InsertBlock`s that may be told the cameras."""

    block_type = InsertBlock

    def adopt(self):
        for block in self.blocks:
            block.adopt()

    def forward(self, x, sigma, *, cameras=None, **kwargs):
        """cameras: world-to-camera [B, V, T, 3, 4] (of 4x4 the last row is dropped), or None."""
        if cameras is not None:
            if cameras.shape[:3] != x.shape[:3] or cameras.shape[3:] not in ((3, 4), (4, 4)):
                raise ValueError(f"cameras: shape {tuple(cameras.shape)}, expected {(*x.shape[:3], 3, 4)}")
            tokens = (x.shape[-2] // self.config.patch) * (x.shape[-1] // self.config.patch)
            cameras = cameras[..., :3, :].flatten(3).flatten(1, 2).repeat_interleave(tokens, 1)
        return super().forward(x, sigma, block_inputs={"cameras": cameras}, **kwargs)


class HardSync(nn.Module):
    """Both streams become Wv (1 + scale_v) y_v + Wt (1 + scale_t) y_t; Wv = Wt = I / 2 and the scales 0 at first."""

    def __init__(self, dim):
        super().__init__()
        self.view, self.time = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = nn.Linear(dim, 2)

    def adopt(self):
        with torch.no_grad():
            for layer in (self.view, self.time):
                layer.weight.copy_(torch.eye(layer.in_features) / 2)
            self.scale.weight.zero_()
            self.scale.bias.zero_()

    def forward(self, y_view, y_time, condition):
        s_view, s_time = (1 + self.scale(condition))[:, None].chunk(2, dim=-1)
        both = self.view(s_view * y_view) + self.time(s_time * y_time)
        return both, both


class SoftSync(nn.Module):
    """To each stream its half of gate * Linear((1 + scale) * [y_view, y_time]) is added. The linear starts at zero, so that nothing is
    added at first; scale and gate, numbers per stream that follow sigma, start at 0 and 1: a gate of 0 would never learn."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(2 * dim, 2 * dim)
        self.modulation = nn.Linear(dim, 4)

    def adopt(self):
        with torch.no_grad():
            for layer in (self.linear, self.modulation):
                layer.weight.zero_()
                layer.bias.zero_()

    def forward(self, y_view, y_time, condition):
        s_view, s_time, g_view, g_time = (1 + self.modulation(condition))[:, None].chunk(4, dim=-1)
        d_view, d_time = self.linear(torch.cat((s_view * y_view, s_time * y_time), -1)).chunk(2, dim=-1)
        return y_view + g_view * d_view, y_time + g_time * d_time


class ParallelDiT(VideoDiT):
    """`parallel_hard` and `parallel_soft`: tokens are doubled into a view stream (column attention) and a time stream (row attention).

    Each block serves both streams; a context embedding, zero at first, tells it which. After the last block they are averaged.
    The tap "<block>.hidden" is the average of the streams.
    """

    sync_type = SoftSync

    def __init__(self, config):
        super().__init__(config)
        self.context = nn.Parameter(torch.zeros(2, config.dim))
        self.syncs = nn.ModuleList(self.sync_type(config.dim) for _ in config.blocks)
        self.adopt()

    def adopt(self):
        for sync in self.syncs:
            sync.adopt()
        with torch.no_grad():
            self.context.zero_()

    def trunk(self, tokens, embedded, tables, grid, wanted, stop_after, inputs):
        plain, taps = nn.functional.silu(embedded), {}
        for_view, for_time = (nn.functional.silu(embedded + context) for context in self.context)
        view = time = tokens
        for index, (block, sync) in enumerate(zip(self.blocks, self.syncs)):
            view = block(view, for_view, tables(COLUMN[1]), grid, pattern=COLUMN[0], **inputs)
            time = block(time, for_time, tables(ROW[1]), grid, pattern=ROW[0], **inputs)
            view, time = sync(view, time, plain)
            if f"{index}.hidden" in wanted:
                taps[f"{index}.hidden"] = (view + time) / 2
            if index == stop_after:
                break
        return (view + time) / 2, taps


class HardParallelDiT(ParallelDiT):
    """Two streams that are mixed into one after every block (:class:`HardSync`)."""

    sync_type = HardSync


class BlendedAttention(SelfAttention):
    """One projection, row and column attention, and `share` * row + (1 - share) * column before the output layer. share: learned, 1/2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, table, pattern, grid, *, offset=None, valid=None, impl=None, capture=None):
        """table, pattern: one for the row and one for the column. capture receives q and k as the row attention sees them."""
        q, k, v = self.project(x, offset)
        parts = []
        for part, kind in zip(table, pattern):
            turned = apply_rope(q, part), apply_rope(k, part)
            if capture is not None and not parts:
                capture.update(q=turned[0], k=turned[1])
            parts.append(attend(*turned, v, kind, grid, valid=valid, impl=impl))
        share = self.share.to(x.dtype)
        return self.out((share * parts[0] + (1 - share) * parts[1]).flatten(2))


class LightBlock(Block):
    """A base block whose self-attention is a `BlendedAttention`."""

    attention_type = BlendedAttention


class LightDiT(VideoDiT):
    """`parallel_light`: a `VideoDiT` of `LightBlock`s."""

    block_type = LightBlock


TRUNKS = {
    "fused": VideoDiT,
    "full": VideoDiT,
    "sequential_interleave": VideoDiT,
    "sequential_insert": InsertDiT,
    "parallel_hard": HardParallelDiT,
    "parallel_soft": ParallelDiT,
    "parallel_light": LightDiT,
}


def build(config):
    """The network of a `FourRealConfig`, freshly initialised."""
    return (LearnedViewDiT if config.positions == "learned" else TRUNKS[config.architecture])(config.dit)


def load_base(dit, state):
    """Load a base `VideoDiT`'s state into `dit` and start its new parts from it. Raises ValueError when the state does not fit."""
    missing, unexpected = dit.load_state_dict(state, strict=False)
    lacking = [name for name in missing if name in base_names(dit.config)]
    if lacking or unexpected:
        raise ValueError(f"base weights: {lacking + unexpected} missing or not known, expected those of a VideoDiT of this size")
    if hasattr(dit, "adopt"):
        dit.adopt()


def base_names(config):
    """Names of the parameters of a plain `VideoDiT` of this size."""
    with torch.device("meta"):
        return set(VideoDiT(config).state_dict())
