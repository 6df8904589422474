"""What the Triton kernels of the pyramids share: where values lie, block means, and the weights of the filters.

A level is a tensor whose samples are dense, or columns of a token matrix. Elements count the values of one sample in the order channel,
time, row, column.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(e, T, H, W):
    """(channel, time, row, column) of elements of a level."""
    x = e % W
    r = e // W
    y = r % H
    r = r // H
    return r // T, r % T, y, x


@triton.jit
def place(e, b, T, H, W, batch, row, column, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of elements of sample b: ``batch`` between samples and, for patches (PT, PH, PW), ``row`` between tokens and ``column`` =
    the level's first one. PT is 0 for a level in memory of its own."""
    at = b.to(tl.int64) * batch + e
    if PT > 0:
        c, t, y, x = decode(e, T, H, W)
        token = (t // PT * (H // PH) + y // PH) * (W // PW) + x // PW
        k = ((c * PT + t % PT) * PH + y % PH) * PW + x % PW
        at = b.to(tl.int64) * batch + token.to(tl.int64) * row + (column + k)
    return at


@triton.jit
def alive(MASK, mask_b, b, s, active, HAS_MASK: tl.constexpr):
    """Whether level s of sample b takes part."""
    result = s < active
    if HAS_MASK:
        result = result & (tl.load(MASK + b * mask_b + s) != 0)
    return result


@triton.jit
def grab(P, at, mask):
    """Values as float32, zeros where ``mask`` is off: nothing is read there."""
    return tl.load(P + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(P, at, value, mask):
    """Store in the memory's dtype where ``mask`` is on."""
    tl.store(P + at, value.to(P.dtype.element_ty), mask=mask)


@triton.jit
def clamp(i, n):
    """Into 0 .. n - 1: edges repeat."""
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def block_sum(X, c, t, y, x, x_c, x_t, x_y, mask, Q: tl.constexpr, QT: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr):
    """Sum of the block of QT x Q x Q values at block position (t, y, x) of channel c; all of one shape [n].

    RUN: single values (Q = 1) come in such runs. EVEN: blocks begin at even offsets.
    """
    at = c * x_c + (t * QT) * x_t + (y * Q) * x_y + x * Q
    # Hints have to stand where the offsets are made.
    if Q == 1:
        if RUN > 1:
            at = tl.max_contiguous(tl.multiple_of(at, RUN), RUN)
        total = grab(X, at, mask)
    else:
        if EVEN:
            at = tl.multiple_of(at, 2)
        columns = at[:, None] + tl.arange(0, Q)[None, :]
        rows = grab(X, columns, mask[:, None])
        if QT * Q <= 4:
            for i in tl.static_range(1, QT * Q):
                rows += grab(X, columns + (i % QT * x_t + i // QT * x_y), mask[:, None])
        else:
            for i in range(1, QT * Q):
                rows += grab(X, columns + (i % QT * x_t + i // QT * x_y), mask[:, None])
        total = tl.sum(rows, 1)
    return total


@triton.jit
def quarter_way(near, far):
    """3/4 near + 1/4 far; the product is exact."""
    return near + 0.25 * (far - near)


@triton.jit
def interleave(even, odd):
    """Values of even and of odd positions as one run."""
    return tl.reshape(tl.join(even, odd), [2 * even.shape[0]])
