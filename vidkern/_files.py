"""Files appear whole or not at all, in folders that were tried before any work; and where the user's cache is."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` (same suffix); renames it to ``path`` on success, deletes it on failure."""
    path = Path(path)
    fresh = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def prepare_folder(path: str | os.PathLike) -> Path:
    """Make the output folder and prove that it can be written, before any work is done."""
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "write-test") as fresh:
            fresh.touch()
        (out / "write-test").unlink()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error}), expected a folder to write into") from error
    return out


def cache_dir() -> Path:
    """``$VIDKERN_CACHE``, or vidkern's folder in the platform's place for caches."""
    named = os.environ.get("VIDKERN_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vidkern"
