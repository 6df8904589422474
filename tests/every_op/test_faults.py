"""Fault injection: each wrong implementation that is seen or likely in practice fails at least one check of this suite.

A fault is the reference with one mistake, registered as a backend; the checks are the ones that the other tests run.
"""

import numpy as np
import pytest
import torch

from vidkern import registry
from vidkern.ops import grid_attention as room_of_attention
from vidkern.ops.grid_attention import FramePattern, reference
from vidkern.ops.grid_attention.cost import Sample

from . import checks

CROSS = Sample("cross", 1, 2, 2, 64, (3, 4), 9)
MASKED = Sample("masked", 2, 2, 2, 64, (3, 4), 9, with_valid=True, with_kv_len=True)
DIM64 = Sample("dim64", 1, 2, 1, 64, (2, 3), 16)


def with_pattern(change):
    """The right computation on a wrongly built frame pattern."""
    def forward(q, k, v, *masks, pattern, **shared):
        return reference.forward(q, k, v, *masks, pattern=FramePattern.from_mask(change(pattern)), **shared)

    def backward(*args, pattern, **shared):
        return reference.backward(*args, pattern=FramePattern.from_mask(change(pattern)), **shared)

    return forward, backward


def drop_own(pattern):
    mask = pattern.frame_mask().copy()
    np.fill_diagonal(mask, False)
    return mask


def swap_view_and_time(pattern):
    """The mask of a (T, V) grid on tokens of a (V, T) grid."""
    from vidkern import GridPattern

    return GridPattern(pattern.times, pattern.views).frame_mask()


def time_major(pattern):
    """Tokens read as time-major, mask view-major."""
    order = np.arange(pattern.n_frames).reshape(pattern.views, pattern.times).T.flatten()
    return pattern.frame_mask()[np.ix_(order, order)]


def forget_last_run(pattern):
    mask = pattern.frame_mask().copy()
    mask[:, -1] = np.eye(pattern.n_frames, dtype=bool)[:, -1]
    return mask


def dense_logits(q, k, pattern, frame_len, scale):
    frame = torch.arange(q.shape[2]) // frame_len
    mask = torch.from_numpy(pattern.frame_mask().copy())[frame][:, frame]
    group = q.shape[1] // k.shape[1]
    return scale * q @ k.repeat_interleave(group, 1).transpose(-1, -2), mask, group


def literal_product(q, k, v, *masks, pattern, frame_len, n_text, text_front, scale):
    """Logits multiplied by the 0/1 mask, as the paper typesets it: hidden keys keep weight exp(0)."""
    logits, mask, group = dense_logits(q, k, pattern, frame_len, scale)
    logits = logits * mask
    return logits.softmax(-1) @ v.repeat_interleave(group, 1), logits.logsumexp(-1).float()


def two_denominators(q, k, v, *masks, pattern, frame_len, **shared):
    """Same-view attention plus same-time attention, each with a softmax of its own."""
    results = []
    for name in ("view", "time"):
        from vidkern import GridPattern

        part = GridPattern(pattern.views, pattern.times, include=("self", name))
        results.append(reference.forward(q, k, v, *masks, pattern=part, frame_len=frame_len, **shared))
    return results[0][0] + results[1][0], torch.logaddexp(results[0][1], results[1][1])


def own_frame_twice(q, k, v, *masks, pattern, frame_len, n_text, text_front, scale):
    """Row and column lists joined without removing the own frame from one of them."""
    logits, mask, group = dense_logits(q, k, pattern, frame_len, scale)
    frame = torch.arange(q.shape[2]) // frame_len
    twice = (frame[:, None] == frame).to(q.dtype) * torch.log(torch.tensor(2.0))
    logits = (logits + twice).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v.repeat_interleave(group, 1), logits.logsumexp(-1).float()


def off_by_one_start(q, k, v, *masks, pattern, frame_len, n_text, text_front, scale):
    """Every key run starts one token late and so ends one token late."""
    return reference.forward(q, k.roll(-1, 2), v.roll(-1, 2), *masks, pattern=pattern, frame_len=frame_len, n_text=n_text,
                             text_front=text_front, scale=scale)


def finite_sentinel(q, k, v, *masks, pattern, frame_len, n_text, text_front, scale):
    """Hidden logits get -1e4 instead of -inf: rows of very negative logits, and empty rows, see what is hidden."""
    logits, mask, group = dense_logits(q, k, pattern, frame_len, scale)
    keys, rows = reference.liveness(*masks, n_frames=pattern.n_frames, frame_len=frame_len, n_text=0, text_front=True, device=q.device)
    logits = logits.masked_fill(~(mask & keys[:, None, None, :] & rows[:, None, :, None]), -1e4)
    return logits.softmax(-1) @ v.repeat_interleave(group, 1), logits.logsumexp(-1).float()


def base_two_lse(*args, **shared):
    out, lse = reference.forward(*args, **shared)
    return out, lse * 1.4426950408889634


def unwritten_rows(*args, **shared):
    out, lse = reference.forward(*args, **shared)
    out[:, :, -1] = torch.nan
    return out, lse


def wrong_dk(*args, **shared):
    dq, dk, dv = reference.backward(*args, **shared)
    return dq, dk * 2, dv


def forgets_dlse(dout, dlse, *args, **shared):
    return reference.backward(dout, None, *args, **shared)


def one_head_of_the_group(dout, dlse, q, k, v, out, lse, *args, **shared):
    """GQA gradients from the first query head of each group only."""
    group = q.shape[1] // k.shape[1]
    keep = torch.zeros_like(q)
    keep[:, ::group] = 1
    _, dk, dv = reference.backward(dout * keep, None, q, k, v, out, lse, *args, **shared)
    return reference.backward(dout, dlse, q, k, v, out, lse, *args, **shared)[0], dk, dv


def keeps_hidden_frames(q, k, v, valid, kv_len, text_len, **shared):
    return reference.forward(q, k, v, None, kv_len, text_len, **shared)


def ignores_kv_len(q, k, v, valid, kv_len, text_len, **shared):
    return reference.forward(q, k, v, valid, None, text_len, **shared)


FAULTS = {
    "drops the own frame": with_pattern(drop_own),
    "swaps V and T": with_pattern(swap_view_and_time),
    "time-major tokens under a view-major mask": with_pattern(time_major),
    "forgets the last frame as a key": with_pattern(forget_last_run),
    "multiplies the logits by the mask": (literal_product, reference.backward),
    "two denominators": (two_denominators, reference.backward),
    "counts the own frame twice": (own_frame_twice, reference.backward),
    "segment start off by one": (off_by_one_start, reference.backward),
    "finite sentinel for hidden logits": (finite_sentinel, reference.backward),
    "log2 instead of natural log": (base_two_lse, reference.backward),
    "a row that is never written": (unwritten_rows, reference.backward),
    "dK doubled": (reference.forward, wrong_dk),
    "no gradient through the lse": (reference.forward, forgets_dlse),
    "GQA gradient of one head only": (reference.forward, one_head_of_the_group),
    "valid ignored": (keeps_hidden_frames, reference.backward),
    "kv_len ignored": (ignores_kv_len, reference.backward),
}
CHECKS = {
    "accuracy": lambda: [checks.accuracy("grid_attention", s, torch.float32, "faulty") for s in (CROSS, MASKED, DIM64)],
    "counting": lambda: checks.counting(CROSS, torch.float32, "faulty"),
    "hidden memory": lambda: checks.hidden_memory(MASKED, torch.float32, "faulty", float("nan")),
    "inclusion-exclusion": lambda: checks.inclusion_exclusion(2, 3, 7, 64, torch.float32, "faulty"),
}


def failing(forward, backward) -> list[str]:
    """Names of the checks that a backend made of these two functions fails."""
    def run_forward(*args, out, lse, **shared):
        for target, value in zip((out, lse), forward(*args, **shared)):
            target.copy_(value)

    def run_backward(*args, dq, dk, dv, **shared):
        for target, value in zip((dq, dk, dv), backward(*args, **shared)):
            target.copy_(value)

    op = registry.ops()["grid_attention"]
    op._by_name["faulty"] = registry.Backend(
        "faulty", lambda *args: None, room_of_attention._run_with(run_forward), room_of_attention._run_backward_with(run_backward)
    )
    worst = dict(checks.WORST)
    failed = []
    try:
        for name, check in CHECKS.items():
            try:
                check()
            except AssertionError:
                failed.append(name)
    finally:
        del op._by_name["faulty"]
        checks.WORST.clear()
        checks.WORST.update(worst)
    return failed


def test_the_right_implementation_passes_every_check():
    assert failing(reference.forward, reference.backward) == []


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    assert failing(*FAULTS[name]), f"no check notices a backend that is wrong: {name}"


def test_counting_the_own_frame_twice_shifts_the_lse_by_a_known_amount():
    """q = 0: log((K + N) / K)."""
    q = torch.zeros(1, 1, 12 * 9, 64)
    shared = dict(pattern=CROSS.frames, frame_len=9, n_text=0, text_front=True, scale=0.125)
    _, twice = own_frame_twice(q, q, q, None, None, None, **shared)
    _, once = reference.forward(q, q, q, None, None, None, **shared)
    torch.testing.assert_close(twice - once, torch.full_like(once, (7 / 6)).log(), rtol=1e-4, atol=1e-5)
