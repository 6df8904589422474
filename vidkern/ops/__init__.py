"""One room per op: its public function, reference, launchers, costs and sample inputs."""

import importlib

ROOMS = ("grid_attention", "merge_attention")


def load_all() -> None:
    """Import every room, which registers every op."""
    for room in ROOMS:
        importlib.import_module(f"{__name__}.{room}")
