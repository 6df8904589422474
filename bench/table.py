"""A block's record as plain text."""

from __future__ import annotations

from .targets import Verdict

COLUMNS = ("candidate", "ms", "min", "IQR", "GFLOP/s", "% limit", "peak MiB", "max error", "grad error", "time / ours")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def _cells(row: dict) -> tuple[str, ...]:
    s = row["seconds"]
    name = row["name"] + (f" [{row['backend']}]" if row.get("backend") else "")
    times = (_number(s[k] * 1e3) for k in ("median", "min", "iqr"))
    error = (f"{row[k]:.1e}" if row.get(k) is not None else "-" for k in ("error", "grad_error"))
    ratio = row.get("ratio")
    return (
        name,
        *times,
        _number(row["gflops"]),
        f"{100 * row['of_limit']:.1f}",
        _number(row.get("peak_mib")),
        *error,
        f"{ratio:.2f}" if ratio else "-",
    )


def align(lines: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]


def _limits(limits: dict) -> list[str]:
    threads = sorted({int(t) for rates in limits.values() if isinstance(rates, dict) for t in rates})
    lines = [("limits measured in this run", *(f"{t} thr" for t in threads), "")]
    for name, rates in limits.items():
        if not isinstance(rates, dict) or not rates:
            continue
        rates = {int(t): r for t, r in rates.items()}
        cells = (f"{rates[t] * 1e-9:.1f}" if rates.get(t) else "-" for t in threads)
        lines.append((f"  {name}", *cells, "GB/s" if name == "copy" else "GFLOP/s"))
    return align(lines)


def _shape(record: dict) -> str:
    shape = {k: v for k, v in record["shape"].items() if k not in ("name", "about")}
    return f"{record['shape']['name']}: " + ", ".join(f"{k} {v}" for k, v in shape.items())


def render(record: dict, verdicts: list[Verdict]) -> str:
    """The table of one block, the peers that did not run with the reason, the limits and the targets."""
    where = record["machine"]
    lines = [
        f"{record['op']}  {record['dtype']}  {record['mode']}  memory {record['memory']}  ({record['rounds']} rounds)",
        f"  shape {_shape(record)}",
        f"  {where['device']}, {where['threads']} threads, torch {where['versions']['torch']}; needed "
        f"{record['work']['flops'] * 1e-9:.3g} GFLOP and {record['work']['bytes'] / 2**20:.3g} MiB, "
        f"at the limit {record['floor_seconds'] * 1e3:.3g} ms",
    ]
    if record["scaling"]:
        lines.append(f"  {record['scaling']}")
    if (record.get("others_share") or 0) > 0.02:
        lines.append(
            f"  DISTURBED: other processes took {record['others_share']:.0%} of the CPUs during the timing; only ratios mean much"
        )
    timed = sorted((r for r in record["rows"] if r["status"] == "timed"), key=lambda r: r["seconds"]["median"])
    lines += ["", *align([COLUMNS, *map(_cells, timed)])]
    lines += [f"{r['name']}: {r['status']}: {r['reason']}" for r in record["rows"] if r["status"] != "timed"]
    if record.get("overheads"):
        head = ("per call", "us", "above launcher")
        rows = [(r["name"], f"{r['microseconds']:.2f}", f"{r['above_launcher']:.2f}") for r in record["overheads"]]
        lines += ["", *align([head, *rows])]
    lines += ["", *_limits(record["limits"])]
    if verdicts:
        lines += ["", "targets", *(f"  {v}" for v in verdicts)]
    return "\n".join(lines) + "\n"
