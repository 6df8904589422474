"""Which frame sees which: patterns of frame-sparse attention as frozen, hashable objects.

A pattern lives at frame level: it says, for every query frame, which key frames are visible, and says it as
*runs* of consecutive frames, because runs are what a kernel turns into contiguous memory. A pattern is identified
by its ``key``, a self-contained string. Operators take that string instead of index tensors: it is constant under
``torch.compile``, survives ``torch.export`` into another process, never mixes plain tensors with ``DTensor``
arguments, and still lets the FLOP counter see the exact pattern when it runs on fake tensors. The index tensors are
built once per pattern and device.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

PARTS = ("self", "view", "time")
_ANCHOR_KINDS = ("views", "times", "frames")


class SegmentLists(NamedTuple):
    """Both directions of a pattern as CSR lists of runs; int32, contiguous.

    ``q_runs[q_ptr[f]:q_ptr[f + 1]]`` holds the key-frame runs ``(first_frame, n_frames)`` that query frame ``f`` sees,
    sorted, disjoint and maximal; ``k_ptr, k_runs`` hold the query-frame runs that see each key frame.
    """

    q_ptr: torch.Tensor
    q_runs: torch.Tensor
    k_ptr: torch.Tensor
    k_runs: torch.Tensor


def _runs(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Maximal runs of True in each row of a bool matrix."""
    rows = []
    for row in mask:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        rows.append([(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2])])
    return rows


def _csr(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = _runs(mask)
    ptr = np.cumsum([0] + [len(r) for r in rows]).astype(np.int32)
    flat = np.array([run for r in rows for run in r], dtype=np.int32).reshape(-1, 2)
    return ptr, flat


@dataclass(frozen=True, eq=False)
class FramePattern:
    """Frame-level visibility of ``n_frames`` frames; build one with :meth:`from_mask` or :meth:`from_lists`.

    Args:
        key: the self-contained description; two patterns are equal when their keys are. Not meant to be written by
            hand.
    """

    key: str

    def __eq__(self, other) -> bool:
        return isinstance(other, FramePattern) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    # ---- construction -------------------------------------------------------------------------------------------
    @classmethod
    def from_mask(cls, mask) -> FramePattern:
        """Pattern from a bool matrix ``mask[query_frame, key_frame]`` of shape [F, F] (tensor, array or nested list).

        Raises:
            ValueError: the matrix is not square, is empty or is not bool.
        """
        array = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
        if array.dtype != np.bool_:
            raise ValueError(f"mask: dtype {array.dtype}, expected bool")
        if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] == 0:
            raise ValueError(f"mask: shape {tuple(array.shape)}, expected a square [F, F] with F >= 1")
        rows = ";".join(",".join(f"{a}+{n}" for a, n in row) for row in _runs(array))
        return FramePattern(f"frames/{array.shape[0]}/{rows}")

    @classmethod
    def from_lists(cls, lists: Sequence[Iterable[int]]) -> FramePattern:
        """Pattern from one list of visible key frames per query frame, in any order, without repeats.

        Raises:
            TypeError: ``lists``, or what it holds for a frame, is no list. ValueError: a list names a frame outside
                ``[0, len(lists))`` or names one twice.
        """
        if not hasattr(lists, "__len__") or not hasattr(lists, "__iter__"):
            raise TypeError(f"lists: {lists!r:.60}, expected one list of key frames for each query frame")
        n = len(lists)
        mask = np.zeros((n, n), dtype=bool)
        for f, keys in enumerate(lists):
            # A tensor without dimensions has __iter__ all the same.
            if not hasattr(keys, "__iter__") or getattr(keys, "ndim", 1) == 0:
                raise TypeError(f"lists: {keys!r:.60} for query frame {f}, expected a list of key frames")
            for g in keys:
                if _index(g) is None or not 0 <= g < n:
                    raise ValueError(f"lists: query frame {f} names key frame {g}, expected 0..{n - 1}")
                if mask[f, g]:
                    raise ValueError(f"lists: query frame {f} names key frame {g} twice, expected each once")
                mask[f, g] = True
        return cls.from_mask(mask)

    @staticmethod
    def from_key(key: str) -> FramePattern:
        """The pattern that ``key`` describes (cached)."""
        return _from_key(key)

    # ---- what it says -------------------------------------------------------------------------------------------
    @property
    def n_frames(self) -> int:
        """Number of frames F."""
        return int(self.key.split("/", 2)[1])

    @property
    def pairs(self) -> int:
        """Number of visible (query frame, key frame) pairs."""
        return _pairs(self.key)

    @property
    def text_visible(self) -> bool:
        """Whether text tokens take part (for a grid: whether ``include`` has "self", the part that carries them)."""
        return True

    def frame_mask(self) -> np.ndarray:
        """Read-only bool [F, F], ``mask[query_frame, key_frame]``."""
        return _frame_mask(self.key)

    def lists(self, device: torch.device | str = "cpu") -> SegmentLists:
        """The run lists on ``device``; built once per pattern and device."""
        return _lists(self.key, str(device))

    # ---- export -------------------------------------------------------------------------------------------------
    def bool_mask(
        self,
        frame_len: int,
        *,
        n_text: int = 0,
        text_position: str = "front",
        valid: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        text_len: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """The token-level mask as ``scaled_dot_product_attention`` takes it: True where a query sees a key.

        An O(L^2) object: for tests and small sizes. Arguments as in :func:`vidkern.frame_sparse_attention`.

        Returns:
            bool [B or 1, 1, L, L] on ``device``, L = n_text + F * frame_len.
        """
        from . import reference

        f, n = self.n_frames, frame_len
        frame = torch.arange(f * n, device=device) // n
        table = torch.from_numpy(self.frame_mask().copy()).to(device)
        video = table[frame][:, frame]
        length = n_text + f * n
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool, device=device)
        span = reference.video_span(f * n, n_text, text_position == "front")
        mask[..., span, span] = video
        if n_text and self.text_visible:
            text = reference.text_span(f * n, n_text, text_position == "front")
            mask[..., text, :] = True
            mask[..., :, text] = True
        keys, rows = reference.liveness(
            valid, kv_len, text_len, n_frames=f, frame_len=n, n_text=n_text,
            text_front=text_position == "front", device=torch.device(device),
        )
        return mask & keys[:, None, None, :] & rows[:, None, :, None]

    def block_mask(
        self,
        frame_len: int,
        *,
        n_text: int = 0,
        text_position: str = "front",
        device: torch.device | str = "cpu",
        block_size: int = 128,
    ):
        """The pattern as a FlexAttention ``BlockMask``, without ever forming an L x L mask.

        Args:
            frame_len: tokens per frame N.
            n_text, text_position: text tokens, as in :func:`vidkern.frame_sparse_attention`.
            device: where the block tables live.
            block_size: rows and columns of a block.

        Returns:
            ``torch.nn.attention.flex_attention.BlockMask`` for sequences of L = n_text + F * frame_len tokens.
        """
        from torch.nn.attention.flex_attention import BlockMask

        f, n = self.n_frames, frame_len
        front = text_position == "front"
        # Text is one more "frame": index 0 in front, index f at the back.
        table = np.zeros((f + 1, f + 1), dtype=bool)
        video = slice(1, None) if front else slice(0, f)
        table[video, video] = self.frame_mask()
        text = 0 if front else f
        if n_text and self.text_visible:
            table[text, :] = True
            table[:, text] = True
        lens = np.full(f + 1, n)
        lens[text] = n_text
        length = int(lens.sum())
        owner = np.repeat(np.arange(f + 1), lens)
        blocks = -(-length // block_size)
        first = owner[np.arange(blocks) * block_size]
        last = owner[np.minimum(np.arange(1, blocks + 1) * block_size, length) - 1]
        # Summed-area table: how many visible frame pairs a block of (query frames, key frames) holds. Frames of
        # length zero (no text) sit at an end of the range and are never first or last of a block.
        area = np.zeros((f + 2, f + 2), dtype=np.int64)
        area[1:, 1:] = table.cumsum(0).cumsum(1)
        r0, r1 = first[:, None], last[:, None] + 1
        c0, c1 = first[None, :], last[None, :] + 1
        count = area[r1, c1] - area[r0, c1] - area[r1, c0] + area[r0, c0]
        full = count == (r1 - r0) * (c1 - c0)
        partial = (count > 0) & ~full

        def table_of(hit: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            num = torch.from_numpy(hit.sum(1).astype(np.int32))
            order = torch.from_numpy(np.argsort(~hit, axis=1, kind="stable").astype(np.int32))
            return num.to(device)[None, None], order.to(device)[None, None]

        lookup = torch.from_numpy(table).to(device)
        owners = torch.from_numpy(owner).to(device)

        def mask_mod(b, h, q_idx, kv_idx):
            return lookup[owners[q_idx], owners[kv_idx]]

        return BlockMask.from_kv_blocks(
            *table_of(partial), *table_of(full), BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=(length, length)
        )


def _index(value) -> int | None:
    """``value`` as an int if it is an integer of any kind (not bool), else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _window(name: str, value) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    pair = tuple(_index(x) for x in pair)
    if len(pair) != 2 or any(x is None or x < 0 for x in pair):
        raise ValueError(f"{name}: {value!r}, expected None, a distance w >= 0, or (back, ahead) with both >= 0")
    return pair


def _anchor_items(anchors, views: int, times: int) -> tuple[tuple, tuple, tuple]:
    if anchors is None:
        return ((), (), ())
    if not isinstance(anchors, Mapping) or any(kind not in _ANCHOR_KINDS for kind in anchors):
        raise ValueError(f'anchors: {anchors!r}, expected a mapping with keys among "views", "times", "frames"')
    found = {}
    for kind in _ANCHOR_KINDS:
        items = anchors.get(kind, ())
        cells = [c if kind == "frames" else (c,) for c in items] if isinstance(items, (list, tuple)) else None
        if cells is None or any(not isinstance(c, (list, tuple)) or None in map(_index, c) for c in cells) or any(
            len(c) != (2 if kind == "frames" else 1) for c in cells
        ):
            wanted = "(view, time) pairs" if kind == "frames" else "integers"
            raise ValueError(f'anchors: {items!r} in "{kind}", expected a list of {wanted}')
        found[kind] = tuple(sorted({tuple(map(_index, c)) for c in cells}))
    views_at, times_at = (tuple(c[0] for c in found[kind]) for kind in ("views", "times"))
    frames_at = found["frames"]
    for kind, items, limit in (("views", views_at, views), ("times", times_at, times)):
        for item in items:
            if not 0 <= item < limit:
                raise ValueError(f'anchors: {item} in "{kind}", expected 0..{limit - 1}')
    for v, t in frames_at:
        if not (0 <= v < views and 0 <= t < times):
            raise ValueError(f'anchors: {(v, t)} in "frames", expected (view, time) within ({views}, {times})')
    return (views_at, times_at, frames_at)


def grid_key(
    grid, causal_time=False, window_time=None, window_view=None, cyclic_view=False, anchors=None, include=PARTS
) -> str:
    """Check the rules of a grid and return the key of its pattern; see :class:`GridPattern` for the arguments."""
    size = tuple(_index(x) for x in grid) if isinstance(grid, (tuple, list)) else ()
    if len(size) != 2 or any(x is None or x < 1 for x in size):
        raise ValueError(f"grid: {grid!r}, expected (views, times), both integers >= 1")
    views, times = size
    for name, flag in (("causal_time", causal_time), ("cyclic_view", cyclic_view)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: {flag!r}, expected True or False")
    if not isinstance(include, (tuple, list)) or len(include) == 0 or any(p not in PARTS for p in include):
        raise ValueError(f'include: {include!r}, expected a non-empty subset of ("self", "view", "time")')
    time_window, view_window = _window("window_time", window_time), _window("window_view", window_view)
    if cyclic_view and view_window is None:
        raise ValueError("cyclic_view: True without window_view, expected a window_view that wraps around")
    av, at, af = _anchor_items(anchors, views, times)
    parts = "".join(p[0] for p in PARTS if p in include)
    rules = [f"grid/{views}x{times}", parts]
    if causal_time:
        rules.append("causal")
    if time_window is not None:
        rules.append(f"wt{time_window[0]}:{time_window[1]}")
    if view_window is not None:
        rules.append(f"{'wc' if cyclic_view else 'wv'}{view_window[0]}:{view_window[1]}")
    if av:
        rules.append("av" + ",".join(str(x) for x in av))
    if at:
        rules.append("at" + ",".join(str(x) for x in at))
    if af:
        rules.append("af" + ",".join(f"{v}.{t}" for v, t in af))
    return "/".join(rules)


@dataclass(frozen=True, eq=False)
class GridPattern(FramePattern):
    """The view x time cross and its relatives (4Real-Video-V2, arXiv 2506.18839, section 3).

    Frames are numbered view-major, ``f = view * times + time``. A query frame sees key frames of the same view (subject
    to the time rules), of the same time (subject to the view rules), its own frame, and the anchors.

    Args:
        views, times: grid size V, T.
        causal_time: same-view key frames must not lie later than the query frame. The own frame stays bidirectional.
        window_time: None, a distance w, or (back, ahead): same-view key frames must satisfy
            ``-back <= time_key - time_query <= ahead``.
        window_view: the same for the views of same-time key frames.
        cyclic_view: view distances wrap around modulo V (360-degree rigs); needs ``window_view``.
        anchors: mapping with any of ``"views"``, ``"times"`` (lists of indices) and ``"frames"`` (list of (view, time)):
            key frames that every query frame sees.
        include: which parts of the pattern to keep. The parts are disjoint and add up to the whole, so that
            :func:`vidkern.merge_attention` over a partition of them equals one call: ``"view"`` is same view, other
            time; ``"time"`` is same time, other view; ``"self"`` is the own frame, anchors that neither rule shows, and
            everything that involves text tokens.

    Raises:
        ValueError: sizes below 1, negative windows, anchors outside the grid, unknown parts, ``cyclic_view`` alone.
    """

    key: str = field(init=False, repr=False)
    views: int
    times: int
    causal_time: bool = field(default=False, kw_only=True)
    window_time: int | tuple[int, int] | None = field(default=None, kw_only=True)
    window_view: int | tuple[int, int] | None = field(default=None, kw_only=True)
    cyclic_view: bool = field(default=False, kw_only=True)
    anchors: Mapping | None = field(default=None, kw_only=True)
    include: tuple[str, ...] = field(default=PARTS, kw_only=True)

    def __post_init__(self):
        key = grid_key(
            (self.views, self.times), self.causal_time, self.window_time, self.window_view, self.cyclic_view,
            self.anchors, self.include,
        )
        object.__setattr__(self, "key", key)

    @property
    def n_frames(self) -> int:
        return self.views * self.times

    @property
    def text_visible(self) -> bool:
        return "self" in self.include


@functools.lru_cache(maxsize=4096)
def _from_key(key: str) -> FramePattern:
    kind, _, rest = key.partition("/")
    if kind == "frames":
        return FramePattern(key)
    if kind != "grid":
        raise ValueError(f"pattern: key {key!r}, expected one that FramePattern or GridPattern made")
    size, parts, *rules = rest.split("/")
    views, times = (int(x) for x in size.split("x"))
    kwargs, anchors = {"include": tuple(p for p in PARTS if p[0] in parts)}, {}
    for rule in rules:
        tag, value = rule[:2], rule[2:]
        if rule == "causal":
            kwargs["causal_time"] = True
        elif tag == "wt":
            kwargs["window_time"] = tuple(int(x) for x in value.split(":"))
        elif tag in ("wv", "wc"):
            kwargs["window_view"] = tuple(int(x) for x in value.split(":"))
            kwargs["cyclic_view"] = tag == "wc"
        elif tag in ("av", "at"):
            anchors["views" if tag == "av" else "times"] = [int(x) for x in value.split(",")]
        else:
            anchors["frames"] = [tuple(int(x) for x in cell.split(".")) for cell in value.split(",")]
    return GridPattern(views, times, anchors=anchors or None, **kwargs)


def _grid_mask(p: GridPattern) -> np.ndarray:
    f = np.arange(p.views * p.times)
    view, time = f // p.times, f % p.times
    dt = time[None, :] - time[:, None]
    dv = view[None, :] - view[:, None]
    time_rule = np.ones_like(dt, dtype=bool)
    if p.causal_time:
        time_rule &= dt <= 0
    if p.window_time is not None:
        back, ahead = _window("window_time", p.window_time)
        time_rule &= (-back <= dt) & (dt <= ahead)
    view_rule = np.ones_like(dv, dtype=bool)
    if p.window_view is not None:
        back, ahead = _window("window_view", p.window_view)
        if p.cyclic_view:
            view_rule = (dv % p.views <= ahead) | (-dv % p.views <= back)
        else:
            view_rule = (-back <= dv) & (dv <= ahead)
    same = dt.astype(bool) | dv.astype(bool)
    own = ~same
    in_view = (dv == 0) & time_rule & ~own
    in_time = (dt == 0) & view_rule & ~own
    av, at, af = _anchor_items(p.anchors, p.views, p.times)
    anchor = np.isin(view, av) | np.isin(time, at) | np.isin(f, [v * p.times + t for v, t in af])
    own = own | (anchor[None, :] & ~in_view & ~in_time)
    parts = {"self": own, "view": in_view, "time": in_time}
    return np.logical_or.reduce([parts[name] for name in p.include])


@functools.lru_cache(maxsize=512)
def _frame_mask(key: str) -> np.ndarray:
    pattern = _from_key(key)
    if isinstance(pattern, GridPattern):
        mask = _grid_mask(pattern)
    else:
        _, n, rows = key.split("/")
        mask = np.zeros((int(n), int(n)), dtype=bool)
        for row, text in zip(mask, rows.split(";")):
            for run in filter(None, text.split(",")):
                first, count = (int(x) for x in run.split("+"))
                row[first : first + count] = True
    mask.flags.writeable = False
    return mask


@functools.lru_cache(maxsize=4096)
def _pairs(key: str) -> int:
    return int(_frame_mask(key).sum())


@functools.lru_cache(maxsize=512)
def _lists(key: str, device: str) -> SegmentLists:
    mask = _frame_mask(key)
    arrays = (*_csr(mask), *_csr(mask.T))
    return SegmentLists(*(torch.from_numpy(a).to(device) for a in arrays))
