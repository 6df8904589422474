"""The whole way of hand-written kernels but for the hardware: op, launcher, launch layer, the driver's calls, and the kernel, executed."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, FakeDriver
from harness import CSRC, KernelError, Program, tensor_map

import vidkern
from vidkern import cuda, registry
from vidkern.cuda import cubins
from vidkern.cuda.launcher import source_of
from vidkern.verify import accuracy, command, rooms


def encode(given) -> bytes:
    """The executor's tensor map, of what the driver was asked for."""
    dtype = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}[given.kind]
    there = SimpleNamespace(data_ptr=lambda: given.address, element_size=lambda: 2, dtype=dtype)
    return bytes(tensor_map(there, given.sizes, [step // 2 for step in given.strides], given.box))


class Executing(cuda.Launcher):
    """The launch layer over a driver whose launches run in the executor, which is told the tensors that a kernel may touch."""

    def __init__(self):
        self.cu, self.programs, self.may = FakeCuda(), {}, None
        self.cu.run, self.cu.encode = self._run, encode
        super().__init__(FakeDriver(self.cu))

    def __call__(self, name, parameters, blocks, threads, shared, reads, writes):
        self.may = SimpleNamespace(reads=reads, writes=writes, kind=type(parameters))
        super().__call__(name, parameters, blocks, threads, shared, reads, writes)

    def _run(self, given):
        stem = source_of(given.name)
        if stem not in self.programs:
            self.programs[stem] = Program(CSRC / "cuda" / f"{stem}.cu")
        self.programs[stem].run(
            given.name, self.may.kind.from_address(given.address), blocks=given.blocks, threads=given.threads, shared=given.shared,
            reads=self.may.reads, writes=self.may.writes,
        )  # fmt: skip


@pytest.fixture
def executing(monkeypatch, tmp_path):
    """CPU tensors count as ones on a GPU, machine code as compiled."""
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(cubins, "compile", lambda stem, arch: stem.encode())
    monkeypatch.setattr(cuda, "why_not", lambda t: None)
    monkeypatch.setattr(cuda, "why_not_hopper", lambda t: None)
    launcher = Executing()
    monkeypatch.setattr(cuda, "launch", launcher)
    registry.ops()
    return launcher


def attend(impl, dtype=torch.bfloat16, dim=40, **more):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, 2 * 3 * 11, dim, generator=g).to(dtype).requires_grad_() for h in (2, 1, 1)]
    weight = torch.randn(1, 2, 2 * 3 * 11, dim, generator=g)
    if impl == "reference":
        leaves = [t.detach().double().requires_grad_() for t in leaves]
    out = vidkern.grid_attention(*leaves, grid=(2, 3), impl=impl, **more)
    return out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)


def test_forward_and_backward(executing):
    found, right = attend("cuda"), attend("reference")
    for a, b in zip(found, right):
        assert (a.double() - b).abs().max() < 0.015 * b.abs().max()
    names = [given.name for given in executing.cu.launches]
    assert names == [f"grid_attention_{part}" for part in ("forward_bf16_64", "delta_bf16", "dq_bf16_64", "dkv_bf16_64")]
    assert [arguments for name, arguments in executing.cu.calls if name == "cuModuleLoadData"] == [(b"grid_attention",), (b"grid_attention_backward",)]
    assert executing.cu.count("cuFuncSetAttribute") == 0


def test_the_forward_chosen_stays_the_backwards(executing):
    """Under ``use`` as by name, in float16, with masks, and with more than 48 KB of shared memory."""
    valid = torch.tensor([[True, False, True], [True, True, True]])
    with vidkern.use("cuda"):
        found = attend(None, torch.float16, 72, valid=valid)
    for a, b in zip(found, attend("reference", torch.float16, 72, valid=valid)):
        assert (a.double() - b).abs().max() < 0.01 * b.abs().max()
    assert {given.name.partition("_f16")[2] for given in executing.cu.launches if "delta" not in given.name} == {"_128_live"}
    assert executing.cu.count("cuFuncSetAttribute") == 3


def test_parameters_that_lie_are_noticed(executing, monkeypatch):
    """The executor sees the parameters that the driver was given, not those that the launcher made: a byte lost on the way is noticed."""
    address = cuda.launcher.ctypes.addressof
    monkeypatch.setattr("vidkern.cuda.driver.ctypes.addressof", lambda p: address(p) + (8 if isinstance(p, cuda.launcher.ctypes.Structure) else 0))
    with pytest.raises(KernelError):
        attend("cuda")


def test_the_executor_and_the_driver_are_asked_for_the_same_tensor_maps(executing):
    """The same arguments lead to the same map: what the kernels were executed with is what a driver would encode."""
    t = torch.zeros(2, 3, 40, 80, dtype=torch.float16).transpose(1, 2)[:, 3:]
    cases = [
        ((80, 37, 3, 2), (t.stride(1), t.stride(2), t.stride(0)), (64, 37, 1, 1)), ((80, 37), (t.stride(1),), (64, 256)),
        ((80,), (), (64,)), ((8, 2, 3, 4, 5), (8, 16, 24, 80), (64, 1, 2, 3, 4)),
    ]  # fmt: skip
    for case in cases:
        assert bytes(executing.tensor_map(t, *case)) == bytes(tensor_map(t, *case)), case
    assert {given.swizzle for given in executing.cu.maps} == {"CU_TENSOR_MAP_SWIZZLE_128B"} and len(executing.cu.maps) == len(cases)


def test_what_it_cannot_serve_is_left_out_of_a_verification(executing, monkeypatch):
    """Head dims above 128 are not among what it would be chosen for: the others have to pass, and the table says what was not looked at."""
    room = rooms.room("grid_attention")
    chosen = [next(s for s in room.samples if s.name == "dim_8"), next(s for s in room.samples if s.dim > 128)]
    monkeypatch.setitem(rooms.ROOMS, "grid_attention", rooms.Room(**{**vars(room), "samples": tuple(chosen), "probes": {}}))
    units = command.plan("cpu", ["grid_attention"], ["cuda"], 3)
    assert [u.dtype for u in units] == ["bfloat16", "float16"]
    unit = units[0]
    assert [name for name, _ in unit.steps] == [s.name for s in chosen] + [f"same bits {s.name}" for s in chosen]
    unit.steps = unit.steps[:3]
    with accuracy.poisoned():
        assert command.verify([unit], 3, 0, quiet=True) is None
    assert unit.state == "passed" and 0 < unit.worst["max"] <= accuracy.RATIO_MAX
    assert any(f"{chosen[-1].name}: it cannot serve it: head_dim is {chosen[-1].dim}" in text for text in unit.left_out), unit.left_out
    assert "left out" in "\n".join(command.table([unit]))


# ---- compute capability 9.0 alone -----------------------------------------------------------------------------------------
def near(found, right, bound):
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b).abs().max() < bound * b.abs().max()


def test_hopper_forward_and_backward(executing):
    """Kernels of two kinds in one call: those for 9.0 alone, and the one that serves both; the maps are what the driver encoded."""
    near(attend("hopper"), attend("reference"), 0.015)
    assert [given.name.partition("_bf16")[0] for given in executing.cu.launches] == [
        "grid_attention_hopper_forward_64", "grid_attention_delta", "grid_attention_hopper_dq_64", "grid_attention_hopper_dkv_64",
    ]  # fmt: skip
    loaded = [arguments for name, arguments in executing.cu.calls if name == "cuModuleLoadData"]
    assert loaded == [(b"grid_attention_hopper_64",), (b"grid_attention_backward",), (b"grid_attention_hopper_backward_64",)]
    # More than 48 KB each; q, k and v are mapped, and twice two rows and two columns.
    assert executing.cu.count("cuFuncSetAttribute") == 3 and executing.cu.refused is None
    assert 3 < len(executing.cu.maps) <= 3 + 4 * 2 and executing.cu.count("cuGetProcAddress") == 1


def test_hopper_maps_that_lie_are_noticed(executing, monkeypatch):
    """The kernel reads what the driver encoded: a stride lost on the way is noticed."""
    monkeypatch.setattr(executing.cu, "encode", lambda given: encode(SimpleNamespace(**{**vars(given), "strides": (160, *given.strides[1:])})))
    with pytest.raises(KernelError, match="copy of a box"):
        attend("hopper")


def test_hopper_motion_flow(executing):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 2 * 5 * 6, 32, generator=g).bfloat16().requires_grad_() for _ in range(2))

    def flow(impl):
        leaves = [t.detach().double().requires_grad_() if impl == "reference" else t for t in (q, k)]
        found = vidkern.attention_motion_flow(*leaves, grid=(2, 5, 6), impl=impl)
        return found.detach(), *torch.autograd.grad(found.sum(), leaves)

    near(flow("hopper"), flow("reference"), 0.02)
    names = {given.name.partition("_bf16")[0] for given in executing.cu.launches}
    assert names >= {"amf_hopper_forward", "amf_hopper_slope", "amf_hopper_slab_dq", "amf_hopper_slab_dk"}


def test_hopper_pruned_layers(executing, monkeypatch):
    """The kit of the launchers, by the launcher that is patched here."""
    from vidkern.ops.pruned import hopper

    kit = hopper.Kit(executing)
    for name in ("pair_rows", "product", "slope", "normed_backward"):
        monkeypatch.setattr(hopper, name, getattr(kit, name))
    g = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(*shape, generator=g).bfloat16() for shape in ((2, 70, 64), (72, 64), (64, 72)))
    index = torch.arange(0, 128, 2)

    def layers(impl):
        leaves = [(t.double() if impl == "reference" else t).detach().requires_grad_() for t in (x, w1, w2)]
        one = vidkern.pruned_linear(leaves[0], leaves[1], out_index=torch.arange(0, 144, 2), out_features=144, impl=impl)
        two = vidkern.pruned_ffn(leaves[0], leaves[1], None, leaves[2], None, act="gelu_tanh", impl=impl)
        many = vidkern.pruned_linear_grouped([leaves[0], leaves[0]], [leaves[1], leaves[2][:, :64]], impl=impl)
        outputs = (one, two, *many)
        return *(t.detach() for t in outputs), *torch.autograd.grad(sum(t.double().square().sum() for t in outputs), leaves)

    near(layers("hopper"), layers("reference"), 0.03)
    assert {"pruned_hopper_nt_bf16", "pruned_hopper_grouped_bf16"} <= {given.name.rpartition("_")[0] for given in executing.cu.launches}
