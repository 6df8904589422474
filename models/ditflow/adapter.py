"""What motion guidance needs of a transformer: one small interface, and the one of the tiny model here."""

import contextlib

import torch

from .taps import Reached, Taps


class Adapter:
    """A transformer that can be asked for queries, keys, values and hidden states of its blocks, and told other positions or values.

    Subclasses set `model` and `n_blocks` and write `grid`, `n_text`, `positions` and `forward`; their attentions call `Taps.attention` and their
    blocks `Taps.output` on `self.taps`. A condition is whatever `forward` takes besides the latent and the time, for one video.

    text_position: "front" or "back" of the video tokens. positional: "rope" or "additive", the kind of `positions`.
    """

    text_position = "front"
    positional = "rope"

    def __init__(self, model, n_blocks):
        self.model, self.n_blocks, self.taps = model, n_blocks, Taps()

    @property
    def dtype(self):
        """What the model computes in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def grid(self, z):
        """(F, h, w): latent frames and patches of a latent z."""
        raise NotImplementedError(f"{type(self).__name__}.grid")

    def n_text(self, condition):
        """Text tokens beside the video tokens in the attentions of the guidance blocks."""
        return 0

    def positions(self, z, condition):
        """The model's own table for z, fp32: RoPE [2 (query, key), 2 (cos, sin), N, width], or an additive embedding [1, N, dim]."""
        raise NotImplementedError(f"{type(self).__name__}.positions")

    def forward(self, z, t, condition):
        """The model's prediction for z [B, ...] at time t (a number or a 0-dimensional tensor)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def recomputing(self):
        """Context in which the model's forward pass runs its blocks by `Taps.run`."""
        return contextlib.nullcontext()

    def remove(self):
        """Undo what was done to the model."""
        self.taps.disarm()

    # ---- what guidance calls ---------------------------------------------------------------------------------------------------------------
    def check_blocks(self, name, blocks):
        """Raise ValueError unless all `blocks` exist."""
        for block in blocks:
            if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < self.n_blocks:
                raise ValueError(f"{name}={tuple(blocks)!r}: block {block!r}, expected 0 to {self.n_blocks - 1} for this transformer")

    def features(self, z, t, condition, wanted, *, positions=None, values=None, checkpointing=False):
        """{(block, kind): tensors} of a pass that ends as soon as all of ``wanted`` = {block: kinds} is there; kinds: see `Taps`."""
        taps, last = self.taps, max(wanted)
        taps.disarm()
        taps.wanted, taps.positions, taps.values, taps.last = wanted, positions, values or {}, last
        taps.plain = set(wanted) if checkpointing else None     # what stops or gives something away is not done twice
        try:
            with self.recomputing() if checkpointing else contextlib.nullcontext():
                self.forward(z.to(self.dtype), t, condition)
        except Reached:
            pass
        finally:
            found = taps.found
            taps.disarm()
        return found

    def arm(self, *, positions=None, values=None):
        """Let all following passes have this table and these injected values, until `disarm`."""
        self.taps.disarm()
        self.taps.positions, self.taps.values = positions, values or {}

    def disarm(self):
        """Back to the model as it is."""
        self.taps.disarm()

    @contextlib.contextmanager
    def frozen(self):
        """No gradients of weights inside."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


class TinyAdapter(Adapter):
    """Adapter of `TinyVideoDiT`. A condition is a label, int64 [1]; latents are [1, F, C, H, W]; t is sigma in 0 .. 1."""

    def __init__(self, model):
        super().__init__(model, len(model.blocks))
        self.positional = model.tiny.positions

    def grid(self, z):
        return self.model.grid_of(z)

    def n_text(self, condition):
        return self.model.tiny.n_text

    def positions(self, z, condition):
        return self.model.own_positions(*self.grid(z), z.device)

    def forward(self, z, t, condition):
        return self.model(z, torch.full((len(z),), float(t), device=z.device), condition.expand(len(z)), self.taps)
