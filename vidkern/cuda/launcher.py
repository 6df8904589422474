"""From a kernel's name and parameters to its launch."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from types import ModuleType

import torch

from . import cubins, tensor_map
from .driver import Driver, LoadError

DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may ask for without being allowed more
MOST_BLOCKS = 2**31 - 1
MAPS = 512  # tensor maps that are kept
_PREFIXES: dict[str, str] = {}  # of kernel names -> stem of their source


def declare(*modules: ModuleType) -> tuple[str, ...]:
    """Make the kernels of launcher modules known, by their ``SOURCES`` ({stem of a source: prefixes of its kernels' names}); modules without
    it help others.

    Returns:
        the files that a record of their backend is bound to, for ``registry.Backend(sources=...)``.
    """
    stems = []
    for module in modules:
        for stem, prefixes in getattr(module, "SOURCES", {}).items():
            _PREFIXES.update(dict.fromkeys(prefixes, stem))
            stems.append(stem)
    python = [f"{m.__name__.partition('.')[2].replace('.', '/')}.py" for m in modules]
    return (*python, "cuda/launcher.py", *(f"csrc/cuda/{stem}.cu" for stem in dict.fromkeys(stems)))


def declared() -> list[str]:
    """Stems of every source that was declared."""
    return list(dict.fromkeys(_PREFIXES.values()))


def source_of(kernel: str) -> str:
    """Stem of the source that holds a kernel.

    Raises:
        ValueError: none does.
    """
    fits = [prefix for prefix in _PREFIXES if kernel.startswith(prefix)]
    if not fits:
        raise ValueError(f"kernel: {kernel!r}, expected a name that begins with one of {', '.join(sorted(_PREFIXES))}")
    return _PREFIXES[max(fits, key=len)]


class Kernel:
    """A kernel on a device: the driver's handle, and the bytes of dynamic shared memory that it may ask for."""

    __slots__ = ("function", "shared")

    def __init__(self, function):
        self.function, self.shared = function, DEFAULT_SHARED


class Launcher:
    """Launches kernels by name, each loaded at its first use on a device; safe to call from several threads.

    Args:
        driver: what to launch with; None: CUDA's, when the first kernel is launched.
    """

    def __init__(self, driver: Driver | None = None):
        self._driver = driver
        self._kernels: dict[tuple[int, str], Kernel] = {}
        self._modules: dict[tuple[int, str], object] = {}
        self._lock = threading.Lock()
        # They depend on numbers alone, so that one is right for whatever lies there later.
        self._maps = functools.lru_cache(MAPS)(self._encode)

    def __call__(
        self,
        name: str,
        parameters: ctypes.Structure,
        blocks: int,
        threads: int,
        shared: int,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
    ) -> None:
        """Launch a kernel on torch's current stream of the tensors' device and return at once.

        Args:
            name: of the kernel; see :func:`declare`.
            parameters: its one parameter, copied by the launch: up to 4096 bytes, with a driver for CUDA 12.1 or later up to 32764.
            blocks, threads: of the grid and of a block; without blocks nothing runs.
            shared: bytes of dynamic shared memory of a block.
            reads, writes: the tensors that it may read and write; at least one that it writes.

        Raises:
            RuntimeError: its source does not compile or load, a stream is being captured that it would have to be compiled or loaded in,
                or the driver refuses the launch.
        """
        device = writes[0].get_device()
        kernel = self._kernels.get((device, name))
        if kernel is None or shared > kernel.shared:
            kernel = self._prepare(device, name, shared)
        if 0 < blocks <= MOST_BLOCKS:
            self._driver.launch(name, device, kernel.function, blocks, threads, shared, parameters)
        elif blocks:
            raise RuntimeError(f"{name}: {blocks} blocks, expected at most {MOST_BLOCKS}")

    def tensor_map(self, t: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> tensor_map.TensorMap:
        """A tensor map for a kernel's parameters: copies of a box come with the 128-byte swizzle, and with zeros outside of the tensor.

        Args:
            t: bfloat16 or float16; the map begins at its first element. It is not kept.
            sizes: in elements, of up to five dimensions, the one that lies dense first.
            strides: in elements, of all dimensions but the first; those of dimensions of one element are not looked at.
            box: elements of each dimension that a copy takes.

        Returns:
            the map; it may be shared with other calls, and is copied into the parameters.

        Raises:
            ValueError: the dtype is another, the first element is not on 16 bytes, a size is below 1, a stride is no multiple of 8, a side
                of the box is not within 1 to 256, or the first is no multiple of 8 up to 64.
            RuntimeError: the driver refuses it.
        """
        return self._maps(t.get_device(), t.data_ptr(), t.dtype, tuple(sizes), tuple(strides), tuple(box))

    def _encode(self, device: int, address: int, dtype: torch.dtype, *extents: tuple[int, ...]) -> tensor_map.TensorMap:
        tensor_map.check(address, dtype, *extents)
        with self._lock:
            driver = self._ready()
        return driver.tensor_map(device, address, dtype, *extents)

    def _ready(self) -> Driver:
        if self._driver is None:
            self._driver = Driver()
        return self._driver

    def _prepare(self, device: int, name: str, shared: int) -> Kernel:
        with self._lock:
            self._ready()
            kernel = self._kernels.get((device, name))
            if kernel is None:
                if self._driver.capturing(device):
                    raise RuntimeError(
                        f"{name}: is not loaded yet, and a CUDA graph is being captured, expected one call with the same dtypes and "
                        "sizes before the capture (a warm-up)"
                    )
                kernel = Kernel(self._driver.function(device, self._module(device, source_of(name)), name))
            if shared > kernel.shared:
                self._driver.allow(device, name, kernel.function, shared)
                kernel.shared = shared
            # Last, so that other threads see it only when it can be launched.
            self._kernels[device, name] = kernel
        return kernel

    def _module(self, device: int, stem: str):
        found = self._modules.get((device, stem))
        if found is None:
            found = self._modules[device, stem] = self._load(device, stem)
        return found

    def _load(self, device: int, stem: str):
        reason = None
        for code in cubins.candidates(stem, self._driver.capability(device)):
            try:
                return self._driver.load(device, code)
            except LoadError as error:  # of another release of CUDA than the driver's: what is compiled here may be right
                reason = error
        raise RuntimeError(f"{stem}.cu: {reason}") from reason
