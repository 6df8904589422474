"""What a GPU run found, in one JSON file, one CSV and one picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path

from . import records, targets
from .gpu_job import load

FIELDS = (
    "shape", "dtype", "mode", "candidate", "status", "ms_median", "ms_min", "ms_iqr", "tflops", "of_ceiling", "useful_tflops",
    "ratio", "peak_mib", "host_us", "build_seconds", "first_call_seconds", "error", "grad_error", "reason", "device", "driver",
    "power_limit", "torch", "triton", "vidkern", "commit", "date",
)  # fmt: skip
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
    }
    written = [folder / f"{name}.json", *more]
    content = {**{k: v for k, v in parts.items() if v}, "time": blocks, "targets": verdicts}
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
    content = {"machine": load(folder / "gpu" / "machine.json"), "ops": blocks}
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
                **shared, "shape": block["shape"]["name"], "dtype": block["dtype"], "mode": block["mode"], "candidate": row["name"],
                **{f"ms_{k}": f"{times[k] * 1e3:.6g}" for k in ("median", "min", "iqr") if k in times},
                **{k: f"{row[k]:.6g}" if isinstance(row[k], float) else row[k] for k in FIELDS if k in row},
            })  # fmt: skip
    return text.getvalue()


def draw(blocks: list[dict], where: dict, path: Path) -> None:
    """Bars of useful TFLOP/s, a row of panels per mode and a panel per shape, with the measured matmul rate as the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    modes = [m for m in ("fwd", "bwd") if any(b["mode"] == m for b in blocks)]
    shapes = sorted({b["shape"]["name"] for b in blocks})
    figure = Figure(figsize=(4.6 * len(shapes) + 1, 3.3 * len(modes) + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(len(modes), len(shapes), squeeze=False)
    by_key = {(b["mode"], b["shape"]["name"]): b for b in blocks}
    for i, mode in enumerate(modes):
        for j, name in enumerate(shapes):
            axes, block = grid[i][j], by_key.get((mode, name))
            if block is None:
                axes.set_axis_off()
                continue
            rows = sorted((r for r in block["rows"] if r["status"] == "timed"), key=lambda r: _useful(r))
            values = [_useful(r) for r in rows]
            axes.barh([_label(r) for r in rows], values, color=[COLOURS.get(r["group"], "#555555") for r in rows])
            top = block["ceiling"]["tflops"]
            axes.axvline(top, color="black", lw=1.2)
            axes.set_xlim(0, max([top, *values]) * 1.12)
            for y, value in enumerate(values):
                axes.text(value, y, f" {value:.3g}", va="center", fontsize=7)
            s = block["shape"]
            axes.set_title(f"{name} {mode}: V{s['views']} T{s['times']} N{s['tokens']} H{s['heads']} D{s['head_dim']}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_xlabel("useful TFLOP/s (line: matmul on this device)", fontsize=7)
    figure.suptitle(f"grid attention, {blocks[0]['dtype']}, {where.get('device', '')}", fontsize=10)
    with records.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _useful(row: dict) -> float:
    return row.get("useful_tflops", row["tflops"])


def _label(row: dict) -> str:
    return f"{row['name']} [{row['tflops']:.3g} dense]" if row["group"] == "dense" else row["name"]
