"""Configurations of the mobile video DiT (arXiv 2507.13343). Only block, head and FFN counts are published; widths are those of LTX-Video,
which has the same counts, and the sums of parameters agree with the paper's. The irregular lists are an example of per-block counts."""

import dataclasses

from ..shared.rope import split_head_dim
from ..shared.table_dit import TableConfig, TableSpec

IRREGULAR_HEADS = (26, 24, 22, 21, 20, 19) + (18,) * 8 + (19, 20, 21, 21, 21, 22)
IRREGULAR_HIDDEN = (7168, 6912, 6656, 6400, 6400, 6144, 5888, 5760, 5632, 5504, 5504, 5504, 5632, 5760, 5888, 6144, 6400, 6528, 6656, 6400)


def _blocks(heads, hidden):
    return tuple(TableSpec(heads=h, cross_heads=h, hidden=f) for h, f in zip(heads, hidden, strict=True))


def _paper(heads, hidden, text_dim, changes):
    config = TableConfig(channels=128, dim=2048, heads=32, head_dim=64, text_dim=text_dim, blocks=_blocks(heads, hidden),
                         rope_axes=split_head_dim(64))
    return dataclasses.replace(config, **changes)


def server(**changes):
    """The model that is pruned: 28 blocks, 32 heads, FFN 8192, text of 4096 channels (T5); 1.92B parameters. changes: of `TableConfig`."""
    return _paper((32,) * 28, (8192,) * 28, 4096, changes)


def mobile(**changes):
    """20 blocks, 20 heads, FFN 6144, text of 768 channels (CLIP); 0.96B parameters. For 49 frames of 512 x 384: latents [128, 7, 12, 16]."""
    return _paper((20,) * 20, (6144,) * 20, 768, changes)


def mobile_irregular(**changes):
    """`mobile` with as many heads and channels in all, other ones in every block."""
    return _paper(IRREGULAR_HEADS, IRREGULAR_HIDDEN, 768, changes)


def _tiny(heads, hidden, changes):
    config = TableConfig(channels=4, dim=96, heads=6, head_dim=16, group=32, text_dim=32, blocks=_blocks(heads, hidden),
                         rope_axes=split_head_dim(16))
    return dataclasses.replace(config, **changes)


def tiny_teacher(**changes):
    """6 blocks of 6 heads and 384 FFN channels, 1.0M parameters, for latents [4, 3, 4, 4]."""
    return _tiny((6,) * 6, (384,) * 6, changes)


def tiny_student(**changes):
    """4 blocks of 2 to 5 heads and 160 to 320 FFN channels, 0.4M parameters."""
    return _tiny((4, 3, 2, 5), (256, 192, 160, 320), changes)
