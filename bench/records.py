"""Where measurements live: one JSON file per measured block, and a CSV of an op's blocks beside it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import machine

FIELDS = (
    "shape", "dtype", "mode", "memory", "candidate", "status", "ms_median", "ms_min", "ms_iqr", "gflops", "of_limit",
    "peak_mib", "error", "grad_error", "ratio", "backend", "reason", "device", "threads", "others_share",
    "torch", "vidkern", "commit", "date",
)  # fmt: skip


def default_dir() -> Path:
    """``bench/results`` of the checkout this runs from; for an installed vidkern, a folder of the user's."""
    root = machine.checkout()
    return users_dir() if root is None else root / "bench" / "results"


def users_dir() -> Path:
    """The user's own folder of measurements."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "vidkern" / "bench"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; takes the place of ``path`` only when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def folder(results: Path, device: str) -> Path:
    return results / device


def path_of(results: Path, record: dict) -> Path:
    name = "-".join((record["shape"]["name"], record["dtype"], record["mode"], record["memory"]))
    return folder(results, record["machine"]["device"]) / record["op"] / f"{name}.json"


def save(results: Path, record: dict) -> Path:
    """Write a block's record, in place of an earlier one of the same block."""
    path = path_of(results, record)
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return path


def load_all(results: Path, device: str, op: str) -> list[dict]:
    """Every record of an op on a device, sorted by file name."""
    return [json.loads(p.read_text()) for p in sorted((folder(results, device) / op).glob("[!.]*.json"))]


def rows(record: dict) -> list[dict]:
    """A record as flat rows of :data:`FIELDS`, one per candidate."""
    where, versions = record["machine"], record["machine"]["versions"]
    shared = {
        "shape": record["shape"]["name"],
        **{k: record[k] for k in ("dtype", "mode", "memory", "others_share")},
        **{k: where.get(k) for k in ("device", "threads", "commit", "date")},
        **{k: versions.get(k) for k in ("torch", "vidkern")},
    }
    flat = []
    for row in record["rows"]:
        times = row.get("seconds") or {}
        flat.append(
            {
                **shared,
                **{f"ms_{k}": f"{times[k] * 1e3:.6g}" for k in ("median", "min", "iqr") if k in times},
                **{k: row[k] for k in FIELDS if k in row},
                "candidate": row["name"],
            }
        )
    return flat


def save_csv(results: Path, device: str, op: str) -> Path:
    """Rewrite the CSV of an op from all its records."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in load_all(results, device, op):
        writer.writerows(rows(record))
    path = folder(results, device) / f"{op}.csv"
    write_text(path, text.getvalue())
    return path
