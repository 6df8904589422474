"""What this installation can do: versions, the compiled part, and every backend of every op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

import torch

from . import compiled, registry, verified
from .cuda import cubins


@dataclass(frozen=True)
class Info:
    """What :func:`info` found; ``print`` it, or read ``versions``, ``cpu``, ``cuda`` and ``ops``."""

    versions: dict[str, str]
    cpu: dict[str, str]
    cuda: dict[str, str]
    ops: dict[str, dict[str, str]]

    def __str__(self) -> str:
        lines = ["versions"] + [f"  {name:<12} {value}" for name, value in self.versions.items()]
        lines += ["compiled CPU part"] + [f"  {name:<12} {value}" for name, value in self.cpu.items()]
        lines += ["CUDA kernels"] + [f"  {name:<12} {value}" for name, value in self.cuda.items()]
        for op, backends in self.ops.items():
            lines += [f"op {op}, best backend first"] + [f"  {name:<12} {value}" for name, value in backends.items()]
        return "\n".join(lines)


def version(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _state(op: str, backend: registry.Backend) -> str:
    """A backend in one line, with what is known of its being right."""
    if backend.name == "cpu" and compiled.cpu_missing():
        return f"missing: {compiled.cpu_missing()}"
    if backend.trust == "none":
        return backend.description
    found = [f"{verified.DeviceClass(r.device, r.capability)} {', '.join(r.dtypes)}" for r in verified.counting(op, backend)]
    state = f"verified on {'; '.join(found)}" if found else "verified on no device yet (vidkern verify)"
    return f"{backend.description}; {state}" + (", elsewhere only by name" if backend.trust == "require" else "")


def info() -> Info:
    """Versions, the compiled CPU part (or why it is missing), what the CUDA kernels are compiled by, and the backends of every op.

    Returns:
        an :class:`Info`. Nothing is computed and no GPU is touched.
    """
    versions = {"vidkern": version("vidkern"), "python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: version(name) for name in ("torch", "triton", "cuda-python", "nvidia-cuda-nvrtc", "diffusers", "av")}
    module = compiled.cpu()
    if module is None:
        cpu = {"state": f"missing: {compiled.cpu_missing()}"}
    else:
        cpu = {
            "state": "loaded",
            "tier": module.isa(),
            "tiers here": ", ".join(module.isas()),
            "forced by": f"VIDKERN_CPU_ISA={os.environ['VIDKERN_CPU_ISA']}" if "VIDKERN_CPU_ISA" in os.environ else "nothing",
            "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
            "build": str(module.build_info()),
        }
    cuda = {
        "cuda-python": cubins.missing_python() or "there",
        "built ahead": ", ".join(f"sm_{arch}" for arch in cubins.archs_ahead()) or "nothing: NVRTC compiles at first use",
        "kept in": str(cubins.folder()),
    }
    table = {name: {b.name: _state(name, b) for b in op.backends} for name, op in registry.ops().items()}
    return Info(versions, cpu, cuda, table)


def main() -> int:
    """Print :func:`info` (the command ``vidkern info``)."""
    print(info(), file=sys.stdout)
    return 0
