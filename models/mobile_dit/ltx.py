"""LTX-Video's transformer (diffusers' `LTXVideoTransformer3DModel`) as a `MobileDiT`, to be pruned."""

import torch

from ..shared.rope import split_head_dim
from ..shared.table_dit import TableConfig, TableSpec
from .model import MobileDiT


def ltx_config(config, *, rope_scale, group=128):
    """The configuration of a diffusers LTX configuration. rope_scale, group: see `from_ltx`."""
    heads, D = config.num_attention_heads, config.attention_head_dim
    if config.patch_size != 1 or config.patch_size_t != 1:
        raise ValueError(f"patch_size={config.patch_size}, patch_size_t={config.patch_size_t}: expected 1 and 1")
    if config.norm_elementwise_affine or not config.attention_bias or not config.attention_out_bias:
        raise ValueError("transformer: has affine norms or attentions without bias, expected LTX-Video's form")
    spec = TableSpec(heads=heads, cross_heads=heads, hidden=4 * heads * D)
    return TableConfig(channels=config.in_channels, out_channels=config.out_channels or 0, dim=heads * D, heads=heads, head_dim=D, group=group,
                       text_dim=config.caption_channels, blocks=(spec,) * config.num_layers, qk_norm="all", qk_eps=1e-5, rope="full",
                       rope_axes=split_head_dim(D), rope_scale=tuple(rope_scale))


def default_rope_scale(frame_rate=25):
    """What LTX's pipeline uses with its autoencoder: 8 frames and 32 pixels a position, over the 20 seconds and 2048 pixels of its training."""
    return (8 / frame_rate / 20, 32 / 2048, 32 / 2048)


@torch.no_grad()
def from_ltx(transformer, *, rope_scale=None, group=128):
    """A `MobileDiT` with the weights of an `LTXVideoTransformer3DModel`; it gives the same velocities, at timestep 1000 * sigma.

    rope_scale: positions to LTX's coordinates per axis (time, y, x), default `default_rope_scale()`. group: FFN channels that are pruned
    together. Channels of queries and keys are reordered within each head, which changes nothing: LTX turns neighbouring channels, we turn
    channels half a head apart.
    """
    config = ltx_config(transformer.config, rope_scale=default_rope_scale() if rope_scale is None else rope_scale, group=group)
    theirs = transformer.state_dict()
    halves = torch.arange(config.head_dim).view(-1, 2).T.flatten()
    order = (torch.arange(config.heads)[:, None] * config.head_dim + halves).flatten()

    def both(name):
        return {kind: theirs[f"{name}.{kind}"] for kind in ("weight", "bias")}

    state = {}

    def put(name, layer):
        state.update({f"{name}.{kind}": value for kind, value in layer.items()})

    def joined(*layers):
        return {kind: torch.cat([layer[kind] for layer in layers]) for kind in layers[0]}

    def turned(layer):
        return {kind: value[order] for kind, value in layer.items()}

    for name, source in (("embed", "proj_in"), ("time.0", "time_embed.emb.timestep_embedder.linear_1"),
                         ("time.2", "time_embed.emb.timestep_embedder.linear_2"), ("modulation", "time_embed.linear"),
                         ("caption.0", "caption_projection.linear_1"), ("caption.2", "caption_projection.linear_2"), ("final.linear", "proj_out")):
        put(name, both(source))
    state["final.table"] = theirs["scale_shift_table"]
    for b in range(len(config.blocks)):
        ours, source = f"blocks.{b}", f"transformer_blocks.{b}"
        state[f"{ours}.table"] = theirs[f"{source}.scale_shift_table"]
        q, k, v = (both(f"{source}.attn1.to_{part}") for part in "qkv")
        put(f"{ours}.attention.qkv", joined(turned(q), turned(k), v))
        q, k, v = (both(f"{source}.attn2.to_{part}") for part in "qkv")
        put(f"{ours}.cross.q", q)
        put(f"{ours}.cross.kv", joined(k, v))
        for part in "qk":
            state[f"{ours}.attention.{part}_norm.weight"] = theirs[f"{source}.attn1.norm_{part}.weight"][order]
            state[f"{ours}.cross.{part}_norm.weight"] = theirs[f"{source}.attn2.norm_{part}.weight"]
        put(f"{ours}.attention.out", both(f"{source}.attn1.to_out.0"))
        put(f"{ours}.cross.out", both(f"{source}.attn2.to_out.0"))
        put(f"{ours}.ffn.up", both(f"{source}.ff.net.0.proj"))
        put(f"{ours}.ffn.down", both(f"{source}.ff.net.2"))
    model = MobileDiT(config).to(theirs["proj_in.weight"])
    model.load_state_dict(state)
    return model.train(transformer.training)
