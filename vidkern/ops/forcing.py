"""What sweeps and tests make kernels run with, whatever an op's tables say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Forced:
    """A configuration for some of an op's kernels, as long as blocks of ``with`` last.

    Args:
        kinds: the op's kernels.
    """

    def __init__(self, kinds: tuple[str, ...]):
        self._kinds, self._now = kinds, dict[str, Any]()

    def get(self, kind: str) -> Any:
        """What kernel ``kind`` is to run with at this moment, or None."""
        return self._now.get(kind)

    @contextlib.contextmanager
    def __call__(self, kind: str, config: Any) -> Iterator[None]:
        """Run kernel ``kind`` with ``config``.

        Raises:
            ValueError: for a kernel that the op does not have.
        """
        if kind not in self._kinds:
            raise ValueError(f"kind: {kind!r}, expected one of {self._kinds}")
        before = self.get(kind)
        self._now[kind] = config
        try:
            yield
        finally:
            self._now[kind] = before
