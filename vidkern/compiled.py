"""The compiled CPU part, if it is there, and the reason if it is not."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

# torch's OpenMP runtime must be in the process before ours is loaded, so that both share one thread pool.
import torch  # noqa: F401


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("vidkern._cpu"), None
    except ImportError as error:
        # A tier that was named never falls back silently.
        if "VIDKERN_CPU_ISA" in str(error):
            raise ValueError(str(error)) from None
        record = Path(__file__).with_name("_build_info.json")
        if "vidkern._cpu" in str(error) and record.is_file():
            reason = json.loads(record.read_text()).get("reason")
            if reason:
                return None, f"not built: {reason}"
        return None, f"does not load: {error}"


def cpu() -> ModuleType | None:
    """The extension module ``vidkern._cpu``, or None."""
    return _load()[0]


def cpu_missing() -> str | None:
    """Why :func:`cpu` is None: one sentence, or None when the part is there."""
    return _load()[1]
