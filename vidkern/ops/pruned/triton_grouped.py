"""Several layers of different sizes in one launch: a program finds its layer and tile in a list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from . import triton as kit
from .triton_product import IEEE, activate


@triton.jit
def grouped_kernel(
    TABLE, TILES, OUT, U, DTYPE_OF,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_U: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):
    """One tile of one layer. TABLE int64 [layers, 9]: addresses of x, weight and bias, where the result starts, tokens, outputs, inputs,
    row strides of x and weight. TILES int32 [programs, 3]: layer, tile row, tile column. ALIGNED: all addresses are multiples of 16 and all
    sizes and strides of 8. DTYPE_OF: any tensor of the operands' dtype."""
    tile = TILES + tl.program_id(0) * 3
    row_of = TABLE + tl.load(tile).to(tl.int64) * 9
    pointer: tl.constexpr = tl.pointer_type(DTYPE_OF.dtype.element_ty)
    x = tl.load(row_of).to(pointer)
    w = tl.load(row_of + 1).to(pointer)
    start = tl.load(row_of + 3)
    m = tl.load(row_of + 4).to(tl.int32)
    n = tl.load(row_of + 5).to(tl.int32)
    k = tl.load(row_of + 6).to(tl.int32)
    step_x = tl.load(row_of + 7)
    step_w = tl.load(row_of + 8)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        w = tl.multiple_of(w, 16)
        n = tl.multiple_of(n, 8)
        k = tl.multiple_of(k, 8)
        step_x = tl.multiple_of(step_x, 8)
        step_w = tl.multiple_of(step_w, 8)
        start = tl.multiple_of(start, 8)
    row = tl.load(tile + 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.load(tile + 2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = row < m
    col_in = col < n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, k, BLOCK_K):
        lane = at + tl.arange(0, BLOCK_K)
        inside = lane < k
        a = tl.load(x + row.to(tl.int64)[:, None] * step_x + lane[None, :], mask=row_in[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + col.to(tl.int64)[None, :] * step_w + lane[:, None], mask=col_in[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=IEEE)
    if HAS_BIAS:
        bias = tl.load(row_of + 2).to(tl.pointer_type(tl.float32))
        acc += tl.load(bias + col, mask=col_in, other=0.0)[None, :]
    to = start + row.to(tl.int64)[:, None] * n + col[None, :]
    both = row_in[:, None] & col_in[None, :]
    if HAS_U:
        tl.store(U + to, acc.to(U.dtype.element_ty), mask=both)
    tl.store(OUT + to, activate(acc, ACT).to(OUT.dtype.element_ty), mask=both)


def forward(xs, weights, biases, act, out, u) -> None:
    """Fill ``out`` and ``u`` (or None), one after the other's [m, n] in one flat tensor. The list of tiles is copied to the device at every
    call, so that it cannot be captured in a CUDA graph."""
    device, dtype = out.device, xs[0].dtype
    family, processors = kit._device(device)
    sizes = [(x.shape[0], w.shape[0], x.shape[1]) for x, w in zip(xs, weights)]
    biases = [b.float().contiguous() for b in biases]
    table, tiles, start = [], [], 0
    for i, (x, w) in enumerate(zip(xs, weights)):
        m, n, k = sizes[i]
        table.append([x.data_ptr(), w.data_ptr(), biases[i].data_ptr() if biases else 0, start, m, n, k, x.stride(0), w.stride(0)])
        start += m * n
    aligned = all(row[0] % 16 == row[1] % 16 == 0 and all(v % 8 == 0 for v in (row[3], *row[5:])) for row in table)
    largest = max(sizes, key=lambda s: s[0] * s[1] * s[2])
    c = configs.choose(dtype.itemsize, False, family, largest[0], sum(n for _, n, _ in sizes), processors, aligned)
    for i, (m, n, _) in enumerate(sizes):
        tiles += [[i, a, b] for b in range(triton.cdiv(n, c.block_n)) for a in range(triton.cdiv(m, c.block_m))]
    # The longest layers first, so that none is left alone at the end.
    tiles.sort(key=lambda t: -sizes[t[0]][2])
    with kit._on(device):
        grouped_kernel[(len(tiles),)](
            torch.tensor(table, device=device), torch.tensor(tiles, dtype=torch.int32, device=device), out, u, xs[0],
            ACT=kit.ACTS[act], HAS_BIAS=bool(biases), HAS_U=u is not None, ALIGNED=aligned, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
            BLOCK_K=c.block_k, DOT=tl.float32 if kit.INTERPRETED else kit._DTYPES[dtype], num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
