"""The instruction-set tiers keep to themselves: in what they contain, in what they leave for the linker, and in how one is chosen."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_cpu = pytest.importorskip("vidkern._cpu")

ROOT = Path(__file__).resolve().parents[2]
TIERS = ("portable", "avx2", "avx512")
SOURCES = sorted(p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if not p.stem.endswith("bindings") and p.stem != "cpuid")
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"],
}
# Registers that exist only above the tier.
TOO_NEW = {"portable": r"%[yz]mm", "avx2": r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", "avx512": None}

needs_binutils = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(shutil.which(tool) for tool in ("objdump", "nm", "c++")),
    reason="reads x86-64 objects with objdump and nm",
)


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """(source, tier) -> object file: what the editable build left, else compiled here as setup.py does."""

    def find(source: str, tier: str) -> Path:
        built = sorted(ROOT.glob(f"build/cpu-*/{tier}/{source}.o"), key=os.path.getmtime)
        if built and built[-1].stat().st_mtime >= (ROOT / "csrc" / "cpu" / f"{source}.cpp").stat().st_mtime:
            return built[-1]
        path = tmp_path_factory.getbasetemp() / f"{source}.{tier}.o"
        if not path.exists():
            common = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-DNDEBUG"]
            command = ["c++", *common, *FLAGS[tier], f"-DVK_ISA={tier}", "-I", str(ROOT / "csrc")]
            subprocess.run([*command, "-c", str(ROOT / "csrc" / "cpu" / f"{source}.cpp"), "-o", str(path)], check=True)
        return path

    return find


@needs_binutils
@pytest.mark.parametrize("tier", TIERS[:2])
@pytest.mark.parametrize("source", SOURCES)
def test_no_instruction_above_the_tier(objects, source, tier):
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", objects(source, tier)], capture_output=True, text=True, check=True
    ).stdout
    assert "ret" in text
    found = re.search(rf".*({TOO_NEW[tier]}).*", text)
    assert found is None, f"{source} in the {tier} tier: {found.group().strip()}"


@needs_binutils
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_mergeable_leaves_the_namespace(objects, source, tier):
    # A weak function is kept once for the whole library: outside vk::<tier> it could be this tier's copy that others then run.
    lines = subprocess.run(["nm", "-C", objects(source, tier)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [m.group(1) for m in (re.match(r"[0-9a-f ]+ [WVu] (.*)", line) for line in lines) if m]
    # DW.ref.* is a pointer for unwinding: data, the same in every tier.
    stray = [name for name in weak if f"vk::{tier}::" not in name and not name.startswith("DW.ref.")]
    assert stray == []


@needs_binutils
def test_the_avx512_tier_uses_what_it_is_for(objects):
    text = subprocess.run(["objdump", "-d", objects("grid_attention", "avx512")], capture_output=True, text=True).stdout
    assert "vdpbf16ps" in text and re.search(r"vfmadd.*%zmm", text)


def test_tiers_of_this_machine():
    built = _cpu.build_info()["isas"]
    assert _cpu.isas()[0] == "portable" and set(_cpu.isas()) <= set(built)
    assert _cpu.isa() in _cpu.isas()


def test_every_tier_can_be_forced():
    before = _cpu.isa()
    try:
        for name in _cpu.isas():
            _cpu.set_isa(name)
            assert _cpu.isa() == name
    finally:
        _cpu.set_isa(before)


def test_unknown_tier_is_refused():
    before = _cpu.isa()
    with pytest.raises(ValueError, match=r"isa: 'sse9', expected a tier that is built and runs here: portable"):
        _cpu.set_isa("sse9")
    assert _cpu.isa() == before


def _import_with(tier: str):
    return subprocess.run(
        [sys.executable, "-c", "import torch; from vidkern import _cpu; print(_cpu.isa())"],
        env={**os.environ, "VIDKERN_CPU_ISA": tier}, capture_output=True, text=True,
    )


def test_environment_forces_a_tier():
    done = _import_with("portable")
    assert done.returncode == 0 and done.stdout.strip() == "portable"


def test_environment_with_a_tier_that_cannot_run():
    done = _import_with("avx1024")
    assert done.returncode != 0
    assert "VIDKERN_CPU_ISA: 'avx1024', expected a tier that is built and runs here" in done.stderr
