"""What attention motion flow must be whoever computes it: a dense oracle, and checks as functions of the backend. Tests call them,
and the fault-injection tests show that each wrong implementation fails at least one."""

import math

import torch

import vidkern

VARIANTS = ("logit_mean", "prob_mean", "qk_mean", "none")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def places(height, width):
    """(x, y) of every patch, written out."""
    return torch.tensor([[x, y] for y in range(height) for x in range(width)], dtype=torch.float64)


def oracle(q, k, grid, heads="logit_mean", tau=2.0):
    """Everything by its definition, from q and k [H, N, d]: all N x N logits, one softmax for every target frame."""
    (frames, height, width), size, dim = grid, grid[1] * grid[2], q.shape[-1]
    c = places(height, width)
    q, k = q.double(), k.double()
    if heads == "qk_mean":
        q, k = q.mean(0, keepdim=True), k.mean(0, keepdim=True)
    logits = tau / dim**0.5 * torch.einsum("hid,hjd->hij", q, k)
    logits = logits.mean(0, keepdim=True) if heads == "logit_mean" else logits
    # [H, F, S, F, S] -> [H, F, F, S, S]: query frame, target frame, query, key
    logits = logits.unflatten(1, (frames, size)).unflatten(3, (frames, size)).transpose(2, 3)
    each = logits.softmax(-1)
    prob = each.mean(0, keepdim=True) if heads == "prob_mean" else each
    entropy = -(each * each.log()).sum(-1)
    index = prob.argmax(-1)
    found = {
        "flow": torch.einsum("hfgij,jc->hfgic", prob, c) - c, "hard": c[index] - c, "index": index, "lse": logits.logsumexp(-1),
        "conf": prob.amax(-1), "entropy": entropy.mean(0, keepdim=True) if heads == "prob_mean" else entropy,
    }  # fmt: skip
    found = {name: t.flatten(1, 2) for name, t in found.items()}
    whole = heads == "none"
    return {name: t if whole or (name == "lse" and heads == "prob_mean") else t[0] for name, t in found.items()}


EXTRAS = {"return_index": True, "return_lse": True, "return_conf": True, "return_entropy": True}


def flow(q, k, grid, impl, **more):
    return vidkern.attention_motion_flow(q, k, grid=grid, impl=impl, **more)


def is_the_oracle(impl):
    """All variants, frames 1 to 3, odd sizes, text on either side, one sample of several; and the right pair in each row."""
    for frames in (1, 2, 3):
        for i, heads in enumerate(VARIANTS):
            grid, n_text = (frames, 3 + frames % 2, 5), 4 * (i % 2)
            length = n_text + frames * grid[1] * 5
            q, k = (2 * draw(3, 3, length, 16, seed=s + frames) for s in (1, 2))
            sample, front = (frames - 1, i < 2)
            got = flow(q, k, grid, impl, heads=heads, n_text=n_text, text_position="front" if front else "back", batch_index=sample,
                       mode="both", **EXTRAS)
            span = slice(n_text, None) if front else slice(0, length - n_text)
            want = oracle(q[sample, :, span], k[sample, :, span], grid, heads)
            for name, t in want.items():
                apart = (getattr(got, name) - t).abs().max().item()
                assert apart < 1e-4, f"{name} of {heads}, {frames} frames: {apart:.2e} off"


def has_the_gradient(impl):
    """Autograd through the oracle, for a loss on the flow and one on the lse; text gets exactly zero."""
    for heads in VARIANTS:
        grid, n_text = (2, 3, 4), 5
        leaves = [(2 * draw(1, 2, 29, 16, seed=s)).requires_grad_() for s in (1, 2)]
        got = flow(*leaves, grid, impl, heads=heads, n_text=n_text, return_lse=True)
        want = oracle(*(t[0, :, n_text:] for t in leaves), grid, heads)
        for name in ("flow", "lse"):
            weight = draw(*want[name].shape, seed=9)
            grads = [
                torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True) for out in (getattr(got, name), want[name])
            ]  # fmt: skip
            for a, b in zip(*grads):
                assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1), f"{heads} d{name}"
                assert (a[:, :, :n_text] == 0).all(), "text has a gradient"
        (dk,) = torch.autograd.grad((got.flow * draw(*got.flow.shape, seed=3)).sum(), leaves[1])
        total = dk[:, :, n_text:].unflatten(2, (2, 12)).sum(3)
        assert total.abs().max() < 1e-5, "gradients of the keys of a frame do not cancel"


def of_equal_logits(impl):
    """q = 0: the flow points to the middle of the frame, the hard one to the first patch; dk is 0 and dq is not."""
    for heads in VARIANTS:
        grid, c = (2, 3, 7), places(3, 7)
        q, k = torch.zeros(1, 2, 42, 16, requires_grad=True), draw(1, 2, 42, 16).requires_grad_()
        got = flow(q, k, grid, impl, heads=heads, mode="both", return_index=True)
        assert (got.flow - (torch.tensor([3.0, 1.0]) - c)).abs().max() < 1e-5
        assert (got.index == 0).all() and torch.equal(got.hard, (-c).float().expand(got.hard.shape))
        dq, dk = torch.autograd.grad((got.flow * draw(*got.flow.shape)).sum(), (q, k))
        assert (dk == 0).all() and dq.abs().max() > 1e-2


def of_any_scale(impl):
    """A scale of 0 is a softmax of equal logits; a very large one leaves one patch, with a probability that is not above 1."""
    for grid in ((2, 3, 5), (2, 4, 4)):
        size, (q, k) = grid[1] * grid[2], (draw(1, 2, 2 * grid[1] * grid[2], 16, seed=s).requires_grad_() for s in (1, 2))
        for heads in VARIANTS:
            more = {"heads": heads, "return_lse": True, "return_conf": True, "return_entropy": True}
            got = flow(q, k, grid, impl, scale=0.0, **more)
            middle = torch.tensor([(grid[2] - 1) / 2, (grid[1] - 1) / 2]) - places(*grid[1:])
            assert (got.flow - middle).abs().max() < 1e-5 and (got.conf - 1 / size).abs().max() < 1e-6
            assert (got.entropy - math.log(size)).abs().max() < 1e-5 and (got.lse - math.log(size)).abs().max() < 1e-5
            grads = torch.autograd.grad((got.flow * draw(*got.flow.shape)).sum() + got.lse.sum(), (q, k))
            assert all((g == 0).all() for g in grads)
            for tau in (1e4, 1e6):
                got = flow(q, k, grid, impl, tau=tau, **more)
                assert got.conf.max() <= 1 + 1e-6 and got.entropy.min() > -1e-3 and got.flow.isfinite().all(), f"{heads} {tau}"
                grads = torch.autograd.grad((got.flow * draw(*got.flow.shape)).sum(), (q, k))
                assert all(g.isfinite().all() for g in grads)


def ties_go_to_the_lowest(impl):
    """Equal keys: the first of the largest wins, in every block of the frame."""
    for dtype in (torch.float32, torch.bfloat16):
        grid, size = (1, 29, 31), 899
        q, k = draw(1, 1, size, 16).to(dtype), torch.zeros(1, 1, size, 16)
        best = torch.tensor([[520, 521, 890], [3, 4, 700], [898, 130, 129], [511, 512, 513]])
        for row, where in enumerate(best):
            k = torch.zeros(1, 1, size, 16)
            k[0, 0, where] = q[0, 0, row].float()
            for heads in ("none", "prob_mean", "logit_mean"):
                index = flow(q, k.to(dtype), grid, impl, heads=heads, mode="hard", return_index=True).index.flatten()
                assert index[row] == where.min(), f"{heads}: {index[row]}, expected {where.min()}"


def keys_of_a_frame_may_move_together(impl):
    """A vector added to all keys of a frame changes nothing, since the softmax is over the frame; added to one key it does."""
    grid, k = (3, 4, 4), draw(1, 2, 48, 16, seed=2)
    q = draw(1, 2, 48, 16, seed=1)
    before = flow(q, k, grid, impl)
    shifted = k.clone()
    for f, by in enumerate((1.0, -2.0, 0.5)):
        shifted[:, :, 16 * f : 16 * (f + 1)] += by * draw(1, 2, 1, 16, seed=7 + f)
    assert (flow(q, shifted, grid, impl) - before).abs().max() < 1e-4
    one = k.clone()
    one[:, :, 20] += draw(1, 2, 16, seed=7)
    apart = (flow(q, one, grid, impl) - before).abs().amax((1, 2)).view(3, 3)
    assert (apart[:, 1] > 1e-2).all() and apart[:, [0, 2]].max() < 1e-5


def sharp_is_hard(impl):
    """A large tau makes the soft flow the hard one where the two largest logits are apart; tau does not change the hard flow; and the
    soft flow points into the frame."""
    grid = (2, 4, 5)
    q, k = draw(1, 2, 40, 16, seed=1), draw(1, 2, 40, 16, seed=2)
    soft, hard = flow(q, k, grid, impl, tau=1e4, mode="both")
    logits = torch.einsum("hid,hjd->ij", q[0].double(), k[0].double()) / 8
    two = logits.unflatten(0, (2, 20)).unflatten(2, (2, 20)).transpose(1, 2).topk(2).values.flatten(0, 1)
    clear = (two[..., 0] - two[..., 1]) > 1e-2
    assert clear.float().mean() > 0.8 and (soft - hard)[clear].abs().max() < 1e-3
    for heads in ("logit_mean", "none", "qk_mean"):
        flows = [flow(q, k, grid, impl, tau=tau, mode="hard", heads=heads) for tau in (0.1, 2.0, 50.0)]
        assert torch.equal(flows[0], flows[1]) and torch.equal(flows[1], flows[2])
    for tau in (0.1, 2.0, 100.0):
        points = flow(3 * q, 3 * k, grid, impl, tau=tau, heads="none") + places(4, 5)
        assert (points >= -1e-5).all() and (points <= torch.tensor([4.0, 3.0]) + 1e-5).all()


def moves_with_the_picture(impl):
    """Frame f is frame 0 moved by f (a, b): the hard flow of (i, j) is (j - i) (a, b) wherever that is inside, 0 for i = j, and the way
    back undoes it."""
    frames, height, width, by = 3, 9, 11, (2, -1)
    picture = torch.nn.functional.normalize(draw(height + 8, width + 8, 64), dim=-1)
    video = torch.stack([
        picture[4 - f * by[1] : 4 - f * by[1] + height, 4 - f * by[0] : 4 - f * by[0] + width] for f in range(frames)
    ])  # fmt: skip
    q = 8 * video.flatten(0, 2).view(1, -1, 2, 32).transpose(1, 2)
    c = places(height, width)
    for heads in ("logit_mean", "prob_mean"):
        hard = flow(q, q, (frames, height, width), impl, mode="hard", heads=heads).unflatten(0, (frames, frames))
        for i in range(frames):
            for j in range(frames):
                want = torch.tensor([(j - i) * by[0], (j - i) * by[1]], dtype=torch.float64)
                to = c + want
                inside = ((to >= 0) & (to <= torch.tensor([width - 1, height - 1]))).all(-1)
                assert inside.any() and torch.equal(hard[i, j][inside].double(), want.expand(int(inside.sum()), -1)), (heads, i, j)
                back = hard[j, i][(to[inside] @ torch.tensor([1.0, width], dtype=torch.float64)).long()]
                assert torch.equal(back, -hard[i, j][inside])


def mirrors(impl):
    """A flip of both videos mirrors the map and negates dx; reversed time swaps the frames of a pair."""
    grid = (3, 4, 5)
    q, k = (draw(1, 2, 60, 16, seed=s) for s in (1, 2))
    shape = lambda t: t.unflatten(2, grid)
    base = flow(q, k, grid, impl).view(3, 3, 4, 5, 2)
    flipped = flow(*(shape(t).flip(4).flatten(2, 4) for t in (q, k)), grid, impl).view(3, 3, 4, 5, 2)
    assert (flipped.flip(3) * torch.tensor([-1.0, 1.0]) - base).abs().max() < 1e-4
    back = flow(*(shape(t).flip(2).flatten(2, 4) for t in (q, k)), grid, impl).view(3, 3, 4, 5, 2)
    assert (back.flip(0, 1) - base).abs().max() < 1e-4
    assert (back - base).abs().max() > 0.1


def variants_differ(impl):
    """On random data A, B and C are three things; with one head they are one."""
    grid = (2, 4, 5)
    q, k = (4 * draw(1, 4, 40, 16, seed=s) for s in (1, 2))
    flows = [flow(q, k, grid, impl, heads=h) for h in VARIANTS[:3]]
    assert all((flows[a] - flows[b]).abs().max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))
    flows = [flow(q[:, :1], k[:, :1], grid, impl, heads=h) for h in VARIANTS]
    assert all((f - flows[0]).abs().max() < 1e-5 for f in flows)
    apart = flow(q, k, grid, impl, heads="none")
    assert apart.shape == (4, 4, 20, 2) and (apart.mean(0) - flow(q, k, grid, impl, heads="prob_mean")).abs().max() < 1e-5


def heads_are_a_set(impl):
    """The order of the heads does not matter; nor, for A, a rotation of the channels of all heads together."""
    grid = (2, 3, 5)
    q, k = (2 * draw(1, 4, 30, 16, seed=s) for s in (1, 2))
    order = torch.tensor([2, 0, 3, 1])
    for heads in VARIANTS:
        a, b = flow(q, k, grid, impl, heads=heads), flow(q[:, order], k[:, order], grid, impl, heads=heads)
        assert ((a[order] if heads == "none" else a) - b).abs().max() < 1e-5
    turn = torch.linalg.qr(draw(64, 64, seed=5, dtype=torch.float64))[0].float()
    turned = [(t.transpose(1, 2).flatten(2) @ turn).unflatten(2, (4, 16)).transpose(1, 2) for t in (q, k)]
    assert (flow(*turned, grid, impl) - flow(q, k, grid, impl)).abs().max() < 1e-4


def rows_without_gradient_count_for_nothing(impl):
    """A row whose gradient is zero for a pair may hold NaN there; a NaN that counts reaches what sees it and nothing else."""
    grid, size, nan = (3, 4, 5), 20, float("nan")
    clean = [draw(1, 2, 60, 16, seed=s) for s in (1, 2)]
    for heads in ("logit_mean", "none"):
        weight = draw(*flow(*clean, grid, impl, heads=heads).shape, seed=3)
        weight[..., :, 7, :] = 0  # query patch 7 in no pair
        weight[..., 5, :, :] = 0  # pair (1, 2) not at all

        def grads(q, k):
            leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
            return torch.autograd.grad(flow(*leaves, grid, impl, heads=heads), leaves, weight.nan_to_num())

        want = grads(*clean)
        q = clean[0].clone()
        q[:, :, 7::size] = nan
        for a, b in zip(grads(q, clean[1]), want):
            assert (a - b).abs().max() < 1e-6, f"{heads}: changed by rows that do not count"
        q = clean[0].clone()
        q[:, :, size + 3] = nan  # counts for pairs (1, 0) and (1, 1)
        dq, dk = grads(q, clean[1])
        others = torch.arange(60) != size + 3
        assert (dq - want[0])[:, :, others].abs().max() < 1e-6 and dq[:, :, ~others].isnan().all()
        assert dk[:, :, : 2 * size].isnan().all() and (dk - want[1])[:, :, 2 * size :].abs().max() < 1e-6
        k = clean[1].clone()
        k[:, :, 2 * size + 4] = nan  # a key of frame 2
        got = flow(clean[0], k, grid, impl, heads=heads)
        bad = got.isnan().all(-1).unflatten(-2, (3, 3))
        assert bad[..., 2, :].all() and not got.unflatten(-3, (3, 3))[..., :2, :, :].isnan().any()
        dq, dk = grads(clean[0], k)
        assert (dq - want[0])[:, :, size + 7].abs().max() < 1e-6, "a key leaked into a row without gradient"
        assert (dk - want[1])[:, :, : 2 * size].abs().max() < 1e-6


def loss_is_its_formula(impl):
    """1 / (2 M) times the masked squares; 0 with zero gradients where nothing moves; whatever is outside the mask."""
    grid = (4, 3, 5)
    leaves = [(2 * draw(1, 2, 60, 16, seed=s)).requires_grad_() for s in (1, 2)]
    hard = flow(leaves[1].detach(), leaves[0].detach(), grid, impl, mode="hard")
    moving = hard.square().sum(-1) > 0
    want = oracle(leaves[0][0], leaves[1][0], grid)["flow"]
    want = ((want - hard).square().sum(-1) * moving).sum() / (2 * moving.sum())
    got = vidkern.amf_loss(*leaves, hard, grid=grid, impl=impl)
    assert abs(got - want) < 1e-4 * want
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1)
    given = torch.rand(16, 15, generator=torch.Generator().manual_seed(4)) > 0.7
    spoiled = hard.masked_fill(~given[..., None], torch.nan)
    got = vidkern.amf_loss(*leaves, spoiled, given, grid=grid, impl=impl)
    clean = vidkern.amf_loss(*leaves, hard, given, grid=grid, impl=impl)
    assert torch.equal(got, clean)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in torch.autograd.grad(got, leaves))
    for reference, mask in ((torch.zeros_like(hard), None), (hard, torch.zeros(16, 15, dtype=torch.bool))):
        none = vidkern.amf_loss(*leaves, reference, mask, grid=grid, impl=impl)
        assert none == 0 and all((g == 0).all() for g in torch.autograd.grad(none, leaves))


CHECKS = (
    is_the_oracle, has_the_gradient, of_equal_logits, of_any_scale, ties_go_to_the_lowest, keys_of_a_frame_may_move_together, sharp_is_hard,
    moves_with_the_picture, mirrors, variants_differ, heads_are_a_set, rows_without_gradient_count_for_nothing, loss_is_its_formula,
)  # fmt: skip
