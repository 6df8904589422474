"""One file per op: every other way to compute it that installs, and what we promise against them."""

from __future__ import annotations

import importlib
import pkgutil

from ..suite import Suite


def names() -> list[str]:
    """Ops that have a suite."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(op: str) -> Suite:
    """The :class:`Suite` of an op."""
    return importlib.import_module(f"{__name__}.{op}").SUITE
