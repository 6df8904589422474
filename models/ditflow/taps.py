"""What a pass through a transformer gives away and takes in: queries, keys and values of named blocks, positions, and where it stops."""

import contextlib
import dataclasses

import torch
from torch.utils.checkpoint import checkpoint

QK, KV, HIDDEN = "qk", "kv", "hidden"


class Reached(Exception):
    """The last tap of a pass was reached: what would follow is not needed."""


@dataclasses.dataclass
class Taps:
    """The state that the attentions of one model share. An adapter owns it; a `MotionGuidance` sets it.

    wanted: {block: kinds}, what to keep of the running pass; kinds among "qk" (queries and keys as they enter the attention, [B, L, H, D] with
    text), "kv" (keys and values of the video tokens, [B, N, H, D]) and "hidden" (output of the block, video tokens, [B, N, H * D]).
    found: {(block, kind): tensor or pair}. values: {block: (k, v)}, keys and values [1 or B, N, H, D] that stand in for those of the video tokens.
    positions: a table in place of the model's own, in the form of `Adapter.positions`, or None. last: block after which nothing is needed, or None.
    plain: blocks that are not recomputed in the backward pass while all others are; None: none is.
    """

    wanted: dict = dataclasses.field(default_factory=dict)
    found: dict = dataclasses.field(default_factory=dict)
    values: dict = dataclasses.field(default_factory=dict)
    positions: torch.Tensor | None = None
    last: int | None = None
    plain: set | None = None

    def attention(self, block, q, k, v, n_text=0, text_position="front"):
        """Called by attention `block` with q, k, v [B, L, H, D] after norms and rotation; returns the k, v to attend with.

        Raises `Reached` once nothing more is needed.
        """
        kinds, n_video = self.wanted.get(block, ()), k.shape[1] - n_text
        video = slice(n_text, None) if text_position == "front" else slice(0, n_video)
        if QK in kinds:
            self.found[block, QK] = (q, k)
        if KV in kinds:
            self.found[block, KV] = (k[:, video], v[:, video])
        if block == self.last and HIDDEN not in kinds:
            raise Reached
        if block in self.values:
            k, v = (self._replaced(own, given, video, n_video) for own, given in zip((k, v), self.values[block]))
        return k, v

    @staticmethod
    def _replaced(own, given, video, n_video):
        if given.shape[1] != n_video:
            raise ValueError(f"injected keys and values: {given.shape[1]} tokens, expected the {n_video} video tokens of this pass")
        out = own.clone()
        out[:, video] = given.to(own.dtype)
        return out

    def output(self, block, hidden):
        """Called after `block` with its video tokens [B, N, dim]. Raises `Reached` once nothing more is needed."""
        if HIDDEN in self.wanted.get(block, ()):
            self.found[block, HIDDEN] = hidden
        if block == self.last:
            raise Reached

    def run(self, block, function, *args):
        """``function(*args)``, the block's forward pass, recomputed in the backward pass where that is asked for."""
        if self.plain is None or block in self.plain or not torch.is_grad_enabled():
            return function(*args)
        positions, values = self.positions, self.values

        def again(*args):
            with self.holding(positions, values):    # by the time of the backward pass the taps serve another one
                return function(*args)

        return checkpoint(again, *args, use_reentrant=False)

    @contextlib.contextmanager
    def holding(self, positions, values):
        """Inside, the model has these positions and values, and nothing is kept or stopped."""
        before = dict(vars(self))
        self.disarm()
        self.positions, self.values = positions, values
        try:
            yield
        finally:
            vars(self).update(before)

    def disarm(self):
        """Back to the model as it is."""
        self.wanted, self.found, self.values, self.positions, self.last, self.plain = {}, {}, {}, None, None, None
