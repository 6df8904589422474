"""`prune`: from a trained model and a budget to a keep-list."""

from .allocation import EVERY, BudgetError, ParameterCost, allocate, select
from .sensitivity import scores


def prune(model, *, budget=None, counts=None, calibration=None, how="auto", cost=None, remeasure=True, every=EVERY, tie=True, protect_ends=True,
          seed=0, trace=None, progress=False):
    """What to keep of a trained `MobileDiT` (a `Keep`, for `compact`).

    budget: parameters, where a float of at most 1 is a share of the model's own; or with `cost` (a `LatencyCost`) milliseconds, never a share:
    0.5 is half a millisecond. Numbers of heads and channels then differ from block to block. Or counts: {"blocks", "heads", "hidden"} for the
    same numbers everywhere.
    calibration: a `Calibration`; needed unless `how` is "magnitude" or "random". how: see `sensitivity.scores`. remeasure: score again on what
    is left, as often as `every` says. tie, protect_ends, trace: see `allocate`. Raises BudgetError for a budget that cannot be met.
    """
    if (budget is None) == (counts is None):
        raise ValueError(f"budget={budget}, counts={counts}: expected one of the two")
    wanted = None if calibration is None else calibration.velocities(model)

    def measured(keep=None):
        return scores(model, calibration, keep=keep, how=how, wanted=wanted, seed=seed, progress=progress)

    if counts is not None:
        if set(counts) != {"blocks", "heads", "hidden"}:
            raise ValueError(f"counts: {sorted(counts)}, expected blocks, heads, hidden")
        return select(model.config, measured(), **counts, protect_ends=protect_ends)
    cost = cost or ParameterCost(model.config)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise BudgetError(f"budget={budget!r}: expected a positive number")
    if isinstance(budget, float) and budget <= 1 and cost.unit == "parameters":
        budget = budget * cost.total([(s.heads, s.cross_heads, s.hidden) for s in model.config.blocks])
    again = measured if remeasure and how not in ("magnitude", "random") else None
    return allocate(model.config, measured(), budget, cost=cost, remeasure=again, every=every, tie=tie, protect_ends=protect_ends, trace=trace)
