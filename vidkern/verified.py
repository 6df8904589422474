"""Records that a backend passed the accuracy rule on a kind of device, and which of them count.

A record is bound to the content of the backend's sources without comments and docstrings: when they change, it no longer
counts. Records come with the package (``bench/results/**/verified.json``) and from ``vidkern verify`` (the user's cache).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import json
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ._files import cache_dir, replacing
from .cuda.sources import included

FORMAT = 1
FILE = "verified.json"
_PACKAGE = Path(__file__).parent
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# (op, backend, device, dtype) -> what is missing.
_answers: dict[tuple, str | None] = {}


class DeviceClass(NamedTuple):
    """A kind of device: what its driver calls it, and its compute capability ("" where there is no such thing)."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})" if self.capability else self.name

    @property
    def slug(self) -> str:
        """Name of the folder of its records."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def device_class(device: torch.device | str) -> DeviceClass:
    """The class of a device; a CUDA device that is not there (fake tensors need none) is of a class of its own."""
    device = torch.device(device)
    if device.type == "cuda":
        try:
            found = torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError):
            return DeviceClass("no such device", "")
        return DeviceClass(found.name, f"{found.major}.{found.minor}")
    if device.type == "cpu":
        return DeviceClass(_processor(), "")
    return DeviceClass(device.type, "")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else "cpu"


@dataclass(frozen=True)
class Record:
    """A pass of one backend of one op on one kind of device.

    Args:
        op, backend: names in the registry.
        device, capability: see :class:`DeviceClass`.
        dtypes: names of the dtypes that passed, such as "bfloat16".
        worst_max, worst_rms: the largest error over the yardstick's, largest element and root mean square.
        cases: how many comparisons that was.
        versions: of vidkern, torch, triton, CUDA and the driver, as far as there are such.
        seed: what the random inputs came from.
        date: UTC, ISO 8601.
        sources: :func:`digest` of the backend's sources.
    """

    op: str
    backend: str
    device: str
    capability: str
    dtypes: tuple[str, ...]
    worst_max: float
    worst_rms: float
    cases: int
    versions: dict
    seed: int
    date: str
    sources: str


# ---- sources --------------------------------------------------------------------------------------------------------
def _path_of(source: str) -> Path:
    """Where a source named in a Backend lies, in a checkout as in an installation."""
    beside = _PACKAGE.parent / source  # a checkout keeps csrc beside the package, an installation in it
    return beside if source.startswith("csrc/") and beside.is_file() else _PACKAGE / source


def _strip_python(text: str) -> str:
    """Without comments, docstrings and blank lines; the same for every version of Python, unlike a dump of tokens."""
    lines = list(io.StringIO(text))
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    spans, before = [], tokenize.NEWLINE
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    layout = (tokenize.NL, tokenize.COMMENT)
    for i, token in enumerate(tokens):
        if token.type == tokenize.COMMENT:
            spans.append((token.start, token.end))
        elif token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            after = next(t.type for t in tokens[i + 1 :] if t.type not in layout)
            if after in (tokenize.NEWLINE, tokenize.ENDMARKER):
                spans.append((token.start, token.end))
        if token.type not in layout:
            before = token.type
    for (row, column), (end_row, end_column) in reversed(spans):
        text = text[: starts[row - 1] + column] + text[starts[end_row - 1] + end_column :]
    return _tidy(text)


# A string or character literal is kept as it is; a comment is one blank, as the standard says.
_C_PARTS = re.compile(
    r'(?P<keep>R"(?P<d>[^()\s\\]{0,16})\(.*?\)(?P=d)"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\')'
    r"|//(?:[^\n\\]|\\.|\\\n)*|/\*.*?\*/",
    re.DOTALL,
)


def _strip_c(text: str) -> str:
    return _tidy(_C_PARTS.sub(lambda found: found.group("keep") or " ", text))


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _neighbours(path: Path, text: str) -> Iterator[Path]:
    """What a source takes from files beside it: quoted includes, and ``from . import x`` or ``from .x import y``."""
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
                yield from (path.with_name(f"{n}.py") for n in names)
        return
    yield from included(path, text)


def closure(sources: Sequence[str]) -> list[Path]:
    """Files of ``sources`` and of what they take from beside them, sorted.

    Raises:
        FileNotFoundError: a file named in ``sources`` is missing.
    """
    found: set[Path] = set()
    waiting = [_path_of(s).resolve() for s in sources]
    for path in waiting:
        if not path.is_file():
            raise FileNotFoundError(f"sources: {path} does not exist, expected a file of the package")
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        waiting += [p.resolve() for p in _neighbours(path, path.read_text(encoding="utf-8"))]
    return sorted(found)


@functools.lru_cache(maxsize=64)
def digest(sources: tuple[str, ...]) -> str:
    """Hash over the comment-stripped closure of ``sources``: folder, name and content of each file, not where it lies."""
    state = hashlib.sha256()
    for path in sorted(closure(sources), key=lambda p: (p.parent.name, p.name)):
        text = path.read_text(encoding="utf-8")
        state.update(f"{path.parent.name}/{path.name}\0".encode())
        state.update((_strip_python(text) if path.suffix == ".py" else _strip_c(text)).encode() + b"\0")
    return state.hexdigest()[:32]


# ---- records --------------------------------------------------------------------------------------------------------
def shipped_dir() -> Path | None:
    """Folder of the records that come with the package."""
    spec = importlib.util.find_spec("vidkern.bench")
    return Path(next(iter(spec.submodule_search_locations)), "results") if spec else None


def read(path: Path) -> list[Record]:
    """The records of a file; of a damaged one none, with a warning that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        found = [Record(**{**r, "dtypes": tuple(r["dtypes"])}) for r in content["records"]]
        if not all(isinstance(x, str) for r in found for x in (r.op, r.backend, r.device, r.sources, *r.dtypes)):
            raise ValueError("a name that is no text")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{path}: no record of verification, ignored ({reason})", stacklevel=2)
        return []


@functools.lru_cache(maxsize=1)
def records() -> tuple[Record, ...]:
    """Every record of the package and of the user's cache, whether it still counts or not. Read once per process."""
    found: list[Record] = []
    for folder in (shipped_dir(), cache_dir()):
        if folder is not None and folder.is_dir():
            for path in sorted(folder.rglob(FILE)):
                found += read(path)
    return tuple(found)


def forget() -> None:
    """Read records and sources anew when next asked."""
    from . import registry

    records.cache_clear()
    digest.cache_clear()
    _answers.clear()
    registry._settled.clear()


def counting(op: str, backend) -> list[Record]:
    """Records of a backend that count: those of its sources as they are now."""
    mine = [r for r in records() if (r.op, r.backend) == (op, backend.name)]
    if not mine or not backend.sources:
        return []
    now = digest(tuple(backend.sources))
    return [r for r in mine if r.sources == now]


def lacking(op: str, backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is missing to trust a backend on a device with a dtype, as a phrase after "is"; None when a record counts."""
    key = (op, backend.name, device, dtype)
    if key not in _answers:
        _answers[key] = _lacking(op, backend, device_class(device), dtype)
    return _answers[key]


def _lacking(op: str, backend, where: DeviceClass, dtype: torch.dtype) -> str | None:
    same = [r for r in counting(op, backend) if (r.device, r.capability) == where]
    name = str(dtype).removeprefix("torch.")
    if any(name in r.dtypes for r in same):
        return None
    what = f"on {where}" if not same else f"on {where} with {name}"
    stale = not same and any(_key_of(r) == key(op, backend.name, where) for r in records())
    why = " (its sources have changed since)" if stale else ""
    return f"not verified {what}{why}: run `vidkern verify`"


def key(op: str, backend: str, where: DeviceClass) -> tuple:
    """What there is one record of in a file."""
    return (op, backend, *where)


def _key_of(record: Record) -> tuple:
    return key(record.op, record.backend, DeviceClass(record.device, record.capability))


def write(folder: Path, fresh: Iterable[Record], withdrawn: Iterable[tuple] = ()) -> list[Path]:
    """Add records to the files of their devices below ``folder``.

    Args:
        folder: such as :func:`cache_dir`.
        fresh: records; each takes the place of an earlier one of the same op, backend and device.
        withdrawn: :func:`key` of records to remove.

    Returns:
        the files written, each whole or not at all.
    """
    fresh, withdrawn, written = list(fresh), set(withdrawn), []
    for where in dict.fromkeys([*(DeviceClass(*_key_of(r)[2:]) for r in fresh), *(DeviceClass(*k[2:]) for k in withdrawn)]):
        mine = [r for r in fresh if _key_of(r)[2:] == where]
        path = folder / where.slug / FILE
        gone = withdrawn | set(map(_key_of, mine))
        before = read(path) if path.exists() else []
        after = [*(r for r in before if _key_of(r) not in gone), *mine]
        if after == before:
            continue
        content = {"format": FORMAT, "records": [asdict(r) for r in sorted(after, key=_key_of)]}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        written.append(path)
    forget()
    return written
