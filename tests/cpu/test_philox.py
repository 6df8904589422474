"""The noise generator: known answers, the same integers everywhere, and normals within a few ulp."""

import math

import pytest
import torch

from vidkern.ops.pyramid import philox

_cpu = pytest.importorskip("vidkern._cpu")

from vidkern.ops.pyramid import cpu  # noqa: E402

# Philox4x32-10 of the Random123 distribution (kat_vectors): counter, key -> words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 1, 7, 11), (1, 2, 2, 16, 16), (3, 1, 1, 1, 257), (1, 5, 3, 40, 40)]


@pytest.fixture(params=_cpu.isas())
def tier(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def by_hand(counter, key):
    """The definition in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    assert by_hand(counter, key) == words
    assert tuple(int(w) for w in philox.philox4x32(counter, key)) == words


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_the_same_everywhere(tier, shape):
    """Every word of every tier equals the reference and, spot by spot, the definition: seed, level, sample and offset all count."""
    seed, level, offset, first = (1 << 62) + 12345678901, 2, 4_000_000_000, 4_294_967_290
    got = cpu.normals(shape, seed=seed, level=level, offset=offset, first_sample=first, raw=True).long() & 0xFFFFFFFF
    n = math.prod(shape[1:])
    for b in range(shape[0]):
        want = philox.words(n, seed=seed, level=level, sample=first + b, offset=offset)
        assert torch.equal(got[b].flatten(), want)
    e = n - 1
    assert int(got[0].flatten()[e]) == by_hand((e // 4, level, first, offset), (seed & 0xFFFFFFFF, seed >> 32))[e % 4]


def ulps(a, b):
    """Distance in units of the larger one's last place, of float32."""
    size = torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(torch.float32).tiny).double()
    return (a.double() - b.double()).abs() / torch.exp2(torch.floor(torch.log2(size)) - 23)


def test_normals_agree_within_four_ulp_of_their_own_size(tier):
    shape = (4, 3, 1, 128, 160)
    got = cpu.normals(shape, seed=11, level=1)
    want = philox.normal(shape, seed=11, level=1, offset=0, first_sample=0, dtype=torch.float32, device="cpu")
    assert ulps(got, want).max() <= 4
    assert ulps(got * (1 + 1e-6), want).max() > 4


def test_every_uniform_is_exact_and_every_quarter_turn_too():
    w = torch.tensor([[0xFFFFFFFF, 0], [0, 1 << 30], [0, 1 << 31], [0, 3 << 30]])
    u, angle = philox.uniforms(w, torch.float32)
    assert u.tolist() == [1.0, 2.0**-24, 2.0**-24, 2.0**-24] and angle.tolist() == [0.0, 0.25, 0.5, 0.75]
    normals = philox.box_muller(w)
    radius = math.sqrt(48 * math.log(2))
    assert normals[0].tolist() == [0.0, 0.0]
    expected = torch.tensor([[0, 1], [-1, 0], [0, -1]], dtype=torch.float64) * radius
    torch.testing.assert_close(normals[1:], expected, atol=0, rtol=1e-15)


def test_moments_and_independence():
    """Mean, variance, skew, kurtosis and the correlation of neighbours and of levels, each within five standard errors."""
    shape = (1, 1, 1, 512, 1024)
    a, b = (cpu.normals(shape, seed=3, level=s).flatten().double() for s in (0, 1))
    n = a.numel()
    for value, expected, deviation in (
        (a.mean(), 0, 1), (a.square().mean(), 1, 2**0.5), ((a**3).mean(), 0, 15**0.5), ((a**4).mean(), 3, 96**0.5),
        ((a[:-1] * a[1:]).mean(), 0, 1), ((a[:-2] * a[2:]).mean(), 0, 1), ((a * b).mean(), 0, 1),
    ):  # fmt: skip
        assert abs(value - expected) < 5 * deviation / n**0.5


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(cpu.normals((2, 4, 1, 64, 96), seed=5, level=0))
    torch.set_num_threads(before)
    assert torch.equal(*results)
