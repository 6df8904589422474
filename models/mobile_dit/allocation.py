"""Which units to remove: greedily, whatever costs least quality per unit of cost that it saves, until the budget is met.

Cost is parameters (`ParameterCost`) or measured time (`latency.LatencyCost`). Every kept block keeps at least one head of each attention and one
FFN group, and the first and the last block stay. By default a self-attention head goes together with a cross-attention head of its block, so
that their numbers stay equal. Removing in this order is nested: a smaller budget keeps a subset of what a larger one keeps, as long as scores
are not measured again on the way.
"""

import dataclasses

from vidkern.errors import UserError

from ..shared.table_dit import TableConfig
from .keep import Keep, Unit

EVERY = {"block": 1, "heads": 32, "ffn": 32}


class BudgetError(UserError, ValueError):
    """No selection meets the budget; the message names the smallest that can be reached."""


class ParameterCost:
    """Parameters of a model with given counts, by formula."""

    unit = "parameters"

    def __init__(self, config: TableConfig):
        C, patch = config.dim, config.channels * config.patch**2
        self.config = config
        self.base = sum((patch * C + C, config.freq_dim * C + C, C * C + C, C * 6 * C + 6 * C, config.text_dim * C + C, C * C + C, 2 * C,
                         C * (config.out_channels or config.channels) * config.patch**2 + (config.out_channels or config.channels) * config.patch**2))

    def _attention(self, heads):
        C, D = self.config.dim, self.config.head_dim
        norm = {"none": 0, "head": 2 * D, "all": 2 * heads * D}[self.config.qk_norm] if heads else 0
        return 4 * C * heads * D + 3 * heads * D + norm + C

    def block(self, heads, cross_heads, hidden, cross=True):
        """Parameters of a block."""
        C = self.config.dim
        return self._attention(heads) + cross * self._attention(cross_heads) + 2 * C * hidden + hidden + C + 6 * C

    def total(self, shapes):
        """Of a model whose blocks have these (heads, cross heads, hidden)."""
        return self.base + sum(self.block(*shape) for shape in shapes)


@dataclasses.dataclass
class _State:
    """What is still there, per level and block, least score first."""

    config: TableConfig
    blocks: dict        # block -> score
    left: dict          # (level, block) -> [(score, index), ...], rising

    def shape(self, b):
        return tuple(len(self.left[level, b]) * (self.config.group if level == "ffn" else 1) for level in ("heads", "xheads", "ffn"))

    def shapes(self):
        return [self.shape(b) for b in sorted(self.blocks)]

    def keep(self):
        parts = {level: {b: tuple(sorted(i for _, i in self.left[level, b])) for b in sorted(self.blocks)} for level in ("heads", "xheads", "ffn")}
        return Keep(tuple(sorted(self.blocks)), **parts, group=self.config.group)


def _state(config, scores):
    left = {(level, b): [] for b in range(len(config.blocks)) for level in ("heads", "xheads", "ffn")}
    for unit, score in scores.items():
        if unit.level != "block":
            left[unit.level, unit.block].append((score, unit.index))
    return _State(config, {u.block: s for u, s in scores.items() if u.level == "block"}, {key: sorted(found) for key, found in left.items()})


def _same_units(scores, state):
    """New scores, if they are those of the units that are left."""
    left = {Unit("block", b) for b in state.blocks}
    left |= {Unit(level, b, i) for (level, b), found in state.left.items() if b in state.blocks for _, i in found}
    if set(scores) != left:
        raise ValueError(f"remeasure: scores of {len(scores)} units, expected those of the {len(left)} that are left")
    return scores


def _removals(state, tie, protected):
    """(score, level, block, units) of the cheapest removal of every kind in every block."""
    for b in sorted(state.blocks):
        if b not in protected:
            yield state.blocks[b], "block", b, (Unit("block", b),)
        own, cross, groups = (state.left[level, b] for level in ("heads", "xheads", "ffn"))
        pairs = [("heads", own), ("xheads", cross)]
        for chosen in ([pairs] if tie and len(own) == len(cross) else [[pair] for pair in pairs]):
            if all(len(found) > 1 for _, found in chosen):
                yield sum(found[0][0] for _, found in chosen), "heads", b, tuple(Unit(level, b, found[0][1]) for level, found in chosen)
        if len(groups) > 1:
            yield groups[0][0], "ffn", b, (Unit("ffn", b, groups[0][1]),)


def _after(shape, units, group):
    heads, cross, hidden = shape
    for unit in units:
        heads, cross, hidden = heads - (unit.level == "heads"), cross - (unit.level == "xheads"), hidden - group * (unit.level == "ffn")
    return heads, cross, hidden


def smallest(config, cost, *, protect_ends=True):
    """The least cost that can be reached."""
    ends = {0, len(config.blocks) - 1} if protect_ends else {0}
    specs = [spec for b, spec in enumerate(config.blocks) if b in ends]
    return cost.total([(min(1, s.heads), min(1, s.cross_heads), config.group) for s in specs])


def allocate(config, scores, budget, *, cost=None, remeasure=None, every=EVERY, tie=True, protect_ends=True, trace=None):
    """The keep-list of the greedy selection under `budget`, in the units of `cost` (default: parameters).

    scores: {Unit: score} of every unit. remeasure(keep) -> scores: called after every `every[level]` removals of a level. tie: remove heads of
    both attentions in pairs. trace: a list that receives (units, cost after) in order of removal. Raises BudgetError when the budget cannot be
    met. Ties go to the lower block and index.
    """
    cost = cost or ParameterCost(config)
    least = smallest(config, cost, protect_ends=protect_ends)
    if not budget >= least:
        raise BudgetError(f"budget={budget:,}: expected at least {least:,} {cost.unit}, the smallest that can be reached")
    protected = {0, len(config.blocks) - 1} if protect_ends else set()
    state, removed = _state(config, scores), dict.fromkeys(every, 0)
    while (now := cost.total(state.shapes())) > budget:
        ranked = []
        for score, level, b, units in _removals(state, tie, protected):
            if level == "block":
                if len(state.blocks) == 1:
                    continue
                saved = cost.block(*state.shape(b))
            else:
                saved = cost.block(*state.shape(b)) - cost.block(*_after(state.shape(b), units, config.group))
            # What saves nothing (a step of a measured table may be flat) comes after all that does.
            ranked.append((saved <= 0, score / saved if saved > 0 else score, b, len(ranked), level, units))
        if not ranked:
            raise BudgetError(f"budget={budget:,}: {now:,} {cost.unit} are left and nothing can be removed")
        *_, level, units = min(ranked)
        for unit in units:
            if unit.level == "block":
                del state.blocks[unit.block]
            else:
                del state.left[unit.level, unit.block][0]
        removed[level] += 1
        if trace is not None:
            trace.append((units, cost.total(state.shapes())))
        if remeasure is not None and removed[level] % every[level] == 0 and cost.total(state.shapes()) > budget:
            state = _state(config, _same_units(remeasure(state.keep()), state))
    return state.keep()


def select(config, scores, *, blocks, heads, hidden, protect_ends=True):
    """The best `blocks` blocks, and in each the best `heads` heads of both attentions and `hidden` FFN channels: uniform counts, as published."""
    ends = {0, len(config.blocks) - 1} if protect_ends else set()
    if not max(1, len(ends)) <= blocks <= len(config.blocks):
        raise BudgetError(f"blocks={blocks}: expected {max(1, len(ends))} to {len(config.blocks)}")
    if hidden % config.group or hidden < config.group:
        raise BudgetError(f"hidden={hidden}: expected a positive multiple of the group, {config.group}")
    if heads < 1:
        raise BudgetError(f"heads={heads}: expected at least 1")
    ranked = sorted(range(len(config.blocks)), key=lambda b: (b not in ends, -scores[Unit("block", b)], b))
    kept = tuple(sorted(ranked[:blocks]))
    wanted = {"heads": heads, "xheads": heads, "ffn": hidden // config.group}
    state, parts = _state(config, scores), {level: {} for level in wanted}
    for level, count in wanted.items():
        for b in kept:
            there = state.left[level, b]
            if count > len(there):
                raise BudgetError(f"{'hidden' if level == 'ffn' else 'heads'}: block {b} has {len(there)} {level}, expected at least {count}")
            parts[level][b] = tuple(sorted(i for _, i in there[len(there) - count:]))
    return Keep(kept, **parts, group=config.group)
