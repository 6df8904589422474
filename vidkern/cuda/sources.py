"""Which files a kernel's machine code comes from, and what a cubin of them is called. Standard library only: setup.py reads it too."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
OPTIONS = ("-std=c++17",)
AHEAD = _PACKAGE / "_cubins"  # of the package: what was built with it
HOPPER = "90a"  # features that compute capability 9.0 has and no later one: their machine code runs there alone


def folder() -> Path:
    """csrc: an installation keeps it in the package, a checkout beside it."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def is_hopper(stem: str) -> bool:
    """Whether a source is one for compute capability 9.0 alone, which its name says."""
    return "_hopper" in stem


def archs_of(stem: str, asked: Sequence[str]) -> list[str]:
    """Which architectures a source is compiled for where these are asked for, such as "80" or "90"; "90a" means the same as "90"."""
    plain = list(dict.fromkeys(arch.rstrip("a") for arch in asked))
    return [HOPPER] * ("90" in plain) if is_hopper(stem) else plain


def include_folders(csrc: Path) -> tuple[Path, Path]:
    """Where the compilers look for what sources include."""
    return csrc / "cuda", csrc


def included(path: Path, text: str) -> Iterator[Path]:
    """Files that a C or CUDA source includes by quotes: beside it, or from one of three folders above."""
    roots = (path.parent, *path.parents[:3])
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
        yield next((root / name for root in roots if (root / name).is_file()), path.parent / name)


def closure(source: Path) -> list[Path]:
    """A source and every header of ours that it includes; those it names for others (``executor.h``) are not there.

    Raises:
        FileNotFoundError: the source is missing.
    """
    found, waiting = {source.resolve()}, [source.resolve()]
    while waiting:
        path = waiting.pop()
        fresh = {p.resolve() for p in included(path, path.read_text(encoding="utf-8")) if p.is_file()} - found
        found |= fresh
        waiting += fresh
    return sorted(found)


def digest(source: Path, csrc: Path, more: Sequence[str] = ()) -> str:
    """Hash over the closure's names below csrc and contents, :data:`OPTIONS` and ``more``."""
    state = hashlib.sha256(repr((OPTIONS, tuple(more))).encode())
    for path in closure(source):
        state.update(f"{path.relative_to(csrc.resolve()).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return state.hexdigest()[:24]


def ahead_name(source: Path, csrc: Path, arch: str) -> str:
    """File of a cubin built with the package: other sources are other names."""
    return f"{source.stem}-{digest(source, csrc)}.sm_{arch}.cubin"
