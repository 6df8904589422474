"""Simple ways to fill an unseen cell from its references, to compare a trained model with. Grids are [B, V, T, C, H, W]."""

import torch


def baselines(grid):
    """{name: filled grid}, each made from view 0 and time 0 of `grid` alone; those cells stay as they are.

    nearest: the reference cell at the smallest grid distance (view index to the fixed-view frame, time index to the freeze-time
    frame; ties take the fixed view). same_time, same_view: always that one. mean: their average. weighted: averaged by the inverse of
    the distances. change: freeze-time frame plus what changed in the fixed view, clamped to the value range [-1, 1].
    """
    V, T = grid.shape[1:3]
    same_time, same_view = grid[:, :1].expand_as(grid), grid[:, :, :1].expand_as(grid)
    corner = grid[:, :1, :1].expand_as(grid)
    view = torch.arange(V, device=grid.device).view(1, V, 1, 1, 1, 1)
    time = torch.arange(T, device=grid.device).view(1, 1, T, 1, 1, 1)
    weight = time / (view + time).clamp_min(1)
    filled = {
        "nearest": torch.where(view <= time, same_time, same_view),
        "same_time": same_time,
        "same_view": same_view,
        "mean": (same_time + same_view) / 2,
        "weighted": weight * same_time + (1 - weight) * same_view,
        "change": (same_view + same_time - corner).clamp(-1, 1),
    }
    given = (view == 0) | (time == 0)
    return {name: torch.where(given, grid, value) for name, value in filled.items()}
