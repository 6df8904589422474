"""VIDKERN_CUDA_ARCHS: kernels compiled with the package, found by what launches them."""

import json
import os
import shutil
import sys

import pytest
from tree import run

BUILD = ("setup.py", "-q", "build_ext", "--inplace")
FAKE = """\
#!{python}
import sys
from pathlib import Path
words = sys.argv[1:]
if words == ["--version"]:
    print("Cuda compilation tools, release 99.9, V99.9.1")
    raise SystemExit
with open({log!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
if "-arch=sm_{refused}" in words:
    raise SystemExit("nvcc fatal   : Unsupported gpu architecture")
Path(words[words.index("-o") + 1]).write_text("cubin of " + Path(words[-1]).name)
"""
LOOK_UP = (
    "from vidkern.cuda import cubins\n"
    "print([cubins.ahead('tiny', c) for c in ((8, 0), (8, 6), (9, 0), (10, 0))], cubins.built_ahead((8, 9)), cubins.built_ahead((7, 5)))"
)


@pytest.fixture
def tree(tiny_tree):
    """The copy of the checkout with a CUDA source of a line."""
    (tiny_tree / "csrc" / "cuda" / "device").mkdir(parents=True)
    (tiny_tree / "csrc" / "cuda" / "device" / "n.h").write_text("#define N 1\n")
    (tiny_tree / "csrc" / "cuda" / "tiny.cu").write_text('#include "device/n.h"\nextern "C" __global__ void tiny(int* p) { *p = N; }\n')
    return tiny_tree


@pytest.fixture
def compiler(tmp_path):
    """A stand-in for nvcc that refuses sm_77, and what it was asked."""
    path, log = tmp_path / "tools" / "nvcc", tmp_path / "log"
    path.parent.mkdir()
    path.write_text(FAKE.format(python=sys.executable, log=str(log), refused=77))
    path.chmod(0o755)
    return path, log


def cubins(tree):
    return {path.name.partition("-")[0] + path.name[path.name.index(".") :] for path in tree.glob("vidkern/_cubins/*")}


def build(tree, compiler, archs, **more):
    return run(*BUILD, cwd=tree, VIDKERN_CUDA_ARCHS=archs, VIDKERN_BUILD="off", CUDACXX=str(compiler[0]), **more)


def test_what_was_asked_for_is_built_found_and_recorded(tree, compiler):
    done = build(tree, compiler, "80; 90")
    assert done.returncode == 0, done.stdout
    assert cubins(tree) == {"tiny.sm_80.cubin", "tiny.sm_90.cubin"}
    assert json.loads((tree / "vidkern" / "_build_info.json").read_text())["cuda"]["archs"] == ["80", "90"]
    asked = compiler[1].read_text().splitlines()
    assert len(asked) == 2 and all("-std=c++17 -cubin -arch=sm_" in line and f"-I {tree / 'csrc' / 'cuda'}" in line for line in asked)
    found = run("-c", LOOK_UP, cwd=tree)
    code = b"cubin of tiny.cu"
    assert found.stdout.strip() == f"{[code, code, code, None]} True False", found.stdout
    # Nothing changed, nothing compiled; a header that it includes changed: other machine code, and the old is gone.
    assert build(tree, compiler, "80;90").returncode == 0 and len(compiler[1].read_text().splitlines()) == 2
    (tree / "csrc" / "cuda" / "device" / "n.h").write_text("#define N 2\n")
    assert run("-c", LOOK_UP, cwd=tree).stdout.startswith("[None, None, None, None]"), "machine code of other sources is passed over"
    assert build(tree, compiler, "80").returncode == 0 and len(compiler[1].read_text().splitlines()) == 3
    assert cubins(tree) == {"tiny.sm_80.cubin"}
    assert run(*BUILD, cwd=tree, VIDKERN_BUILD="off").returncode == 0 and not cubins(tree)


def test_sources_for_90_alone_are_compiled_for_90a(tree, compiler):
    (tree / "csrc" / "cuda" / "tiny_hopper.cu").write_text("// wgmma\n")
    done = build(tree, compiler, "80;90")
    assert done.returncode == 0, done.stdout
    assert cubins(tree) == {"tiny.sm_80.cubin", "tiny.sm_90.cubin", "tiny_hopper.sm_90a.cubin"}
    look_up = "from vidkern.cuda import cubins; print([cubins.ahead('tiny_hopper', c) for c in ((9, 0), (10, 0), (8, 0))])"
    assert run("-c", look_up, cwd=tree).stdout.strip() == str([b"cubin of tiny_hopper.cu", None, None])


@pytest.mark.parametrize("archs, message", [
    ("80a", "VIDKERN_CUDA_ARCHS='80a': '80a', expected compute capabilities such as 80;90"),
    ("80,sm_90", "VIDKERN_CUDA_ARCHS='80,sm_90': 'sm_90', expected compute capabilities such as 80;90"),
    ("77", "does not compile tiny.cu for sm_77"),
])  # fmt: skip
def test_what_cannot_be_built_fails_the_build(tree, compiler, archs, message):
    done = build(tree, compiler, archs)
    assert done.returncode != 0 and message in done.stdout and not cubins(tree)


def test_without_nvcc_it_says_where_it_looked(tree, tmp_path):
    done = run(*BUILD, cwd=tree, VIDKERN_CUDA_ARCHS="80", VIDKERN_BUILD="off", PATH=str(tmp_path), CUDA_HOME="", CUDA_PATH="", CUDACXX="")
    assert done.returncode != 0
    assert "VIDKERN_CUDA_ARCHS='80', but there is no nvcc in CUDACXX, on the PATH or in CUDA_HOME" in done.stdout


def test_a_wheel_brings_it(tree, compiler):
    environment = {"VIDKERN_CUDA_ARCHS": "90", "VIDKERN_BUILD": "off", "CUDACXX": str(compiler[0])}
    done = run("setup.py", "-q", "bdist_wheel", cwd=tree, **environment)
    assert done.returncode == 0, done.stdout
    (wheel,) = tree.glob("dist/*.whl")
    names = run("-m", "zipfile", "-l", wheel, cwd=tree).stdout
    assert ".sm_90.cubin" in names and "vidkern/csrc/cuda/tiny.cu" in names and "vidkern/csrc/cuda/device/n.h" in names


@pytest.mark.skipif(shutil.which("nvcc", path=os.environ["PATH"]) is None, reason="no nvcc")
def test_by_nvcc_itself(tree):
    done = run(*BUILD, cwd=tree, VIDKERN_CUDA_ARCHS="80", VIDKERN_BUILD="off")
    assert done.returncode == 0, done.stdout
    found = run("-c", "from vidkern.cuda import cubins; print(cubins.ahead('tiny', (8, 6))[:4])", cwd=tree)
    assert found.stdout.strip() == str(b"\x7fELF"), found.stdout
