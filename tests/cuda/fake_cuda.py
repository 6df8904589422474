"""A driver that launches nothing: it stands where cuda.bindings.driver does, logs what is asked of it, and reads parameters as CUDA would."""

import contextlib
import ctypes
import threading
from types import SimpleNamespace

from cuda.bindings import driver as real

from vidkern.cuda.driver import Driver

OK = real.CUresult.CUDA_SUCCESS


class FakeCuda:
    """The calls of the driver's interface that the launch layer makes.

    Attributes:
        calls: (name, arguments) in order, but for launches.
        launches: what each was given: kernel, blocks, threads, shared, stream, address of the parameters.
        fails: name of a call -> errors that its next calls give.
        run: called with each launch.
    """

    CUfunction_attribute = real.CUfunction_attribute

    def __init__(self):
        self.calls, self.launches, self.fails = [], [], {}
        self.run = None
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
