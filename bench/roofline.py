"""The roofline of an op on a device: how far each candidate is from what the machine can do."""

from __future__ import annotations

import math
from pathlib import Path

from . import limits, records

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B", "#17BECF", "#000000")
CEILINGS = {
    "peak_float32": "fp32 multiply-add, registers",
    "peak_bfloat16": "bf16 dot, registers",
    "mm_float32": "torch.mm fp32",
    "mm_bfloat16": "torch.mm bf16",
    "onednn_float32": "oneDNN linear fp32",
}


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``values``, at least ``gap`` apart and within [low, high] as far as there is room.

    Neighbours that are too close form a group that is centred on its members' mean; groups that then touch are joined.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []

    def start(group):
        half = gap * (len(group) - 1) / 2
        middle = sum(values[i] for i in group) / len(group)
        return max(low, min(middle - half, high - 2 * half))

    for i in order:
        groups.append([i])
        while len(groups) > 1 and start(groups[-2]) + gap * len(groups[-2]) > start(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(values)
    for group in groups:
        for k, i in enumerate(group):
            placed[i] = start(group) + k * gap
    return placed


def _rates(record: dict) -> dict[str, float]:
    """Ceilings that belong to the record's dtype, GFLOP/s with all threads."""
    found, n = {}, str(record["limits"]["threads"])
    for name in CEILINGS:
        if name.endswith(record["dtype"]):
            rate = {str(k): v for k, v in record["limits"].get(name, {}).items()}.get(n)
            if rate:
                found[name] = rate * 1e-9
    return found


def _panel(axes, dtype: str, blocks: dict[str, dict], colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    any_block = next(iter(blocks.values()))
    rates, copy = _rates(any_block), limits.bandwidth(any_block["limits"]) * 1e-9
    top = max(rates.values())
    intensity = {m: b["work"]["flops"] / b["work"]["bytes"] for m, b in blocks.items()}
    centre = math.sqrt(min(intensity.values()) * max(intensity.values()))
    ridge = top / copy
    # Room for the labels on both sides of the points, and the slope of the roof in sight.
    left, right = min(centre / 10**1.75, ridge / 4), max(centre * 10**1.75, ridge * 4)
    points = [
        (mode, r["name"], r["gflops"]) for mode, b in blocks.items() for r in b["rows"] if r["status"] == "timed"
    ]
    slowest = min((p[2] for p in points), default=top)
    low, high = min(slowest / 1.6, top / 12), max(top, *(p[2] for p in points)) * 1.7
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))

    axes.plot([left, ridge, right], [copy * left, top, top], color="black", lw=1.4, zorder=2)
    for name, rate in rates.items():
        if rate < top:
            axes.plot([max(left, rate / copy), right], [rate, rate], color="0.45", lw=1, ls="--", zorder=1)
    span = math.log10(low), math.log10(high)
    heights = spread([math.log10(r) for r in rates.values()], 0.04 * (span[1] - span[0]), *span)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    small = {"fontsize": 7.5, "color": "0.25", "bbox": paper, "va": "center", "zorder": 2}
    for (name, rate), y in zip(rates.items(), heights):
        axes.text(right * 0.93, 10**y, f"{CEILINGS[name]}  {rate:.0f}", ha="right", **small)
    x = max(left, low / copy) ** 0.5 * ridge**0.5
    axes.text(x, copy * x, f"copy {copy:.0f} GB/s", ha="center", **small)

    for mode, side in (("fwd", -1), ("fwdbwd", 1)):
        mine = [(name, g) for m, name, g in points if m == mode]
        if not mine:
            continue
        x = intensity[mode]
        gap = 0.046 * math.log10(high / low)
        ends = math.log10(low) + gap, math.log10(top / 1.08)
        for (name, g), y in zip(mine, spread([math.log10(g) for _, g in mine], gap, *ends)):
            ours = name == "vidkern"
            marker = {"marker": "*", "ms": 13} if ours else {"marker": "o", "ms": 6}
            axes.plot(x, g, **marker, color=colours[name], mec="white", mew=0.6, zorder=4)
            axes.annotate(
                f"{name}  {g:.0f}",
                (x, g),
                (x * 10 ** (side * 0.17), 10**y),
                ha="right" if side < 0 else "left",
                va="center",
                fontsize=8,
                fontweight="bold" if ours else "normal",
                color=colours[name],
                arrowprops={
                    **{"arrowstyle": "-", "color": colours[name], "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
                    "relpos": (1 if side < 0 else 0, 0.5),
                },
                zorder=3,
            )
        axes.annotate(
            {"fwd": "forward", "fwdbwd": "forward + backward"}[mode],
            (x, low),
            (x * 10 ** (side * 0.05), low * 1.05),
            ha="right" if side < 0 else "left",
            va="bottom",
            fontsize=8.5,
            fontstyle="italic",
        )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(dtype, fontsize=10)
    axes.set_xlabel("needed FLOP per least byte")
    axes.grid(True, which="major", color="0.9", lw=0.6, zorder=0)


def draw(blocks: list[dict], path: Path) -> None:
    """A PNG of one op and shape: a panel per dtype, a point per candidate, the ceilings of the same run.

    ``blocks`` are records of one shape and memory setting. Needed work over time is plotted, so that a peer that does
    more than needed does not look better for it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, dict]] = {}
    for block in blocks:
        if any(r["status"] == "timed" for r in block["rows"]):
            panels.setdefault(block["dtype"], {})[block["mode"]] = block
    if not panels:
        return
    names = list(dict.fromkeys(r["name"] for b in blocks for r in b["rows"]))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    colours["vidkern"] = "#B00020"
    figure = Figure(figsize=(7.6 * len(panels), 6.2), dpi=130, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, dtype in zip(grid, sorted(panels, reverse=True)):
        _panel(axes, dtype, panels[dtype], colours)
    grid[0].set_ylabel("GFLOP/s of needed work")
    first = blocks[0]
    figure.suptitle(
        f"{first['op']}, shape {first['shape']['name']}, {first['machine']['device']}, "
        f"{first['machine']['threads']} threads, memory {first['memory']}",
        fontsize=10.5,
    )
    with records.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_all(results: Path, device: str, op: str) -> list[Path]:
    """Redraw every roofline of an op from its records; ``kept`` memory is drawn where both were measured."""
    made = []
    found = records.load_all(results, device, op)
    for shape in dict.fromkeys(r["shape"]["name"] for r in found):
        mine = [r for r in found if r["shape"]["name"] == shape]
        memory = "kept" if any(r["memory"] == "kept" for r in mine) else "default"
        path = records.folder(results, device) / f"{op}-{shape}.png"
        draw([r for r in mine if r["memory"] == memory], path)
        made.append(path)
    return made
