"""diffusers transformers on vidkern: equal to the stock processors, or to them under the same mask; and every refusal."""

import copy
import subprocess
import sys

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vidkern import FramePattern, GridPattern
from vidkern.integrations.diffusers import Frames, VidkernAttnProcessor, enable_vidkern

NAMES = ["wan", "wan-i2v", "cogvideox-2b", "cogvideox-5b", "ltx", "hunyuan"]
TEXT = {"cogvideox-2b": (5, "front"), "cogvideox-5b": (5, "front"), "hunyuan": (5, "back")}
ODD = FramePattern.from_lists([[0, 1], [1], [0, 2, 3], [3]])


def tokens_per_frame(name, height=4, width=6):
    return height * width // (1 if name == "ltx" else 4)


def masked_copy(masked, model, name, pattern):
    """The stock model under the boolean mask of ``pattern``: the oracle."""
    model = copy.deepcopy(model)
    n_text, position = TEXT.get(name, (0, "front"))
    mask = pattern.bool_mask(tokens_per_frame(name), n_text=n_text, text_position=position)
    handle = enable_vidkern(model)
    handle.remove()
    for module in handle.modules.values():
        masked(module, mask)
    return model


def with_gradients(run, model, inputs):
    """Output and parameter gradients of a fixed scalar, as a dict of tensors."""
    model.zero_grad()
    out = run(model, inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    (out * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach()} | found


def assert_as_exact(got, stock, exact):
    """Every tensor of ``got`` is as near to ``exact`` (float64) as ``stock`` is, within a factor of 2 and 1e-5 of its size."""
    assert got.keys() == stock.keys() == exact.keys()
    whole = max(t.abs().max() for t in exact.values())
    for name, true in exact.items():
        error, usual = ((t[name].double() - true).abs().max() for t in (got, stock))
        bound = 2 * usual + 1e-5 * true.abs().max() + 1e-8 * whole
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_dense_is_the_stock_model(name, tiny, run):
    model, inputs = tiny(name)
    stock = with_gradients(run, model, inputs)
    exact = with_gradients(run, copy.deepcopy(model).double(), inputs)
    with enable_vidkern(model) as handle:
        got = with_gradients(run, model, inputs)
        assert all(isinstance(m.processor, VidkernAttnProcessor) for m in handle.modules.values())
    assert any("attn1.norm_k" in key or "attn.norm_k" in key for key in got)
    assert_as_exact(got, stock, exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern, views, equivalent", [
    (dict(causal_time=True, window_time=1), 1, GridPattern(1, 4, causal_time=True, window_time=1)),
    ("grid", 2, GridPattern(2, 2)),
    (ODD, 1, ODD),
], ids=["window", "grid", "pattern"])
def test_a_pattern_is_the_stock_model_under_its_mask(name, pattern, views, equivalent, tiny, run, masked):
    model, inputs = tiny(name)
    oracle = masked_copy(masked, model, name, equivalent)
    stock = with_gradients(run, oracle, inputs)
    exact = with_gradients(run, oracle.double(), inputs)
    dense = run(model, inputs)
    with enable_vidkern(model, pattern, views=views):
        got = with_gradients(run, model, inputs)
    assert (got["output"] - dense).abs().max() > 1e-3 * dense.abs().max(), "the pattern changes nothing here"
    assert_as_exact(got, stock, exact)


@pytest.mark.parametrize("name", NAMES)
def test_one_handle_serves_every_size(name, tiny, run):
    model, inputs = tiny(name)
    longer = tiny(name, frames=6)[1]
    # LTX, CogVideoX with a table: height and width exchanged too; the token count of a frame is the same.
    turned = tiny(name, height=6, width=4)[1]
    stock = [run(model, i) for i in (inputs, longer, turned, inputs)]
    with enable_vidkern(model, lambda frames: GridPattern(1, frames)) as handle:
        got = [run(model, i) for i in (inputs, longer, turned, inputs)]
        assert handle.frames.count == 4
    for a, b in zip(got, stock):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    with enable_vidkern(model, dict(window_time=1)):
        fresh = run(model, longer)
    with enable_vidkern(model, dict(window_time=1)):
        run(model, inputs)
        assert torch.equal(run(model, longer), fresh)


def test_remove_restores(tiny, run):
    for name in NAMES:
        model, inputs = tiny(name)
        before, stock = dict(model.attn_processors), run(model, inputs)
        handle = enable_vidkern(model, dict(window_time=1))
        changed = {k for k, p in model.attn_processors.items() if p is not before[k]}
        assert changed == {f"{k}.processor" for k in handle.processors}
        assert len(changed) == 2 and not torch.equal(run(model, inputs), stock)
        handle.remove()
        handle.remove()
        assert model.attn_processors == before and not model._forward_pre_hooks
        assert torch.equal(run(model, inputs), stock)


def test_only_some_blocks(tiny, run, masked):
    model, inputs = tiny("wan")
    pattern = GridPattern(1, 4, window_time=1)
    oracle = masked_copy(masked, model, "wan", pattern)
    oracle.blocks[0].attn1.set_processor(model.blocks[0].attn1.processor)
    with enable_vidkern(model, pattern, only=lambda name: name == "blocks.1.attn1"):
        torch.testing.assert_close(run(model, inputs), run(oracle, inputs), rtol=1e-5, atol=1e-5)


def test_impl_is_passed_on(tiny, run):
    from vidkern import BackendUnavailable

    model, inputs = tiny("wan")
    with enable_vidkern(model, impl="reference"):
        run(model, inputs)
    with enable_vidkern(model, impl="cpu"), pytest.raises(BackendUnavailable):
        run(model.double(), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, tiny, run):
    model, inputs = tiny(name)
    exact = run(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = run(model, inputs)
        with enable_vidkern(model):
            got = run(model, inputs)
    assert got.dtype == stock.dtype

    def error(x):
        return (x.double() - exact).square().mean().sqrt()

    assert error(got) <= 1.3 * error(stock)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, tiny, run):
    model, inputs = tiny(name)
    with enable_vidkern(model, dict(causal_time=True)):
        plain = with_gradients(run, model, inputs)
        model.train()
        model.enable_gradient_checkpointing()
        again = with_gradients(run, model, inputs)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()) + 1e-9)


def lora_added(model):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("name", NAMES)
def test_lora(name, tiny, run):
    """Adapters added before or after enabling act as in the stock model."""
    model, inputs = tiny(name)
    bare = run(model, inputs)
    handle = enable_vidkern(model)
    torch.manual_seed(1)
    lora_added(model)
    got = with_gradients(run, model, inputs)
    handle.remove()
    stock = with_gradients(run, model, inputs)
    assert not torch.allclose(stock["output"], bare, rtol=1e-3)
    assert any("lora_B" in key for key in got)
    exact = with_gradients(run, copy.deepcopy(model).double(), inputs)
    with enable_vidkern(model):
        assert_as_exact(with_gradients(run, model, inputs), stock, exact)
    assert_as_exact(got, stock, exact)


@pytest.mark.parametrize("name", NAMES)
def test_fused_projections(name, tiny, run):
    """Fused before enabling: the fused weights are used where the stock processor uses them."""
    model, inputs = tiny(name)
    model.fuse_qkv_projections()
    fused = [m for m in model.modules() if hasattr(m, "to_qkv")]
    with torch.no_grad():
        for module in fused:     # so that the fused and the separate projections differ
            module.to_qkv.weight.mul_(1.5)
    stock = run(model, inputs)
    with enable_vidkern(model):
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5 * float(stock.detach().abs().max()))
    if name != "hunyuan":
        assert fused
    if name.startswith(("wan", "cog")):
        assert not torch.allclose(stock, run(tiny(name)[0], inputs), rtol=1e-3)


def test_fusing_after_enabling_is_honoured_or_refused(tiny, run):
    model, inputs = tiny("wan")
    stock = run(model, inputs)
    with enable_vidkern(model):
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5)
    model, inputs = tiny("cogvideox-5b")
    handle = enable_vidkern(model)
    model.fuse_qkv_projections()          # puts processors of its own
    with pytest.raises(RuntimeError, match="transformer_blocks.0.attn1 now has FusedCogVideoXAttnProcessor2_0, expected the Vidkern"):
        run(model, inputs)
    handle.remove()
    assert {type(p).__name__ for p in model.attn_processors.values()} == {"FusedCogVideoXAttnProcessor2_0"}


def test_a_deep_copy_is_independent(tiny, run):
    model, inputs = tiny("wan")
    longer = tiny("wan", frames=6)[1]
    handle = enable_vidkern(model, dict(causal_time=True))
    out = run(model, longer)
    twin = copy.deepcopy(model)
    run(twin, inputs)
    assert handle.frames.count == 6 and twin.blocks[0].attn1.processor.frames.count == 4
    assert torch.equal(run(twin, longer), out)


def test_processor_by_hand(tiny, run):
    """One module, without a hook."""
    model, inputs = tiny("wan")
    stock = run(model, inputs)
    attn, frames = model.blocks[0].attn1, Frames()
    attn.set_processor(VidkernAttnProcessor(attn.processor, frames))
    with pytest.raises(ValueError, match="hidden_states: 24 tokens of unknown frames, expected the whole transformer"):
        run(model, inputs)
    frames.set(4, 6)
    torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5)
    frames.set(2, 6)
    with pytest.raises(ValueError, match="hidden_states: 24 video tokens, expected 2 frames of 6 tokens"):
        run(model, inputs)


@pytest.mark.parametrize("name, whole", [
    ("wan", False), *(pytest.param(n, w, marks=pytest.mark.slow) for n in ("wan", "cogvideox-5b", "ltx", "hunyuan") for w in (True, False)
                      if (n, w) != ("wan", False)),
])
def test_compiled(name, whole, tiny, run):
    """Each block, or the whole transformer, is one graph, forward and backward; another number of frames is another graph."""
    model, inputs = tiny(name)
    longer = tiny(name, frames=6)[1]
    with enable_vidkern(model, dict(causal_time=True)):
        eager = with_gradients(run, model, inputs), run(model, longer)
        blocks = [b for n in ("blocks", "transformer_blocks", "single_transformer_blocks") for b in getattr(model, n, ())]
        for module in [model] if whole else blocks:
            module.compile(fullgraph=True, backend="aot_eager")
        compiled = with_gradients(run, model, inputs), run(model, longer)
    for key, value in eager[0].items():
        torch.testing.assert_close(compiled[0][key], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()) + 1e-9)
    torch.testing.assert_close(compiled[1], eager[1], rtol=1e-5, atol=1e-5)


def test_flops_follow_the_pattern(tiny, run):
    model, inputs = tiny("wan", frames=8)

    def count(pattern):
        with enable_vidkern(model, pattern), FlopCounterMode(display=False) as counter:
            run(model, inputs)
        return counter.get_flop_counts()["Global"][torch.ops.vidkern.grid_attention]

    window = GridPattern(1, 8, window_time=1)
    assert window.pairs == 22
    assert count("dense") == 2 * 4 * 2 * 32 * 64 * 6 * 6 and count(window) == count("dense") * 22 // 64


# ---- refusals -------------------------------------------------------------------------------------------------------
def test_other_classes_are_refused(tiny):
    with pytest.raises(TypeError, match="transformer: Linear, expected WanTransformer3DModel, CogVideoXTransformer3DModel, "
                                        "LTXVideoTransformer3DModel, HunyuanVideoTransformer3DModel"):
        enable_vidkern(torch.nn.Linear(2, 2))
    allegro = diffusers.AllegroTransformer3DModel(num_attention_heads=2, attention_head_dim=24, num_layers=1, caption_channels=8,
                                                  cross_attention_dim=48, sample_width=4, sample_height=4, sample_frames=4)
    with pytest.raises(TypeError, match="transformer: AllegroTransformer3DModel, expected"):
        enable_vidkern(allegro)


@pytest.mark.parametrize("arguments, kind, message", [
    (dict(pattern="causal"), ValueError, "pattern: 'causal', expected \"dense\""),
    (dict(pattern=3), TypeError, "pattern: int, expected \"dense\""),
    (dict(pattern=dict(causal=True)), ValueError, "pattern: rule 'causal', expected rules among causal_time"),
    (dict(pattern=dict(include=("self",))), ValueError, "pattern: rule 'include'"),
    (dict(pattern=dict(window_time=-1)), ValueError, "window_time: -1, expected"),
    (dict(views=0), ValueError, "views: 0, expected an integer >= 1"),
    (dict(views=True), ValueError, "views: True, expected an integer >= 1"),
    (dict(only=lambda name: False), ValueError, "only: chose none of blocks.0.attn1, blocks.1.attn1"),
])
def test_bad_arguments(arguments, kind, message, tiny):
    model, _ = tiny("wan")
    before = dict(model.attn_processors)
    with pytest.raises(kind, match=message):
        enable_vidkern(model, **arguments)
    assert model.attn_processors == before and not model._forward_pre_hooks


@pytest.mark.parametrize("arguments, kind, message", [
    (dict(views=3), ValueError, "views: 3, expected a divisor of the 4 frames of hidden_states"),
    (dict(pattern=GridPattern(1, 5)), ValueError, "pattern: 5 frames, expected the 4 frames of hidden_states"),
    (dict(pattern=lambda frames: GridPattern(1, frames + 1)), ValueError, "pattern: 5 frames, expected the 4 frames"),
    (dict(pattern=lambda frames: None), TypeError, "pattern: the callable returned NoneType, expected a vidkern.FramePattern"),
    (dict(pattern=dict(anchors={"times": [9]})), ValueError, "anchors: 9 in \"times\", expected 0..3"),
])
def test_patterns_that_do_not_fit_the_frames(arguments, kind, message, tiny, run):
    model, inputs = tiny("wan")
    with enable_vidkern(model, **arguments), pytest.raises(kind, match=message):
        run(model, inputs)


def test_bad_geometry(tiny, run):
    for name, layout in (("wan", "B, C, F, H, W"), ("cogvideox-2b", "B, F, C, H, W"), ("hunyuan", "B, C, F, H, W")):
        model, inputs = tiny(name)
        with enable_vidkern(model), pytest.raises(ValueError, match=f"hidden_states: shape .*, expected 5 dimensions .{layout}."):
            run(model, inputs | dict(hidden_states=inputs["hidden_states"][0]))
    model, inputs = tiny("ltx")
    with enable_vidkern(model):
        with pytest.raises(ValueError, match="num_frames, height, width: None, 4, 6, expected the size of the latents"):
            run(model, inputs | dict(num_frames=None))
        with pytest.raises(ValueError, match="num_frames, height, width: 5 x 4 x 6, expected a product of 96 tokens"):
            run(model, inputs | dict(num_frames=5))
        positional = [inputs[k] for k in ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask",
                                          "num_frames", "height", "width", "rope_interpolation_scale")]
        assert torch.equal(model(*positional, return_dict=False)[0], run(model, inputs))
    model, inputs = tiny("wan")
    with enable_vidkern(model), pytest.raises(ValueError, match="hidden_states: 0 frames of 6 tokens"):
        run(model, inputs | dict(hidden_states=inputs["hidden_states"][:, :, :0]))


def test_head_width(tiny):
    model, _ = tiny("wan", attention_head_dim=12)
    with pytest.raises(ValueError, match="transformer: attention_head_dim 12, expected a multiple of 8 up to 256"):
        enable_vidkern(model)


def test_enabling_twice_and_unknown_processors(tiny, masked):
    model, _ = tiny("wan")
    with enable_vidkern(model), pytest.raises(TypeError, match="processor: VidkernAttnProcessor, expected a stock one: vidkern is enabled already"):
        enable_vidkern(model)
    masked(model.blocks[1].attn1, None)
    before = dict(model.attn_processors)
    with pytest.raises(TypeError, match="processor: Masked, expected one of"):
        enable_vidkern(model)
    assert model.attn_processors == before and not model._forward_pre_hooks


def test_context_parallelism_is_refused(tiny):
    model, _ = tiny("wan")
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="transformer: context parallelism is on, expected a model without it"):
        enable_vidkern(model)


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox-5b"])
def test_masks_are_refused_where_the_stock_model_has_none(name, tiny, run):
    model, inputs = tiny(name)
    with enable_vidkern(model) as handle:
        run(model, inputs)
        attn = next(iter(handle.modules.values()))
        x = torch.randn(2, 4 * handle.frames.tokens, 32)
        text = torch.randn(2, 5, 32) if name.startswith("cog") else None
        with pytest.raises(ValueError, match="attention_mask: shape .2, 1, 1, 24., expected None; say which frame sees which"):
            attn.processor(attn, x, text, torch.ones(2, 1, 1, 24, dtype=torch.bool), None)
        if text is None:
            with pytest.raises(ValueError, match="encoder_hidden_states: shape .2, 3, 32., expected None; cross-attention"):
                attn.processor(attn, x, torch.randn(2, 3, 32), None, None)


def test_hunyuan_masks(tiny, run):
    """A prefix of the text, per sample, is what the stock model has; anything else says so."""
    model, inputs = tiny("hunyuan")
    for kept in ((5, 5), (1, 4), (2, 2)):
        mask = (torch.arange(5) < torch.tensor(kept)[:, None]).long()
        stock = run(model, inputs | dict(encoder_attention_mask=mask))
        with enable_vidkern(model):
            got = run(model, inputs | dict(encoder_attention_mask=mask))
        torch.testing.assert_close(got, stock, rtol=1e-5, atol=1e-5 * float(stock.detach().abs().max()))
    with enable_vidkern(model) as handle:
        run(model, inputs)
        attn = handle.modules["transformer_blocks.0.attn"]
        x, text = torch.randn(2, 24, 32), torch.randn(2, 5, 32)
        good = torch.ones(2, 1, 1, 29, dtype=torch.bool)
        hole, no_video = good.clone(), good.clone()
        hole[1, ..., 26] = no_video[0, ..., 3:] = False
        for mask in (hole, no_video):
            with pytest.raises(ValueError, match="attention_mask: hides video tokens or text before visible text, expected all video"):
                attn.processor(attn, x, text, mask, None)
        for mask in (good.float(), good[..., :28], good.expand(2, 1, 29, 29), good[:, 0, 0]):
            with pytest.raises(ValueError, match="attention_mask: torch.* expected torch.bool .B, 1, 1, 29., a mask of keys"):
                attn.processor(attn, x, text, mask, None)
        assert torch.equal(attn.processor(attn, x, text, good, None)[0], attn.processor(attn, x, text, None, None)[0])
        good[1, ..., 26] = False
        handle.frames.set(4, 6)      # a new forward pass looks again
        with pytest.raises(ValueError, match="attention_mask: hides video tokens"):
            attn.processor(attn, x, text, good, None)


def test_a_compiled_mask_is_looked_at_too():
    text_len = torch.compile(Frames().text_len, fullgraph=True, backend="aot_eager")
    mask = torch.ones(2, 1, 1, 29, dtype=torch.bool)
    mask[1, ..., 27:] = False
    assert text_len(mask, 24, 5).tolist() == [5, 3]
    mask[1, ..., 28] = True
    with pytest.raises(RuntimeError, match="attention_mask: hides video tokens or text before visible text"):
        text_len(mask, 24, 5)


def test_without_diffusers():
    """The adapters import without diffusers and say what to install."""
    code = """if True:
        import sys
        sys.modules["diffusers"] = None
        import torch
        from vidkern.errors import MissingExtra
        from vidkern.integrations.diffusers import VidkernAttnProcessor, enable_vidkern
        try:
            enable_vidkern(torch.nn.Identity())
        except MissingExtra as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == ('running diffusers models on vidkern needs diffusers, which is not installed: it comes with '
                           'vidkern\'s extra "diffusers", in a checkout by pip install -c constraints.txt -e ".[diffusers]"\n'), done.stderr
