"""FLOPs of one evaluation by part, as formulas. A multiply-add counts 2; element-wise work is not counted, as in torch's FLOP counter."""

PARTS = ("ffn", "self_qkv", "self_out", "cross_q_out", "self_attention", "cross_kv_attention", "rest")


def forward_flops(config, *, tokens, text, batch=1):
    """{part: FLOPs} of an evaluation on `batch` samples of `tokens` latent positions and `text` text tokens; the parts are PARTS.

    At paper scale, 49 frames of 512 x 384, a sample has 1344 positions.
    """
    C, D, patch = config.dim, config.head_dim, config.channels * config.patch**2
    found = dict.fromkeys(PARTS, 0)
    for spec in config.blocks:
        own, crossing = spec.heads * D, spec.cross * spec.cross_heads * D
        found["ffn"] += 2 * tokens * 2 * C * spec.hidden
        found["self_qkv"] += 2 * tokens * C * 3 * own
        found["self_out"] += 2 * tokens * own * C
        found["self_attention"] += 4 * tokens * tokens * own
        found["cross_q_out"] += 2 * tokens * 2 * C * crossing
        found["cross_kv_attention"] += 2 * text * C * 2 * crossing + 4 * tokens * text * crossing
    found["rest"] = 2 * (tokens * (patch * C + C * (config.out_channels or config.channels) * config.patch**2)
                         + config.freq_dim * C + C * C + 6 * C * C + text * (config.text_dim * C + C * C))
    return {part: batch * value for part, value in found.items()}
