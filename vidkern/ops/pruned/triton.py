"""Launchers of the Triton kernels that the pruned ops are made of: the kit that ops/pruned/compose.py takes, for NVIDIA GPUs of compute
capability 8.0 on, or Triton's interpreter on the CPU."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

from . import configs, index
from .triton_product import product_kernel
from .triton_rows import gather_kernel, modulation_kernel, norm_backward_kernel, slope_kernel

# TRITON_INTERPRET=1 was set when the kernels were decorated: they run as Python on CPU tensors.
INTERPRETED = not isinstance(product_kernel, triton.runtime.JITFunction)
ACTS = {"none": 0, "gelu_tanh": 1, "silu": 2, "swiglu": 2}
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_ROWS, _COLUMNS, _PART = 16, 64, 256  # tile of the kernels that sum over tokens, and tokens that one of them sums
_WIDE = 1024  # lanes of the kernels that take a token each


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    """Family and number of processors."""
    if INTERPRETED:
        return "ampere", 4
    return configs.family(torch.cuda.get_device_capability(device)), torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _unit(*sizes: int) -> int:
    return 8 if all(s % 8 == 0 for s in sizes) else 1


def _step(t) -> int:
    return 0 if t is None else t.stride(0)


class Prologue:
    """RMSNorm and modulation of x: 1 / rms per token (filled when x is gathered), 1 + scale and shift of the picked channels."""

    NONE: Prologue

    def __init__(self, norm=False, eps=0.0, stat=None, scale=None, shift=None, group=1, whole_scale=None):
        self.norm, self.eps, self.stat, self.scale, self.shift, self.group, self.whole_scale = norm, eps, stat, scale, shift, group, whole_scale
        self.compact = None

    @classmethod
    def of(cls, x, scale, shift, in_index, norm, eps) -> Prologue:
        """For x [tokens, channels]."""
        if not norm and scale is None and shift is None:
            return cls.NONE
        tokens, width = x.shape
        count = max(1 if t is None else t.numel() // width for t in (scale, shift))

        def rows(t):
            t = t.reshape(-1, width).float()
            return (t.repeat_interleave(count // t.shape[0], 0) if t.shape[0] != count else t).contiguous()

        def picked(t):
            return t if t is None or in_index is None else t.index_select(1, in_index)

        whole = None if scale is None else rows(scale) + 1
        stat = x.new_empty(tokens, dtype=torch.float32) if norm else None
        return cls(norm, eps, stat, picked(whole), None if shift is None else picked(rows(shift)), tokens // count, whole)

    def gathered(self, x, cols) -> torch.Tensor:
        """P(x)[:, cols], once."""
        if self.compact is None:
            compact = gather(x, cols, self)
            if self is Prologue.NONE:
                return compact
            self.compact = compact
        return self.compact


    def measured(self, x) -> None:
        """Fill ``stat`` where nothing was gathered: a frozen weight needs no P(x) in the backward."""
        if self.norm and self.compact is None:
            with _on(x.device):
                _gather(x, x, None, self, 0)


Prologue.NONE = Prologue()


def gather(x, cols, p) -> torch.Tensor:
    """P(x)[:, cols] in memory of its own, rows on 16 bytes; fills ``p.stat``."""
    m, k = x.shape[0], x.shape[1] if cols is None else cols.shape[0]
    out = x.new_empty(m, -(-k // 8) * 8)[:, :k]
    _gather(x, out, cols, p, k)
    return out


def _gather(x, out, cols, p, k) -> None:
    gather_kernel[(x.shape[0],)](
        x, out, p.stat, p.scale, p.shift, cols, x.shape[1], k, p.group, p.eps, x.stride(0), out.stride(0),
        NORM=p.norm, HAS_SCALE=p.scale is not None, HAS_SHIFT=p.shift is not None, HAS_COLS=cols is not None, BLOCK=_WIDE,
    )  # fmt: skip


class Source:
    """An operand, as in cpu.py. What has to be normalised, or gathered from single channels, is made compact first; aligned runs of
    eight channels and more are gathered by the product itself."""

    def __init__(self, t, across=False, rows=None, cols=None, prologue=None):
        self.across, self.rows, self.cols, self.runs = across, rows, cols, False
        # Rows of a list belong to a weight, whose columns the product picks; an activation has columns alone.
        activation = rows is None and prologue is not None
        if activation and (prologue is not Prologue.NONE or cols is not None):
            self.runs = prologue is Prologue.NONE and not across and index.in_runs(cols)
            if not self.runs:
                with _on(t.device):
                    t, self.cols = prologue.gathered(t, cols), None
        self.t = t


def pair_rows(half: int, rows):
    """Rows of a weight of pairs, and how many columns the product has: the kernel reads both halves."""
    return rows, half


def product(
    a: Source, b: Source, out, m, n, k, *, bias=None, gate=None, act="none", half=0, u=None, partial=None, residual=None, out_rows=None,
    out_cols=None, fill=0,
) -> None:
    """out[:, out_cols] = residual + gate * act(A B^T + partial + bias), as in cpu.py."""
    pairs = act == "swiglu"
    family, processors = _device(out.device)
    if fill == 1:
        out.copy_(residual)
    elif fill == 2:
        out.zero_()
    # Sizes that vectors run along: of k or of an operand's outer size.
    um = _unit(m) if a.across else 1
    un = _unit(n) if half == 0 else 1
    uk = _unit(k)
    ua, ub, uo = _unit(a.t.stride(0)), _unit(b.t.stride(0)), _unit(out.stride(0), *(() if residual is None else (residual.stride(0),)))
    c = configs.choose(a.t.element_size(), pairs, family, m, n, processors, uk == ua == ub == 8)
    with _on(out.device):
        product_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            a.t, b.t, out, u, bias, gate, residual, partial, a.cols, b.rows, b.cols, out_rows, out_cols,
            m // um, n // un, k // uk, half, 1 if gate is None else m // gate.shape[0], a.t.stride(0) // ua, b.t.stride(0) // ub,
            out.stride(0) // uo, _step(u), _step(residual) // uo, _step(partial),
            UM=um, UN=un, UK=uk, UA=ua, UB=ub, UO=uo, A_ACROSS=a.across, B_ACROSS=b.across, RUNS=a.runs, ACT=ACTS[act], PAIRS=pairs,
            HAS_U=u is not None, HAS_BIAS=bias is not None, HAS_GATE=gate is not None, HAS_RESIDUAL=residual is not None,
            HAS_PARTIAL=partial is not None, HAS_A_COLS=a.cols is not None, HAS_B_ROWS=b.rows is not None, HAS_B_COLS=b.cols is not None,
            HAS_OUT_ROWS=out_rows is not None, HAS_OUT_COLS=out_cols is not None, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
            DOT=tl.float32 if INTERPRETED else _DTYPES[a.t.dtype], num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def slope(dout, u, cols, gate, act, n, du, dbias, dgate) -> None:
    """Fill ``du``, ``dbias`` and ``dgate`` (each may be None), as in cpu.py; sums over tokens in a fixed order."""
    m, pairs = dout.shape[0], act == "swiglu"
    written = n // 2 if pairs else n
    group = m if gate is None else m // gate.shape[0]
    parts = triton.cdiv(group, _PART)
    groups = m // group
    bias_parts = dout.new_empty(groups * parts, n, dtype=torch.float32) if dbias is not None else None
    gate_parts = dout.new_empty(groups * parts, written, dtype=torch.float32) if dgate is not None else None
    with _on(dout.device):
        slope_kernel[(triton.cdiv(written, _COLUMNS), groups * parts)](
            dout, u, cols, gate, du, bias_parts, gate_parts, m, n, written, group, _PART, dout.stride(0), _step(u), _step(du),
            ACT=ACTS[act], PAIRS=pairs, HAS_U=u is not None, HAS_COLS=cols is not None, HAS_GATE=gate is not None, HAS_DU=du is not None,
            HAS_DBIAS=dbias is not None, HAS_DGATE=dgate is not None, BLOCK_M=_ROWS, BLOCK_N=_COLUMNS,
        )  # fmt: skip
    if dbias is not None:
        dbias.copy_(bias_parts.sum(0))
    if dgate is not None:
        dgate.copy_(gate_parts.view(groups, parts, written).sum(1))


def normed_backward(dh, x, in_index, prologue, dx, dscale, dshift) -> None:
    """Fill dx [tokens, channels] from dh [tokens, kept], and dscale and dshift, as in cpu.py."""
    m, width = x.shape
    p = prologue
    p.measured(x)
    whole = dh if in_index is None else dh.new_zeros(m, width).index_copy_(1, in_index.long(), dh)
    groups, parts = m // p.group, triton.cdiv(p.group, _PART)
    sums = [None if t is None else x.new_empty(groups * parts, width, dtype=torch.float32) for t in (dscale, dshift)]
    with _on(x.device):
        norm_backward_kernel[(m,)](
            x, whole, p.stat, p.whole_scale, dx, width, p.group, x.stride(0), whole.stride(0), dx.stride(0),
            NORM=p.norm, HAS_SCALE=p.whole_scale is not None, BLOCK=_WIDE,
        )  # fmt: skip
        if dscale is not None or dshift is not None:
            modulation_kernel[(triton.cdiv(width, _COLUMNS), groups * parts)](
                x, whole, p.stat, *sums, width, p.group, _PART, x.stride(0), whole.stride(0),
                NORM=p.norm, HAS_SCALE=dscale is not None, HAS_SHIFT=dshift is not None, BLOCK_M=_ROWS, BLOCK_N=_COLUMNS,
            )  # fmt: skip
    for target, part in zip((dscale, dshift), sums):
        if target is not None:
            wide = target.view(-1, width)
            wide.copy_(part.view(wide.shape[0], -1, width).sum(1))
