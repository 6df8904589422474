"""Import in a fresh process: without a GPU, without Triton, without the compiled part."""

import subprocess
import sys
import textwrap


def fresh(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_does_no_work():
    assert fresh("import sys, vidkern; print('torch' in sys.modules, 'triton' in sys.modules)").split() == ["False", "False"]


def test_every_public_name_resolves():
    fresh("import vidkern; assert all(getattr(vidkern, n) is not None for n in vidkern.__all__); assert set(vidkern.__all__) <= set(dir(vidkern))")


def test_without_triton_and_without_the_compiled_part():
    """Everything still works on the reference, and info says what is missing."""
    out = fresh("""
        import sys
        sys.modules["triton"] = None
        sys.modules["vidkern._cpu"] = None
        import torch, vidkern
        q = torch.randn(1, 1, 12, 8, requires_grad=True)
        vidkern.grid_attention(q, q, q, grid=(2, 3)).sum().backward()
        assert q.grad is not None
        print(vidkern.explain(vidkern.grid_attention, q, q, q, grid=(2, 3)).chosen)
        try:
            vidkern.grid_attention(q, q, q, grid=(2, 3), impl="cpu")
        except vidkern.BackendUnavailable as error:
            print("refused:", error)
        print(vidkern.info())
    """)
    assert out.startswith("reference\nrefused: ") and "missing" in out


def test_forced_tier():
    code = "import torch, vidkern; from vidkern import compiled; print(compiled.cpu().isa())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"VIDKERN_CPU_ISA": "portable", "PATH": ""})
    assert run.stdout.strip() == "portable", run.stderr


def test_unknown_forced_tier_is_an_error_not_a_fallback():
    code = "import torch, vidkern; q = torch.ones(1, 1, 4, 8); vidkern.grid_attention(q, q, q, grid=(2, 2))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"VIDKERN_CPU_ISA": "avx10", "PATH": ""})
    assert run.returncode == 1 and "VIDKERN_CPU_ISA" in run.stderr.splitlines()[-1]
