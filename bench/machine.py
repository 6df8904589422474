"""What a record says about where it was made."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("vidkern", "torch", "numpy", "triton", "zentorch", "flash-attn", "flash-attn-4")


def cpu_facts() -> dict:
    """Model name, family and model numbers, and the instruction sets that matter here, as far as the system tells."""
    facts = {"model": platform.processor() or platform.machine()}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return facts
    names = {"model name": "model", "cpu family": "family", "model": "model_number"}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            facts[names[key.strip()]] = value.strip()
        elif key.strip() == "flags":
            wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
            facts["isa"] = [f for f in wanted if f in value.split()]
    return facts


def slug(device: str) -> str:
    """Folder name of the device: two CPUs of one marketing name but different cores get different folders."""
    if device == "cuda":
        import torch

        words = [torch.cuda.get_device_name()]
    else:
        cpu = cpu_facts()
        words = [cpu["model"], *(f"{k[0]}{cpu[n]}" for k, n in (("f", "family"), ("m", "model_number")) if n in cpu)]
        words.append(f"{os.cpu_count()}cpu")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def checkout() -> Path | None:
    """Root of the source checkout this package is imported from, or None when it is installed."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "setup.py").is_file() and (root / "bench").is_dir() else None


def commit() -> str | None:
    """Commit of the checkout, with "+" when files differ from it; None when it is not known."""
    root = checkout()
    if root is None:
        return None
    try:
        run = dict(cwd=root, capture_output=True, text=True, timeout=10, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "csrc", "vidkern", "bench"], **run).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed.strip() else "")


def facts(device: str) -> dict:
    import torch

    found = {
        "device": slug(device),
        "cpu": cpu_facts(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": p.name, "sms": p.multi_processor_count, "memory_gib": round(p.total_memory / 2**30, 1)}
        found["versions"]["cuda"] = torch.version.cuda
    return found


class Disturbance:
    """The share of the CPUs that others took while this was open: a record made on a busy machine should say so.

    ``share`` is between 0 and 1 after the ``with`` block, or None where the system does not tell.
    """

    share: float | None = None

    def __enter__(self):
        self._start = self._busy()
        return self

    def __exit__(self, *exception):
        if self._start is not None:
            total, ours, wall = (b - a for a, b in zip(self._start, self._busy()))
            self.share = min(1.0, max(0.0, (total - ours) / max(wall * os.cpu_count(), 1e-9)))

    @staticmethod
    def _busy():
        """Seconds that all CPUs were busy (stolen ones too), that this process used, and that passed."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()


def free_memory(device: str) -> int:
    """Bytes that may still be allocated, or a very large number where the system does not tell."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 1 << 60
    return int(re.search(r"MemAvailable:\s+(\d+)", text).group(1)) * 1024
