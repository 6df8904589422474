"""Philox4x32-10 and Box-Muller in Triton; csrc/common/philox.h defines both, and this follows its order of operations."""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def unsigned(x):
    """The 32 bits of a launcher's integer as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def words(block, level, sample, offset, key0, key1):
    """Four words of the counters (block, level, sample, offset), all uint32."""
    c0 = block.to(tl.uint32)
    none = tl.zeros_like(c0)
    c1 = none + level
    c2 = none + sample
    c3 = none + offset
    k0 = none + key0
    k1 = none + key1
    m0 = none + _M0
    m1 = none + _M1
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, m0)
        lo0 = c0 * m0
        hi1 = tl.umulhi(c2, m1)
        lo1 = c2 * m1
        c0 = hi1 ^ c1 ^ k0
        c2 = hi0 ^ c3 ^ k1
        c1 = lo1
        c3 = lo0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def radius(word):
    """sqrt(-2 ln u), u = ((word >> 8) + 1) / 2^24."""
    bits = ((word >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    e = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32) - 24.0
    p = tl.full(f.shape, -0.076344929635524750, tl.float32)
    p = tl.fma(p, f, 0.12761574983596802)
    p = tl.fma(p, f, -0.13160182535648346)
    p = tl.fma(p, f, 0.14201758801937103)
    p = tl.fma(p, f, -0.16623356938362122)
    p = tl.fma(p, f, 0.20001226663589478)
    p = tl.fma(p, f, -0.25000819563865662)
    p = tl.fma(p, f, 0.33333331346511841)
    s = f * f
    p = (f * s) * p
    p = tl.fma(n, -2.12194440e-4, p)
    p = tl.fma(s, -0.5, p)
    ln = tl.fma(n, 0.693359375, f + p)
    return tl.sqrt_rn(-2.0 * ln)


@triton.jit
def sine_cosine(word):
    """Of (word >> 8) / 2^24 turns; the sines of whole quarters are exact."""
    a = (word >> 8).to(tl.int32)
    quarter = (a + 2097152) >> 22
    f = (a - (quarter << 22)).to(tl.float32) * 5.9604644775390625e-8
    s = f * f
    ps = tl.fma(s, -75.445602416992188, 81.593765258789062)
    ps = tl.fma(ps, s, -41.341670989990234)
    pc = tl.fma(s, 59.229244232177734, -85.443237304687500)
    pc = tl.fma(pc, s, 64.939323425292969)
    pc = tl.fma(pc, s, -19.739208221435547)
    sn = tl.fma(f, 6.28318548202514648, f * tl.fma(ps, s, -1.74845553146951715e-7))
    cs = tl.fma(pc, s, 1.0)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, cs, sn)
    cosine = tl.where(odd, sn, cs)
    return tl.where((quarter & 2) != 0, -sine, sine), tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def normal(element, level, sample, offset, key0, key1):
    """Noise of any elements of one level of one sample: a block of words for each."""
    w0, w1, w2, w3 = words(element >> 2, level, sample, offset, key0, key1)
    second = (element & 2) != 0
    sine, cosine = sine_cosine(tl.where(second, w3, w1))
    return radius(tl.where(second, w2, w0)) * tl.where((element & 1) != 0, sine, cosine)


@triton.jit
def normals4(first, level, sample, offset, key0, key1):
    """Noise of the four elements from each of ``first`` on (multiples of four), one after the other: [4 * len(first)]."""
    w0, w1, w2, w3 = words(first >> 2, level, sample, offset, key0, key1)
    s0, c0 = sine_cosine(w1)
    s1, c1 = sine_cosine(w3)
    r0 = radius(w0)
    r1 = radius(w2)
    four = tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1))
    return tl.reshape(four, [4 * first.shape[0]])
