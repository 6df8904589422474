"""The GPU as it was found: driver, clocks, limits, its two ceilings; and what the memory checkers say of our kernels."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import limits, machine
from .gpu_job import Job

QUERY = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "power.max_limit", "temperature.gpu", "ecc.mode.current", "compute_mode", "memory.total", "memory.used",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck")


def query(fields=QUERY) -> dict[str, str]:
    """What nvidia-smi says of the current device; {} where there is no nvidia-smi or it fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    # nvidia-smi counts all cards, CUDA those that CUDA_VISIBLE_DEVICES leaves.
    card = "0"
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
        card = f"GPU-{uuid}" if uuid else card
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={card}"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [v.strip() for v in done.stdout.strip().split("\n")[0].split(",")]
    return dict(zip(fields, values)) if done.returncode == 0 and len(values) == len(fields) else {}


def clocks() -> dict[str, str]:
    """Clocks, power and temperature now, for a record of a measurement."""
    return query(("pstate", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"))


def measure(job: Job) -> dict:
    """Stage ``machine``."""
    found = job.done("machine")
    if found:
        return found
    facts = machine.facts(job.device)
    if job.device == "cuda":
        import torch

        p = torch.cuda.get_device_properties(0)
        facts["gpu"] |= {
            "capability": f"{p.major}.{p.minor}",
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            "shared_memory_kib": getattr(p, "shared_memory_per_block_optin", 0) // 1024,
        }
        facts["versions"]["cudnn"] = str(torch.backends.cudnn.version())
    facts["nvidia_smi"] = query()
    facts["limits"] = limits.measure(job.device, job.quick or job.dry)
    facts["nvidia_smi_loaded"] = clocks()
    return job.save("machine", facts)


def in_group(command: list[str], seconds: float, **options) -> tuple[int | None, str]:
    """Run a command as a process group: (exit status, output where it is piped). When ``seconds`` are over, it and all that
    it has started are ended, and the status is None."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output or ""
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()


# ---- compute-sanitizer ------------------------------------------------------------------------------------------------
def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    roots = [os.environ.get(n) for n in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(root, "bin")) for root in roots if root]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def judge(returncode: int, output: str) -> tuple[str, str]:
    """(state, reason) of a sanitizer's run: "clean", "errors", or "skipped" when the tool itself could not work."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:errors?|hazards?)", output)
    unable = re.search(r"^.*(?:Device not supported|not supported on|Unable to|Target application failed).*$", output, re.MULTILINE)
    if unable and not (found and int(found[-1])):
        return "skipped", unable.group(0).strip("= ").strip()
    if not found:
        last = output.strip().splitlines()[-1:] or ["it printed nothing"]
        return "skipped", f"exit status {returncode} and no summary: {last[0][:200]}"
    errors = int(found[-1])
    if errors:
        first = re.search(r"^=+ (?!COMPUTE-SANITIZER|ERROR)(\S.*)$", output, re.MULTILINE)
        return "errors", f"{errors}, first: {first.group(1) if first else '?'}"
    return ("clean", "") if returncode == 0 else ("errors", f"the script itself failed with {returncode}")


def sanitize(job: Job) -> dict:
    """Stage ``sanitize``: each tool over ``gpu_small.py``."""
    tool, states = find_sanitizer(), {}
    for name in TOOLS:
        found = job.done(f"sanitize/{name}")
        if found is None:
            if tool is None:
                row = {"state": "skipped", "reason": "compute-sanitizer is not installed here"}
            elif job.device != "cuda":
                row = {"state": "skipped", "reason": "no GPU"}
            else:
                job.need(30)
                row = _run_tool(tool, name, min(170.0, job.left - 10))
            found = job.save(f"sanitize/{name}", row)
        states[name] = {k: found[k] for k in ("state", "reason")}
    return states


def _run_tool(tool: str, name: str, seconds: float) -> dict:
    command = [tool, "--tool", name, "--error-exitcode", "77", sys.executable, "-m", "vidkern.bench.gpu_small"]
    # Without torch's cache every allocation is one of the driver's, whose bounds the tool knows.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    returncode, output = in_group(command, seconds, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if returncode is None:
        return {"state": "skipped", "reason": f"not finished after {seconds:.0f} s", "seconds": seconds}
    state, reason = judge(returncode, output)
    return {"state": state, "reason": reason, "seconds": time.monotonic() - start, "output": output[-20_000:]}
