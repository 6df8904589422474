"""What a GPU run found, in one JSON file, one CSV and one picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
from pathlib import Path

from . import records, targets
from .gpu_job import is_dry, load
from .roofline import CEILINGS

FIELDS = (
    "shape", "dtype", "mode", "candidate", "status", "ms_median", "ms_min", "ms_iqr", "tflops", "of_ceiling", "useful_tflops",
    "ratio", "peak_mib", "host_us", "build_seconds", "first_call_seconds", "error", "grad_error", "reason", "device", "driver",
    "power_limit", "torch", "triton", "vidkern", "commit", "date", "dry",
)  # fmt: skip
MODES = {"fwd": "forward", "bwd": "backward"}
COLOURS = {"vidkern": "#B00020", "torch": "#0072B2", "flash-attn": "#009E73", "dense": "#9A9A9A"}


def time_blocks(folder: Path) -> list[dict]:
    """The blocks of stage ``time``, in the order of the shapes' names."""
    found = [load(p) for p in sorted((folder / "gpu" / "time").glob("[!.]*.json"))]
    return [b for b in found if b]


def write(folder: Path, name: str = "grid_attention-gpu") -> list[Path]:
    """(Re)write ``<name>.json``, ``.csv`` and, with matplotlib, ``.png`` from what the stages have left in ``folder``; and
    :func:`write_ops`."""
    blocks = time_blocks(folder)
    more = write_ops(folder)
    parts = {n: load(folder / "gpu" / f"{n}.json") for n in ("machine", "build", "verify", "sweep", "profile")}
    parts["sanitize"] = {p.stem: load(p) for p in sorted((folder / "gpu" / "sanitize").glob("[!.]*.json"))}
    if not blocks and not any(parts.values()):
        return more
    verdicts = {
        f"{b['shape']['name']} {b['dtype']} {b['mode']}": [{"met": v.met, "text": v.text} for v in targets.evaluate_gpu(b)]
        for b in blocks
        if not is_dry(b)
    }
    written = [folder / f"{name}.json", *more]
    dry = any(map(is_dry, [*blocks, *filter(None, (v for k, v in parts.items() if k != "sanitize"))]))
    content = {**{k: v for k, v in parts.items() if v}, "time": blocks, "targets": verdicts, "dry": dry}
    records.write_text(written[0], json.dumps(content, indent=1, sort_keys=True) + "\n")
    if not blocks:
        return written
    written.append(folder / f"{name}.csv")
    records.write_text(written[-1], table(blocks, parts["machine"] or {}))
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(folder / f"{name}.png")
        draw(blocks, parts["machine"] or {}, written[-1])
    return written


def write_ops(folder: Path) -> list[Path]:
    """(Re)write ``ops-gpu.json`` from what stage ``ops`` has left."""
    blocks = [b for b in map(load, sorted((folder / "gpu" / "ops").glob("[!.]*.json"))) if b]
    if not blocks:
        return []
    content = {"machine": load(folder / "gpu" / "machine.json"), "ops": blocks, "dry": any(map(is_dry, blocks))}
    records.write_text(folder / "ops-gpu.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    return [folder / "ops-gpu.json"]


def table(blocks: list[dict], where: dict) -> str:
    """A CSV with a row per candidate."""
    smi, versions = where.get("nvidia_smi") or {}, where.get("versions") or {}
    shared = {
        "device": where.get("device"), "driver": smi.get("driver_version"), "power_limit": smi.get("power.limit"),
        **{k: versions.get(k) for k in ("torch", "triton", "vidkern")}, **{k: where.get(k) for k in ("commit", "date")},
    }  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for block in blocks:
        for row in block["rows"]:
            times = row.get("seconds") or {}
            writer.writerow({
                **shared, "dry": is_dry(block),
                "shape": block["shape"]["name"], "dtype": block["dtype"], "mode": block["mode"], "candidate": row["name"],
                **{f"ms_{k}": f"{times[k] * 1e3:.6g}" for k in ("median", "min", "iqr") if k in times},
                **{k: f"{row[k]:.6g}" if isinstance(row[k], float) else row[k] for k in FIELDS if k in row},
            })  # fmt: skip
    return text.getvalue()


def draw(blocks: list[dict], where: dict, path: Path) -> None:
    """Bars of useful FLOP/s, a row of panels per shape and a column per mode, with the measured ceiling as a line where the bars come
    near it and in words where they do not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    modes = [m for m in ("fwd", "bwd") if any(b["mode"] == m for b in blocks)]
    shapes = sorted({b["shape"]["name"] for b in blocks})
    rows = {(b["shape"]["name"], b["mode"]): sorted((r for r in b["rows"] if r["status"] == "timed"), key=_useful) for b in blocks}
    unit, factor, decimals = _scale([_useful(r) for found in rows.values() for r in found])
    bars = [max(1, *(len(rows.get((name, mode), ())) for mode in modes)) for name in shapes]
    heights = [0.9 + 0.23 * n for n in bars]
    figure = Figure(figsize=(6.4 * len(modes), sum(heights) + 0.8), dpi=110, layout="constrained")
    grid = figure.subplots(len(shapes), len(modes), squeeze=False, height_ratios=heights)
    by_key = {(b["shape"]["name"], b["mode"]): b for b in blocks}
    for i, name in enumerate(shapes):
        for j, mode in enumerate(modes):
            if (name, mode) in by_key:
                _panel(grid[i][j], by_key[name, mode], rows[name, mode], unit, factor, decimals)
            else:
                grid[i][j].set_axis_off()
    figure.suptitle("\n".join(title(blocks, where)), fontsize=11)
    with records.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def title(blocks: list[dict], where: dict) -> list[str]:
    """The lines above the picture."""
    lines = [f"grid attention, {blocks[0]['dtype']}, {where.get('device', '')}".rstrip(", ")]
    if any(r["group"] == "dense" and r["status"] == "timed" for b in blocks for r in b["rows"]):
        lines.append("[ ]: the rate of dense attention, which computes every pair, over its own FLOPs")
    if any(map(is_dry, blocks)):
        stand_in = f"a stand-in, {_numbers(blocks[0]['shape'])}, for every shape: only that the code runs is shown"
        lines[:1] = [f"DRY RUN of {lines[0]}", stand_in]
    return lines


def _panel(axes, block: dict, rows: list[dict], unit: str, factor: float, decimals: int) -> None:
    values = [_useful(r) * factor for r in rows]
    labels = [f"{r['name']} [{r['tflops'] * factor:.{decimals}f}]" if r["group"] == "dense" else r["name"] for r in rows]
    axes.barh(range(len(rows)), values, color=[COLOURS.get(r["group"], "#555555") for r in rows], height=0.7)
    axes.set_yticks(range(len(rows)), labels)
    top, longest = block["ceiling"]["tflops"] * factor, max(values, default=0)
    ceiling = f"{CEILINGS[block['ceiling']['name']]}, {top:.{decimals}f}"
    near = top <= 2 * longest
    if near:
        axes.axvline(top, color="black", lw=1.2)
    axes.set_xlim(0, (max(top, longest) if near else longest or 1) * 1.16)
    for y, value in enumerate(values):
        axes.text(value, y, f" {value:.{decimals}f}", va="center", fontsize=8)
    s = block["shape"]
    what = f"stand-in for {s['name']}" if is_dry(block) else f"{s['name']}: {_numbers(s)}"
    axes.set_title(f"{what}, {MODES[block['mode']]}", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.set_xlabel(f"useful {unit} ({'line' if near else 'the ceiling, off to the right'}: {ceiling})", fontsize=8)


def _numbers(s: dict) -> str:
    return f"V{s['views']} T{s['times']} N{s['tokens']} H{s['heads']} D{s['head_dim']}"


def _scale(tflops: list[float]) -> tuple[str, float, int]:
    """Unit, what to multiply TFLOP/s with, and decimals, such that all values of a picture are written alike: three digits for the
    largest, one decimal at least."""
    most = max(tflops, default=0)
    unit, factor = ("TFLOP/s", 1) if most >= 1 else ("GFLOP/s", 1e3)
    return unit, factor, min(4, max(1, 2 - math.floor(math.log10(most * factor)))) if most else 1


def _useful(row: dict) -> float:
    return row.get("useful_tflops", row["tflops"])
