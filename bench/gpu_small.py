"""One small forward and backward of every backend on the GPU, for the memory checkers: ``python -m vidkern.bench.gpu_small``."""

from __future__ import annotations

import sys

import torch

from vidkern import registry
from vidkern.verify.rooms import ROOMS

SAMPLES = {"grid_attention": ("cross", "gqa", "kv_len", "text_front", "odd_799"), "merge_attention": ("two", "signed")}


def run(device: str) -> list[str]:
    """Names of what ran: op, backend, dtype, sample."""
    ran = []
    for name, op in registry.ops().items():
        room = ROOMS[name]
        wanted = SAMPLES.get(name)
        samples = [s for s in room.samples if s.name in wanted] if wanted else list(room.samples[:3])
        for backend in op.backends:
            if backend.name == "reference":
                continue
            for sample in samples:
                for dtype in (torch.bfloat16, torch.float32):
                    leaves = [t.requires_grad_(room.differentiable) for t in room.inputs(sample, dtype, 0, device)]
                    try:
                        outputs = room.call(sample, leaves, impl=backend.name)
                    except registry.BackendUnavailable:
                        continue
                    if room.differentiable:
                        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
                    ran.append(f"{name} {backend.name} {str(dtype)[6:]} {sample.name}")
    if device == "cuda":
        torch.cuda.synchronize()
    return ran


if __name__ == "__main__":
    print("\n".join(run(sys.argv[1] if len(sys.argv) > 1 else "cuda")))
