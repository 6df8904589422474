"""What the Triton kernels of the motion flow share: where a key lies in its frame, where operands are, and how a tile of products is
folded into what is known of its rows. Strides and channels are handed over divided by UNIT (8 wherever all are multiples of 8), so that the
compiler knows how rows are aligned without a build per shape."""

from __future__ import annotations

import triton
import triton.language as tl

IEEE = tl.constexpr("ieee")  # float32 inputs are not rounded to TF32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-3e38)  # stands for -inf where a difference of two of them must not be NaN
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def coordinates(key, width, inverse):
    """(x, y) of a key's place in its frame, by a product with 1 / width: half a patch from any integer, exact below 2**22 keys."""
    place = key.to(tl.float32)
    y = tl.floor((place + 0.5) * inverse)
    return place - y * width, y


@triton.jit
def along(count, step, UNIT: tl.constexpr):
    """Offset of ``count`` strides, in 64 bits."""
    return tl.cast(count, tl.int64) * step * UNIT


@triton.jit
def rows_at(row, step, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of rows of one head; WIDE: they need 64 bits."""
    if WIDE:
        return row.to(tl.int64) * step * UNIT
    else:
        return row * step * UNIT


@triton.jit
def tile_product(q_row, k_row, q_in, k_in, step_qh, step_kh, first, last, per_head, dim, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Products [rows, keys] summed over chunks ``first`` to ``last`` - 1 of the concatenated heads. q_row [rows, 1] and k_row [1, keys] point to
    the first head's values; a head has ``per_head`` chunks, and the next one is a stride away: nothing is copied together."""
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(first, last):
        head = c // per_head
        at = (c - head * per_head) * BLOCK_K
        q_ptr = q_row + (along(head, step_qh, UNIT) + at) + lane[None, :]
        k_ptr = k_row + (along(head, step_kh, UNIT) + at) + lane[:, None]
        if EVEN_K:
            q = tl.load(q_ptr, mask=q_in[:, None], other=0.0)
            k = tl.load(k_ptr, mask=k_in[None, :], other=0.0)
        else:
            inside = at + lane < dim
            q = tl.load(q_ptr, mask=q_in[:, None] & inside[None, :], other=0.0)
            k = tl.load(k_ptr, mask=k_in[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(q.to(DOT), k.to(DOT), acc, input_precision=IEEE)
    return acc


@triton.jit
def ranked(product, seen, SIGN: tl.constexpr):
    """Products in the order of the logits (SIGN of the scale: 1, -1 or 0), -inf for keys that are not there. Which is largest is decided
    before the scale, whose rounding would make ties."""
    if SIGN == -1:
        product = -product
    if SIGN == 0:
        product = tl.zeros_like(product)
    return tl.where(seen[None, :], product, float("-inf"))


@triton.jit
def fold_best(value, high, key, best, where):
    """The largest value so far and the lowest key that has it; tiles come in ascending order."""
    found = tl.min(tl.where(value == high[:, None], key[None, :], NOWHERE), 1)
    where = tl.where(high > best, found, where)
    return tl.maximum(best, high), where


@triton.jit
def fold_soft(value, high, key, scale_log2, width, inverse, top, total, sum_x, sum_y, tilt, MEAN: tl.constexpr, ENTROPY: tl.constexpr):
    """Online softmax in base 2 of a tile: largest logit, sum of exponentials e, sums of e x and e y, and of e (logit - largest)."""
    new = tl.maximum(top, high * scale_log2)
    below = value * scale_log2 - new[:, None]
    e = tl.exp2(below)
    shrink = tl.exp2(top - new)
    if ENTROPY:
        tilt = shrink * (tilt + total * (top - new)) + tl.sum(e * tl.maximum(below, LEAST), 1)
    total = total * shrink + tl.sum(e, 1)
    if MEAN:
        x, y = coordinates(key, width, inverse)
        sum_x = sum_x * shrink + tl.sum(e * x[None, :], 1)
        sum_y = sum_y * shrink + tl.sum(e * y[None, :], 1)
    return new, total, sum_x, sum_y, tilt
