"""Properties of grid attention itself: counting probes, the alignment torture, decompositions, symmetries, patterns, edges."""

import pytest
import torch
import torch.nn.functional as F

import vidkern
from vidkern.ops.grid_attention.cost import SAMPLES, Sample

from . import checks
from .conftest import backend_runs

BACKENDS = backend_runs("grid_attention")
CPU = [b for b in BACKENDS if b[0] == "cpu"]
BEST = CPU[-1:]
TORTURE = (1, 7, 63, 64, 65, 96, 127, 128, 129, 144, 192, 575, 576, 577, 1350)


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_at_small_sizes(backend, tier, dtype):
    for views, times in ((1, 1), (1, 4), (4, 1), (3, 4)):
        for n in (1, 3, 16, 37):
            checks.counting(Sample("count", 1, 2, 1, 16, (views, times), n), dtype, backend)
    for rules in ({"causal_time": True}, {"window_time": 1, "window_view": 1}, {"include": ("view",)}, {"anchors": {"times": [0]}}):
        checks.counting(Sample("count", 1, 1, 1, 16, (3, 4), 9, rules=rules), dtype, backend)


@pytest.mark.parametrize("backend, tier", BEST, indirect=["tier"])
@pytest.mark.parametrize("n", TORTURE)
def test_counting_torture(backend, tier, n):
    """Every alignment of frames to tiles, with one, two and several views and times; awkward large lengths too."""
    for views, times in ((1, 3), (3, 1), (2, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            checks.counting(Sample("torture", 1, 1, 1, 8, (views, times), n), dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend, tier", CPU[:-1], indirect=["tier"])
@pytest.mark.parametrize("n", TORTURE)
def test_counting_torture_of_the_other_tiers(backend, tier, n):
    test_counting_torture(backend, tier, n)


@pytest.mark.slow
@pytest.mark.parametrize("backend, tier", CPU, indirect=["tier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
def test_inclusion_exclusion_torture(backend, tier, dtype, d):
    """Every alignment again, forward and backward, against the oracle that knows no tiles."""
    for n in TORTURE[:-1]:
        checks.inclusion_exclusion(2, 2, n, d, dtype, backend)


@pytest.mark.parametrize("backend, tier", BEST, indirect=["tier"])
@pytest.mark.parametrize("n, views, times", [(799, 2, 3), (1023, 3, 2), (1350, 2, 2), (113, 6, 8)])
def test_counting_at_large_sizes(backend, tier, n, views, times):
    for dtype in (torch.float32, torch.bfloat16):
        checks.counting(Sample("large", 1, 2, 1, 64, (views, times), n), dtype, backend)


@pytest.mark.parametrize("backend, tier", BEST, indirect=["tier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, d", [(7, 64), (64, 64), (129, 64), (144, 128), (577, 64), (1350, 64)])
def test_inclusion_exclusion(backend, tier, dtype, n, d):
    for views, times in ((2, 3), (3, 1)) if n < 500 else ((2, 2),):
        checks.inclusion_exclusion(views, times, n, d, dtype, backend)


@pytest.mark.parametrize("backend, tier", CPU, indirect=["tier"])
def test_head_dims(backend, tier):
    """Every multiple of 8 up to 256."""
    for d in range(8, 257, 8):
        sample = Sample("dim", 1, 2, 1, d, (2, 2), 19)
        tensors = [t.requires_grad_() for t in sample.tensors()]
        got, want = (sample.call(*tensors, impl=b) for b in (backend, "reference"))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        weight = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, tensors, weight), torch.autograd.grad(want, tensors, weight)):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-5)


def test_reference_equals_dense_masked_attention():
    """The reference against SDPA with the exported bool mask, in float64, forward and backward, for every rule."""
    for sample in SAMPLES:
        q, k, v = (t.requires_grad_() for t in sample.tensors(torch.float64))
        options = sample.options()
        masks = {n: options[n] for n in ("valid", "kv_len", "text_len") if n in options}
        mask = sample.frames.bool_mask(sample.frame_len, n_text=sample.n_text, text_position=sample.text_position, **masks)
        alive = mask.any(-1, keepdim=True)
        turn = (lambda t: t.transpose(1, 2)) if sample.layout == "blhd" else (lambda t: t)
        out = sample.call(q, k, v, impl="reference")
        dense = F.scaled_dot_product_attention(turn(q), turn(k), turn(v), attn_mask=mask | ~alive, enable_gqa=True)
        want = turn(dense * alive)
        assert torch.allclose(out, want, atol=1e-12), sample.name
        weight = torch.randn_like(out)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(want, (q, k, v), weight)):
            assert torch.allclose(a, b, atol=1e-11), sample.name


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
def test_parts_merge_to_the_whole(backend, tier):
    """Every partition of ``include``, merged, equals one call: out, lse and gradients, with text, causal order and anchors."""
    rules = {"causal_time": True, "window_view": 1, "anchors": {"times": [3]}, "n_text": 5}
    leaves = [torch.randn(2, 2, 5 + 12 * 9, 32).requires_grad_() for _ in range(3)]
    call = lambda include: vidkern.grid_attention(*leaves, grid=(3, 4), return_lse=True, impl=backend, include=include, **rules)
    whole = call(("self", "view", "time"))
    weights = [torch.randn_like(o) for o in whole]
    want = torch.autograd.grad(whole, leaves, weights)
    for partition in ((("self",), ("view",), ("time",)), (("self", "view"), ("time",)), (("view", "time"), ("self",))):
        parts = [call(p) for p in partition]
        merged = vidkern.merge_attention([p[0] for p in parts], [p[1] for p in parts])
        for a, b in zip(merged, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(merged, leaves, weights), want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
def test_symmetries(backend, tier):
    """Swapping the roles of view and time, and permuting the views, permutes the output."""
    v, t, n = 3, 4, 10
    q, k, x = (torch.randn(1, 2, v, t, n, 16) for _ in range(3))
    run = lambda grid, *a: vidkern.grid_attention(*(y.flatten(2, 4) for y in a), grid=grid, impl=backend).unflatten(2, (*grid, n))
    want = run((v, t), q, k, x)
    turned = run((t, v), *(y.transpose(2, 3) for y in (q, k, x))).transpose(2, 3)
    torch.testing.assert_close(turned, want, rtol=1e-5, atol=2e-6)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(run((v, t), *(y[:, :, order] for y in (q, k, x))), want[:, :, order], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
def test_extreme_logits(backend, tier):
    """Very negative logits (-6e4) are legitimate values, very large ones do not overflow."""
    q, k, v = (torch.randn(1, 1, 12, 16) for _ in range(3))
    for offset in (-6e4, 6e4):
        q2, k2 = q.clone(), k.clone()
        q2[..., 0], k2[..., 0] = 4.0, offset
        got, lse = vidkern.grid_attention(q2, k2, v, grid=(2, 3), return_lse=True, impl=backend)
        want, want_lse = vidkern.grid_attention(q2.double(), k2.double(), v.double(), grid=(2, 3), return_lse=True)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
        assert (got.double() - want).abs().max() < 0.02  # logits of 6e4 have 0.004 of rounding


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
def test_empty_rows(backend, tier):
    """A query with no visible key: out 0, lse -inf, zero gradients, no NaN; here one sample is dead altogether."""
    tensors = [torch.randn(2, 1, 2 * 3 * 5, 24).requires_grad_() for _ in range(3)]
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    valid[0] = False
    out, lse = vidkern.grid_attention(*tensors, grid=(2, 3), valid=valid, return_lse=True, impl=backend)
    assert (out[0] == 0).all() and torch.isneginf(lse[0]).all() and torch.isfinite(lse[1]).all()
    grads = torch.autograd.grad((out, lse), tensors, (torch.randn_like(out), torch.randn_like(lse)))
    assert all((g[0] == 0).all() and torch.isfinite(g).all() and (g[1] != 0).any() for g in grads)
    kv_len = torch.zeros(2, 3, dtype=torch.int64)
    out, lse = vidkern.grid_attention(*tensors, grid=(2, 3), kv_len=kv_len, return_lse=True, impl=backend)
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
def test_invalid_cells_equal_the_compacted_sequence(backend, tier):
    """A grid with dead cells equals the packed sequence of live cells under the same frame pattern."""
    v, t, n = 3, 3, 6
    q, k, x = (torch.randn(1, 2, v * t, n, 16) for _ in range(3))
    valid = torch.ones(v, t, dtype=torch.bool)
    valid[1, 1] = valid[2, 0] = False
    live = valid.flatten().nonzero().flatten()
    mask = torch.from_numpy(vidkern.GridPattern(v, t).frame_mask().copy())[live][:, live]
    packed = vidkern.frame_sparse_attention(
        *(y[:, :, live].flatten(2, 3) for y in (q, k, x)), vidkern.FramePattern.from_mask(mask), impl=backend
    ).unflatten(2, (-1, n))
    whole = vidkern.grid_attention(*(y.flatten(2, 3) for y in (q, k, x)), grid=(v, t), valid=valid, impl=backend)
    whole = whole.unflatten(2, (-1, n))
    torch.testing.assert_close(whole[:, :, live], packed, rtol=1e-5, atol=1e-6)
    assert (whole[:, :, ~valid.flatten()] == 0).all()


@pytest.mark.parametrize("backend, tier", BACKENDS, indirect=["tier"])
@pytest.mark.parametrize("position", ["front", "back"])
def test_masks_token_by_token(backend, tier, position):
    """valid, kv_len and text_len spelled out pair by pair, with nothing shared with the reference."""
    views, times, n, n_text, d = 2, 2, 3, 4, 16
    length = n_text + views * times * n
    q, k, v = (torch.randn(2, 1, length, d) for _ in range(3))
    valid = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    kv_len = torch.tensor([[[3, 2], [1, 0]], [[2, 2], [3, 3]]])
    text_len = torch.tensor([2, 4])
    got, lse = vidkern.grid_attention(
        q, k, v, grid=(views, times), valid=valid, kv_len=kv_len, n_text=n_text, text_len=text_len, text_position=position,
        causal_time=True, return_lse=True, impl=backend,
    )

    def place(token):
        """None and the index of a text token, or the frame and the index of a video token."""
        video = token - n_text if position == "front" else token
        if 0 <= video < views * times * n:
            return divmod(video // n, times), video % n
        return None, token if position == "front" else token - views * times * n

    for b in range(2):
        for i in range(length):
            seen = []
            for j in range(length):
                (fq, _), (fk, r) = place(i), place(j)
                dead = fq is not None and not valid[b][fq] or fk is not None and not valid[b][fk]
                inside = r < (text_len[b] if fk is None else kv_len[b][fk])
                related = fq is None or fk is None or fq[1] == fk[1] or (fq[0] == fk[0] and fk[1] <= fq[1])
                if inside and related and not dead:
                    seen.append(j)
            if not seen:
                assert (got[b, 0, i] == 0).all() and lse[b, 0, i] == -torch.inf
                continue
            logits = k[b, 0, seen] @ q[b, 0, i] / d**0.5
            torch.testing.assert_close(lse[b, 0, i], logits.logsumexp(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[b, 0, i], logits.softmax(0) @ v[b, 0, seen], rtol=1e-4, atol=1e-5)


def test_lse_is_the_natural_log():
    q = torch.zeros(1, 1, 6, 8)
    _, lse = vidkern.grid_attention(q, q, q, grid=(2, 3), return_lse=True)
    torch.testing.assert_close(lse, torch.full((1, 1, 6), 4.0).log())


def test_threads_do_not_change_the_result():
    sample = next(s for s in SAMPLES if s.name == "demo")
    tensors = [t.requires_grad_() for t in sample.tensors()]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = sample.call(*tensors, impl="cpu")
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- patterns ---------------------------------------------------------------------------------------------------------------
def test_patterns_are_values():
    a, b = vidkern.GridPattern(3, 4, window_time=2), vidkern.GridPattern(3, 4, window_time=(2, 2))
    assert a == b and hash(a) == hash(b) and a != vidkern.GridPattern(3, 4)
    assert vidkern.FramePattern.from_key(a.key) == a
    with pytest.raises(AttributeError):
        a.views = 5
    lists = a.lists()
    assert lists is vidkern.GridPattern(3, 4, window_time=2).lists()
    custom = vidkern.FramePattern.from_mask(a.frame_mask())
    assert (custom.frame_mask() == a.frame_mask()).all() and custom.pairs == a.pairs


def test_run_lists_are_the_mask_in_both_directions():
    for sample in SAMPLES:
        mask = sample.frames.frame_mask()
        lists = sample.frames.lists()
        for ptr, runs, want in ((lists.q_ptr, lists.q_runs, mask), (lists.k_ptr, lists.k_runs, mask.T)):
            rebuilt = torch.zeros(want.shape, dtype=torch.bool)
            for f in range(len(want)):
                before = -1
                for first, count in runs[ptr[f] : ptr[f + 1]].tolist():
                    assert count > 0 and first > before, "runs must be sorted, disjoint and maximal"
                    before = first + count
                    rebuilt[f, first:before] = True
            assert (rebuilt.numpy() == want).all()


def test_grid_rules_frame_by_frame():
    """The rules spelled out once more, pair by pair."""
    views, times = 5, 4
    pattern = vidkern.GridPattern(
        views, times, causal_time=True, window_time=(2, 2), window_view=(1, 0), cyclic_view=True, anchors={"frames": [(3, 3)]}
    )
    mask = pattern.frame_mask()
    for fq in range(views * times):
        for fk in range(views * times):
            (vq, tq), (vk, tk) = divmod(fq, times), divmod(fk, times)
            in_view = vq == vk and tk <= tq and tq - tk <= 2
            in_time = tq == tk and (vq - vk) % views <= 1
            assert mask[fq, fk] == (in_view or in_time or (vk, tk) == (3, 3) or fq == fk)


@pytest.mark.parametrize("n, n_text, position", [(5, 0, "front"), (48, 0, "front"), (100, 37, "front"), (64, 130, "back")])
def test_block_mask_equals_the_bool_mask(n, n_text, position):
    """The FlexAttention export: the block tables say exactly which blocks are full, partial and absent, and the eager
    FlexAttention gives the same result as the op."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern = vidkern.GridPattern(2, 3, causal_time=True)
    block = pattern.block_mask(n, n_text=n_text, text_position=position)
    dense = pattern.bool_mask(n, n_text=n_text, text_position=position)[0, 0]
    length = len(dense)
    wanted = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, length, length, device="cpu")
    assert torch.equal(block.to_dense(), wanted.to_dense())
    q, k, v = (torch.randn(1, 1, length, 16) for _ in range(3))
    got = flex_attention(q, k, v, block_mask=block)
    want = vidkern.grid_attention(q, k, v, grid=(2, 3), causal_time=True, n_text=n_text, text_position=position)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
