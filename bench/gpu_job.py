"""A stage's place on disk and in time: results survive a cut, and a rerun goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import records


class OutOfTime(Exception):
    """The stage's time is used up; what was measured is on disk."""


@dataclass
class Job:
    """One stage of a run.

    Args:
        folder: of the device's results; a stage's files lie in ``folder/gpu/<stage>``.
        device: "cuda", or "cpu" in a dry run.
        stamp: what results depend on (sources, versions, options); those of another stamp are measured anew.
        seconds: the stage's time.
        fresh: throw away what the stage had measured before.
    """

    folder: Path
    device: str
    stamp: dict
    seconds: float = 540.0
    quick: bool = False
    dry: bool = False
    fresh: bool = False
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.begun + self.seconds - time.monotonic()

    @property
    def deadline(self) -> float:
        """The end on ``time.monotonic()``'s clock."""
        return self.begun + self.seconds

    def need(self, seconds: float) -> None:
        """Raises OutOfTime when less than ``seconds`` remain."""
        if self.left < seconds:
            raise OutOfTime(f"{max(0, self.left):.0f} s left of {self.seconds:.0f}, {seconds:.0f} needed")

    def path(self, name: str) -> Path:
        return self.folder / "gpu" / name

    def forget(self, stage: str, shapes: Sequence[str] | None = None) -> None:
        """Delete everything of a stage, or what it has of the shapes named."""
        if shapes:
            for path in [p for name in shapes for p in self.path(stage).glob(f"{name}-*")]:
                path.unlink(missing_ok=True)
            return
        self.path(f"{stage}.json").unlink(missing_ok=True)
        shutil.rmtree(self.path(stage), ignore_errors=True)

    def done(self, name: str) -> dict | None:
        """What an earlier run saved under ``name``, if it still holds and was not cut short."""
        found = load(self.path(f"{name}.json"))
        return found if found and found.get("stamp") == self.stamp and not found.get("cut") else None

    def save(self, name: str, content: dict) -> dict:
        """Keep a result, whole or not at all."""
        content = {"dry": self.dry, **content, "stamp": self.stamp}
        records.write_text(self.path(f"{name}.json"), json.dumps(content, indent=1, sort_keys=True) + "\n")
        return content

    def append(self, name: str, row: dict) -> None:
        """Add a line to ``<name>.jsonl``; it is on disk when this returns."""
        path = self.path(f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "stamp": self.stamp}, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self, name: str) -> list[dict]:
        """The lines of ``<name>.jsonl`` that still hold; one that a cut left half written is passed over."""
        path = self.path(f"{name}.jsonl")
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("stamp") == self.stamp:
                found.append(row)
        return found


def is_dry(record: dict) -> bool:
    """Whether a saved record is of a dry run, whose times say nothing."""
    return bool(record.get("dry") or record.get("stamp", {}).get("dry"))


def load(path: Path) -> dict | None:
    """A JSON file, or None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
