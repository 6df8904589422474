"""Machine code by NVRTC, which needs no GPU: what compiles, what is kept, and what is made anew."""

import ctypes
import re
import shutil
import subprocess
import sys
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


HOPPER = """
#include "hopper.h"
struct Given { vk::TensorMap map; float* c; };
VK_KERNEL(128) VK_CLUSTER(2) tiny_hopper(const VK_PARAMETER Given p) {
  using namespace vk;
  const hopper::Panels<64, 64> a{shared_at<u8>(1024)};
  if (thread_index() == 0) copy_box(a.base, p.map, 0, 0, shared_at<u64>(0));
  Accumulator c[2] = {};
  products_begin();
  warpgroup_product<bf16, 16>(c, a.depth_along(0, 0), a.depth_along(0, 0), false);
  products_commit(), products_wait<0>();
  store(p.c + thread_index(), c[0].v[0]);
}
"""


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Our headers, and a source for compute capability 9.0 alone beside one for any."""
    folder = tmp_path / "csrc"
    shutil.copytree(cubins.sources.folder(), folder)
    [path.unlink() for path in (folder / "cuda").glob("*.cu")]
    (folder / "cuda" / "tiny_hopper.cu").write_text(HOPPER)
    (folder / "cuda" / "tiny.cu").write_text('extern "C" __global__ void tiny_set(int* p) { *p = 1; }\n')
    monkeypatch.setattr(cubins.sources, "folder", lambda: folder)
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path / "ahead")


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
        for stem, code in zip(STEMS, made):
            for kernel in holds_what_is_declared(stem, code):
                # What every driver for the kernels takes; docs/cuda.md promises it.
                assert 0 < parameter_bytes(code, kernel) <= 4096, kernel


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


# ---- compute capability 9.0 alone -------------------------------------------------------------------------------------------
def test_a_hopper_source_is_compiled_for_90a(hopper, cache):
    """With clusters, tensor maps in parameters and products of a warpgroup; plain sm_90 has no such products."""
    code, compiled = cubins.kept("tiny_hopper", (9, 0))
    assert compiled and kernels(code) == {"tiny_hopper"} and [path.name.partition(".")[2] for path in cache.iterdir()] == ["sm_90a.cubin"]
    # A tensor map and an address, up to the alignment of the map.
    assert parameter_bytes(code, "tiny_hopper") == 192
    with pytest.raises(RuntimeError, match="tiny_hopper.cu: NVRTC .* does not compile it for sm_90: "):
        cubins.compile("tiny_hopper", "90")
    assert list(cubins.candidates("tiny_hopper", (9, 0))) == [code]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_capabilities_have_nothing_of_it(hopper, cache, capability, monkeypatch):
    monkeypatch.setattr(cubins, "compile", lambda stem, arch: f"{stem} {arch}".encode())
    with pytest.raises(RuntimeError, match=r"^tiny_hopper.cu: compute capability \d+\.[09], expected 9.0$"):
        next(cubins.candidates("tiny_hopper", capability))
    assert set(cubins.make_ready(["tiny", "tiny_hopper"], capability)) == {"tiny"}
    assert set(cubins.make_ready(["tiny", "tiny_hopper"], (9, 0))) == {"tiny", "tiny_hopper"}


def test_which_architectures_a_build_is_for():
    """90 and 90a mean the same: each source is compiled for the one that it is for."""
    of = cubins.sources.archs_of
    for asked in (["80", "90"], ["80", "90a"], ["80", "90", "90a"], ["80", "90a", "90"]):
        assert of("tiny", asked) == ["80", "90"] and of("tiny_hopper_backward", asked) == ["90a"]
    assert of("tiny", ["80", "100"]) == ["80", "100"] and of("tiny_hopper", ["80", "100"]) == []


def test_what_the_package_brings_of_it(hopper, monkeypatch):
    """Each kind of source by its own architecture, whatever else is there; what is for any device does not vouch for it."""
    monkeypatch.setattr(cubins, "missing_compiler", lambda: "no NVRTC")
    folder = cubins.sources.AHEAD
    folder.mkdir()

    def bring(stem, arch):
        (folder / cubins.sources.ahead_name(cubins.path_of(stem), cubins.sources.folder(), arch)).write_bytes(f"{stem} {arch}".encode())

    bring("tiny", "80"), bring("tiny", "90")
    assert cubins.built_ahead((9, 0)) and not cubins.built_ahead((9, 0), hopper=True)
    bring("tiny_hopper", "90a")
    assert cubins.archs_ahead() == ["80", "90", "90a"] and cubins.built_ahead((9, 0), hopper=True)
    assert cubins.ahead("tiny_hopper", (9, 0)) == b"tiny_hopper 90a" and cubins.ahead("tiny", (9, 0)) == b"tiny 90"
    for capability in ((8, 0), (9, 1), (10, 0)):
        assert cubins.ahead("tiny_hopper", capability) is None and not cubins.built_ahead(capability, hopper=True)
    assert cubins.built_ahead((9, 1)) and cubins.ahead("tiny", (9, 1)) == b"tiny 90"


# ---- what goes wrong --------------------------------------------------------------------------------------------------
def test_a_complaint_names_the_source_the_architecture_and_the_mistake(csrc):
    (csrc / "cuda" / "broken.cu").write_text('\nextern "C" __global__ void f() { undeclared(); }\n')
    with pytest.raises(RuntimeError, match=r'^broken.cu: NVRTC \d+\.\d+ does not compile it for sm_90: broken.cu\(2\): error: .*"undeclared"'):
        cubins.compile("broken", "90")
    with pytest.raises(RuntimeError, match=r"tiny.cu: NVRTC \d+\.\d+ does not compile it for sm_10: .*"):
        cubins.compile("tiny", "10")


def test_without_nvrtc_it_says_what_to_install(csrc, monkeypatch):
    monkeypatch.setattr(cubins, "missing_compiler", lambda: f"cuda-python is not installed ({cubins.INSTALL})")
    message = r"tiny.cu: no machine code for sm_90 came with the package, and cuda-python is not installed \(it comes with vidkern's extra \"cuda\", in .*\)"
    for call in (lambda: cubins.compile("tiny", "90"), lambda: cubins.kept("tiny", (9, 0))):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_threads_that_compile_first_find_the_whole_compiler():
    """cuda.core fills itself from another module while it is imported: without a lock, most of these threads find no ``Program``."""
    code = (
        "import threading; from vidkern.cuda import cubins; together = threading.Barrier(8); found = []\n"
        "def work(): together.wait(); found.append(cubins._program())\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]; [t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(found) == 8"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_experimental_name_of_older_releases(monkeypatch):
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
    """Size of the one parameter that a cubin says a kernel takes: of attribute EIATTR_KPARAM_INFO in its section of facts, whose last
    word holds it above 18 bits."""
    begin, size = section(code, f".nv.info.{kernel}")
    assert code.count(b"\x04\x17\x0c\x00", begin, begin + size) == 1
    at = code.index(b"\x04\x17\x0c\x00", begin)
    return int.from_bytes(code[at + 12 : at + 16], "little") >> 18


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
