"""Bytes that the pyramid kernels move between memory and caches, counted by cachegrind: within 1.15 of what the fused ops need at least.

A count, not a time: cachegrind replays every access through a cache of half a megabyte, smaller than the data and larger than a tile. A
line read or written once counts once; the difference of three passes and one leaves out everything but the kernel.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("vidkern._cpu")
from vidkern.ops.pyramid import cpu, levels
from vidkern.ops.pyramid.plans import Place
from vidkern.ops.pyramid_flow_inputs import cost as inputs_cost
from vidkern.ops.pyramid_flow_loss import cost as loss_cost
from vidkern.ops.pyramid_flow_step import cost as step_cost
from vidkern.ops.pyramid_stage_transition import cost as transition_cost

SHAPE = (8, 16, 1, 64, 64)  # latents of 512 pixels
CHILD = """
    import importlib.util, json, mmap, sys, ctypes
    plan, passes = json.load(open(sys.argv[1])), int(sys.argv[2])
    spec = importlib.util.spec_from_file_location("vidkern._cpu", plan["module"])
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    memory = [mmap.mmap(-1, size + 4096) for size in plan["sizes"]]
    at = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in memory]
    for i, data in plan["data"]:
        memory[i][: len(data)] = bytes(data)
    fields = tuple(at[f[0]] + f[1] if isinstance(f, list) else f for f in plan["fields"])
    for _ in range(passes):
        getattr(kernels, plan["kernel"])(fields, tuple(plan["scale"]))
"""
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind, which counts, is not installed")
]  # fmt: skip


def counted(tmp_path, launch, tensors, keep=()) -> int:
    """Bytes that one pass of a launch moves; only the values of ``keep`` matter."""
    which = {id(t): i for i, t in enumerate(tensors)}
    plan = {
        "module": importlib.util.find_spec("vidkern._cpu").origin, "kernel": launch.kernel.__name__, "scale": launch.scale,
        "fields": [[which[id(f.tensor)], f.offset] if type(f) is Place else int(f) for f in launch.fields],
        "sizes": [t.untyped_storage().nbytes() for t in tensors],
        "data": [(which[id(t)], list(t.reshape(-1).view(torch.uint8).tolist())) for t in keep],
    }  # fmt: skip
    # One thread, and nothing past the caches, which cachegrind does not know.
    plan["fields"][:2] = [1, 0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "child.py").write_text(textwrap.dedent(CHILD))

    def misses(passes):
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", "--D1=32768,8,64", "--LL=524288,16,64",
                   "--cachegrind-out-file=/dev/null", sys.executable, "-S", "child.py", "plan.json", str(passes)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return int(re.search(r"LLd misses:\s+([\d,]+)", done.stderr)[1].replace(",", ""))

    return (misses(3) - misses(1)) // 2 * 64


def drawn(sizes):
    return [torch.empty(s) for s in levels.shapes(sizes)]


@pytest.mark.parametrize("number, noise, active", [(2, False, 2), (3, False, 3), (2, True, 2), (2, False, 1)])
def test_flow_inputs(tmp_path, number, noise, active):
    x = torch.empty(SHAPE)
    sizes = levels.sizes_of(x, number, "laplacian", False)
    outs, given = [torch.empty(levels.numel(sizes, active)) for _ in range(2)], drawn(sizes)[:active] if noise else []
    table = torch.rand(SHAPE[0], number, 4)
    launch = cpu.launch("pyramid_analysis", sizes, active=active, volume=x, outs=[cpu.flat(o, sizes, active) for o in outs],
                        ins=[None, given], table=table, philox=0 if noise else 1, seed=1)
    need = inputs_cost.forward_bytes(sizes, active, 4, noise=noise)
    assert 0.9 * need <= counted(tmp_path, launch, [x, *outs, *given, table], [table]) <= 1.15 * need


def test_step(tmp_path):
    sizes = levels.sizes_of(torch.empty(SHAPE), 2, "laplacian", False)
    z, c, u = drawn(sizes), [t.bfloat16() for t in drawn(sizes)], [t.bfloat16() for t in drawn(sizes)]
    outs, table = [torch.empty(levels.numel(sizes)), torch.empty(levels.numel(sizes), dtype=torch.bfloat16)], torch.rand(SHAPE[0], 2, 2)
    launch = cpu.launch("pyramid_step", sizes, active=2, ins=[z, c, u], outs=[cpu.flat(o, sizes) for o in outs], table=table)
    need = step_cost.forward_bytes(sizes, 2, 4, model_itemsize=2)
    assert need == 14 * levels.numel(sizes)
    assert 0.9 * need <= counted(tmp_path, launch, [*z, *c, *u, *outs, table], [table]) <= 1.15 * need


def test_merge_and_transition(tmp_path):
    x = torch.empty(SHAPE)
    sizes = levels.sizes_of(x, 2, "laplacian", False)
    parts = drawn(sizes)
    launch = cpu.launch("pyramid_synthesis", sizes, volume=x, ins=[parts])
    assert counted(tmp_path, launch, [x, *parts]) <= 1.15 * 2.25 * 4 * x.numel()
    small, out, table = torch.empty(SHAPE), torch.empty(8, 16, 1, 128, 128), torch.rand(8, 2)
    sizes = [8, 16, 1, 64, 64, 1, 128, 128]
    launch = cpu.launch("pyramid_transition", sizes, kind="haar", volume=out, ins=[[small], None], table=table, philox=1, level_index=1)
    need = transition_cost.forward_bytes(sizes, 4)
    assert need == 1.25 * 4 * out.numel()
    assert counted(tmp_path, launch, [small, out, table], [table]) <= 1.15 * need


def test_loss(tmp_path):
    sizes = levels.sizes_of(torch.empty(SHAPE), 2, "laplacian", False)
    pred, target, means, loss = drawn(sizes), drawn(sizes), torch.empty(SHAPE[0], 2), torch.ones(())
    launch = cpu.launch("pyramid_loss", sizes, ins=[pred, target], table=means, loss=loss)
    need = loss_cost.forward_bytes(sizes, 2, 4)
    assert need == 2 * 4 * levels.numel(sizes)
    assert 0.9 * need <= counted(tmp_path, launch, [*pred, *target, means, loss]) <= 1.15 * need
    grad = torch.empty(levels.numel(sizes))
    launch = cpu.launch("pyramid_loss_backward", sizes, ins=[pred, target], outs=[cpu.flat(grad, sizes)], loss=loss)
    assert counted(tmp_path, launch, [*pred, *target, grad, loss], [loss]) <= 1.15 * 3 * 4 * levels.numel(sizes)


def test_the_count_sees_a_second_pass(tmp_path):
    """Reading the state once more per value, as its own model input, counts."""
    sizes = levels.sizes_of(torch.empty(SHAPE), 2, "laplacian", False)
    z, c, out, table = drawn(sizes), drawn(sizes), torch.empty(levels.numel(sizes)), torch.rand(SHAPE[0], 2, 2)
    one = cpu.launch("pyramid_step", sizes, active=2, ins=[z, c, None], outs=[cpu.flat(out, sizes)], table=table)
    two = cpu.launch("pyramid_step", sizes, active=2, ins=[z, c, drawn(sizes)], outs=[cpu.flat(out, sizes)], table=table)
    more = [f.tensor for f in two.fields if type(f) is Place and not any(f.tensor is t for t in (*z, *c, out, table))]
    counts = [counted(tmp_path, launch, tensors, [table]) for launch, tensors in ((one, [*z, *c, out, table]), (two, [*z, *c, *more, out, table]))]
    assert counts[1] > 1.25 * counts[0]
