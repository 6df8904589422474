"""What the pyramid ops launch compiles for every architecture, spills nothing, and moves the main sizes 16 bytes at a time."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")  # VIDKERN_REQUIRE=triton-aot makes its absence an error
from vidkern.bench import aot_pyramid as aot

# Every kernel once; what is read and written as it lies in memory, in float32, by 16 bytes a thread.
CHOSEN = [
    *((case, 90) for case in aot.MAIN if case.dtype.itemsize == 4),
    *((case, architecture) for case in aot.MAIN if case.op == "flow_inputs" for architecture in (80, 100)),
    *((case, 90) for case in aot.CASES[len(aot.MAIN) :] if (case.pool_time and case.levels == 2) or case.kind == "dct"),
]
WIDE = {
    "analysis_kernel": ("LDG.E.128", "STG.E.128"), "analysis_adjoint_kernel": ("LDG.E.128", "STG.E.128"),
    "synthesis_kernel": ("LDG.E.128", "STG.E.128"), "synthesis_adjoint_kernel": ("LDG.E.128", "STG.E.128"),
    "step_kernel": ("LDG.E.128", "STG.E.128"), "loss_kernel": ("LDG.E.128",), "loss_backward_kernel": ("LDG.E.128", "STG.E.128"),
    "stage_adjoint_kernel": ("STG.E.128",), "transition_kernel": ("STG.E.128",), "transition_adjoint_kernel": ("LDG.E.128",),
}


def faults(case, built) -> list[str]:
    found = [f"{case.name} {b.kernel}: {b.spilled} bytes spilled" for b in built if b.spilled]
    if case in aot.MAIN and case.dtype.itemsize == 4:
        found += [f"{case.name} {b.kernel}: no {n}" for b in built for n in WIDE.get(b.kernel, ()) if not b.instructions.get(n)]
    return found


def check(chosen):
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        built = list(pool.map(aot.build, *zip(*chosen)))
    assert not [f for (case, _), b in zip(chosen, built) for f in faults(case, b)]
    return {b.kernel for kernels in built for b in kernels}


def test_chosen_builds():
    assert check(CHOSEN) >= set(WIDE) | {"filter_kernel", "mix_kernel", "mix_adjoint_kernel", "loss_sum_kernel", "stage_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_builds():
    """Every case on every architecture: nothing is spilled."""
    check([(c, a) for c in aot.CASES for a in aot.ARCHITECTURES])


def test_launches_need_no_memory_and_no_gpu():
    """One launch for a spatial pyramid of two levels; the loss takes one more for its sums."""
    for case in aot.MAIN:
        kernels = [kernel.__name__ for kernel, _, _ in aot.launches(case)]
        assert len(kernels) == (3 if case.op == "flow_loss" else 2), kernels


def test_faults_are_found():
    case = aot.MAIN[0]
    good = aot.Built("analysis_kernel", 60, 0, 0, {"LDG.E.128": 2, "STG.E.128": 2})
    assert not faults(case, [good])
    assert "spilled" in faults(case, [aot.Built("analysis_kernel", 255, 8, 0, good.instructions)])[0]
    assert "no STG.E.128" in faults(case, [aot.Built("analysis_kernel", 60, 0, 0, {"LDG.E.128": 2, "STG.E": 8})])[0]
