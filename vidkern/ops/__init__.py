"""One room per op: its public function, reference, launchers, costs and sample inputs."""

import importlib

ROOMS = (
    "grid_attention", "merge_attention", "pyramid_decompose", "pyramid_merge", "pyramid_flow_inputs", "pyramid_flow_loss",
    "pyramid_flow_step", "pyramid_stage_inputs", "pyramid_stage_transition", "pruned_linear",
    "pruned_ffn", "pruned_linear_grouped", "attention_motion_flow",
)  # fmt: skip


def load_all() -> None:
    """Import every room, which registers every op."""
    for room in ROOMS:
        importlib.import_module(f"{__name__}.{room}")
