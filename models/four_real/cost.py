"""Parameters and forward FLOPs of every variant as formulas, C being the width: C^2 weights make one square projection.

A multiply-add counts 2. Element-wise work (norms, RoPE, GELU, softmax) is not counted, as in torch's FLOP counter.
"""

from .variants import LearnedViewDiT


def _linear(inputs, outputs, bias=True):
    return inputs * outputs + outputs * bias


def _attention(dit):
    """Parameters of one self-attention: q, k, v, output, and the QK norms."""
    C, norm = dit.dim, {"none": 0, "head": 2 * dit.dim // dit.heads, "all": 2 * dit.dim}[dit.qk_norm]
    return _linear(C, 3 * C) + _linear(C, C) + norm


def parameters(config):
    """{"base", "new", "references"}: parameters of the base model, of what the variant adds, and of the reference embedding.

    New per block: sequential_insert 8 C^2 (column attention 4, projector 1, modulation 3) + 12 C for cameras; parallel_soft 4 C^2;
    parallel_hard 2 C^2; parallel_light one number; all else nothing.
    """
    dit, C = config.dit, config.dit.dim
    patch, hidden = dit.channels * dit.patch**2, int(dit.dim * dit.mlp_ratio)
    cross_norm = {"none": 0, "head": 2 * C // dit.heads, "all": 2 * C}[dit.qk_norm]
    cross = 2 * _linear(C, C) + _linear(dit.text_dim, 2 * C) + cross_norm + 2 * C
    block = _attention(dit) + _linear(C, hidden) + _linear(hidden, C) + _linear(C, 6 * C)
    base = sum(block + cross * spec.cross for spec in dit.blocks)
    base += _linear(patch, C) + _linear(dit.freq_dim, C) + _linear(C, C)
    base += _linear(C, 2 * C) + _linear(C, (dit.out_channels or dit.channels) * dit.patch**2)
    insert = _attention(dit) + _linear(C, C) + _linear(12, C) + _linear(C, 3 * C)
    per_block = {"sequential_insert": insert, "parallel_soft": _linear(2 * C, 2 * C) + _linear(C, 4),
                 "parallel_hard": 2 * _linear(C, C, bias=False) + _linear(C, 2), "parallel_light": 1}.get(config.architecture, 0)
    new = per_block * len(inserted(config) if config.architecture == "sequential_insert" else dit.blocks)
    if config.architecture in ("parallel_soft", "parallel_hard"):
        new += 2 * C
    if config.positions == "learned":
        waves = LearnedViewDiT.frequencies
        new += waves + _linear(2 * waves, C) + _linear(C, C)
    return {"base": base, "new": new, "references": (4 if config.spread_references else 1) * _linear(patch, C)}


def inserted(config):
    """The blocks of a sequential_insert model that have a column attention."""
    return [spec for spec in config.dit.blocks if len(spec.attention) > 1]


def frame_pairs(config, views, times):
    """Visible (query frame, key frame) pairs of all self-attentions of one forward, V = views and T = times.

    A row attention has V T T pairs, a column attention V T V, the fused one V T (V + T - 1), the full one (V T)^2.
    """
    row, column, blocks = views * times * times, views * times * views, len(config.dit.blocks)
    return {
        "fused": blocks * views * times * (views + times - 1),
        "full": blocks * (views * times) ** 2,
        "sequential_interleave": (blocks - blocks // 2) * row + blocks // 2 * column,
        "sequential_insert": blocks * row + column * (len(inserted(config)) if config.architecture == "sequential_insert" else 0),
    }.get(config.architecture, blocks * (row + column))


def forward_flops(config, *, batch, views, times, size, text=0, references=True, cameras=False):
    """FLOPs of one evaluation of the network on `batch` grids of views x times frames of size (height, width).

    text: text tokens a sample. references, cameras: whether they are given. Returns {"linear", "attention"}.
    """
    dit, C, B = config.dit, config.dit.dim, batch
    per_frame = (size[0] // dit.patch) * (size[1] // dit.patch)
    tokens, patch = B * views * times * per_frame, dit.channels * dit.patch**2
    streams = 2 if config.architecture in ("parallel_hard", "parallel_soft") else 1
    hidden = int(C * dit.mlp_ratio)
    crossing = sum(spec.cross for spec in dit.blocks)
    per_token = len(dit.blocks) * (4 * C * C + 2 * C * hidden) + crossing * 2 * C * C
    weights = streams * (tokens * per_token + B * (len(dit.blocks) * 6 * C * C + crossing * text * 2 * C * dit.text_dim))
    weights += tokens * (patch * C * (1 + (references and (4 if config.spread_references else 1)))
                         + C * (dit.out_channels or dit.channels) * dit.patch**2)
    weights += B * (dit.freq_dim * C + C * C + 2 * C * C)
    if config.architecture == "sequential_insert":
        weights += len(inserted(config)) * (tokens * (5 * C * C + 12 * C * cameras) + B * 3 * C * C)
    elif config.architecture == "parallel_soft":
        weights += len(dit.blocks) * (tokens * 4 * C * C + B * 4 * C)
    elif config.architecture == "parallel_hard":
        weights += len(dit.blocks) * (tokens * 2 * C * C + B * 2 * C)
    if config.positions == "learned":
        weights += views * (2 * LearnedViewDiT.frequencies * C + C * C)
    attention = 4 * C * B * frame_pairs(config, views, times) * per_frame**2 + streams * 4 * C * tokens * crossing * text
    return {"linear": 2 * weights, "attention": attention}
