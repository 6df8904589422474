"""A driver that launches nothing: it stands where cuda.bindings.driver does, logs what is asked of it, and reads parameters as CUDA would."""

import contextlib
import ctypes
import threading
from types import SimpleNamespace

from cuda.bindings import driver as real

from vidkern.cuda.driver import Driver

ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2, *[ctypes.POINTER(ctypes.c_uint32)] * 2, *[ctypes.c_int] * 4,
)  # fmt: skip
OK = real.CUresult.CUDA_SUCCESS


class FakeCuda:
    """The calls of the driver's interface that the launch layer makes.

    Attributes:
        calls: (name, arguments) in order, but for launches.
        launches: what each was given: kernel, blocks, threads, shared, stream, address of the parameters.
        maps: what each tensor map was encoded from, read as CUDA reads it.
        fails: name of a call -> errors that its next calls give.
        run, encode: called with each launch; with each tensor map, whose 128 bytes it returns (otherwise its number, from 1 on), or which
            it refuses by a ValueError, kept in ``refused``.
    """

    CUfunction_attribute, CUresult = real.CUfunction_attribute, real.CUresult

    def __init__(self):
        self.calls, self.launches, self.maps, self.fails = [], [], [], {}
        self.run = self.encode = self.refused = None
        self._encode = ENCODE(self._encode_tiled)
        self._contexts = threading.local()
        self._names = {}

    def _answer(self, name, arguments, *values):
        self.calls.append((name, arguments))
        waiting = self.fails.get(name)
        return (real.CUresult(waiting.pop(0)), None) if waiting else (OK, *values)

    def count(self, name):
        return sum(n == name for n, _ in self.calls)

    def cuInit(self, flags):
        return self._answer("cuInit", (flags,))

    def cuDriverGetVersion(self):
        return self._answer("cuDriverGetVersion", (), 12040)

    def cuDeviceGet(self, ordinal):
        return self._answer("cuDeviceGet", (ordinal,), 100 + ordinal)

    def cuDevicePrimaryCtxRetain(self, device):
        return self._answer("cuDevicePrimaryCtxRetain", (device,), 1000 + device)

    def cuCtxSetCurrent(self, context):
        self._contexts.current = context
        return self._answer("cuCtxSetCurrent", (context,))

    def cuModuleLoadData(self, code):
        assert getattr(self._contexts, "current", None), "loaded without a context"
        return self._answer("cuModuleLoadData", (code,), SimpleNamespace(code=code))

    def cuModuleGetFunction(self, module, name):
        handle = 5000 + len(self._names)
        self._names[handle] = name.decode()
        return self._answer("cuModuleGetFunction", (module, name), handle)

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        return self._answer("cuFuncSetAttribute", (self._names[function], value))

    def cuGetProcAddress(self, symbol, version, flags):
        assert (symbol, version, flags) == (b"cuTensorMapEncodeTiled", 12000, 0)
        address = ctypes.cast(self._encode, ctypes.c_void_p).value
        return self._answer("cuGetProcAddress", (symbol,), address, real.CUdriverProcAddressQueryResult(0))

    def _encode_tiled(self, to, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        waiting = self.fails.get("cuTensorMapEncodeTiled")
        if waiting:
            return waiting.pop(0)
        given = SimpleNamespace(
            to=to, kind=real.CUtensorMapDataType(kind).name.rpartition("_")[2], address=address, sizes=tuple(sizes[:rank]),
            strides=tuple(strides[: rank - 1]), box=tuple(box[:rank]), steps=tuple(steps[:rank]),
            interleave=real.CUtensorMapInterleave(interleave).name, swizzle=real.CUtensorMapSwizzle(swizzle).name,
            promotion=real.CUtensorMapL2promotion(promotion).name, fill=real.CUtensorMapFloatOOBfill(fill).name,
        )  # fmt: skip
        self.maps.append(given)
        try:
            code = self.encode(given) if self.encode else len(self.maps).to_bytes(128, "little")
        except ValueError as error:  # ctypes would only print it
            self.refused = error
            return 1
        assert len(code) == 128
        ctypes.memmove(to, code, 128)
        return 0

    def cuLaunchKernel(self, function, bx, by, bz, tx, ty, tz, shared, stream, parameters, extra):
        assert (by, bz, ty, tz, extra) == (1, 1, 1, 1, 0)
        waiting = self.fails.get("cuLaunchKernel")
        if waiting:
            return (real.CUresult(waiting.pop(0)),)
        given = SimpleNamespace(name=self._names[function], blocks=bx, threads=tx, shared=shared, stream=stream,
                                address=ctypes.c_void_p.from_address(parameters).value)  # fmt: skip
        self.launches.append(given)
        if self.run:
            self.run(given)
        return (OK,)


class FakeDriver(Driver):
    """The launch layer's driver over :class:`FakeCuda`, and without torch's part of CUDA."""

    def __init__(self, cu, capability=(9, 0)):
        super().__init__(cu)
        self.device, self.captured, self.visited, self._capability = 0, False, [], capability
        self._current = lambda: self.device
        self._stream = lambda device: 70 + device

    def capability(self, device):
        return self._capability

    def capturing(self, device):
        return self.captured

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, device
        self.visited.append(device)
        try:
            yield
        finally:
            self.device = before
