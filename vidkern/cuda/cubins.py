"""Machine code of a CUDA source for a compute capability: built with the package, kept on disk, or compiled by NVRTC."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .._files import cache_dir, replacing
from ..errors import comes_with
from . import sources

_CHECKSUM = 32  # bytes of SHA-256 after the cubin; what loads a cubin stops at its end
INSTALL = comes_with("cuda")
HOPPER = (9, 0)  # the compute capability that runs machine code of sources.HOPPER


_importing = threading.Lock()


def _program():
    """``Program`` and ``ProgramOptions`` of cuda.core; cuda-python 12 has them under an experimental name."""
    with _importing:  # a second thread would find the module as far as the first has come
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError:
            from cuda.core.experimental import Program, ProgramOptions
        return Program, ProgramOptions


@functools.lru_cache(maxsize=1)
def missing_python() -> str | None:
    """Why CUDA cannot be reached from Python, or None. Imports nothing."""
    try:
        found = all(importlib.util.find_spec(f"cuda.{name}") for name in ("bindings", "core"))
    except ModuleNotFoundError:
        found = False
    return None if found else f"cuda-python is not installed ({INSTALL})"


@functools.lru_cache(maxsize=1)
def missing_compiler() -> str | None:
    """Why NVRTC cannot be used, or None. Loads its library."""
    try:
        return missing_python() or (None if version() else "")
    except Exception as error:  # the bindings raise what their loader raises, by release another class
        reason = " ".join(str(error).split())[:200]
        return f"NVRTC cannot be loaded, expected one of the major version of cuda-python ({INSTALL}): {reason}"


@functools.lru_cache(maxsize=1)
def version() -> str:
    """NVRTC's, such as "13.5"."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if int(error):
        raise RuntimeError(f"NVRTC: nvrtcVersion gave {error}, expected NVRTC_SUCCESS")
    return f"{major}.{minor}"


def path_of(stem: str) -> Path:
    """A source by its name."""
    return sources.folder() / "cuda" / f"{stem}.cu"


def folder() -> Path:
    """Where compiled kernels are kept: in vidkern's folder of the user's cache, which ``$VIDKERN_CACHE`` moves. May be deleted."""
    return cache_dir() / "cubins"


# ---- built with the package -------------------------------------------------------------------------------------------
def archs_ahead() -> list[str]:
    """Architectures that the package brings machine code for, such as "90" and "90a", the earliest first."""
    found = {path.name.rpartition(".sm_")[2].partition(".")[0] for path in sources.AHEAD.glob("*.sm_*.cubin")}
    return sorted(found, key=lambda arch: (int(arch.rstrip("a")), arch))


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """A cubin runs on its own compute capability and on later ones of the same major version, one of :data:`sources.HOPPER` on 9.0 alone."""
    if arch == sources.HOPPER:
        return capability == HOPPER
    major, minor = divmod(int(arch), 10)
    return major == capability[0] and minor <= capability[1]


def serves(stem: str, capability: tuple[int, int]) -> bool:
    """Whether a source is one for this compute capability: those of :data:`sources.HOPPER` are for 9.0 alone, the others for any."""
    return capability == HOPPER or not sources.is_hopper(stem)


def built_ahead(capability: tuple[int, int], hopper: bool = False) -> bool:
    """Whether the package brings machine code that this compute capability can run; ``hopper``: of the sources for 9.0 alone."""
    return any(_runs(arch, capability) and (arch == sources.HOPPER) == hopper for arch in archs_ahead())


def ahead(stem: str, capability: tuple[int, int]) -> bytes | None:
    """What the package brings for the source as it is now, the nearest capability first."""
    for arch in reversed(archs_ahead()):
        path = sources.AHEAD / sources.ahead_name(path_of(stem), sources.folder(), arch)
        if _runs(arch, capability) and path.is_file():
            return path.read_bytes()
    return None


# ---- compiled here ----------------------------------------------------------------------------------------------------
def compile(stem: str, arch: str) -> bytes:  # noqa: A001
    """The cubin that NVRTC makes of a source for an architecture such as "90" or "90a". Needs no GPU and no CUDA headers.

    Raises:
        RuntimeError: NVRTC is missing, or does not take the source or the architecture.
    """
    if reason := missing_compiler():
        raise RuntimeError(f"{stem}.cu: no machine code for sm_{arch} came with the package, and {reason}")
    Program, ProgramOptions = _program()
    include = [str(path) for path in sources.include_folders(sources.folder())]
    try:
        options = ProgramOptions(name=f"{stem}.cu", arch=f"sm_{arch}", std=sources.OPTIONS[0].partition("=")[2], include_path=include)
        return bytes(Program(path_of(stem).read_text(encoding="utf-8"), "c++", options).compile("cubin").code)
    except FileNotFoundError:
        raise
    except Exception as error:  # cuda.core's classes of errors differ by release
        lines = str(error).splitlines()
        mistakes = [line for line in lines if "error" in line.lower()]
        # In the source, or where it says what is missing in a header.
        mistakes = [line for line in mistakes if f"{stem}.cu(" in line] or [line for line in mistakes if ": error" in line] or mistakes
        said = (mistakes or lines or [type(error).__name__])[0]
        raise RuntimeError(f"{stem}.cu: NVRTC {version()} does not compile it for sm_{arch}: {' '.join(said.split())}") from error


def _read(path: Path) -> bytes | None:
    """A cubin that was kept, or None where there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def kept(stem: str, capability: tuple[int, int]) -> tuple[bytes, bool]:
    """The cubin of a source for a compute capability, from the cache, else compiled and put there; and whether it was compiled.

    Raises:
        RuntimeError: see :func:`compile`; or the source is not for this compute capability.
    """
    arch = f"{capability[0]}{capability[1]}"
    if sources.is_hopper(stem):
        if not serves(stem, capability):
            raise RuntimeError(f"{stem}.cu: compute capability {capability[0]}.{capability[1]}, expected 9.0")
        arch = sources.HOPPER
    if reason := missing_compiler():
        raise RuntimeError(f"{stem}.cu: no machine code for sm_{arch} came with the package, and {reason}")
    path = folder() / f"{stem}-{sources.digest(path_of(stem), sources.folder(), (version(), arch))}.sm_{arch}.cubin"
    found = _read(path)
    if found is not None:
        return found, False
    code = compile(stem, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(code + hashlib.sha256(code).digest())
    except OSError as error:
        said = f"{path}: cannot be written ({error.strerror}), the next process compiles it again; VIDKERN_CACHE moves it"
        warnings.warn(said, stacklevel=2)
    return code, True


def candidates(stem: str, capability: tuple[int, int]) -> Iterator[bytes]:
    """Machine code to try, in order: the package's, then what is compiled for exactly this capability."""
    first = ahead(stem, capability)
    if first is not None:
        yield first
    if first is None or missing_compiler() is None:
        yield kept(stem, capability)[0]


def make_ready(stems: Sequence[str], capability: tuple[int, int]) -> dict[str, dict]:
    """Have machine code of those of several sources at hand that are for this capability, compiled at the same time; for each where it is
    from ("package", "cache" or "NVRTC"), the seconds it took, and the reason where it cannot be made."""

    def one(stem: str) -> dict:
        begun = time.perf_counter()
        try:
            if ahead(stem, capability) is not None:
                return {"from": "package", "seconds": 0.0}
            _, compiled = kept(stem, capability)
        except RuntimeError as error:
            return {"from": "nowhere", "seconds": time.perf_counter() - begun, "reason": str(error)}
        return {"from": "NVRTC" if compiled else "cache", "seconds": time.perf_counter() - begun}

    stems = [stem for stem in stems if serves(stem, capability)]
    with ThreadPoolExecutor(max(1, len(stems))) as pool:
        return dict(zip(stems, pool.map(one, stems)))
