"""The Triton kernels of merge_attention compile for every architecture, spill nothing, and move rows 16 bytes at a time."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-aot makes its absence an error
from vidkern.bench import aot_launch

ARCHITECTURES = (80, 89, 90, 100, 120)


def calls(parts, dim, dtype):
    from vidkern.ops.merge_attention import triton as launchers

    def rows():
        return torch.empty((2, 4, 144, dim), dtype=dtype, device="meta"), torch.empty((2, 4, 144), device="meta")

    (out, lse), *many = (rows() for _ in range(1 + 2 * parts))
    outs, lses = (list(x) for x in zip(*many[:parts]))
    douts, dlses = (list(x) for x in zip(*many[parts:]))
    signs = (1,) * (parts - 1) + (-1,)
    forward = aot_launch.launches(launchers, lambda: launchers.forward(outs, lses, signs=signs, out=out, lse=lse))
    backward = aot_launch.launches(
        launchers, lambda: launchers.backward(out, None, outs, lses, signs=signs, douts=douts, dlses=dlses)
    )
    return [*forward, *backward]


def build(case):
    *of, architecture = case
    return aot_launch.build(calls(*of), architecture)


def check(cases):
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for case, kernels in zip(cases, pool.map(build, cases)):
            assert [k.kernel for k in kernels] == ["forward_kernel", "backward_kernel"]
            for k in kernels:
                assert not k.spilled, (case, k)
                assert k.instructions.get("LDG.E.128") and k.instructions.get("STG.E.128"), (case, k)


def test_three_parts_on_every_architecture():
    check([(3, 128, torch.bfloat16, a) for a in ARCHITECTURES])


@pytest.mark.slow
def test_other_parts_and_dims():
    check([(n, d, t, 90) for n, d, t in ((2, 64, torch.float32), (5, 128, torch.float16), (8, 64, torch.bfloat16), (2, 256, torch.float32))])
