"""Machine code by NVRTC, which needs no GPU: what compiles, what is kept, and what is made anew."""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vidkern import registry
from vidkern.cuda import cubins, launcher

STEMS = sorted(path.stem for path in (cubins.sources.folder() / "cuda").glob("*.cu"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


@pytest.fixture
def csrc(monkeypatch, tmp_path):
    """Sources of a few lines."""
    folder = tmp_path / "csrc"
    (folder / "cuda" / "device").mkdir(parents=True)
    (folder / "cuda" / "device" / "deep.h").write_text("#define N 1\n")
    (folder / "cuda" / "device" / "n.h").write_text('#include "deep.h"\n// 1\n')
    (folder / "cuda" / "tiny.cu").write_text('#include "device/n.h"\nextern "C" __global__ void tiny_set(int* p) { *p = N; }\n')
    monkeypatch.setattr(cubins.sources, "folder", lambda: folder)
    return folder


def kernels(code):
    """Names of the kernels in a cubin."""
    return {name.decode() for name in re.findall(rb"\0\.text\.(\w+)(?=\0)", code)}


# ---- what ships -------------------------------------------------------------------------------------------------------
def holds_what_is_declared(stem, code):
    registry.ops()
    found = kernels(code)
    assert code[:4] == b"\x7fELF" and found
    if stem in launcher.declared():
        assert {launcher.source_of(name) for name in found} == {stem}, "a kernel's name leads to another source"
    return found


@pytest.fixture(scope="module")
def forward():
    """Machine code of the forward of grid attention."""
    return cubins.compile("grid_attention", "90")


def test_a_source_compiles_without_cuda_headers(forward):
    """And holds every kernel that the launchers ask it for."""
    found = holds_what_is_declared("grid_attention", forward)
    assert found == {f"grid_attention_forward_{t}_{d}{live}" for t in ("bf16", "f16") for d in (64, 128) for live in ("", "_live")}


@pytest.mark.slow
def test_every_source_compiles(monkeypatch):
    """What has compiled before is found in build/ by its content. nvcc compiles the other architectures, in tests/executor."""
    monkeypatch.setenv("VIDKERN_CACHE", str(Path(__file__).parents[2] / "build" / "nvrtc"))
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda stem: cubins.kept(stem, (9, 0))[0], STEMS)
        assert all(holds_what_is_declared(stem, code) for stem, code in zip(STEMS, made))


def test_nothing_but_our_headers_is_included():
    paths = [p for p in (cubins.sources.folder() / "cuda").rglob("*") if p.suffix in (".cu", ".h")]
    assert len(paths) > 5 and not [p.name for p in paths if re.search(r"#\s*include\s*<", p.read_text())]


# ---- what is kept -----------------------------------------------------------------------------------------------------
def test_machine_code_is_compiled_once_and_kept(csrc, cache):
    code, compiled = cubins.kept("tiny", (9, 0))
    assert compiled and kernels(code) == {"tiny_set"}
    assert cubins.kept("tiny", (9, 0)) == (code, False)
    (path,) = cache.iterdir()
    assert re.fullmatch(r"tiny-[0-9a-f]{24}\.sm_90\.cubin", path.name)
    assert cubins.kept("tiny", (8, 0))[1] and len(list(cache.iterdir())) == 2, "another architecture is another file"


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: b"", lambda c: c[:700] + bytes([c[700] ^ 1]) + c[701:], lambda c: c[:32]],
                         ids=["cut", "empty", "a bit", "short"])  # fmt: skip
def test_a_damaged_file_is_made_anew(csrc, cache, damage):
    code, _ = cubins.kept("tiny", (9, 0))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cubins.kept("tiny", (9, 0)) == (code, True)
    assert path.read_bytes() == whole and cubins.kept("tiny", (9, 0)) == (code, False)


@pytest.mark.parametrize("change", ["tiny.cu", "device/n.h", "device/deep.h", "version", "options"])
def test_what_it_is_made_of_decides_what_it_is_called(csrc, cache, change, monkeypatch):
    cubins.kept("tiny", (9, 0))
    if change == "version":
        monkeypatch.setattr(cubins, "version", lambda: "99.9")
    elif change == "options":
        monkeypatch.setattr(cubins.sources, "OPTIONS", ("-std=c++20",))
    else:
        path = csrc / "cuda" / change
        path.write_text(path.read_text().replace("1", "2") + "// new\n")
    assert cubins.kept("tiny", (9, 0))[1] and len(list(cache.iterdir())) == 2


def test_a_header_that_is_not_included_does_not_matter(csrc):
    first = cubins.sources.digest(csrc / "cuda" / "tiny.cu", csrc)
    (csrc / "cuda" / "other.h").write_text("int x;\n")
    assert cubins.sources.digest(csrc / "cuda" / "tiny.cu", csrc) == first


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(csrc, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cubins/tiny-.*: cannot be written .*VIDKERN_CACHE moves it"):
        code, compiled = cubins.kept("tiny", (9, 0))
    assert compiled and kernels(code) == {"tiny_set"}


def test_sources_are_made_ready_together(csrc, cache):
    (csrc / "cuda" / "broken.cu").write_text("this is not CUDA\n")
    found = cubins.make_ready(["tiny", "broken"], (9, 0))
    assert found["tiny"]["from"] == "NVRTC" and found["tiny"]["seconds"] > 0
    assert found["broken"]["from"] == "nowhere" and "broken.cu: NVRTC" in found["broken"]["reason"]
    assert cubins.make_ready(["tiny"], (9, 0))["tiny"]["from"] == "cache"


# ---- what goes wrong --------------------------------------------------------------------------------------------------
def test_a_complaint_names_the_source_the_architecture_and_the_mistake(csrc):
    (csrc / "cuda" / "broken.cu").write_text('\nextern "C" __global__ void f() { undeclared(); }\n')
    with pytest.raises(RuntimeError, match=r'^broken.cu: NVRTC \d+\.\d+ does not compile it for sm_90: broken.cu\(2\): error: .*"undeclared"'):
        cubins.compile("broken", "90")
    with pytest.raises(RuntimeError, match=r"tiny.cu: NVRTC \d+\.\d+ does not compile it for sm_10: .*"):
        cubins.compile("tiny", "10")


def test_without_nvrtc_it_says_what_to_install(csrc, monkeypatch):
    monkeypatch.setattr(cubins, "missing_compiler", lambda: f"cuda-python is not installed ({cubins.INSTALL})")
    message = r"tiny.cu: no machine code for sm_90 came with the package, and cuda-python is not installed \(pip install \"vidkern\[cuda\]\"\)"
    for call in (lambda: cubins.compile("tiny", "90"), lambda: cubins.kept("tiny", (9, 0))):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_experimental_name_of_older_releases(monkeypatch):
    import sys
    from types import ModuleType

    from cuda import core

    older, names = ModuleType("cuda.core.experimental"), ("Program", "ProgramOptions")
    for name in names:
        setattr(older, name, getattr(core, name))
    without = ModuleType("cuda.core")
    monkeypatch.setitem(sys.modules, "cuda.core", without)
    monkeypatch.setitem(sys.modules, "cuda.core.experimental", older)
    assert cubins._program() == tuple(getattr(core, name) for name in names)


# ---- the structures ---------------------------------------------------------------------------------------------------
def parameter_bytes(code, kernel):
    """Size of the parameters that a cubin says a kernel takes: of attribute EIATTR_PARAM_CBANK in its section of facts."""
    at = code.index(b"\x04\x0a\x08\x00", section(code, f".nv.info.{kernel}")[0])
    return int.from_bytes(code[at + 10 : at + 12], "little")


def section(code, name):
    """Offset and size of a section of an ELF file of 64 bits."""
    u = lambda at, n: int.from_bytes(code[at : at + n], "little")  # noqa: E731
    table, size, count, strings = u(40, 8), u(58, 2), u(60, 2), u(62, 2)
    text = u(table + strings * size + 24, 8)
    for i in range(count):
        at = table + i * size
        begin = text + u(at, 4)
        if code[begin : code.index(b"\0", begin)] == name.encode():
            return u(at + 24, 8), u(at + 32, 8)
    raise AssertionError(f"no section {name}")


def test_parameters_are_as_long_as_the_kernels_think(forward):
    """What Python lays out and what the compiler laid out: the bytes that a launch copies."""
    from vidkern.ops.grid_attention import cuda

    assert {parameter_bytes(forward, kernel) for kernel in kernels(forward)} == {ctypes.sizeof(cuda.Forward)}
