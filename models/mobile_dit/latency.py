"""Time as a budget: a table of measured milliseconds by kind of layer and count, and the cost that it makes."""

import bisect
import dataclasses
import json
import statistics
import time

import torch

from vidkern._files import replacing

from .model import MobileDiT

KINDS = ("heads", "cross_heads", "hidden")


@dataclasses.dataclass(frozen=True)
class LatencyCost:
    """Milliseconds of one evaluation: base + a fixed part per block + what its counts cost, linearly between the measured ones.

    tables: {"heads", "cross_heads", "hidden": [(count, milliseconds), ...]}. Noise may make a measured table fall; it is made to rise or stay.
    """

    base: float
    fixed: float
    tables: dict

    unit = "milliseconds"

    def __post_init__(self):
        rising = {}
        for kind in KINDS:
            points, highest = sorted((int(n), float(ms)) for n, ms in self.tables.get(kind, ())), 0.0
            if not points:
                raise ValueError(f"tables: no points of {kind!r}, expected at least one")
            rising[kind] = []
            for n, ms in points:
                highest = max(highest, ms)
                rising[kind].append((n, highest))
        object.__setattr__(self, "tables", rising)

    def _at(self, kind, count):
        points = self.tables[kind]
        if count == 0:
            return 0.0
        where = bisect.bisect_left(points, (count, float("-inf")))
        if where == len(points):
            (n, ms) = points[-1]
            return ms * count / n
        if points[where][0] == count or where == 0:
            return points[where][1]
        (n0, ms0), (n1, ms1) = points[where - 1], points[where]
        return ms0 + (ms1 - ms0) * (count - n0) / (n1 - n0)

    def block(self, heads, cross_heads, hidden):
        """Milliseconds of a block."""
        return self.fixed + sum(self._at(kind, n) for kind, n in zip(KINDS, (heads, cross_heads, hidden)))

    def total(self, shapes):
        """Of a model whose blocks have these (heads, cross heads, hidden)."""
        return self.base + sum(self.block(*shape) for shape in shapes)

    def save(self, path):
        with replacing(path) as fresh:
            fresh.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        with open(path, encoding="utf-8") as file:
            return cls(**json.load(file))


@torch.no_grad()
def medians(calls, *, repeats=15, warm=3):
    """Median milliseconds of every call, {name: function}; they run in turn, so that a disturbance meets all of them."""
    found = {name: [] for name in calls}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm:
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def measure_latency(config, shape, text_length=77, *, batch=1, points=4, repeats=15, device="cpu", dtype=torch.float32, packed=False):
    """A `LatencyCost` measured on this machine for latents of `shape` (T, H, W): one-block models of `points` counts of each kind, in turn.

    Counts run from one unit to the greatest of the configuration's; points: at least 2 (ValueError). The base is what remains of a whole
    evaluation at full counts.
    """
    from .cutting import pack

    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ValueError(f"points={points!r}: expected an integer of at least 2, a slope needs two counts")
    most = {"heads": max(s.heads for s in config.blocks), "cross_heads": max(s.cross_heads for s in config.blocks),
            "hidden": max(s.hidden for s in config.blocks) // config.group}
    z = torch.randn(batch, config.channels, *shape, device=device, dtype=dtype)
    sigma, text = torch.full((batch,), 0.5, device=device), torch.randn(batch, text_length, config.text_dim, device=device, dtype=dtype)

    def model(heads, cross_heads, groups, blocks=1):
        spec = dataclasses.replace(config.blocks[0], heads=heads, cross_heads=cross_heads, hidden=groups * config.group, rope_heads=())
        made = MobileDiT(dataclasses.replace(config, blocks=(spec,) * blocks)).to(device, dtype).eval()
        made = pack(made) if packed else made
        return lambda: made(z, sigma, text)

    counts = {kind: sorted({max(1, round(1 + (n - 1) * i / (points - 1))) for i in range(points)}) for kind, n in most.items()}
    full = tuple(most.values())
    calls = {("full", 1): model(*full), ("full", 2): model(*full, blocks=2)}
    for position, (kind, found) in enumerate(counts.items()):
        for n in found[:-1]:
            calls[kind, n] = model(*(n if i == position else value for i, value in enumerate(full)))
    times = medians(calls, repeats=repeats)
    whole, block = times["full", 1], max(times["full", 2] - times["full", 1], 0.0)
    tables, variable = {}, 0.0
    for kind, found in counts.items():
        unit = config.group if kind == "hidden" else 1
        # A block's part that depends on a count, extrapolated to no units at all, is the slope times the count.
        n0, n1 = found[0], found[-1]
        slope = max(whole - times.get((kind, n0), whole), 0.0) / max(n1 - n0, 1)
        tables[kind] = [(n * unit, max(slope * n1 - (whole - times.get((kind, n), whole)), 0.0)) for n in found]
        variable += slope * n1
    fixed = max(block - variable, 0.0)
    return LatencyCost(base=max(whole - block, 0.0), fixed=fixed, tables=tables)
