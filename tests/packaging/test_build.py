"""setup.py: what it compiles, what it refuses, and what it records when it cannot compile."""

import json
import platform
from pathlib import Path

import pytest
from tree import fresh_environment, pip_install, run

BUILD = ("setup.py", "-q", "build_ext", "--inplace")
X86 = platform.machine().lower() in ("x86_64", "amd64")


def record(tree):
    return json.loads((tree / "vidkern" / "_build_info.json").read_text())


def library(tree):
    return next((tree / "vidkern").glob("_cpu.*"), None)


def objects(tree):
    return {f"{path.parent.name}/{path.stem}": path.stat().st_mtime_ns for path in tree.glob("build/*/*/*.o*")}


def test_every_tier_is_built_from_the_same_sources(tiny_tree):
    done = run(*BUILD, cwd=tiny_tree, VIDKERN_BUILD="require")
    assert done.returncode == 0, done.stdout
    tiers = ["portable", "avx2", "avx512"] if X86 else ["portable"]
    info = record(tiny_tree)
    assert [*info["isas"], *info["left_out"]] == ["portable", "avx2", "avx512"]
    assert info["isas"] == tiers[: len(info["isas"])] and info["compiled"] and info["reason"] is None
    assert set(objects(tiny_tree)) == {"once/bindings", *(f"{isa}/{op}" for isa in info["isas"] for op in ("op", "other"))}
    assert run("-c", "import _cpu; assert _cpu.twice(4) == 8", cwd=tiny_tree / "vidkern").returncode == 0


def test_a_header_edit_rebuilds_only_what_includes_it(tiny_tree):
    assert run(*BUILD, cwd=tiny_tree).returncode == 0
    before = objects(tiny_tree)
    header = tiny_tree / "csrc" / "common" / "two.h"
    header.write_text(header.read_text().replace("2", "3"))
    assert run(*BUILD, cwd=tiny_tree).returncode == 0
    after = objects(tiny_tree)
    assert {name for name in after if after[name] != before[name]} == {name for name in after if name.endswith("/op")}
    assert run("-c", "import _cpu; assert _cpu.twice(4) == 12", cwd=tiny_tree / "vidkern").returncode == 0


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_mistake_in_our_sources_fails_the_build(tiny_tree, mode):
    (tiny_tree / "csrc" / "cpu" / "op.cpp").write_text("this is not C++\n")
    done = run(*BUILD, cwd=tiny_tree, VIDKERN_BUILD=mode)
    assert done.returncode != 0
    assert "failed on vidkern's own sources" in done.stdout and "op.cpp" in done.stdout
    assert library(tiny_tree) is None


def test_sources_that_lack_the_bindings_fail_the_build(tiny_tree):
    (tiny_tree / "csrc" / "cpu" / "bindings.cpp").unlink()
    done = run(*BUILD, cwd=tiny_tree)
    assert done.returncode != 0 and "bindings.cpp is missing" in done.stdout


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nonexistent"}, "no working C++ compiler (/nonexistent: not found)"),
        ({"CXX": "false"}, "no working C++ compiler (false does not build a small program: exit status 1)"),
        ({"VIDKERN_BUILD": "off"}, "left out on purpose: VIDKERN_BUILD=off at install time"),
    ],
)
def test_without_a_compiler_the_install_succeeds_and_says_why(tiny_tree, tmp_path, variables, reason):
    python = fresh_environment(tmp_path / "venv")
    done = pip_install(python, tiny_tree, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stdout
    done = run("-c", "import vidkern; print(vidkern.__file__); print(vidkern.info())", cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stdout
    package = Path(done.stdout.splitlines()[0]).parent
    assert package.is_relative_to(tmp_path / "venv")
    assert json.loads((package / "_build_info.json").read_text()) == {"compiled": False, "reason": reason}
    assert reason in done.stdout


def test_a_library_that_was_built_earlier_does_not_outlive_the_record(tiny_tree):
    assert run(*BUILD, cwd=tiny_tree).returncode == 0 and library(tiny_tree) is not None
    assert run(*BUILD, cwd=tiny_tree, VIDKERN_BUILD="off").returncode == 0
    assert library(tiny_tree) is None and not record(tiny_tree)["compiled"]


def test_require_refuses_to_go_without_a_compiler(tiny_tree):
    done = run(*BUILD, cwd=tiny_tree, VIDKERN_BUILD="require", CXX="/nonexistent")
    assert done.returncode != 0
    assert "VIDKERN_BUILD=require, but: no working C++ compiler (/nonexistent: not found)" in done.stdout


def test_an_unknown_mode_is_an_error(tiny_tree):
    done = run(*BUILD, cwd=tiny_tree, VIDKERN_BUILD="maybe")
    assert done.returncode != 0 and "VIDKERN_BUILD='maybe': expected auto, require or off" in done.stdout
