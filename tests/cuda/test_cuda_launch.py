"""From a kernel's name to the driver's launch, on a driver that only notes what it is asked."""

import ctypes
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, FakeDriver

import vidkern
from vidkern import cuda, registry, verified
from vidkern.cuda import cubins
from vidkern.cuda import launcher as layer
from vidkern.verify import command

NAME, OTHER = "grid_attention_forward_bf16_64", "grid_attention_dq_bf16_64"


class Given(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_int32), ("c", ctypes.c_float)]


def on(device=0):
    """A tensor of which only the device is looked at."""
    return [SimpleNamespace(get_device=lambda: device)]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What is compiled, which takes no time: (stem, arch)."""
    registry.ops()  # whose rooms declare the kernels
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path / "ahead")
    asked = []
    monkeypatch.setattr(cubins, "compile", lambda stem, arch: asked.append((stem, arch)) or f"{stem} {arch}".encode())
    return asked


@pytest.fixture
def cu(compiled):
    return FakeCuda()


@pytest.fixture
def driver(cu):
    return FakeDriver(cu)


@pytest.fixture
def launch(driver):
    return cuda.Launcher(driver)


# ---- one launch -------------------------------------------------------------------------------------------------------
def test_a_launch_is_what_was_asked_for(launch, cu):
    read = []
    cu.run = lambda given: read.append(ctypes.string_at(given.address, ctypes.sizeof(Given)))
    given = Given(0x1234, -5, 0.5)
    launch(NAME, given, 7, 128, 4096, [], on())
    (found,) = cu.launches
    assert (found.name, found.blocks, found.threads, found.shared, found.stream) == (NAME, 7, 128, 4096, 70)
    assert read == [bytes(given)]


def test_later_calls_ask_the_driver_for_the_launch_alone(launch, cu, driver, compiled):
    """Nothing is synchronised, allocated or looked up."""
    launch(NAME, Given(), 7, 128, 0, [], on())
    before, visited = len(cu.calls), len(driver.visited)
    for _ in range(3):
        launch(NAME, Given(), 7, 128, 0, [], on())
    assert len(cu.calls) == before and len(driver.visited) == visited and len(cu.launches) == 4
    assert compiled == [("grid_attention", "90")] and cu.count("cuModuleLoadData") == 1
    assert not any("Synchronize" in name or "MemAlloc" in name for name, _ in cu.calls)


def test_kernels_of_a_source_share_its_module_and_devices_have_their_own(launch, cu, driver, compiled):
    launch(NAME, Given(), 1, 128, 0, [], on())
    launch(NAME.replace("bf16", "f16"), Given(), 1, 128, 0, [], on())
    assert cu.count("cuModuleLoadData") == 1 and cu.count("cuModuleGetFunction") == 2
    launch(NAME, Given(), 1, 128, 0, [], on(1))
    launch(OTHER, Given(), 1, 128, 0, [], on(1))
    assert cu.count("cuModuleLoadData") == 3 and compiled == [("grid_attention", "90"), ("grid_attention_backward", "90")]
    assert ("cuCtxSetCurrent", (1000 + 101,)) in cu.calls
    # The current device stays the one it was; the other's is made current for the launch, on the other's stream.
    driver.visited.clear()
    launch(NAME, Given(), 1, 128, 0, [], on(1))
    assert driver.visited == [1] and driver.device == 0 and cu.launches[-1].stream == 71
    launch(NAME, Given(), 1, 128, 0, [], on(0))
    assert driver.visited == [1]


def test_more_shared_memory_than_usual_is_asked_for_once(launch, cu):
    for shared in (48 << 10, 60_000, 60_000, 50_000, 90_000, 90_000):
        launch(NAME, Given(), 1, 128, shared, [], on())
    asked = [arguments for name, arguments in cu.calls if name == "cuFuncSetAttribute"]
    assert asked == [(NAME, 60_000), (NAME, 90_000)]
    cu.fails["cuFuncSetAttribute"] = [1]
    with pytest.raises(RuntimeError, match=f"{NAME}: 300000 bytes of shared memory for a block: CUDA_ERROR_INVALID_VALUE"):
        launch(NAME, Given(), 1, 128, 300_000, [], on())
    launch(NAME, Given(), 1, 128, 90_000, [], on())


def test_no_blocks_and_too_many(launch, cu):
    launch(NAME, Given(), 0, 128, 0, [], on())
    assert not cu.launches
    launch(NAME, Given(), 2**31 - 1, 128, 0, [], on())
    with pytest.raises(RuntimeError, match=f"{NAME}: 2147483648 blocks, expected at most 2147483647"):
        launch(NAME, Given(), 2**31, 128, 0, [], on())


def test_an_unknown_kernel(launch, cu):
    with pytest.raises(ValueError, match="kernel: 'no_such_kernel', expected a name that begins with one of .*grid_attention_forward_"):
        launch("no_such_kernel", Given(), 1, 128, 0, [], on())
    cu.fails["cuModuleGetFunction"] = [500]
    with pytest.raises(RuntimeError, match=f"{NAME}: cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
        launch(NAME, Given(), 1, 128, 0, [], on())


# ---- captures, threads, contexts ----------------------------------------------------------------------------------------
def test_a_capture_takes_what_has_run_before_and_refuses_to_compile(launch, cu, driver, compiled):
    driver.captured = True
    with pytest.raises(RuntimeError, match=f"{NAME}: is not loaded yet, and a CUDA graph is being captured, expected one call"):
        launch(NAME, Given(), 1, 128, 0, [], on())
    assert not compiled and not cu.calls and not cu.launches
    driver.captured = False
    launch(NAME, Given(), 1, 128, 60_000, [], on())
    before, driver.captured = len(cu.calls), True
    launch(NAME, Given(), 1, 128, 60_000, [], on())
    assert len(cu.launches) == 2 and len(cu.calls) == before


def test_threads_that_come_first_together_compile_and_load_once(launch, cu, compiled, monkeypatch):
    several, failed = threading.Barrier(8), []
    slow = cubins.compile

    def compile_slowly(*words):
        threading.Event().wait(0.05)
        return slow(*words)

    monkeypatch.setattr(cubins, "compile", compile_slowly)

    def work(i):
        try:
            several.wait()
            launch(NAME, Given(b=i), 1 + i, 128, 60_000, [], on())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed and len(compiled) == cu.count("cuModuleLoadData") == cu.count("cuModuleGetFunction") == cu.count("cuFuncSetAttribute") == 1
    assert sorted(given.blocks for given in cu.launches) == list(range(1, 9))


@pytest.mark.parametrize("error", [3, 201])
def test_a_thread_without_a_context_is_given_the_devices(launch, cu, error):
    launch(NAME, Given(), 1, 128, 0, [], on())
    cu.fails["cuLaunchKernel"] = [error]
    before = cu.count("cuCtxSetCurrent")
    launch(NAME, Given(), 1, 128, 0, [], on())
    assert len(cu.launches) == 2 and cu.count("cuCtxSetCurrent") == before + 1 and cu.count("cuDevicePrimaryCtxRetain") == 1


@pytest.mark.parametrize("errors, said", [([700], "CUDA error: "), ([719], "CUDA error: "), ([701], ""), ([1], ""), ([201, 201], "")])
def test_an_error_of_a_launch_names_the_kernel(launch, cu, errors, said):
    """What leaves the context broken says "CUDA error", as torch's errors do."""
    cu.fails["cuLaunchKernel"] = errors
    with pytest.raises(RuntimeError, match=f"^{said}{NAME}: CUDA_ERROR_\\w+ at a launch of 3 blocks of 128 threads with 64 bytes"):
        launch(NAME, Given(), 3, 128, 64, [], on())


def test_what_is_asked_of_torch(monkeypatch, cu):
    """The parts of torch that have no stand-in above: each under the device that it is asked about."""
    import contextlib
    from pathlib import Path

    from vidkern.cuda.driver import Driver

    current = [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 40 + 10 * index + current[0], raising=False)
    driver = Driver(cu)
    assert driver.capturing(1) and not driver.capturing(0) and driver.capability(3) == (9, 3)
    driver.launch("name", 1, driver.function(1, driver.load(1, b"code"), "name"), 2, 32, 0, Given())
    assert cu.launches[0].stream == 51 and current == [0]
    # A torch for CPUs lacks both, but its list of names has them.
    names = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    assert "def _cuda_getDevice(" in names and "def _cuda_getCurrentRawStream(" in names


# ---- machine code ---------------------------------------------------------------------------------------------------------
def bring(tmp_path, arch, content=b"of the package", stem="grid_attention"):
    folder = tmp_path / "ahead"
    folder.mkdir(exist_ok=True)
    (folder / cubins.sources.ahead_name(cubins.path_of(stem), cubins.sources.folder(), arch)).write_bytes(content)


def test_what_the_package_brings_comes_first(launch, cu, compiled, tmp_path):
    bring(tmp_path, "90")
    launch(NAME, Given(), 1, 128, 0, [], on())
    assert ("cuModuleLoadData", (b"of the package",)) in cu.calls and not compiled


def test_what_the_driver_does_not_load_is_compiled_here(launch, cu, compiled, tmp_path):
    bring(tmp_path, "90")
    cu.fails["cuModuleLoadData"] = [200]
    launch(NAME, Given(), 1, 128, 0, [], on())
    loaded = [arguments for name, arguments in cu.calls if name == "cuModuleLoadData"]
    assert loaded == [(b"of the package",), (b"grid_attention 90",)] and compiled == [("grid_attention", "90")]
    cu.fails["cuModuleLoadData"] = [200]
    message = "grid_attention_backward.cu: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE; the driver is one for CUDA 12.4, expected one as recent"
    with pytest.raises(RuntimeError, match=message):
        launch(OTHER, Given(), 1, 128, 0, [], on())


# ---- declared kernels -------------------------------------------------------------------------------------------------------
def test_a_declaration_gives_the_files_of_a_record(monkeypatch):
    monkeypatch.setattr(layer, "_PREFIXES", dict(layer._PREFIXES))
    from vidkern.ops.grid_attention import cuda as launchers

    found = layer.declare(launchers)
    assert found == ("ops/grid_attention/cuda.py", "cuda/launcher.py", "csrc/cuda/grid_attention.cu", "csrc/cuda/grid_attention_backward.cu")
    names = {path.name for path in verified.closure(found)}
    assert {"matrix.h", "async.h", "grid_attention.h", "plan.py", "reference.py", "launcher.py", "driver.py", "cubins.py", "sources.py"} <= names
    made = SimpleNamespace(__name__="vidkern.ops.made.cuda", SOURCES={"made": ("made_",), "made_up": ("made_up_",)})
    assert layer.declare(made)[0] == "ops/made/cuda.py"
    # The longest beginning decides.
    assert layer.source_of("made_up_bf16") == "made_up" and layer.source_of("made_down") == "made" and {"made", "made_up"} <= set(layer.declared())


# ---- the backend ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh():
    """What is missing is looked up anew, before and after."""
    caches = (cuda._missing, cubins.missing_compiler, cubins.missing_python, cubins.version)
    [c.cache_clear() for c in caches]
    yield
    [c.cache_clear() for c in caches]


def fakes(dtype=torch.bfloat16, dim=64, step=0):
    with torch._subclasses.FakeTensorMode():
        flat = torch.empty(2 * 24 * dim + step, dtype=dtype, device="cuda")
        return [flat.as_strided((1, 2, 24, dim), (48 * dim, 24 * dim, dim, 1), step) for _ in range(3)]


def reason(tensors, **more):
    return vidkern.explain(vidkern.grid_attention, *tensors, grid=(2, 3), **more).reasons["cuda"]


def test_why_it_cannot_serve(fresh):
    assert reason(fakes()).startswith("could serve it, but is chosen only by name: it is not verified on")
    assert reason([torch.randn(1, 2, 24, 64).bfloat16()] * 3) == "tensors are on cpu, it serves cuda"
    assert reason(fakes(torch.float32)) == "dtype is torch.float32, it serves torch.float16 and torch.bfloat16"
    assert reason(fakes(dim=192)) == "head_dim is 192, it serves up to 128"
    assert reason(fakes(step=3)) == "q's rows are not aligned to 16 bytes" and "chosen only by name" in reason(fakes(step=8))
    with pytest.raises(registry.BackendUnavailable, match='impl: "cuda" cannot serve this call of grid_attention: dtype is torch.float32'):
        vidkern.grid_attention(*fakes(torch.float32), grid=(2, 3), impl="cuda")
    # Nobody looks at a fake tensor's address, which torch warns of.
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vidkern.grid_attention(*fakes(), grid=(2, 3), impl="cuda")
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"python": "cuda-python is not installed"}, "cuda-python is not installed"),
        ({"capability": (7, 5)}, "the GPU's compute capability is 7.5, expected at least 8.0"),
        ({"compiler": OSError("libnvrtc.so.13:\n not found")}, r"NVRTC cannot be loaded, .*vidkern's extra \"cuda\", in a checkout by pip install .*\): libnvrtc.so.13: not found"),
    ],
)
def test_what_is_missing_is_said(fresh, monkeypatch, tmp_path, changes, message):
    def version():
        if "compiler" in changes:
            raise changes["compiler"]
        return "13.5"

    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: changes.get("capability", (9, 0)))
    monkeypatch.setattr(cubins, "version", version)
    if "python" in changes:
        monkeypatch.setattr(cubins, "missing_python", lambda: changes["python"])
    with pytest.raises(registry.BackendUnavailable, match=message):
        vidkern.grid_attention(*fakes(), grid=(2, 3), impl="cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 1), (10, 0)])
def test_kernels_for_90_alone_are_offered_there_alone(fresh, monkeypatch, tmp_path, capability):
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path / "ahead")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    t = fakes()[0]
    assert cuda.why_not_hopper(t) == "the GPU's compute capability is {}.{}, expected 9.0".format(*capability) and cuda.why_not(t) is None
    assert cuda.why_not_hopper(torch.zeros(1)) == "tensors are on cpu, it serves cuda"
    cuda._missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda.why_not_hopper(t) is None
    cuda._missing.cache_clear()
    monkeypatch.setattr(cubins, "missing_compiler", lambda: "NVRTC cannot be loaded")
    bring(tmp_path, "90")
    assert cuda.why_not_hopper(t) == "NVRTC cannot be loaded" and cuda.why_not(t) is None


def test_hopper_says_which_gpu_it_needs(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    found = vidkern.explain(vidkern.grid_attention, *fakes(), grid=(2, 3)).reasons
    assert found["hopper"] == "the GPU's compute capability is 8.0, expected 9.0" and "chosen only by name" in found["cuda"]
    with pytest.raises(registry.BackendUnavailable, match='impl: "hopper" cannot serve this call of grid_attention: the GPU.s compute capability'):
        vidkern.grid_attention(*fakes(), grid=(2, 3), impl="hopper")


def test_without_nvrtc_what_the_package_brings_is_enough(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path / "ahead")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(cubins, "missing_compiler", lambda: "NVRTC cannot be loaded")
    bring(tmp_path, "90"), bring(tmp_path, "89")
    assert reason(fakes()) == "NVRTC cannot be loaded"
    cuda._missing.cache_clear()
    bring(tmp_path, "80")
    assert "chosen only by name" in reason(fakes())


def record_of(op, backend, device):
    return verified.Record(op, backend.name, *device, ("bfloat16",), 1.1, 1.0, 9, {}, 1, "2026-01-01T00:00:00+00:00",
                           verified.digest(backend.sources))  # fmt: skip


def test_a_record_of_hopper_is_bound_to_all_that_it_launches():
    """Its own sources, and the other GPUs' kernels that it shares."""
    with_it = {name: op._by_name for name, op in registry.ops().items() if "hopper" in op._by_name}
    assert set(with_it) == {"grid_attention", "attention_motion_flow", "pruned_linear", "pruned_ffn", "pruned_linear_grouped"}
    every = {f"csrc/cuda/{path.name}" for path in (cubins.sources.folder() / "cuda").glob("*_hopper*.cu")}
    assert every <= {source for backends in with_it.values() for source in backends["hopper"].sources}
    for name, backends in with_it.items():
        hopper, cuda_ = backends["hopper"], backends["cuda"]
        order = list(backends)
        assert hopper.trust == "require" and order.index("hopper") + 1 == order.index("cuda")
        own = {path.name for path in verified.closure(hopper.sources)}
        assert {"hopper.h", "warpgroup.h", "tensor_map.h", "tensor_map.py", "driver.py", "hopper.py", "cuda.py"} <= own, name
        shared = {source for source in cuda_.sources if source.endswith(".cu")} - {"csrc/cuda/pruned_grouped.cu"}  # of which it has its own
        assert shared <= set(hopper.sources), name
        assert not any("hopper" in path.name for path in verified.closure(cuda_.sources)), "and the others' is not bound to Hopper's"


def test_chosen_by_itself_only_with_a_record(monkeypatch, tmp_path):
    gpu = verified.DeviceClass("NVIDIA Test 1", "9.0")
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(verified, "shipped_dir", lambda: None)
    monkeypatch.setattr(verified, "device_class", lambda device: gpu)
    verified.forget()
    try:
        asked = lambda dtype=torch.bfloat16: vidkern.explain(vidkern.grid_attention, *fakes(dtype), grid=(2, 3))  # noqa: E731
        op = registry.ops()["grid_attention"]
        assert asked().chosen == "triton" and op.choose((*fakes(), None, None, None, 4, 0, False, 1.0, False, False, "", "auto")) == "triton"
        backend = op._by_name["cuda"]
        verified.write(tmp_path, [record_of("grid_attention", backend, gpu)])
        assert asked().chosen == "cuda" and asked().reasons["cuda"] == "serves this call"
        assert op.choose((*fakes(), None, None, None, 4, 0, False, 1.0, False, False, "", "auto")) == "cuda"
        assert asked(torch.float16).chosen == "triton", "another dtype than the record's"
        assert "verified on NVIDIA Test 1 (9.0) bfloat16, elsewhere only by name" in vidkern.info().ops["grid_attention"]["cuda"]
        # Hopper's has a record of its own, and comes first with it.
        assert asked().reasons["hopper"].startswith("could serve it, but is chosen only by name: it is not verified on NVIDIA Test 1 (9.0)")
        verified.write(tmp_path, [record_of("grid_attention", op._by_name["hopper"], gpu)])
        assert asked().chosen == "hopper" and asked().reasons["cuda"] == "could serve it, but comes later"
    finally:
        verified.forget()


def test_info_says_where_machine_code_comes_from(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins.sources, "AHEAD", tmp_path / "ahead")
    found = vidkern.info().cuda
    assert found == {"cuda-python": "there", "built ahead": "nothing: NVRTC compiles at first use", "kept in": str(tmp_path / "cubins")}
    bring(tmp_path, "90"), bring(tmp_path, "80")
    monkeypatch.setattr(cubins, "missing_python", lambda: "cuda-python is not installed")
    assert vidkern.info().cuda | {"kept in": ""} == {"cuda-python": "cuda-python is not installed", "built ahead": "sm_80, sm_90", "kept in": ""}
    assert "CUDA kernels\n" in str(vidkern.info())


def test_a_verification_compiles_sources_once_and_lets_processes_do_the_rest(monkeypatch):
    """Eight processes that each compiled all kernels would only be in each other's way."""
    made, started = [], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cubins, "make_ready", lambda stems, capability: made.append((stems, capability)))
    monkeypatch.setattr(command.warm, "start", lambda units, seed, device, limit: started.append((units, limit)) or 2.5)
    units = [command.Unit("grid_attention", b, "bfloat16") for b in ("cuda", "triton", "reference")]
    assert 2.5 <= command.compile_ahead(units, torch.device("cuda", 0), 1, 100.0) < 5
    assert made == [(layer.declared(), (9, 0))] and started[0][0] == ["grid_attention/triton/bfloat16"] and 95 < started[0][1] <= 100
    command.compile_ahead(units[1:], torch.device("cuda", 0), 1)
    assert len(made) == 1
