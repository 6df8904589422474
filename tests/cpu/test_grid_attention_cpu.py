"""What only the compiled grid attention promises: its work count, independence of threads, and checked arguments."""

import pytest
import torch

_cpu = pytest.importorskip("vidkern._cpu")

from vidkern.ops.grid_attention import cpu  # noqa: E402
from vidkern.ops.grid_attention.patterns import FramePattern, GridPattern  # noqa: E402


@pytest.fixture(params=_cpu.isas())
def tier(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(pattern, n, *, heads=2, kv_heads=2, dim=32, n_text=0, dtype=torch.float32, batch=1, **masks):
    """Forward and backward on seeded inputs: (out, lse, dq, dk, dv), forward work, backward work."""
    torch.manual_seed(0)
    length = n_text + pattern.n_frames * n
    q, dout = (torch.randn(batch, heads, length, dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in range(2))
    out, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    lse = torch.full((batch, heads, length), torch.nan)
    dlse = torch.randn_like(lse)
    shared = dict(pattern=pattern, frame_len=n, n_text=n_text, text_front=True, scale=dim**-0.5)
    masks = [masks.get(name) for name in ("valid", "kv_len", "text_len")]
    work = torch.zeros(2, 2, dtype=torch.int64)
    cpu.forward(q, k, v, *masks, out=out, lse=lse, work=work[0], **shared)
    cpu.backward(dout, dlse, q, k, v, out, lse, *masks, dq=dq, dk=dk, dv=dv, work=work[1], **shared)
    return (out, lse, dq, dk, dv), work[0].tolist(), work[1].tolist()


@pytest.mark.parametrize("n", [16, 48, 64, 144, 256])
def test_whole_panels_waste_nothing(tier, n):
    """Frames of a multiple of 16 tokens: computed equals needed, (V + T - 1) N keys for each of V T N queries."""
    views, times, heads = 3, 4, 2
    _, forward, backward = run(GridPattern(views, times), n)
    needed = heads * views * times * n * (views + times - 1) * n
    assert forward == [needed, needed] and backward == [needed, needed]


@pytest.mark.parametrize("n", [7, 36, 50, 63, 65, 577])
def test_work_count_closed_form(tier, n):
    """Any frame length: rows round up to 4 per tile, each run of key frames to whole panels of 16 tokens."""
    views, times, heads = 2, 3, 2
    pattern = GridPattern(views, times)
    _, (executed, useful), _ = run(pattern, n, heads=heads, dim=8)
    assert useful == heads * pattern.pairs * n * n
    if n < 16:  # several frames share a tile; the count is bounded instead
        assert useful <= executed <= heads * pattern.n_frames * n * pattern.n_frames * n * 4
        return
    expected = 0
    mask = pattern.frame_mask()
    # Tiles of a frame: even chunks of at most 128 rows, in steps of the register block (8 rows with AVX-512, else 4).
    step = 8 if tier == "avx512" else 4
    chunks = -(-n // 128)
    size = -(-(-(-n // chunks)) // step) * step
    rows = sum(-(-min(size, n - at) // 4) * 4 for at in range(0, n, size))
    for frame in range(pattern.n_frames):
        panels = set()
        for key in mask[frame].nonzero()[0]:
            panels |= set(range(key * n // 16, (key * n + n - 1) // 16 + 1))
        expected += rows * 16 * len(panels)
    assert executed == heads * expected


def test_hidden_frames_cost_nothing(tier):
    """Dead frames and frames beyond a causal window are never computed."""
    n, times = 64, 6
    valid = torch.tensor([[1, 1, 0, 1, 0, 1]], dtype=torch.uint8)
    _, forward, backward = run(GridPattern(1, times, causal_time=True), n, valid=valid)
    alive = [t for t in range(times) if valid[0, t]]
    needed = 2 * sum(n * n for a in alive for b in alive if b <= a)
    assert forward == [needed, needed] and backward == [needed, needed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["grid", "text", "tiny frames"])
def test_same_bits_for_any_number_of_threads(tier, threads, dtype, case):
    def once():
        if case == "grid":
            return run(GridPattern(2, 4), 80, heads=4, kv_heads=2, dtype=dtype)[0]
        if case == "text":
            return run(GridPattern(2, 3), 50, n_text=37, batch=2, dtype=dtype, text_len=torch.tensor([37, 5], dtype=torch.int32))[0]
        return run(FramePattern.from_mask(torch.rand(200, 200, generator=torch.Generator().manual_seed(1)) < 0.3), 3, dtype=dtype)[0]

    threads(1)
    first = once()
    for count in (1, 2, 3):
        threads(count)
        for a, b in zip(first, once()):
            assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def test_argument_tuple_is_checked():
    shape = [False, 1, 1, 2, 2, 32, 16, 2, 16, 0]
    names = ["bf16", "threads", "batch", "heads", "kv_heads", "length", "dim", "n_frames", "frame_len", "n_text"]
    assert _cpu.grid_attention_workspace(False, tuple(shape)) > 0
    for name, bad in (("threads", 0), ("kv_heads", 3), ("length", 33), ("dim", 12), ("dim", 264), ("n_frames", 0), ("n_text", -1)):
        fields = list(shape)
        fields[names.index(name)] = bad
        with pytest.raises(ValueError, match=f"{name}: {bad}, expected"):
            _cpu.grid_attention_workspace(False, tuple(fields))
    with pytest.raises(ValueError, match="argument tuple: 3 fields, expected more"):
        _cpu.grid_attention_workspace(False, (0, 1, 1))
    with pytest.raises(ValueError, match="argument tuple: 11 fields, expected 10"):
        _cpu.grid_attention_workspace(False, (*shape, 0))


def test_small_workspace_is_refused():
    pattern = GridPattern(1, 2)
    lists = pattern.lists("cpu")
    x, lse, ws = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 32), torch.zeros(64)
    strided = (x.data_ptr(), *x.stride()[:3])
    pointers = [part.data_ptr() for part in lists]
    fields = (0, 1, 1, 1, 1, 32, 16, 2, 16, 0, 1, 1, *pointers, 0, 0, 0, 0, 0, 0, ws.data_ptr(), 64, 0, *strided * 4)
    with pytest.raises(ValueError, match="workspace_bytes: 64, expected at least"):
        _cpu.grid_attention_forward((*fields, lse.data_ptr(), *lse.stride()), 1.0)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 16), (torch.bfloat16, 16)])
def test_forward_workspace_is_small(dtype, limit):
    """B1 H8 D64, 8192 tokens on two threads: below 16 MiB, far from the 273 MiB of a dense mask."""
    shape = (dtype is torch.bfloat16, 2, 1, 8, 8, 8192, 64, 32, 256, 0)
    assert _cpu.grid_attention_workspace(False, shape) <= limit << 20


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 128), (torch.bfloat16, 68)])
def test_backward_workspace_is_a_fifth_of_gathering(dtype, limit):
    shape = (dtype is torch.bfloat16, 2, 1, 8, 8, 8192, 64, 32, 256, 0)
    assert _cpu.grid_attention_workspace(True, shape) <= limit << 20
