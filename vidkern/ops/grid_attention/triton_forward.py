"""Triton kernels of the forward: which tokens live, and the attention itself.

Online softmax in base 2 over the column tiles of a plan (see plan.py): main tiles without any mask, then edge tiles with one.
Accumulation is float32, P is rounded to the inputs' dtype for P V. DOT is the dtype that products read: the inputs', or
float32 in Triton's interpreter, whose bfloat16 products are wrong.
Source: FlashAttention-2 (arXiv 2307.08691) for the recurrence; the tiling by frames is ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

IEEE = tl.constexpr("ieee")  # float32 inputs are not rounded to TF32


@triton.jit(do_not_specialize=["length", "frame_len", "n_frames", "n_tiles", "text_start", "video_start"])
def liveness_kernel(
    LIVE, VALID, KV_LEN, TEXT_LEN, stride_valid, stride_kv_len, stride_text_len, length, frame_len, n_frames, n_tiles,
    text_start, video_start,
    HAS_VALID: tl.constexpr, HAS_KV_LEN: tl.constexpr, HAS_TEXT_LEN: tl.constexpr, BLOCK: tl.constexpr,
):
    """One byte per token: bit 0, it is a live key; bit 1, its query runs. Program: a block of tokens of a sample."""
    token = tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // n_tiles).to(tl.int64)
    here = token < length
    video = token - video_start
    is_video = (video >= 0) & (video < n_frames * frame_len) & here
    frame = tl.where(is_video, video, 0) // frame_len
    key = here
    row = here
    if HAS_VALID:
        alive = tl.load(VALID + batch * stride_valid + frame, mask=is_video, other=1) != 0
        key = key & alive
        row = row & alive
    if HAS_KV_LEN:
        limit = tl.load(KV_LEN + batch * stride_kv_len + frame, mask=is_video, other=0)
        key = key & ((video - frame * frame_len < limit) | (is_video == 0))
    if HAS_TEXT_LEN:
        limit = tl.load(TEXT_LEN + batch * stride_text_len)
        key = key & ((token - text_start < limit) | is_video)
    tl.store(LIVE + batch * length + token, key.to(tl.uint8) + 2 * row.to(tl.uint8), mask=here)


# Sizes are not specialised: a kernel is not compiled anew where one of another grid happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["n_tiles", "heads", "group", "stride_live"])
def forward_kernel(
    Q, K, V, OUT, LSE, TILES, MAIN, EDGE, LIVE,
    n_tiles, heads, group, scale_log2, stride_live,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, stride_sb, stride_sh, stride_sl,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_LIVE: tl.constexpr, NEGATIVE: tl.constexpr, STRADDLE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    AHEAD: tl.constexpr, DOT: tl.constexpr,
):
    """OUT and LSE of one row tile of one head. Program sample-and-head major, so that neighbours share keys in the L2 cache.

    NEGATIVE: the scale is below 0, so the largest logit is at the smallest product. STRADDLE: a tile may hold rows of
    several frames, of which an edge tile may concern some. WIDE: offsets within a head need 64 bits. UNIT: what the strides
    of q, k, v and out were divided by, so that the compiler knows how they are aligned; always the last factor, since a stride
    alone may leave 32 bits. AHEAD: read a tile's column a step
    early, because loads that wait for an index in their own step are not prefetched; Triton's pass for sm_100 fails on it.
    """
    pid = tl.program_id(0)
    tile = TILES + (pid % n_tiles) * 6
    batch = (pid // n_tiles // heads).to(tl.int64)
    head = (pid // n_tiles % heads).to(tl.int64)
    row_first = tl.load(tile)
    row_end = tl.load(tile + 1)
    main = MAIN + tl.load(tile + 2)
    n_main = tl.load(tile + 3)
    edge = EDGE + tl.load(tile + 4) * 4
    n_edge = tl.load(tile + 5)

    rows = row_first + tl.arange(0, BLOCK_M)
    inside = rows < row_end
    dims = tl.arange(0, BLOCK_D)
    row_at = rows.to(tl.int64) if WIDE else rows
    # The columns past the head dim are loaded as zeros; where there are none the compiler drops the masks.
    in_dim = dims < D
    q = tl.load(
        Q + batch * stride_qb * UNIT + head * stride_qh * UNIT + row_at[:, None] * stride_ql * UNIT + dims[None, :],
        mask=inside[:, None] & in_dim[None, :], other=0.0,
    )
    k_base = K + batch * stride_kb * UNIT + (head // group) * stride_kh * UNIT
    v_base = V + batch * stride_vb * UNIT + (head // group) * stride_vh * UNIT
    if HAS_LIVE:
        live_base = LIVE + batch * stride_live

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    column = tl.load(main)
    for i in range(n_main):
        columns = (column if AHEAD else tl.load(main + i)) + tl.arange(0, BLOCK_N)
        if AHEAD:
            column = tl.load(main + i + 1)
        column_at = columns.to(tl.int64) if WIDE else columns
        k_ptr = k_base + column_at[None, :] * stride_kl * UNIT + dims[:, None]
        v_ptr = v_base + column_at[:, None] * stride_vl * UNIT + dims[None, :]
        if D == BLOCK_D:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=in_dim[:, None], other=0.0)
        s = tl.dot(q.to(DOT), k.to(DOT), input_precision=IEEE)
        if HAS_LIVE:
            live = (tl.load(live_base + columns) & 1) != 0
            s = tl.where(live[None, :], s * scale_log2, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - base[:, None])
            v = tl.load(v_ptr, mask=live[:, None] & in_dim[None, :], other=0.0)
        else:
            best = tl.min(s, 1) if NEGATIVE else tl.max(s, 1)
            new = tl.maximum(top, best * scale_log2)
            base = new
            p = tl.exp2(s * scale_log2 - base[:, None])
            if D == BLOCK_D:
                v = tl.load(v_ptr)
            else:
                v = tl.load(v_ptr, mask=in_dim[None, :], other=0.0)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), input_precision=IEEE)
        top = new

    column = tl.load(edge)
    for i in range(n_edge):
        columns = (column if AHEAD else tl.load(edge + i * 4)) + tl.arange(0, BLOCK_E)
        if AHEAD:
            column = tl.load(edge + i * 4 + 4)
        column_at = columns.to(tl.int64) if WIDE else columns
        seen = columns < tl.load(edge + i * 4 + 1)
        k = tl.load(
            k_base + column_at[None, :] * stride_kl * UNIT + dims[:, None], mask=seen[None, :] & in_dim[:, None], other=0.0
        )
        if HAS_LIVE:
            seen = seen & ((tl.load(live_base + columns, mask=seen, other=0) & 1) != 0)
        v = tl.load(
            v_base + column_at[:, None] * stride_vl * UNIT + dims[None, :], mask=seen[:, None] & in_dim[None, :], other=0.0
        )
        visible = seen[None, :]
        if STRADDLE:
            sees = (rows >= tl.load(edge + i * 4 + 2)) & (rows < tl.load(edge + i * 4 + 3))
            visible = visible & sees[:, None]
        s = tl.where(visible, tl.dot(q.to(DOT), k.to(DOT), input_precision=IEEE) * scale_log2, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if STRADDLE:
            # P is 0 for rows that do not see the segment, but 0 times a NaN that only the others see is NaN.
            part = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), input_precision=IEEE)
            acc = acc * shrink[:, None] + tl.where(sees[:, None], part, 0.0)
        else:
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), input_precision=IEEE)
        top = new

    # Nothing visible: the total is 0. A NaN among what is visible makes it NaN, and it stays one.
    empty = total == 0
    if HAS_LIVE:
        # The query of a dead row may hold anything.
        empty = empty | ((tl.load(live_base + rows, mask=inside, other=0) & 2) == 0)
    lse = tl.where(empty, float("-inf"), top * 0.6931471805599453 + tl.log(total))
    out = tl.where(empty[:, None], 0.0, acc / total[:, None])
    tl.store(LSE + batch * stride_sb + head * stride_sh + rows.to(tl.int64) * stride_sl, lse, mask=inside)
    tl.store(
        OUT + batch * stride_ob * UNIT + head * stride_oh * UNIT + row_at[:, None] * stride_ol * UNIT + dims[None, :],
        out.to(OUT.dtype.element_ty), mask=inside[:, None] & in_dim[None, :],
    )
