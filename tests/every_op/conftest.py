"""Parametrisation over the registry, and the record of the worst accuracy ratios."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidkern import compiled

from . import checks
from .rooms import ROOMS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

MATRIX = tomllib.loads(Path(__file__).with_name("expected_matrix.toml").read_text())
TIERS = MATRIX.pop("tiers")
# Triton's interpreter is a switch of the whole process: with it these tests run the Triton backends, without it all others.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The hand-written CUDA kernels need a GPU here; tests/executor applies the rules to them.
EXPECTED = {op: {b: d for b, d in rows.items() if b not in ("hopper", "cuda") and (b == "triton") == INTERPRETED} for op, rows in MATRIX.items()}
EXPECTED = {op: rows for op, rows in EXPECTED.items() if rows}


@pytest.fixture(autouse=True)
def one_thread():
    """Expectations are thousands of small torch calls, which a second thread only slows; on a busy machine tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _to_nearest(builder, src, kind):
    """The interpreter's narrowing, but to bfloat16 by rounding to the nearest, as GPUs do it; its own cuts the low bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if src.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
        return builder.cast_impl(src, kind)
    rounded = torch.from_numpy(src.data).bfloat16().view(torch.int16).numpy()
    return TensorHandle(rounded.view("uint16"), kind.scalar)


@pytest.fixture(scope="session", autouse=True)
def rounding():
    """What the interpreter stores in bfloat16 is judged by the rule for kernels that round once."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_fp_trunc
    InterpreterBuilder.create_fp_trunc = _to_nearest
    yield
    InterpreterBuilder.create_fp_trunc = before


@pytest.fixture(scope="session", autouse=True)
def short_blocks():
    """In the interpreter every operation costs the same, however large: few tiles, but several even of the small samples, of both
    kinds. tests/triton/interpreted.py runs the shipped block sizes."""
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            from vidkern.ops.grid_attention import configs

            for kind in configs.KINDS:
                stack.enter_context(configs.forced(kind, configs.Config(64, 32, 16, 4, 1)))
            from vidkern.ops.pruned import configs as pruned

            stack.enter_context(pruned.forced(pruned.Config(32, 32, 32, 4, 1)))
        yield


def backend_runs(op: str) -> list[tuple[str, str]]:
    """(backend, tier) pairs of an op: the cpu backend once per tier of this processor."""
    module = compiled.cpu()
    tiers = module.isas() if module else ["missing"]
    return [(b, t) for b in EXPECTED[op] for t in (tiers if b == "cpu" else [""])]


def samples(op, backend):
    """The reference is the plain form itself: a few samples show that its low-precision path is wired right. The interpreter
    takes seconds per head, so there is one of them per key/value head."""
    if backend == "reference":
        return ROOMS[op].samples[:3]
    if not INTERPRETED:
        return ROOMS[op].samples
    chosen = CHOSEN_INTERPRETED.get(op)
    return [interpretable(s) for s in ROOMS[op].samples if chosen is None or s.name in chosen]


# What the interpreter runs of the pyramid and pruned ops: every kernel once. tests/triton/pyramid_interpreted.py adds filters, factors
# and masks, tests/triton/pruned_interpreted.py every other part of the pruned layers.
CHOSEN_INTERPRETED = {
    "pyramid_decompose": ("haar", "dct_spacetime"),
    "pyramid_merge": ("image", "deep_spacetime"),
    "pyramid_flow_inputs": ("image", "image_wide_masked_tokens"),
    "pyramid_flow_loss": ("spacetime_masked_tokens",),
    "pyramid_flow_step": ("image_merge", "video_active1to2_tokens_zero"),
    "pyramid_stage_inputs": ("video_stage0", "odd_stage1_given_noise"),
    "pyramid_stage_transition": ("image",),
    "pruned_linear": ("gather_scatter", "modulated", "pairs", "slabs"),
    "pruned_ffn": ("two_tiles", "slabs_of_pairs"),
}


def interpretable(sample):
    """The sample with as few samples and heads as keep what it shows."""
    if hasattr(sample, "pyramid"):
        # The mask differs from sample to sample.
        keep = getattr(sample, "masked", False)
        return sample if keep else replace(sample, pyramid=replace(sample.pyramid, batch=1))
    if hasattr(sample, "shape") and sample.__class__.__module__.startswith("vidkern.ops.pruned"):
        return replace(sample, shape=(*sample.shape[:-1], min(sample.shape[-1], 7)))
    if not hasattr(sample, "kv_heads"):
        return sample
    masked = sample.with_valid or sample.with_kv_len or sample.with_text_len
    return replace(
        sample, batch=min(sample.batch, 2 if masked else 1), heads=sample.heads // sample.kv_heads, kv_heads=1,
        frame_len=min(sample.frame_len, 300 // sample.frames.n_frames),
    )


@pytest.fixture
def tier(request):
    """Force an instruction tier for one test; give it by indirect parametrisation, "" for none."""
    name = getattr(request, "param", "")
    if not name:
        yield name
        return
    assert compiled.cpu() is not None, f"the compiled CPU part {compiled.cpu_missing()}"
    before = compiled.cpu().isa()
    compiled.cpu().set_isa(name)
    yield name
    compiled.cpu().set_isa(before)


@contextlib.contextmanager
def poisoned():
    """Fresh memory is NaN: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_terminal_summary(terminalreporter):
    if not checks.WORST:
        return
    terminalreporter.section("worst error against best-practice torch (limits: max 2, RMS 1.3)")
    for key, ratios in sorted(checks.WORST.items()):
        terminalreporter.line(f"{' '.join(key):<45} max {ratios['max']:.2f}  RMS {ratios['rms']:.2f}")
    build = Path(__file__).parents[2] / "build"
    build.mkdir(exist_ok=True)
    rows = [dict(zip(("op", "backend", "dtype"), key)) | ratios for key, ratios in sorted(checks.WORST.items())]
    (build / "accuracy.json").write_text(json.dumps(rows, indent=1))
