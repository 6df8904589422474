"""The calls of CUDA's driver and of torch that a launch takes, in one object."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch

from . import tensor_map

_Slot = ctypes.c_void_p * 1
# cuTensorMapEncodeTiled, and the values of its enumerations that all our tensor maps have.
_Encode = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4
)  # fmt: skip
_INTERLEAVE_NONE, _SWIZZLE_128, _FILL_ZERO = 0, 3, 0
_PROMOTE_128, _PROMOTE_256 = 2, 3  # to how many bytes the second-level cache extends what it reads
_NO_CONTEXT = (3, 201)  # CUDA_ERROR_NOT_INITIALIZED, CUDA_ERROR_INVALID_CONTEXT
_OUT_OF_RESOURCES = 701
_LOST = 700  # errors from here on leave the device's context broken, but for the one above


class LoadError(RuntimeError):
    """The driver does not load machine code."""


class Driver:
    """CUDA through cuda.bindings.

    Args:
        cu: ``cuda.bindings.driver``, which is imported where it is None.
    """

    def __init__(self, cu=None):
        if cu is None:
            from cuda.bindings import driver as cu
        self._cu = cu
        self._launch_kernel = cu.cuLaunchKernel
        self._encode = None
        self._contexts: dict[int, object] = {}
        self._current = getattr(torch._C, "_cuda_getDevice", None)
        self._stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    # ---- torch --------------------------------------------------------------------------------------------------------
    def capability(self, device: int) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    def capturing(self, device: int) -> bool:
        """Whether the device's current stream is being captured into a graph."""
        with self.on(device):
            return torch.cuda.is_current_stream_capturing()

    def on(self, device: int) -> contextlib.AbstractContextManager:
        """Makes a device the current one."""
        return torch.cuda.device(device)

    # ---- CUDA ---------------------------------------------------------------------------------------------------------
    def _ask(self, what: str, result: tuple, kind: type[RuntimeError] = RuntimeError):
        """The value of a call, or its error raised."""
        error, *values = result
        if int(error):
            raise kind(f"{what}: {getattr(error, 'name', error)}")
        return values[0] if values else None

    def _activate(self, device: int) -> None:
        """The device's primary context, which torch shares, on this thread: a thread that has not used CUDA yet has none."""
        cu = self._cu
        if device not in self._contexts:
            self._ask("cuInit", cu.cuInit(0))
            ordinal = self._ask("cuDeviceGet", cu.cuDeviceGet(device))
            self._contexts[device] = self._ask("cuDevicePrimaryCtxRetain", cu.cuDevicePrimaryCtxRetain(ordinal))
        self._ask("cuCtxSetCurrent", cu.cuCtxSetCurrent(self._contexts[device]))

    def load(self, device: int, code: bytes):
        """A module of machine code on a device.

        Raises:
            LoadError: the driver does not take it.
        """
        with self.on(device):
            self._activate(device)
            try:
                return self._ask("cuModuleLoadData", self._cu.cuModuleLoadData(code), LoadError)
            except LoadError as error:
                of_driver = self._ask("cuDriverGetVersion", self._cu.cuDriverGetVersion())
                said = f"{error}; the driver is one for CUDA {of_driver // 1000}.{of_driver % 1000 // 10}"
                raise LoadError(f"{said}, expected one as recent as the compiler that made this") from None

    def function(self, device: int, module, name: str):
        """A kernel of a module."""
        with self.on(device):
            return self._ask(f"{name}: cuModuleGetFunction", self._cu.cuModuleGetFunction(module, name.encode()))

    def allow(self, device: int, name: str, function, shared: int) -> None:
        """Let a kernel ask for ``shared`` bytes of dynamic shared memory."""
        attribute = self._cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self.on(device):
            given = self._cu.cuFuncSetAttribute(function, attribute, shared)
            self._ask(f"{name}: {shared} bytes of shared memory for a block", given)

    def tensor_map(
        self, device: int, address: int, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> tensor_map.TensorMap:
        """A tensor map with the 128-byte swizzle and zeros outside; arguments as of ``launch.tensor_map``, which has checked them."""
        if self._encode is None:
            self._encode = self._entry("cuTensorMapEncodeTiled")
        rank, made = len(sizes), tensor_map.aligned()
        wide, narrow = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        # The stride of a dimension of one element is not used, and the driver looks at it.
        steps = [2 * s if n > 1 else 2 * tensor_map.CHUNK for s, n in zip(strides, sizes[1:])]
        # Rows that fill a cache line of 256 bytes are read whole: their other panel is read next.
        promotion = _PROMOTE_256 if 2 * sizes[0] >= 256 else _PROMOTE_128
        given = (
            ctypes.addressof(made), tensor_map.KINDS[dtype], rank, address, wide(*sizes), wide(*steps), narrow(*box), narrow(*[1] * rank),
            _INTERLEAVE_NONE, _SWIZZLE_128, promotion, _FILL_ZERO,
        )  # fmt: skip
        error = self._encode(*given)
        if error in _NO_CONTEXT:
            with self.on(device):
                self._activate(device)
                error = self._encode(*given)
        if error:
            said = f"sizes {tuple(sizes)}, strides {tuple(strides)}, box {tuple(box)} at {address:#x}"
            name = next((known.name for known in self._cu.CUresult if int(known) == error), error)
            raise RuntimeError(f"cuTensorMapEncodeTiled: {name} for {said}")
        return made

    def _entry(self, name: str) -> _Encode:
        """A function of the driver's library. The one of cuda.bindings writes tensor maps to memory that is not aligned for them."""
        error, address, *status = self._cu.cuGetProcAddress(name.encode(), 12000, 0)
        if int(error) or not address:
            raise RuntimeError(f"{name}: the driver's library does not have it, expected a driver for CUDA 12.0 or later")
        return _Encode(int(address))

    def launch(self, name: str, device: int, function, blocks: int, threads: int, shared: int, parameters: ctypes.Structure) -> None:
        """Launch on torch's current stream of the device."""
        if self._current() != device:
            with self.on(device):
                self._queue(name, device, function, blocks, threads, shared, parameters)
        else:
            self._queue(name, device, function, blocks, threads, shared, parameters)

    def _queue(self, name, device, function, blocks, threads, shared, parameters) -> None:
        # An array of one pointer, to the one parameter, which the driver copies before it returns.
        slot = _Slot(ctypes.addressof(parameters))
        given = (function, blocks, 1, 1, threads, 1, 1, shared, self._stream(device), ctypes.addressof(slot), 0)
        error = self._launch_kernel(*given)[0]
        if error and error in _NO_CONTEXT:
            self._activate(device)
            error = self._launch_kernel(*given)[0]
        if error:
            code = int(error)
            lost = "CUDA error: " if code >= _LOST and code != _OUT_OF_RESOURCES else ""
            said = f"{blocks} blocks of {threads} threads with {shared} bytes of shared memory"
            raise RuntimeError(f"{lost}{name}: {getattr(error, 'name', code)} at a launch of {said}")
