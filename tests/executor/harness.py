"""Builds CUDA sources for the executor with the host compiler, runs their kernels, and compiles them with nvcc to read the machine code."""

import ctypes
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from vidkern.cuda.sources import closure
from vidkern.cuda.tensor_map import PANEL, TensorMap, check

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILT = HERE.parents[1] / "build" / "executor"
COUNTED = ("products", "matrix_loads", "copies", "barriers", "boxes", "warpgroup_products")
MOST_THREADS, MOST_SHARED = 1024, 227 << 10  # of a block, shared memory in bytes; compute capability 9.0


class KernelError(AssertionError):
    """A rule that a kernel broke, as the executor tells it."""


def _digest(paths: Iterable[Path], *more: str) -> str:
    h = hashlib.sha256(repr(more).encode())
    for path in paths:
        h.update(path.name.encode())
        h.update(path.read_bytes())
    return h.hexdigest()[:24]


def _sources(source: Path) -> list[Path]:
    """A CUDA source and the headers that it may include; one of the tests finds those of csrc by the compiler's options alone."""
    elsewhere = [] if source.resolve().is_relative_to(CSRC) else sorted((CSRC / "cuda").rglob("*.h"))
    return [*closure(source), *elsewhere]


def _compile(to: Path, *arguments) -> None:
    """Compile or link; what runs beside this sees all of the result or nothing."""
    flags = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    made = to.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    done = subprocess.run([os.environ.get("CXX", "g++"), *flags, "-o", made, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made.replace(to)


_compiling = threading.Lock()


def _executor() -> list[Path]:
    """The executor itself, each of its parts compiled once."""
    BUILT.mkdir(parents=True, exist_ok=True)
    headers, objects = sorted(HERE.glob("executor*.h")), []
    with _compiling:
        for source in sorted(HERE.glob("executor*.cpp")):
            objects.append(BUILT / f"{source.stem}-{_digest((source, *headers))}.o")
            if not objects[-1].exists():
                _compile(objects[-1], "-c", source)
    return objects


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
        executor = _executor()
        compiled = BUILT / f"{source.stem}-{_digest((*_sources(source), HERE / 'executor.h'), *texts.values())}.o"
        if not compiled.exists():
            # The source and the headers beside it: an include finds the edited one first.
            with tempfile.TemporaryDirectory(dir=BUILT) as folder:
                for path, text in texts.items():
                    (Path(folder) / path.name).write_text(f'#line 1 "{path}"\n{text}')
                include = ["-I", HERE, "-I", CSRC / "cuda", "-I", CSRC]
                _compile(compiled, "-c", *(["-Wno-error"] if edit else []), *include, "-x", "c++", Path(folder) / source.name)
        library = BUILT / f"{source.stem}-{_digest((), compiled.name, *(path.name for path in executor))}.so"
        if not library.exists():
            _compile(library, "-shared", compiled, *executor)
        self._library = ctypes.CDLL(str(library))
        self._library.vk_run.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
            ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p,
        ]  # fmt: skip

    def run(self, name, parameters: ctypes.Structure, *, blocks, threads, shared=0, reads=(), writes=(), seed=0) -> dict[str, int]:
        """Run a kernel. ``reads`` and ``writes``: the tensors it may touch, and nothing beside them.

        Raises:
            KernelError: it broke a rule.
            ValueError: no device has so many threads or so much shared memory for a block, or the blocks do not fill its clusters.
        """
        if not 0 < threads <= MOST_THREADS or threads % 32 or not 0 <= shared <= MOST_SHARED:
            raise ValueError(
                f"threads, shared: {threads} and {shared} bytes, expected a multiple of 32 up to {MOST_THREADS} and up to {MOST_SHARED}"
            )
        try:
            cluster = ctypes.c_uint32.in_dll(self._library, f"{name}_cluster").value
        except ValueError:  # it names no cluster
            cluster = 1
        if blocks % cluster:
            raise ValueError(f"blocks: {blocks}, expected a multiple of {name}'s {cluster} per cluster")
        spans = [(*_extent(t), 0) for t in reads] + [(*_extent(t), 1) for t in writes]
        flat = (ctypes.c_uint64 * (3 * len(spans)))(*[x for s in spans for x in s])
        message, counts = ctypes.create_string_buffer(4096), (ctypes.c_uint64 * len(COUNTED))()
        entry = ctypes.cast(getattr(self._library, f"{name}_thread"), ctypes.c_void_p)
        failed = self._library.vk_run(
            entry, ctypes.byref(parameters), blocks, threads, cluster, shared, flat, len(spans), seed, message, len(message), counts
        )
        if failed:
            raise KernelError(message.value.decode())
        return dict(zip(COUNTED, counts))


def tensor_map(t: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """A tensor map as the executor reads it (executor_boxes.cpp), in place of CUtensorMap; arguments as of ``launch.tensor_map``.

    Raises:
        ValueError: what the driver would refuse; or a box of less than 64 along the first dimension, of which the manual does not say how its
            rows of less than 128 bytes lie where 128 are swizzled together.
    """
    check(t.data_ptr(), t.dtype, sizes, strides, box)
    if box[0] != PANEL:
        raise ValueError(f"box: {tuple(box)}, expected {PANEL} along the first dimension")
    rank, short = len(sizes), 5 - len(sizes)
    steps = [2 * s if n > 1 else 0 for s, n in zip(strides, sizes[1:])]
    sides = [*box, *[1] * short]
    words = [0x70614D726F736E54, t.data_ptr(), rank, *sizes, *[1] * short, *steps, *[0] * short]
    words += [sum(n << 16 * i for i, n in enumerate(sides[:4])), sides[4]]
    return TensorMap((ctypes.c_uint64 * 16)(*words))


class Launch:
    """What launchers get as ``launch``, on the executor: every launch under another schedule.

    Args:
        programs: by what the names of their kernels begin with; the longest that fits counts.
        counted: takes (kernel's name, counts) of every launch.
    """

    tensor_map = staticmethod(tensor_map)
    _seeds = itertools.count()

    def __init__(self, programs: Mapping[str, Program], counted: list | None = None):
        self.programs, self.counted = programs, counted

    def __call__(self, name, parameters, blocks, threads, shared, reads, writes) -> None:
        prefix = max((p for p in self.programs if name.startswith(p)), key=len, default=None)
        assert prefix is not None, f"{name}: expected a name that begins with one of {sorted(self.programs)}"
        how = {"blocks": blocks, "threads": threads, "shared": shared, "reads": reads, "writes": writes}
        counts = self.programs[prefix].run(name, parameters, **how, seed=next(self._seeds))
        if self.counted is not None:
            self.counted.append((name, counts))


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


# What stands in the machine code, by the instruction's first word but for accesses of global memory, which say their width.
_INSTRUCTIONS = re.compile(
    r"\b(?:HMMA|HGMMA|UTMALDG|UTMASTG|UBLKPF|USETMAXREG|SYNCS|WARPGROUP|LDGSTS|LDSM|LDG\.E|STG\.E|STL|LDL|BAR|SHFL)[.\w]*"
)
# ptxas could not run products of a warpgroup beside other instructions and waits for each (C7510 to C7520, and in which function); or it
# does not know how many registers setmaxnreg begins from (C7508, of which function it does not say).
_SERIALIZED = re.compile(r"\(C75(?:08|1\d|20)\) (.*)")


def machine_code(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """What ptxas made of each kernel of a source for an architecture such as "80" or "90a": registers, bytes spilled, how often instructions
    stand in the machine code, and "serialized": the complaints that products of a warpgroup wait for each other."""
    from vidkern.bench.aot import _tool

    BUILT.mkdir(parents=True, exist_ok=True)
    cubin = BUILT / f"{source.stem}-{_digest(_sources(source), architecture)}.{architecture}.cubin"
    said = cubin.with_suffix(".ptxas")
    if not (cubin.exists() and said.exists()):
        made = cubin.with_suffix(f".{os.getpid()}")
        command = [nvcc(), "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-I", CSRC / "cuda", "-I", CSRC]
        done = subprocess.run([*command, "-o", made, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.write_text(done.stdout + done.stderr)
        made.replace(cubin)
    dump = subprocess.run([_tool("cuobjdump"), "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    use = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", dump)}
    complaints = _SERIALIZED.findall(said.read_text())
    result = {}
    for part in re.split(r"\n\s*Function : ", dump)[1:]:
        name = part.split("\n", 1)[0].strip()
        counts = {"registers": use[name][0], "spilled": use[name][1], "serialized": sum(f"'{name}'" in line for line in complaints)}
        for word in _INSTRUCTIONS.findall(part):
            word = re.sub(r"\.(EF|EL|LU|NA|STRONG|SYS|GPU|CONSTANT|U8|S8)\b", "", word)
            if word.startswith("UTMALDG") and "MULTICAST" in word:
                counts["UTMALDG.MULTICAST"] = counts.get("UTMALDG.MULTICAST", 0) + 1
            word = word if word.startswith(("LDG.E", "STG.E")) else word.split(".")[0]
            counts[word] = counts.get(word, 0) + 1
        result[name] = counts
    # A complaint that names no function, or one that is no kernel, may concern any of them.
    others = sum(not any(f"'{name}'" in line for name in result) for line in complaints)
    for counts in result.values():
        counts["serialized"] += others
    return result
