"""Tensor maps: what the driver is asked to encode, what is refused before, and what is kept."""

import ctypes
import gc
import weakref

import pytest
import torch
from fake_cuda import FakeCuda, FakeDriver

from vidkern import cuda
from vidkern.cuda import launcher as layer
from vidkern.cuda.tensor_map import TensorMap, parameters


@pytest.fixture
def cu():
    return FakeCuda()


@pytest.fixture
def launch(cu):
    return cuda.Launcher(FakeDriver(cu))


def tokens(batch=2, length=5, heads=3, dim=72, dtype=torch.bfloat16):
    """[batch, length, heads, dim], and sizes and strides as a launcher gives them: dim, length, heads, batch."""
    t = torch.zeros(batch, length, heads, dim, dtype=dtype)
    return t, (dim, length, heads, batch), (heads * dim, dim, length * heads * dim)


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "BFLOAT16"), (torch.float16, "FLOAT16")])
def test_what_the_driver_is_asked_for(launch, cu, dtype, kind):
    t, sizes, strides = tokens(dtype=dtype)
    found = launch.tensor_map(t, sizes, strides, (64, 16, 2, 1))
    (given,) = cu.maps
    assert (given.kind, given.address, given.sizes, given.box, given.steps) == (kind, t.data_ptr(), sizes, (64, 16, 2, 1), (1, 1, 1, 1))
    assert given.strides == tuple(2 * s for s in strides), "in bytes"
    assert given.swizzle == "CU_TENSOR_MAP_SWIZZLE_128B" and given.interleave == "CU_TENSOR_MAP_INTERLEAVE_NONE"
    assert given.fill == "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE", "zeros"
    assert given.to % 64 == 0 and bytes(found) == (1).to_bytes(128, "little") and isinstance(found, TensorMap)


def test_every_map_is_written_where_the_driver_may(launch, cu):
    """CUDA 13 declares 128 bytes."""
    t = torch.zeros(4096, dtype=torch.bfloat16)
    found = [launch.tensor_map(t[8 * i :], (64, 2), (64,), (64, 2)) for i in range(40)]
    assert [given.to % 128 for given in cu.maps] == [0] * 40
    gc.collect()
    assert [m.words[0] for m in found] == list(range(1, 41)), "each has memory of its own"


@pytest.mark.parametrize("dim, promotion", [(64, "128B"), (96, "128B"), (127, "128B"), (128, "256B"), (1024, "256B")])
def test_rows_of_a_cache_line_are_read_whole(launch, cu, dim, promotion):
    launch.tensor_map(torch.zeros(8, dtype=torch.float16), (dim, 3), (1024,), (64, 3))
    assert cu.maps[0].promotion == f"CU_TENSOR_MAP_L2_PROMOTION_L2_{promotion}"


def test_a_stride_that_is_not_used_may_be_anything(launch, cu):
    """torch gives dimensions of one element any stride."""
    launch.tensor_map(torch.zeros(8, dtype=torch.float16), (64, 1, 5, 1), (3, 64, 7), (64, 1, 5, 1))
    assert cu.maps[0].strides == (16, 128, 16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t": torch.zeros(64)}, "t: dtype torch.float32, expected torch.bfloat16 or torch.float16"),
        ({"t": torch.zeros(64, dtype=torch.bfloat16)[4:]}, r"t: begins at 0x\w+8, expected a multiple of 16 bytes"),
        ({"sizes": (64,) * 6}, r"sizes: \(64, 64, 64, 64, 64, 64\), expected 1 to 5 numbers from 1 to 2\*\*32"),
        ({"sizes": ()}, r"sizes: \(\), expected 1 to 5 numbers"),
        ({"sizes": (64, 0)}, r"sizes: \(64, 0\), expected"),
        ({"sizes": (64, 2**32 + 1)}, r"sizes: \(64, 4294967297\), expected"),
        ({"strides": (68,)}, r"strides: \(68,\), expected 1 multiples of 8 elements above 0, of all dimensions but the first"),
        ({"strides": (-64,)}, r"strides: \(-64,\), expected"),
        ({"strides": (0,)}, r"strides: \(0,\), expected"),
        ({"strides": (2**39,)}, r"strides: \(549755813888,\), expected"),
        ({"strides": (64, 64)}, r"strides: \(64, 64\), expected 1 multiples"),
        ({"strides": ()}, r"strides: \(\), expected"),
        ({"box": (72, 4)}, r"box: \(72, 4\), expected 2 sides from 1 to 256, the first a multiple of 8 up to 64"),
        ({"box": (60, 4)}, r"box: \(60, 4\), expected"),
        ({"box": (64, 257)}, r"box: \(64, 257\), expected"),
        ({"box": (64, 0)}, r"box: \(64, 0\), expected"),
        ({"box": (64,)}, r"box: \(64,\), expected"),
    ],
)
def test_what_cannot_be_described_is_refused(launch, cu, changes, message):
    given = {"t": torch.zeros(4096, dtype=torch.bfloat16), "sizes": (64, 64), "strides": (64,), "box": (64, 4), **changes}
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        launch.tensor_map(**given)
    assert not cu.maps and "\n" not in str(raised.value)


def test_the_ends_of_what_is_allowed(launch, cu):
    t = torch.zeros(8, dtype=torch.bfloat16)
    launch.tensor_map(t, (2**32,), (), (8,))
    launch.tensor_map(t, (1, 2, 2, 2, 2), (8, 8, 16, 2**39 - 8), (64, 256, 256, 1, 1))
    assert [len(m.sizes) for m in cu.maps] == [1, 5]


# ---- what is kept -------------------------------------------------------------------------------------------------------
def test_the_same_numbers_are_encoded_once(launch, cu):
    t, sizes, strides = tokens()
    first = launch.tensor_map(t, sizes, strides, (64, 16, 1, 1))
    assert launch.tensor_map(t.clone().set_(t), list(sizes), list(strides), [64, 16, 1, 1]) is first and len(cu.maps) == 1
    for changed in (
        (t[1:], sizes, strides, (64, 16, 1, 1)), (t, sizes[:3] + (1,), strides, (64, 16, 1, 1)), (t, sizes, (*strides[:2], 8), (64, 16, 1, 1)),
        (t, sizes, strides, (64, 8, 1, 1)), (t.view(torch.float16), sizes, strides, (64, 16, 1, 1)),
    ):  # fmt: skip
        assert launch.tensor_map(*changed).words[0] == len(cu.maps)
    assert len(cu.maps) == 6


def test_numbers_are_kept_and_not_tensors(launch, cu):
    t, sizes, strides = tokens()
    launch.tensor_map(t, sizes, strides, (64, 16, 1, 1))
    seen = weakref.ref(t)
    del t
    gc.collect()
    assert seen() is None


def test_no_more_than_so_many(launch, cu):
    t = torch.zeros(8, dtype=torch.bfloat16)
    for n in range(1, layer.MAPS + 10):
        launch.tensor_map(t, (64, n), (64,), (64, 1))
    assert launch._maps.cache_info().currsize == layer.MAPS
    launch.tensor_map(t, (64, 1), (64,), (64, 1))
    assert len(cu.maps) == layer.MAPS + 10, "the oldest was dropped"


# ---- the driver ---------------------------------------------------------------------------------------------------------
def test_the_function_is_looked_up_once(launch, cu):
    for n in (2, 3):
        launch.tensor_map(torch.zeros(8, dtype=torch.bfloat16), (64, n), (64,), (64, 1))
    assert cu.count("cuGetProcAddress") == 1 and len(cu.maps) == 2


@pytest.mark.parametrize("error", [3, 201])
def test_a_thread_without_a_context_is_given_one(launch, cu, error):
    cu.fails["cuTensorMapEncodeTiled"] = [error]
    launch.tensor_map(torch.zeros(8, dtype=torch.bfloat16), (64, 2), (64,), (64, 1))
    assert len(cu.maps) == 1 and cu.count("cuCtxSetCurrent") == 1


def test_what_the_driver_refuses_is_said(launch, cu):
    cu.fails["cuTensorMapEncodeTiled"] = [1]
    message = r"^cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE for sizes \(64, 2\), strides \(64,\), box \(64, 1\) at 0x"
    t = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        launch.tensor_map(t, (64, 2), (64,), (64, 1))
    launch.tensor_map(t, (64, 2), (64,), (64, 1))
    assert len(cu.maps) == 1, "a refusal is not kept"


def test_a_driver_without_it(launch, cu):
    cu.fails["cuGetProcAddress"] = [500]
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: the driver's library does not have it, expected a driver for CUDA 12.0"):
        launch.tensor_map(torch.zeros(8, dtype=torch.bfloat16), (64, 2), (64,), (64, 1))


# ---- parameters ---------------------------------------------------------------------------------------------------------
def test_parameters_are_laid_out_as_on_a_device(launch, cu):
    """A tensor map first and on 64 bytes, the size a multiple of that; a map that is shared is copied into them."""
    kind = parameters("Given", [("a", TensorMap), ("b", TensorMap), ("out", ctypes.c_void_p), ("n", ctypes.c_int32)])
    assert (kind.a.offset, kind.b.offset, kind.out.offset, ctypes.sizeof(kind)) == (0, 128, 256, 320)
    t = torch.zeros(8, dtype=torch.bfloat16)
    first, second = (launch.tensor_map(t, (64, n), (64,), (64, 1)) for n in (2, 3))
    given = kind(first, second, 5, 6)
    given.a.words[1] = 9
    assert (given.a.words[0], given.b.words[0], given.out, given.n, first.words[1]) == (1, 2, 5, 6, 0)
    with pytest.raises(ValueError, match="fields: out, a, expected the tensor maps first"):
        parameters("Given", [("out", ctypes.c_void_p), ("a", TensorMap)])
