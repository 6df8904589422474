"""Pyramid ops on DTensors: two processes that share a batch compute what one does, noise and gradients included."""

from .checks import in_two_processes

SHARDED = """
    import json, os, sys, torch, vidkern
    import torch.distributed as dist
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    B = 4
    levels = lambda: [torch.randn(B, 3, 4 << s, 8 << s) for s in range(2)]
    x, z, c, u, g = torch.randn(B, 3, 8, 16), levels(), levels(), levels(), levels()
    times, stage = torch.rand(B, 2), torch.rand(B, 3)
    table, mask = vidkern.flow_coefficients(times, direction="data"), torch.rand(B, 2) > 0.4
    step = dict(dt=0.1, guidance=torch.rand(B, 2))
    calls = {
        "decompose": (lambda x: vidkern.pyramid_decompose(x), (x,)),
        "merge": (lambda *p: vidkern.pyramid_merge(list(p)), z),
        "inputs": (lambda x: vidkern.pyramid_flow_inputs(x, table, active=mask, seed=3, first_sample=5), (x,)),
        "tokens": (lambda x: vidkern.pyramid_flow_inputs(x, table[:1], seed=3, layout="tokens", target=False), (x,)),
        "loss": (lambda *p: vidkern.pyramid_flow_loss(list(p[:2]), [t.detach() for t in p[2:]], active=mask, return_levels=True), (*z, *c)),
        "loss of tokens": (
            lambda p: vidkern.pyramid_flow_loss(p, p.detach() * 0.5, layout="tokens", shape=x.shape), (torch.randn(B, 32, 15),)
        ),
        "step": (lambda *p: vidkern.pyramid_flow_step(list(p[:2]), list(p[2:4]), list(p[4:]), **step), (*z, *c, *u)),
        "merged step": (lambda *p: vidkern.pyramid_flow_step(list(p[:2]), list(p[2:]), merge=True, dt=[0.1, 0.2]), (*z, *c)),
        "stage": (lambda x: vidkern.pyramid_stage_inputs(x, stage, stages=2, stage=1, seed=2), (x,)),
        "transition": (lambda x: vidkern.pyramid_stage_transition(x, times[:, 0], times[:, 1], seed=2), (x,)),
    }
    flat = lambda r: [t for part in r for t in flat(part)] if isinstance(r, (list, tuple)) else [r]
    result = {}
    for name, (call, tensors) in calls.items():
        for kind, axis in (("batch", 0), ("rows", -2)):
            if kind == "rows" and name not in ("decompose", "loss"):
                continue
            plain = [t.clone().requires_grad_() for t in tensors]
            shared = [distribute_tensor(t, mesh, [Shard(axis % t.dim())]).requires_grad_() for t in tensors]
            want, got = flat(call(*plain)), flat(call(*shared))
            sent = [t.placements[0] for t in got if isinstance(t, DTensor)]
            assert len(sent) == len(want)
            whole = [t.full_tensor() for t in got]
            weights = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in want]
            sum((w * t).sum() for w, t in zip(weights, want) if t.requires_grad).backward()
            sum((w * t).sum() for w, t in zip(weights, whole) if t.requires_grad).backward()
            zero = lambda t: torch.zeros(()) if t.grad is None else t.grad
            grads = [(zero(a).full_tensor() if isinstance(zero(a), DTensor) else zero(a), zero(b)) for a, b in zip(shared, plain)]
            error = max(float((a - b).abs().max()) for a, b in [*zip(whole, want), *grads])
            result[f"{name} {kind}"] = [sorted({str(p) for p in sent}), error, float(sum(b.abs().sum() for _, b in grads))]
    finish(rank, result)
"""


def test_a_shared_batch_is_the_batch(tmp_path):
    """Batch shards stay shards and nothing changes but the last bits of the loss; rows are gathered first."""
    result = in_two_processes(SHARDED, tmp_path)
    assert len(result) == 12
    for name, (placements, error, gradients) in result.items():
        assert error < 1e-6 and gradients > 0, (name, error, gradients)
        wanted = ["R"] if name.endswith("rows") else ["P(sum)", "S(0)"] if name == "loss batch" else ["P(sum)"] if "tokens" in name and (
            "loss" in name) else ["S(0)"]
        assert placements == wanted, (name, placements)
