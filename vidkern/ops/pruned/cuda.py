"""Launchers of the hand-written CUDA kernels that the pruned ops are made of (csrc/cuda/pruned*.cu): :class:`Kit` around a callable that
launches a kernel by name, and, as this module itself, the kit that ops/pruned/compose.py takes, on the GPU."""

from __future__ import annotations

import ctypes
import functools

import torch

from ... import cuda as kernels
from . import configs, index

# Source in csrc/cuda -> how the names of its kernels start.
SOURCES = {
    "pruned_product": ("pruned_product_nt", "pruned_product_pairs"),
    "pruned_product_backward": ("pruned_product_nn", "pruned_product_tn"),
    "pruned_rows": ("pruned_gather", "pruned_slope", "pruned_norm_backward", "pruned_modulation"),
}
ACTS = {"none": 0, "gelu_tanh": 1, "silu": 2, "swiglu": 2}
# Rows, columns, depth, warps and stages of the tiles; the rates are assumptions until a sweep on a GPU replaces them.
TILES = (configs.Config(128, 128, 64, 8, 3), configs.Config(64, 64, 64, 4, 3, 0.75))
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_ROWS_THREADS, _ROWS_WARPS, _COLUMNS, _SUMS, _PART = 128, 4, 64, 3 * 16 * 64 * 4, 256


class Operand(ctypes.Structure):
    """``vk::pruned::Operand``."""

    _fields_ = [*((n, ctypes.c_void_p) for n in ("at", "rows", "cols")), ("step", ctypes.c_int64)]


def _structure(name: str, **kinds: str) -> type[ctypes.Structure]:
    fields = [(n, kind) for kind, names in kinds.items() for n in names.split()]
    types = {"operands": Operand, "addresses": ctypes.c_void_p, "steps": ctypes.c_int64, "sizes": ctypes.c_int32, "floats": ctypes.c_float}
    return type(name, (ctypes.Structure,), {"_fields_": [(n, types[k]) for n, k in fields], "__doc__": f"``vk::pruned::{name}``."})


Product = _structure(
    "Product", operands="a b", addresses="out u residual bias gate partial out_rows out_cols",
    steps="out_step u_step residual_step partial_step", sizes="m n k half gate_group act wide listed",
)  # fmt: skip
Gather = _structure(
    "Gather", addresses="x out stat scale shift rows cols", steps="x_step out_step", sizes="count width k group", floats="eps"
)
Slope = _structure(
    "Slope", addresses="dout u cols gate du dbias dgate", steps="dout_step u_step du_step",
    sizes="m n written group rows act pairs wide tiles",
)  # fmt: skip
NormBackward = _structure("NormBackward", addresses="x dh stat scale dx", steps="x_step dh_step dx_step", sizes="count width group")
Modulation = _structure("Modulation", addresses="x dh stat dscale dshift", steps="x_step dh_step", sizes="width group rows tiles")


def why_not(x: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot serve an ``x`` (with weights of its dtype) and a stream that the result is added to, or None."""
    if x.dtype not in NAMES:
        return f"dtype is {x.dtype}, it serves torch.float16 and torch.bfloat16"
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        return f"residual is {residual.dtype}, it serves x's {x.dtype} and torch.float32"
    if x.numel() // x.shape[-1] >= 2**31:
        return f"x has {x.numel() // x.shape[-1]} tokens, it serves fewer than 2**31"
    return None


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors that a launch can fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tile_for(device: torch.device, m: int, n: int) -> configs.Config:
    """The tile that is done soonest with m x n results."""
    return configs._forced[-1] if configs._forced else configs._choose(TILES, m, n, processors(device))


def shared(c: configs.Config) -> int:
    """Bytes of shared memory that a block of a product takes."""
    return 2 * c.stages * c.block_k * (c.block_m + c.block_n)


def even(t: torch.Tensor) -> bool:
    """Whether the rows of ``t`` lie on 16 bytes."""
    return t.data_ptr() % 16 == 0 and (t.stride(0) % 8 == 0 or t.shape[0] == 1)


def _at(t) -> int | None:
    return None if t is None else t.data_ptr()


def _step(t) -> int:
    return 0 if t is None else t.stride(0)


def _given(*tensors) -> list:
    return [t for t in tensors if t is not None]


def form_of(a: Source, b: Source, pairs: bool) -> str:
    """Which kernels multiply these: by what lies along their rows."""
    return "pairs" if pairs else "tn" if a.across else "nn" if b.across else "nt"


def _fill(out, residual, fill: int) -> None:
    if fill == 1:
        out.copy_(residual)
    elif fill == 2:
        out.zero_()


def _product(memory_a, memory_b, out, u, residual, bias, gate, partial, out_rows, out_cols, m, n, k, half, act, listed) -> tuple:
    """(parameters, what a kernel reads). Operands: (memory, rows, columns)."""
    given = Product(
        *(Operand(*map(_at, operand), _step(operand[0])) for operand in (memory_a, memory_b)),
        *map(_at, (out, u, residual, bias, gate, partial, out_rows, out_cols)), *map(_step, (out, u, residual, partial)),
        m, n, k, half, m if gate is None else m // gate.shape[0], ACTS[act], out.dtype is torch.float32, listed,
    )  # fmt: skip
    # One that stands for another's memory may only be written: what the kernel reads there is its own.
    shares = [t for t in _given(residual, partial) if t.data_ptr() != out.data_ptr()]
    return given, [*_given(*memory_a, *memory_b, bias, gate, out_rows, out_cols), *shares]


class Prologue:
    """RMSNorm and modulation of x, as in triton.py: 1 / rms per token (filled when x is gathered), 1 + scale and shift of the picked
    channels."""

    NONE: Prologue

    def __init__(self, norm=False, eps=0.0, stat=None, scale=None, shift=None, group=1, whole_scale=None):
        self.norm, self.eps, self.stat, self.group = norm, eps, stat, group
        self.scale, self.shift, self.whole_scale = scale, shift, whole_scale
        self.compact = None

    @classmethod
    def of(cls, x, scale, shift, in_index, norm, eps) -> Prologue:
        """For x [tokens, channels]."""
        if not norm and scale is None and shift is None:
            return cls.NONE
        tokens, width = x.shape
        count = max(1 if t is None else t.numel() // width for t in (scale, shift))

        def rows(t):
            if t is None:
                return None
            t = t.reshape(-1, width).float()
            return t.repeat_interleave(count // t.shape[0], 0).contiguous()

        def picked(t):
            return t if t is None or in_index is None else t.index_select(1, in_index)

        whole = None if scale is None else rows(scale) + 1
        stat = x.new_empty(tokens, dtype=torch.float32) if norm else None
        return cls(norm, eps, stat, picked(whole), picked(rows(shift)), tokens // count, whole)


Prologue.NONE = Prologue()


class Source:
    """An operand, as in cpu.py: memory rows of ``t`` (last stride 1), of which lists pick rows and columns."""

    def __init__(self, t, across=False, rows=None, cols=None, prologue=None):
        self.t, self.across, self.rows, self.cols = t, across, rows, cols
        # Rows of a list belong to a weight, whose columns the product picks; an activation has columns alone.
        self.prologue = prologue if rows is None else None


class Kit:
    """The kernels behind ``launch(kernel, parameters, blocks, threads, shared, reads, writes)``, which runs one by name; shared memory in
    bytes, and the tensors that it may read and write."""

    Source, Prologue = Source, Prologue

    def __init__(self, launch):
        self._launch = launch

    @staticmethod
    def pair_rows(half: int, rows):
        """Rows of a weight of pairs, and how many columns the product has: the kernel reads both halves."""
        return rows, half

    def _gather(self, x, out, p: Prologue, k: int, rows=None, cols=None) -> None:
        count = x.shape[0] if rows is None else rows.shape[0]
        given = Gather(
            *map(_at, (x, out, p.stat, p.scale, p.shift, rows, cols)), _step(x), _step(out), count, x.shape[1], k, p.group, p.eps
        )
        self._launch(
            f"pruned_gather_{NAMES[x.dtype]}", given, -(-count // _ROWS_WARPS), _ROWS_THREADS, 0, _given(x, p.scale, p.shift, rows, cols),
            _given(out, p.stat),
        )  # fmt: skip

    def gathered(self, x, p: Prologue = Prologue.NONE, rows=None, cols=None) -> torch.Tensor:
        """P(x)[rows, cols], in memory of its own with rows on 16 bytes; fills ``p.stat``."""
        count, k = x.shape[0] if rows is None else rows.shape[0], x.shape[1] if cols is None else cols.shape[0]
        out = x.new_empty(count, -(-k // 8) * 8)[:, :k]
        self._gather(x, out, p, k, rows, cols)
        return out

    def _operand(self, s: Source, again: bool):
        """(memory, rows, columns, whether the product looks at lists or at uneven rows). What has to be normalised, or picked from single
        channels, is made compact first, and so is what does not lie on 16 bytes if several tiles read it (``again``)."""
        t, rows, cols = s.t, s.rows, s.cols
        if s.prologue is not None and s.prologue is not Prologue.NONE:
            if s.prologue.compact is None:
                s.prologue.compact = self.gathered(t, s.prologue, cols=cols)
            t, cols = s.prologue.compact, None
        elif s.prologue is not None and cols is not None and not index.in_runs(cols):
            t, cols = self.gathered(t, cols=cols), None
        elif again and not even(t):
            t, rows, cols = self.gathered(t, rows=rows, cols=cols), None, None
        return t, rows, cols, cols is not None or not even(t)

    def product(
        self, a: Source, b: Source, out, m, n, k, *, bias=None, gate=None, act="none", half=0, u=None, partial=None, residual=None,
        out_rows=None, out_cols=None, fill=0,
    ) -> None:
        """out[:, out_cols] = residual + gate * act(A B^T + partial + bias), as in cpu.py."""
        _fill(out, residual, fill)
        pairs = act == "swiglu"
        c = tile_for(out.device, m, 2 * n if pairs else n)
        written = c.block_n // 2 if pairs else c.block_n
        tiles_m, tiles_n = -(-m // c.block_m), -(-n // written)
        (*memory_a, listed_a), (*memory_b, listed_b) = self._operand(a, tiles_n > 1), self._operand(b, tiles_m > 1)
        given, reads = _product(
            memory_a, memory_b, out, u, residual, bias, gate, partial, out_rows, out_cols, m, n, k, half, act, listed_a or listed_b
        )
        name = f"pruned_product_{form_of(a, b, pairs)}_{NAMES[memory_a[0].dtype]}_{c.block_m}"
        self._launch(name, given, tiles_m * tiles_n, 32 * c.warps, shared(c), reads, _given(out, u))

    def slope(self, dout, u, cols, gate, act, n, du, dbias, dgate) -> None:
        """Fill ``du``, ``dbias`` and ``dgate`` (each may be None), as in cpu.py; sums over tokens in a fixed order."""
        m, pairs = dout.shape[0], act == "swiglu"
        written = n // 2 if pairs else n
        group = m if gate is None else m // gate.shape[0]
        groups, parts, tiles = m // group, -(-group // _PART), -(-written // _COLUMNS)
        sums = [
            None if t is None else dout.new_empty(groups * parts, width, dtype=torch.float32) for t, width in ((dbias, n), (dgate, written))
        ]
        given = Slope(
            *map(_at, (dout, u, cols, gate, du, *sums)), *map(_step, (dout, u, du)),
            m, n, written, group, _PART, ACTS[act], pairs, dout.dtype is torch.float32, tiles,
        )  # fmt: skip
        # Sums alone of a float32 gradient read and write no other type.
        dtype = NAMES.get(next(t.dtype for t in (du, u, dout) if t is not None), "bf16")
        self._launch(
            f"pruned_slope_{dtype}", given, tiles * groups * parts, _ROWS_THREADS, _SUMS, _given(dout, u, cols, gate), _given(du, *sums)
        )
        if dbias is not None:
            dbias.copy_(sums[0].sum(0))
        if dgate is not None:
            dgate.copy_(sums[1].view(groups, parts, written).sum(1))

    def normed_backward(self, dh, x, in_index, prologue, dx, dscale, dshift) -> None:
        """Fill dx [tokens, channels] from dh [tokens, kept], and dscale and dshift, as in cpu.py."""
        (m, width), p, dtype = x.shape, prologue, NAMES[x.dtype]
        if p.norm and p.compact is None:
            # A frozen weight needs no P(x) in the backward, but the norm its rms.
            self._gather(x, None, p, 0)
        whole = dh if in_index is None else dh.new_zeros(m, width).index_copy_(1, in_index.long(), dh)
        dx = dx.view(m, width)
        given = NormBackward(*map(_at, (x, whole, p.stat, p.whole_scale, dx)), *map(_step, (x, whole, dx)), m, width, p.group)
        reads = _given(x, whole, p.stat)
        self._launch(f"pruned_norm_backward_{dtype}", given, -(-m // _ROWS_WARPS), _ROWS_THREADS, 0, [*reads, *_given(p.whole_scale)], [dx])
        if dscale is None and dshift is None:
            return
        groups, parts, tiles = m // p.group, -(-p.group // _PART), -(-width // _COLUMNS)
        sums = [None if t is None else x.new_empty(groups * parts, width, dtype=torch.float32) for t in (dscale, dshift)]
        given = Modulation(*map(_at, (x, whole, p.stat, *sums)), _step(x), _step(whole), width, p.group, _PART, tiles)
        self._launch(f"pruned_modulation_{dtype}", given, tiles * groups * parts, _ROWS_THREADS, _SUMS, reads, _given(*sums))
        for target, part in zip((dscale, dshift), sums):
            if target is not None:
                wide = target.view(-1, width)
                wide.copy_(part.view(wide.shape[0], -1, width).sum(1))


_kit = Kit(kernels.launch)
pair_rows, product, slope, normed_backward = _kit.pair_rows, _kit.product, _kit.slope, _kit.normed_backward
