"""What an install puts on the import path: wheel, source archive, editable."""

import sys
import tarfile
import zipfile
from functools import partial

import pytest
from tree import ROOT, copy_checkout, fresh_environment, pip_install, run


def build(folder):
    """(the sources, what the build said)."""
    tree = copy_checkout(folder / "tree")
    # Optimised builds are what all other tests run on; this one is about what the files hold, and computes a few numbers.
    return tree, run("-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree, VIDKERN_BUILD="require", CXXFLAGS="-O0")


def beside(items, folder):
    return {"build": partial(build, folder)} if any("built" in item.fixturenames for item in items) else {}


@pytest.fixture(scope="module")
def built(beside):
    """(the sources, the source archive made of them, the wheel made of that)."""
    tree, done = beside("build")
    assert done.returncode == 0, done.stdout
    return tree, next((tree / "dist").glob("*.tar.gz")), next((tree / "dist").glob("*.whl"))


def sources(tree, *patterns):
    """Files of the sources, relative, that match."""
    return {path.relative_to(tree).as_posix() for pattern in patterns for path in tree.glob(pattern) if path.is_file()}


def test_the_source_archive_is_complete(built):
    tree, archive, _ = built
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = sources(tree, "csrc/**/*", "models/**/*", "bench/**/*", "tests/**/*", "vidkern/**/*.py", "vidkern/data/assets/*")
    assert wanted | {"LICENSE", "constraints.txt", "vidkern/py.typed"} <= names, wanted - names
    assert not {name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))}


def test_the_wheel_is_complete(built):
    tree, _, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = sources(tree, "vidkern/**/*.py", "vidkern/data/assets/*") | {"vidkern/py.typed", "vidkern/_build_info.json"}
    wanted |= {f"vidkern/{name}" for name in sources(tree, "models/**/*.py", "bench/**/*.py", "bench/results/**/*", "csrc/**/*")}
    assert wanted <= names, wanted - names
    assert not {name for name in names if name.startswith(("models/", "bench/", "tests/", "csrc/"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/vidkern/data/assets/NOTICE.txt") for name in names)


def test_the_wheel_works_outside_the_checkout(built, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    done = pip_install(python, built[2], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = run(ROOT / "tests" / "packaging" / "smoke.py", cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stdout
    said = run("-m", "vidkern", "--version", cwd=tmp_path, python=python)
    assert said.returncode == 0 and said.stdout.startswith("vidkern "), said.stdout


def test_an_editable_install_sees_models_bench_and_new_files(tiny_tree, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    done = pip_install(python, "-e", tiny_tree, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (tiny_tree / "models" / "added_later.py").write_text("answer = 42\n")
    (tiny_tree / "bench" / "folder_added_later").mkdir()
    (tiny_tree / "bench" / "folder_added_later" / "__init__.py").write_text("answer = 43\n")
    program = (
        "import vidkern._cpu, vidkern.models.added_later, vidkern.bench.folder_added_later as later, sys\n"
        "print(vidkern.__file__, vidkern._cpu.__file__, vidkern.models.added_later.answer, later.answer)"
    )
    done = run("-c", program, cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stdout
    package, cpu, *answers = done.stdout.split()
    assert package == str(tiny_tree / "vidkern" / "__init__.py") and cpu.startswith(str(tiny_tree / "vidkern"))
    assert answers == ["42", "43"]


@pytest.mark.parametrize("name", ["models", "models.shared"])
def test_models_refuses_to_be_a_second_copy(name):
    done = run("-c", f"import {name}", cwd=ROOT)
    assert done.returncode != 0 and "ImportError: this package is vidkern.models" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("order", ["torch, vidkern._cpu", "vidkern._cpu, torch"])
def test_one_openmp_runtime_in_the_process(order, tmp_path):
    """torch names libgomp.so.1 as its needed library and carries it; ours asks for the same name, so whichever comes first
    serves both. Two runtimes would be two thread pools that compete for the cores."""
    program = (
        f"import {order}\n"
        "torch.randn(256, 256) @ torch.randn(256, 256)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(*{line.split()[-1] for line in lines if 'libgomp' in line or 'libiomp' in line or 'libomp' in line})"
    )
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    runtimes = done.stdout.split()
    assert len(runtimes) == 1, runtimes
