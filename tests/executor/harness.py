"""Builds CUDA sources for the executor with the host compiler, runs their kernels, and compiles them with nvcc to read the machine code."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from vidkern.cuda.sources import closure

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILT = HERE.parents[1] / "build" / "executor"
COUNTED = ("products", "matrix_loads", "copies", "barriers")


class KernelError(AssertionError):
    """A rule that a kernel broke, as the executor tells it."""


def _digest(source: Path, *more: str) -> str:
    """Hash over a source, all that it includes, and the executor."""
    h = hashlib.sha256(repr(more).encode())
    for path in (*closure(source), *sorted(HERE.glob("executor.*"))):
        h.update(path.name.encode())
        h.update(path.read_bytes())
    return h.hexdigest()[:24]


def _compile(*arguments) -> None:
    flags = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([os.environ.get("CXX", "g++"), *flags, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _executor() -> Path:
    """The executor itself, compiled once."""
    source = HERE / "executor.cpp"
    compiled = BUILT / f"executor-{_digest(source)}.o"
    if not compiled.exists():
        made = compiled.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        _compile("-c", "-o", made, source)
        made.replace(compiled)
    return compiled


class Program:
    """A CUDA source as a library of the executor. ``edit``: (old, new), replaced once in the source or a header beside it: a seeded fault."""

    def __init__(self, source: Path, *edit: tuple[str, str]):
        # The source and the headers beside it that it includes.
        beside = [path for path in closure(source) if path.parent == source.resolve().parent]
        texts = {path: path.read_text() for path in beside}
        for old, new in edit:
            holders = [path for path, text in texts.items() if old in text]
            assert len(holders) == 1 and texts[holders[0]].count(old) == 1, f"{old!r} stands in {holders}, expected once in one file"
            texts[holders[0]] = texts[holders[0]].replace(old, new)
        stem = f"{source.stem}-{_digest(source, *texts.values())}"
        BUILT.mkdir(parents=True, exist_ok=True)
        library = BUILT / f"{stem}.so"
        if not library.exists():
            # The source and the headers beside it: an include finds the edited one first.
            with tempfile.TemporaryDirectory(dir=BUILT) as folder:
                for path, text in texts.items():
                    (Path(folder) / path.name).write_text(f'#line 1 "{path}"\n{text}')
                copy, made = Path(folder) / source.name, Path(folder) / library.name
                include = ["-I", HERE, "-I", CSRC / "cuda", "-I", CSRC]
                _compile("-shared", *(["-Wno-error"] if edit else []), *include, "-o", made, "-x", "c++", copy, "-x", "none", _executor())
                made.replace(library)
        self._library = ctypes.CDLL(str(library))
        self._library.vk_run.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32,
            ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p,
        ]  # fmt: skip

    def run(self, name, parameters: ctypes.Structure, *, blocks, threads, shared=0, reads=(), writes=(), seed=0) -> dict[str, int]:
        """Run a kernel. ``reads`` and ``writes``: the tensors it may touch, and nothing beside them.

        Raises:
            KernelError: it broke a rule.
        """
        spans = [(*_extent(t), 0) for t in reads] + [(*_extent(t), 1) for t in writes]
        flat = (ctypes.c_uint64 * (3 * len(spans)))(*[x for s in spans for x in s])
        message, counts = ctypes.create_string_buffer(1024), (ctypes.c_uint64 * len(COUNTED))()
        entry = ctypes.cast(getattr(self._library, f"{name}_thread"), ctypes.c_void_p)
        failed = self._library.vk_run(
            entry, ctypes.byref(parameters), blocks, threads, shared, flat, len(spans), seed, message, len(message), counts
        )
        if failed:
            raise KernelError(message.value.decode())
        return dict(zip(COUNTED, counts))


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first to its last element."""
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
    return t.data_ptr(), reach * t.element_size()


def structure(**fields) -> ctypes.Structure:
    """A kernel's parameters in the order given: tensors are addresses (None: null), floats float32, ints int32, (ctype, value) as said."""
    kinds, values = [], []
    for name, value in fields.items():
        if value is None or isinstance(value, torch.Tensor):
            kind, value = ctypes.c_void_p, None if value is None else value.data_ptr()
        elif isinstance(value, float):
            kind = ctypes.c_float
        elif isinstance(value, int):
            kind = ctypes.c_int32
        else:
            kind, value = value
        kinds.append((name, kind))
        values.append(value)
    return type("Parameters", (ctypes.Structure,), {"_fields_": kinds})(*values)


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which("nvcc")


def machine_code(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """What ptxas made of each kernel of a source: registers, bytes spilled, and how often instructions stand in the machine code."""
    from vidkern.bench.aot import _tool

    BUILT.mkdir(parents=True, exist_ok=True)
    cubin = BUILT / f"{source.stem}-{_digest(source, architecture)}.{architecture}.cubin"
    if not cubin.exists():
        made = cubin.with_suffix(f".{os.getpid()}")
        command = [nvcc(), "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-I", CSRC / "cuda", "-I", CSRC, "-o", made, source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.replace(cubin)
    dump = subprocess.run([_tool("cuobjdump"), "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    use = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", dump)}
    result = {}
    for part in re.split(r"\n\s*Function : ", dump)[1:]:
        name = part.split("\n", 1)[0].strip()
        counts = {"registers": use[name][0], "spilled": use[name][1]}
        for word in re.findall(r"\b(?:HMMA|LDGSTS|LDSM|LDG\.E|STG\.E|STL|LDL|BAR|SHFL)[.\w]*", part):
            word = re.sub(r"\.(EF|EL|LU|NA|STRONG|SYS|GPU|CONSTANT|U8|S8)\b", "", word)
            word = word if word.startswith(("LDG.E", "STG.E")) else word.split(".")[0]
            counts[word] = counts.get(word, 0) + 1
        result[name] = counts
    return result
