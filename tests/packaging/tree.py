"""A copy of the checkout that a build may write into, and the environment such builds run in."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from beside import ENVIRONMENT, process

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    *("setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "README.md", "CONTRIBUTING.md", "LICENSE"),
    *("csrc", "vidkern", "models", "bench", "tests"),
)
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build_info.json", "_cubins", "build")

# The smallest sources that setup.py can build: one op over one header, one file that is compiled once.
TINY = {
    "common/two.h": "#pragma once\ninline constexpr int two = 2;\n",
    "cpu/op.cpp": '#include "common/two.h"\nnamespace vk::VK_ISA { int twice(int n) { return two * n; } }\n',
    "cpu/other.cpp": "namespace vk::VK_ISA { int same(int n) { return n; } }\n",
    # Python's own C interface compiles in a tenth of pybind11's time.
    "cpu/bindings.cpp": """\
#include <Python.h>
namespace vk::portable { int twice(int n); }
static PyObject* twice(PyObject*, PyObject* n) { return PyLong_FromLong(vk::portable::twice((int)PyLong_AsLong(n))); }
static PyMethodDef methods[] = {{"twice", twice, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module_def); }
""",
}


def copy_checkout(target: Path) -> Path:
    """What an unpacked source archive holds, without anything that a build left."""
    target.mkdir(parents=True)
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=GENERATED)
        else:
            shutil.copy2(source, target / name)
    return target


def with_tiny_sources(tree: Path) -> Path:
    """Puts ``TINY`` in the place of csrc, for builds that take seconds."""
    shutil.rmtree(tree / "csrc")
    for name, text in TINY.items():
        path = tree / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def run(*arguments, cwd: Path, python: str = sys.executable, **variables) -> subprocess.CompletedProcess:
    """Runs ``python arguments`` in ``cwd`` with a plain build environment plus ``variables``; output is one text."""
    ours = ("VIDKERN_", "PYTHONPATH", "CXX", "CPPFLAGS", "LDFLAGS")
    env = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(ours)} | variables
    return process([python, *arguments], cwd=cwd, env=env, stderr=subprocess.STDOUT)


def fresh_environment(folder: Path) -> str:
    """The Python of a virtual environment that took no download: it sees this one's packages, but not an editable vidkern."""
    venv.create(folder)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, python=python).stdout.strip()
    # A folder named in a .pth file is searched; the .pth files inside it, by which editable installs work, are not read.
    ours = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    Path(site, "packages_of_the_test_run.pth").write_text("\n".join(ours) + "\n")
    return python


def pip_install(python: str, *arguments, cwd: Path, **variables) -> subprocess.CompletedProcess:
    """Installs into the environment of ``python`` without looking anything up."""
    pip = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    return run(*pip, *arguments, cwd=cwd, **variables)
