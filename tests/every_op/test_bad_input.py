"""Every documented error of the public functions: one line that names the argument, its value and what was expected."""

import pytest
import torch

import vidkern


def qkv(b=1, h=2, n=24, d=16, dtype=torch.float32):
    return [torch.randn(b, h, n, d, dtype=torch.float32).to(dtype) for _ in range(3)]


def grid(**more):
    q, k, v = (more.pop(n, t) for n, t in zip("qkv", qkv()))
    return lambda: vidkern.grid_attention(q, k, v, **({"grid": (2, 3)} | more))


ints, bools = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "q no tensor": (grid(q=[1.0]), TypeError, "q: list, expected a torch.Tensor"),
    "q rank": (grid(q=torch.randn(2, 24, 16)), ValueError, r"q: shape \(2, 24, 16\), expected 4 dimensions"),
    "k rank": (grid(k=torch.randn(24, 16)), ValueError, r"k: shape \(24, 16\), expected 4 dimensions"),
    "integer q": (grid(q=torch.ones(1, 2, 24, 16).int()), ValueError, "q: dtype torch.int32, expected a floating"),
    "mixed dtypes": (grid(k=torch.randn(1, 2, 24, 16).bfloat16()), ValueError, "k: dtype torch.bfloat16, expected q's dtype"),
    "mixed devices": (grid(v=torch.empty(1, 2, 24, 16, device="meta")), ValueError, "v: on device meta, expected q's device cpu"),
    "empty": (grid(q=torch.randn(0, 2, 24, 16)), ValueError, "expected no empty dimension"),
    "head_dim 12": (lambda: vidkern.grid_attention(*qkv(d=12), grid=(2, 3)), ValueError, "q: head_dim 12, expected a multiple of 8 up to 256"),
    "head_dim 264": (lambda: vidkern.grid_attention(*qkv(d=264), grid=(2, 3)), ValueError, "q: head_dim 264"),
    "k dim": (grid(k=torch.randn(1, 2, 24, 8), v=torch.randn(1, 2, 24, 8)), ValueError, "k: head_dim 8, expected q's 16"),
    "k length": (grid(k=torch.randn(1, 2, 12, 16), v=torch.randn(1, 2, 12, 16)), ValueError, "k: length 12, expected q's 24"),
    "k batch": (grid(k=torch.randn(3, 2, 24, 16), v=torch.randn(3, 2, 24, 16)), ValueError, "k: batch 3, expected q's 1"),
    "v shape": (grid(v=torch.randn(1, 2, 24, 8)), ValueError, r"v: shape \(1, 2, 24, 8\), expected k's shape"),
    "heads": (grid(q=torch.randn(1, 3, 24, 16)), ValueError, "k: 2 heads, expected a divisor of q's 3"),
    "grid too large": (grid(grid=(5, 5)), ValueError, "grid: 25 frames of equal length cannot fill 24 video tokens"),
    "grid zero": (grid(grid=(0, 3)), ValueError, r"grid: \(0, 3\), expected \(views, times\)"),
    "grid scalar": (grid(grid=6), ValueError, "grid: 6, expected"),
    "layout": (grid(layout="bldh"), ValueError, "layout: 'bldh', expected"),
    "n_text negative": (grid(n_text=-1), ValueError, "n_text: -1, expected an integer >= 0"),
    "n_text all": (grid(n_text=24), ValueError, "cannot fill 0 video tokens"),
    "text_position": (grid(text_position="top"), ValueError, "text_position: 'top', expected"),
    "text_len without text": (grid(text_len=torch.tensor([1])), ValueError, "text_len: given with n_text 0"),
    "text_len shape": (grid(n_text=6, text_len=torch.tensor([1, 2])), ValueError, r"text_len: shape \(2,\), expected one of \(1,\)"),
    "window negative": (grid(window_time=-1), ValueError, "window_time: -1, expected None, a distance w >= 0"),
    "window pair": (grid(window_view=(1, -2)), ValueError, r"window_view: \(1, -2\), expected"),
    "window float": (grid(window_time=1.5), ValueError, "window_time: 1.5, expected"),
    "cyclic alone": (grid(cyclic_view=True), ValueError, "cyclic_view: True without window_view"),
    "anchor range": (grid(anchors={"views": [2]}), ValueError, r'anchors: 2 in "views", expected 0..1'),
    "anchor frame": (grid(anchors={"frames": [(0, 3)]}), ValueError, r'anchors: \(0, 3\) in "frames"'),
    "anchor kind": (grid(anchors={"rows": [0]}), ValueError, "anchors: .* expected a mapping with keys among"),
    "anchor scalar": (grid(anchors={"views": 0}), ValueError, r'anchors: 0 in "views", expected a list of integers'),
    "anchor text": (grid(anchors={"views": ["a"]}), ValueError, "anchors: .* expected a list of integers"),
    "anchor fraction": (grid(anchors={"frames": [(0.9, 1.5)]}), ValueError, r"anchors: .* expected a list of \(view, time\) pairs"),
    "anchor cell": (grid(anchors={"frames": [0]}), ValueError, r"anchors: .* expected a list of \(view, time\) pairs"),
    "causal text": (grid(causal_time="no"), ValueError, "causal_time: 'no', expected True or False"),
    "deterministic text": (grid(deterministic="no"), ValueError, "deterministic: 'no', expected True, False or None"),
    "return_lse text": (grid(return_lse="no"), ValueError, "return_lse: 'no', expected True or False"),
    "return_lse number": (grid(return_lse=0), ValueError, "return_lse: 0, expected True or False"),
    "grid bool": (grid(grid=(True, 2)), ValueError, r"grid: \(True, 2\), expected \(views, times\), both integers >= 1"),
    "grid float": (grid(grid=(2.0, 3)), ValueError, r"grid: \(2.0, 3\), expected \(views, times\), both integers >= 1"),
    "window bool": (grid(window_time=True), ValueError, "window_time: True, expected"),
    "impl number": (grid(impl=3), TypeError, "impl: 3, expected a backend's name"),
    "sparse": (grid(q=torch.zeros(1, 2, 24, 16).to_sparse()), ValueError, "q: layout torch.sparse_coo, expected a dense tensor"),
    "list fraction": (lambda: vidkern.FramePattern.from_lists([[0.5], [1]]), ValueError, "lists: query frame 0 names key frame 0.5"),
    "include unknown": (grid(include=("rows",)), ValueError, r"include: \('rows',\), expected a non-empty subset"),
    "include empty": (grid(include=()), ValueError, r"include: \(\), expected a non-empty subset"),
    "hides everything": (grid(include=("view",), window_time=0), ValueError, "hides everything"),
    "valid dtype": (grid(valid=ints), ValueError, "valid: dtype torch.int64, expected torch.bool"),
    "valid shape": (grid(valid=bools.T), ValueError, r"valid: shape \(3, 2\), expected one of \(1, 2, 3\), \(2, 3\)"),
    "valid no tensor": (grid(valid=[True]), TypeError, "valid: list, expected a torch.Tensor"),
    "valid device": (grid(valid=bools.to("meta")), ValueError, "valid: on device meta, expected q's device cpu"),
    "kv_len dtype": (grid(kv_len=bools), ValueError, "kv_len: dtype torch.bool, expected torch.int32 or torch.int64"),
    "scale nan": (grid(scale=float("nan")), ValueError, "scale: nan, expected a finite number"),
    "scale text": (grid(scale="1"), ValueError, "scale: '1', expected a finite number"),
    "impl unknown": (grid(impl="cuda13"), ValueError, "impl: 'cuda13' is no backend of grid_attention"),
    "pattern type": (lambda: vidkern.frame_sparse_attention(*qkv(), (2, 3)), TypeError, "pattern: tuple, expected a vidkern.FramePattern"),
    "pattern length": (
        lambda: vidkern.frame_sparse_attention(*qkv(), vidkern.FramePattern.from_mask(torch.eye(5).bool())),
        ValueError, "pattern: 5 frames of equal length cannot fill 24 video tokens",
    ),
    "pattern hides everything": (
        lambda: vidkern.frame_sparse_attention(*qkv(), vidkern.FramePattern.from_mask(torch.zeros(6, 6).bool())),
        ValueError, "pattern: hides everything",
    ),
    "mask not square": (lambda: vidkern.FramePattern.from_mask(torch.ones(2, 3).bool()), ValueError, r"mask: shape \(2, 3\), expected a square"),
    "mask dtype": (lambda: vidkern.FramePattern.from_mask(torch.ones(2, 2)), ValueError, "mask: dtype float32, expected bool"),
    "list flat": (lambda: vidkern.FramePattern.from_lists([[0], 1]), TypeError, "lists: 1 for query frame 1, expected a list of key"),
    "list tensor": (
        lambda: vidkern.FramePattern.from_lists(torch.tensor([1, 0])), TypeError, r"lists: tensor\(1\) for query frame 0, expected a list",
    ),
    "list number": (lambda: vidkern.FramePattern.from_lists(3), TypeError, "lists: 3, expected one list of key frames for each query"),
    "list range": (lambda: vidkern.FramePattern.from_lists([[0], [2]]), ValueError, "lists: query frame 1 names key frame 2, expected 0..1"),
    "list repeat": (lambda: vidkern.FramePattern.from_lists([[0, 0]]), ValueError, "lists: query frame 0 names key frame 0 twice"),
    "key": (lambda: vidkern.FramePattern.from_key("ring/3"), ValueError, "pattern: key 'ring/3'"),
    "merge empty": (lambda: vidkern.merge_attention([], []), TypeError, "outs: empty, expected a non-empty list"),
    "merge count": (lambda: vidkern.merge_attention(qkv()[:2], [torch.randn(1, 2, 24)]), ValueError, "lses: 1 of them, expected 2"),
    "merge shapes": (
        lambda: vidkern.merge_attention([qkv()[0], qkv(d=8)[0]], [torch.randn(1, 2, 24)] * 2), ValueError, r"outs\[1\]: shape",
    ),
    "merge lse shape": (
        lambda: vidkern.merge_attention(qkv()[:2], [torch.randn(1, 24, 2)] * 2), ValueError, r"lses\[0\]: shape \(1, 24, 2\), expected \[B, H, L\]",
    ),
    "merge lse dtype": (
        lambda: vidkern.merge_attention(qkv()[:1], [torch.randn(1, 2, 24).bfloat16()]), ValueError, r"lses\[0\]: dtype torch.bfloat16, expected torch.float32",
    ),
    "merge out rank": (
        lambda: vidkern.merge_attention([torch.randn(2, 24, 16)], [torch.randn(2, 24)], layout="blhd"),
        ValueError, r"outs\[0\]: shape \(2, 24, 16\), expected 4 dimensions \[B, L, H, D\]",
    ),
    "merge lse rank": (
        lambda: vidkern.merge_attention(qkv()[:1], qkv()[:1]),
        ValueError, r"lses\[0\]: shape \(1, 2, 24, 16\), expected 3 dimensions \[B, H, L\]",
    ),
    "merge return_lse": (
        lambda: vidkern.merge_attention(qkv()[:1], [torch.randn(1, 2, 24)], return_lse="no"),
        ValueError, "return_lse: 'no', expected True or False",
    ),
    "merge signs": (
        lambda: vidkern.merge_attention(qkv()[:2], [torch.randn(1, 2, 24)] * 2, signs=(1, 2)), ValueError, r"signs: \[1, 2\], expected 2 values",
    ),
    "merge out type": (
        lambda: vidkern.merge_attention(qkv()[:1], [torch.randn(1, 2, 24)], out=3), TypeError, "out: int, expected a torch.Tensor",
    ),
}


def test_checks_do_not_depend_on_what_was_called_before():
    grid(window_time=1)()
    for bad in ({"window_time": True}, {"grid": (2.0, 3)}, {"causal_time": 1}):
        with pytest.raises(ValueError):
            grid(**bad)()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_forced_backend_that_cannot_serve():
    q, k, v = qkv(dtype=torch.float64)
    with pytest.raises(vidkern.BackendUnavailable, match='impl: "cpu" cannot serve this call of grid_attention: dtype is torch.float64'):
        vidkern.grid_attention(q, k, v, grid=(2, 3), impl="cpu")
    with vidkern.use("cpu"), pytest.raises(vidkern.BackendUnavailable, match="torch.float64"):
        vidkern.grid_attention(q, k, v, grid=(2, 3))
