"""Triton kernels of the backward: rowsum(dO O) - dLSE, then dQ by query tiles, then dK and dV by key tiles.

Two passes recompute P instead of adding up dQ with atomics (7 matrix products for 5): every sum has a fixed order, so the
result is the same bits from run to run. Grouped query heads are a loop inside the key tile. Source: FlashAttention-2
(arXiv 2307.08691), with dS = P (dP - Delta), Delta = rowsum(dO O) - dLSE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import IEEE


@triton.jit(do_not_specialize=["length", "heads", "n_tiles"])
def delta_kernel(
    DOUT, OUT, LSE, DLSE, DELTA, length, heads, n_tiles,
    stride_gb, stride_gh, stride_gl, stride_ob, stride_oh, stride_ol, stride_sb, stride_sh, stride_sl,
    stride_tb, stride_th, stride_tl,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DOUT: tl.constexpr, HAS_DLSE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """DELTA [B, H, L] float32 contiguous; 0 for rows that see nothing, whatever their gradient holds."""
    pid = tl.program_id(0)
    rows = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (pid // n_tiles // heads).to(tl.int64)
    head = (pid // n_tiles % heads).to(tl.int64)
    inside = rows < length
    row_at = rows.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(LSE + batch * stride_sb + head * stride_sh + row_at * stride_sl, mask=inside, other=float("-inf"))
    delta = tl.zeros([BLOCK_M], tl.float32)
    if HAS_DOUT:
        mask = inside[:, None] & (dims[None, :] < D)
        g_base = DOUT + batch * stride_gb * UNIT + head * stride_gh * UNIT
        g_ptr = g_base + row_at[:, None] * stride_gl * UNIT + dims[None, :]
        o_base = OUT + batch * stride_ob * UNIT + head * stride_oh * UNIT
        o_ptr = o_base + row_at[:, None] * stride_ol * UNIT + dims[None, :]
        g = tl.load(g_ptr, mask=mask, other=0.0)
        o = tl.load(o_ptr, mask=mask, other=0.0)
        delta += tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_DLSE:
        t_ptr = DLSE + batch * stride_tb + head * stride_th + row_at * stride_tl
        delta -= tl.load(t_ptr, mask=inside, other=0.0).to(tl.float32)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(DELTA + (batch * heads + head) * length + rows, delta, mask=inside)


@triton.jit(do_not_specialize=["n_tiles", "heads", "group", "length", "stride_live"])
def dq_kernel(
    DOUT, Q, K, V, LSE, DELTA, DQ, TILES, MAIN, EDGE, LIVE,
    n_tiles, heads, group, length, scale, scale_log2, stride_live,
    stride_gb, stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_sl, stride_ub, stride_uh, stride_ul,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_DOUT: tl.constexpr, STRADDLE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    AHEAD: tl.constexpr, DOT: tl.constexpr,
):
    """DQ of one row tile of one head."""
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
    in_dim = dims < D
    row_at = rows.to(tl.int64) if WIDE else rows
    block = inside[:, None] & in_dim[None, :]
    q_base = Q + batch * stride_qb * UNIT + head * stride_qh * UNIT
    q_ptr = q_base + row_at[:, None] * stride_ql * UNIT + dims[None, :]
    q = tl.load(q_ptr, mask=block, other=0.0)
    if HAS_DOUT:
        g_base = DOUT + batch * stride_gb * UNIT + head * stride_gh * UNIT
        g_ptr = g_base + row_at[:, None] * stride_gl * UNIT + dims[None, :]
        g = tl.load(g_ptr, mask=block, other=0.0)
    lse_ptr = LSE + batch * stride_sb + head * stride_sh + rows.to(tl.int64) * stride_sl
    lse = tl.load(lse_ptr, mask=inside, other=float("-inf"))
    # exp2(s - inf) = 0 for rows that see nothing.
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    delta = tl.load(DELTA + (batch * heads + head) * length + rows, mask=inside, other=0.0)
    k_base = K + batch * stride_kb * UNIT + (head // group) * stride_kh * UNIT
    v_base = V + batch * stride_vb * UNIT + (head // group) * stride_vh * UNIT
    if HAS_LIVE:
        live_base = LIVE + batch * stride_live
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    column = tl.load(main)
    for i in range(n_main):
        columns = (column if AHEAD else tl.load(main + i)) + tl.arange(0, BLOCK_N)
        if AHEAD:
            column = tl.load(main + i + 1)
        column_at = columns.to(tl.int64) if WIDE else columns
        k_ptr = k_base + column_at[:, None] * stride_kl * UNIT + dims[None, :]
        v_ptr = v_base + column_at[None, :] * stride_vl * UNIT + dims[:, None]
        if HAS_LIVE:
            live = (tl.load(live_base + columns) & 1) != 0
            k = tl.load(k_ptr, mask=live[:, None] & in_dim[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=in_dim[None, :], other=0.0)
        p = tl.exp2(tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision=IEEE) * scale_log2 - lse_log2[:, None])
        if HAS_DOUT:
            if HAS_LIVE:
                v = tl.load(v_ptr, mask=live[None, :] & in_dim[:, None], other=0.0)
            elif D == BLOCK_D:
                v = tl.load(v_ptr)
            else:
                v = tl.load(v_ptr, mask=in_dim[:, None], other=0.0)
            ds = p * (tl.dot(g.to(DOT), v.to(DOT), input_precision=IEEE) - delta[:, None])
        else:
            ds = p * -delta[:, None]
        if HAS_LIVE:
            ds = tl.where(live[None, :], ds, 0.0)
        acc += tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), input_precision=IEEE)

    column = tl.load(edge)
    for i in range(n_edge):
        columns = (column if AHEAD else tl.load(edge + i * 4)) + tl.arange(0, BLOCK_E)
        if AHEAD:
            column = tl.load(edge + i * 4 + 4)
        column_at = columns.to(tl.int64) if WIDE else columns
        seen = columns < tl.load(edge + i * 4 + 1)
        if HAS_LIVE:
            seen = seen & ((tl.load(live_base + columns, mask=seen, other=0) & 1) != 0)
        k = tl.load(
            k_base + column_at[:, None] * stride_kl * UNIT + dims[None, :], mask=seen[:, None] & in_dim[None, :], other=0.0
        )
        visible = seen[None, :]
        if STRADDLE:
            sees = (rows >= tl.load(edge + i * 4 + 2)) & (rows < tl.load(edge + i * 4 + 3))
            visible = visible & sees[:, None]
        p = tl.exp2(tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision=IEEE) * scale_log2 - lse_log2[:, None])
        if HAS_DOUT:
            v = tl.load(
                v_base + column_at[None, :] * stride_vl * UNIT + dims[:, None], mask=seen[None, :] & in_dim[:, None], other=0.0
            )
            ds = p * (tl.dot(g.to(DOT), v.to(DOT), input_precision=IEEE) - delta[:, None])
        else:
            ds = p * -delta[:, None]
        ds = tl.where(visible, ds, 0.0)
        if STRADDLE:
            # 0 times a NaN key that only other rows see is NaN: rows that do not see the segment take nothing.
            acc += tl.where(sees[:, None], tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), input_precision=IEEE), 0.0)
        else:
            acc += tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), input_precision=IEEE)

    # The query of a row that sees nothing may hold anything.
    acc = tl.where((lse == float("-inf"))[:, None], 0.0, acc * scale)
    tl.store(
        DQ + batch * stride_ub * UNIT + head * stride_uh * UNIT + row_at[:, None] * stride_ul * UNIT + dims[None, :],
        acc.to(DQ.dtype.element_ty), mask=block,
    )


@triton.jit(do_not_specialize=["n_tiles", "kv_heads", "group", "length", "stride_live"])
def dkv_kernel(
    DOUT, Q, K, V, LSE, DELTA, DK, DV, TILES, MAIN, EDGE, LIVE,
    n_tiles, kv_heads, group, length, scale, scale_log2, stride_live,
    stride_gb, stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_sl, stride_ub, stride_uh, stride_ul,
    stride_wb, stride_wh, stride_wl,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_LIVE: tl.constexpr, HAS_DOUT: tl.constexpr, STRADDLE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    AHEAD: tl.constexpr, DOT: tl.constexpr,
):
    """DK and DV of one tile of keys (the rows of a transposed plan) of one key/value head, over all its query heads."""
    pid = tl.program_id(0)
    tile = TILES + (pid % n_tiles) * 6
    batch = (pid // n_tiles // kv_heads).to(tl.int64)
    kv_head = (pid // n_tiles % kv_heads).to(tl.int64)
    row_first = tl.load(tile)
    row_end = tl.load(tile + 1)
    main = MAIN + tl.load(tile + 2)
    n_main = tl.load(tile + 3)
    edge = EDGE + tl.load(tile + 4) * 4
    n_edge = tl.load(tile + 5)

    rows = row_first + tl.arange(0, BLOCK_M)
    inside = rows < row_end
    if HAS_LIVE:
        inside = inside & ((tl.load(LIVE + batch * stride_live + rows, mask=inside, other=0) & 1) != 0)
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < D
    row_at = rows.to(tl.int64) if WIDE else rows
    block = inside[:, None] & in_dim[None, :]
    k_base = K + batch * stride_kb * UNIT + kv_head * stride_kh * UNIT
    k_ptr = k_base + row_at[:, None] * stride_kl * UNIT + dims[None, :]
    v_base = V + batch * stride_vb * UNIT + kv_head * stride_vh * UNIT
    v_ptr = v_base + row_at[:, None] * stride_vl * UNIT + dims[None, :]
    k = tl.load(k_ptr, mask=block, other=0.0)
    v = tl.load(v_ptr, mask=block, other=0.0)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for member in range(group):
        head = kv_head * group + member
        q_base = Q + batch * stride_qb * UNIT + head * stride_qh * UNIT
        if HAS_DOUT:
            g_base = DOUT + batch * stride_gb * UNIT + head * stride_gh * UNIT
        lse_base = LSE + batch * stride_sb + head * stride_sh
        delta_base = DELTA + (batch * kv_heads * group + head) * length
        column = tl.load(main)
        for i in range(n_main):
            columns = (column if AHEAD else tl.load(main + i)) + tl.arange(0, BLOCK_N)
            if AHEAD:
                column = tl.load(main + i + 1)
            column_at = columns.to(tl.int64) if WIDE else columns
            lse = tl.load(lse_base + columns.to(tl.int64) * stride_sl)
            delta = tl.load(delta_base + columns)
            q_ptr = q_base + column_at[:, None] * stride_ql * UNIT + dims[None, :]
            if HAS_LIVE:
                # Queries and gradients of rows that see nothing may hold anything.
                alive = lse != float("-inf")
                lse_log2 = tl.where(alive, lse * 1.4426950408889634, float("inf"))
                q = tl.load(q_ptr, mask=alive[:, None] & in_dim[None, :], other=0.0)
            else:
                lse_log2 = lse * 1.4426950408889634
                if D == BLOCK_D:
                    q = tl.load(q_ptr)
                else:
                    q = tl.load(q_ptr, mask=in_dim[None, :], other=0.0)
            p = tl.exp2(tl.dot(k.to(DOT), tl.trans(q).to(DOT), input_precision=IEEE) * scale_log2 - lse_log2[None, :])
            if HAS_DOUT:
                g_ptr = g_base + column_at[:, None] * stride_gl * UNIT + dims[None, :]
                if HAS_LIVE:
                    g = tl.load(g_ptr, mask=alive[:, None] & in_dim[None, :], other=0.0)
                elif D == BLOCK_D:
                    g = tl.load(g_ptr)
                else:
                    g = tl.load(g_ptr, mask=in_dim[None, :], other=0.0)
                dv += tl.dot(p.to(g.dtype).to(DOT), g.to(DOT), input_precision=IEEE)
                ds = p * (tl.dot(v.to(DOT), tl.trans(g).to(DOT), input_precision=IEEE) - delta[None, :])
            else:
                ds = p * -delta[None, :]
            dk += tl.dot(ds.to(q.dtype).to(DOT), q.to(DOT), input_precision=IEEE)

        column = tl.load(edge)
        for i in range(n_edge):
            columns = (column if AHEAD else tl.load(edge + i * 4)) + tl.arange(0, BLOCK_E)
            if AHEAD:
                column = tl.load(edge + i * 4 + 4)
            column_at = columns.to(tl.int64) if WIDE else columns
            seen = columns < tl.load(edge + i * 4 + 1)
            lse = tl.load(lse_base + columns.to(tl.int64) * stride_sl, mask=seen, other=float("-inf"))
            delta = tl.load(delta_base + columns, mask=seen, other=0.0)
            if HAS_LIVE:
                seen = seen & (lse != float("-inf"))
            lse_log2 = tl.where(seen, lse * 1.4426950408889634, float("inf"))
            there = seen[:, None] & in_dim[None, :]
            q = tl.load(q_base + column_at[:, None] * stride_ql * UNIT + dims[None, :], mask=there, other=0.0)
            # P is 0 beyond the segment's end, where the lse was set to infinity.
            p = tl.exp2(tl.dot(k.to(DOT), tl.trans(q).to(DOT), input_precision=IEEE) * scale_log2 - lse_log2[None, :])
            if STRADDLE:
                sees = ((rows >= tl.load(edge + i * 4 + 2)) & (rows < tl.load(edge + i * 4 + 3)))[:, None]
                p = tl.where(sees, p, 0.0)
            if HAS_DOUT:
                g = tl.load(g_base + column_at[:, None] * stride_gl * UNIT + dims[None, :], mask=there, other=0.0)
                if STRADDLE:
                    dv += tl.where(sees, tl.dot(p.to(g.dtype).to(DOT), g.to(DOT), input_precision=IEEE), 0.0)
                else:
                    dv += tl.dot(p.to(g.dtype).to(DOT), g.to(DOT), input_precision=IEEE)
                ds = p * (tl.dot(v.to(DOT), tl.trans(g).to(DOT), input_precision=IEEE) - delta[None, :])
            else:
                ds = p * -delta[None, :]
            if STRADDLE:
                ds = tl.where(sees, ds, 0.0)
                # What queries of a frame hold that a key does not see must not reach it, not even as 0 times NaN.
                dk += tl.where(sees, tl.dot(ds.to(q.dtype).to(DOT), q.to(DOT), input_precision=IEEE), 0.0)
            else:
                dk += tl.dot(ds.to(q.dtype).to(DOT), q.to(DOT), input_precision=IEEE)

    if HAS_LIVE:
        # A dead key's score is exp2(0 - lse), not 0.
        dk = tl.where(inside[:, None], dk, 0.0)
        dv = tl.where(inside[:, None], dv, 0.0)
    block = (rows < row_end)[:, None] & in_dim[None, :]
    tl.store(
        DK + batch * stride_ub * UNIT + kv_head * stride_uh * UNIT + row_at[:, None] * stride_ul * UNIT + dims[None, :],
        (dk * scale).to(DK.dtype.element_ty), mask=block,
    )
    tl.store(
        DV + batch * stride_wb * UNIT + kv_head * stride_wh * UNIT + row_at[:, None] * stride_wl * UNIT + dims[None, :],
        dv.to(DV.dtype.element_ty), mask=block,
    )
